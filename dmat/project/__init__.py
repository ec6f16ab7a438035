"""Makes a project: the files that a folder needs to be one.

The links beside this file lead to files of dmat's repository, which is a project itself. So each file exists once. A
checkout, an editable installation and a wheel, which holds copies of the linked files, all read the same content. No
link is called `.gitignore` or `dvc.yaml`, because git and DVC would apply it here.
"""

import contextlib
import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

from dmat import files, recipes
from dmat.errors import DmatError

_HERE = Path(__file__).parent
_COPIED_FILES = {  # path in the project -> file beside this one
    "dvc.yaml": "pipeline.yaml",
    ".dvc/config": "dvc-config",
    ".dvc/.gitignore": "dvc-gitignore",
    ".dvc/plots/runs.json": "runs.json",
    ".dvcignore": "dvcignore",
    ".gitignore": "gitignore",
    "code.yaml": "code.yaml",
    "sources/none": "no-source",
    "plugins/README.md": "plugins.md",
}
_HOOKS = ".pre-commit-config.yaml"  # pre-commit looks for it in git's top folder alone


def make(folder: Path, recipe: str) -> Path:
    """Makes a project in a new folder, or in one that has none of its files; returns its full path. Commits nothing.

    recipe: name of a recipe, which becomes params.yaml. A folder outside git becomes a git repository.
    Raises DmatError for an unknown recipe, for files that already exist and if git is missing; then nothing is left
    behind.
    """
    folder = folder.resolve()
    params = recipes.read(recipe)
    if shutil.which("git") is None:
        raise DmatError("git is not on PATH; expected it, as a project is a git repository; install it")
    top = _repository_top(folder)
    texts = {
        "params.yaml": params,
        **{path: (_HERE / name).read_text(encoding="utf-8") for path, name in _COPIED_FILES.items()},
        "README.md": _readme(folder.name, recipe),
    }
    if top in (None, folder):
        texts[_HOOKS] = (_HERE / "pre-commit.yaml").read_text(encoding="utf-8")
    _expect_no_conflicts(folder, [*texts])
    try:
        for path, text in texts.items():
            files.write_text(folder / path, text)
        if top is None and (init := _git(folder, "init", "--quiet")).returncode:
            reason = (init.stderr.strip().splitlines() or [f"exit code {init.returncode}"])[0]
            raise DmatError(f"`git init` failed in {folder} ({reason}); expected a repository; nothing was written")
    except BaseException:
        _remove(folder, [*texts])
        raise
    return folder


def _readme(name: str, recipe: str) -> str:
    """README.md of a project with this name."""
    text = (_HERE / "README.md").read_text(encoding="utf-8")
    values: Mapping[str, str] = {"name": name, "recipe": recipe, "summary": recipes.summaries()[recipe]}
    return re.sub(r"\{(name|recipe|summary)\}", lambda match: values[match[1]], text)


def _expect_no_conflicts(folder: Path, paths: list[str]) -> None:
    """Raises DmatError that lists all conflicts: files of a project that exist, and files where it needs a folder."""
    for ancestor in (folder, *folder.parents):
        if os.path.lexists(ancestor) and not ancestor.is_dir():
            raise DmatError(f"{ancestor} is not a folder; expected one, or nothing; name another; nothing was written")
    parent_paths = {str(ancestor) for path in paths for ancestor in Path(path).parents} - {"."}
    conflicts = [path for path in paths if os.path.lexists(folder / path)]
    conflicts += sorted(path for path in parent_paths if (folder / path).is_symlink() or (folder / path).is_file())
    if {"params.yaml", "dvc.yaml", ".dvc/config"} <= {*conflicts}:
        finding, advice = f"{folder} is a project already: it has", "use it as it is"
    else:
        finding, advice = f"{folder} has", "move them away"
    if conflicts:
        raise DmatError(
            f"{finding} {', '.join(conflicts)}; expected a folder without these; {advice}, or name another folder; "
            f"nothing was written"
        )


def _repository_top(folder: Path) -> Path | None:
    """The top folder of the git repository that contains a folder, which need not exist yet; None outside git."""
    existing = next(ancestor for ancestor in (folder, *folder.parents) if ancestor.is_dir())
    completed = _git(existing, "rev-parse", "--show-toplevel")
    return Path(completed.stdout.removesuffix("\n")) if completed.returncode == 0 else None


def _git(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=False)


def _remove(folder: Path, paths: list[str]) -> None:
    """Removes what a failed attempt has written."""
    for path in paths:
        (folder / path).unlink(missing_ok=True)
    for path in (".dvc/plots", ".dvc", "sources", "plugins", "."):
        with contextlib.suppress(OSError):  # it does not exist, or it is not empty because it existed before
            (folder / path).rmdir()
