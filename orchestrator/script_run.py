"""A run of somebody else's script: what it is given, its log followed as it is written, and its result read off the log.

The script is started as its author starts it, and knows nothing of run directories; the worker speaks for it. Standard
library only: this runs inside a job.
"""

from __future__ import annotations

import math
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from orchestrator import data_view, read_trace
from orchestrator.errors import CaddieError
from orchestrator.public_log import CurvePoint, LoggedRun, ScoreLine, read_log
from orchestrator.read_trace import SHIMS
from orchestrator.script import Script, read_script
from orchestrator.variables import SEED
from trainer import protocol
from trainer.protocol import (
    ELAPSED_FRAC,
    METRIC,
    PHASE,
    STAGES,
    START,
    TOKENS_PER_SECOND,
    TRAIN_LOSS,
    VAL_LOSS,
    WARNING,
    AttemptDir,
    EventLog,
    Failure,
    Result,
    RunDir,
    Score,
    Spec,
)

FLASH_ATTENTION = "flash_attn_interface"
FLASH_ATTENTION_SHIM = SHIMS / "flash_attention"
ASK_SECONDS = 120.0  # for an interpreter to say what it has; from a network file system the first start is slow

LOG_SUFFIXES = (".txt", ".log")
MOST_LOG_BYTES = 20_000_000

INFRASTRUCTURE = re.compile(
    r"(RANK|LOCAL_RANK|WORLD_SIZE|LOCAL_WORLD_SIZE|MASTER_\w+|GROUP_\w+|ROLE_\w+|PATH|HOME|USER|LOGNAME|SHELL|TMPDIR|LANG|"
    r"LD_\w+|LC_\w+|OMP_\w+|MKL_\w+|XDG_\w+|(CUDA|CUBLAS|CUDNN|NCCL|GLOO|TORCH|PYTORCH|TRITON|PYTHON|SLURM|HF|CADDIE)\w*)"
)
"""Variables that a script shares with its machine; any other that it looks at is a setting, and only the study sets those."""


SWITCHES = {"True": "1", "False": "0"}
"""How scripts print what they take as a number."""


class ScriptRun:
    """One attempt of a script, from its preparation to its result."""

    def __init__(self, run: RunDir, files: AttemptDir, spec: Spec) -> None:
        self.run, self.files, self.spec = run, files, spec
        self.script: Script = read_script(run.bundle)
        self.events = EventLog(files.events)
        self.warnings: list[dict[str, object]] = []
        self._told = 0
        """Points of the curve that are in the events."""

        self._scored = 0
        """Scores of the log that are."""

        self._size = -1
        """Bytes of all logs when they were last read."""

    @property
    def program(self) -> list[str]:
        return [str(self.run.bundle)]

    # ------------------------------------------------------------------------------------------------ what it is given

    def prepare(self, environment: Mapping[str, str], python: str) -> dict[str, str]:
        """Make the working folder; the environment that the script is started with. Raises ProtocolError, StorageError."""
        try:
            self.files.work.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise protocol.storage_error(error, self.files.work) from error
        own = {SEED: str(self.spec.seed), "RUN_ID": self.spec.run_id}
        given = {**data_view.lay_out(Path(self.spec.data_dir), self.files.work), **self.asked, **own}
        kept = {name: value for name, value in environment.items() if not self._is_setting(name)}
        folders = [str(read_trace.FOLDER), *self._stand_ins(kept, python)]
        paths = [*folders, *filter(None, [kept.get("PYTHONPATH", "")])]
        traced = read_trace.variables(self.files.reads)
        return {**kept, **given, **traced, "PYTHONPATH": os.pathsep.join(paths)}

    @property
    def asked(self) -> dict[str, str]:
        """The variables that the study sets."""
        return {name: str(value) for name, value in self.spec.config.get("env", {}).items()}

    def _is_setting(self, name: str) -> bool:
        """Whether a variable of the shell would change what is run without the study's knowing."""
        return name in self.script.lookups.found and not INFRASTRUCTURE.fullmatch(name)

    def _stand_ins(self, environment: Mapping[str, str], python: str) -> Iterator[str]:
        """Folders that stand in for what the interpreter lacks."""
        if FLASH_ATTENTION not in self.script.imports and not self.script.is_opaque:
            return
        question = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({FLASH_ATTENTION!r}) is None)"
        try:
            asked = subprocess.run(
                [python, "-c", question], env=dict(environment), capture_output=True, timeout=ASK_SECONDS, check=False
            )
        except (OSError, subprocess.TimeoutExpired):
            return  # the script itself says best what is wrong with its interpreter
        if asked.returncode:
            self._warn(
                "stand_in",
                f"{FLASH_ATTENTION} is not installed; PyTorch's attention stood in for it: the same values up to rounding, and slower",
                of=FLASH_ATTENTION,
            )
            yield str(FLASH_ATTENTION_SHIM)

    def _warn(self, name: str, says: str, **values: object) -> None:
        self.warnings.append({"name": name, "says": says, **values})

    # ------------------------------------------------------------------------------------------------ its log

    def start(self, *, device: str, torch: str, world_size: int) -> None:
        """Put the beginning into the events."""
        self.events.emit(
            START, time=time.time(), seed=self.spec.seed, device=device, torch=torch, world_size=world_size,
            run_id=self.spec.run_id,
        )  # fmt: skip
        for warning in self.warnings:
            self.events.emit(WARNING, **warning)
        self.warnings.clear()

    def look(self) -> None:
        """Take up what the script has logged since."""
        paths = list(self._logs())
        size = sum(path.stat().st_size for path in paths)
        if size == self._size:
            return
        self._size = size
        log = self._read(paths)
        for point in log.curve[self._told :] if log else ():
            self._tell(log, point)
            self._told += 1
        for line in log.scores[self._scored :] if log else ():
            self.events.emit(PHASE, name=line.stage, state="end", seconds=line.seconds or 0.0)
            self._scored += 1

    def _logs(self) -> Iterator[Path]:
        """What may be the script's log: what it says, and the texts that it writes."""
        work = [path for path in self.files.work.rglob("*") if path.suffix in LOG_SUFFIXES and not path.is_symlink()]
        for path in [*sorted(work), self.files.stdout]:
            if path.is_file() and path.stat().st_size <= MOST_LOG_BYTES:
                yield path

    def _read(self, paths: Sequence[Path]) -> LoggedRun | None:
        """The run in the logs: where several tell it, as the one that says most; of several runs in one, the last."""
        found = [
            runs[-1] for path in paths
            if (runs := read_log(path.read_text(encoding="utf-8", errors="replace"), str(path.relative_to(self.run.root))))
        ]  # fmt: skip
        return max(found, key=lambda log: (len(log.scores), len(log.curve), len(log.settings)), default=None)

    def _tell(self, log: LoggedRun | None, point: CurvePoint) -> None:
        """Append one step of the curve to the events."""
        assert log is not None, "the point is of it"
        seconds, tokens = point.train_seconds, self._batch_tokens(log)
        losses = {TRAIN_LOSS: point.train_loss, VAL_LOSS: point.val_loss, "val_bpb": point.val_bpb}
        values = {name: value for name, value in losses.items() if value is not None}
        if seconds and tokens:
            values[TOKENS_PER_SECOND] = point.step * tokens / seconds
        parts = [
            part / whole
            for part, whole in ((point.step, log.number("planned_steps")), (seconds, self._limit(log)))
            if part is not None and whole
        ]
        values |= {ELAPSED_FRAC: min(1.0, max(parts))} if parts else {}
        self.events.emit(METRIC, step=point.step, train_seconds=round(seconds or 0.0, 4), values=values)

    def _batch_tokens(self, log: LoggedRun) -> int:
        return log.number("batch_tokens") or int(self.spec.config["data"]["tokens_per_step"])

    def _limit(self, log: LoggedRun) -> float:
        return log.seconds("limit_seconds") or float(self.spec.config["limits"]["train_seconds"])

    # ------------------------------------------------------------------------------------------------ its result

    def conclude(self, *, device: str, world_size: int) -> None:
        """Write the result of a script that has ended well, and what speaks against it. Raises StorageError."""
        self.look()
        log = self._read(list(self._logs()))
        if log is None or log.submitted is None:
            result = self._without_score(log)
        else:
            result = self._result(log, device=device, world_size=world_size)
            self._compare(log)
        for warning in self.warnings:
            self.events.emit(WARNING, **warning)
        protocol.write_result(self.files.result, result)

    def _without_score(self, log: LoggedRun | None) -> Result:
        """A failure that says what the log has instead of a score."""
        if log is None:
            found = f"nothing in {self.files.work} or in what it printed is a log of a known form"
        else:
            labels = ", ".join(f"line {line}: {label!r}" for line, label in log.unknown)
            found = f"{log.file} ends without a line of a final score" + (
                f"; unknown labels: {labels}" if labels else ""
            )
        losses = [point.train_loss for point in log.curve if point.train_loss is not None] if log else []
        is_finite = not losses or math.isfinite(losses[-1])
        return Result(
            run_id=self.run.run_id, attempt=self.files.number, status=protocol.FAILED, seed=self.spec.seed,
            failure=Failure(
                kind=protocol.CODE if is_finite else protocol.NOT_FINITE, message=f"the script ended well, but {found}",
                log=str(self.files.stdout),
            ),
            bundle_sha256=self.spec.bundle_sha256, bundle_bytes=len(self.script.content),
        )  # fmt: skip

    def _result(self, log: LoggedRun, *, device: str, world_size: int) -> Result:
        steps, train_seconds = log.number("steps") or 0, log.seconds("train_seconds") or 0.0
        code, model = log.number("code_bytes") or len(self.script.content), log.number("model_bytes") or 0
        losses = [point.train_loss for point in log.curve if point.train_loss is not None]
        artifact_sha256, scores = self._keep_artifact(model), dict(scores_of(log))
        stages = {stage: score.seconds for stage, score in scores.items() if score.seconds}
        return Result(
            run_id=self.run.run_id, attempt=self.files.number, status=protocol.COMPLETE, seed=self.spec.seed, steps=steps,
            tokens=steps * self._batch_tokens(log), train_seconds=train_seconds,
            phases={"train": train_seconds, **log.phases, **stages}, scores=scores, bundle_bytes=code,
            model_bytes=model, artifact_bytes=log.number("total_bytes") or (code + model if model else 0),
            cap_bytes=int(self.spec.config["limits"]["artifact_bytes"]), parameters=log.number("parameters") or 0,
            world_size=log.number("world_size") or world_size, device=device,
            peak_memory_bytes=log.number("peak_memory_bytes") or 0, artifact_sha256=artifact_sha256,
            bundle_sha256=self.spec.bundle_sha256, final_train_loss=losses[-1] if losses else None,
        )  # fmt: skip

    def _keep_artifact(self, size: int) -> str:
        """Copy the compressed model, the file of the logged size, into the run; its SHA-256, empty where there is none."""
        found = [
            path for path in self.files.work.rglob("*")
            if size and path.is_file() and not path.is_symlink() and path.stat().st_size == size
        ]  # fmt: skip
        if not found:
            return ""
        newest = max(found, key=lambda path: path.stat().st_mtime)
        partial = self.run.artifact.with_name(f"{self.run.artifact.name}.{os.getpid()}.partial")
        try:
            shutil.copyfile(newest, partial)
            os.replace(partial, self.run.artifact)
        except OSError as error:
            raise protocol.storage_error(error, self.run.artifact) from error
        return protocol.sha256_of(self.run.artifact)

    # ------------------------------------------------------------------------------------------------ whether it obeyed

    def _compare(self, log: LoggedRun) -> None:
        """Warn of what was asked for and is not what was run."""
        seed = log.number("seed")
        if seed is not None and seed != self.spec.seed:
            self._warn(
                "other_seed", f"seed {self.spec.seed} was asked for, the script's log has seed {seed}",
                asked=self.spec.seed, logged=seed,
            )  # fmt: skip
        self._compare_reads()
        for name, text in self.asked.items():
            lookup = self.script.lookup(name)
            logged = log.settings.get(lookup.setting) if lookup and lookup.setting else None
            if logged is not None and not is_same(text, logged):
                setting = f"{lookup.setting if lookup else ''} {logged}"
                self._warn(
                    "other_setting", f"{name} was set to {text}, the script's log has {setting}",
                    variable=name, asked=text, logged=setting,
                )  # fmt: skip
        for line, label in log.unknown:
            self._warn(
                "unknown_label", f"what the score {label!r} in line {line} of its log means is not known",
                line=line, label=label,
            )  # fmt: skip
        for note in log.notes:
            self._warn("log", note)

    def _compare_reads(self) -> None:
        try:
            trace = read_trace.read_trace(self.files.reads)
        except (CaddieError, OSError) as error:
            self._warn(
                "no_read_trace", f"which variables the script looked at is not known: {error}", because=str(error)
            )
            return
        if trace.is_empty:
            self._warn("no_read_trace", "which variables the script looked at is not known: its process left no trace")
            return
        for name in (SEED, *self.asked):
            if name not in trace.names:
                self._warn("unread_variable", f"the script never looked at {name}, which was set for it", variable=name)


def scores_of(log: LoggedRun) -> Iterator[tuple[str, Score]]:
    """The log's score of each stage: the submitted one, of the other stages the last."""
    tokens = log.number("val_tokens") or 0
    for stage in STAGES:
        lines = [line for line in log.scores if line.stage == stage]
        if lines:
            yield stage, _score(log.submitted if log.submitted in lines and log.submitted else lines[-1], tokens)


def _score(line: ScoreLine, tokens: int) -> Score:
    """A line as a score; the bytes are those that its two values imply."""
    counted = tokens * line.loss / (math.log(2) * line.bpb) if line.bpb else 0.0
    return Score(
        nats=line.loss * tokens, tokens=tokens, bytes=round(counted), loss=line.loss, bpb=line.bpb, seconds=line.seconds or 0.0
    )  # fmt: skip


def is_same(asked: str, logged: str) -> bool:
    """Whether a script's printed value is what it was given, as far as the print has decimals."""
    if asked == logged:
        return True
    asked, logged = SWITCHES.get(asked, asked), SWITCHES.get(logged, logged)
    try:
        a, b = float(asked), float(logged)
    except ValueError:
        return asked.lower() == logged.lower()
    mantissa, _, exponent = logged.lower().partition("e")
    unit = 10.0 ** (int(exponent or 0) - len(mantissa.partition(".")[2]))
    return math.isclose(a, b, rel_tol=1e-9) or ("." in logged and abs(a - b) <= 0.5 * unit * (1 + 1e-9))
