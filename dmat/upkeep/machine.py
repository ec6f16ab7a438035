"""What `dmat doctor` finds out about this machine: versions, processors, memory, disks, places to write.

Takes plain values and knows no project. Writes nothing but a probe file in each place, removed at once.
"""

import importlib.metadata
import os
import platform
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import psutil

import dmat
from dmat import devices

OK, NOTE, PROBLEM = "ok", "note", "PROBLEM"
Marked = tuple[str, str, str]  # one of the three; what was found; what to do about anything that is not ok

PACKAGES = ("torch", "torchvision", "mlflow", "dvc", "pyautoattack")
EXTRAS = {"optuna": "tune"}  # package -> the extra of dmat that brings it
_GIB = 1 << 30
# GiB: PROBLEM below the first, note below the second.
DISK = (1.0, 5.0)  # a checkpoint is on disk twice while it is saved, and MLflow's database grows: assumed
MEMORY = (0.75, 2.0)  # a training on digits takes 0.5, DVC beside it 0.07 (measured 2026-11-23, n = 1)
_CONTROL_GROUP = Path("/sys/fs/cgroup")


def versions(root: Path) -> Iterator[Marked]:
    """root: the project, for its constraints.txt and its code."""
    installed = {name: _installed(name) for name in PACKAGES}
    listed = ", ".join(
        [
            *(f"{name} {version or '(missing)'}" for name, version in installed.items()),
            *(f"{name} {_installed(name) or f'(not there: dmat[{extra}])'}" for name, extra in EXTRAS.items()),
        ]
    )
    found = f"dmat {dmat.__version__}, Python {platform.python_version()}, {listed}"
    pins = _pins(root / "constraints.txt")
    differ = [
        f"{name} {version} (pinned {' or '.join(sorted(wanted))})"
        for name, wanted in pins.items()
        if (version := _installed(name)) and version.partition("+")[0] not in wanted
    ]
    runs, here = Path(dmat.__file__).resolve(), root / "dmat" / "__init__.py"
    pinned = " --constraint constraints.txt" if pins else ""
    again = f"install with `pip install{pinned} dmat`"
    if here.exists():
        again = f"install with `pip install{pinned} --editable .`; `make repro` does it in .venv"
    if None in installed.values():
        yield PROBLEM, found, again
    elif differ:
        named = ", ".join(differ[:8]) + (f" and {len(differ) - 8} more" if len(differ) > 8 else "")
        yield NOTE, f"{found}; other than in constraints.txt: {named}", again
    else:
        yield OK, found + ("; all as in constraints.txt" if pins else "; no constraints.txt to compare with"), ""
    if here.exists() and here.resolve() != runs:
        do = f"use the virtual environment of {root}: DVC notes the code in that folder as what computed"
        yield PROBLEM, f"the code that runs is in {runs.parent}, not in {here.parent}", do


def device(wanted: str, precision: str, threads: int) -> Iterator[Marked]:
    """What the three resolve to, and why."""
    import torch

    before = torch.get_num_threads()
    try:
        natural = devices.resolve(wanted, "auto", threads)
        compute = devices.resolve(wanted, precision, threads)
    finally:
        torch.set_num_threads(before)
    found = f"{compute.describe()['device']}, {compute.precision} ({compute.reason}); asked: {wanted}, {precision}"
    if compute.device.type == "cuda":
        free, total = torch.cuda.mem_get_info()
        found += f"; {free / _GIB:.1f} of {total / _GIB:.1f} GiB of its memory free"
    if compute.precision == "bf16" and natural.precision != "bf16":
        yield NOTE, f"{found}; {natural.reason}", "set precision: auto or fp32; emulated bf16 is slower than fp32"
    elif compute.device.type == "cpu" and wanted == "auto" and Path("/proc/driver/nvidia/version").exists():
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
        do = "update the driver, or install a torch that fits it; say device: cpu if the CPU is meant"
        yield NOTE, f"{found}; there is an NVIDIA driver, but torch is {built} and finds no device", do
    else:
        yield OK, found, ""


def threads(asked: int) -> Iterator[Marked]:
    """asked: 0 for as many as cores."""
    cores = os.sched_getaffinity(0)
    shares = psutil.cpu_percent(1.0, percpu=True)
    others = sum(share for core, share in enumerate(shares) if core in cores) / 100
    yield judge_threads(asked, len(cores), _quota(), others)


def judge_threads(asked: int, cores: int, quota: float | None, others: float) -> Marked:
    """quota: processors' worth of time that the container may use. others: cores that other processes use now.

    A thread without a core of its own holds up all others at every small operation: two threads on two cores that
    others used too trained 20 images a second instead of 1,250 (docs/log.md, 2026-11-23).
    """
    count = asked or cores
    limit = min(float(cores), quota or float(cores))
    found = f"{count} on {cores} cores, of which others use {others:.1f} now"
    if count > limit:
        return PROBLEM, f"{found}; this process may use {limit:g}", f"set compute.threads to {max(1, int(limit))}"
    if count > 1 and count > limit - others + 0.5:
        most = max(1, int(limit - others + 0.5))
        return (
            PROBLEM,
            found,
            f"wait for the others or set compute.threads to {most}: a thread without a core stops all",
        )
    if limit - others < 0.5:
        return NOTE, found, "wait for the others, or expect runs to take about twice as long"
    return OK, found, ""


def memory() -> Iterator[Marked]:
    virtual = psutil.virtual_memory()
    free, total = float(virtual.available), float(virtual.total)
    limit = _control_group("memory.max")
    if limit and limit != "max":
        cached = re.search(r"^inactive_file (\d+)", _control_group("memory.stat"), re.M)
        used = int(_control_group("memory.current")) - (int(cached[1]) if cached else 0)
        free, total = min(free, int(limit) - used), min(total, float(limit))
    found = f"{free / _GIB:.1f} of {total / _GIB:.1f} GiB free"
    yield judge_amount(free, MEMORY, found, "end other programs, or use a machine with more")


def disks(places: Mapping[str, Path]) -> Iterator[Marked]:
    """places: name -> folder that is there or will be. One finding for all places on one disk."""
    together: dict[int, list[tuple[str, Path]]] = {}
    for name, path in places.items():
        there = next(one for one in (path, *path.parents) if one.exists())
        together.setdefault(there.stat().st_dev, []).append((name, there))
    for group in together.values():
        free = shutil.disk_usage(group[0][1]).free
        found = f"{free / _GIB:.1f} GiB free for {' and '.join(name for name, _ in group)}"
        yield judge_amount(free, DISK, found, "see what `dmat clean` and `dvc gc -w` can remove, or use another disk")


def judge_amount(free: float, limits: tuple[float, float], found: str, do: str) -> Marked:
    """free: in bytes."""
    if free >= limits[1] * _GIB:
        return OK, found, ""
    return PROBLEM if free < limits[0] * _GIB else NOTE, found, do


def writable(places: Mapping[str, Path]) -> Iterator[Marked]:
    """A file is really made: rights alone tell nothing of a full or read-only disk."""
    good, absent = [], []
    for name, path in places.items():
        if not path.exists():
            absent.append(name)
            continue
        try:
            _probe(path)
            good.append(name)
        except OSError as error:
            yield PROBLEM, f"{name} ({path}) cannot be written: {error.strerror}", "free or unlock it"
    if good or absent:
        yield OK, ", ".join(good) + f"; not there yet: {', '.join(absent)}" * bool(absent), ""


def _probe(folder: Path) -> None:
    path = folder / f".doctor.{os.getpid()}.tmp"
    handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    try:
        os.write(handle, b"dmat doctor\n")
        os.fsync(handle)
    finally:
        os.close(handle)
        path.unlink()


def _installed(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _pins(path: Path) -> dict[str, set[str]]:
    """Package -> the versions that its lines allow; for which Python or system each holds is not asked."""
    found: dict[str, set[str]] = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        if match := re.match(r"([\w.-]+)==([^\s;]+)", line):
            found.setdefault(match[1], set()).add(match[2])
    return found


def _quota() -> float | None:
    limit, _, period = _control_group("cpu.max").partition(" ")
    return None if limit in ("", "max") else int(limit) / int(period)


def _control_group(name: str) -> str:
    """A limit of the container, which neither the list of cores nor the free memory shows; "" if there is none."""
    path = _CONTROL_GROUP / name
    return path.read_text().strip() if path.exists() else ""
