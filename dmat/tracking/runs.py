"""The tracked run of one stage instance: what the job sees of tracking."""

import os
import subprocess
import threading
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import psutil

from dmat import files
from dmat.errors import Interrupted
from dmat.tracking import notes, stores
from dmat.tracking.memory import Memory, Sender

_SEND_EVERY = 5.0  # seconds
_LONGEST_PAUSE = 60.0  # seconds between two attempts at a store that does not answer
_PATIENCE = 20.0  # seconds that the end of a stage waits for a slow server


class Run:
    """As a context it ends with the status that fits how the block ended."""

    def __init__(self, home: Path, folder: Path, about: dict[str, Any], enabled: bool = True):
        self.home, self.folder = home, folder
        self._memory = Memory(folder, stores.store(home))
        self._about, self._enabled = about, enabled
        self._closing, self._connected = threading.Event(), threading.Event()
        self._final: tuple[dict[str, float], list[str]] = ({}, [])
        self._late_tags: dict[str, str] = {}
        self._status: tuple[str, str] | None = None
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._started = time.time()
        self._healthy = True

    def __enter__(self) -> Self:
        if self._enabled:
            self._memory.update(about=self._about, ending=None)
            notes.write(self.home, self.folder, os.getpid())
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        status = (
            "FINISHED"
            if kind is None
            else "KILLED"
            if issubclass(kind, (Interrupted, KeyboardInterrupt, SystemExit))
            else "FAILED"
        )
        status, reason = self._status or (status, str(error) if error else "")
        metrics, pictures = self._final
        ending = {"status": status, "error": reason, "metrics": metrics, "pictures": pictures, "ended": time.time()}
        try:
            self._memory.update(seconds=self._memory["seconds"] + time.time() - self._started, ending=ending)
        finally:
            self._closing.set()
            if self._enabled:
                self._thread.join(_PATIENCE if self._healthy else _PATIENCE / 10)

    def finish_with(self, metrics: Mapping[str, Any], pictures: list[Path]) -> None:
        """Final numbers and pictures (inside the work folder), sent when the block ends."""
        self._final = (dict(flatten(metrics)), [str(path.relative_to(self.folder)) for path in pictures])

    def end_as(self, status: str, reason: str) -> None:
        """Another status than the end of the block tells."""
        self._status = (status, reason)

    def tag(self, name: str, value: str) -> None:
        """A tag that becomes known while the run goes on."""
        self._about["tags"][name] = value
        self._late_tags[name] = value

    def provenance(self) -> dict[str, Any]:
        """Where this result can be looked up: not part of any hash."""
        if self._enabled:
            self._connected.wait(_PATIENCE)
        return {
            "mlflow_run": self._memory["run"],
            "mlflow_parent": self._memory["parent"],
            **_git(self.folder),
            "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "host_cores": os.cpu_count(),
        }

    def _serve(self) -> None:
        """The thread: sends what is new until the block ends, more seldom while the store does not answer."""
        sender = Sender(self.home, self._memory)
        connected, warned, pause = False, False, 0.0
        while True:
            closing = self._closing.wait(pause)
            try:
                if not connected:
                    sender.connect(live=True)
                    connected = True
                    notes.sync(self.home)
                sender.send_new()
                while self._late_tags:
                    name, value = self._late_tags.popitem()
                    sender.tag(name, value)
                if closing:
                    ending = self._memory["ending"]
                    sender.send_end(ending["status"], ending)
                    notes.remove(self.home, self.folder)
                pause, self._healthy = _SEND_EVERY, True
            except Exception as error:  # any failure of tracking must leave the run alone
                pause, self._healthy = min(max(2 * pause, _SEND_EVERY), _LONGEST_PAUSE), False
                if not warned:
                    warned = True
                    warnings.warn(
                        f"MLflow at {stores.store(self.home)} cannot be reached ({notes.first_line(error)}); the run "
                        f"goes on, its metrics are in {self.folder / 'metrics.jsonl'} and are sent later",
                        stacklevel=1,
                    )
            finally:
                self._connected.set()
            if closing:
                return


def open_run(
    home: Path,
    work: Path,
    *,
    stage: str,
    instance: str,
    settings: Mapping[str, Any],
    inputs: Mapping[str, Mapping[str, str]],
    compute: Mapping[str, Any],
    parent: Path | None = None,
    tags: Mapping[str, str] | None = None,
) -> Run:
    """The run of a stage instance; resumed where `work` remembers one. DMAT_TRACKING=off makes it silent.

    parent: the folder that remembers the parent's run; without it that of the `dvc` process above, if there is one.
    """
    git = _git(work)
    about = {
        "name": f"{stage} {instance}",
        "settings": dict(settings),
        "started": time.time(),
        "tags": {
            "dmat.stage": stage,
            "dmat.instance": instance,
            "dmat.fingerprint": work.name.rpartition("-")[2],
            **{f"compute.{name}": str(value) for name, value in compute.items()},
            **{f"input.{name}": entry["sha256"] for name, entry in inputs.items()},
            **{f"git.{name.removeprefix('git_')}": str(value) for name, value in git.items()},
            **{
                tag: os.environ[name]
                for name, tag in (("DVC_STAGE", "dvc.stage"), ("DVC_EXP_NAME", "dvc.exp"))
                if name in os.environ
            },
            **(tags or {}),
        },
    }
    enabled = os.environ.get("DMAT_TRACKING", "on") != "off"
    above = (parent or _dvc_folder(home)) if enabled else None
    return Run(home, work, about | {"parent": str(above) if above else None}, enabled)


def seconds_before(work: Path) -> float:
    """Time that earlier attempts at this work spent."""
    path = work / "tracking.json"
    return float(files.read_json(path)["seconds"]) if path.exists() else 0.0


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Numbers of nested mappings as dotted names; text and lists are left out."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{name}.")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            yield f"{prefix}{name}", float(value)


def _dvc_folder(home: Path) -> Path | None:
    """The folder that remembers the run of the `dvc` process above this one; None for a direct command."""
    above = [p for p in psutil.Process().parents() if "dvc" in {Path(word).name for word in p.cmdline()[:3]}]
    if not above:
        return None
    dvc, address = above[-1], stores.store(home)
    name = f"{dvc.pid}-{dvc.create_time():.2f}-{files.fingerprint(address)}"
    folder = home / "mlruns" / "parents" / name
    folder.mkdir(parents=True, exist_ok=True)
    memory = Memory(folder, address)
    with memory.lock:
        memory.update()
        if memory["about"] is None:
            command = " ".join(["dvc", *dvc.cmdline()[2:]])
            tags = {"dmat.stage": "dvc", "dmat.command": command, **{k: str(v) for k, v in _git(home).items()}}
            started = dvc.create_time()
            memory.update(about={"name": command, "tags": tags, "settings": {}, "started": started, "parent": None})
            notes.write(home, folder, dvc.pid, by_children=True)
    return folder


def _git(folder: Path) -> dict[str, Any]:
    """Commit and whether the tree differs from it; empty outside a repository."""

    def ask(*words: str) -> str:
        return subprocess.run(
            ["git", *words], cwd=_existing(folder), capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return {
            "git_commit": ask("rev-parse", "HEAD"),
            "git_dirty": bool(ask("status", "--porcelain", "--untracked-files=no")),
        }
    except (OSError, subprocess.CalledProcessError):
        return {}


def _existing(folder: Path) -> Path:
    return next(path for path in (folder, *folder.parents) if path.is_dir())
