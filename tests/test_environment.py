"""Environments in which users run: file systems without some calls, variables of notebooks and schedulers, kills."""

import errno
import os
import stat
import subprocess
import sys

import pytest

from dmat import files, processes


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
