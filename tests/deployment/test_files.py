"""The files of docker/: sound by their linters and schemas, pinned, without a default password, and true to each other."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from orchestrator.datasets import PYDOC_VOCAB_SIZE
from orchestrator.study import SLURM
from orchestrator.study_file import load_study
from tests.deployment import compose, dockerfile
from tests.deployment.compose import COMPOSE, DOCKER, EXAMPLE, GPU, UnsetVariable
from tests.deployment.dockerfile import Dockerfile

DOCKERFILES = sorted(DOCKER.glob("*.Dockerfile"))
SCRIPTS = [path for path in sorted(DOCKER.iterdir()) if path.is_file() and path.read_bytes().startswith(b"#!")]
PROJECT = tomllib.loads((DOCKER.parent / "pyproject.toml").read_text())
SECRETS = re.compile(r"(PASSWORD|SECRET|SECRET_KEY|ACCESS_KEY)$")
PINNED = re.compile(r"[\w./-]+:[\w.-]*\d[\w.-]*@sha256:[0-9a-f]{64}")


def tool(name: str) -> str:
    """A program of the development environment; where it is not installed the test is skipped and says so."""
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def checked(*command: str | Path) -> None:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def read(path: Path) -> Dockerfile:
    return dockerfile.read(path)


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_the_linter_finds_nothing_in_a_dockerfile(path: Path) -> None:
    checked(tool("hadolint"), "--failure-threshold=style", path)


def test_the_compose_files_fit_the_format() -> None:
    checked(tool("check-jsonschema"), "--builtin-schema=vendor.compose-spec", COMPOSE, GPU)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_a_script_is_sound_and_can_be_started(path: Path) -> None:
    assert path.stat().st_mode & 0o111 == 0o111
    checked("bash" if "bash" in path.read_text().splitlines()[0] else "sh", "-n", path)
    if shutil.which("shellcheck"):
        checked("shellcheck", path)


# ---------------------------------------------------------------------------------------------------- versions


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_every_image_begins_with_one_pinned_base(path: Path) -> None:
    found = read(path)
    stages = {stage.name for stage in found.stages}
    bases = {dockerfile.substituted(stage.base, found.arguments) for stage in found.stages} - stages
    assert all(PINNED.fullmatch(base) for base in bases), bases
    assert bases == {read(DOCKERFILES[0]).arguments["BASE"]}


def test_images_of_others_are_pinned_by_tag_and_digest() -> None:
    for name, service in compose.read()["services"].items():
        if "build" not in service:
            assert PINNED.fullmatch(service["image"]), name
        else:
            assert service["image"].endswith(f":{PROJECT['project']['version']}"), name


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_no_python_package_is_installed_without_its_pinned_version(path: Path) -> None:
    installs = [step.text for stage in read(path).stages for step in stage.instructions if "pip install" in step.text]
    assert installs
    for text in installs:
        assert "-c /opt/caddie/source/constraints.txt" in text or "--no-deps /opt/caddie/source" in text, text


def test_what_the_images_install_is_in_the_constraints() -> None:
    pinned = {line.partition("==")[0].lower() for line in (DOCKER.parent / "constraints.txt").read_text().splitlines()}
    extras = PROJECT["project"]["optional-dependencies"]
    for extra in ("orchestrator", "postgresql", "s3", "trainer"):
        for requirement in extras[extra]:
            assert re.split(r"[\[<>=]", requirement)[0].lower() in pinned, requirement


def test_an_extra_that_the_project_does_not_have_is_not_installed_as_nothing() -> None:
    done = subprocess.run([sys.executable, str(DOCKER / "requirements.py"), "gpu"], capture_output=True, check=False)
    assert done.returncode != 0 and b"gpu" in done.stderr


# ---------------------------------------------------------------------------------------------------- planes and users


def copied(found: Dockerfile, stage: str) -> set[str]:
    """What a stage and those that it is made of copy from the repository."""
    own = found.stage(stage)
    bases = {earlier.name for earlier in found.stages}
    sources = {word for step in own.instructions if step.word == "COPY" for word in step.text.split()[:-1]}
    return sources | (copied(found, own.base) if own.base in bases else set())


def test_the_trainers_image_has_no_control_plane_and_the_orchestrators_no_torch() -> None:
    trainer, control = (read(DOCKER / f"{name}.Dockerfile") for name in ("trainer", "orchestrator"))
    assert trainer.stage().name == "trainer"
    assert "orchestrator" not in copied(trainer, "trainer") and "trainer" in copied(trainer, "trainer")
    text = control.path.read_text()
    assert "requirements.py orchestrator postgresql s3" in text and "requirements.py trainer" not in text


@pytest.mark.parametrize(("file", "stage"), [("orchestrator", "orchestrator"), ("trainer", "node")])
def test_an_image_that_installs_the_project_has_all_of_it(file: str, stage: str) -> None:
    packages = {name.partition(".")[0] for name in PROJECT["tool"]["setuptools"]["packages"]}
    assert packages <= copied(read(DOCKER / f"{file}.Dockerfile"), stage)


def last(found: Dockerfile, stage: str, word: str) -> str:
    return next(step.text for step in reversed(found.stage(stage).instructions) if step.word == word)


def test_control_plane_and_trainer_are_not_root_and_the_control_plane_can_be_asked_how_it_is() -> None:
    control, trainer = (read(DOCKER / f"{name}.Dockerfile") for name in ("orchestrator", "trainer"))
    for found, stage in ((control, "orchestrator"), (trainer, "trainer")):
        assert last(found, stage, "USER") == "${CADDIE_UID}:${CADDIE_UID}"
    assert '["caddie", "study", "list", "--json"]' in last(control, "orchestrator", "HEALTHCHECK")


def test_no_image_holds_a_key_of_munge() -> None:
    for path, stage in ((DOCKER / "orchestrator.Dockerfile", "orchestrator"), (DOCKER / "trainer.Dockerfile", "node")):
        installs = [step.text for step in read(path).stage(stage).instructions if "slurm-client" in step.text]
        assert installs and all("/etc/munge/munge.key" in text.partition("rm -rf")[2] for text in installs)


# ---------------------------------------------------------------------------------------------------- compose


def test_no_secret_has_a_default() -> None:
    example = compose.settings_of(EXAMPLE.read_text())
    secrets = {name for name in example if SECRETS.search(name)}
    assert len(secrets) >= 7 and all(example[name] == "" for name in secrets)
    with pytest.raises(UnsetVariable, match="make-env"):
        compose.interpolated(compose.read(), example)


def test_every_secret_gets_a_value_of_its_own(tmp_path: Path) -> None:
    settings = compose.made_settings(tmp_path)
    secrets = [value for name, value in settings.items() if SECRETS.search(name)]
    assert all(len(value) >= 32 for value in secrets) and len(set(secrets)) == len(secrets)
    assert (tmp_path / ".env").stat().st_mode & 0o777 == 0o600
    assert re.fullmatch(r"GK[0-9a-f]{32}", settings["S3_ACCESS_KEY"])
    compose.interpolated(compose.read(), settings)


def test_settings_that_are_there_are_not_overwritten(tmp_path: Path) -> None:
    before = compose.made_settings(tmp_path)
    done = subprocess.run(["sh", str(tmp_path / "make-env")], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "is there already" in done.stderr
    assert compose.settings_of((tmp_path / ".env").read_text()) == before


def test_the_example_names_every_setting_and_no_other() -> None:
    assert compose.variables_of(compose.read()) == set(compose.settings_of(EXAMPLE.read_text()))


def test_secrets_are_kept_out_of_the_repository_and_the_images() -> None:
    assert "docker/.env" in (DOCKER.parent / ".gitignore").read_text().split()
    assert "docker/.env" in (DOCKER.parent / ".dockerignore").read_text().split()


def test_services_refer_to_what_there_is() -> None:
    found = compose.read()
    for name, service in found["services"].items():
        for volume in service.get("volumes", []):
            source = volume.partition(":")[0]
            there = (DOCKER / source).exists() if source.startswith(".") else source in found["volumes"]
            assert there, (name, volume)
        for needed, condition in service.get("depends_on", {}).items():
            is_healthy = condition["condition"] == "service_healthy"
            assert not is_healthy or has_healthcheck(found["services"][needed]), (name, needed)
        for network in service.get("networks", []):
            assert network in found["networks"], (name, network)


def has_healthcheck(service: dict) -> bool:
    if "healthcheck" in service:
        return not service["healthcheck"].get("disable")
    found = read(DOCKER.parent / service["build"]["dockerfile"])
    stage = found.stage(service["build"].get("target", ""))
    return any(step.word == "HEALTHCHECK" for step in stage.instructions)


def test_ports_are_opened_to_this_machine_alone() -> None:
    ports = [port for service in compose.read()["services"].values() for port in service.get("ports", [])]
    assert ports and all(port.startswith("127.0.0.1:") for port in ports)


def test_the_first_study_is_sound_and_its_data_is_made_as_the_demo_makes_it() -> None:
    place = compose.settings_of(EXAMPLE.read_text())["CADDIE_STUDY"]
    study = load_study(DOCKER / place.removeprefix("/"))
    assert study.resources.launcher == SLURM and not study.warnings()
    assert f"--vocab-size {PYDOC_VOCAB_SIZE}" in str(compose.read()["services"]["data"]["command"])


def test_a_container_image_that_is_not_there_is_named_with_its_remedy(tmp_path: Path) -> None:
    script = tmp_path / "trainer-python"
    shutil.copy2(DOCKER / "trainer-python", script)
    done = subprocess.run([script, "-c", "pass"], capture_output=True, text=True, check=False)
    assert done.returncode == 3 and f"{tmp_path}/trainer.sif" in done.stderr and "apptainer build" in done.stderr
