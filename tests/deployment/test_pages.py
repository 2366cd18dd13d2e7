"""The pages of docs/ and the README: every command of ours that they show exists, and every study can be read."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from orchestrator.cli import make_parser
from orchestrator.study_file import parse_study

ROOT = Path(__file__).resolve().parents[2]
PAGES = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md"]
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[\w-]*)?\)")
PLACEHOLDER = re.compile(r"FILE…|\[.*?\]|…|\|")


def shown(page: Path) -> list[tuple[int, str]]:
    """The lines of a page's indented blocks, with their numbers."""
    lines = page.read_text(encoding="utf-8").splitlines()
    return [(number, line[4:]) for number, line in enumerate(lines, start=1) if line.startswith("    ")]


def words_of(line: str) -> list[str]:
    """Arguments of ours in a shown line, however the program is reached; none where it is somebody else's line."""
    words = shlex.split(line, comments=True)
    for place, word in enumerate(words):
        is_command = Path(word).name == "caddie" and (place == 0 or words[0] == "docker")
        if is_command and (place == 0 or words[place - 1] == "slurm"):
            return words[place + 1 :]
        if word == "orchestrator" and words[:2] == ["docker", "compose"] and words[place + 1 :]:
            return words[place + 1 :]
    return []


COMMANDS = [
    pytest.param(words, id=f"{page.name}:{number}")
    for page in PAGES
    for number, line in shown(page)
    if not PLACEHOLDER.search(line) and (words := words_of(line))
]


def test_the_pages_show_enough_commands_to_be_worth_a_test() -> None:
    assert len(COMMANDS) > 50
    assert words_of("docker compose run --rm orchestrator study list") == ["study", "list"]
    assert words_of("docker compose exec --user caddie slurm caddie verify 3f2a") == ["verify", "3f2a"]


@pytest.mark.parametrize("words", COMMANDS)
def test_a_command_on_a_page_exists(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    try:
        arguments, unknown = make_parser().parse_known_args(words)
    except SystemExit:
        pytest.fail(f"caddie {shlex.join(words)}: {capsys.readouterr().err}")
    assert not unknown and callable(getattr(arguments, "call", None)), unknown


STUDIES = [
    pytest.param(match[1], id=f"{page.name}:{number}")
    for page in PAGES
    for number, match in enumerate(re.finditer(r"```toml\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL))
]


@pytest.mark.parametrize("text", STUDIES)
def test_a_study_on_a_page_is_sound(text: str) -> None:
    assert not parse_study(text).warnings()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_leads_to_is_there(page: Path) -> None:
    for target in LINK.findall(page.read_text(encoding="utf-8")):
        assert "://" in target or (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_of_docker_that_a_page_names_are_there(page: Path) -> None:
    for name in re.findall(r"\bdocker/[\w./-]*\w", page.read_text(encoding="utf-8")):
        made = ("docker/.env", "docker/trainer.sif")
        assert name in made or (ROOT / name).exists(), name
