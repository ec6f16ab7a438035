"""What a run came from besides its data: the commit, what differed from it, and the software that computed.

The commit is of the project. Where the project holds no code, as most do not, `code` says which dmat computed.
"""

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import dmat
from dmat import files

PATCH = "git.patch"
# DVC rewrites it after every stage: a patch needs it, but it makes no tree dirty. It lies in git's top folder or in the
# project below it.
_LOCK = "dvc.lock"
_LARGEST = 10_000_000  # bytes of a patch
# A patch must apply whatever a person's configuration of git and environment say of how differences are shown.
_PLAIN = (
    *("-c", "core.quotePath=true", "-c", "diff.suppressBlankEmpty=false", "diff", "--binary", "--full-index"),
    *("--no-ext-diff", "--no-textconv", "--no-color", "--src-prefix=a/", "--dst-prefix=b/", "--no-relative"),
    *("--unified=3", "--inter-hunk-context=0", f"-O{os.devnull}", "--find-renames", "--ignore-submodules=dirty"),
    "--submodule=short",
)
_VARIABLES = (  # of the environment; they outrank options or take `:/` for a file's name
    *("GIT_DIFF_OPTS", "GIT_EXTERNAL_DIFF"),
    *("GIT_LITERAL_PATHSPECS", "GIT_GLOB_PATHSPECS", "GIT_NOGLOB_PATHSPECS", "GIT_ICASE_PATHSPECS"),
)
_PACKAGES = ("numpy", "pyautoattack", "scikit-learn", "torch", "torchvision")


def git(folder: Path) -> dict[str, Any]:
    """git_commit and git_dirty: whether tracked files differ from it. Empty outside a repository."""
    try:
        head = _ask(folder, "rev-parse", "HEAD").decode().strip()
        locks = [f":(top,exclude){_LOCK}", f":(exclude){_LOCK}"]
        changed = _ask(folder, "status", "--porcelain", "--untracked-files=no", "--", ":/", *locks)
    except (OSError, subprocess.CalledProcessError):
        return {}
    return {"git_commit": head, "git_dirty": bool(changed.strip())}


def write_patch(folder: Path, to: Path) -> None:
    """What tracked files differ by from their commit, as `to`/git.patch, for `git apply`. With dvc.lock, which says
    what data there was, also if it is new. No file if nothing differs, or so much that it is no patch any more."""
    try:
        patch = _ask(folder, *_PLAIN, "HEAD", "--", ":/")
        new = _ask(folder, "ls-files", "--others", "--full-name", "-z", "--", f":(top){_LOCK}", _LOCK)
        for name in filter(None, os.fsdecode(new).split("\0")):
            top = Path(os.fsdecode(_ask(folder, "rev-parse", "--show-toplevel").removesuffix(b"\n")))
            patch += _ask(top, *_PLAIN, "--no-index", "--", os.devnull, name, differs=True)
    except (OSError, subprocess.CalledProcessError):
        patch = b""
    if patch and len(patch) <= _LARGEST:
        with files.writing(to / PATCH) as file:
            file.write(patch)
    else:
        (to / PATCH).unlink(missing_ok=True)


def below_top(folder: Path) -> str:
    """Path of a folder below the top folder of its git repository, with a slash at its end; "" of the top itself."""
    return os.fsdecode(_ask(folder, "rev-parse", "--show-prefix").removesuffix(b"\n"))


def holds_code(project: Path) -> bool:
    """Whether a folder is a checkout of dmat: what is computed in it is then computed by its own modules."""
    return (project / "dmat" / "__init__.py").is_file()


def code(package: Path = Path(dmat.__file__).parent) -> str:
    """Version of the dmat that computes; with its commit where it runs from a checkout, and `.changed` where its files
    differ from that."""
    try:
        _ask(package, "ls-files", "--error-unmatch", "--", "__init__.py")  # else an environment below a repository
        commit = _ask(package, "rev-parse", "--short=12", "HEAD").decode().strip()
        changed = _ask(package, "status", "--porcelain", "--untracked-files=no", "--", ".")
    except (OSError, subprocess.CalledProcessError):
        return dmat.__version__
    return f"{dmat.__version__}+g{commit}{'.changed' if changed else ''}"


def software() -> dict[str, str]:
    """Versions of Python and of the packages that decide numbers."""
    found = {"python": platform.python_version(), "dmat": code()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # code of a path, without the record of an installation
            continue
    return found


def _ask(folder: Path, *words: str, differs: bool = False) -> bytes:
    """What git answers, byte for byte: a patch of a file with CRLF or in another encoding must stay as it is.

    differs: 1 is no failure but says that files differ.
    """
    where = next(path for path in (folder, *folder.parents) if path.is_dir())
    environment = {name: value for name, value in os.environ.items() if name not in _VARIABLES}
    answer = subprocess.run(["git", *words], cwd=where, env=environment, capture_output=True, check=False)
    if answer.returncode not in ((0, 1) if differs else (0,)):
        raise subprocess.CalledProcessError(answer.returncode, words)
    return answer.stdout
