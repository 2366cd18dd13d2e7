"""Enqueued points: what people want tried next, by hand or as another study, a run, a preset or a public record had it.

Each request is a file in the study's folder. The controller alone decides: it takes the oldest, and the ledger's trial
names the request, so nothing is taken twice and a request that was not taken is still there.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator import imports, ledger
from orchestrator.errors import CaddieError, ConfigError
from orchestrator.evidence import read_study
from orchestrator.home import Home
from orchestrator.ledger import StudyState, Trial
from orchestrator.presets import load_preset
from orchestrator.runs import find_run
from orchestrator.study import Study
from orchestrator.study_file import load_study
from trainer import protocol
from trainer.config import Config, from_mapping, knob_value, nearest, parse_value

PUBLIC_NAMES = {
    "muon_wd": "optim.muon_weight_decay", "embed_wd": "optim.embedding_weight_decay",
    "adam_wd": "optim.scalar_weight_decay", "matrix_lr": "optim.matrix_lr", "tied_embed_lr": "optim.embedding_lr",
    "scalar_lr": "optim.scalar_lr", "head_lr": "optim.head_lr", "muon_momentum": "optim.muon_momentum",
    "muon_momentum_warmup_start": "optim.muon_momentum_start",
    "muon_momentum_warmup_steps": "optim.muon_momentum_ramp_steps", "ema_decay": "optim.ema_decay",
    "grad_clip_norm": "optim.grad_clip_norm", "beta1": "optim.adam_beta1", "beta2": "optim.adam_beta2",
    "qk_gain_init": "model.qk_gain", "logit_softcap": "model.logit_softcap", "rope_dims": "model.rope_dims",
    "warmdown_frac": "schedule.warmdown_frac", "min_lr": "schedule.lr_floor", "ttt_lr": "ttt.lr",
    "ttt_epochs": "ttt.epochs", "ttt_momentum": "ttt.momentum", "ttt_chunk_tokens": "ttt.chunk_tokens",
    "eval_stride": "evaluation.stride",
}  # fmt: skip
"""Knobs by the names under which the logs of public records print them (the family with a block of hyper-parameters)."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """One point that somebody wants tried."""

    id: str
    params: dict[str, Any]
    source: str
    """Where it comes from, for people."""

    time: float
    """When it was asked for; unix seconds."""


def requests(folder: Path) -> list[Request]:
    """Every request of a study, the oldest first; raises ProtocolError for a damaged one."""
    files = sorted(folder.glob("*.json"))
    return sorted((Request(**protocol.read_json(file)) for file in files), key=lambda request: request.time)


def waiting(folder: Path, state: StudyState) -> list[Request]:
    """Those that no trial has taken up."""
    taken = {trial.queued for trial in state.trials.values()}
    return [request for request in requests(folder) if request.id not in taken]


def enqueue(home: Home, study: Study, points: Sequence[tuple[dict[str, Any], str]]) -> tuple[list[Request], list[str]]:
    """Ask for points, each with its source; what was asked, and why points were left out. Raises StorageError.

    A point that is a trial already, or has been asked for, is left out.
    """
    folder = home.study(study.name).queue
    known = [request.params for request in requests(folder)]
    known += [trial.params for trial in _state(home, study.name).trials.values()]
    known.append(_plain(study.preset_params()))
    made: list[Request] = []
    notes: list[str] = []
    for params, source in points:
        if params in known:
            notes.append(f"{source}: {_words(params)} is a trial of {study.name} already, or waits to be one")
            continue
        known.append(params)
        digest = hashlib.sha256(json.dumps(params, sort_keys=True).encode()).hexdigest()[:12]
        request = Request(id=digest, params=params, source=source, time=time.time() + 1e-3 * len(made))
        protocol.write_json_atomically(folder / f"{digest}.json", vars(request))
        made.append(request)
    return made, notes


def _state(home: Home, name: str) -> StudyState:
    return ledger.Ledger(home.study(name).ledger).state()


def _words(params: Mapping[str, Any]) -> str:
    return ", ".join(f"{knob} = {value}" for knob, value in params.items())


def _plain(params: Mapping[str, Any]) -> dict[str, Any]:
    """The same as the ledger gives it back."""
    found: dict[str, Any] = json.loads(json.dumps(params))
    return found


def named_study(home: Home, text: str) -> Study:
    """A study by the name under which it runs, or by its file. Raises ConfigError."""
    if text in home.study_names():
        return read_study(home, text)[0]
    return load_study(Path(text))


# ── where points come from ──────────────────────────────────────────────────────────────────────────────────────────


def by_hand(study: Study, settings: Mapping[str, Any]) -> dict[str, Any]:
    """A point with these knobs, and the preset's value of every other. Raises ConfigError."""
    for knob in settings:
        if knob not in study.space:
            raise ConfigError(f"{study.name} does not search {knob!r}", hint=nearest(knob, study.space))
    params = {**study.preset_params(), **settings}
    study.config_of(params)
    return _plain(params)


def points_from(
    home: Home, study: Study, text: str, *, top: int = 1
) -> tuple[list[tuple[dict[str, Any], str]], list[str]]:
    """The points that a study's best trials, a run, a preset or a public record stand for, and what could not be taken over.

    Every knob of this study's space takes the value that it has there. Raises ConfigError where the text names nothing.
    """
    name, _, part = text.partition(":")
    if name in home.study_names():
        other, state = read_study(home, name)
        found = [
            (other.config_of(trial.params), f"trial {trial.number} of {name}") for trial in _trials(state, part, top)
        ]
        return _of_configs(study, found)
    if name.removeprefix("imports/") in home.import_names() or text.startswith("imports/"):
        return _of_record(home, study, text.removeprefix("imports/"))
    try:
        return _of_configs(study, [(load_preset(text), f"preset {text}")])
    except ConfigError:
        pass
    try:
        spec = protocol.read_spec(find_run(home, text).spec)
    except CaddieError as error:
        raise ConfigError(
            f"{text!r} names no study, imported record, preset or run",
            hint=f"studies: {', '.join(home.study_names()) or 'none yet'}",
        ) from error
    return _of_configs(study, [(from_mapping(spec.config), f"run {spec.run_id}")])


def _trials(state: StudyState, part: str, top: int) -> list[Trial]:
    """The best complete trials of another study, or the one that is named."""
    done = [t for t in state.trials.values() if t.state == ledger.COMPLETE and t.value is not None and t.is_feasible]
    if part.startswith("trial-"):
        named = [trial for trial in state.trials.values() if part == f"trial-{trial.number}"]
        if not named:
            raise ConfigError(f"there is no {part}", hint=f"it has trials 0 to {len(state.trials) - 1}")
        return named
    if part not in ("", "best"):
        raise ConfigError(f"a study has no part {part!r}", hint="name :best or :trial-3")
    if not done:
        raise ConfigError("no trial of it has completed within its limits", hint="name one: STUDY:trial-0")
    return sorted(done, key=lambda trial: (trial.value, trial.number))[: 1 if part == "best" else top]


def _of_configs(
    study: Study, configs: Sequence[tuple[Config, str]]
) -> tuple[list[tuple[dict[str, Any], str]], list[str]]:
    """Configurations as points: the knobs of the space, and a note where others differ as well."""
    points, notes = [], []
    for config, source in configs:
        params = _plain({knob: knob_value(config, knob) for knob in study.space})
        study.config_of(params)
        points.append((params, source))
        if study.config_of(params) != config:
            notes.append(
                f"{source} also differs in knobs that {study.name} does not search: these stay as its preset has them"
            )
    return points, notes


def _of_record(home: Home, study: Study, name: str) -> tuple[list[tuple[dict[str, Any], str]], list[str]]:
    """The hyper-parameters that an imported record's logs print; knobs that they do not name stay the preset's."""
    record = imports.find(home, name).record
    seed = next((seed for seed in record.seeds if seed.run is not None), None)
    logs = [log for log in ((seed.scored, seed.run) if seed else ()) if log is not None]
    settings = {name: text for log in logs for name, text in log.settings.items()}
    known = {PUBLIC_NAMES[public]: public for public in settings if PUBLIC_NAMES.get(public) in study.space}
    if not known:
        raise ConfigError(
            f"the logs of {record.name} print none of the knobs that {study.name} searches",
            hint="give them by hand: --set KNOB=VALUE",
        )
    values = {knob: parse_value(knob, settings[public]) for knob, public in known.items()}
    left = sorted(set(study.space) - set(values))
    notes = [f"{record.name} does not print {', '.join(left)}: the preset's value is taken"] if left else []
    return [(by_hand(study, values), f"record {record.name}")], notes
