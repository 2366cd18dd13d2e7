import json
import sys
from importlib import metadata

import pytest
from make_study import Maker, make_study

from orchestrator import doctor, lock
from orchestrator.doctor import MISSING, OK, WARN, Finding, examine, exit_code, is_satisfied, package
from orchestrator.home import Home
from trainer.protocol import SPLITS, DataDir, Manifest, Shard, Split, sha256_of, write_manifest

NAME = "wd-qk-ttt-smoke"


def installed(versions):
    """Stands for importlib.metadata.version."""

    def version_of(name):
        if name not in versions:
            raise metadata.PackageNotFoundError(name)
        return versions[name]

    return version_of


def by_name(findings):
    return {finding.name: finding for finding in findings}


def make_data_set(home, *, bytes_on_disk=64):
    root = home.data / "pydoc"
    root.mkdir(parents=True)
    splits = {}
    for split in SPLITS:
        file = f"{split}_000000.bin"
        (root / file).write_bytes(b"x" * bytes_on_disk)
        sha256 = sha256_of(root / file)
        shard = Shard(file=file, tokens=1000, bytes=64, sha256=sha256, first_document=0, documents=1)
        splits[split] = Split(shards=(shard,), tokens=1000, documents=1, text_bytes=3000)
    DataDir(root).tokenizer.write_bytes(b"pieces")
    manifest = Manifest(
        source="test",
        recipe={},
        tokenizer=DataDir(root).tokenizer.name,
        tokenizer_sha256=sha256_of(DataDir(root).tokenizer),
        vocab_size=1024,
        splits=splits,
    )
    write_manifest(DataDir(root).manifest, manifest)


def test_an_examination_looks_at_everything_and_never_raises(tmp_path):
    found = by_name(examine(make_study(tmp_path, stage="search")))
    assert {"Python", "GPUs", "Slurm", "CADDIE_HOME", "Machine", "Data", "MLflow", f"Study {NAME}"} <= set(found)
    assert found["Python"].status == OK
    assert found[f"Study {NAME}"] == Finding(
        name=f"Study {NAME}", status=WARN, found="left in the middle", remedy="the command that started it continues it"
    )


def test_only_what_is_required_and_missing_fails_the_command():
    ok, warn, missing = (Finding(name="x", status=status, found="") for status in (OK, WARN, MISSING))
    assert exit_code([ok, warn]) == 0
    assert exit_code([ok, missing]) == 8


def test_an_old_python_is_missing_something():
    found = doctor.python_version((3, 10, 12))
    assert (found.status, found.found) == (MISSING, "3.10.12, 3.11 is needed")


@pytest.mark.parametrize(
    ("requirement", "versions", "status", "found"),
    [
        ('optuna<6,>=5.0; extra == "orchestrator"', {"optuna": "5.0.0"}, OK, "5.0.0"),
        ('optuna<6,>=5.0; extra == "orchestrator"', {"optuna": "4.9.0"}, WARN, "4.9.0, wanted <6,>=5.0"),
        ('optuna<6,>=5.0; extra == "orchestrator"', {}, MISSING, "not installed"),
        ('ruff>=0.12; extra == "dev"', {}, WARN, "not installed, needed to work on caddie itself"),
        ("rich", {"rich": "15.0"}, OK, "15.0"),
    ],
)
def test_a_package_is_compared_with_what_is_required(requirement, versions, status, found):
    finding = package(requirement, installed(versions))
    assert (finding.status, finding.found) == (status, found)
    assert (finding.remedy == "") == (status == OK)


@pytest.mark.parametrize(
    ("version", "wanted", "expected"),
    [
        ("2.13.0+cpu", "<2.14,>=2.9", True), ("2.14.0", "<2.14,>=2.9", False), ("2.9", ">=2.9.0", True), ("3.0", "==3.0.0", True),
        ("3.1", "!=3.1", False), ("1.5.9", "~=1.5.4", True), ("1.6.0", "~=1.5.4", False), ("2.7.1", "==2.7.*", True),
        ("10.0", ">9", True), ("1", "<=1.0", True), ("1.0", "===weird", True), ("1.0", "", True),
    ],
)  # fmt: skip
def test_versions_are_compared_by_their_numbers(version, wanted, expected):
    assert is_satisfied(version, wanted) is expected


def test_a_source_checkout_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr(doctor, "PACKAGE", "caddie-that-nobody-installed")
    [finding] = doctor.packages()
    assert (finding.status, finding.found) == (WARN, "not installed, run from its source")


def test_installed_requirements_are_listed_once_without_the_packages_own_extras(monkeypatch):
    monkeypatch.setattr(
        doctor.metadata, "requires", lambda name: ["rich>=14", "rich>=14", 'caddie[trainer]; extra == "all"']
    )
    assert [finding.name for finding in doctor.packages(installed({"rich": "15"}))] == ["rich"]


def probe(code):
    return doctor.torch_and_gpus((sys.executable, "-c", code))


def test_torch_is_asked_in_a_process_of_its_own():
    answer = json.dumps({"version": "2.11", "gpus": ["H100", "H100"], "cuda": "12.8"})
    assert probe(f"print({answer!r})").found == "2 GPUs: H100 (torch 2.11)"
    assert "torch" not in sys.modules or "torch" not in doctor.__dict__


def test_a_torch_that_cannot_be_imported_is_missing_with_its_last_line():
    found = probe("raise ModuleNotFoundError(\"No module named 'torch'\")")
    assert found.status == MISSING
    assert found.found.endswith("No module named 'torch'")


def test_a_torch_that_answers_nonsense_is_a_warning():
    assert probe("print('hello')").status == WARN


@pytest.mark.parametrize(
    ("tools", "status", "word"),
    [
        ((), OK, "not here"),
        (("sbatch", "sinfo", "sacct"), OK, "are here"),
        (("sbatch", "sinfo"), WARN, "without sacct"),
    ],
)
def test_slurm_is_an_offer(tools, status, word):
    found = doctor.slurm(lambda tool: f"/usr/bin/{tool}" if tool in tools else None)
    assert found.status == status
    assert word in found.found


def test_a_home_that_cannot_be_written_is_missing(tmp_path):
    (tmp_path / "file").write_text("")
    found = doctor.home_directory(Home(tmp_path / "file" / "home"))
    assert found.status == MISSING
    assert "must be a directory" in found.found


def test_a_nearly_full_disk_is_a_warning(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "LEAST_FREE_BYTES", 10**18)
    assert doctor.home_directory(Home(tmp_path)).status == WARN


def test_little_memory_is_a_warning_and_an_unknown_amount_is_not(tmp_path):
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:       100 kB\nMemAvailable:   1000000 kB\n")
    assert doctor.cores_and_memory(meminfo).status == WARN
    assert doctor.cores_and_memory(tmp_path / "none").status == OK


def test_data_sets_are_checked_by_their_files(tmp_path):
    home = Home(tmp_path)
    assert doctor.data_sets(home)[0].found == "no data set yet"
    make_data_set(home)
    [found] = doctor.data_sets(home)
    assert (found.status, found.found) == (OK, "2,000 tokens, vocabulary 1,024")


def test_a_truncated_and_a_missing_shard_are_named(tmp_path):
    home = Home(tmp_path)
    make_data_set(home, bytes_on_disk=10)
    assert "the shard is truncated: 10 bytes, the manifest says 64" in doctor.data_sets(home)[0].found
    (home.data / "pydoc" / "train_000000.bin").unlink()
    assert "train_000000.bin: the shard is missing" in doctor.data_sets(home)[0].found


def test_a_damaged_manifest_is_a_warning(tmp_path):
    home = Home(tmp_path)
    make_data_set(home)
    DataDir(home.data / "pydoc").manifest.write_text("{")
    assert doctor.data_sets(home)[0].status == WARN


def test_a_home_that_others_may_write_to_is_told_of(tmp_path):
    home = Home(tmp_path / "home")
    home.root.mkdir(mode=0o700)
    assert doctor.home_directory(home).status == OK
    home.root.chmod(0o707)
    found = doctor.home_directory(home)
    assert (found.status, found.remedy) == (WARN, f"chmod go-w {home.root}")


def test_a_tracking_server_that_is_away_is_told_of_with_its_remedy(tmp_path, monkeypatch):
    monkeypatch.setenv("CADDIE_MLFLOW_URI", "http://127.0.0.1:9")
    found = doctor.mlflow_database(Home(tmp_path))
    assert found.status == WARN and "127.0.0.1:9" in found.found and "MLFLOW_TRACKING_PASSWORD" in found.remedy
    monkeypatch.setenv("CADDIE_MLFLOW_URI", "mlflow.db")
    assert doctor.mlflow_database(Home(tmp_path)).status == WARN


def test_a_damaged_mlflow_database_names_the_rebuild(tmp_path):
    home = Home(tmp_path)
    assert doctor.mlflow_database(home).status == OK
    home.mlflow_database.write_bytes(b"not a database" * 100)
    found = doctor.mlflow_database(home)
    assert (found.status, found.remedy) == (WARN, "caddie track --rebuild")


def test_a_study_at_work_a_closed_one_and_a_damaged_ledger_are_told_apart(tmp_path):
    home = make_study(tmp_path)
    assert doctor.study(home, NAME) is None
    with lock.held(home.study(NAME)):
        found = doctor.study(home, NAME)
    assert found is not None
    assert found.found.endswith("works on it")
    home.study(NAME).ledger.write_text("broken\n")
    damaged = doctor.study(home, NAME)
    assert damaged is not None
    assert damaged.status == WARN


def test_a_study_left_in_the_middle_names_the_command_that_continues_it(tmp_path):
    home = Maker(tmp_path).home
    [found] = doctor.studies(home)
    assert found.remedy == "the command that started it continues it"
