"""Origin of a run besides its data: the git commit, uncommitted changes, and versions of the software.

The commit is that of the project. Most projects hold no code; then `code` tells which dmat computed.
"""

import contextlib
import getpass
import os
import platform
import subprocess
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import dmat
from dmat import ARTIFACTS, files

PATCH = "git.patch"
# DVC rewrites them when it runs stages: a patch contains them, but their changes do not make a work tree dirty.
_DVC_LOCK = "dvc.lock"
_RESULTS = (_DVC_LOCK, ARTIFACTS)
_MAX_PATCH_BYTES = 10_000_000
# Arguments of git that fix the format: a patch must apply whatever a person configured for the display of differences.
_DIFF = (
    *("-c", "core.quotePath=true", "-c", "diff.suppressBlankEmpty=false", "diff", "--binary", "--full-index"),
    *("--no-ext-diff", "--no-textconv", "--no-color", "--src-prefix=a/", "--dst-prefix=b/", "--no-relative"),
    *("--unified=3", "--inter-hunk-context=0", f"-O{os.devnull}", "--find-renames", "--ignore-submodules=dirty"),
    "--submodule=short",
)
_IGNORED_VARIABLES = (  # of the environment; they override options, or make git read `:/` as a file name
    *("GIT_DIFF_OPTS", "GIT_EXTERNAL_DIFF"),
    *("GIT_LITERAL_PATHSPECS", "GIT_GLOB_PATHSPECS", "GIT_NOGLOB_PATHSPECS", "GIT_ICASE_PATHSPECS"),
)
_PACKAGES = ("numpy", "pyautoattack", "scikit-learn", "torch", "torchvision")


def git(folder: Path) -> dict[str, Any]:
    """git_commit, and git_dirty: whether tracked files of the project (but dvc.lock and artifacts/) differ from it.

    folder: the project; what others keep beside it in one repository does not count. Empty outside a repository.
    """
    try:
        head = _git(folder, "rev-parse", "HEAD").decode().strip()
        results = [f":(exclude){path}" for path in _RESULTS]
        changes = _git(folder, "status", "--porcelain", "--untracked-files=no", "--", ".", *results)
    except (OSError, subprocess.CalledProcessError):
        return {}
    return {"git_commit": head, "git_dirty": bool(changes.strip())}


def is_of_another_owner(folder: Path) -> bool:
    """Whether git refuses to read the repository because it belongs to another user, and nothing allows it."""
    try:
        _git(folder, "rev-parse", "HEAD")
    except subprocess.CalledProcessError as error:
        return b"safe.directory" in error.stderr
    except OSError:
        pass
    return False


def user_and_source(command: str, git_state: Mapping[str, Any]) -> dict[str, str]:
    """Tags of MLflow for the columns User, Source and Version. git_state: as `git` returns it."""
    tags = {"mlflow.source.name": command, "mlflow.source.type": "LOCAL"}
    with contextlib.suppress(OSError, KeyError):  # a container may run under a number without a name
        tags["mlflow.user"] = getpass.getuser()
    if "git_commit" in git_state:
        tags["mlflow.source.git.commit"] = git_state["git_commit"]
    return tags


def write_patch(folder: Path, target: Path) -> None:
    """Writes `target`/git.patch for `git apply`: the differences of tracked files below `folder` from their commit.

    The patch contains dvc.lock, also an untracked one, because it names the data. No file is left if nothing differs or
    if the patch is larger than 10 MB.
    """
    try:
        patch = _git(folder, *_DIFF, "HEAD", "--", ".")
        untracked = _git(folder, "ls-files", "--others", "--full-name", "-z", "--", _DVC_LOCK)
        for name in filter(None, os.fsdecode(untracked).split("\0")):
            top = Path(os.fsdecode(_git(folder, "rev-parse", "--show-toplevel").removesuffix(b"\n")))
            patch += _git(top, *_DIFF, "--no-index", "--", os.devnull, name, differs=True)
    except (OSError, subprocess.CalledProcessError):
        patch = b""
    if patch and len(patch) <= _MAX_PATCH_BYTES:
        with files.writing(target / PATCH) as file:
            file.write(patch)
    else:
        (target / PATCH).unlink(missing_ok=True)


def below_top(folder: Path) -> str:
    """Path of a folder relative to the top folder of its git repository, with a slash at its end; "" for the top."""
    return os.fsdecode(_git(folder, "rev-parse", "--show-prefix").removesuffix(b"\n"))


def holds_code(project: Path) -> bool:
    """Whether a folder is a checkout of dmat; computations in it use the modules of the checkout."""
    return (project / "dmat" / "__init__.py").is_file()


def code(package: Path = Path(dmat.__file__).parent) -> str:
    """Version of the running dmat. From a checkout it ends with the commit, as "+g<commit>", and with ".changed" if
    files differ from that commit."""
    try:
        # fails for an environment that is installed somewhere below another repository
        _git(package, "ls-files", "--error-unmatch", "--", "__init__.py")
        commit = _git(package, "rev-parse", "--short=12", "HEAD").decode().strip()
        changes = _git(package, "status", "--porcelain", "--untracked-files=no", "--", ".")
    except (OSError, subprocess.CalledProcessError):
        return dmat.__version__
    return f"{dmat.__version__}+g{commit}{'.changed' if changes else ''}"


def software() -> dict[str, str]:
    """Versions of Python, dmat and the installed packages that influence numerical results, by name."""
    versions = {"python": platform.python_version(), "dmat": code()}
    for name in _PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:  # imported from a path, without installation metadata
            continue
    return versions


def _git(folder: Path, *arguments: str, differs: bool = False) -> bytes:
    """Standard output of a git command as bytes: patches of files with CRLF or other encodings must not be changed.

    differs: exit code 1 is not a failure; it means that files differ. Raises CalledProcessError and OSError.
    """
    directory = next(path for path in (folder, *folder.parents) if path.is_dir())
    environment = {name: value for name, value in os.environ.items() if name not in _IGNORED_VARIABLES}
    environment["GIT_OPTIONAL_LOCKS"] = "0"  # otherwise `git status` writes its index
    result = subprocess.run(["git", *arguments], cwd=directory, env=environment, capture_output=True, check=False)
    if result.returncode not in ((0, 1) if differs else (0,)):
        raise subprocess.CalledProcessError(result.returncode, arguments, stderr=result.stderr)
    return result.stdout
