from pathlib import Path

import pytest

from orchestrator.job_names import JobNames

NAMES = JobNames.of_study("wd.qk", Path("/home/a"))


def test_an_attempts_name_is_one_of_the_studys():
    tag = NAMES.tag("3f2a", 2)
    assert tag.startswith("caddie.wd.qk.3f2a.2.") and NAMES.is_ours(tag)


@pytest.mark.parametrize(
    "other",
    [
        JobNames.of_study("wd.qk", Path("/home/b")).tag("3f2a", 2),
        JobNames.of_study("wd", Path("/home/a")).tag("3f2a", 2),
        JobNames.of_study("wd.qk.ttt", Path("/home/a")).tag("3f2a", 2),
        "bash",
        f"caddie.wd.qk.{NAMES.home}",
        f"caddie.wd.qk.3f2a.x.{NAMES.home}",
    ],
)
def test_another_homes_or_studys_jobs_are_not_ours(other):
    assert not NAMES.is_ours(other)
