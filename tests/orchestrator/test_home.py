import os
from pathlib import Path

import pytest

from orchestrator.errors import StorageError
from orchestrator.home import Home, default_home


def test_the_home_is_the_environments_or_a_folder_here(tmp_path, monkeypatch):
    monkeypatch.setenv("CADDIE_HOME", str(tmp_path / "there"))
    assert default_home().root == tmp_path / "there"
    monkeypatch.delenv("CADDIE_HOME")
    monkeypatch.chdir(tmp_path)
    assert default_home().root == tmp_path / ".caddie"


def test_a_home_of_an_unknown_user_is_a_storage_error(monkeypatch):
    monkeypatch.setenv("CADDIE_HOME", "~nobody-has-this-name/x")
    with pytest.raises(StorageError, match="CADDIE_HOME '~nobody-has-this-name/x' is not a path"):
        default_home()


def test_a_data_set_is_named_or_a_path(tmp_path):
    home = Home(tmp_path)
    assert home.dataset("pydoc") == tmp_path / "data" / "pydoc"
    assert home.dataset("./here") == Path("here").resolve()


def test_a_home_that_cannot_be_written_is_refused_with_a_remedy(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="file: CADDIE_HOME must be a directory, this is a file"):
        Home(tmp_path / "file" / "home").require_writable()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_home_names_the_permission(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(StorageError) as caught:
        Home(tmp_path).require_writable()
    assert "directory of your own" in caught.value.hint


def test_a_writable_home_is_left_as_it_was(tmp_path):
    Home(tmp_path / "new").require_writable()
    assert list((tmp_path / "new").iterdir()) == []
