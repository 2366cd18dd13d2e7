"""What a home's MLflow holds, as its UI would read it."""

import sqlite3

from orchestrator.tracking import MlflowStore

NAME = "wd-qk-ttt-smoke"


def runs_by_key(home, name=NAME):
    client = MlflowStore(home).client
    experiment = client.get_experiment_by_name(name)
    return {
        run.data.tags["caddie.key"]: run for run in client.search_runs([experiment.experiment_id], max_results=1000)
    }


def points(home, run, name):
    return [(p.step, p.timestamp, p.value) for p in MlflowStore(home).client.get_metric_history(run.info.run_id, name)]


def count_metric_points(home):
    with sqlite3.connect(home.mlflow_database) as connection:
        return connection.execute("SELECT count(*) FROM metrics").fetchone()[0]
