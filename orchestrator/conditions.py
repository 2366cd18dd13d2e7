"""The four conditions (openai/parameter-golf#1017), judged by what probes of a run measured and by its own log.

A probe gives numbers (`trainer/probes.py` says which); here stands what each must be, with which tolerance and why.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from orchestrator import score_chain
from orchestrator.checks import FAILED, PASSED, Check, Claims, Rule, Value, is_within, judged, noted, undecided
from orchestrator.errors import ProtocolError
from trainer import protocol
from trainer.protocol import SCORED, SLIDING, STAGES, TTT, AttemptDir

CPU = "cpu"
CPU_NATS, GPU_NATS = 1e-5, 1e-3
CPU_REASON = "float32 in calls of equal shapes: nothing moves, and a score of many nats has room for its last bits"
GPU_REASON = "bfloat16 products in calls of equal shapes; what test-time training adds up by atomics is measured beside"
NOISE = 2.0  # largest multiple of what moves between two equal evaluations that is still taken for the same
MEAN_NATS = 1e-4  # nats per token between two ways of computing one mean, as the trainer's own parity has it

LOOK = "look at what the scorer reads of what stands behind a position; its score cannot be submitted"
SCORER = Rule(
    "c1.scorer", "no score may move with later tokens, with its own target as an input, or with other rows", LOOK
)
REACH_BACK = Rule("c1.evaluation", "no score may move when all tokens behind it are replaced", LOOK)
LEARN_BACK = Rule(
    "c3.evaluation",
    "no score may move when tokens are replaced that may only be learned later",
    "each chunk must be scored before anything is learned from it; the score with test-time training cannot be submitted",
)
BOUNDARY = Rule(
    "c1.boundary",
    "where documents are scored apart, no score may move when the document before is replaced",
    "mask what leads across BOS (attention, token shifts, caches), or score across documents: evaluation.protocol sliding",
)
LOG_SUM = Rule(
    "c2.sum",
    "the probabilities that are charged for the tokens of the vocabulary must sum to one",
    "normalise over the whole vocabulary before the target is looked at; the score cannot be submitted",
)
ENTRY = Rule("c2.entry", "a score must be the distribution's entry of its target", LOG_SUM.remedy)
CHAIN = Rule(
    "c3.log",
    "the log must show each chunk scored once, in order, before it was learned from, and add up to the scores",
    "the events or the result were edited, or the trainer's order is wrong: run again",
)
FIRST_CHUNK = Rule(
    "c3.first_chunk",
    "the first chunk must score now what the log committed for it",
    "the logged score is not this model file's on this data, or this version of caddie scores otherwise: caddie verify",
)
PARITY = Rule(
    "c3.parity",
    "before anything is learned, the path that learns must score like the one that does not",
    "the two forward paths differ: no score with test-time training means anything",
)
PARITY_CLAIM = Rule("c3.parity.run", PARITY.text, PARITY.remedy)
BEFOREHAND = Rule(
    "c3.before_quantization",
    "nothing of the validation split may be learned before it is scored",
    "a study of what rounding does to learning, and no submission: set ttt.before_quantization to false",
)
COVERAGE = Rule(
    "c4.once",
    "each position must be scored exactly once",
    "positions are left out, or scored again: the score cannot be submitted",
)
ACCOUNT = Rule(
    "c4.account", "the account must refuse positions scored twice or never, and add up", "mend the account of scores"
)
TOKENS = Rule("c4.tokens", "the score must count every target of the split", COVERAGE.remedy)
BYTES = Rule(
    "c4.bytes",
    "the score must count the bytes of the split's text",
    "count by the pieces of the tokenizer: 1 for a space, 1 for a byte token, none for BOS; the score cannot be submitted",
)
SPELLED = Rule("c4.spelled", "counted bytes must be those of the text that the tokens spell", BYTES.remedy)

PREFIX = "ttt_"
"""Of the probes of the evaluation that learns."""


def tolerance(device: str) -> tuple[float, str]:
    """Nats by which a score that has to stay may move on such a device, and why."""
    return (CPU_NATS, CPU_REASON) if device == CPU else (GPU_NATS, GPU_REASON)


def check_conditions(claims: Claims, measured: Mapping[str, Any]) -> list[Check]:
    """Every condition, of the evaluation without learning and, where there is one, of that with it."""
    found = measured["probes"]
    nats, _ = tolerance(measured["device"])
    place = claims.run.artifact
    kinds = {"": SLIDING, PREFIX: TTT} if f"{PREFIX}future" in found else {"": SLIDING}
    checks: list[Check] = []
    for prefix, stage in kinds.items():
        checks.append(_scorer(found[f"{prefix}future"], nats, place, stage))
        rule = LEARN_BACK if stage == TTT else REACH_BACK
        checks.append(_moved(rule, found[f"{prefix}reach_back"], nats, place, f"{rule.name}.{stage}"))
        checks.append(_boundary(claims, found[f"{prefix}boundary"], nats, place, stage))
        checks += _distribution(found[f"{prefix}distribution"], nats, place, stage)
        checks.append(_coverage(found[f"{prefix}coverage"], place, stage))
    checks.append(judged(ACCOUNT, [], found["account"], place))
    checks += _chain(claims, measured)
    if TTT in kinds.values():
        checks.append(
            _within(PARITY, 0.0, found["parity"], MEAN_NATS, place, "nats per token, on the sample's first chunk")
        )
        parity = claims.claimed("parity_nats")
        checks.append(
            _within(PARITY_CLAIM, 0.0, parity, MEAN_NATS, claims.result_file, "nats per token, as the run measured it")
        )
    if claims.config is not None and claims.config.ttt.before_quantization:
        checks.append(judged(BEFOREHAND, False, True, claims.run.spec))
    return [*checks, *_counts(claims, measured)]


def _within(rule: Rule, expected: Value, found: Value, limit: float, place: Path, note: str, name: str = "") -> Check:
    """A number against another, with what it was measured on."""
    check = judged(rule, expected, found, place, holds=is_within(limit), tolerance=limit, name=name)
    return dataclasses.replace(check, note=note) if check.status in (PASSED, FAILED) else check


def _moved(rule: Rule, moved: Mapping[str, Any], nats: float, place: Path, name: str) -> Check:
    """The largest change of scores that had to stay; undecided where none was compared, or nothing disturbed."""
    is_shown = moved["compared"] > 0 and moved["control"] > 0
    limit = max(nats, NOISE * moved["noise"])
    return _within(rule, 0.0, moved["largest"] if is_shown else None, limit, place, _words(moved), name)


def _words(moved: Mapping[str, Any]) -> str:
    noise = f", by itself {moved['noise']:.2g}" if moved["noise"] else ""
    largest = f", at most {moved['largest']:.2g} nats{noise}" if moved["moved"] else ""
    return f"{moved['moved']:,} of {moved['compared']:,} scores moved{largest}; {moved['control']:,} others did"


def _scorer(ways: Mapping[str, Mapping[str, Any]], nats: float, place: Path, stage: str) -> Check:
    """The worst of all ways to disturb, and each in words."""
    shown = {way: moved for way, moved in ways.items() if moved["compared"] and moved["control"]}
    worst = max((moved["largest"] for moved in shown.values()), default=None)
    words = "; ".join(f"{way}: {moved['moved']:,} of {moved['compared']:,} moved" for way, moved in shown.items())
    return _within(SCORER, 0.0, worst, nats, place, words, f"{SCORER.name}.{stage}")


def _boundary(claims: Claims, moved: Mapping[str, Any], nats: float, place: Path, stage: str) -> Check:
    """A rule where documents are said to be apart; else a fact about the protocol."""
    name = f"{BOUNDARY.name}.{stage}"
    config = claims.config
    is_apart = config is not None and (
        config.evaluation.protocol == "documents" if stage == SLIDING else config.ttt.is_by_document
    )
    if is_apart:
        return _moved(BOUNDARY, moved, nats, place, name)
    words = f"{_words(moved)}, {moved['mean']:.2g} nats in the mean; the protocol reads across documents"
    return noted(BOUNDARY, moved["largest"], place, words, name=name)


def _distribution(found: Mapping[str, Any], nats: float, place: Path, stage: str) -> list[Check]:
    words = f"nats, at {found['positions']} positions with {found['context']} tokens of context"
    return [
        _within(
            LOG_SUM, 0.0, found["largest_log_sum"], nats, place, f"log of the sum, {words}", f"{LOG_SUM.name}.{stage}"
        ),
        _within(ENTRY, 0.0, found["largest_entry_gap"], nats, place, words, f"{ENTRY.name}.{stage}"),
    ]


def _coverage(found: Mapping[str, Any], place: Path, stage: str) -> Check:
    wrong = (
        found["never"]
        + found["again"]
        + abs(found["tokens"] - found["positions"])
        + abs(found["bytes"] - found["stream_bytes"])
    )
    words = (
        f"of {found['positions']:,} positions {found['never']:,} never, {found['again']:,} again; "
        f"{found['tokens']:,} tokens, {found['bytes']:,} of {found['stream_bytes']:,} bytes counted"
    )
    return dataclasses.replace(judged(COVERAGE, 0, wrong, place, name=f"{COVERAGE.name}.{stage}"), note=words)


# ── the log ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def _chain(claims: Claims, measured: Mapping[str, Any]) -> list[Check]:
    """The events of the attempt that stands for the run, replayed, and their first chunks scored again."""
    log = AttemptDir(claims.result_file.parent).events
    if claims.result is None:
        return [judged(CHAIN, [], None, log)]
    try:
        events = [event for _, event in protocol.read_lines(log)]
    except ProtocolError as error:
        return [judged(CHAIN, [], [str(error)], log)]
    problems = score_chain.problems(events, claims.result)
    scored = [event for event in events if event.get("kind") == SCORED]
    counts = ", ".join(
        f"{stage} {count:,}" for stage in STAGES if (count := sum(e.get("stage") == stage for e in scored))
    )
    chain = dataclasses.replace(judged(CHAIN, [], problems, log), note=f"chunks: {counts or 'none'}")
    stages = [SLIDING] if claims.config is None or claims.config.ttt.is_by_document else [SLIDING, TTT]
    firsts = {
        event["stage"]: event for event in reversed(scored) if event.get("chunk") == 0 and event.get("stage") in stages
    }
    return [chain, *(_first_chunk(claims, firsts[stage], measured, log) for stage in stages if stage in firsts)]


def _first_chunk(claims: Claims, event: Mapping[str, Any], measured: Mapping[str, Any], log: Path) -> Check:
    """A logged first chunk against the same positions now, where these were scored and on equal terms."""
    name, again = f"{FIRST_CHUNK.name}.{event['stage']}", measured["probes"]["first_chunk"]
    if again is None or (event.get("first"), event.get("last")) != (0, again["last"]):
        check = judged(FIRST_CHUNK, None, None, log, name=name)
        return dataclasses.replace(
            check, note="the first chunk is no part of the sample: a larger --sample takes it in"
        )
    tokens = again["last"]
    check = _within(
        FIRST_CHUNK, event["nats"] / tokens, again["nats"] / tokens, MEAN_NATS, log, f"nats per token, over {tokens:,} positions", name
    )  # fmt: skip
    is_alike = claims.claimed("device") == measured["device"]
    return check if is_alike else undecided(check, "the probes ran on another device than the run")


# ── what was counted ────────────────────────────────────────────────────────────────────────────────────────────────


def _counts(claims: Claims, measured: Mapping[str, Any]) -> list[Check]:
    """Tokens and bytes of each score against the split's, and the split's bytes against its text."""
    data, found = measured["data"], measured["probes"]["bytes"]
    checks = []
    for stage, score in (claims.result.scores if claims.result else {}).items():
        checks.append(judged(TOKENS, data["targets"], score.tokens, claims.result_file, name=f"{TOKENS.name}.{stage}"))
        checks.append(
            judged(BYTES, data["counted_bytes"], score.bytes, claims.result_file, name=f"{BYTES.name}.{stage}")
        )
    words = f"{found['documents']:,} documents, {found['wrong']:,} of them counted otherwise than they read"
    spelled = judged(
        SPELLED,
        found["spelled"] if found["documents"] else None,
        found["counted"],
        Path(claims.spec.data_dir if claims.spec else ""),
    )
    if found["wrong"] and spelled.status == PASSED:  # faults that cancel
        spelled = judged(SPELLED, 0, found["wrong"], Path(spelled.place))
    return [
        *checks,
        dataclasses.replace(spelled, note=words if found["documents"] else "no whole document in the sample"),
    ]
