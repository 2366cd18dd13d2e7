"""Somebody's own program, as its text shows it."""

from __future__ import annotations

from pathlib import Path

import pytest
from make_scripts import write_script

from orchestrator.errors import ConfigError
from orchestrator.home import Home
from orchestrator.script import kept, read_script


@pytest.mark.parametrize(
    ("family", "stages"), [("A", ("roundtrip",)), ("B", ("roundtrip", "sliding")), ("C", ("roundtrip",))]
)
def test_the_evaluations_of_a_script_are_those_whose_labels_it_holds(tmp_path: Path, family: str, stages) -> None:
    assert read_script(write_script(tmp_path, family)).stages == stages


def test_a_packed_script_shows_what_the_plain_one_shows(tmp_path: Path) -> None:
    plain = read_script(write_script(tmp_path / "plain", "B"))
    packed = read_script(write_script(tmp_path / "packed", "B", packed=True))
    assert (packed.lookups, packed.stages, packed.is_opaque) == (plain.lookups, plain.stages, False)
    assert packed.content != plain.content


def test_a_script_is_found_by_its_folder_and_named_by_it(tmp_path: Path) -> None:
    write_script(tmp_path / "2026-03-20_Made_Up", "A")
    assert read_script(tmp_path / "2026-03-20_Made_Up").name == "2026-03-20_Made_Up"


def test_a_folder_without_a_script_names_those_that_it_has(tmp_path: Path) -> None:
    (tmp_path / "train_other.py").write_text("")
    with pytest.raises(ConfigError, match="there is no such script") as error:
        read_script(tmp_path)
    assert "train_other.py" in (error.value.hint or "")


def test_what_is_no_python_is_refused_with_its_place(tmp_path: Path) -> None:
    path = tmp_path / "train_gpt.py"
    path.write_text("torchrun train_gpt.py --nproc 8\n")
    with pytest.raises(ConfigError, match=f"{path}: this is no program of Python"):
        read_script(path)


def test_a_script_too_large_to_be_one_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "train_gpt.py"
    path.write_bytes(b"#" * 2_000_001)
    with pytest.raises(ConfigError, match="must have at most 2,000,000 bytes, got 2,000,001"):
        read_script(path)


def test_the_homes_copy_outlives_a_change_of_the_file(tmp_path: Path) -> None:
    home, path = Home(tmp_path / "home"), write_script(tmp_path / "Some_Record", "A")
    script = read_script(path)
    copy = kept(home, script)
    path.write_text("print('another')\n")
    assert copy.read_bytes() == script.content
    assert kept(home, read_script(path)) != copy, "another script has another place"
    assert kept(home, read_script(copy)) == copy, "a copy is not copied"


def test_modules_beside_a_script_are_told(tmp_path: Path) -> None:
    path = write_script(tmp_path, "C", changes={"import glob, math, os": "import glob, math, os, kernels_of_mine"})
    (tmp_path / "kernels_of_mine.py").write_text("")
    assert read_script(path).companions == ("kernels_of_mine",)
