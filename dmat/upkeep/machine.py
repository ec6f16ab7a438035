"""Checks of `dmat doctor` on this machine: versions, device, threads, memory, disks, writable folders.

Takes plain values, no project. Writes only a probe file in each folder, which is removed at once.
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
CheckResult = tuple[str, str, str]  # OK, NOTE or PROBLEM; what was found; advice, "" if it is OK

PACKAGES = ("torch", "torchvision", "mlflow", "dvc", "pyautoattack")
EXTRAS = {"optuna": "tune"}  # package -> the extra of dmat that installs it
_GIB = 1 << 30
# Free GiB: PROBLEM below the first number, NOTE below the second.
DISK = (1.0, 5.0)  # a checkpoint is on disk twice while it is saved, and MLflow's database grows: assumed
MEMORY = (0.75, 2.0)  # a training on digits takes 0.5, DVC beside it 0.07 (measured 2026-11-23, n = 1)
_CONTROL_GROUP = Path("/sys/fs/cgroup")


def versions(root: Path) -> Iterator[CheckResult]:
    """Checks installed versions against constraints.txt, and which code of dmat runs. root: folder of the project."""
    installed = {name: _installed_version(name) for name in PACKAGES}
    version_list = ", ".join(
        [
            *(f"{name} {version or '(missing)'}" for name, version in installed.items()),
            *(
                f"{name} {_installed_version(name) or f'(not installed: dmat[{extra}])'}"
                for name, extra in EXTRAS.items()
            ),
        ]
    )
    description = f"dmat {dmat.__version__}, Python {platform.python_version()}, {version_list}"
    pins = _pins(root / "constraints.txt")
    differing = [
        f"{name} {version} (pinned {' or '.join(sorted(pinned_versions))})"
        for name, pinned_versions in pins.items()
        if (version := _installed_version(name)) and version.partition("+")[0] not in pinned_versions
    ]
    running_package, project_package = Path(dmat.__file__).resolve(), root / "dmat" / "__init__.py"
    constraint_option = " --constraint constraints.txt" if pins else ""
    install_advice = f"install with `pip install{constraint_option} dmat`"
    if project_package.exists():
        install_advice = f"install with `pip install{constraint_option} --editable .`; `make repro` does it in .venv"
    if None in installed.values():
        yield PROBLEM, description, install_advice
    elif differing:
        differing_list = ", ".join(differing[:8]) + (f" and {len(differing) - 8} more" if len(differing) > 8 else "")
        yield NOTE, f"{description}; other than in constraints.txt: {differing_list}", install_advice
    else:
        yield OK, description + ("; all as in constraints.txt" if pins else "; no constraints.txt to compare with"), ""
    if project_package.exists() and project_package.resolve() != running_package:
        advice = f"use the virtual environment of {root}: DVC records the code in that folder as the code that computed"
        yield PROBLEM, f"the code that runs is in {running_package.parent}, not in {project_package.parent}", advice


def device(requested: str, precision: str, threads: int) -> Iterator[CheckResult]:
    """Checks what device, precision and number of threads resolve to, and why."""
    import torch

    before = torch.get_num_threads()
    try:
        automatic = devices.resolve(requested, "auto", threads)
        compute = devices.resolve(requested, precision, threads)
    finally:
        torch.set_num_threads(before)
    description = (
        f"{compute.describe()['device']}, {compute.precision} ({compute.reason}); asked: {requested}, {precision}"
    )
    if compute.device.type == "cuda":
        free, total = torch.cuda.mem_get_info()
        description += f"; {free / _GIB:.1f} of {total / _GIB:.1f} GiB of its memory free"
    if compute.precision == "bf16" and automatic.precision != "bf16":
        yield (
            NOTE,
            f"{description}; {automatic.reason}",
            "set precision: auto or fp32; emulated bf16 is slower than fp32",
        )
    elif compute.device.type == "cpu" and requested == "auto" and Path("/proc/driver/nvidia/version").exists():
        build = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
        advice = "update the driver, or install a torch that fits it; say device: cpu if the CPU is meant"
        yield NOTE, f"{description}; there is an NVIDIA driver, but torch is {build} and finds no device", advice
    else:
        yield OK, description, ""


def threads(requested: int) -> Iterator[CheckResult]:
    """Checks the number of threads against free cores, measured for one second. requested: 0 means one per core."""
    cores = os.sched_getaffinity(0)
    usage = psutil.cpu_percent(1.0, percpu=True)
    used_by_others = sum(core_usage for core, core_usage in enumerate(usage) if core in cores) / 100
    yield rate_threads(requested, len(cores), _quota(), used_by_others)


def rate_threads(requested: int, cores: int, quota: float | None, used_by_others: float) -> CheckResult:
    """Rates a number of threads.

    quota: cores' worth of processor time that the container may use, None for no limit. used_by_others: cores that
    other processes use now.

    A thread without a free core delays all others at every small operation: two threads on two cores, both also used by
    other processes, trained 20 images per second instead of 1,250 (docs/log.md, 2026-11-23).
    """
    count = requested or cores
    limit = min(float(cores), quota or float(cores))
    description = f"{count} on {cores} cores, of which others use {used_by_others:.1f} now"
    if count > limit:
        return PROBLEM, f"{description}; this process may use {limit:g}", f"set compute.threads to {max(1, int(limit))}"
    if count > 1 and count > limit - used_by_others + 0.5:
        max_threads = max(1, int(limit - used_by_others + 0.5))
        return (
            PROBLEM,
            description,
            f"wait for the others or set compute.threads to {max_threads}: a thread without a core delays all others",
        )
    if limit - used_by_others < 0.5:
        return NOTE, description, "wait for the others, or expect runs to take about twice as long"
    return OK, description, ""


def memory() -> Iterator[CheckResult]:
    """Checks free memory, within the limit of the container if there is one."""
    virtual = psutil.virtual_memory()
    free, total = float(virtual.available), float(virtual.total)
    limit = _control_group("memory.max")
    if limit and limit != "max":
        cached = re.search(r"^inactive_file (\d+)", _control_group("memory.stat"), re.M)
        used = int(_control_group("memory.current")) - (int(cached[1]) if cached else 0)
        free, total = min(free, int(limit) - used), min(total, float(limit))
    description = f"{free / _GIB:.1f} of {total / _GIB:.1f} GiB free"
    yield rate_free_amount(free, MEMORY, description, "end other programs, or use a machine with more")


def disks(folders: Mapping[str, Path]) -> Iterator[CheckResult]:
    """Checks free disk space. folders: name -> path, existing or not. One result for all folders on the same disk."""
    folders_by_disk: dict[int, list[tuple[str, Path]]] = {}
    for name, path in folders.items():
        existing = next(ancestor for ancestor in (path, *path.parents) if ancestor.exists())
        folders_by_disk.setdefault(existing.stat().st_dev, []).append((name, existing))
    for group in folders_by_disk.values():
        free = shutil.disk_usage(group[0][1]).free
        description = f"{free / _GIB:.1f} GiB free for {' and '.join(name for name, _ in group)}"
        yield rate_free_amount(
            free, DISK, description, "see what `dmat clean` and `dvc gc -w` can remove, or use another disk"
        )


def rate_free_amount(free: float, limits: tuple[float, float], description: str, advice: str) -> CheckResult:
    """Rates a free amount. free: bytes. limits: GiB, PROBLEM below the first, NOTE below the second."""
    if free >= limits[1] * _GIB:
        return OK, description, ""
    return PROBLEM if free < limits[0] * _GIB else NOTE, description, advice


def writable(folders: Mapping[str, Path]) -> Iterator[CheckResult]:
    """Checks that files can be written, by writing one: permissions do not show a full or read-only disk."""
    writable_names, missing_names = [], []
    for name, path in folders.items():
        if not path.exists():
            missing_names.append(name)
            continue
        try:
            _probe(path)
            writable_names.append(name)
        except OSError as error:
            yield PROBLEM, f"{name} ({path}) cannot be written: {error.strerror}", "free or unlock it"
    if writable_names or missing_names:
        yield (
            OK,
            ", ".join(writable_names) + f"; not existing yet: {', '.join(missing_names)}" * bool(missing_names),
            "",
        )


def _probe(folder: Path) -> None:
    path = folder / f".doctor.{os.getpid()}.tmp"
    probe_fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    try:
        os.write(probe_fd, b"dmat doctor\n")
        os.fsync(probe_fd)
    finally:
        os.close(probe_fd)
        path.unlink()


def _installed_version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _pins(path: Path) -> dict[str, set[str]]:
    """Package -> the versions in its lines of constraints.txt, for any Python version and system."""
    pins: dict[str, set[str]] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        if match := re.match(r"([\w.-]+)==([^\s;]+)", line):
            pins.setdefault(match[1], set()).add(match[2])
    return pins


def _quota() -> float | None:
    limit, _, period = _control_group("cpu.max").partition(" ")
    return None if limit in ("", "max") else int(limit) / int(period)


def _control_group(name: str) -> str:
    """Content of a control group file: a limit of the container, which neither the number of cores nor the free memory
    shows. "" if there is none."""
    path = _CONTROL_GROUP / name
    return path.read_text(encoding="utf-8").strip() if path.exists() else ""
