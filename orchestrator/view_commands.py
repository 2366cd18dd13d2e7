"""`caddie costs`, `ui`, `track` and `doctor`: what was spent, MLflow's pages, and what this machine can do."""

from __future__ import annotations

import argparse
import dataclasses

from orchestrator.home import Home
from orchestrator.terminal import show_json, tell_damage


def costs(arguments: argparse.Namespace, home: Home) -> int:
    from orchestrator import costs as bills
    from orchestrator.cells import as_text

    found = bills.bill(home, arguments.studies or home.study_names())
    if arguments.json:
        show_json(bills.as_record(found))
    else:
        print(as_text(bills.studies_table(found)))
        for one in found.studies if arguments.studies else ():
            print("", one.study, as_text(bills.phases_table(one)), sep="\n")
    return tell_damage(found.problems)


def ui(arguments: argparse.Namespace, home: Home) -> int:
    from orchestrator.ui import serve

    serve(home, host=arguments.host, port=arguments.port)
    return 0


def track(arguments: argparse.Namespace, home: Home) -> int:
    from orchestrator import mirror, tracking_server

    home.require_writable()
    damage = mirror.rebuild(home) if arguments.rebuild else mirror.sync_all(home)
    print(tracking_server.place(home))
    return tell_damage(damage)


def doctor(arguments: argparse.Namespace, home: Home) -> int:
    from orchestrator.doctor import examine, exit_code

    findings = examine(home)
    if arguments.json:
        show_json([dataclasses.asdict(finding) for finding in findings])
    else:
        for finding in findings:
            print(f"{finding.status:<8} {finding.name:<20} {finding.found}")
            if finding.remedy:
                print(f"{'':8} {'':20} → {finding.remedy}")
    return exit_code(findings)
