"""Whether the steps of a training are compiled: decided once, before a fixed step, and recorded in every checkpoint.

compute.compile says "on", "off" or "auto". Auto measures passes that leave no trace in the training: it compiles a long
run if compiled passes are faster. What it decided is part of the run, as compiled steps round otherwise: a resumed run
does the same and refuses "on" or "off" if they say otherwise.
"""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator

import torch
from torch import nn
from tqdm import tqdm

from dmat import compiler
from dmat.devices import Compute
from dmat.errors import DmatError
from dmat.training.long_run import LongRun

EAGER_STEPS = 3  # at the start of each run: warm-up before measuring; batch norm's momentum changes after the first
CACHE = "compiled"  # folder in the work folder; a resumed run takes its graphs from there
_LEAST_REMAINING = 1800.0  # seconds of eager steps that pay for minutes of compiling; choice, see docs/parameters.md
_LEAST_SPEEDUP = 1.05  # below it a second numerics is not worth it; choice
_REPEATS = 2  # timed passes of each kind; the fastest counts

Pass = Callable[[nn.Module], object]  # forward and backward passes of a step, through a module that runs the model


@dataclasses.dataclass(frozen=True)
class Measured:
    """What auto measured, in seconds; compiled.json holds it. None: not measured."""

    compiled: bool
    reason: str  # for people
    eager_pass: float
    remaining: float  # of eager steps
    compiled_pass: float | None = None
    compilation: float | None = None


class Compilation:
    """Gives a training the module that runs its model: the model itself, or compiled from step `EAGER_STEPS` on."""

    def __init__(self, model: nn.Module, run: LongRun, compute: Compute):
        """Call it after run.resume(). Raises DmatError if compute.compile is not what the run was begun with."""
        self._model, self._run, self._compute = model, run, compute
        self._compiled: nn.Module | None = None
        if compute.compile == "auto" or run.compiled is None or run.compiled == (compute.compile == "on"):
            return
        before, now = ("with", "without") if run.compiled else ("without", "with")
        raise DmatError(
            f"{run.path} was computed {before} torch.compile, this run would resume {now} it; results would mix: set "
            f"compile: {'on' if run.compiled else 'off'}, or start over with --fresh"
        )

    def due(self, step: int) -> bool:
        """Whether to call `prepare` before this step."""
        return step >= EAGER_STEPS and (self._run.compiled is None or (self._run.compiled and self._compiled is None))

    def prepare(self, one_pass: Pass, steps: int) -> None:
        """Decides if nothing was decided before, and compiles. Weights, gradients and random numbers do not change.

        steps: that remain. Raises DmatError if compute.compile is "on" and the model does not compile.
        """
        decided = self._run.compiled
        with _without_trace(self._model, self._compute):
            if decided is None and self._compute.compile == "auto":
                measured = self._measure(one_pass, steps)
                self._run.save_json("compiled.json", dataclasses.asdict(measured))
                self._run.compiled = measured.compiled
                self._run.save_soon()  # a restart then does not measure again, and decide otherwise
                if measured.compilation is not None:
                    tqdm.write(f"note: {measured.reason}")
            elif decided or self._compute.compile == "on":
                self._compile(one_pass)
                self._run.compiled = True
            else:
                self._run.compiled = False

    def module(self, step: int) -> nn.Module:
        """Returns what runs the model in this step."""
        return self._model if self._compiled is None or step < EAGER_STEPS else self._compiled

    def _measure(self, one_pass: Pass, steps: int) -> Measured:
        """Measures eager passes and, if they predict a long run of one process, compiled ones."""
        if self._compute.world.size > 1:  # which would have to agree about a time
            return Measured(False, "several processes compile only with compile: on", 0.0, 0.0)
        eager = self._seconds(one_pass, self._model)
        remaining = eager * steps
        if remaining < _LEAST_REMAINING:
            return Measured(False, f"too short: {remaining:.0f} s remain uncompiled", eager, remaining)
        started = time.monotonic()
        try:
            self._compile(one_pass)
        except (DmatError, RuntimeError) as error:
            return Measured(False, f"not compiled: {str(error).splitlines()[0]}", eager, remaining)
        compilation = time.monotonic() - started
        assert self._compiled is not None
        compiled = self._seconds(one_pass, self._compiled)
        faster = eager > _LEAST_SPEEDUP * compiled
        if not faster:
            self._compiled = None
        reason = f"a pass takes {eager:.3g} s, compiled {compiled:.3g} s; steps are {'' if faster else 'not '}compiled"
        return Measured(faster, reason, eager, remaining, compiled, compilation)

    def _compile(self, one_pass: Pass) -> None:
        """Compiles all that a step calls, or takes it from the work folder."""
        module = compiler.compiled(self._model, fullgraph=True)
        with compiler.cache(self._run.path.parent / CACHE), compiler.errors("compile is on", "set compile: off"):
            one_pass(module)
        self._compiled = module

    def _seconds(self, one_pass: Pass, module: nn.Module) -> float:
        """Times passes, in seconds each."""
        times = []
        for _ in range(_REPEATS):
            self._compute.synchronise()
            started = time.perf_counter()
            one_pass(module)
            self._compute.synchronise()
            times.append(time.perf_counter() - started)
        return min(times)


@contextlib.contextmanager
def _without_trace(model: nn.Module, compute: Compute) -> Iterator[None]:
    """Restores buffers (running statistics) and random numbers after the block, and drops gradients."""
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    devices = [compute.device] if compute.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        for buffer, before in buffers:
            buffer.copy_(before)
        model.zero_grad(set_to_none=True)
