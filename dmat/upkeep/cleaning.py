"""Finds and removes files that a project does not need.

A finished result is removed only if DVC can restore it: dvc.lock or the run cache names it, and DVC's cache has every
file of it. Never touched: DVC's cache, `mlruns/`, folders that a process works in, and folders with foreign files.
"""

import dataclasses
import hashlib
import os
import re
import shutil
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import filelock
import psutil

from dmat import ARTIFACTS, files
from dmat.config import Params
from dmat.errors import DmatError
from dmat.pipeline import STAGES
from dmat.pipeline.stages import REPORT_INPUTS
from dmat.pipeline.work_folder import Finished
from dmat.tracking import open_runs
from dmat.upkeep import dvc_files, work_folders
from dmat.upkeep.dvc_files import DvcResult
from dmat.upkeep.work_folders import WorkFolder
from dmat.workspace import EXPERIMENT_COPIES, PICTURES, RESULT, Provenance, Workspace, provenance_path

KINDS = {
    "finished": "work folders of results that DVC has",
    "aside": "earlier work, set aside by --fresh or as damaged",
    "pool": "shards of image sets and scores of which no work folder stays",
    "unlisted": "artifacts of instances that params.yaml no longer names",
    "leftover": "temporary files of processes that are gone",
    "unfinished": "work that was stopped",
}
# `files` writes the first three endings, `_discard` the last one.
_TEMPORARY = re.compile(r"\.(?P<name>.+)\.(?P<pid>\d+)\.(?P<end>tmp|new|old|gone)")
_TEMPORARY_IN_ROOT = re.compile(r"\.(params.*\.yaml|doctor)\.\d+\.tmp")  # all else there is the user's


@dataclasses.dataclass(frozen=True)
class RemovalCandidate:
    """Paths that can be removed together."""

    paths: tuple[Path, ...]  # the first one is shown
    kind: str  # one of KINDS
    reason: str
    newest: float  # time of the last change inside, seconds since 1970
    lock: Path | None = None  # to hold during the removal


@dataclasses.dataclass(frozen=True)
class KeptPath:
    """A path that stays although a user might expect its removal."""

    path: Path
    reason: str


@dataclasses.dataclass(frozen=True)
class Survey:
    """What can be removed and what stays."""

    candidates: list[RemovalCandidate]
    kept: list[KeptPath]
    reruns_report: bool  # the removal changes a folder that write_report reads


def survey(workspace: Workspace, params: Params, *, unfinished: bool = False, older_than: float = 0.0) -> Survey:
    """Lists what can be removed; changes nothing.

    unfinished: include stopped work. older_than: only what has not changed for so many days. Raises DmatError in the
    copy of a project that DVC made for an experiment.
    """
    if EXPERIMENT_COPIES in workspace.root.as_posix():
        raise DmatError(f"{workspace.root} is a copy that DVC made for an experiment; clean in {workspace.home}")
    current = {
        (stage_name, stage.instance_name(instance))
        for stage_name, stage in STAGES.items()
        for instance in stage.all_instances(params)
    }
    results = dvc_files.results(workspace.root)
    activity = _current_activity(workspace)
    findings = [
        *_survey_work_folders(workspace, results, current, unfinished),
        *_unlisted(workspace, params, results, activity),
        *_leftovers(workspace, activity),
    ]
    candidates = [finding for finding in findings if isinstance(finding, RemovalCandidate)]
    kept_paths = [finding for finding in findings if isinstance(finding, KeptPath)]
    if older_than:
        limit = time.time() - older_than * 86400
        kept_paths += [
            KeptPath(candidate.paths[0], f"changed in the last {older_than:g} days")
            for candidate in candidates
            if candidate.newest > limit
        ]
        candidates = [candidate for candidate in candidates if candidate.newest <= limit]
    candidates += _pools(workspace, {candidate.paths[0] for candidate in candidates})
    paths_to_remove = {path for candidate in candidates for path in candidate.paths}
    candidates = [candidate for candidate in candidates if not paths_to_remove & set(candidate.paths[0].parents)]
    reported = {workspace.at(f"{ARTIFACTS}/{path}") for path in REPORT_INPUTS}
    return Survey(candidates, kept_paths, any(reported & set(path.parents) for path in paths_to_remove))


def freed(paths: Iterable[Path]) -> int:
    """Bytes that the removal of all these paths frees. A file counts if all its hard links are among them."""
    seen = Counter[tuple[int, int]]()
    links, sizes = {}, {}
    for path in paths:
        for file in _files(path):
            status = file.lstat()
            inode = (status.st_dev, status.st_ino)
            seen[inode] += 1
            links[inode], sizes[inode] = status.st_nlink, status.st_size
    return sum(sizes[inode] for inode, count in seen.items() if count == links[inode])


def size(paths: Iterable[Path]) -> int:
    """Bytes of all files below these paths, also of those with hard links elsewhere."""
    return sum(file.lstat().st_size for path in paths for file in _files(path))


def remove(candidates: list[RemovalCandidate]) -> tuple[int, list[KeptPath]]:
    """Removes the candidates one after the other. Returns the freed bytes, and the paths that could not be removed."""
    before = freed(path for candidate in candidates for path in candidate.paths)
    kept_paths = []
    for candidate in candidates:
        try:
            _remove(candidate)
        except (DmatError, OSError) as error:
            kept_paths.append(KeptPath(candidate.paths[0], str(error)))
    # What stayed keeps its hard links, so files linked to it were not freed.
    remaining = [
        path
        for candidate in candidates
        for name in candidate.paths
        for path in (name, _trash_path(name))
        if os.path.lexists(path)
    ]
    return before - freed(remaining), kept_paths


def _remove(candidate: RemovalCandidate) -> None:
    if candidate.lock is None:
        _discard(candidate)
        return
    lock = filelock.FileLock(candidate.lock, timeout=0)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise DmatError("a process began to work in it meanwhile") from None
    try:
        _discard(candidate)
    finally:
        lock.release()


def _discard(candidate: RemovalCandidate) -> None:
    """Renames first, then deletes: after a kill, a hidden leftover remains, and nothing that looks complete."""
    if _newest(candidate.paths) != candidate.newest:
        raise DmatError("it changed meanwhile; look again")
    for path in candidate.paths:
        trash = _trash_path(path)
        path.rename(trash)
        files.sync_folder(trash.parent)
        if trash.is_dir() and not trash.is_symlink():
            shutil.rmtree(trash)
        else:
            trash.unlink()


def _trash_path(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.gone")


def _survey_work_folders(
    workspace: Workspace, results: list[DvcResult], current: set[tuple[str, str]], unfinished: bool
) -> Iterator[RemovalCandidate | KeptPath]:
    results_by_provenance, unsynced = _by_provenance(results), _unsynced(workspace.home)
    for path in work_folders.list_strays(workspace.home):
        yield KeptPath(path, "it is not named as work of a stage")
    for work in work_folders.list_work_folders(workspace.home):
        if holder := work.holder:
            yield KeptPath(work.path, f"{holder} works in it")
            continue
        for path in work.set_aside_folders:
            if path in unsynced:
                yield KeptPath(path, "MLflow lacks part of its run; `dmat runs sync` sends it")
            else:
                yield _locked(work, path, "aside", "set aside by --fresh or as damaged")
        if work.stage_name == work_folders.STUDY:
            yield KeptPath(work.path, "DVC has no copy of a study; delete it yourself if it is not needed")
            continue
        try:
            record = work.finished_record
        except DmatError as error:
            yield KeptPath(work.path, str(error))
            continue
        if work.foreign_paths:
            yield KeptPath(work.path, f"no job wrote {', '.join(path.name for path in work.foreign_paths)}")
        elif work.path in unsynced:
            yield KeptPath(work.path, "MLflow lacks part of its run; `dmat runs sync` sends it")
        elif record is not None:
            is_current = (work.stage_name, work.instance_name) in current
            problem, reason = _judge_finished(workspace, work, record, results_by_provenance, is_current)
            yield KeptPath(work.path, problem) if problem else _locked(work, work.path, "finished", reason)
        else:
            reason = "stopped before the end" if work.resumable_paths else "stopped before anything was saved"
            if unfinished:
                yield _locked(work, work.path, "unfinished", reason)
            else:
                yield KeptPath(work.path, f"{reason}; the same command resumes it; --unfinished offers it for removal")


def _pools(workspace: Workspace, paths_to_remove: set[Path]) -> Iterator[RemovalCandidate]:
    """Pools of stages of which all work folders are removed: DVC's cache then has their shards and can restore them."""
    remaining_stages = {
        work.stage_name for work in work_folders.list_work_folders(workspace.home) if work.path not in paths_to_remove
    }
    for pool in work_folders.list_pools(workspace.home):
        stage_name = pool.name.rpartition("-")[0]
        if stage_name not in remaining_stages:
            yield RemovalCandidate((pool,), "pool", f"no work folder of {stage_name} stays", _newest((pool,)))


def _locked(work: WorkFolder, path: Path, kind: str, reason: str) -> RemovalCandidate:
    return RemovalCandidate((path,), kind, reason, _newest((path,)), work.path / "lock")


def _judge_finished(
    workspace: Workspace,
    work: WorkFolder,
    record: Finished,
    results_by_provenance: dict[str, list[DvcResult]],
    is_current: bool,
) -> tuple[str, str]:
    """Why a finished work folder must stay ("" if it need not), and why it can go.

    is_current: params.yaml names its instance.
    """
    provenance = provenance_path(work.stage_name, work.instance_name)
    result = _matching_result(results_by_provenance.get(provenance, []), provenance, record["provenance"])
    if result is None:
        return "DVC has no copy of its result; it may be the only one: delete it yourself if it is not needed", ""
    if uncached := _first_uncached([result], (work.path / RESULT, work.path / PICTURES)):
        return f"DVC has no copy of {uncached.relative_to(work.path)}", ""
    if not is_current:
        return "", "params.yaml no longer names its instance; DVC's cache has the result"
    if not result.locked:
        return "", "dvc.lock names another result of its instance by now; DVC's cache has this one"
    if missing := [path for path in result.outs if not workspace.at(path).exists()]:
        return f"dvc.lock names its result but {missing[0]} is missing; `dvc checkout` restores it", ""
    return "", "dvc.lock names its result, and artifacts/ has it"


def _unlisted(
    workspace: Workspace, params: Params, results: list[DvcResult], activity: str | None
) -> Iterator[RemovalCandidate | KeptPath]:
    """Outputs of instances that params.yaml does not name, or names with other paths.

    Only instances with a provenance file, which a stage wrote. All files of an instance go together or stay together.
    """
    current = set[Path]()
    for stage in STAGES.values():
        for instance in stage.all_instances(params):
            published_paths = (
                stage.metrics_path(instance),
                stage.provenance_path(instance),
                stage.pictures_path(instance),
            )
            current |= {workspace.at(path) for path in (*stage.outputs(params, **instance).values(), *published_paths)}
    for stage_name, instance_name in _published_instances(workspace):
        paths = tuple(path for path in _instance_paths(workspace, stage_name, instance_name) if path not in current)
        if not paths:
            continue
        uncached = [
            file for path in paths if (file := _first_uncached(_results_with(results, workspace, path), (path,)))
        ]
        if activity:
            yield KeptPath(paths[0], f"params.yaml no longer names it, but {activity}")
        elif uncached:
            yield KeptPath(
                paths[0],
                f"params.yaml no longer names it, but DVC has no copy of {uncached[0].relative_to(workspace.root)}",
            )
        else:
            reason = f"params.yaml has no {stage_name} {instance_name} there; DVC's cache has it"
            yield RemovalCandidate(paths, "unlisted", reason, _newest(paths))


def _results_with(results: list[DvcResult], workspace: Workspace, path: Path) -> list[DvcResult]:
    relative = path.relative_to(workspace.root).as_posix()
    return [result for result in results if relative in result.outs]


def _published_instances(workspace: Workspace) -> list[tuple[str, str]]:
    """Stage and instance name of every provenance file in artifacts/."""
    folder = workspace.at(f"{ARTIFACTS}/provenance")
    return [
        (stage_name, path.stem) for stage_name in STAGES for path in sorted((folder / stage_name).glob("[!.]*.json"))
    ]


def _instance_paths(workspace: Workspace, stage_name: str, instance_name: str) -> list[Path]:
    """Paths with files of an instance. The provenance is last, because it leads to the others."""
    base = workspace.at(ARTIFACTS)
    paths = [
        base / stage_name / instance_name,
        base / "pictures" / stage_name / instance_name,
        base / "metrics" / stage_name / f"{instance_name}.json",
    ]
    return [
        path for path in (*paths, workspace.at(provenance_path(stage_name, instance_name))) if os.path.lexists(path)
    ]


def _leftovers(workspace: Workspace, activity: str | None) -> Iterator[RemovalCandidate | KeptPath]:
    paths = [path for path in workspace.root.iterdir() if _TEMPORARY_IN_ROOT.fullmatch(path.name)]
    for folder in (*_folders(workspace.at(ARTIFACTS)), *_folders(workspace.home / "runs")):
        paths += [path for path in folder.iterdir() if _TEMPORARY.fullmatch(path.name)]
    for path in sorted(paths):
        match = _TEMPORARY.fullmatch(path.name)
        if match is None or psutil.pid_exists(int(match["pid"])):
            continue
        if activity:  # its process may run on another machine that shares the folder
            yield KeptPath(path, f"a temporary file, but {activity}")
        elif match["end"] == "old" and not path.with_name(match["name"]).exists():
            yield KeptPath(
                path, f"an earlier {match['name']}, and the present one is missing; run its stage again first"
            )
        else:
            yield RemovalCandidate((path,), "leftover", f"of process {match['pid']}, which is gone", _newest((path,)))


def _current_activity(workspace: Workspace) -> str | None:
    """The process that may be reading or writing artifacts now, for messages; None if there is none."""
    for work in work_folders.list_work_folders(workspace.home):
        if holder := work.holder:
            return f"{holder} computes {work.stage_name} {work.instance_name}"
    running = [process for process in dvc_files.rwlock_holders(workspace.root) if process.state == "alive"]
    if running:
        return f"`{running[0].command}` (process {running[0].pid}) is running"
    holder = dvc_files.repository_holder(workspace.root)
    return f"dvc ({holder}) is running" if holder else None


def _unsynced(home: Path) -> set[Path]:
    """Work folders with a marker file in `mlruns/active/`: the store lacks a part of their run."""
    return {open_runs.folder_of(home, marker) for _, marker in open_runs.read(home)}


def _by_provenance(results: list[DvcResult]) -> dict[str, list[DvcResult]]:
    """Path of the provenance -> the results that have it; those of dvc.lock first."""
    by_provenance: dict[str, list[DvcResult]] = {}
    for result in sorted(results, key=lambda entry: not entry.locked):
        for path in result.outs:
            if path.startswith(f"{ARTIFACTS}/provenance/"):
                by_provenance.setdefault(path, []).append(result)
    return by_provenance


def _matching_result(results: list[DvcResult], provenance: str, provenance_record: Provenance) -> DvcResult | None:
    """The result with exactly this provenance (with time, run and fingerprint), if DVC's cache has all its files."""
    for result in results:
        if result.copies is not None and files.read_json(result.copies[provenance]) == provenance_record:
            return result
    return None


def _first_uncached(results: list[DvcResult], paths: Iterable[Path]) -> Path | None:
    """The first file below these paths without an identical copy among the cached files of the results; None if all
    have one."""
    cached_copies = [copy for result in results for copy in (result.copies or {}).values()]
    inodes = {(status.st_dev, status.st_ino) for status in map(Path.stat, cached_copies)}
    checksums = {f"{copy.parent.name}{copy.name}" for copy in cached_copies}
    for path in paths:
        for file in _files(path):
            if not file.is_file():  # a broken link, or a link to a folder
                return file
            status = file.stat()
            if (status.st_dev, status.st_ino) not in inodes and _md5(file) not in checksums:
                return file
    return None


def _md5(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def _newest(paths: Iterable[Path]) -> float:
    """Time of the last change of a file. The lock of a work folder does not count: attempts to take it touch it."""
    times = [file.lstat().st_mtime for path in paths for file in _files(path) if file.name != "lock"]
    return max(times, default=0.0)


def _files(path: Path) -> Iterator[Path]:
    """Every file at or below a path, including hidden files and links."""
    if path.is_symlink() or not path.is_dir():
        yield from [path] if os.path.lexists(path) else []
        return
    for folder, subfolders, names in os.walk(path, onerror=_raise):
        links = [name for name in subfolders if (Path(folder) / name).is_symlink()]
        yield from (Path(folder) / name for name in (*names, *links))


def _folders(path: Path) -> Iterator[Path]:
    """A folder and every folder below it."""
    yield from (Path(folder) for folder, _, _ in os.walk(path, onerror=_raise))


def _raise(error: OSError) -> None:
    """Raises errors that os.walk would ignore: a folder that cannot be read must not be removed."""
    if not isinstance(error, (FileNotFoundError, NotADirectoryError)):
        raise error
