"""Environments in which users run: file systems without some calls, variables of notebooks and schedulers, kills."""

import contextlib
import errno
import os
import stat
import subprocess
import sys

import pytest
import sqlalchemy

from dmat import files, processes
from dmat.config import fields
from dmat.tracking import origin
from dmat.workspace import sqlite_path, sqlite_url


@pytest.mark.parametrize(("number", "is_refused"), [(errno.EINVAL, False), (errno.ENOTSUP, False), (errno.EIO, True)])
def test_a_file_system_that_cannot_sync_folders_is_written(tmp_path, monkeypatch, number, is_refused):
    fsync = os.fsync

    def refuse_folders(handle):
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(number, os.strerror(number))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", refuse_folders)
    if is_refused:
        with pytest.raises(OSError, match="Input/output"):
            files.write_text(tmp_path / "a", "x")
    else:
        files.write_text(tmp_path / "a", "x")
    assert (tmp_path / "a").read_text() == "x"


def test_an_error_without_a_number_names_its_cause(tmp_path):
    with (
        pytest.raises(files.DmatError, match=r"quota is full: 4000 requested and 12 written"),
        files.writing(tmp_path / "a"),
    ):
        raise OSError("4000 requested and 12 written")  # as numpy says it
    assert not list(tmp_path.iterdir())


def test_what_a_killed_publish_left_is_removed_by_the_next(tmp_path):
    (tmp_path / "result").mkdir()
    (tmp_path / "result/file").write_text("x")
    for name in (".target.1.new", ".target.1.old", ".other.1.new"):
        (tmp_path / name).mkdir()
    files.publish(tmp_path / "result", tmp_path / "target")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".other.1.new", "result", "target"]


@pytest.mark.parametrize(
    ("variables", "count"),
    [({"WORLD_SIZE": "4"}, 1), ({"WORLD_SIZE": "", "RANK": "0"}, 1), ({"RANK": "0", "WORLD_SIZE": "2"}, 2), ({}, 1)],
)
def test_processes_are_counted_only_where_torchrun_started_them(monkeypatch, variables, count):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert processes.torchrun_processes() == count


def test_pictures_are_drawn_in_a_terminal_of_a_notebook(tmp_path):
    code = "import pathlib; from dmat.metrics import pictures; "
    code += "pictures.save(pictures.new_figure(4, 2)[0], pathlib.Path('a.png'))"
    environment = os.environ | {"MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True)
    assert (tmp_path / "a.png").exists()


@pytest.mark.parametrize("name", ["100%", "a%20b", "what?", "{x}", "a#b", "a&b=c", "ä ö"])
def test_a_database_lies_where_its_url_says(tmp_path, name):
    path = tmp_path / name / "mlflow.db"
    path.parent.mkdir()
    url = sqlite_url(path)
    assert sqlite_path(url) == path
    engine = sqlalchemy.create_engine(url)
    with contextlib.closing(engine.connect()) as connection:
        connection.exec_driver_sql("create table a (b int)")
    engine.dispose()
    assert path.stat().st_size > 0
    assert [entry.name for entry in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("url", ["postgresql://a@b/c", "sqlite://", "sqlite:///:memory:", "http://127.0.0.1:9"])
def test_other_stores_have_no_path(url):
    assert sqlite_path(url) is None


def test_a_repository_of_another_user_is_named(tmp_path, monkeypatch):
    if os.geteuid():
        pytest.skip("needs the right to give files away")
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    monkeypatch.setenv("GIT_CONFIG_SYSTEM", os.devnull)
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    assert not origin.is_of_another_owner(tmp_path)  # it has no commit, which is another problem
    os.chown(tmp_path, 12345, 12345)
    assert origin.is_of_another_owner(tmp_path)
    assert origin.git(tmp_path) == {}


def test_a_long_name_is_refused_before_it_becomes_a_file():
    assert fields.name_problem("a" * 100) is None
    assert "expected at most 100 bytes, not 120" in fields.name_problem("ä" * 60)
