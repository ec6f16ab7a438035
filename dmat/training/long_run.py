"""The parts of a long run that do not depend on what it trains: checkpoints, metrics, progress, stopping.

The clock counts images. Metrics go to `metrics.jsonl` before anywhere else; a record that a resumed run computes
a second time is not written twice.
"""

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from tqdm import tqdm

from dmat import files
from dmat.devices import Compute
from dmat.errors import Diverged, DmatError
from dmat.training import checkpoints
from dmat.training.interruption import Interruption

State = dict[str, Any]
Watcher = Callable[[int, dict[str, float]], None]  # images seen, values


class MetricsLog:
    """Append-only JSON lines {"images_seen": n, name: value, ...}; only finite numbers are written.

    watcher: is told every record, also one that a resumed run computes again, and may raise Pruned.
    """

    def __init__(self, path: Path, watcher: Watcher | None = None):
        self.path, self._watcher = path, watcher
        path.parent.mkdir(parents=True, exist_ok=True)
        self._last = self._mend()
        self._file = open(path, "a")  # noqa: SIM115 - closed by close(); one handle for the whole run

    def write(self, images_seen: int, values: dict[str, float]) -> None:
        """Drops what an earlier attempt of this run has written already."""
        if images_seen > self._last:
            self._append(images_seen, values)
        if self._watcher is not None:
            self._watcher(images_seen, values)

    def _append(self, images_seen: int, values: dict[str, float]) -> None:
        finite = {name: float(value) for name, value in values.items() if math.isfinite(value)}
        broken = len(values) - len(finite)
        record = {"images_seen": images_seen, **finite, **({"nonfinite": broken} if broken else {})}
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        self._last = images_seen

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _mend(self) -> int:
        """Cuts what a crash left damaged off the end; returns the newest images_seen, or -1."""
        if not self.path.exists():
            return -1
        lines = self.path.read_bytes().splitlines(keepends=True)
        whole = len(lines)
        while whole and _images_seen(lines[whole - 1]) is None:
            whole -= 1
        if whole < len(lines):
            with open(self.path, "r+b") as file:
                file.truncate(sum(map(len, lines[:whole])))
        return _images_seen(lines[whole - 1]) or 0 if whole else -1


def _images_seen(line: bytes) -> int | None:
    """Of a record; None for a line that is half-written, or zeros after the machine stopped."""
    try:
        return int(json.loads(line)["images_seen"]) if line.endswith(b"\n") else None
    except (ValueError, KeyError, TypeError):
        return None


class LongRun:
    """Use as a context: `with LongRun(...) as run: state = run.resume(); ...; run.checkpoint_if_due(...)` once per step."""

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
        self.path, self._kept = folder / "checkpoint.dmat", folder / "roll-back.dmat"
        self.metrics = MetricsLog(folder / "metrics.jsonl", watcher)
        self.compute, self.total, self.save_seconds = compute, total, save_seconds
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
    def asked(self) -> bool:
        """Whether a signal asked this process to stop."""
        return self._interruption.asked is not None

    def __enter__(self) -> Self:
        self._interruption.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, *rest: object) -> None:
        self._interruption.__exit__(kind, error, *rest)
        self._bar.close()
        self.metrics.close()

    def resume(self) -> State | None:
        """The state of the last checkpoint, or None on a fresh start. Refuses another precision."""
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
                f"of the result may differ from an undisturbed run"
            )
        self._bar.update(header["images_seen"])
        return state

    def checkpoint_if_due(self, images_seen: int, state: Callable[[], State], asked: bool | None = None) -> None:
        """Between two steps: moves the bar, saves if it is time, saves and stops if a signal asked for it.

        asked: of several processes, whether any of them was, as all know by now; None: whether this one is.
        """
        self._bar.update(images_seen - self._bar.n)
        stop = self.asked if asked is None else asked
        if stop or time.monotonic() - self._saved_at >= self.save_seconds:
            self.save(images_seen, state())
        if stop:
            self._interruption.raise_now()

    def save(self, images_seen: int, state: State) -> None:
        self._write(self.path, images_seen, state)
        self._saved_at = time.monotonic()

    def keep(self, images_seen: int, state: State) -> None:
        """A second checkpoint, to go back to. What `save` writes does not touch it."""
        self._write(self._kept, images_seen, state)

    def kept(self) -> State:
        """The state of the last `keep`."""
        data = self._read(self._kept)
        assert data is not None
        return checkpoints.parse(data, self._kept)[1]

    def _write(self, path: Path, images_seen: int, state: State) -> None:
        if self.compute.world.is_main_process:
            header = {"images_seen": images_seen, "precision": self.compute.precision, "threads": self.compute.threads}
            checkpoints.save(path, header, state)

    def _read(self, path: Path) -> bytes | None:
        """What the leading process's file holds, in every process."""
        is_main_process = self.compute.world.is_main_process
        return self.compute.world.broadcast(path.read_bytes() if is_main_process and path.exists() else None)

    def note(self, name: str, values: dict[str, Any]) -> Path:
        """A JSON file in the folder of the run, for people."""
        path = self.path.parent / name
        files.write_json(path, values)
        return path

    def show(self, **values: float) -> None:
        """Newest numbers at the right of the progress bar."""
        self._bar.set_postfix({name: f"{value:.3g}" for name, value in values.items()})


def stop_if_not_finite(loss: float, images_seen: int) -> None:
    """Raises Diverged; the last checkpoint is from before this step."""
    if not math.isfinite(loss):
        raise Diverged(
            f"the loss is {loss} after {images_seen} images; expected a finite number; lower the learning rate "
            f"or beta and run again (the last good checkpoint is kept)"
        )
