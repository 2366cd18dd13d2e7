"""Whether what was asked for is what was used: knobs and seeds that change nothing make a sweep that shows nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from orchestrator.checks import Check, Claims, Rule, is_equal, judged
from orchestrator.errors import CaddieError
from orchestrator.runs import RunStore
from orchestrator.study import SCORING
from trainer import protocol
from trainer.config import to_mapping
from trainer.protocol import START, TRAIN_LOSS, AttemptDir, RunDir, Spec

DEAD_KNOB = (
    "the trainer used another value than was asked for: look at what it makes of the spec; the run shows nothing of it"
)
CONFIG = Rule("live.config", "the model file must have been made with the values that were asked for", DEAD_KNOB)
START_EVENT = Rule("live.start", "the attempt must have begun with the seed and the run that were asked for", DEAD_KNOB)
PARAMETERS = Rule("live.parameters", "the run must have trained as many parameters as the model file holds", DEAD_KNOB)
SEED = Rule(
    "live.seed",
    "runs that differ in the seed alone must differ at their first step",
    "the seed reaches neither the weights nor the order of the data: their spread over seeds is none",
)
SIBLINGS = 8  # other seeds that are looked at


def check_liveness(store: RunStore, claims: Claims, measured: Mapping[str, Any]) -> list[Check]:
    """Knobs, seed and size as asked, as logged and as stored."""
    spec, config, run = claims.spec, claims.config, claims.run
    if spec is None or config is None:
        return []
    asked, used = to_mapping(config), measured["config"]
    other = [f"{knob}: asked {value!r}, used {used_value!r}" for knob, value, used_value in _pairs(asked, used)]
    if spec.source:  # scored again, by knobs of its own
        other = [words for words in other if not words.startswith(SCORING)]
    count = sum(len(section) for section in asked.values())
    checks = [
        dataclasses.replace(
            judged(CONFIG, [], other, run.artifact), note=f"{count} knobs, by the model file's own words"
        )
    ]
    log = AttemptDir(claims.result_file.parent).events
    start = _first_event(log, START)
    found = f"{start.get('run_id')}, seed {start.get('seed')}" if start else None
    checks.append(judged(START_EVENT, f"{spec.run_id}, seed {spec.seed}", found, log))
    if not spec.source:
        checks.append(judged(PARAMETERS, measured["parameters"], claims.claimed("parameters"), claims.result_file))
        checks.append(_seed(store, spec, log))
    return checks


def _pairs(asked: Mapping[str, Any], used: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Knobs whose two values differ, in either of the configurations."""
    for section in dict.fromkeys((*asked, *used)):
        left, right = asked.get(section, {}), used.get(section, {})
        for name in dict.fromkeys((*left, *right)):
            if left.get(name) != right.get(name):
                yield f"{section}.{name}", left.get(name), right.get(name)


def _first_event(log: Any, kind: str, value: str = "") -> dict[str, Any] | None:
    """The first event of a kind, and with that value where one is named; None for a log without, or a damaged one."""
    try:
        for _, event in protocol.read_lines(log):
            if event.get("kind") == kind and (not value or value in event.get("values", {})):
                return event
    except CaddieError:
        pass
    return None


def _seed(store: RunStore, spec: Spec, log: Any) -> Check:
    """The first training losses of runs with the same configuration and other seeds."""
    own = _first_loss(log)
    losses = {seed: loss for seed, loss in _sibling_losses(store, spec) if own is not None and loss[0] == own[0]}
    same = [seed for seed, loss in losses.items() if loss == own]
    check = judged(SEED, 0, len(same) if losses else None, log, holds=is_equal)
    if not losses:
        return dataclasses.replace(check, note="there is no run of this configuration with another seed")
    shown = ", ".join(f"seed {seed} {loss[1]:.6f}" for seed, loss in losses.items())
    assert own is not None, "others were compared with it"
    return dataclasses.replace(check, note=f"training loss at step {own[0]}: {own[1]:.6f}, {shown}")


def _first_loss(log: Any) -> tuple[int, float] | None:
    """Step and training loss of the first metric event that has one."""
    event = _first_event(log, protocol.METRIC, TRAIN_LOSS)
    return (event["step"], event["values"][TRAIN_LOSS]) if event else None


def _sibling_losses(store: RunStore, spec: Spec) -> Iterator[tuple[int, tuple[int, float]]]:
    """Seed and first training loss of some runs that differ from this one in the seed alone."""
    found = 0
    for path in sorted(store.home.runs.glob("*")):
        sibling = _spec_of(RunDir(path))
        if found == SIBLINGS or sibling is None or sibling.seed == spec.seed or _question(sibling) != _question(spec):
            continue
        for attempt in RunDir(path).attempts():
            loss = _first_loss(attempt.events)
            if loss is not None:
                found += 1
                yield sibling.seed, loss
                break


def _spec_of(run: RunDir) -> Spec | None:
    try:
        return protocol.read_spec(run.spec)
    except (CaddieError, OSError):
        return None


def _question(spec: Spec) -> tuple[object, ...]:
    """All that makes a run, but for the seed."""
    return spec.config, spec.manifest_sha256, spec.bundle_sha256, spec.source_sha256
