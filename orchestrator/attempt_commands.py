"""`caddie demo`, `run` and `replay`: record attempts, with our trainer or somebody's own script."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from orchestrator import datasets
from orchestrator.assignments import RECORD_SEEDS, named_preset, parse_options, parse_pairs, parse_seeds, parse_settings
from orchestrator.errors import ConfigError
from orchestrator.execution import carry_out, is_beside_record, show_outcome
from orchestrator.home import Home
from orchestrator.terminal import command_name, show_json, warn
from trainer.protocol import STAGES

if TYPE_CHECKING:
    from orchestrator.script import Script
    from orchestrator.study import Study


def demo(arguments: argparse.Namespace, home: Home) -> int:
    from orchestrator import assembly

    return show_outcome(assembly.run_demo(home), home)


def run(arguments: argparse.Namespace, home: Home) -> int:
    if is_beside_record(arguments):
        require_record(arguments.against, home)
    study = study_from_run(arguments, home) if arguments.from_run else study_of_preset(arguments)
    return carry_out(study, arguments, home)


def replay(arguments: argparse.Namespace, home: Home) -> int:
    from orchestrator import replay as replays
    from orchestrator.record_folder import is_record
    from orchestrator.script import read_script

    script = read_script(arguments.script)
    if arguments.look:
        return show_script(script, replays.describe(script), has_json=arguments.json)
    if arguments.against is None and is_record(script.path.parent):
        arguments.against = str(script.path.parent)
    settings = replays.variables(parse_pairs(arguments.set))
    stage, logged = claim_of(arguments, script, home)
    missing = {f"env.{name}": text for name, text in logged.items() if f"env.{name}" not in settings}
    if missing and not arguments.as_logged:
        told = ", ".join(f"{knob.removeprefix('env.')}={text}" for knob, text in missing.items())
        warn([f"the record's logs have {told}, which are not the script's defaults: --as-logged takes them"])
    study = replays.replay_study(
        script.path, data=arguments.data or datasets.PYDOC, seeds=parse_seeds(arguments.seeds or RECORD_SEEDS),
        settings={**(missing if arguments.as_logged else {}), **settings}, resources=resources_of(arguments),
        name=arguments.name, stage=arguments.stage or stage, home=home,
    )  # fmt: skip
    return carry_out(study, arguments, home)


def claim_of(arguments: argparse.Namespace, script: Script, home: Home) -> tuple[str, dict[str, str]]:
    """The stage that the record beside a script was submitted by, empty where it is not known, and the settings that its
    logs have otherwise than the script."""
    from orchestrator import reproduction
    from orchestrator.replay import as_logged

    if not arguments.against:
        return "", {}
    record = reproduction.find_record(home, arguments.against).record
    return (record.stage if record.stage in STAGES else ""), as_logged(script, record)


def show_script(script: Script, rows: Sequence[tuple[str, str, str, str]], *, has_json: bool) -> int:
    """What a script looks at, by its text."""
    from orchestrator.cells import Table, as_text

    if has_json:
        keys = ("name", "kind", "default", "setting")
        show_json({
            "script": str(script.path), "sha256": script.sha256, "bytes": len(script.content), "stages": script.stages,
            "is_opaque": script.is_opaque, "variables": [dict(zip(keys, row, strict=True)) for row in rows],
        })  # fmt: skip
        return 0
    columns = ("Variable", "Type", "Default", "Setting")
    print(as_text(Table(title=f"What {script.name} looks at", columns=columns, rows=tuple(rows))))
    print(
        f"\n{len(script.content):,} bytes; it can print the stages {', '.join(script.stages) or 'of no label that is known'}"
    )
    warn(["its text does not show all that it looks at; its reads are traced as it runs"] if script.is_opaque else [])
    return 0


def study_of_preset(arguments: argparse.Namespace) -> Study:
    """The record attempt that the arguments ask for. Raises ConfigError."""
    from orchestrator.record_attempt import record_study

    if not arguments.preset:
        raise ConfigError("a preset or --from RUN must be given", hint=f"{command_name()} run --help")
    return record_study(
        named_preset(arguments.preset), data=arguments.data or datasets.PYDOC, seeds=parse_seeds(arguments.seeds or RECORD_SEEDS),
        knobs=parse_settings(arguments.set), resources=resources_of(arguments), name=arguments.name,
        interleave=interleave_of(arguments),
    )  # fmt: skip


def interleave_of(arguments: argparse.Namespace) -> dict[str, Any] | None:
    """The table [interleave] that the arguments ask for; None where no candidate is named. Raises ConfigError."""
    against = None if is_beside_record(arguments) else arguments.against
    entries = {
        "against": named_preset(against) if against else None,
        "set": parse_settings(arguments.set_against) or None, "max_gap": arguments.max_gap, "throughput": arguments.throughput,
    }  # fmt: skip
    given = {name: value for name, value in entries.items() if value is not None}
    if bool(given) != arguments.interleave or (given and not {"against", "set"} & set(given)):
        raise ConfigError(
            "--interleave goes with a candidate: --against PRESET, or --set-against KNOB=VALUE",
            hint=f"{command_name()} run pr1326 --against pr1326-fisher --interleave",
        )
    return given or None


def study_from_run(arguments: argparse.Namespace, home: Home) -> Study:
    """Runs' stored models, scored again with other knobs of evaluation or rounding. Raises ConfigError, ProtocolError."""
    from orchestrator import source_run
    from orchestrator.record_attempt import record_study

    if arguments.preset:
        raise ConfigError(
            f"a preset and --from exclude one another, got {arguments.preset!r} and --from {arguments.from_run}",
            hint="leave the preset out: the run has its own",
        )
    sources = source_run.find_all(home, arguments.from_run.split(","))
    source = sources.runs[0]
    return record_study(
        source.spec.preset, data=arguments.data or source.spec.data_dir,
        seeds=parse_seeds(arguments.seeds) if arguments.seeds else sources.seeds,
        knobs={**source_run.knobs_set(source), **parse_settings(arguments.set)}, resources=resources_of(arguments),
        name=arguments.name, from_runs=[found.spec.run_id for found in sources.runs],
    )  # fmt: skip


def resources_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """The table [resources] that the arguments ask for; what is not given is left to its default."""
    resources = {"gpus_per_run": arguments.gpus, "timeout_minutes": arguments.timeout_minutes, "slots": arguments.slots}
    for name in ("launcher", "nodes", "partition", "account", "qos", "constraint", "python"):
        resources[name] = getattr(arguments, name)
    resources["exclusive"] = arguments.exclusive or None
    resources["sbatch"] = parse_options(arguments.sbatch) or None
    if arguments.launcher == "slurm" and arguments.slots is None:  # all seeds at once, as far as the cluster lets them
        resources["slots"] = len((arguments.seeds or RECORD_SEEDS).split(","))
    return {name: value for name, value in resources.items() if value is not None}


def require_record(text: str, home: Home) -> None:
    """Raise ConfigError before anything is run where --against names no public record."""
    from orchestrator import reproduction

    try:
        reproduction.find_record(home, text)
    except ConfigError as error:
        raise ConfigError(
            f"--against must name a public record: {error}",
            hint=f"{error.hint}; a preset is run beside another with --interleave",
        ) from error
