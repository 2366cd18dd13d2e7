"""Errors of the control plane; the root of the family and its exit codes are in `trainer.errors`.

CaddieError
├── StudyFailed      7  a study or a run ended without what was asked of it
├── MachineError     8  this machine lacks something: a program, a free port, a GPU
├── StudyBusy        9  another controller works on the study
└── Interrupted    130  the user or the system asked the controller to leave
"""

from __future__ import annotations

from trainer.errors import CaddieError, ConfigError, DataError, ProtocolError, StorageError

__all__ = [
    "CaddieError",
    "ConfigError",
    "DataError",
    "Interrupted",
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


class Interrupted(CaddieError):
    exit_code = 130
