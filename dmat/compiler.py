"""torch.compile: the only place that compiles a model.

Compiled graphs fuse what stands between convolutions and matrix products, and round sums otherwise than eager ones.
Who compiles therefore records it beside the result. Shapes are static, so that the same call always runs the same code.
"""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import torch
from torch import nn

from dmat.errors import DmatError

_BACKEND = "inductor"
_CACHE = "TORCHINDUCTOR_CACHE_DIR"  # torch reads it at every compilation


def compiled(model: nn.Module, *, fullgraph: bool = False) -> nn.Module:
    """Returns a module that runs `model` compiled. They share parameters, buffers and mode.

    Compilation happens in the first call of each kind: wrap that call in `errors`. fullgraph: raise an error where
    parts of the model, or all of it after many kinds of calls, would run eagerly. Graphs of models that were compiled
    before are dropped.
    """
    torch.compiler.reset()  # torch counts the graphs of all models with the same code, up to a limit
    return cast(nn.Module, torch.compile(model, backend=_BACKEND, dynamic=False, fullgraph=fullgraph))


@contextlib.contextmanager
def cache(folder: Path) -> Iterator[None]:
    """Keeps what is compiled inside the block in `folder`, and takes from there what an earlier process compiled."""
    before = os.environ.get(_CACHE)
    os.environ[_CACHE] = str(folder)
    try:
        yield
    finally:
        del os.environ[_CACHE]
        if before is not None:
            os.environ[_CACHE] = before


@contextlib.contextmanager
def errors(setting: str, advice: str) -> Iterator[None]:
    """Turns errors of the compiler inside the block into a DmatError.

    setting: what compiles, such as "compile is true". advice: how to do without, such as "write compile: false".
    """
    try:
        yield
    except RuntimeError as error:
        if shutil.which(os.environ.get("CXX", "g++")) is None:
            raise DmatError(
                f"{setting}, and torch cannot compile the model ({type(error).__name__}); expected a C++ compiler; "
                f"install g++, or {advice}"
            ) from error
        if isinstance(error, torch._dynamo.exc.TorchDynamoException):
            raise DmatError(
                f"{setting}, and torch cannot compile the model ({str(error).splitlines()[0]}); expected a model "
                f"that it can compile; {advice}"
            ) from error
        raise
