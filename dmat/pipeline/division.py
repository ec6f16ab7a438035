"""Divides the shards of one instance over the workers of an engine.

The driver, which is the command of the stage, asks for one task per shard and computes nothing itself. A worker plans
the same instance and refuses if its plan is another one. It leaves the shard where every run of the stage finds it, so
that the driver then only publishes. What a shard holds does not depend on who computed it.
"""

import contextlib
import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from dmat import config, devices
from dmat.config import Params
from dmat.devices import Compute
from dmat.engine import EngineOptions, Outcome, Task, TaskContext, open_engine
from dmat.errors import DmatError
from dmat.evaluation.work import Monitor, progress_bar
from dmat.job import Job
from dmat.pipeline import execution, planning
from dmat.pipeline.planning import Plan
from dmat.pipeline.stages import STAGES
from dmat.training.interruption import Interruption
from dmat.workspace import Instance, Workspace

_TIME_TO_SAVE = 2.0  # seconds: a shard that is not complete leaves nothing


@dataclasses.dataclass(frozen=True)
class WorkerCompute:
    """Device, precision and threads as the driver resolved them, and its version of torch: what a worker must have."""

    device: str  # "cpu" or "cuda"
    precision: str
    reason: str
    threads: int
    torch: str

    @classmethod
    def of(cls, compute: Compute) -> "WorkerCompute":
        """What a worker needs to compute as this process would."""
        return cls(compute.device.type, compute.precision, compute.reason, compute.threads, torch.__version__)

    def resolve(self) -> Compute:
        """The same on this machine. Raises DmatError if it lacks the device or has another torch."""
        if torch.__version__ != self.torch:
            raise DmatError(
                f"a worker on {os.uname().nodename} has torch {torch.__version__}, the driver {self.torch}; expected "
                f"the same, because results could differ; install it there"
            )
        torch.backends.cudnn.allow_tf32 = True  # torch's default; an earlier task of this process may be in float32
        compute = devices.resolve(self.device, self.precision, self.threads)
        return dataclasses.replace(compute, reason=self.reason)


@dataclasses.dataclass(frozen=True)
class _ShardRequest:
    """Of which instance a worker computes a shard, and how."""

    workspace: Workspace
    params: str  # path of the parameter file
    stage: str
    instance: Instance
    fingerprint: str
    compute: WorkerCompute
    fresh: bool


def with_threads_divided(params: Params, options: EngineOptions) -> Params:
    """The parameters with the number of threads that each of several local workers gets, if they do not state it."""
    if options.workers < 2 or params.compute.threads:
        return params
    threads = max(1, len(os.sched_getaffinity(0)) // options.workers)
    return dataclasses.replace(params, compute=params.compute.model_copy(update={"threads": threads}))


def gpu_environments() -> tuple[Mapping[str, str], ...]:
    """The variables that give each worker one GPU of this machine; no variables without a GPU."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = visible.split(",") if visible else [str(number) for number in range(torch.cuda.device_count())]
    return tuple({"CUDA_VISIBLE_DEVICES": gpu} for gpu in gpus) or ({},)


def compute_shards(plan: Plan, job: Job, workspace: Workspace, path: Path, options: EngineOptions) -> None:
    """Computes the shards of an instance in workers. path: of the parameter file. Raises what `run_tasks` raises."""
    request = _ShardRequest(
        workspace, str(path.resolve()), plan.stage.name, plan.instance, plan.fingerprint,
        WorkerCompute.of(job.compute), job.fresh,
    )  # fmt: skip
    title = f"{plan.stage.name} {plan.stage.instance_name(plan.instance)}"
    stage_job = plan.stage.job
    numbers = stage_job.pending_shards(plan.settings, job)
    monitor = stage_job.monitor(plan.settings, job) if hasattr(stage_job, "monitor") and not job.quiet else None
    run_tasks(
        [Task(f"shard {number} of {title}", _compute_shard, (request, number)) for number in numbers],
        options,
        label=plan.stage.name,
        quiet=job.quiet,
        monitor=monitor,
    )


def run_tasks(
    tasks: Sequence[Task], options: EngineOptions, *, label: str, quiet: bool, monitor: Monitor | None = None
) -> None:
    """Runs one task per shard. label: of the progress bar; none if `quiet`. monitor: shows the work inside the shards;
    None: the bar counts shards.

    Raises the first error of a task, and Interrupted on a signal. The other tasks are then stopped.
    """
    if not tasks:
        return
    waiting = iter(tasks)
    options = dataclasses.replace(options, time_to_save=_TIME_TO_SAVE, environments=gpu_environments())

    def on_outcome(outcome: Outcome) -> None:
        if outcome.error is not None:
            raise outcome.error
        shard_ended()

    def on_lost(task: Task) -> None:
        tqdm.write(f"note: {task.name} lost its worker, and runs again")

    def check() -> None:
        interruption.raise_if_received()
        show()

    with Interruption() as interruption, contextlib.ExitStack() as stack, open_engine(options) as engine:
        show, shard_ended = _bar(stack, len(tasks), label, quiet, monitor)
        engine.run(lambda: next(waiting, None), on_outcome=on_outcome, on_lost=on_lost, check_interruption=check)


def _bar(
    stack: contextlib.ExitStack, count: int, label: str, quiet: bool, monitor: Monitor | None
) -> tuple[Callable[[], None], Callable[[], object]]:
    """A progress bar until the end of the stack: what to call often, and what to call when one of `count` shards has
    ended."""
    if monitor is not None:
        show = stack.enter_context(progress_bar(monitor, label, quiet))
        return show, show
    bar = stack.enter_context(tqdm(total=count, unit=" shards", desc=label, disable=quiet, dynamic_ncols=True))
    return lambda: None, bar.update


def _compute_shard(context: TaskContext, request: _ShardRequest, number: int) -> None:
    """Computes one shard in a worker."""
    path, stage = Path(request.params), STAGES[request.stage]
    if not path.is_file():
        raise DmatError(
            f"a worker on {os.uname().nodename} finds no {path}; expected the folder of the project at the same path "
            f"on every machine; mount it there"
        )
    params = config.load(path, request.workspace.root)
    plan = planning.plan(stage, request.instance, params, request.workspace)
    if plan.fingerprint != request.fingerprint:
        raise DmatError(
            f"a worker on {os.uname().nodename} would compute {stage.name} {stage.instance_name(plan.instance)} from "
            f"other parameters or inputs than the driver; expected no change until it ended; run the same command again"
        )
    compute = request.compute.resolve()
    execution.run_shards(
        plan, params, request.workspace, range(number, number + 1), quiet=True, compute=compute, fresh=request.fresh
    )
