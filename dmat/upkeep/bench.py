"""`dmat doctor --bench`: measures what this machine computes and writes in a second, in about a minute.

Shapes: B batch.
"""

import datetime
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from torch.nn import functional as F

from dmat import devices
from dmat.errors import DmatError
from dmat.machine_speed import MachineSpeed, peak_key
from dmat.robust.networks import DataSpec, wide_resnet

_PEAK_SECONDS = 2.0  # per precision and number of threads
_ROUNDS = 5  # each with one process alone and two at once
_TRAINING_SECONDS = 2.0  # of each part of a round
_DISK_BYTES = 512 << 20  # more than the cache of a disk's controller
_BLOCK_BYTES = 4 << 20
_BATCH, _CHANNELS, _SIZE, _CLASSES = 64, 3, 32, 10


def measure(device: str, threads: int, folder: Path, report: Callable[[str], None]) -> MachineSpeed:
    """Measures this machine. device, threads: as in `compute` of params.yaml. folder: on the disk to measure.

    report: called with a sentence as each part ends. Raises DmatError for a device that is not there, and if the disk
    has no room.
    """
    before = torch.get_num_threads()
    try:
        peaks, compute = _matrix_peaks(device, threads), devices.resolve(device, "auto", threads)
    finally:
        torch.set_num_threads(before)
    for key, peak in peaks.items():
        report(f"matrix products: {peak / 1e9:,.0f} GFLOP/s ({key})")
    throughput = None
    if compute.device.type == "cpu":
        throughput = _process_throughput()
        report(f"two processes at once: {throughput:.2f} times the images per second of one")
    written, read = _disk_speeds(folder)
    report(f"disk: {written / 1e6:,.0f} MB/s written, {read / 1e6:,.0f} MB/s read")
    record = compute.describe()
    now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    return MachineSpeed(record["device"], record["torch"], peaks, throughput, written, read, now)


def _matrix_peaks(device: str, threads: int) -> dict[str, float]:
    """FLOP/s by `peak_key`: of fp32, and of bf16 where the hardware has it; with one thread, `threads` and all."""
    peaks: dict[str, float] = {}
    for count in (1, threads, 0):
        automatic = devices.resolve(device, "auto", count)
        for precision in dict.fromkeys(("fp32", automatic.precision)):
            compute = devices.resolve(device, precision, count)
            if peak_key(compute) in peaks:
                continue
            best, end = 0.0, time.monotonic() + _PEAK_SECONDS
            while time.monotonic() < end:
                best = max(best, devices.matrix_peak(compute))
            peaks[peak_key(compute)] = best
    return peaks


def _process_throughput() -> float:
    """Images per second of two processes at once, divided by those of one alone: the median of `_ROUNDS` ratios."""
    context = multiprocessing.get_context("spawn")
    pipes, processes = [], []
    try:
        for _ in range(2):
            here, there = context.Pipe()
            processes.append(context.Process(target=_train_on_request, args=(there,), daemon=True))
            processes[-1].start()
            pipes.append(here)
        _speeds(pipes)  # the first steps are slower
        return statistics.median(sum(_speeds(pipes)) / _speeds(pipes[:1])[0] for _ in range(_ROUNDS))
    except EOFError:
        raise DmatError(
            "a process that trained for the measurement ended; expected two that run at once; look for what ends "
            "processes here (memory?) and run `dmat doctor --bench` again"
        ) from None
    finally:
        for process in processes:
            process.terminate()
            process.join()


def _speeds(pipes: list["Connection"]) -> list[float]:
    """Images per second of each process, all at the same time."""
    for pipe in pipes:
        pipe.send(_TRAINING_SECONDS)
    return [pipe.recv() for pipe in pipes]


def _train_on_request(pipe: "Connection") -> None:
    """Trains a small network for as many seconds as the pipe says, each time, and answers with images per second."""
    torch.set_num_threads(1)
    statistics_of_images = (0.5,) * _CHANNELS
    network = wide_resnet(DataSpec(_CLASSES, _CHANNELS, statistics_of_images, statistics_of_images), 10, 1, "silu")
    optimiser = torch.optim.SGD(network.parameters(), 1e-3)
    images = torch.rand(_BATCH, _CHANNELS, _SIZE, _SIZE)  # [B, 3, 32, 32]
    labels = torch.randint(_CLASSES, (_BATCH,))  # [B]
    while True:
        seconds = pipe.recv()
        started, count = time.monotonic(), 0
        while time.monotonic() - started < seconds:
            optimiser.zero_grad()
            F.cross_entropy(network(images), labels).backward()
            optimiser.step()
            count += _BATCH
        pipe.send(count / (time.monotonic() - started))


def _disk_speeds(folder: Path) -> tuple[float, float]:
    """Bytes per second of writing a file until it is on the disk, and of reading it from there. Removes the file."""
    block = os.urandom(_BLOCK_BYTES)  # random, because some file systems compress
    try:
        with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
            started = time.monotonic()
            for _ in range(_DISK_BYTES // _BLOCK_BYTES):
                file.write(block)
            os.fsync(file.fileno())
            written = _DISK_BYTES / (time.monotonic() - started)
            if hasattr(os, "posix_fadvise"):  # else the page cache answers
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            file.seek(0)
            started = time.monotonic()
            while file.read(_BLOCK_BYTES):
                pass
            return written, _DISK_BYTES / (time.monotonic() - started)
    except OSError as error:
        raise DmatError(
            f"the disk of {folder} could not be measured ({error.strerror}); expected room for "
            f"{_DISK_BYTES >> 20} MiB; free some"
        ) from None
