"""The parts of a long run that do not depend on what it trains: checkpoints, metrics, progress, stopping.

Progress is counted in images. Metrics go to `metrics.jsonl` before anywhere else; a record that a resumed run computes
a second time is not written twice.
"""

import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Self

from tqdm import tqdm

from dmat import files
from dmat.devices import Compute
from dmat.errors import Diverged, DmatError
from dmat.training import checkpoints
from dmat.training.checkpoints import State
from dmat.training.interruption import Interruption

Watcher = Callable[[int, dict[str, float]], None]  # images seen, values


class MetricsLog:
    """Appends JSON lines {"images_seen": n, name: value, ...} to a file. Only finite numbers are written.

    watcher: called with every record, also one that a resumed run computes again; it may raise Pruned.
    """

    def __init__(self, path: Path, watcher: Watcher | None = None):
        self.path, self._watcher = path, watcher
        path.parent.mkdir(parents=True, exist_ok=True)
        self._last = self._repair()
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 - closed by close(); one handle for the whole run

    def write(self, images_seen: int, values: dict[str, float]) -> None:
        """Writes a record, unless an earlier attempt of this run has written it already."""
        if images_seen > self._last:
            self._append(images_seen, values)
        if self._watcher is not None:
            self._watcher(images_seen, values)

    def _append(self, images_seen: int, values: dict[str, float]) -> None:
        finite = {name: float(value) for name, value in values.items() if math.isfinite(value)}
        nonfinite = len(values) - len(finite)
        record = {"images_seen": images_seen, **finite, **({"nonfinite": nonfinite} if nonfinite else {})}
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        self._last = images_seen

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _repair(self) -> int:
        """Cuts off damaged lines that a crash left at the end. Returns the newest images_seen; -1 without a record."""
        if not self.path.exists():
            return -1
        lines = self.path.read_bytes().splitlines(keepends=True)
        complete = len(lines)
        while complete and _images_seen(lines[complete - 1]) is None:
            complete -= 1
        if complete < len(lines):
            with open(self.path, "r+b") as file:
                file.truncate(sum(map(len, lines[:complete])))
        return _images_seen(lines[complete - 1]) or 0 if complete else -1


def _images_seen(line: bytes) -> int | None:
    """Returns images_seen of a record; None for a line that is incomplete, or zeros after the machine stopped."""
    try:
        return int(files.parse_json(line)["images_seen"]) if line.endswith(b"\n") else None
    except (ValueError, KeyError, TypeError):
        return None


class LongRun:
    """The checkpoints, metrics, progress bar and signals of a training run, as a context manager.

    `with LongRun(...) as run: state = run.resume(); ...; run.checkpoint_if_due(...)` once per step.
    total: images of the run. save_seconds: time between two checkpoints.
    """

    def __init__(
        self,
        folder: Path,
        compute: Compute,
        total: int,
        *,
        label: str = "",
        save_seconds: float = 60.0,
        quiet: bool = False,
        watcher: Watcher | None = None,
    ):
        self.path, self._rollback_path = folder / "checkpoint.dmat", folder / "roll-back.dmat"
        self.metrics = MetricsLog(folder / "metrics.jsonl", watcher)
        self.compute, self.total, self.save_seconds = compute, total, save_seconds
        self.compiled: bool | None = None  # whether steps are compiled; None: not decided; part of every checkpoint
        self._interruption = Interruption()
        self._bar = tqdm(
            total=total,
            unit=" images",
            desc=label,
            disable=quiet,
            unit_scale=True,
            mininterval=1.0,
            dynamic_ncols=True,
        )
        self._saved_at = time.monotonic()

    @property
    def stop_requested(self) -> bool:
        """Whether this process was asked to stop."""
        return self._interruption.requested

    def __enter__(self) -> Self:
        self._interruption.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, *rest: object) -> None:
        self._interruption.__exit__(kind, error, *rest)
        self._bar.close()
        self.metrics.close()

    def resume(self) -> State | None:
        """Returns the state of the last checkpoint, or None on a fresh start.

        Raises DmatError if the checkpoint cannot be trusted or was computed in another precision.
        """
        data = self._read(self.path)
        if data is None:
            return None
        header, state = checkpoints.parse(data, self.path)
        if header["precision"] != self.compute.precision:
            raise DmatError(
                f"{self.path} was computed in {header['precision']}, this run would use "
                f"{self.compute.precision}; results would mix: set precision: {header['precision']}, or start "
                f"over with --fresh"
            )
        if header["threads"] != self.compute.threads:
            tqdm.write(
                f"note: resumed with {self.compute.threads} threads instead of {header['threads']}; the last digits "
                f"of the result may differ from an uninterrupted run"
            )
        self.compiled = header.get("compiled", False)
        self._bar.update(header["images_seen"])
        return state

    def checkpoint_if_due(
        self, images_seen: int, state: Callable[[], State], stop_requested: bool | None = None
    ) -> None:
        """Updates the progress bar between two steps and saves if it is time. After a signal it saves and stops.

        state: called if the state is saved.
        stop_requested: whether any of several processes received a signal, once all know it; None: whether this one
        did. Raises Interrupted after saving.
        """
        self._bar.update(images_seen - self._bar.n)
        stop = self.stop_requested if stop_requested is None else stop_requested
        if stop or time.monotonic() - self._saved_at >= self.save_seconds:
            self.save(images_seen, state())
        if stop:
            self._interruption.raise_now()

    def save(self, images_seen: int, state: State) -> None:
        """Writes the checkpoint from which the run resumes."""
        self._write(self.path, images_seen, state)
        self._saved_at = time.monotonic()

    def save_soon(self) -> None:
        """Makes the next `checkpoint_if_due` save."""
        self._saved_at = -math.inf

    def save_rollback(self, images_seen: int, state: State) -> None:
        """Writes a second checkpoint, to roll back to. `save` does not overwrite it."""
        self._write(self._rollback_path, images_seen, state)

    def load_rollback(self) -> State:
        """Returns the state of the last `save_rollback`."""
        data = self._read(self._rollback_path)
        assert data is not None
        return checkpoints.parse(data, self._rollback_path)[1]

    def _write(self, path: Path, images_seen: int, state: State) -> None:
        if self.compute.world.is_main_process:
            header: checkpoints.Header = {
                "images_seen": images_seen,
                "precision": self.compute.precision,
                "threads": self.compute.threads,
                "compiled": self.compiled,
            }
            checkpoints.save(path, header, state)

    def _read(self, path: Path) -> bytes | None:
        """Reads the main process's file, in every process; None if there is none."""
        is_main_process = self.compute.world.is_main_process
        return self.compute.world.broadcast(path.read_bytes() if is_main_process and path.exists() else None)

    def save_json(self, name: str, values: Mapping[str, object]) -> Path:
        """Writes a JSON file for people into the folder of the run and returns its path."""
        path = self.path.parent / name
        files.write_json(path, values)
        return path

    def show(self, **values: float) -> None:
        """Shows the newest values at the right of the progress bar."""
        self._bar.set_postfix({name: f"{value:.3g}" for name, value in values.items()})


def stop_if_not_finite(loss: float, images_seen: int) -> None:
    """Raises Diverged on a NaN or infinite loss. The last checkpoint is from before this step."""
    if not math.isfinite(loss):
        raise Diverged(
            f"the loss is {loss} after {images_seen} images; expected a finite number; lower the learning rate "
            f"or beta and run again (the last good checkpoint is kept)"
        )
