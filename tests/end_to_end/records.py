"""What `caddie verify` and `caddie audit` say of a run, for tests that ask them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.end_to_end.micro import caddie
from trainer.protocol import RunDir


def checked(command: str, run: RunDir, *options: str | Path) -> tuple[int, dict[str, Any]]:
    """Exit code and record of `verify` or `audit`."""
    done = caddie(command, run.root, "--json", *options, cwd=run.root)
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout)


def failures(record: dict[str, Any]) -> list[str]:
    return [check["name"] for check in record["checks"] if check["status"] == "failed"]


def named(record: dict[str, Any], name: str) -> dict[str, Any]:
    return next(check for check in record["checks"] if check["name"] == name)
