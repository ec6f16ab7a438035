"""What all workers of xdist share: the first that needs it builds it, and the others wait for it."""

import os
from collections.abc import Callable
from pathlib import Path

import filelock
import pytest


def folder(temporary: pytest.TempPathFactory, name: str, build: Callable[[Path], object]) -> Path:
    """The folder that `build` filled, once in this session. Nobody writes into it afterwards."""
    base = temporary.getbasetemp()
    pointer = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / f"{name}.path"
    with filelock.FileLock(f"{pointer}.lock"):
        if not pointer.exists():
            built = temporary.mktemp(name)
            build(built)
            pointer.write_text(str(built), encoding="utf-8")
    return Path(pointer.read_text(encoding="utf-8"))
