"""Writes the requirements of the named extras of pyproject.toml, a line each: what an image installs is said there once."""

import sys
import tomllib
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent / "pyproject.toml"


def requirements_of(extras: list[str]) -> list[str]:
    """Requirements of the extras, without duplicates; raises KeyError for an extra that the project does not have."""
    known = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    return list(dict.fromkeys(line for extra in extras for line in known[extra]))


if __name__ == "__main__":
    sys.stdout.write("\n".join(requirements_of(sys.argv[1:])) + "\n")
