"""Stage commands in processes of their own without the seconds that importing torch takes: a server process imports
everything once and forks for each command."""

import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.forked_preload"])


def _command(folder: str, words: list[str], output: str, environment: dict[str, str]) -> None:
    import torch

    from cli.main import main

    os.chdir(folder)
    os.environ.update(environment)
    torch.set_num_threads(1)
    handle = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    sys.argv = ["dmat", *words]
    main()


class Command:
    """`dmat <words>` in a folder, started; may be killed or sent signals."""

    def __init__(self, folder: Path, *words: str, output: str = ".output", **environment: str):
        self._output = folder / output
        arguments = (str(folder), list(words), str(self._output), {"DMAT_TRACKING": "off", **environment})
        self.process = _context.Process(target=_command, args=arguments)
        self.process.start()

    def kill_after(self, seconds: float) -> bool:
        """Kills with -9 after some time; whether the command was still at work."""
        self.process.join(seconds)
        at_work = self.process.exitcode is None
        self.process.kill()
        self.process.join()
        return at_work

    def signal(self, number: int) -> None:
        os.kill(self.process.pid, number)

    def wait(self, seconds: float = 300) -> tuple[int, str]:
        """Exit code and everything printed."""
        self.process.join(seconds)
        if self.process.exitcode is None:
            self.process.kill()
            raise TimeoutError(self._output.read_text())
        return self.process.exitcode, self._output.read_text()


def run(folder: Path, *words: str, **environment: str) -> tuple[int, str]:
    """`dmat <words>` to its end."""
    return Command(folder, *words, **environment).wait()


def until(happened: Callable[[], object], seconds: float = 60) -> None:
    """Waits for something to happen."""
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)
