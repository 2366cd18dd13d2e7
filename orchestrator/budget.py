"""The limits that a run must keep, held against every way in which its seconds have been counted, and what it reached for."""

from __future__ import annotations

import dataclasses

from orchestrator.checks import RECHECKED, Check, Claims, Rule, is_at_most, judged, noted
from orchestrator.clean_room import Evaluation

TRAIN = Rule(
    "limit.train",
    "training, calibration included, must keep its limit",
    "the run cannot be submitted: raise limits.reserve_seconds, or lower quant.calibration_steps",
)
LAST_STAGE = Rule(
    "limit.evaluation.last",
    "the stage that gives the score must keep the limit of evaluation",
    "the run cannot be submitted: raise evaluation.stride, or lower ttt.epochs",
)
WHOLE = Rule("limit.evaluation.whole", "the evaluation with loading, compilation and the start of the process", "")
NETWORK = Rule(
    "reach.network", "an evaluation must not reach for another machine", "take out of the bundle what calls it"
)
FILES = Rule(
    "reach.files",
    "an evaluation must read nothing but its bundle, model file, tokenizer and validation shards",
    "take out of the bundle what opens it, or pay for it inside the artifact",
)
PROGRAMS = Rule("reach.programs", "programs that the evaluation started", "")

NO_RULING = "no ruling found: #1530 counts the last stage alone, #2121 states both and leaves it to reviewers"


def check_seconds(claims: Claims, evaluation: Evaluation | None) -> list[Check]:
    """Training, and evaluation by the common and by the strictest way of counting; `result.seconds` is the one between."""
    result, place = claims.result, claims.result_file
    if result is None:
        return []
    last = [result.scores[stage] for stage in RECHECKED if stage in result.scores][-1:]
    phases = ("reload", *RECHECKED)
    run_seconds = round(sum(result.phases.get(name, 0.0) for name in phases), 2)
    limit = claims.limit("eval_seconds")
    whole = evaluation.wall_seconds if evaluation is not None and not evaluation.failure else run_seconds
    of = "in the clean room" if whole != run_seconds else "by the run's phases, without the start of the process"
    parts = ", ".join(f"{name} {result.phases[name]:.1f} s" for name in ("train", "calibrate") if name in result.phases)
    train = judged(TRAIN, claims.limit("train_seconds"), round(result.train_seconds, 2), place, holds=is_at_most)
    return [
        dataclasses.replace(train, note=parts),
        judged(LAST_STAGE, limit, round(last[0].seconds, 2) if last else None, place, holds=is_at_most),
        noted(WHOLE, whole, place, f"{of}; {NO_RULING}", limit=limit),
    ]


def check_reach(claims: Claims, evaluation: Evaluation | None, why_not: str) -> list[Check]:
    """What a watched evaluation in the clean room opened, called and started."""
    place = claims.run.bundle
    reached = evaluation.reached if evaluation is not None else None
    if evaluation is None or reached is None:
        return [dataclasses.replace(judged(rule, [], None, place), note=why_not) for rule in (FILES, NETWORK)]
    network = "there was none to reach" if evaluation.is_offline else "this machine lets us make no network namespace"
    files = judged(FILES, [], reached.files, place)
    return [
        dataclasses.replace(
            files, note=f"{reached.count:,} different files, hosts and programs, as Python opened them"
        ),
        dataclasses.replace(judged(NETWORK, [], reached.hosts, place), note=network),
        noted(PROGRAMS, reached.programs, place, "compilers and the like; a library's own are not heard"),
    ]
