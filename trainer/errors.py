"""The family of errors that both planes raise, and the exit code of each.

    CaddieError               1  anything that is our own mistake
    ├── ConfigError           3  a study, preset or knob that cannot be meant
    ├── DataError             4  shards, manifest or tokenizer that cannot be used
    ├── ProtocolError         5  a file of a run directory that does not say what it should
    ├── StorageError          6  a directory that cannot be written, a full disk
    └── (orchestrator.errors) 7  a study or a run that failed; 8 this machine lacks something

A message states the rule, the value and the place; `hint` states the remedy.
"""

from __future__ import annotations


class CaddieError(Exception):
    """Root of the family; `hint` is what the reader can do about it."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint


class ConfigError(CaddieError):
    exit_code = 3


class DataError(CaddieError):
    exit_code = 4


class ProtocolError(CaddieError):
    exit_code = 5


class StorageError(CaddieError):
    exit_code = 6
