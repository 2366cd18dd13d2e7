"""docker/compose.yaml from its images to a study's report, without a container engine. A quarter of an hour the first time.

    CADDIE_TEST_ROOTS=/var/tmp/roots make test ARGS="-m slow tests/deployment/test_stack.py"

The variable names a folder of 6 GB for the images, which are built where they are missing and used again where they are there.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.deployment import compose, roots, services, stack
from tests.deployment.roots import Builder

FOLDER = os.environ.get("CADDIE_TEST_ROOTS", "")

pytestmark = [
    pytest.mark.slow, pytest.mark.timeout(3600),
    pytest.mark.skipif(not FOLDER, reason="CADDIE_TEST_ROOTS names no folder for images"),
]  # fmt: skip

REASON = roots.missing() or services.missing()


@pytest.fixture(scope="module")
def builder() -> Builder:
    if REASON:
        pytest.skip(REASON)
    Path(FOLDER).mkdir(parents=True, exist_ok=True)
    return Builder(Path(FOLDER).resolve())


def small(text: str) -> str:
    """The shipped study with fewer and shorter runs."""
    text = text.replace("trials = 6", "trials = 2").replace("startup_trials = 4", "startup_trials = 1")
    return text.replace("[42, 314, 999]", "[42]").replace(
        '[space."optim', '[set]\n"schedule.steps" = 12\n\n[space."optim', 1
    )


def python(builder: Builder, image: str, program: str) -> str:
    """What a program says in an image's environment."""
    found = builder.image(image)
    command = roots.in_root(found.root, ["python", "-c", program], user=found.user)
    done = subprocess.run(command, env=found.environment, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout.strip()


WHERE = (
    "import importlib.util as u; print([n for n in ('torch', 'orchestrator', 'mlflow', 'optuna') if u.find_spec(n)])"
)


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        ("trainer", ["torch"]),
        ("node", ["torch", "orchestrator"]),
        ("orchestrator", ["orchestrator", "mlflow", "optuna"]),
    ],
)
def test_each_image_holds_its_plane(builder: Builder, image: str, expected: list[str]) -> None:
    assert python(builder, image, WHERE) == str(expected)


def test_no_image_holds_a_key_of_munge(builder: Builder) -> None:
    for name in roots.IMAGES:
        assert not (builder.image(name).root / "etc/munge/munge.key").exists(), name


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that PostgreSQL's user can enter; pytest's own are closed to it."""
    found = Path(tempfile.mkdtemp(prefix="stack-"))
    found.chmod(0o755)
    yield found
    shutil.rmtree(found, ignore_errors=True)


def test_the_services_carry_a_study_to_its_report(builder: Builder, folder: Path, tmp_path: Path) -> None:
    studies = tmp_path / "studies"
    studies.mkdir()
    for path in (compose.DOCKER / "studies").iterdir():
        (studies / path.name).write_text(small(path.read_text()))
    for name in roots.IMAGES:
        builder.image(name)
    done = subprocess.run(
        [sys.executable, stack.__file__, str(builder.folder), str(folder / "stack"), str(studies)],
        capture_output=True, text=True, timeout=stack.STUDY_SECONDS, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    report = re.search(r"^report +/srv/caddie/(\S+)", done.stdout, re.MULTILINE)
    assert report and (folder / "stack/volumes/home" / report[1]).is_file(), done.stdout
    assert "MLflow does not show" not in done.stdout
