"""Stage commands in separate processes, without the seconds that importing torch takes: a server process imports
everything once and forks for each command."""

import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

LIMIT = 600.0  # seconds until a wait fails: a machine may be ten times busier than it has cores
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.forked_preload"])


def _command(folder: str, arguments: list[str], output: str, environment: dict[str, str]) -> None:
    import torch

    from cli.main import main

    os.chdir(folder)
    os.environ.update(environment)
    torch.set_num_threads(1)
    handle = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    sys.argv = ["dmat", *arguments]
    main()


class Command:
    """`dmat <arguments>` running in a folder; it can be killed or sent signals."""

    def __init__(self, folder: Path, *arguments: str, output: str = ".output", **environment: str):
        self._output = folder / output
        process_arguments = (str(folder), list(arguments), str(self._output), {"DMAT_TRACKING": "off", **environment})
        self.process = _context.Process(target=_command, args=process_arguments)
        self.process.start()

    def kill_after(self, seconds: float) -> bool:
        """Kills with -9 after some time; returns whether the command was still running."""
        self.process.join(seconds)
        was_running = self.process.exitcode is None
        self.process.kill()
        self.process.join()
        return was_running

    def signal(self, number: int) -> None:
        os.kill(self.process.pid, number)

    def wait(self, seconds: float = LIMIT) -> tuple[int, str]:
        """Waits for the end; returns exit code and output."""
        self.process.join(seconds)
        if self.process.exitcode is None:
            self.process.kill()
            raise TimeoutError(self._output.read_text())
        return self.process.exitcode, self._output.read_text()


def run(folder: Path, *arguments: str, **environment: str) -> tuple[int, str]:
    """Runs `dmat <arguments>` to its end; returns exit code and output."""
    return Command(folder, *arguments, **environment).wait()


def until(condition: Callable[[], object], limit: float = LIMIT) -> None:
    """Waits until a condition holds; fails after `limit` seconds."""
    deadline = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)
