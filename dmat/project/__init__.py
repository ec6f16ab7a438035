"""A project of one's own: the files that make a folder one.

The links beside this file lead to the files of dmat's repository, which is a project itself. So each exists once, and a
checkout, an editable installation and a wheel, which holds what the links lead to, all read the same. None is called
`.gitignore` or `dvc.yaml`, because git and DVC would obey it here.
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
_COPIED = {  # path in the project -> file beside this one
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

    A folder outside git becomes a repository. Raises DmatError, and then leaves nothing behind, for an unknown recipe,
    files that are there already and a missing git.
    """
    folder = folder.resolve()
    params = recipes.read(recipe)
    if shutil.which("git") is None:
        raise DmatError("git is not on PATH; expected it, as a project is a git repository; install it")
    top = _repository(folder)
    texts = {
        "params.yaml": params,
        **{path: (_HERE / name).read_text() for path, name in _COPIED.items()},
        "README.md": _readme(folder.name, recipe),
    }
    if top in (None, folder):
        texts[_HOOKS] = (_HERE / "pre-commit.yaml").read_text()
    _expect_free(folder, [*texts])
    try:
        for path, text in texts.items():
            files.write_text(folder / path, text)
        if top is None and (failed := _git(folder, "init", "--quiet")).returncode:
            said = (failed.stderr.strip().splitlines() or [f"exit code {failed.returncode}"])[0]
            raise DmatError(f"`git init` failed in {folder} ({said}); expected a repository; nothing was written")
    except BaseException:
        _remove(folder, [*texts])
        raise
    return folder


def _readme(name: str, recipe: str) -> str:
    text = (_HERE / "README.md").read_text()
    values: Mapping[str, str] = {"name": name, "recipe": recipe, "summary": recipes.summaries()[recipe]}
    return re.sub(r"\{(name|recipe|summary)\}", lambda found: values[found[1]], text)


def _expect_free(folder: Path, paths: list[str]) -> None:
    """Raises DmatError with all that is in the way: a file of the project, or no folder where it needs one."""
    for above in (folder, *folder.parents):
        if os.path.lexists(above) and not above.is_dir():
            raise DmatError(f"{above} is not a folder; expected one, or nothing; name another; nothing was written")
    inner = {str(above) for path in paths for above in Path(path).parents} - {"."}
    taken = [path for path in paths if os.path.lexists(folder / path)]
    taken += sorted(path for path in inner if (folder / path).is_symlink() or (folder / path).is_file())
    if {"params.yaml", "dvc.yaml", ".dvc/config"} <= {*taken}:
        found, advice = f"{folder} is a project already: it has", "use it as it is"
    else:
        found, advice = f"{folder} has", "move them away"
    if taken:
        raise DmatError(
            f"{found} {', '.join(taken)}; expected a folder without these; {advice}, or name another folder; nothing "
            f"was written"
        )


def _repository(folder: Path) -> Path | None:
    """The top folder of the git repository that a folder, which may be still to be made, lies in."""
    there = next(above for above in (folder, *folder.parents) if above.is_dir())
    answer = _git(there, "rev-parse", "--show-toplevel")
    return Path(answer.stdout.removesuffix("\n")) if answer.returncode == 0 else None


def _git(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=False)


def _remove(folder: Path, paths: list[str]) -> None:
    """Takes away what a failed attempt has written."""
    for path in paths:
        (folder / path).unlink(missing_ok=True)
    for path in (".dvc/plots", ".dvc", "sources", "plugins", "."):
        with contextlib.suppress(OSError):  # it is not there, or it is not empty: then it was there before
            (folder / path).rmdir()
