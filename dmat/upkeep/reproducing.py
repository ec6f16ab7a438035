"""Prepares the reproduction of a run: its commit, uncommitted changes, parameters and data in a separate work tree.

The work tree shares the git objects and DVC's cache of the project, so nothing is copied that exists already. The
project itself does not change, except for git's list of work trees. A work tree of dmat's own repository computes with
its own code. Others compute with the installed dmat; if its version differs from that of the run, this is reported.
"""

import dataclasses
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from dmat import SOURCES, config, files
from dmat.errors import DmatError
from dmat.pipeline.stages import STAGES, Stage
from dmat.tracking import origin, queries, run_record, stores
from dmat.tracking.queries import TrackedRun
from dmat.workspace import Instance, Workspace


@dataclasses.dataclass(frozen=True)
class Reproduction:
    """A prepared work tree.

    tree: folder of the project in the work tree. lines: what was done, and the commands to run. differences: what
    differs from the run, one sentence each. whole: commit, changes, code, parameters and all data are those of the run;
    only the machine may differ.
    """

    tree: Path
    command: str
    lines: tuple[str, ...]
    differences: tuple[str, ...]
    whole: bool


def reproduce(workspace: Workspace, reference: str, target: Path | None = None) -> Reproduction:
    """Creates the work tree of a run. reference: see `queries.find_run`. target: its folder, by default beside the
    project.

    Raises DmatError if the run is not of a stage, if its commit is unknown or not in this repository, or if `target`
    exists.
    """
    run = queries.find_run(workspace.home, reference)
    stage = STAGES.get(run.stage)
    if stage is None:
        raise DmatError(
            f"run {queries.short_id(run.id)} is of {run.stage or 'nothing that dmat knows'!r}; expected one of a "
            f"stage; `dmat runs list --stage train_robust` shows some"
        )
    worktree = _add_worktree(workspace, run, target)
    tree = worktree / origin.below_top(workspace.root)
    try:
        patched = _apply_changes(workspace, run, worktree)
        instance, differences = _compare_parameters(tree, stage, run)
    except BaseException:
        _git(workspace.root, "worktree", "remove", "--force", str(worktree))
        raise
    differences += _code_differences(tree, run)
    _link_sources(workspace, tree)
    missing = list(_restore_data(workspace, tree, run, instance))
    # In a checkout the code of the commit, else the installed dmat.
    path_option = [] if (tree / "dmat").is_dir() else ["-P"]
    arguments = [sys.executable, *path_option, "-m", "cli.main", stage.command, *stage.options(instance)]
    command = f"cd {shlex.quote(str(tree))} && {shlex.join(arguments)}"
    lines = [
        f"{run.stage} {run.instance_name}, run {queries.short_id(run.id)}, at commit {run.tags['git.commit'][:10]} in "
        f"{worktree}",
        _changes_sentence(run, patched),
        *([] if differences else ["params.yaml there gives the parameters of the run"]),
        *([] if missing else ["all data are those that the run read"]),
        f"run it again: {command}",
        f"compare its output with: cd {shlex.quote(str(workspace.root))} && dmat runs show {queries.short_id(run.id)}",
        f"remove the work tree: git -C {shlex.quote(str(workspace.root))} worktree remove --force "
        f"{shlex.quote(str(worktree))}",
    ]
    if run.tags.get("git.dirty") == "True" and not patched:
        differences.append("the run had uncommitted changes that were not saved")
    machine_differences = list(_machine_differences(run))
    return Reproduction(
        tree,
        command,
        tuple(lines),
        (*differences, *missing, *machine_differences),
        whole=not differences and not missing,
    )


def _changes_sentence(run: TrackedRun, patched: bool) -> str:
    if not patched:
        return "it had no uncommitted changes"
    if run.tags.get("git.dirty") == "True":
        return "its uncommitted changes were applied"
    return "its dvc.lock was restored; it had no other uncommitted changes"


def _add_worktree(workspace: Workspace, run: TrackedRun, target: Path | None) -> Path:
    commit = run.tags.get("git.commit")
    if not commit:
        raise DmatError(
            f"run {queries.short_id(run.id)} was made outside a git repository; expected a commit; its parameters are "
            f"in `dmat runs show {queries.short_id(run.id)}`"
        )
    worktree = (
        target
        or workspace.root.parent / f"{workspace.root.name}-{run.stage}-{run.instance_name}-{queries.short_id(run.id)}"
    ).resolve()
    if worktree.exists():
        raise DmatError(f"{worktree} exists; expected a new folder; name one with --to")
    has_commit = ["git", "cat-file", "-e", f"{commit}^{{commit}}"]
    if subprocess.run(has_commit, cwd=workspace.root, capture_output=True, check=False).returncode:
        raise DmatError(
            f"commit {commit[:10]} is not in this repository; expected the one that the run was made at; fetch it "
            f"(`git fetch --all`) and run the same command again"
        )
    _git(workspace.root, "worktree", "add", "--detach", str(worktree), commit)
    return worktree


def _apply_changes(workspace: Workspace, run: TrackedRun, worktree: Path) -> bool:
    """Applies the uncommitted changes of a run to its work tree. Returns whether the run has any."""
    client, _ = stores.connect_or_raise(workspace.home)
    if origin.PATCH not in [artifact.path for artifact in client.list_artifacts(run.id)]:
        return False
    with tempfile.TemporaryDirectory() as folder:
        apply_patch(worktree, Path(client.download_artifacts(run.id, origin.PATCH, folder)))
    return True


def apply_patch(worktree: Path, patch: Path) -> None:
    """Applies a git.patch to a work tree, whatever git's configuration of white space. Raises DmatError if it fails."""
    _git(worktree, "apply", "--whitespace=nowarn", "--no-ignore-whitespace", str(patch.resolve()))


def _compare_parameters(tree: Path, stage: Stage, run: TrackedRun) -> tuple[Instance, list[str]]:
    """Keys of the instance, and a sentence for each value of params.yaml in the tree that differs from the run's."""
    params = config.load(tree / "params.yaml")
    instance = next(
        (candidate for candidate in stage.all_instances(params) if stage.instance_name(candidate) == run.instance_name),
        None,
    )
    if instance is None:
        instance_names = ", ".join(stage.instance_name(candidate) for candidate in stage.all_instances(params))
        raise DmatError(
            f"params.yaml at that commit has no {stage.name} {run.instance_name}; expected one of {instance_names}; "
            f"the run used another parameter file, see `dmat runs show {queries.short_id(run.id)}`"
        )
    own = run_record.parameters(stage.settings(params, **instance).plain())
    current = run_record.parameters(stage.context(params, instance)) | own
    differences = [
        f"{name} is {current.get(name, 'not there')} in params.yaml and was {run.params.get(name, 'not there')}"
        for name in sorted(own.keys() | run.params.keys())  # earlier versions of dmat recorded nothing else
        if current.get(name) != run.params.get(name)
    ]
    return instance, differences


def _restore_data(workspace: Workspace, tree: Path, run: TrackedRun, instance: Instance) -> Iterator[str]:
    """Restores the inputs of the run and all that they come from into the tree, from DVC's cache.

    All ancestors are needed: a training reads images that its mix names. Yields a sentence for each input that differs
    from what the run read.
    """
    stage = STAGES[run.stage]
    params = config.load(tree / "params.yaml")
    cache = _dvc_cache(workspace)
    if cache is not None:
        _dvc(tree, "config", "--local", "cache.dir", str(cache))
        target = f"{stage.name}@{run.instance_name}" if stage.keys else stage.name
        _dvc(tree, "checkout", "--force", "--with-deps", target)
        # The run will write them.
        for path in (*stage.outputs(params, **instance).values(), stage.metrics_path(instance)):
            _remove(tree / path)
    for name, path in stage.inputs(params, **instance).items():
        recorded = run.tags.get(f"input.{name}")
        sha256 = files.checksum(tree / path) if (tree / path).exists() else None
        if sha256 is None:
            yield f"{path} is not in DVC's cache; `dvc pull` downloads it, or `dvc repro` in {tree} recomputes it"
        elif recorded is not None and sha256 != recorded:
            yield f"{path} has checksum {sha256[:12]}; the run read {recorded[:12]}"


def _link_sources(workspace: Workspace, tree: Path) -> None:
    """Links the users' own files, which are in no commit, from the project into the tree."""
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


def _dvc_cache(workspace: Workspace) -> Path | None:
    """Folder of DVC's cache by the configuration of the project; None without DVC."""
    command = [sys.executable, "-m", "dvc", "cache", "dir"]
    result = subprocess.run(command, cwd=workspace.home, capture_output=True, text=True, check=False)
    return Path(result.stdout.strip()) if result.returncode == 0 else None


def _code_differences(tree: Path, run: TrackedRun) -> list[str]:
    """A sentence if the installed dmat, with which the tree computes, differs from that of the run."""
    current, recorded = origin.code(), run.tags.get("software.dmat")
    if origin.holds_code(tree) or recorded in (None, current):
        return []
    return [f"dmat is {current} here and was {recorded}"]


def _machine_differences(run: TrackedRun) -> Iterator[str]:
    for name, current in origin.software().items():
        recorded = run.tags.get(f"software.{name}") if name != "dmat" else None
        if recorded is not None and recorded != current:
            yield f"{name} is {current} here and was {recorded}"
    recorded = run.tags.get("compute.device")
    if recorded is not None:
        from dmat import devices

        current = devices.resolve(threads=int(run.tags.get("compute.threads", 0))).describe()["device"]
        if current != recorded:
            yield f"the device is {current} here and was {recorded}"


def _git(folder: Path, *arguments: str) -> None:
    result = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=False)
    if result.returncode:
        messages = result.stderr.strip().splitlines() or [f"exit code {result.returncode}"]
        raise DmatError(
            f"`git {' '.join(arguments)}` failed in {folder} ({messages[0]}); expected it to succeed; see `git status`"
        )


def _dvc(folder: Path, *arguments: str) -> None:
    """Runs a DVC command. Its exit code is ignored: the caller checks the files afterwards."""
    environment = os.environ | {"DVC_NO_ANALYTICS": "1"}
    subprocess.run(
        [sys.executable, "-m", "dvc", *arguments], cwd=folder, capture_output=True, env=environment, check=False
    )
