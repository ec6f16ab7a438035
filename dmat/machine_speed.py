"""What this machine computes and writes in a second: measured by `dmat doctor --bench`, used by estimates.

One file per machine in the user's cache folder, because a measurement on a busy machine shows less than the machine
can do. Nothing depends on it: without it, estimates are missing and a utilisation refers to a shorter measurement.
"""

import contextlib
import dataclasses
import functools
import platform
from pathlib import Path
from typing import TYPE_CHECKING

import platformdirs
from typing_extensions import TypedDict

from dmat import files
from dmat.errors import DmatError

if TYPE_CHECKING:  # importing it loads torch
    from dmat.devices import Compute


@dataclasses.dataclass(frozen=True)
class MachineSpeed:
    """Speed of this machine.

    device: as `Compute.describe` names it. matrix_peaks: FLOP/s of large matrix products, by `peak_key`.
    process_throughput: images that two processes train on at once, one thread each, divided by those of one process
    alone; None on a GPU. disk_write, disk_read: bytes per second of one large file, past the page cache.
    measured: UTC time, such as 2026-11-29T12:00:00Z.
    """

    device: str
    torch: str  # version
    matrix_peaks: dict[str, float]
    process_throughput: float | None
    disk_write: float
    disk_read: float
    measured: str


# As JSON.
_SpeedRecord = TypedDict("_SpeedRecord", MachineSpeed.__annotations__)  # type: ignore[misc]


def path() -> Path:
    """The file of this machine. Homes may be shared by machines, so its name has that of the machine."""
    return platformdirs.user_cache_path("dmat") / f"speed-{platform.node() or 'machine'}.json"


def write(speed: MachineSpeed) -> None:
    """Writes the measurement, which replaces an earlier one."""
    path().parent.mkdir(parents=True, exist_ok=True)
    files.write_json(path(), dataclasses.asdict(speed))


def read() -> MachineSpeed | None:
    """The last measurement; None without one that this version can read."""
    with contextlib.suppress(DmatError):
        record = files.read_record(path(), _SpeedRecord)
        return MachineSpeed(**{name: record[name] for name in _SpeedRecord.__required_keys__})  # type: ignore[literal-required]
    return None


def peak_key(compute: "Compute") -> str:
    """What a matrix peak depends on, within one machine and version of torch."""
    return f"{compute.precision}, threads: {compute.threads}"


@functools.cache
def matrix_peak(compute: "Compute") -> float:
    """FLOP/s of a large matrix product in the precision of `compute`: the denominator of the utilisation (MFU).

    The higher of a short measurement now, which other load lowers, and of the recorded one, if it is of this device.
    """
    from dmat import devices

    peak = devices.matrix_peak(compute)
    speed = read()
    if speed is None or speed.device != compute.describe()["device"] or speed.torch != compute.describe()["torch"]:
        return peak
    return max(peak, speed.matrix_peaks.get(peak_key(compute), 0.0))
