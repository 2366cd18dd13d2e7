import subprocess
import sys
import traceback
from pathlib import Path

import pytest

import trainer
from orchestrator import bundle
from orchestrator.errors import CaddieError, ConfigError
from trainer.config import from_mapping

ROOT = Path(trainer.__file__).parent

PROBE = """
import inspect, runpy, sys, linecache
sys.argv = ["train_gpt.py"]
globals().update(runpy.run_path({path!r}, run_name="probe"))
{body}
"""


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    path = tmp_path_factory.mktemp("bundle") / "train_gpt.py"
    path.write_bytes(bundle.build())
    return path


def probe(path, body, cwd):
    """Run `body` with the bundle's finder in place, where no readable trainer can be found."""
    program = PROBE.format(path=str(path), body=body)
    return subprocess.run([sys.executable, "-I", "-c", program], capture_output=True, text=True, cwd=cwd, check=False)


def test_the_bundle_is_within_its_limit():
    assert len(bundle.build()) <= 25_000 == bundle.LARGEST_BYTES


def test_a_bundle_over_the_limit_is_refused(monkeypatch):
    monkeypatch.setattr(bundle, "LARGEST_BYTES", 1000)
    with pytest.raises(CaddieError, match=r"the bundle has \d+ bytes, the limit is 1000"):
        bundle.build.__wrapped__()


def test_the_same_sources_give_the_same_bytes():
    assert bundle.build.__wrapped__() == bundle.build.__wrapped__()


def test_every_module_of_a_run_is_packed_and_no_other():
    left_out = {path.stem for path in ROOT.glob("*.py")} - set(bundle.MODULES)
    assert left_out == {"__init__", "__main__", "corpus", "prepare", "verification"}


def test_modules_come_from_the_bundle_where_no_source_is_installed(packed, tmp_path):
    done = probe(
        packed,
        "import trainer.schedule as s; print(s.__file__, s.lr_multiplier(1.0, warmdown_frac=.5, floor=.25))",
        tmp_path,
    )
    assert done.stdout.strip().endswith("train_gpt.py/trainer/schedule.py 0.25"), done.stderr


def test_sources_can_be_inspected(packed, tmp_path):
    done = probe(packed, "import trainer.schedule as s; print(inspect.getsource(s.lr_multiplier))", tmp_path)
    assert done.stdout.startswith("def lr_multiplier("), done.stderr


def test_a_traceback_names_the_line_of_the_readable_source(packed, tmp_path):
    body = (
        "from trainer.config import from_mapping\ntry: from_mapping({'nowhere': {}})\n"
        "except Exception:\n import traceback; traceback.print_exc()"
    )
    done = probe(packed, body, tmp_path)
    try:
        from_mapping({"nowhere": {}})
    except ConfigError as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
    assert f'train_gpt.py/trainer/config.py", line {frame.lineno}, in from_mapping' in done.stderr
    assert "raise ConfigError(" in done.stderr


def test_the_code_state_names_the_commit_of_a_checkout():
    state = bundle.code_state()
    assert not state or len(state["git_sha"]) == 40
