"""Whether a script heeds its variables, seen by starting it twice."""

from __future__ import annotations

from pathlib import Path

import pytest
from make_scripts import make_data, write_script

from orchestrator import probe
from orchestrator.data_view import lay_out
from orchestrator.errors import ConfigError
from orchestrator.probe import DEAD, LIVE, READ, UNKNOWN, prove, require_alive
from orchestrator.script import Script, read_script


def script_of(tmp_path: Path, text: str) -> Script:
    (tmp_path / "train_gpt.py").write_text(text)
    return read_script(tmp_path)


@pytest.mark.parametrize(("family", "packed", "name", "setting"), [
    ("A", False, "WEIGHT_DECAY", "weight_decay"), ("B", True, "MUON_WD", "muon_wd"), ("C", False, "WD", "weight_decay"),
])  # fmt: skip
def test_a_variable_that_becomes_a_setting_is_live(
    tmp_path: Path, family: str, packed: bool, name: str, setting: str
) -> None:
    script = read_script(write_script(tmp_path / family, family, packed=packed))
    (found,) = prove(script, {name: ("0.1", "0.2")}, data_dir=make_data(tmp_path / "data"))
    assert (found.status, found.found) == (LIVE, f"{setting} is 0.1 and 0.2")


def test_a_script_that_does_not_get_to_its_settings_proves_nothing_of_them(tmp_path: Path) -> None:
    script = read_script(write_script(tmp_path, "C"))
    (found,) = prove(script, {"WD": ("0.1", "0.2")})
    assert (found.status, found.found) == (UNKNOWN, "line 23 looks at it; the script did not get there on this machine")


def test_a_script_that_misses_the_gpu_has_told_its_settings_before(tmp_path: Path) -> None:
    script = script_of(
        tmp_path,
        "import os\nclass H:\n    lr = float(os.environ.get('LR', 0.1))\nraise RuntimeError('CUDA is required')\n",
    )
    assert prove(script, {"LR": ("0.5", "0.6")})[0].status == LIVE


def test_a_variable_behind_a_name_that_is_made_up_is_found_by_its_values(tmp_path: Path) -> None:
    script = script_of(
        tmp_path, "import os\nfor n in ('a',):\n    rate = float(os.environ.get(f'LR_{n.upper()}', 0.1))\n"
    )
    assert [(one.status, one.found) for one in prove(script, {"LR_A": ("0.5", "0.6")})] == [
        (LIVE, "rate is 0.5 and 0.6")
    ]


def test_a_variable_that_is_looked_at_and_shows_nowhere_is_only_read(tmp_path: Path) -> None:
    script = script_of(
        tmp_path, "import os\nprint(os.environ.get('WHO', ''))\nsteps = int(os.environ.get('STEPS', 3))\n"
    )
    assert [one.status for one in prove(script, {"WHO": ("a", "b")})] == [READ]


def test_a_variable_that_is_never_looked_at_is_dead_and_refused(tmp_path: Path) -> None:
    script = script_of(tmp_path, "import os\nexec(open('/dev/null').read())\nsteps = int(os.environ.get('STEPS', 3))\n")
    found = prove(script, {"WD": ("0.1", "0.2")})
    assert [one.status for one in found] == [DEAD]
    with pytest.raises(ConfigError, match=r"env.WD changes nothing: .* looked at 1 variables, never at this one"):
        require_alive(found, script)


def test_a_script_that_does_not_start_here_proves_nothing(tmp_path: Path) -> None:
    script = script_of(tmp_path, "import no_such_library\nimport os\nwd = float(os.environ.get('WD', 0.1))\n")
    (found,) = prove(script, {"WD": ("0.1", "0.2")})
    assert found.status == UNKNOWN
    require_alive([found], script)


def test_a_script_that_goes_on_is_ended_when_it_looks_at_nothing_more(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(probe, "QUIET_SECONDS", 0.3)
    mark = tmp_path / "mark"
    script = script_of(
        tmp_path,
        "import os, time\nwd = float(os.environ.get('WD', 0.1))\n"
        f"while True:\n    open({str(mark)!r}, 'w').write(str(os.getpid()))\n    time.sleep(0.05)\n",
    )
    assert [one.status for one in prove(script, {"WD": ("0.1", "0.2")})] == [LIVE]
    assert not Path(f"/proc/{mark.read_text()}").exists()


def test_what_a_probe_writes_is_gone_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    data = lay_out(make_data(tmp_path / "data"), tmp_path / "work")
    for name, value in data.items():
        monkeypatch.setenv(name, value)
    script = read_script(write_script(tmp_path / "A", "A"))
    before = sorted(path.name for path in tmp_path.iterdir())
    prove(script, {"WEIGHT_DECAY": ("0.1", "0.2")})
    assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.parametrize(("name", "text", "other"), [
    ("ITERATIONS", "200", "201"), ("WEIGHT_DECAY", "0.5", "0.751"), ("TIE_EMBEDDINGS", "1", "0"), ("DATA_PATH", "x", "x-other"),
])  # fmt: skip
def test_another_value_is_of_the_same_kind(tmp_path: Path, name: str, text: str, other: str) -> None:
    assert probe.other_text(read_script(write_script(tmp_path, "A")), name, text) == other
