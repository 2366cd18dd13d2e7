"""Names of jobs: by its name an attempt's job is found again, whoever has forgotten its id."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class JobNames:
    """Those of one study; another CADDIE_HOME may hold a study of the same name and the same runs."""

    study: str
    home: str
    """Digest of the home's path."""

    @classmethod
    def of_study(cls, study: str, home: Path) -> JobNames:
        return cls(study, hashlib.sha256(str(home.resolve()).encode()).hexdigest()[:8])

    def tag(self, run_id: str, attempt: int) -> str:
        """The name of an attempt's job."""
        return f"caddie.{self.study}.{run_id}.{attempt}.{self.home}"

    def is_ours(self, name: str) -> bool:
        """Whether a job's name is that of an attempt of the study."""
        begin, end = f"caddie.{self.study}.", f".{self.home}"
        middle = name.removeprefix(begin).removesuffix(end)
        run_id, _, attempt = middle.partition(".")
        return name == f"{begin}{middle}{end}" and "." not in attempt and bool(run_id) and attempt.isdecimal()
