"""The trace of what a script looks at, in a process of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from orchestrator import read_trace
from orchestrator.read_trace import Trace


def traced(tmp_path: Path, text: str, *, path: str = "", **variables: str) -> Trace:
    """Run a script with the tracer on its path."""
    script, file = tmp_path / "script.py", tmp_path / "reads"
    script.write_text(text)
    paths = os.pathsep.join([str(read_trace.FOLDER), *([path] if path else [])])
    environment = {**os.environ, **variables, **read_trace.variables(file), "PYTHONPATH": paths}
    subprocess.run([sys.executable, str(script)], env=environment, check=True, capture_output=True, timeout=60)
    return read_trace.read_trace(file)


def test_every_way_of_looking_is_noted(tmp_path: Path) -> None:
    found = traced(
        tmp_path,
        "import os\nfrom os import environ, getenv\n"
        "os.environ.get('A', 1)\ngetenv('B')\n'C' in environ\n"
        "try:\n    os.environ['D']\nexcept KeyError:\n    pass\nos.environ.setdefault('E', '1')\nenviron.pop('F', None)\n",
    )
    assert found.names >= {"A", "B", "C", "D", "E", "F"}


def test_looks_of_libraries_and_copies_of_the_environment_are_not_the_scripts(tmp_path: Path) -> None:
    found = traced(
        tmp_path,
        "import os, tempfile, subprocess, sys\ntempfile.gettempdir()\nos.path.expanduser('~')\n"
        "one = {**os.environ, 'X': '1'}\ntwo = dict(os.environ)\nthree = os.environ.copy()\nassert one and two and three\n"
        "subprocess.run([sys.executable, '-c', 'pass'])\nos.environ.get('SEED')\n",
        MUON_WD="0.1",
    )
    assert found.names == {"SEED"}


def test_a_script_that_executes_what_it_unpacks_is_seen_through(tmp_path: Path) -> None:
    found = traced(tmp_path, "exec('import os\\nclass H:\\n    lr = float(os.environ.get(\"LR\", 0.1))\\n')", LR="0.5")
    assert found.names == {"LR"}
    assert found.settings == {"lr": 0.5}


def test_the_settings_are_the_plain_values_of_the_main_module(tmp_path: Path) -> None:
    found = traced(
        tmp_path,
        "import os\nclass Hyperparameters:\n    steps = int(os.environ.get('STEPS', 3))\n    table = {}\nNAME = 'a'\n",
    )
    assert found.settings == {"steps": 3, "NAME": "a"}


def test_the_environment_works_as_before(tmp_path: Path) -> None:
    traced(
        tmp_path,
        "import os, json, sys, subprocess\nos.environ['NEW'] = '1'\nassert os.environ['NEW'] == os.getenv('NEW') == '1'\n"
        "del os.environ['NEW']\nassert 'NEW' not in os.environ and os.environ.get('NEW', 'no') == 'no'\n"
        "assert sorted(os.environ) == sorted(os.environ.keys()) and len(os.environ) == len(dict(os.environ))\n"
        "told = subprocess.run([sys.executable, '-c', 'import os; print(os.environ[\"KEPT\"])'], capture_output=True, text=True)\n"
        "assert told.stdout == 'yes\\n', told\n",
        KEPT="yes",
    )


def test_only_the_first_rank_is_traced(tmp_path: Path) -> None:
    assert traced(tmp_path, "import os\nos.environ.get('A')", RANK="1").is_empty
    assert traced(tmp_path, "import os\nos.environ.get('A')", RANK="0").names == {"A"}


def test_a_module_of_the_same_name_further_down_the_path_is_run_too(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "sitecustomize.py").write_text("import builtins\nbuiltins.was_here = True\n")
    assert traced(tmp_path, "import os\nassert was_here\nos.environ.get('A')", path=str(other)).names == {"A"}


def test_a_probe_that_is_asked_to_leave_tells_its_settings(tmp_path: Path) -> None:
    script, file = tmp_path / "script.py", tmp_path / "reads"
    script.write_text(
        "import os, time\nlr = float(os.environ.get('LR', 0.1))\nopen('ready', 'w').close()\nwhile True:\n    time.sleep(0.05)\n"
    )
    environment = {**os.environ, **read_trace.variables(file, is_probe=True), "PYTHONPATH": str(read_trace.FOLDER)}
    process = subprocess.Popen([sys.executable, str(script)], env=environment, cwd=tmp_path)
    try:
        until = time.monotonic() + 30
        while not (tmp_path / "ready").exists() and time.monotonic() < until:
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        process.wait(30)
    finally:
        process.kill()
        process.wait()
    assert read_trace.read_trace(file).settings == {"lr": 0.1}


def test_a_trace_is_lines_of_json(tmp_path: Path) -> None:
    traced(tmp_path, "import os\nos.environ.get('A', 2)")
    first = json.loads((tmp_path / "reads").read_text().splitlines()[0])
    assert first == {"name": "A", "is_set": False, "default": 2}
