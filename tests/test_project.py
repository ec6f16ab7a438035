"""`dmat init`: what it makes, what it refuses, and that a refusal leaves nothing behind."""

import os
import subprocess
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cli.main import app
from dmat import config, files, project, recipes
from dmat.errors import DmatError

MADE = {
    *("params.yaml", "dvc.yaml", ".dvc/config", ".dvc/.gitignore", ".dvc/plots/runs.json", ".dvcignore", ".gitignore"),
    *("README.md", "code.yaml", "sources/none", "plugins/README.md", ".pre-commit-config.yaml"),
}


def _git(folder: Path, *words: str) -> str:
    who = ("-c", "user.name=t", "-c", "user.email=t@example.org")
    return subprocess.run(["git", *who, *words], cwd=folder, check=True, capture_output=True, text=True).stdout


def _files(folder: Path) -> set[str]:
    found = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())
    return {path for path in found if not path.startswith(".git/")}


def test_what_init_makes_and_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["init", "my digits", "--recipe", "digits-3-seeds"])
    assert done.exit_code == 0, done.output
    folder = tmp_path / "my digits"
    first, second, third = done.stdout.splitlines()
    assert first.endswith("cd 'my digits' && git add --all . && git commit --message 'The recipe digits-3-seeds'")
    assert second.endswith("dvc repro")
    assert str(folder / "README.md") in third
    assert _files(folder) == MADE
    assert _git(folder, "rev-parse", "--show-toplevel").strip() == str(folder)
    assert _git(folder, "rev-list", "--all", "--count").strip() == "0"  # no commit
    assert (folder / "params.yaml").read_text() == recipes.read("digits-3-seeds")
    assert config.load(folder / "params.yaml").seeds == (1, 2, 3)
    readme = (folder / "README.md").read_text()
    assert readme.startswith("# my digits\n")
    assert f"the recipe `digits-3-seeds`: {recipes.summaries()['digits-3-seeds']}." in readme
    assert "{" not in readme


def test_git_sees_what_decides_a_result_and_nothing_else(tmp_path):
    folder = project.make(tmp_path / "new", "digits")
    for path in ("sources/cifar/data.bin", "artifacts/a", "runs/b", "mlruns/c", "params.1.yaml", ".dvc/cache/d"):
        files.write_text(folder / path, "large")
    (folder / "sources/linked").symlink_to(tmp_path)
    _git(folder, "add", "--all", ".")
    assert set(_git(folder, "ls-files").splitlines()) == MADE


def test_the_files_are_those_of_the_repository(tmp_path, root):
    """Each exists once: the package has links."""
    folder = project.make(tmp_path / "new", "digits")
    for path in MADE - {"params.yaml", "README.md"}:
        assert (folder / path).read_bytes() == (root / path).read_bytes(), path
    links = [path for path in (root / "dmat/project").iterdir() if path.suffix != ".py" and path.is_file()]
    assert {path.resolve().relative_to(root).as_posix() for path in links if path.is_symlink()} == MADE - {
        "params.yaml",
        "README.md",
    }
    assert [path.name for path in links if not path.is_symlink()] == ["README.md"]


def test_a_folder_with_other_files_becomes_a_project(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "sources").mkdir()
    (tmp_path / "sources/mine.npz").touch()
    project.make(tmp_path, "digits")
    assert _files(tmp_path) == {*MADE, "notes.txt", "sources/mine.npz"}


def test_a_folder_of_a_repository_gets_none_of_its_own(tmp_path):
    """Hooks are those of git's top folder alone, so a folder below it gets no file of them."""
    _git(tmp_path, "init", "-q")
    folder = project.make(tmp_path / "a/b", "digits")
    assert not (folder / ".git").exists()
    assert _files(folder) == MADE - {".pre-commit-config.yaml"}
    top = tmp_path / "top"
    top.mkdir()
    _git(top, "init", "-q")
    assert _files(project.make(top, "digits")) == MADE


@pytest.mark.parametrize(
    ("there", "sentence"),
    [
        (
            ["README.md", ".dvc/config"],
            "{folder} has .dvc/config, README.md; expected a folder without these; move them",
        ),
        (["sources"], "{folder} has sources; expected a folder without these"),
        (["code.yaml"], "{folder} has code.yaml; expected a folder without these"),
        (["../new"], "{folder} is not a folder; expected one, or nothing"),
    ],
)
def test_what_is_in_the_way_is_named_and_nothing_is_written(tmp_path, there, sentence):
    folder = tmp_path / "new"
    for path in there:
        at = Path(os.path.normpath(folder / path))
        at.parent.mkdir(parents=True, exist_ok=True)
        at.write_text("mine")
    before = _files(tmp_path)
    with pytest.raises(DmatError) as refused:
        project.make(folder, "digits")
    assert str(refused.value).startswith(sentence.format(folder=folder))
    assert "nothing was written" in str(refused.value)
    assert _files(tmp_path) == before
    assert not (folder / ".git").exists()


def test_links_in_the_way_are_not_followed(tmp_path):
    folder, data = tmp_path / "new", tmp_path / "data"
    for path in (folder, data):
        path.mkdir()
    (folder / "sources").symlink_to(data)
    (folder / "dvc.yaml").symlink_to(tmp_path / "gone")
    with pytest.raises(DmatError, match=r"has dvc.yaml, sources; expected a folder without these; move them away"):
        project.make(folder, "digits")
    assert _files(data) == set()


def test_a_project_is_not_made_again(tmp_path):
    folder = project.make(tmp_path / "new", "digits")
    (folder / "params.yaml").write_text("mine")
    done = CliRunner().invoke(app, ["init", str(folder)])
    assert isinstance(done.exception, DmatError)
    assert str(done.exception).startswith(f"{folder} is a project already: it has params.yaml, dvc.yaml, .dvc/config")
    assert "use it as it is, or name another folder" in str(done.exception)
    assert (folder / "params.yaml").read_text() == "mine"


def test_an_unknown_recipe_and_a_missing_git_leave_nothing(tmp_path, monkeypatch):
    for name in ("wang", "../project/pipeline"):
        with pytest.raises(DmatError, match=r"recipe is .*; expected one of .*digits-3-seeds"):
            project.make(tmp_path / "new", name)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(DmatError, match=r"git is not on PATH; expected it, as a project is a git repository; install"):
        project.make(tmp_path / "new", "digits")
    assert list(tmp_path.iterdir()) == []


def test_what_fails_half_way_is_taken_away_again(tmp_path, monkeypatch):
    """Twice the same command must not end in "is there already"."""
    write = files.write_text

    def full(path: Path, text: str) -> None:
        if path.name == "README.md":
            raise DmatError("no space left")
        write(path, text)

    monkeypatch.setattr(files, "write_text", full)
    (tmp_path / "there/.dvc").mkdir(parents=True)
    (tmp_path / "there/.dvc/tmp").touch()
    for name in ("new", "there"):
        with pytest.raises(DmatError, match="no space left"):
            project.make(tmp_path / name, "digits")
    assert _files(tmp_path) == {"there/.dvc/tmp"}
    assert not (tmp_path / "new").exists()
    monkeypatch.undo()
    project.make(tmp_path / "new", "digits")
