"""A run again: its commit, its uncommitted changes, its parameters and its data in a work tree of its own.

The tree shares the project's git objects and DVC's cache, so nothing is copied that is there already. Nothing in the
project changes but git's list of work trees. A tree of dmat's own repository computes with its own code; any other with
the dmat that is installed, so a version other than the run's is told.
"""

import dataclasses
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dmat import SOURCES, config, files
from dmat.errors import DmatError
from dmat.pipeline.stages import STAGES, Stage
from dmat.tracking import origin, queries, run_record, stores
from dmat.tracking.queries import TrackedRun
from dmat.workspace import Workspace


@dataclasses.dataclass(frozen=True)
class Reproduction:
    """tree: the project's folder in the work tree. lines: what was done, with the command last. differences: what is
    not as it was, a sentence each. whole: the commit, the changes, the code, the parameters and all data are those of
    the run; only the machine may differ."""

    tree: Path
    command: str
    lines: tuple[str, ...]
    differences: tuple[str, ...]
    whole: bool


def reproduce(workspace: Workspace, wanted: str, to: Path | None = None) -> Reproduction:
    """Makes the tree. wanted: as `queries.one` takes it.

    Raises DmatError if the run is of no stage, has no commit or one that is not here, or `to` exists.
    """
    run = queries.one(workspace.home, wanted)
    stage = STAGES.get(run.stage)
    if stage is None:
        raise DmatError(
            f"run {queries.short(run.id)} is of {run.stage or 'nothing that dmat knows'!r}; expected one of a stage; "
            f"`dmat runs list --stage train_robust` shows some"
        )
    top = _tree(workspace, run, to)
    tree = top / origin.below_top(workspace.root)
    try:
        patched = _apply_changes(workspace, run, top)
        instance, unlike = _parameters(tree, stage, run)
    except BaseException:
        _git(workspace.root, "worktree", "remove", "--force", str(top))
        raise
    unlike += _other_code(tree, run)
    _link_sources(workspace, tree)
    lacking = list(_data(workspace, tree, run, instance))
    own = [] if (tree / "dmat").is_dir() else ["-P"]  # the code of the commit; in other projects that of this dmat
    words = [sys.executable, *own, "-m", "cli.main", stage.command, *stage.options(instance)]
    command = f"cd {shlex.quote(str(tree))} && {shlex.join(words)}"
    lines = [
        f"{run.stage} {run.instance_name}, run {queries.short(run.id)}, at commit {run.tags['git.commit'][:10]} in {top}",
        _about_changes(run, patched),
        *([] if unlike else ["params.yaml there gives the parameters of the run"]),
        *([] if lacking else ["all data are those that the run read"]),
        f"run it again: {command}",
        f"compare what it prints with: cd {shlex.quote(str(workspace.root))} && dmat runs show {queries.short(run.id)}",
        f"take the tree away: git -C {shlex.quote(str(workspace.root))} worktree remove --force {shlex.quote(str(top))}",
    ]
    if run.tags.get("git.dirty") == "True" and not patched:
        unlike.append("the run had uncommitted changes that were not kept")
    machine = list(_machine(run))
    return Reproduction(tree, command, tuple(lines), (*unlike, *lacking, *machine), whole=not unlike and not lacking)


def _about_changes(run: TrackedRun, patched: bool) -> str:
    if not patched:
        return "it had no uncommitted changes"
    if run.tags.get("git.dirty") == "True":
        return "its uncommitted changes were applied"
    return "its dvc.lock was taken over; it had no other uncommitted changes"


def _tree(workspace: Workspace, run: TrackedRun, to: Path | None) -> Path:
    commit = run.tags.get("git.commit")
    if not commit:
        raise DmatError(
            f"run {queries.short(run.id)} was made outside a git repository; expected a commit; its parameters are in "
            f"`dmat runs show {queries.short(run.id)}`"
        )
    tree = (
        to or workspace.root.parent / f"{workspace.root.name}-{run.stage}-{run.instance_name}-{queries.short(run.id)}"
    ).resolve()
    if tree.exists():
        raise DmatError(f"{tree} exists; expected a new folder; name one with --to")
    look = ["git", "cat-file", "-e", f"{commit}^{{commit}}"]
    if subprocess.run(look, cwd=workspace.root, capture_output=True, check=False).returncode:
        raise DmatError(
            f"commit {commit[:10]} is not in this repository; expected the one that the run was made at; fetch it "
            f"(`git fetch --all`) and run the same command again"
        )
    _git(workspace.root, "worktree", "add", "--detach", str(tree), commit)
    return tree


def _apply_changes(workspace: Workspace, run: TrackedRun, tree: Path) -> bool:
    """Whether there were some."""
    client, _ = stores.reach(workspace.home)
    if origin.PATCH not in [one.path for one in client.list_artifacts(run.id)]:
        return False
    with tempfile.TemporaryDirectory() as folder:
        apply_patch(tree, Path(client.download_artifacts(run.id, origin.PATCH, folder)))
    return True


def apply_patch(tree: Path, patch: Path) -> None:
    """Applies a git.patch to a work tree, whatever git's configuration says of spaces. Raises DmatError."""
    _git(tree, "apply", "--whitespace=nowarn", "--no-ignore-whitespace", str(patch.resolve()))


def _parameters(tree: Path, stage: Stage, run: TrackedRun) -> tuple[Mapping[str, Any], list[str]]:
    """The options of the instance, and where params.yaml of the tree gives other values than the run had."""
    params = config.load(tree / "params.yaml")
    instance = next((one for one in stage.choices(params) if stage.instance_name(one) == run.instance_name), None)
    if instance is None:
        known = ", ".join(stage.instance_name(one) for one in stage.choices(params))
        raise DmatError(
            f"params.yaml at that commit has no {stage.name} {run.instance_name}; expected one of {known}; the run was made "
            f"with another parameter file, see `dmat runs show {queries.short(run.id)}`"
        )
    now = run_record.parameters(stage.settings(params, **instance).plain())
    differing = [
        f"{name} is {now.get(name, 'not there')} in params.yaml and was {run.params.get(name, 'not there')}"
        for name in sorted(now.keys() | run.params.keys())
        if now.get(name) != run.params.get(name)
    ]
    return instance, differing


def _data(workspace: Workspace, tree: Path, run: TrackedRun, instance: Mapping[str, Any]) -> Iterator[str]:
    """Brings all that the run's inputs come from into the tree, from DVC's cache: a training reads images that its mix
    names. Yields a sentence for each input that is not what the run read."""
    stage = STAGES[run.stage]
    params = config.load(tree / "params.yaml")
    cache = _cache(workspace)
    if cache is not None:
        _dvc(tree, "config", "--local", "cache.dir", str(cache))
        target = f"{stage.name}@{run.instance_name}" if stage.keys else stage.name
        _dvc(tree, "checkout", "--force", "--with-deps", target)
        for path in (*stage.outputs(params, **instance).values(), stage.metrics_path(instance)):  # they are to be made
            _remove(tree / path)
    for name, path in stage.inputs(params, **instance).items():
        recorded = run.tags.get(f"input.{name}")
        found = files.checksum(tree / path) if (tree / path).exists() else None
        if found is None:
            yield f"{path} is not in DVC's cache; `dvc pull` brings it, or `dvc repro` in {tree} makes it again"
        elif recorded is not None and found != recorded:
            yield f"{path} has checksum {found[:12]}; the run read {recorded[:12]}"


def _link_sources(workspace: Workspace, tree: Path) -> None:
    """People's own files are in no commit: the tree reads those of the project."""
    for path in (workspace.root / SOURCES).glob("*"):
        link = tree / SOURCES / path.name
        if not os.path.lexists(link):
            link.parent.mkdir(exist_ok=True)
            link.symlink_to(path)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _cache(workspace: Workspace) -> Path | None:
    """Where the project's DVC keeps files, by its own configuration; None without DVC."""
    words = [sys.executable, "-m", "dvc", "cache", "dir"]
    answer = subprocess.run(words, cwd=workspace.home, capture_output=True, text=True, check=False)
    return Path(answer.stdout.strip()) if answer.returncode == 0 else None


def _other_code(tree: Path, run: TrackedRun) -> list[str]:
    """What differs in the code that the tree is computed with, where it is not the tree's own."""
    now, was = origin.code(), run.tags.get("software.dmat")
    if origin.holds_code(tree) or was in (None, now):
        return []
    return [f"dmat is {now} here and was {was}"]


def _machine(run: TrackedRun) -> Iterator[str]:
    for name, now in origin.software().items():
        was = run.tags.get(f"software.{name}") if name != "dmat" else None
        if was is not None and was != now:
            yield f"{name} is {now} here and was {was}"
    was = run.tags.get("compute.device")
    if was is not None:
        from dmat import devices

        now = devices.resolve(threads=int(run.tags.get("compute.threads", 0))).describe()["device"]
        if now != was:
            yield f"the device is {now} here and was {was}"


def _git(folder: Path, *words: str) -> None:
    answer = subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=False)
    if answer.returncode:
        said = answer.stderr.strip().splitlines() or [f"exit code {answer.returncode}"]
        raise DmatError(
            f"`git {' '.join(words)}` failed in {folder} ({said[0]}); expected it to work; see `git status`"
        )


def _dvc(folder: Path, *words: str) -> None:
    """DVC's own exit code is not looked at: what counts is what lies there afterwards."""
    environment = os.environ | {"DVC_NO_ANALYTICS": "1"}
    subprocess.run([sys.executable, "-m", "dvc", *words], cwd=folder, capture_output=True, env=environment, check=False)
