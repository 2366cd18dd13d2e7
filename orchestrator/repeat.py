"""How to repeat a study: its commands, its own text, and what each record's runs were made of."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path

from orchestrator.cells import ABSENT, Cell, Link, Table
from orchestrator.errors import CaddieError
from orchestrator.evidence import ArmEvidence, Evidence, RunEvidence
from orchestrator.home import Home
from orchestrator.page import Listing
from orchestrator.presets import load_preset
from trainer import protocol
from trainer.config import Config, from_mapping, to_mapping
from trainer.protocol import Spec

SHOWN_HASH = 12
PRODUCTS = ("artifact_sha256", "bundle_sha256")


def listing(home: Home, evidence: Evidence) -> Listing:
    """Commands for the whole study, for one record, for one run by hand, and for checking a stored model."""
    parts = [
        ("The whole study, from its own text below; what has been run is not run again:", "caddie study run study.toml")
    ]
    for arm in evidence.arms:
        specs = [spec for run in arm.runs if (spec := _spec(home, run)) is not None]
        if specs:
            seeds = ",".join(str(run.seed) for run in arm.runs)
            parts.append((f"{arm.name} alone:", _run_command(evidence, specs, seeds)))
    checked = next((run for arm in evidence.arms for run in arm.runs if run.result and run.result.artifact_bytes), None)
    if checked is not None and evidence.study.script:
        parts.append(("One run by hand, in an empty folder that has the data laid out:", _by_hand(home, checked)))
    elif checked is not None:
        by_hand = f"torchrun --standalone --nproc_per_node={checked.result.world_size if checked.result else 1} train_gpt.py ."
        parts += [
            (f"One run by hand, in a copy of its directory (runs/{checked.run_id}) without its attempts:", by_hand),
            (
                "Its stored model, scored again without network or training data, and probed for what its score depends on:",
                f"caddie verify {checked.run_id}\ncaddie audit {checked.run_id}",
            ),
        ]
    return Listing(title="How to repeat it", parts=(*parts, ("study.toml:", evidence.state.source.strip())))


def _by_hand(home: Home, run: RunEvidence) -> str:
    """The command that a script's run was, with the variables that the study gave it."""
    spec = _spec(home, run)
    given = {**(spec.config.get("env", {}) if spec else {}), "SEED": str(run.seed), "RUN_ID": run.run_id}
    variables = [f"{name}={shlex.quote(str(value))}" for name, value in given.items()]
    processes = run.result.world_size if run.result else 1
    return " ".join(
        [*variables, f"torchrun --standalone --nproc_per_node={processes}", f"runs/{run.run_id}/train_gpt.py"]
    )


def _run_command(evidence: Evidence, specs: Sequence[Spec], seeds: str) -> str:
    """`caddie run` with the settings in which the runs' configuration differs from its preset, or `caddie replay`."""
    script = evidence.study.script
    whence = ["replay", str(script.script.path)] if script else ["run", *_whence(specs)]
    words = ["caddie", *whence, "--seeds", seeds, "--data", evidence.study.data]
    for knob, value in _settings(evidence, specs[0]):
        words += ["--set", f"{knob}={_as_setting(value)}"]
    gpus = evidence.study.resources.gpus_per_run
    return shlex.join([*words, *(["--gpus", str(gpus)] if gpus else [])])


def _whence(specs: Sequence[Spec]) -> list[str]:
    """What is trained, or the runs whose models are scored again."""
    sources = dict.fromkeys(spec.source for spec in specs if spec.source)
    return ["--from", ",".join(sources)] if sources else [specs[0].preset]


def _settings(evidence: Evidence, spec: Spec) -> Iterator[tuple[str, object]]:
    if spec.script:
        yield from spec.config.get("env", {}).items()
        return
    try:
        preset = to_mapping(load_preset(spec.preset))
    except CaddieError:  # a preset of one's own that has been moved since: every setting is told
        preset = to_mapping(Config())
    for section, entries in to_mapping(from_mapping(spec.config)).items():
        for key, value in entries.items():
            if preset[section][key] != value:
                yield f"{section}.{key}", value


def _as_setting(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def table(home: Home, evidence: Evidence) -> Table:
    """What each record's runs were made of, by hash: two runs with the same are the same but for their seed."""
    rows = tuple(_row(home, arm, run) for arm in evidence.arms for run in arm.runs)
    return Table(
        title="What it was made of",
        columns=(
            "Record", "Seed", "Run", "Code", "Uncommitted", "Data", "Bundle", "Model file", "torch", "Device", "Processes",
        ),
        rows=rows, note="Hashes: SHA-256, shortened; in full in the files of each run.",
    )  # fmt: skip


def _row(home: Home, arm: ArmEvidence, run: RunEvidence) -> tuple[Cell, ...]:
    spec, result = _spec(home, run), run.result
    folder = home.run(run.run_id)
    link = Link(folder.spec.relative_to(home.root).as_posix(), run.run_id) if spec else run.run_id
    code = spec.code if spec else {}
    made = [getattr(result, name) if result else "" for name in PRODUCTS]
    return (
        arm.name, str(run.seed), link, _short(code.get("git_sha")), _short(code.get("diff_sha256")),
        _short(spec.manifest_sha256 if spec else None), _short(made[1] or (spec.bundle_sha256 if spec else None)),
        _short(made[0]), torch_of(home, run) or ABSENT, result.device if result else ABSENT,
        str(result.world_size) if result else ABSENT,
    )  # fmt: skip


def torch_of(home: Home, run: RunEvidence) -> str:
    """Version of torch that the deciding attempt says it ran on; empty where it says nothing."""
    if not run.source:
        return ""
    attempt = home.run(run.run_id).attempt(int((home.root / run.source).parent.name))
    return _torch_in(attempt.events)


def _torch_in(events: Path) -> str:
    try:
        started = (event for _, event in protocol.read_lines(events) if event.get("kind") == protocol.START)
        return str(next(started, {}).get("torch", ""))
    except CaddieError:  # a damaged line before it: the curves have named it
        return ""


def _short(digest: str | None) -> str:
    return digest[:SHOWN_HASH] if digest else ABSENT


def _spec(home: Home, run: RunEvidence) -> Spec | None:
    try:
        return protocol.read_spec(home.run(run.run_id).spec)
    except (CaddieError, OSError):
        return None
