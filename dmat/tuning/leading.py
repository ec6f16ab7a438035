"""Runs a study: one command leads it, any number of others help. The leader has the MLflow run and writes the report.

The leader holds a claim, as for trials. If the leader has ended, a helper that finishes takes the claim over.
"""

import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dmat import ARTIFACTS, files, processes, redaction, tracking
from dmat.config import Params
from dmat.devices import Compute
from dmat.errors import DmatError
from dmat.pipeline import code_identity, execution, work_folder
from dmat.training.interruption import Interruption
from dmat.training.long_run import MetricsLog
from dmat.tuning import applying, ranking, report, storage, worker
from dmat.tuning.claims import Claims
from dmat.tuning.plan import CODE_STAGES, STAGE_NAME, STORAGE_VARIABLE, Study, changes_images
from dmat.tuning.storage import explain_storage_errors
from dmat.tuning.trials import TrialContext, trial_key
from dmat.workspace import Workspace

LEADER = "leader"
_STARTED = "DMAT_WORKER_OF_LEADER"  # environment of workers whose standard input ends when their starter ends
_LOOK_EVERY = 1.0  # seconds between two checks of the workers
_SHORT, _MAX_SHORT_RUNS = 20.0, 5  # seconds and times in a row: a worker that fails so fast, so often, always will
_RUN = "mlflow.run"  # attribute of a study: id of its MLflow run, for helpers that share no folder with the leader


@dataclasses.dataclass(frozen=True)
class StudyOptions:
    """Options of a command. total: trials of the study. workers: processes on this machine; 0: help in this process."""

    total: int
    workers: int = 1
    fresh: bool = False
    quiet: bool = False

    @property
    def helps(self) -> bool:
        return self.workers == 0


def run(plan: Study, params: Params, workspace: Workspace, options: StudyOptions) -> dict[str, Any]:
    """Runs or resumes a study until enough trials have ended and the best are ranked; returns its summary.

    Raises Interrupted on a signal, after saving the running trials, and DmatError on bad input or if the code is not
    that of code.yaml.
    """
    for stage_name in CODE_STAGES:
        code_identity.expect(stage_name, workspace.root)
    compute = execution.resolve(params)
    context = TrialContext(plan, params, workspace, compute, params.compute.save_every_seconds)
    if compute.world.size > 1 and changes_images(plan.settings.space):
        raise DmatError(
            f"the space of study {plan.name} changes images, which one process makes, and {compute.world.size} were "
            f"started; expected one for each worker; remove compute.processes and torchrun"
        )
    if not compute.world.is_main_process:
        worker.follow(context)
        return {}
    plan.folder.mkdir(parents=True, exist_ok=True)
    import torch._dynamo  # noqa: F401 - by the first optimiser; seconds that no trial should be charged with

    rdb = storage.connect(plan.storage)
    # Errors of the storage are explained for all access inside.
    with Interruption(at_once=True) as interruption, explain_storage_errors(plan.storage):
        claims = Claims(rdb.engine, plan.name)
        with claims:
            is_leader = not options.helps and claims.take(LEADER)
            if options.fresh:
                _start_over(plan, workspace, rdb, claims, is_leader)
            study = storage.begin(rdb, plan, claims)
            context = dataclasses.replace(context, study=study, claims=claims)
            check_interruption = interruption.raise_if_received
            if options.helps:
                _adopt(context)
                worker.work(context, options.total, check_interruption)
                return {}
            if not is_leader:
                if not options.quiet:
                    holder_name = claims.holder(LEADER) or "another process"
                    tqdm.write(f"study {plan.name} is led by {holder_name}; this command helps it")
                _adopt(context)
                _work(context, options, check_interruption, lambda: None)
                is_leader = claims.take(LEADER)
            if is_leader:
                with work_folder.lock(plan.folder):
                    if not _finished(context, options.total):
                        _lead(context, options, check_interruption)
                    files.publish(plan.folder / "result", workspace.at(f"{ARTIFACTS}/{STAGE_NAME}/{plan.settings.arm}"))
            return report.summary(plan, study)


def _lead(context: TrialContext, options: StudyOptions, check_interruption: Callable[[], None]) -> None:
    """Runs trials until enough have ended, and writes the report, as one tracked run."""
    plan, study = context.plan, context.study
    assert study is not None
    tracked = tracking.open_run(
        context.workspace.home,
        plan.folder,
        stage=STAGE_NAME,
        instance_name=plan.settings.arm,
        settings=plan.settings.plain(),
        inputs=plan.inputs,
        compute=context.compute.describe(),
        root=context.workspace.root,
        fingerprint=plan.fingerprint,
        tags={"optuna.study": plan.name, "optuna.storage": redaction.address(plan.storage)},
    )
    files.write_json(plan.folder / "study.json", plan.describe())
    bar = tqdm(total=options.total, unit=" trials", desc=f"tune {plan.settings.arm}", disable=options.quiet)
    with tracked, bar, MetricsLog(plan.folder / "metrics.jsonl") as log:

        def on_trial_end() -> None:
            """Writes all rows again: a killed process may have reported a trial to the study but not to this log, which
            ignores rows that it has."""
            for count, values in report.course(study):
                log.write(count, values)
            bar.update(len(storage.own_trials(storage.ended(study))) - bar.n)
            if (best := ranking.best(plan, study)) is not None:
                bar.set_postfix_str(report.in_words(best))

        on_trial_end()
        threading.Thread(target=_tell_run, args=(context, tracked), daemon=True).start()
        _work(context, options, check_interruption, on_trial_end)
        on_trial_end()
        summary, attachments = report.write(plan, study)
        tracked.describe(report.markdown(plan, study))
        tracked.finish_with(summary, attachments)
    files.write_json(plan.folder / "finished.json", {"trials": summary["trials"], "ranked": summary["ranked"]})


def _work(
    context: TrialContext,
    options: StudyOptions,
    check_interruption: Callable[[], None],
    on_trial_end: Callable[[], None],
) -> None:
    in_this_process = options.workers == 1 and context.params.compute.processes == 1
    if in_this_process or context.compute.world.size > 1:  # already under `torchrun`
        worker.work(context, options.total, check_interruption, on_trial_end)
    else:
        _start_workers(context, options, check_interruption, on_trial_end)


def _start_workers(
    context: TrialContext,
    options: StudyOptions,
    check_interruption: Callable[[], None],
    on_trial_end: Callable[[], None],
) -> None:
    """Keeps `options.workers` workers running until the study is done; a killed one is replaced."""
    assert context.study is not None
    pool = [_Process(context, options, number) for number in range(options.workers)]
    ended_count = -1
    try:
        while True:
            at_work = [process.at_work() for process in pool]  # a list, so that every killed one is started again
            if not any(at_work):
                break
            check_interruption()
            if (count := len(storage.ended(context.study))) != ended_count:
                ended_count = count
                on_trial_end()
            time.sleep(_LOOK_EVERY)
    finally:
        for process in pool:
            process.stop()
        for process in pool:
            process.wait()


class _Process:
    """One worker in a separate process (several under `torchrun`), which is started again after a kill."""

    def __init__(self, context: TrialContext, options: StudyOptions, number: int):
        self._context, self._number = context, number
        process_count = context.params.compute.processes
        launcher = [] if process_count == 1 else processes.launcher(process_count)
        arguments = ["-m", "cli.main", STAGE_NAME, "start", "--worker", "--trials", str(options.total)]
        arguments += ["--params", str(context.workspace.root / "params.yaml")]
        self._command = [sys.executable, *launcher, *arguments]
        self._short = 0
        self._start()

    def _start(self) -> None:
        self._since = time.monotonic()
        devices_of = _visible_device(self._context.compute, self._number, self._context.params)
        self._process = subprocess.Popen(
            self._command,
            cwd=self._context.workspace.root,
            env={
                **os.environ,
                **processes.OWN_MODULES,
                STORAGE_VARIABLE: self._context.plan.storage,
                _STARTED: "yes",
                **devices_of,
            },
            stdin=subprocess.PIPE,  # its end tells the worker that this process has ended
            stderr=subprocess.PIPE,
            start_new_session=True,  # so that a Ctrl-C reaches it once, from this process
            text=True,
        )
        self._stderr_lines: list[str] = []
        self._listener = threading.Thread(target=self._listen, args=(self._process.stderr,), daemon=True)
        self._listener.start()

    def _listen(self, stream: Any) -> None:
        for line in stream:
            self._stderr_lines = [*self._stderr_lines[-50:], line.rstrip()]

    def at_work(self) -> bool:
        """Whether the worker runs or was just started again. Raises DmatError if another start would not help."""
        code = self._process.poll()
        if code is None:
            return True
        if code == 0:
            return False
        self._listener.join(1)
        last_line = next((line for line in reversed(self._stderr_lines) if line), "no message")
        if code == 2:
            raise DmatError(last_line.removeprefix("error: "))
        self._short = self._short + 1 if time.monotonic() - self._since < _SHORT and code > 0 else 0
        if self._short >= _MAX_SHORT_RUNS:
            raise DmatError(
                f"a worker ended with code {code} {self._short} times in a row within {_SHORT:.0f} s ({last_line}); "
                f"expected it to run; `dmat tune start --worker --trials 1` shows what is wrong"
            )
        self._start()
        return True

    def stop(self) -> None:
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)

    def wait(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            self._process.communicate() if self._process.poll() is None else None


def end_with_starter() -> None:
    """In a worker that a leader started: stops it as by SIGTERM when the leader has ended for any reason."""
    if _STARTED not in os.environ:
        return

    def watch() -> None:
        with contextlib.suppress(OSError, ValueError):
            while os.read(0, 1024):
                pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def _visible_device(compute: Compute, number: int, params: Params) -> dict[str, str]:
    """Environment that gives each worker one GPU, round robin; a worker of several processes sees all GPUs."""
    if compute.device.type != "cuda" or params.compute.processes > 1:
        return {}
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = visible.split(",") if visible else [str(k) for k in range(torch.cuda.device_count())]
    return {"CUDA_VISIBLE_DEVICES": gpus[number % len(gpus)]}


def _start_over(plan: Study, workspace: Workspace, rdb: Any, claims: Claims, is_leader: bool) -> None:
    if not is_leader:
        raise DmatError(
            f"study {plan.name} is being computed by {claims.holder(LEADER) or 'another process'}; expected nobody at "
            f"work where --fresh sets it aside; stop that command first"
        )
    if (study := storage.find(rdb, plan.name)) is not None:
        for trial in study.get_trials(deepcopy=False):
            if (holder_name := claims.holder(trial_key(trial.number))) is not None:
                raise DmatError(
                    f"trial {trial.number} of study {plan.name} is being computed by {holder_name}; expected "
                    f"nobody at work where --fresh sets it aside; stop that worker first"
                )
        with work_folder.lock(plan.folder):
            storage.set_aside(rdb, study)
            work_folder.set_aside(plan.folder, workspace.home)
            claims.forget()
        claims.take(LEADER)


def _finished(context: TrialContext, total: int) -> bool:
    """Whether the report covers all trials, enough have ended, and nothing is left to rank."""
    assert context.study is not None
    path = context.plan.folder / "finished.json"
    record = files.read_json(path) if path.exists() else {"trials": 0, "ranked": []}
    ended = storage.ended(context.study)
    reported = record["trials"] == len(ended) and record["ranked"] == sorted(ranking.auto_attack_results(context.study))
    return reported and total <= len(storage.own_trials(ended)) and not ranking.missing(context.plan, context.study)


def _adopt(context: TrialContext) -> None:
    """Lets a helper without the leader's folder put its trials below the MLflow run of the leader, if that is known."""
    assert context.study is not None
    run = context.study.user_attrs.get(_RUN)
    if run:
        tracking.adopt(context.workspace.home, context.plan.folder, run, f"{STAGE_NAME} {context.plan.settings.arm}")


def _tell_run(context: TrialContext, tracked: tracking.Run) -> None:
    run = tracked.provenance()["mlflow_run"]
    if run and context.study is not None:
        with contextlib.suppress(Exception):  # only for other machines, which do not wait for it
            context.study.set_user_attr(_RUN, run)


def folder_of(plan: Study) -> Path:
    """Folder in which the report of a study is published."""
    return Path(ARTIFACTS) / STAGE_NAME / plan.settings.arm


def status(plan: Study) -> dict[str, Any]:
    """The summary so far, and the holder of each unfinished trial. Raises DmatError if the study does not exist."""
    rdb = storage.connect(plan.storage)
    with explain_storage_errors(plan.storage):
        study = _begun(plan, rdb)
        claims = Claims(rdb.engine, plan.name)
        at_work = [
            f"trial {trial.number}: {len(trial.intermediate_values)} reports, "
            f"{claims.holder(trial_key(trial.number)) or 'no worker; `dmat tune start` resumes it'}"
            for trial in study.get_trials(deepcopy=False)
            if not trial.state.is_finished()
        ]
        return {**report.summary(plan, study), "at_work": at_work}


def apply_best(path: Path, plan: Study, params: Params, name: str, seeds: list[int]) -> tuple[int, list[str]]:
    """Writes the best trial as an arm into the file. Returns its number and the written keys."""
    rdb = storage.connect(plan.storage)
    with explain_storage_errors(plan.storage):
        winner = ranking.best(plan, _begun(plan, rdb))
    if winner is None:
        raise DmatError(f"study {plan.name} has no complete trial; expected one; `dmat tune start` runs some")
    return winner.number, applying.apply(path, plan, params, winner, name, seeds)


def _begun(plan: Study, rdb: Any) -> Any:
    study = storage.find(rdb, plan.name)
    if study is None:
        raise DmatError(
            f"study {plan.name} was not begun in {plan.describe()['storage']}; expected one of these settings and "
            f"data; start it with `dmat tune start`, or say with --storage where it is"
        )
    return study
