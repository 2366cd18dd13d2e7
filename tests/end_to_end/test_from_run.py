"""A trained run, then its stored model scored again by the command and by a study: no training, the same books."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from orchestrator.evidence import gather
from orchestrator.home import Home
from orchestrator.score_chain import problems
from tests.end_to_end.micro import DATA, caddie
from tests.trainer.make_run import MICRO
from trainer import protocol
from trainer.protocol import read_lines, read_spec

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]  # fourteen runs, each a process of its own

SWEEP = """
name = "sweep"
question = "Which rate of test-time training suits this model?"
preset = "smoke"
data = "{data}"
from = "{run}"

[set]
{settings}

[space."ttt.lr"]
low = 0.01
high = 1.0
log = true

[search]
trials = 2
startup_trials = 1
"""


def toml(values: dict[str, object]) -> str:
    return "\n".join(f'"{knob}" = {json.dumps(value)}' for knob, value in values.items())


def test_a_stored_model_is_scored_again_by_the_command_and_by_a_study(make_home: Callable[[str], Home]) -> None:
    home = make_home("home")
    settings = [word for knob, value in MICRO.items() for word in ("--set", f"{knob}={value}")]
    begin = ("--home", str(home.root))
    made = caddie(*begin, "run", "smoke", "--data", DATA, "--seeds", "5", "--name", "made", *settings, cwd=home.root)
    assert made.returncode == 0, made.stderr
    (base,) = gather(home, "made").arms[0].runs
    assert base.result is not None

    again = caddie(*begin, "run", "--from", base.run_id[:10], "--set", "ttt.lr=0.5", "--name", "again", cwd=home.root)
    assert again.returncode == 0, again.stderr
    evidence = gather(home, "again")
    (run,) = evidence.arms[0].runs
    assert run.result is not None and run.run_id != base.run_id
    assert read_spec(home.run(run.run_id).spec).source == base.run_id
    assert "train" not in run.result.phases
    assert (run.bpb(protocol.ROUNDTRIP), run.bpb(protocol.SLIDING)) == (
        base.bpb(protocol.ROUNDTRIP),
        base.bpb(protocol.SLIDING),
    )
    assert run.bpb(protocol.TTT) != base.bpb(protocol.TTT)
    assert f"{run.bpb(protocol.TTT):.5f}" in again.stdout
    assert home.mlflow_database.exists() and evidence.problems == ()
    assert evidence.cpu_run_seconds > 0  # the ledger has it
    events = [event for _, event in read_lines(home.run(run.run_id).attempt(1).events)]
    assert problems(events, run.result) == []
    checked = caddie(*begin, "verify", run.run_id, cwd=home.root)
    assert checked.returncode == 0, checked.stdout + checked.stderr

    file = home.root / "sweep.toml"
    file.write_text(SWEEP.format(data=DATA, run=base.run_id, settings=toml(MICRO)), encoding="utf-8")
    swept = caddie(*begin, "study", "run", str(file), cwd=home.root)
    assert swept.returncode == 0, swept.stderr
    trials = gather(home, "sweep").trials
    assert [trial.trial.value for trial in trials] == [trial.runs[0].bpb(protocol.TTT) for trial in trials]
    assert trials[0].trial.value == base.bpb(protocol.TTT)  # the preset's own rate: the same weights, scored again
    assert trials[1].trial.value != trials[0].trial.value

    coarser = caddie(
        *begin, "run", "--from", base.run_id, "--set", "quant.mlp_bits=4", "--name", "coarser", cwd=home.root
    )
    assert coarser.returncode == 0, coarser.stderr
    (run,) = gather(home, "coarser").arms[0].runs
    assert run.result is not None and run.result.train_seconds == 0.0 and "train" not in run.result.phases
    assert run.bpb(protocol.POST_EMA) == base.bpb(protocol.POST_EMA)  # the same weights
    assert run.result.model_bytes < base.result.model_bytes and run.bpb(protocol.ROUNDTRIP) != base.bpb(
        protocol.ROUNDTRIP
    )
    checked = caddie(*begin, "verify", run.run_id, cwd=home.root)
    assert checked.returncode == 0, checked.stdout + checked.stderr

    refused = caddie(*begin, "run", "--from", base.run_id, "--set", "optim.matrix_lr=0.5", cwd=home.root)
    assert refused.returncode == 3
    assert "optim.matrix_lr is 0.5, there" in refused.stderr


CELLS = """
name = "cells"
question = "Do rounding and learning act on one another?"
preset = "smoke"
data = "{data}"
from = "made"

[set]
{settings}

[factors.rounding.nearest]
"quant.method" = "rtn"
[factors.rounding.gptq]
"quant.method" = "gptq"
"quant.mlp_bits" = 5

[factors.learning.none]
"ttt.method" = "off"
[factors.learning.sgd]
"ttt.lr" = 0.5
[factors.learning.before]
"ttt.lr" = 0.5
"ttt.before_quantization" = true
"""


def test_a_factorial_study_of_two_checkpoints_trains_nothing_and_ends_in_its_contrasts(
    make_home: Callable[[str], Home],
) -> None:
    home = make_home("home")
    settings = [word for knob, value in MICRO.items() for word in ("--set", f"{knob}={value}")]
    begin = ("--home", str(home.root))
    made = caddie(*begin, "run", "smoke", "--data", DATA, "--seeds", "5,6", "--name", "made", *settings, cwd=home.root)
    assert made.returncode == 0, made.stderr
    file = home.root / "cells.toml"
    file.write_text(CELLS.format(data=DATA, settings=toml(MICRO)), encoding="utf-8")
    checked = caddie(*begin, "study", "check", str(file), cwd=home.root)
    assert "6 cells, 2 rounding × 3 learning, on seeds 5, 6" in checked.stdout
    assert "at most 12 runs" in checked.stdout
    ran = caddie(*begin, "study", "run", str(file), cwd=home.root)
    assert ran.returncode == 0, ran.stderr
    evidence = gather(home, "cells")
    sources = {run.seed: run.run_id for run in gather(home, "made").arms[0].runs}
    for arm in evidence.arms:
        specs = [read_spec(home.run(run.run_id).spec) for run in arm.runs]
        assert {spec.seed: spec.source for spec in specs} == sources, arm.name
        assert {run.result.train_seconds for run in arm.runs if run.result} == {0.0}, arm.name
    parts = {arm.name: read_spec(home.run(arm.runs[0].run_id).spec).source_part for arm in evidence.arms}
    assert set(parts.values()) == {protocol.WEIGHTS}
    assert "Interactions" in ran.stdout and "(sgd − none) with gptq − with nearest" in ran.stdout
    assert "such scores are for this study alone" in ran.stdout
    again = caddie(*begin, "study", "run", str(file), cwd=home.root)
    assert again.returncode == 0, again.stderr
    assert len(gather(home, "cells").attempts) == 12  # nothing is run twice
    audited = caddie(*begin, "audit", evidence.arm("gptq+before").runs[0].run_id, "--sample", "512", cwd=home.root)  # type: ignore[union-attr]
    assert audited.returncode == 5 and "c3.before_quantization" in audited.stdout
