"""The reader of Dockerfiles by which their steps are carried out: what it misread, no test below it would see."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.deployment import dockerfile

TEXT = """\
# a comment
ARG BASE=debian:12
FROM ${BASE} AS first
RUN apt-get update \\
    # a comment in the middle
    && apt-get install gcc
FROM first AS second
ENV PATH=/opt/bin:/bin \\
    NAME="two words"
CMD ["run", "it"]
"""


def read(folder: Path, text: str) -> dockerfile.Dockerfile:
    path = folder / "Dockerfile"
    path.write_text(text)
    return dockerfile.read(path)


def test_continued_lines_are_one_step_and_comments_none(tmp_path: Path) -> None:
    found = read(tmp_path, TEXT)
    assert [stage.name for stage in found.stages] == ["first", "second"]
    (step,) = found.stage("first").instructions
    assert (step.word, step.text, step.line) == ("RUN", "apt-get update && apt-get install gcc", 4)


def test_the_last_stage_is_what_is_built_without_a_name(tmp_path: Path) -> None:
    assert read(tmp_path, TEXT).stage().name == "second"
    with pytest.raises(StopIteration):
        read(tmp_path, TEXT).stage("third")


def test_variables_and_values_are_read_as_docker_reads_them(tmp_path: Path) -> None:
    found = read(tmp_path, TEXT)
    assert dockerfile.substituted(found.stages[0].base, found.arguments) == "debian:12"
    assert dockerfile.substituted("$A${B}-${C}", {"A": "1", "B": "2"}) == "12-"
    env, command = found.stage("second").instructions
    assert dockerfile.pairs_of(env.text) == {"PATH": "/opt/bin:/bin", "NAME": "two words"}
    assert dockerfile.command_of(command.text, ["/bin/sh", "-c"]) == ["run", "it"]
    assert dockerfile.command_of("run it", ["/bin/sh", "-c"]) == ["/bin/sh", "-c", "run it"]


def test_an_instruction_that_would_be_skipped_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Dockerfile:2: ONBUILD is not known"):
        read(tmp_path, "FROM debian:12\nONBUILD RUN true\n")
