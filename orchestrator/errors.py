"""Errors of the control plane; the root of the family and its exit codes are in `trainer.errors`.

    CaddieError
    ├── StudyFailed      7  a study or a run ended without what was asked of it
    ├── MachineError     8  this machine lacks something: a program, a free port, a GPU
    └── StudyBusy        9  another controller works on the study
"""

from __future__ import annotations

from trainer.errors import CaddieError, ConfigError, DataError, ProtocolError, StorageError

__all__ = [
    "CaddieError",
    "ConfigError",
    "DataError",
    "MachineError",
    "ProtocolError",
    "StorageError",
    "StudyBusy",
    "StudyFailed",
]


class StudyFailed(CaddieError):
    exit_code = 7


class MachineError(CaddieError):
    exit_code = 8


class StudyBusy(CaddieError):
    exit_code = 9
