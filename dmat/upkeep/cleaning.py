"""What a project can do without, and its removal.

A finished result goes only if DVC can bring it back: dvc.lock or the run cache names it and DVC's cache has every file
of it. DVC's cache and `mlruns/` are never touched, nor a folder that somebody works in or that holds what no job wrote.
"""

import dataclasses
import hashlib
import json
import os
import re
import shutil
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import filelock
import psutil

from dmat import ARTIFACTS, files
from dmat.config import Params
from dmat.errors import DmatError
from dmat.pipeline import STAGES
from dmat.pipeline.stages import REPORTED
from dmat.tracking import open_runs
from dmat.upkeep import dvc_files, work_folders
from dmat.upkeep.dvc_files import DvcResult
from dmat.upkeep.work_folders import WorkFolder
from dmat.workspace import EXPERIMENT_COPIES, PICTURES, RESULT, Workspace

KINDS = {
    "finished": "work folders of results that DVC has",
    "aside": "earlier work, set aside by --fresh or as damaged",
    "pool": "shards of image sets and scores of which no work folder stays",
    "unlisted": "artifacts of instances that params.yaml no longer names",
    "leftover": "temporary files of processes that are gone",
    "unfinished": "work that was stopped",
}
# `files` writes the first three; what `_discard` was removing has the last.
_TEMPORARY = re.compile(r"\.(?P<name>.+)\.(?P<pid>\d+)\.(?P<end>tmp|new|old|gone)")
_OURS_IN_ROOT = re.compile(r"\.(params.*\.yaml|doctor)\.\d+\.tmp")  # the project's own folder is the user's


@dataclasses.dataclass(frozen=True)
class RemovalCandidate:
    paths: tuple[Path, ...]  # that go together, the one to name first
    kind: str  # one of KINDS
    reason: str
    newest: float  # time of the last change inside
    lock: Path | None = None  # to be held while it goes


@dataclasses.dataclass(frozen=True)
class KeptPath:
    """What stays although one might expect it to go."""

    path: Path
    reason: str


@dataclasses.dataclass(frozen=True)
class Survey:
    candidates: list[RemovalCandidate]
    kept: list[KeptPath]
    reruns_report: bool  # a folder that write_report reads would lose something


def survey(workspace: Workspace, params: Params, *, unfinished: bool = False, older_than: float = 0.0) -> Survey:
    """What could go. older_than: days since the last change inside. Changes nothing."""
    if EXPERIMENT_COPIES in workspace.root.as_posix():
        raise DmatError(f"{workspace.root} is a copy that DVC made for an experiment; clean in {workspace.home}")
    current = {
        (stage_name, stage.instance_name(one)) for stage_name, stage in STAGES.items() for one in stage.choices(params)
    }
    results = dvc_files.results(workspace.root)
    busy = _busy(workspace)
    found = [
        *_in_work_folders(workspace, results, current, unfinished),
        *_unlisted(workspace, params, results, busy),
        *_leftovers(workspace, busy),
    ]
    candidates = [one for one in found if isinstance(one, RemovalCandidate)]
    kept = [one for one in found if isinstance(one, KeptPath)]
    if older_than:
        limit = time.time() - older_than * 86400
        kept += [
            KeptPath(one.paths[0], f"changed in the last {older_than:g} days")
            for one in candidates
            if one.newest > limit
        ]
        candidates = [one for one in candidates if one.newest <= limit]
    candidates += _pools(workspace, {one.paths[0] for one in candidates})
    going = {path for one in candidates for path in one.paths}
    candidates = [one for one in candidates if not going & set(one.paths[0].parents)]
    reported = {workspace.at(f"{ARTIFACTS}/{path}") for path in REPORTED}
    return Survey(candidates, kept, any(reported & set(path.parents) for path in going))


def freed(paths: Iterable[Path]) -> int:
    """Bytes that the disk gets back when all of these go: a file counts if every name it has is among them."""
    names = Counter[tuple[int, int]]()
    links, sizes = {}, {}
    for path in paths:
        for file in _files(path):
            status = file.lstat()
            key = (status.st_dev, status.st_ino)
            names[key] += 1
            links[key], sizes[key] = status.st_nlink, status.st_size
    return sum(sizes[key] for key, count in names.items() if count == links[key])


def size(paths: Iterable[Path]) -> int:
    """Bytes of all files below, whoever else has a name for them."""
    return sum(file.lstat().st_size for path in paths for file in _files(path))


def remove(candidates: list[RemovalCandidate]) -> tuple[int, list[KeptPath]]:
    """Removes one after the other; returns the bytes that came free and what stayed after all."""
    before = freed(path for one in candidates for path in one.paths)
    kept = []
    for one in candidates:
        try:
            _remove(one)
        except (DmatError, OSError) as error:
            kept.append(KeptPath(one.paths[0], str(error)))
    # What stayed still has its names, so nothing that is linked to it came free.
    left = [path for one in candidates for name in one.paths for path in (name, _gone(name)) if os.path.lexists(path)]
    return before - freed(left), kept


def _remove(one: RemovalCandidate) -> None:
    if one.lock is None:
        _discard(one)
        return
    lock = filelock.FileLock(one.lock, timeout=0)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise DmatError("somebody began to work in it meanwhile") from None
    try:
        _discard(one)
    finally:
        lock.release()


def _discard(one: RemovalCandidate) -> None:
    """By rename first: a kill half-way leaves a hidden leftover and nothing that looks whole."""
    if _newest(one.paths) != one.newest:
        raise DmatError("it changed meanwhile; look again")
    for path in one.paths:
        gone = _gone(path)
        path.rename(gone)
        files.sync_folder(gone.parent)
        if gone.is_dir() and not gone.is_symlink():
            shutil.rmtree(gone)
        else:
            gone.unlink()


def _gone(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.gone")


def _in_work_folders(
    workspace: Workspace, results: list[DvcResult], current: set[tuple[str, str]], unfinished: bool
) -> Iterator[RemovalCandidate | KeptPath]:
    known, unsent = _by_provenance(results), _unsent(workspace.home)
    for path in work_folders.strays(workspace.home):
        yield KeptPath(path, "it is not named as work of a stage")
    for work in work_folders.all_of(workspace.home):
        if holder := work.holder:
            yield KeptPath(work.path, f"{holder} works in it")
            continue
        for path in work.aside:
            if path in unsent:
                yield KeptPath(path, "MLflow lacks part of its run; `dmat runs sync` sends it")
            else:
                yield _locked(work, path, "aside", "set aside by --fresh or as damaged")
        if work.stage_name == work_folders.STUDY:
            yield KeptPath(work.path, "DVC has no copy of a study; delete it by hand if it is not needed")
            continue
        try:
            note = work.finished
        except DmatError as error:
            yield KeptPath(work.path, str(error))
            continue
        if work.strangers:
            yield KeptPath(work.path, f"no job wrote {', '.join(path.name for path in work.strangers)}")
        elif work.path in unsent:
            yield KeptPath(work.path, "MLflow lacks part of its run; `dmat runs sync` sends it")
        elif note is not None:
            named = (work.stage_name, work.instance_name) in current
            problem, reason = _finished(workspace, work, note, known, named)
            yield KeptPath(work.path, problem) if problem else _locked(work, work.path, "finished", reason)
        else:
            reason = "stopped before the end" if work.progress else "stopped before anything was kept"
            if unfinished:
                yield _locked(work, work.path, "unfinished", reason)
            else:
                yield KeptPath(work.path, f"{reason}; the same command goes on; --unfinished offers it")


def _pools(workspace: Workspace, going: set[Path]) -> Iterator[RemovalCandidate]:
    """Pools of the stages of which every work folder goes: DVC's cache then has their shards, and gives them back."""
    staying = {work.stage_name for work in work_folders.all_of(workspace.home) if work.path not in going}
    for pool in work_folders.pools(workspace.home):
        stage_name = pool.name.rpartition("-")[0]
        if stage_name not in staying:
            yield RemovalCandidate((pool,), "pool", f"no work folder of {stage_name} stays", _newest((pool,)))


def _locked(work: WorkFolder, path: Path, kind: str, reason: str) -> RemovalCandidate:
    return RemovalCandidate((path,), kind, reason, _newest((path,)), work.path / "lock")


def _finished(
    workspace: Workspace, work: WorkFolder, note: dict[str, Any], known: dict[str, list[DvcResult]], named: bool
) -> tuple[str, str]:
    """Why a finished work folder has to stay (or ""), and why it may go. named: by params.yaml."""
    provenance = _provenance_path(work.stage_name, work.instance_name)
    result = _recorded(known.get(provenance, []), provenance, note["provenance"])
    if result is None:
        return "DVC has no copy of its result; it may be the only one: delete it by hand if it is not needed", ""
    if extra := _not_in([result], (work.path / RESULT, work.path / PICTURES)):
        return f"DVC has no copy of {extra.relative_to(work.path)}", ""
    if not named:
        return "", "params.yaml no longer names its instance; DVC's cache has the result"
    if not result.locked:
        return "", "dvc.lock names another result of its instance by now; DVC's cache has this one"
    if missing := [path for path in result.outs if not workspace.at(path).exists()]:
        return f"dvc.lock names its result but {missing[0]} is not there; `dvc checkout` brings it back", ""
    return "", "dvc.lock names its result, and artifacts/ has it"


def _unlisted(
    workspace: Workspace, params: Params, results: list[DvcResult], busy: str | None
) -> Iterator[RemovalCandidate | KeptPath]:
    """Outputs of instances that params.yaml does not name, or names at another place. A stage made them: their
    provenance says so. All files of an instance go together or stay together."""
    current = set[Path]()
    for stage in STAGES.values():
        for instance in stage.choices(params):
            beside = (stage.metrics_path(instance), stage.provenance_path(instance), stage.pictures_path(instance))
            current |= {workspace.at(path) for path in (*stage.outputs(params, **instance).values(), *beside)}
    for stage_name, instance_name in _published(workspace):
        paths = tuple(path for path in _places_of(workspace, stage_name, instance_name) if path not in current)
        if not paths:
            continue
        lost = [extra for path in paths if (extra := _not_in(_with(results, workspace, path), (path,)))]
        if busy:
            yield KeptPath(paths[0], f"params.yaml no longer names it, but {busy}")
        elif lost:
            yield KeptPath(
                paths[0],
                f"params.yaml no longer names it, but DVC has no copy of {lost[0].relative_to(workspace.root)}",
            )
        else:
            reason = f"params.yaml has no {stage_name} {instance_name} there; DVC's cache has it"
            yield RemovalCandidate(paths, "unlisted", reason, _newest(paths))


def _with(results: list[DvcResult], workspace: Workspace, path: Path) -> list[DvcResult]:
    relative = path.relative_to(workspace.root).as_posix()
    return [one for one in results if relative in one.outs]


def _published(workspace: Workspace) -> list[tuple[str, str]]:
    """Stage and instance of everything that left a provenance in artifacts/."""
    folder = workspace.at(f"{ARTIFACTS}/provenance")
    return [
        (stage_name, path.stem) for stage_name in STAGES for path in sorted((folder / stage_name).glob("[!.]*.json"))
    ]


def _places_of(workspace: Workspace, stage_name: str, instance_name: str) -> list[Path]:
    """Where an instance has files, its provenance last: it is what finds the others."""
    base = workspace.at(ARTIFACTS)
    found = [
        base / stage_name / instance_name,
        base / "pictures" / stage_name / instance_name,
        base / "metrics" / stage_name / f"{instance_name}.json",
    ]
    return [
        path for path in (*found, workspace.at(_provenance_path(stage_name, instance_name))) if os.path.lexists(path)
    ]


def _leftovers(workspace: Workspace, busy: str | None) -> Iterator[RemovalCandidate | KeptPath]:
    found = [path for path in workspace.root.iterdir() if _OURS_IN_ROOT.fullmatch(path.name)]
    for folder in (*_folders(workspace.at(ARTIFACTS)), *_folders(workspace.home / "runs")):
        found += [path for path in folder.iterdir() if _TEMPORARY.fullmatch(path.name)]
    for path in sorted(found):
        match = _TEMPORARY.fullmatch(path.name)
        if match is None or psutil.pid_exists(int(match["pid"])):
            continue
        if busy:  # its process may live on another machine that shares the folder
            yield KeptPath(path, f"a temporary file, but {busy}")
        elif match["end"] == "old" and not path.with_name(match["name"]).exists():
            yield KeptPath(path, f"an earlier {match['name']} with none in its place; run its stage again first")
        else:
            yield RemovalCandidate((path,), "leftover", f"of process {match['pid']}, which is gone", _newest((path,)))


def _busy(workspace: Workspace) -> str | None:
    """Who may be reading or writing artifacts now."""
    for work in work_folders.all_of(workspace.home):
        if holder := work.holder:
            return f"{holder} computes {work.stage_name} {work.instance_name}"
    alive = [claim for claim in dvc_files.claims(workspace.root) if claim.state == "alive"]
    if alive:
        return f"`{alive[0].command}` (process {alive[0].pid}) is running"
    holder = dvc_files.repository_holder(workspace.root)
    return f"dvc ({holder}) is running" if holder else None


def _unsent(home: Path) -> set[Path]:
    """Work folders that `mlruns/active/` has a note of: not everything of their run is in the store."""
    return {open_runs.folder_of(home, note) for _, note in open_runs.read(home)}


def _by_provenance(results: list[DvcResult]) -> dict[str, list[DvcResult]]:
    """Results by the path of their provenance; those of dvc.lock first."""
    found: dict[str, list[DvcResult]] = {}
    for result in sorted(results, key=lambda one: not one.locked):
        for path in result.outs:
            if path.startswith(f"{ARTIFACTS}/provenance/"):
                found.setdefault(path, []).append(result)
    return found


def _recorded(results: list[DvcResult], provenance: str, about: dict[str, Any]) -> DvcResult | None:
    """The result with exactly this provenance (it holds time, run and fingerprint), if DVC's cache has all of it."""
    for result in results:
        if result.copies is not None and json.loads(result.copies[provenance].read_text()) == about:
            return result
    return None


def _not_in(results: list[DvcResult], paths: Iterable[Path]) -> Path | None:
    """The first file below these that no cached copy of these results equals byte for byte; None if all have one."""
    copies = [copy for result in results for copy in (result.copies or {}).values()]
    inodes = {(status.st_dev, status.st_ino) for status in map(Path.stat, copies)}
    sums = {f"{copy.parent.name}{copy.name}" for copy in copies}
    for path in paths:
        for file in _files(path):
            if not file.is_file():  # a link to nothing or to a folder
                return file
            status = file.stat()
            if (status.st_dev, status.st_ino) not in inodes and _md5(file) not in sums:
                return file
    return None


def _md5(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def _provenance_path(stage_name: str, instance_name: str) -> str:
    return f"{ARTIFACTS}/provenance/{stage_name}/{instance_name}.json"


def _newest(paths: Iterable[Path]) -> float:
    """Time of the last change of a file. A work folder's lock does not count: it is touched by whoever asks for it."""
    times = [file.lstat().st_mtime for path in paths for file in _files(path) if file.name != "lock"]
    return max(times, default=0.0)


def _files(path: Path) -> Iterator[Path]:
    """Every file at or below a path, hidden ones and links too."""
    if path.is_symlink() or not path.is_dir():
        yield from [path] if os.path.lexists(path) else []
        return
    for folder, inner, names in os.walk(path, onerror=_raise):
        links = [name for name in inner if (Path(folder) / name).is_symlink()]
        yield from (Path(folder) / name for name in (*names, *links))


def _folders(path: Path) -> Iterator[Path]:
    """A folder and every folder below it."""
    yield from (Path(folder) for folder, _, _ in os.walk(path, onerror=_raise))


def _raise(error: OSError) -> None:
    """os.walk passes over what it cannot read; nothing is removed that could not be looked at."""
    if not isinstance(error, (FileNotFoundError, NotADirectoryError)):
        raise error
