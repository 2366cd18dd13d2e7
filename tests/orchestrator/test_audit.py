from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from make_audited import edit_result, make_audited, sound
from make_verified import BUNDLE, data_of

from orchestrator import audit
from orchestrator.audit import Audit
from orchestrator.checks import FAILED, NOTED, PASSED, UNDECIDED, Check
from orchestrator.errors import ConfigError, DataError, MachineError, ProtocolError
from orchestrator.findings import failure_lines, write
from trainer import protocol
from trainer.protocol import RunDir

NO_TRAINER = "the trainer is not needed here"


class Prober:
    """Stands for the trainer's process: gives these numbers, or raises."""

    def __init__(self, outcome: dict[str, Any] | Exception) -> None:
        self.outcome, self.asked = outcome, list[tuple[str, list[str], int, int]]()

    def __call__(self, run: RunDir, root: Path, gpus: Sequence[str], sample: int, seed: int) -> dict[str, Any]:
        self.asked.append((str(root), list(gpus), sample, seed))
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return self.outcome


def packs(bundle: bytes) -> Callable[[object], bytes]:
    """Stands for the packing of a bundle, which takes seconds."""
    return lambda _config: bundle


def audited(run: RunDir, prober: Prober | None = None, **options: Any) -> Audit:
    return audit.audit(
        run,
        **{
            "sample": 1000,
            "timeout_seconds": 60.0,
            "prober": prober or Prober(sound(run)),
            "pack": packs(BUNDLE),
            **options,
        },
    )


def failures(found: Audit) -> list[str]:
    return [check.name for check in found.failed]


def named(found: Audit, name: str) -> Check:
    [check] = [check for check in found.checks if check.name == name]
    return check


def test_a_sound_run_passes(tmp_path: Path) -> None:
    run = make_audited(tmp_path)
    prober = Prober(sound(run))
    found = audited(run, prober, seed=5, evaluates=False)
    assert (found.verdict, found.exit_code, failures(found)) == (PASSED, 0, [])
    assert prober.asked == [(str(tmp_path / "data" / "made-up"), [], 1000, 5)]
    assert found.measured == sound(run)
    undecided = [check.name for check in found.checks if check.status == UNDECIDED]
    assert undecided == ["live.seed", "reach.files", "reach.network"]


def test_it_is_noted_whether_the_probes_ran_the_bundles_own_code(tmp_path: Path) -> None:
    run = make_audited(tmp_path)
    own = named(audited(run, evaluates=False), "probes.source")
    assert (own.status, own.note) == (PASSED, "this source packs to the very bundle")
    other = named(audited(run, evaluates=False, pack=packs(b"another version")), "probes.source")
    assert other.status == NOTED and other.note.startswith(
        "another version's: c3.first_chunk and the watched evaluation"
    )


def test_what_the_bundle_reads_beside_its_files_is_told(tmp_path: Path) -> None:
    found = audited(make_audited(tmp_path))  # the fake bundle reads our checkout, as a real one must not
    assert failures(found) == ["reach.files"]
    check = named(found, "reach.files")
    assert isinstance(check.found, list) and any(
        re.search(r"/trainer/(__pycache__/)?protocol\.", path) for path in check.found
    )
    assert named(found, "reach.network").status == named(found, "ttt.bpb").status == PASSED
    assert found.evaluation_seconds is not None


def test_the_evaluation_may_be_left_out(tmp_path: Path) -> None:
    run = make_audited(tmp_path)
    found = audited(run, evaluates=False)
    assert found.evaluation_seconds is None
    assert [named(found, f"reach.{what}").note for what in ("files", "network")] == ["left out: --no-evaluation"] * 2


def test_the_record_holds_every_check_and_what_was_measured(tmp_path: Path) -> None:
    run = make_audited(tmp_path)
    found = audited(run, evaluates=False)
    write(run.audit, found)
    record = json.loads(run.audit.read_text())
    assert (record["verdict"], len(record["checks"])) == (found.verdict, len(found.checks))
    assert record["measured"]["probes"]["distribution"]["largest_log_sum"] == 2e-7
    assert record["result_sha256"] and record["caddie"]


def test_a_leak_fails_the_audit_and_is_told_in_full(tmp_path: Path) -> None:
    run = make_audited(tmp_path)
    measured = sound(run)
    measured["probes"]["future"]["inputs"].update(moved=9, largest=0.5)
    found = audited(run, Prober(measured), evaluates=False)
    assert (failures(found), found.exit_code) == (["c1.scorer.sliding"], ProtocolError.exit_code)
    told = "\n".join(failure_lines(found))
    assert "error: c1.scorer.sliding: no score may move with later tokens" in told
    assert "inputs: 9 of 1,000 moved" in told and "hint: look at what the scorer reads" in told
    assert audit.summary(found).startswith(f"{run.run_id}: AUDIT FAILED, 1 of ")


@pytest.mark.parametrize(
    ("name", "note"),
    [
        ("artifact", "not run: artifact.bin missing"),
        ("bundle", "not run: train_gpt.py missing"),
        ("spec", "not run: there is no data set that can be read"),
    ],
)
def test_a_run_without_its_files_is_not_probed(tmp_path: Path, name: str, note: str) -> None:
    run = make_audited(tmp_path)
    getattr(run, name).unlink()
    prober = Prober(AssertionError(NO_TRAINER))
    found = audited(run, prober)
    assert prober.asked == [] and found.verdict == FAILED
    assert (named(found, "probes").status, named(found, "probes").note) == (UNDECIDED, note)
    assert named(found, "reach.files").note == note


def test_another_model_file_than_the_runs_is_not_probed(tmp_path: Path) -> None:
    run = make_audited(tmp_path)
    run.artifact.write_bytes(b"x")
    found = audited(run, Prober(AssertionError(NO_TRAINER)))
    assert named(found, "probes").note == "not probed: model.sha256 failed"


def test_a_run_whose_spec_cannot_be_read_is_not_probed_on_other_data_either(tmp_path: Path) -> None:
    run = make_audited(tmp_path)
    root = data_of(run).root
    run.spec.write_text("{")
    found = audited(run, Prober(AssertionError(NO_TRAINER)), data_dir=root)
    assert named(found, "probes").note == "not probed: spec failed"


def test_a_spec_of_a_version_with_other_knobs_is_told_and_the_run_probed(tmp_path: Path) -> None:
    run = make_audited(tmp_path)
    spec = protocol.read_json(run.spec)
    del spec["config"]["limits"]["artifact_bytes"]
    protocol.write_json_atomically(run.spec, spec)
    found = audited(run, evaluates=False)
    assert failures(found)[0] == "spec.run_id" and found.measured is not None


def test_other_data_than_the_runs_say_nothing_against_it(tmp_path: Path) -> None:
    run = make_audited(tmp_path)
    data_of(run).tokenizer.write_bytes(b"others")
    found = audited(run, Prober(AssertionError(NO_TRAINER)))
    assert (failures(found), found.exit_code) == (["data.tokenizer"], DataError.exit_code)
    assert audit.summary(found).endswith("not audited, the data at hand are not the run's")


def test_a_model_that_the_trainer_cannot_read_is_told(tmp_path: Path) -> None:
    run = make_audited(tmp_path)
    found = audited(run, Prober(ProtocolError("artifact.bin: damaged")), evaluates=False)
    assert failures(found) == ["probes"]
    assert named(found, "probes").found == "artifact.bin: damaged"
    assert found.measured is None


def test_a_machine_without_the_trainer_and_a_senseless_sample_are_refused(tmp_path: Path) -> None:
    run = make_audited(tmp_path)
    with pytest.raises(MachineError):
        audited(run, Prober(MachineError("no torch")))
    with pytest.raises(ConfigError, match="--sample must be at least 1 position, got 0"):
        audited(run, sample=0)


def test_the_text_shows_every_check_the_sample_and_the_tolerance(tmp_path: Path) -> None:
    run = make_audited(tmp_path)
    edit_result(run, train_seconds=301.0)
    found = audited(run, evaluates=False)
    text = audit.as_text(found)
    for check in found.checks:
        assert f"\n{check.name} " in text
    assert "Measured" in text and "300 of 300 positions, all of them, seed 0" in text
    assert "1e-05 nats on cpu" in text and "1 failed, 3 undecided" in text
