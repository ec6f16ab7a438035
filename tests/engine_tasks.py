"""Functions that tests of the engine run in workers, which import this module. It must not import torch."""

import os
import signal
import sys
import time
from pathlib import Path

from dmat.errors import ConfigError, Diverged, DmatError, Interrupted, UnfitError
from dmat.training.interruption import Interruption

POLL = 0.01


def add(context, a, b):
    return a + b


def describe(context):
    """Process and variables of the worker."""
    return {
        "pid": os.getpid(),
        "device": os.environ.get("DEVICE"),
        "torch": "torch" in sys.modules,
    }


def report(context, steps):
    """Reports each step and returns the answers."""
    return [context.ask({"step": step, "loss": float("nan")})["prune"] for step in range(steps)]


def fail(context, kind):
    errors = {
        "DmatError": DmatError("a; b; c"),
        "UnfitError": UnfitError("does not fit"),
        "Diverged": Diverged("NaN loss"),
        "ConfigError": ConfigError("params.yaml", ["a is 1", "b is 2"]),
        "Interrupted": Interrupted(75, "stopped by SIGUSR1"),
        "ValueError": ValueError("first line\nsecond line"),
    }
    raise errors[kind]


def die_first(context, folder, times):
    """Kills its worker, as the kernel does for lack of memory, as often as asked; then says how often that was."""
    deaths = len(list(Path(folder).glob("death-*")))
    if deaths < times:
        (Path(folder) / f"death-{deaths}").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return deaths


def run_until_asked(context, folder):
    """Computes until it has to stop; then saves. It polls as a long run does."""
    folder = Path(folder)
    (folder / f"started-{os.getpid()}").touch()
    with Interruption() as interruption:
        while not interruption.requested:
            time.sleep(POLL)
        (folder / "saved").write_text("state")
        interruption.raise_now()


def unpicklable(context):
    return sys._getframe()


def refuse():
    raise DmatError("this worker has other code; expected the driver's; install it")


def accept():
    """A worker that is as expected."""


def wait_for_start(context, folder, count=1):
    """Waits until as many other tasks have started in the same folder."""
    while len(list(Path(folder).glob("started-*"))) < count:
        time.sleep(POLL)
    return os.getpid()


def start_and_wait(context, folder, count):
    """Starts, and waits until as many tasks have."""
    (Path(folder) / f"started-{os.getpid()}").touch()
    return wait_for_start(context, folder, count)
