"""Small runs of the real trainer: seconds on one core, every technique on."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from orchestrator import bundle
from orchestrator.home import Home
from orchestrator.presets import load_preset
from orchestrator.runs import RunRequest, RunStore, part_of
from tests.trainer.make_data import VOCAB_SIZE
from trainer.config import Config, with_knobs
from trainer.protocol import ARTIFACT, AttemptDir, DataDir, Result, RunDir, read_lines, read_result, sha256_of

ROOT = Path(__file__).parents[2]

MICRO: dict[str, Any] = {
    "model.vocab_size": VOCAB_SIZE, "model.width": 32, "model.rope_dims": 4, "schedule.steps": 12, "schedule.warmup_steps": 1,
    "schedule.log_every": 1, "data.tokens_per_step": 256, "data.sequence_length": 32, "evaluation.sequence_length": 32,
    "evaluation.stride": 16, "ttt.chunk_tokens": 256, "quant.calibration_steps": 2, "quant.brotli_quality": 5,
}  # fmt: skip


def micro_config(**knobs: Any) -> Config:
    """The smoke preset, smaller still; knobs by name with `__` for the dot."""
    changed = {name.replace("__", "."): value for name, value in knobs.items()}
    return with_knobs(load_preset("smoke"), {**MICRO, **changed})


def plan(
    home: Path, data: Path, config: Config, *, seed: int = 1, replicate: int = 0, source: RunDir | None = None,
    part: str = ARTIFACT,
) -> RunDir:  # fmt: skip
    """The directory of a run, ready to be started; with a source in the same home, one that takes that part of it."""
    request = RunRequest(
        preset="smoke", config=config, seed=seed, replicate=replicate, data_dir=str(data),
        manifest_sha256=sha256_of(DataDir(data).manifest),
        source=source.run_id if source else "", source_part=part,
        source_sha256=sha256_of(part_of(source, part)) if source else "",
    )  # fmt: skip
    return RunStore(Home(home)).plan(request, bundle=bundle.build(config), code={})


def execute(run: RunDir, *, processes: int = 1, source: bool = False, python: tuple[str, ...] = ()) -> AttemptDir:
    """Start the run's next attempt as a job would, from its bundle (or from the readable source), and wait for it."""
    attempt = run.attempt(len(run.attempts()) + 1)
    attempt.root.mkdir(parents=True)
    program = ["-m", "trainer.main"] if source else [str(run.bundle)]
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    others = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path and Path(path) != ROOT]
    paths = [*others, str(ROOT)] if source else others  # a bundle must do without our checkout
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    with attempt.stdout.open("wb") as stdout, attempt.stderr.open("wb") as stderr:
        subprocess.run(
            [sys.executable, *python, *launcher, *program, str(run.root), "--attempt", str(attempt.number)],
            cwd=run.root, env=environment, stdout=stdout, stderr=stderr, check=False, timeout=300,
        )  # fmt: skip
    return attempt


def result_of(attempt: AttemptDir) -> Result:
    """The attempt's result; the end of its stderr in the failure where there is none."""
    assert attempt.result.exists(), attempt.stderr.read_text()[-3000:]
    return read_result(attempt.result)


def metrics_of(attempt: AttemptDir, name: str) -> dict[int, float]:
    """One metric by step."""
    events = (event for _, event in read_lines(attempt.events))
    return {e["step"]: e["values"][name] for e in events if e["kind"] == "metric" and name in e["values"]}
