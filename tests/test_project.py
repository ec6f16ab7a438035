"""`dmat init`: what it creates, what it refuses, and that a refusal leaves nothing behind."""

import os
import subprocess
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cli.main import app
from dmat import config, files, project, recipes
from dmat.errors import DmatError

CREATED = {
    *("params.yaml", "dvc.yaml", ".dvc/config", ".dvc/.gitignore", ".dvc/plots/runs.json", ".dvcignore", ".gitignore"),
    *("README.md", "code.yaml", "sources/none", "plugins/README.md", ".pre-commit-config.yaml"),
}


def _git(folder: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=t", "-c", "user.email=t@example.org")
    return subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True, text=True).stdout


def _files(folder: Path) -> set[str]:
    paths = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())
    return {path for path in paths if not path.startswith(".git/")}


def test_init_creates_a_project_and_prints_the_next_steps(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["init", "my digits", "--recipe", "digits-3-seeds"])
    assert result.exit_code == 0, result.output
    folder = tmp_path / "my digits"
    first, second, third = result.stdout.splitlines()
    assert first.endswith("cd 'my digits' && git add --all . && git commit --message 'The recipe digits-3-seeds'")
    assert second.endswith("dvc repro")
    assert str(folder / "README.md") in third
    assert _files(folder) == CREATED
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
    assert set(_git(folder, "ls-files").splitlines()) == CREATED


def test_the_files_are_those_of_the_repository(tmp_path, root):
    """Each file exists once: the package holds links."""
    folder = project.make(tmp_path / "new", "digits")
    for path in CREATED - {"params.yaml", "README.md"}:
        assert (folder / path).read_bytes() == (root / path).read_bytes(), path
    links = [path for path in (root / "dmat/project").iterdir() if path.suffix != ".py" and path.is_file()]
    assert {path.resolve().relative_to(root).as_posix() for path in links if path.is_symlink()} == CREATED - {
        "params.yaml",
        "README.md",
    }
    assert [path.name for path in links if not path.is_symlink()] == ["README.md"]


def test_a_folder_with_other_files_becomes_a_project(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "sources").mkdir()
    (tmp_path / "sources/mine.npz").touch()
    project.make(tmp_path, "digits")
    assert _files(tmp_path) == {*CREATED, "notes.txt", "sources/mine.npz"}


def test_a_folder_inside_a_repository_gets_no_repository_of_its_own(tmp_path):
    """git reads hooks only in its top folder, so a folder below gets no hook file."""
    _git(tmp_path, "init", "-q")
    folder = project.make(tmp_path / "a/b", "digits")
    assert not (folder / ".git").exists()
    assert _files(folder) == CREATED - {".pre-commit-config.yaml"}
    top = tmp_path / "top"
    top.mkdir()
    _git(top, "init", "-q")
    assert _files(project.make(top, "digits")) == CREATED


@pytest.mark.parametrize(
    ("existing", "message"),
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
def test_files_in_the_way_are_named_and_nothing_is_written(tmp_path, existing, message):
    folder = tmp_path / "new"
    for path in existing:
        target = Path(os.path.normpath(folder / path))
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text("mine", encoding="utf-8")
    before = _files(tmp_path)
    with pytest.raises(DmatError) as error:
        project.make(folder, "digits")
    assert str(error.value).startswith(message.format(folder=folder))
    assert "nothing was written" in str(error.value)
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


def test_an_existing_project_is_refused(tmp_path):
    folder = project.make(tmp_path / "new", "digits")
    (folder / "params.yaml").write_text("mine")
    result = CliRunner().invoke(app, ["init", str(folder)])
    assert isinstance(result.exception, DmatError)
    assert str(result.exception).startswith(f"{folder} is a project already: it has params.yaml, dvc.yaml, .dvc/config")
    assert "use it as it is, or name another folder" in str(result.exception)
    assert (folder / "params.yaml").read_text() == "mine"


def test_an_unknown_recipe_and_a_missing_git_leave_nothing(tmp_path, monkeypatch):
    for name in ("wang", "../project/pipeline"):
        with pytest.raises(DmatError, match=r"recipe is .*; expected one of .*digits-3-seeds"):
            project.make(tmp_path / "new", name)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(DmatError, match=r"git is not on PATH; expected it, as a project is a git repository; install"):
        project.make(tmp_path / "new", "digits")
    assert list(tmp_path.iterdir()) == []


def test_a_failed_init_removes_what_it_wrote(tmp_path, monkeypatch):
    """The same command must not be refused the second time because of leftovers."""
    write = files.write_text

    def full_disk(path: Path, text: str) -> None:
        if path.name == "README.md":
            raise DmatError("no space left")
        write(path, text)

    monkeypatch.setattr(files, "write_text", full_disk)
    (tmp_path / "there/.dvc").mkdir(parents=True)
    (tmp_path / "there/.dvc/tmp").touch()
    for name in ("new", "there"):
        with pytest.raises(DmatError, match="no space left"):
            project.make(tmp_path / name, "digits")
    assert _files(tmp_path) == {"there/.dvc/tmp"}
    assert not (tmp_path / "new").exists()
    monkeypatch.undo()
    project.make(tmp_path / "new", "digits")
