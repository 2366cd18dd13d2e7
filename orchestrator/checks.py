"""The checks of a verification: what a run claims against what its files are and what they score.

Every way in which the two differ is a check of its own, with its rule, values, place and remedy; none hides another.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from orchestrator import clean_room
from orchestrator.clean_room import Evaluation
from orchestrator.datasets import PreparedData, manifest_of
from orchestrator.errors import CaddieError, ConfigError, ProtocolError
from orchestrator.runs import RunRequest, run_id_of
from trainer import protocol
from trainer.config import Config, from_mapping
from trainer.protocol import VALIDATION, DataDir, Result, RunDir, Score, Spec, sha256_of

PASSED, FAILED, UNDECIDED, NOTED = "passed", "failed", "undecided", "noted"
MISSING = "missing"

RECHECKED = (protocol.ROUNDTRIP, protocol.SLIDING, protocol.TTT)
"""Stages that score the stored model. The averaged weights, which POST_EMA scores, are no part of the artifact.

Their seconds together are held against the limit: the strictest of the ways in which records have counted.
"""

SUM_TOLERANCE = 1e-9  # a quotient of the same float64 numbers, rounded once or twice

DATA = "data."  # beginning of the names of checks on the data set, which say nothing against the run

Value = str | int | float | list[str] | None


@dataclass(frozen=True)
class Rule:
    """What must hold, and what to do where it does not."""

    name: str
    text: str
    remedy: str


PUT_BACK = "put back the file that the run wrote; if there is none, nothing can be said of this run: ask for it again"
OTHER_COPY = "put the file back, or name another copy of the data set with --data NAME|DIR"
OTHER_MACHINE = "compare on the kind and number of devices that the run had (--gpus) before doubting it; else the run's claim is wrong"

SPEC = Rule("spec", "the spec must be there and whole", PUT_BACK)
SPEC_ID = Rule(
    "spec.run_id",
    "a run's id must be the hash of what its spec asks",
    "the spec was edited after the run was planned, or a version of caddie with other knobs planned it (`code` in the "
    "spec): verify with that one, or " + PUT_BACK,
)
RESULT = Rule(
    "result", "the run must have a complete result that can be read", "wait for the run's end, or " + PUT_BACK
)
RESULT_OWNER = Rule("result.run", "the result must be of this run and seed", "the result is another run's: " + PUT_BACK)
RESULT_SUMS = Rule(
    "result.sums",
    "bpb must be nats / ln 2 / bytes and loss nats / tokens, in every score",
    "a number was edited: " + PUT_BACK,
)
STAGES = Rule(
    "result.stages",
    "the result must score every stage that the configuration asks for",
    "a score was removed: " + PUT_BACK,
)
BUNDLE_HASH = Rule("bundle.sha256", "the bundle must be the one that the run was planned with", PUT_BACK)
BUNDLE_CLAIM = Rule(
    "result.bundle", "the result must name the bundle of the spec", "the result is another bundle's: " + PUT_BACK
)
BUNDLE_BYTES = Rule("bundle.bytes", "the bundle must have the size that the result counts", PUT_BACK)
MODEL_HASH = Rule("model.sha256", "the model file must be the one that the run wrote", PUT_BACK)
MODEL_BYTES = Rule("model.bytes", "the model file must have the size that the result counts", PUT_BACK)
ARTIFACT_BYTES = Rule(
    "artifact.bytes", "bundle and model file together must have the size that the result claims", PUT_BACK
)
CAP = Rule(
    "artifact.cap",
    "bundle and model file together must not exceed the cap",
    "the run cannot be submitted: free bytes (quant.*), and ask for it again",
)
MANIFEST = Rule(
    DATA + "manifest",
    "the data set must be the one that the run was planned with",
    "this is another data set, or another split or tokenizer of it: name a copy of the run's own with --data NAME|DIR",
)
TOKENIZER = Rule(DATA + "tokenizer", "the tokenizer must be the one that the manifest names", OTHER_COPY)
SHARD = Rule(DATA + "validation", "a validation shard must be the one that the manifest names", OTHER_COPY)
EVALUATION = Rule(
    "evaluation",
    "the bundle must score the model file on its own",
    "its last words are below; a slow machine needs more --timeout-minutes, a damaged model file its own content back; "
    "a bundle that needs more than these files cannot be submitted",
)
BPB = Rule("bpb", "the score must come out again within the tolerance", OTHER_MACHINE)
TOKENS = Rule(
    "tokens", "the same number of tokens must be scored", "the run scored other data, or its claim was edited"
)
BYTES = Rule(
    "bytes",
    "the same number of bytes of text must be counted",
    "the run counted with another tokenizer, or its claim was edited",
)
RUN_SECONDS = Rule(
    "result.seconds",
    "the run's evaluation must have kept its limit",
    "the run cannot be submitted: raise evaluation.stride, or lower ttt.epochs",
)
SECONDS = Rule(
    "evaluation.seconds",
    "the evaluation must keep its limit here too",
    "raise evaluation.stride, or lower ttt.epochs; or the machine was busy: verify again",
)


@dataclass(frozen=True, kw_only=True)
class Check:
    """One thing that was compared."""

    name: str
    rule: str
    status: str
    """passed, failed, undecided where there was nothing to compare with, or not on equal terms, or noted where no rule
    decides; `note` says why.
    """

    expected: Value
    found: Value
    tolerance: float | None = None
    is_limit: bool = False
    """Whether `expected` is the most that is allowed."""

    place: str
    """The file that holds what was found, or the claim that does not hold."""

    remedy: str
    note: str = ""


# ── comparing ───────────────────────────────────────────────────────────────────────────────────────────────────────


def is_equal(expected: Any, found: Any) -> bool:
    return bool(expected == found)


def is_at_most(limit: Any, found: Any) -> bool:
    return isinstance(found, int | float) and bool(found <= limit)


def is_within(tolerance: float) -> Callable[[Any, Any], bool]:
    """Whether two numbers are that close; nothing is close to not-a-number."""

    def close(expected: Any, found: Any) -> bool:
        return all(isinstance(value, int | float) for value in (expected, found)) and abs(expected - found) <= tolerance

    return close


def judged(
    rule: Rule, expected: Value, found: Value, place: Path, *, holds: Callable[[Any, Any], bool] = is_equal,
    name: str = "", tolerance: float | None = None,
) -> Check:  # fmt: skip
    """A check's outcome; undecided where either side is unknown."""
    is_known = expected is not None and found is not None
    status = UNDECIDED if not is_known else PASSED if holds(expected, found) else FAILED
    note = "" if is_known else "nothing was claimed" if expected is None else "nothing was measured"
    return Check(
        name=name or rule.name, rule=rule.text, status=status, expected=expected, found=found, tolerance=tolerance,
        is_limit=holds is is_at_most, place=str(place), remedy=rule.remedy if status == FAILED else "", note=note,
    )  # fmt: skip


def noted(rule: Rule, found: Value, place: Path, note: str, *, name: str = "", limit: Value = None) -> Check:
    """Something to know, for or against which no rule speaks; `limit` is what it would be held against."""
    return Check(
        name=name or rule.name, rule=rule.text, status=NOTED, expected=limit, found=found, is_limit=limit is not None,
        place=str(place), remedy="", note=note,
    )  # fmt: skip


def undecided(check: Check, note: str) -> Check:
    """A failure that proves nothing, for a reason."""
    return dataclasses.replace(check, status=UNDECIDED, remedy="", note=note) if check.status == FAILED else check


def hash_of(path: Path) -> str:
    return sha256_of(path) if path.is_file() else MISSING


def size_of(path: Path) -> Value:
    return path.stat().st_size if path.is_file() else MISSING


# ── the claims ──────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, kw_only=True)
class Claims:
    """What a run's own files say of it."""

    run: RunDir
    spec: Spec | None
    config: Config | None
    """The spec's, as this version of caddie reads it."""

    result: Result | None
    result_file: Path
    """The result that stands for the run; the first attempt's where there is none."""

    problems: tuple[Check, ...]
    """Files that could not be read."""

    @property
    def stages(self) -> tuple[str, ...]:
        """Stages of the stored model that the configuration asks for."""
        has_ttt = self.config is None or self.config.ttt.is_scored
        return RECHECKED if has_ttt else RECHECKED[: RECHECKED.index(protocol.TTT)]

    def limit(self, name: str) -> Any:
        """A number of the configuration's limits; None where it cannot be read."""
        return getattr(self.config.limits, name) if self.config else None

    def claimed(self, name: str) -> Any:
        """A field of the result; None without one."""
        return getattr(self.result, name) if self.result else None


def read_claims(run: RunDir) -> Claims:
    """The spec and the result that stands for the run: the last complete one, else the last."""
    problems: list[Check] = []
    planned = _read(partial(read_plan, run.spec), SPEC, run.spec, problems)
    spec, config = planned or (None, None)
    files = [attempt.result for attempt in run.attempts() if attempt.result.exists()]
    results = [(path, _read(partial(protocol.read_result, path), RESULT, path, problems)) for path in files]
    whole = [(path, result) for path, result in results if result]
    complete = [(path, result) for path, result in whole if result.status == protocol.COMPLETE]
    path, result = (complete or whole or results or [(run.attempt(1).result, None)])[-1]
    if not files:
        problems.append(judged(RESULT, protocol.COMPLETE, MISSING, path))
    return Claims(run=run, spec=spec, config=config, result=result, result_file=path, problems=tuple(problems))


def read_plan(path: Path) -> tuple[Spec, Config]:
    """The spec and its configuration; raises ProtocolError, ConfigError, FileNotFoundError."""
    spec = protocol.read_spec(path)
    protocol.require_types(spec, path)
    if spec.script:
        raise ConfigError(
            f"{path}: the run is of somebody else's script, {spec.script}; runs of our own trainer are checked so"
        )
    try:
        return spec, from_mapping(spec.config)
    except (TypeError, AttributeError) as error:
        raise ProtocolError(f"{path}: its config is not a table of tables of values") from error


def _read(read: Callable[[], Any], rule: Rule, path: Path, problems: list[Check]) -> Any:
    """What is read; where that cannot be, None, and one problem more."""
    try:
        return read()
    except FileNotFoundError:
        problems.append(judged(rule, "a whole file", MISSING, path))
    except (CaddieError, OSError) as error:
        problems.append(judged(rule, "a whole file", str(error).removeprefix(f"{path}: "), path))
    return None


# ── the checks ──────────────────────────────────────────────────────────────────────────────────────────────────────


def check_claims(claims: Claims) -> list[Check]:
    """Spec and result as such: whole, of one run, and consistent in themselves."""
    spec, result = claims.spec, claims.result
    found = list(claims.problems)
    if spec is not None and claims.config is not None:
        found.append(check_id(spec, claims.config, claims.run))
    if result is None:
        return found
    status = f"{result.status}: {result.failure.kind}: {result.failure.message}" if result.failure else result.status
    found.append(judged(RESULT, protocol.COMPLETE, status, claims.result_file))
    wrong = [name for stage, score in result.scores.items() for name in wrong_quotients(stage, score)]
    found.append(judged(RESULT_SUMS, [], wrong, claims.result_file))
    if claims.config is not None:
        scored = [stage for stage in claims.stages if stage in result.scores]
        found.append(judged(STAGES, list(claims.stages), scored, claims.result_file))
    if spec is not None:
        expected, of = (f"{spec.run_id}, seed {spec.seed}", f"{result.run_id}, seed {result.seed}")
        found.append(judged(RESULT_OWNER, expected, of, claims.result_file))
    found.append(
        judged(RUN_SECONDS, claims.limit("eval_seconds"), seconds_of(result), claims.result_file, holds=is_at_most)
    )
    return found


def seconds_of(result: Result) -> float:
    """Seconds of the stages that are held against the limit."""
    return round(sum(score.seconds for stage, score in result.scores.items() if stage in RECHECKED), 2)


def check_id(spec: Spec, config: Config, run: RunDir) -> Check:
    """The id against the hash of config, seed, replicate, data and bundle."""
    request = RunRequest(
        preset=spec.preset, config=config, seed=spec.seed, replicate=spec.replicate, data_dir=spec.data_dir,
        manifest_sha256=spec.manifest_sha256, source=spec.source, source_sha256=spec.source_sha256,
        source_part=spec.source_part, gpus=spec.gpus,
    )  # fmt: skip
    return judged(SPEC_ID, run_id_of(request, spec.bundle_sha256), spec.run_id, run.spec)


def wrong_quotients(stage: str, score: Score) -> list[str]:
    """Names of the score's quotients that are not those of its sums."""
    quotients = {
        "bpb": (score.bpb, score.nats / math.log(2), max(1, score.bytes)),
        "loss": (score.loss, score.nats, score.tokens),
    }
    close = is_within(SUM_TOLERANCE)
    return [
        f"{stage}.{name}"
        for name, (value, over, under) in quotients.items()
        if not under or not close(over / under, value)
    ]


def check_files(claims: Claims) -> list[Check]:
    """Bundle and model file: their bytes, counted and hashed."""
    run, planned = claims.run, claims.spec.bundle_sha256 if claims.spec else claims.claimed("bundle_sha256")
    sizes = [size_of(run.bundle), size_of(run.artifact)]
    total: Value = sum(size for size in sizes if isinstance(size, int)) if MISSING not in sizes else MISSING
    return [
        judged(BUNDLE_HASH, planned, hash_of(run.bundle), run.bundle),
        judged(BUNDLE_CLAIM, planned, claims.claimed("bundle_sha256"), claims.result_file),
        judged(BUNDLE_BYTES, claims.claimed("bundle_bytes"), sizes[0], run.bundle),
        judged(MODEL_HASH, claims.claimed("artifact_sha256"), hash_of(run.artifact), run.artifact),
        judged(MODEL_BYTES, claims.claimed("model_bytes"), sizes[1], run.artifact),
        judged(ARTIFACT_BYTES, claims.claimed("artifact_bytes"), total, claims.result_file),
        judged(CAP, claims.limit("artifact_bytes"), total, run.artifact, holds=is_at_most),
    ]


def read_data(claims: Claims, root: Path | None) -> tuple[PreparedData | None, list[Check]]:
    """The data set at hand and how it differs from the run's: its manifest, tokenizer and validation shards."""
    if root is None:
        return None, []
    manifest = DataDir(root).manifest
    planned = claims.spec.manifest_sha256 if claims.spec else None
    checks = [judged(MANIFEST, planned, hash_of(manifest), manifest)]
    if not manifest.is_file():
        return None, checks
    try:
        data = manifest_of(root)
        clean_room.validation_files(DataDir(root), data.manifest)
    except CaddieError as error:
        return None, [*checks, judged(MANIFEST, "a whole file", str(error), manifest)]
    tokenizer = root / data.manifest.tokenizer
    checks.append(judged(TOKENIZER, data.manifest.tokenizer_sha256, hash_of(tokenizer), tokenizer))
    for shard in data.manifest.splits[VALIDATION].shards:
        path = root / shard.file
        checks.append(judged(SHARD, shard.sha256, hash_of(path), path, name=f"{SHARD.name}.{shard.file}"))
    return data, checks


def obstacle(claims: Claims, checks: Sequence[Check], data: PreparedData | None) -> str:
    """Why nothing can be evaluated; empty where it can. A bundle that was changed is not run: nobody planned it."""
    missing = [path.name for path in (claims.run.bundle, claims.run.artifact) if not path.is_file()]
    lost = [Path(check.place).name for check in checks if check.name.startswith(DATA) and check.found == MISSING]
    if missing or lost:
        return f"not run: {', '.join(missing + lost)} missing"
    if data is None:
        return "not run: there is no data set that can be read"
    if claims.result is None:
        return "not run: there is no result to compare with"
    if any(check.name == BUNDLE_HASH.name and check.status == FAILED for check in checks):
        return "not run: the bundle is not the one that was planned"
    return ""


def check_evaluation(claims: Claims, evaluation: Evaluation, tolerance: float) -> list[Check]:
    """The scores that came out, against the result's."""
    failure, result, run = evaluation.failure, evaluation.result, claims.run
    said = f"{failure.kind}: {failure.message}" if failure else protocol.COMPLETE
    checks = [judged(EVALUATION, protocol.COMPLETE, said, run.artifact)]
    for stage in claims.stages:
        checks += check_score(claims, result, stage, tolerance)
    timed = judged(
        SECONDS, claims.limit("eval_seconds"), seconds_of(result) if result else None, run.bundle, holds=is_at_most
    )
    claim = claims.result
    is_as_the_run = result and claim and (result.device, result.world_size) == (claim.device, claim.world_size)
    return [*checks, timed if is_as_the_run else undecided(timed, "another machine than the run's, with another speed")]


def check_score(claims: Claims, found: Result | None, stage: str, tolerance: float) -> list[Check]:
    """One stage: bits per byte within the tolerance, tokens and bytes exactly."""
    claim = claims.result.scores.get(stage) if claims.result else None
    score = found.scores.get(stage) if found else None
    if claim is None and score is None:
        return []

    def field(of: Score | None, name: str) -> Value:
        return float(getattr(of, name)) if of and name == BPB.name else getattr(of, name, MISSING)

    return [
        judged(
            rule, field(claim, rule.name), field(score, rule.name) if found else None, claims.result_file,
            name=f"{stage}.{rule.name}", holds=is_within(tolerance) if rule is BPB else is_equal,
            tolerance=tolerance if rule is BPB else None,
        )
        for rule in (BPB, TOKENS, BYTES)
    ]  # fmt: skip
