from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import pytest
from make_audited import edit_result, log_run, make_audited, sound

from orchestrator.checks import FAILED, PASSED, UNDECIDED, Check, read_claims
from orchestrator.home import home_of
from orchestrator.liveness import check_liveness
from orchestrator.runs import RunStore
from trainer import protocol
from trainer.protocol import RunDir


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return make_audited(tmp_path)


def checked(run: RunDir, measured: dict[str, object] | None = None) -> dict[str, Check]:
    store = RunStore(home_of(run))
    return {check.name: check for check in check_liveness(store, read_claims(run), measured or sound(run))}


def add_sibling(run: RunDir, *, seed: int, first_loss: float, **changes: object) -> RunDir:
    """A run like this one with another seed, as far as its first step."""
    spec = dataclasses.replace(protocol.read_spec(run.spec), run_id=f"sibling{seed}", seed=seed, **changes)  # type: ignore[arg-type]
    sibling = home_of(run).run(spec.run_id)
    protocol.write_spec(sibling.spec, spec)
    log = protocol.EventLog(sibling.attempt(1).events)
    log.emit(protocol.START, seed=seed)
    log.metrics(1, 0.5, train_loss=first_loss)
    return sibling


def test_values_that_were_used_as_asked_pass(run: RunDir) -> None:
    checks = checked(run)
    assert [check.status for check in checks.values()] == [PASSED, PASSED, PASSED, UNDECIDED]
    assert checks["live.config"].note.endswith("knobs, by the model file's own words")


def test_a_knob_with_another_value_in_the_model_file_is_told(run: RunDir) -> None:
    measured = copy.deepcopy(sound(run))
    measured["config"]["optim"]["muon_weight_decay"] = 0.5
    del measured["config"]["ttt"]["lr"]
    check = checked(run, measured)["live.config"]
    assert check.status == FAILED and isinstance(check.found, list)
    assert [words.partition(":")[0] for words in check.found] == ["optim.muon_weight_decay", "ttt.lr"]
    assert check.found[0].endswith("used 0.5")


def test_knobs_of_scoring_may_differ_where_a_stored_model_is_scored_again(run: RunDir) -> None:
    spec = dataclasses.replace(protocol.read_spec(run.spec), source="other", source_sha256="ab" * 32)
    protocol.write_spec(run.spec, spec)
    measured = copy.deepcopy(sound(run))
    measured["config"]["ttt"]["lr"] = 0.5
    checks = checked(run, measured)
    assert checks["live.config"].status == PASSED
    assert "live.seed" not in checks and "live.parameters" not in checks
    measured["config"]["optim"]["matrix_lr"] = 0.5
    assert checked(run, measured)["live.config"].status == FAILED


def test_an_attempt_that_began_with_another_seed_is_told(run: RunDir) -> None:
    log = run.attempt(1).events
    log.write_text(log.read_text().replace('"seed":7', '"seed":8', 1))
    check = checked(run)["live.start"]
    assert (check.status, check.found) == (FAILED, f"{run.run_id}, seed 8")
    log.unlink()
    assert checked(run)["live.start"].status == UNDECIDED


def test_another_number_of_parameters_is_told(run: RunDir) -> None:
    edit_result(run, parameters=78)
    assert checked(run)["live.parameters"].status == FAILED


def test_seeds_that_differ_at_the_first_step_pass(run: RunDir) -> None:
    add_sibling(run, seed=8, first_loss=6.25)
    check = checked(run)["live.seed"]
    assert (check.status, check.found) == (PASSED, 0)
    assert check.note == "training loss at step 1: 6.500000, seed 8 6.250000"


def test_a_seed_that_changes_nothing_is_told(run: RunDir) -> None:
    add_sibling(run, seed=8, first_loss=6.25)
    add_sibling(run, seed=9, first_loss=6.5)
    check = checked(run)["live.seed"]
    assert (check.status, check.found) == (FAILED, 1)


def test_runs_of_other_configurations_or_data_are_no_siblings(run: RunDir) -> None:
    config = copy.deepcopy(protocol.read_spec(run.spec).config)
    config["optim"]["matrix_lr"] = 0.5
    add_sibling(run, seed=8, first_loss=6.5, config=config)
    add_sibling(run, seed=9, first_loss=6.5, manifest_sha256="ab" * 32)
    (home_of(run).runs / "broken").mkdir()
    home_of(run).run("broken").spec.write_text("{")
    assert checked(run)["live.seed"].note == "there is no run of this configuration with another seed"


def test_a_run_that_logged_no_step_decides_nothing_about_its_seed(run: RunDir) -> None:
    add_sibling(run, seed=8, first_loss=6.25)
    log_run(run, run.attempt(1))
    log = run.attempt(1).events
    log.write_text("".join(line for line in log.read_text().splitlines(keepends=True) if "train_loss" not in line))
    assert checked(run)["live.seed"].status == UNDECIDED
