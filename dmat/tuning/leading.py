"""Runs a study: one command leads it, any number help. The leading one has the study's MLflow run and its report.

Leading is a claim like a trial's: where the leader is gone, a helper that finishes takes it over.
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
from dmat.tuning.plan import CODE, VARIABLE, WORD, Study, changes_images
from dmat.tuning.storage import speaking
from dmat.tuning.trials import TrialContext, trial_key
from dmat.workspace import Workspace

LEADER = "leader"
_STARTED = "DMAT_WORKER_OF_LEADER"  # environment of workers whose standard input ends with who started them
_LOOK_EVERY = 1.0  # seconds between two looks at the workers
_SHORT, _MOST_SHORT = 20.0, 5  # a worker that ends within so many seconds, so many times in a row, will always
_RUN = "mlflow.run"  # attribute of a study: its run in MLflow, for helpers that share no folder with the leader


@dataclasses.dataclass(frozen=True)
class StudyOptions:
    """What a command asks for. total: trials in all. workers: processes on this machine; 0: help, in this process."""

    total: int
    workers: int = 1
    fresh: bool = False
    quiet: bool = False

    @property
    def helps(self) -> bool:
        return self.workers == 0


def run(plan: Study, params: Params, workspace: Workspace, options: StudyOptions) -> dict[str, Any]:
    """Runs or resumes a study until enough trials have ended and the best are ranked; returns its summary.

    Raises Interrupted on a signal, with the trials at work saved, and DmatError on bad input and on other code than
    code.yaml names.
    """
    for stage_name in CODE:
        code_identity.expect(stage_name, workspace.root)
    compute = execution.resolve(params)
    context = TrialContext(plan, params, workspace, compute, params.compute.save_every_seconds)
    if compute.world.size > 1 and changes_images(plan.settings.space):
        raise DmatError(
            f"the space of study {plan.name} changes images, which one process makes, and {compute.world.size} were "
            f"started; expected one for each worker; leave compute.processes and torchrun out"
        )
    if not compute.world.is_main_process:
        worker.follow(context)
        return {}
    plan.folder.mkdir(parents=True, exist_ok=True)
    import torch._dynamo  # noqa: F401 - by the first optimiser; seconds that no trial should be charged with

    rdb = storage.connect(plan.storage)
    with Interruption(at_once=True) as interruption, speaking(plan.storage):  # whatever speaks to it inside
        claims = Claims(rdb.engine, plan.name)
        with claims:
            leads = not options.helps and claims.take(LEADER)
            if options.fresh:
                _start_over(plan, workspace, rdb, claims, leads)
            study = storage.begin(rdb, plan, claims)
            context = dataclasses.replace(context, study=study, claims=claims)
            asked = interruption.raise_if_asked
            if options.helps:
                _adopt(context)
                worker.work(context, options.total, asked)
                return {}
            if not leads:
                if not options.quiet:
                    who = claims.holder(LEADER) or "another process"
                    tqdm.write(f"study {plan.name} is led by {who}; this command helps it")
                _adopt(context)
                _work(context, options, asked, lambda: None)
                leads = claims.take(LEADER)
            if leads:
                with work_folder.lock(plan.folder):
                    if not _finished(context, options.total):
                        _lead(context, options, asked)
                    files.publish(plan.folder / "result", workspace.at(f"{ARTIFACTS}/{WORD}/{plan.settings.arm}"))
            return report.summary(plan, study)


def _lead(context: TrialContext, options: StudyOptions, asked: Callable[[], None]) -> None:
    """Runs trials until enough have ended, and reports, as one tracked run."""
    plan, study = context.plan, context.study
    assert study is not None
    tracked = tracking.open_run(
        context.workspace.home,
        plan.folder,
        stage=WORD,
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

        def after() -> None:
            """A killed process may have told the study of a trial and not this log, which drops what it has."""
            for count, values in report.course(study):
                log.write(count, values)
            bar.update(len(storage.own(storage.ended(study))) - bar.n)
            if (best := ranking.best(plan, study)) is not None:
                bar.set_postfix_str(report.in_words(best))

        after()
        threading.Thread(target=_tell_run, args=(context, tracked), daemon=True).start()
        _work(context, options, asked, after)
        after()
        summary, attachments = report.write(plan, study)
        tracked.describe(report.markdown(plan, study))
        tracked.finish_with(summary, attachments)
    files.write_json(plan.folder / "finished.json", {"trials": summary["trials"], "ranked": summary["ranked"]})


def _work(context: TrialContext, options: StudyOptions, asked: Callable[[], None], after: Callable[[], None]) -> None:
    in_one = options.workers == 1 and context.params.compute.processes == 1
    if in_one or context.compute.world.size > 1:  # already under `torchrun`
        worker.work(context, options.total, asked, after)
    else:
        _start_workers(context, options, asked, after)


def _start_workers(
    context: TrialContext, options: StudyOptions, asked: Callable[[], None], after: Callable[[], None]
) -> None:
    """Keeps so many workers alive until the study is done; one that was killed is replaced."""
    assert context.study is not None
    pool = [_Process(context, options, number) for number in range(options.workers)]
    seen = -1
    try:
        while True:
            at_work = [one.at_work() for one in pool]  # each is looked at: a killed one is started again
            if not any(at_work):
                break
            asked()
            if (count := len(storage.ended(context.study))) != seen:
                seen = count
                after()
            time.sleep(_LOOK_EVERY)
    finally:
        for one in pool:
            one.stop()
        for one in pool:
            one.wait()


class _Process:
    """One worker: a process of its own (with several under `torchrun`), started again where it was killed."""

    def __init__(self, context: TrialContext, options: StudyOptions, number: int):
        self._bench, self._number = context, number
        together = context.params.compute.processes
        launcher = [] if together == 1 else processes.launcher(together)
        words = ["-m", "cli.main", WORD, "start", "--worker", "--trials", str(options.total)]
        words += ["--params", str(context.workspace.root / "params.yaml")]
        self._command = [sys.executable, *launcher, *words]
        self._short = 0
        self._start()

    def _start(self) -> None:
        self._since = time.monotonic()
        devices_of = _visible_device(self._bench.compute, self._number, self._bench.params)
        self._process = subprocess.Popen(
            self._command,
            cwd=self._bench.workspace.root,
            env={
                **os.environ,
                **processes.OWN_MODULES,
                VARIABLE: self._bench.plan.storage,
                _STARTED: "yes",
                **devices_of,
            },
            stdin=subprocess.PIPE,  # its end tells the worker that nobody waits for it any more
            stderr=subprocess.PIPE,
            start_new_session=True,  # a Ctrl-C reaches it once, from here
            text=True,
        )
        self._said: list[str] = []
        self._listener = threading.Thread(target=self._listen, args=(self._process.stderr,), daemon=True)
        self._listener.start()

    def _listen(self, stream: Any) -> None:
        for line in stream:
            self._said = [*self._said[-50:], line.rstrip()]

    def at_work(self) -> bool:
        """Whether it computes or was just started again. Raises DmatError where that would not help."""
        code = self._process.poll()
        if code is None:
            return True
        if code == 0:
            return False
        self._listener.join(1)
        said = next((line for line in reversed(self._said) if line), "it said nothing")
        if code == 2:
            raise DmatError(said.removeprefix("error: "))
        self._short = self._short + 1 if time.monotonic() - self._since < _SHORT and code > 0 else 0
        if self._short >= _MOST_SHORT:
            raise DmatError(
                f"a worker ended with code {code} {self._short} times in a row within {_SHORT:.0f} s ({said}); "
                f"expected it to work; `dmat tune start --worker --trials 1` shows what is wrong"
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
    """In a worker that a leader started: stops as by SIGTERM when that is gone, however it ended."""
    if _STARTED not in os.environ:
        return

    def watch() -> None:
        with contextlib.suppress(OSError, ValueError):
            while os.read(0, 1024):
                pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def _visible_device(compute: Compute, number: int, params: Params) -> dict[str, str]:
    """One GPU for each worker in turn; a worker of several processes sees all."""
    if compute.device.type != "cuda" or params.compute.processes > 1:
        return {}
    import torch

    known = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = known.split(",") if known else [str(k) for k in range(torch.cuda.device_count())]
    return {"CUDA_VISIBLE_DEVICES": gpus[number % len(gpus)]}


def _start_over(plan: Study, workspace: Workspace, rdb: Any, claims: Claims, leads: bool) -> None:
    if not leads:
        raise DmatError(
            f"study {plan.name} is being computed by {claims.holder(LEADER) or 'another process'}; expected nobody at "
            f"work where --fresh sets it aside; stop that command first"
        )
    if (study := storage.find(rdb, plan.name)) is not None:
        for trial in study.get_trials(deepcopy=False):
            if (who := claims.holder(trial_key(trial.number))) is not None:
                raise DmatError(
                    f"trial {trial.number} of study {plan.name} is being computed by {who}; expected nobody at work "
                    f"where --fresh sets it aside; stop that worker first"
                )
        with work_folder.lock(plan.folder):
            storage.set_aside(rdb, study)
            work_folder.set_aside(plan.folder, workspace.home)
            claims.forget()
        claims.take(LEADER)


def _finished(context: TrialContext, total: int) -> bool:
    """Whether a report of all trials is there already and nothing more is wanted."""
    assert context.study is not None
    path = context.plan.folder / "finished.json"
    note = files.read_json(path) if path.exists() else {"trials": 0, "ranked": []}
    ended = storage.ended(context.study)
    reported = note["trials"] == len(ended) and note["ranked"] == sorted(ranking.found(context.study))
    return reported and total <= len(storage.own(ended)) and not ranking.missing(context.plan, context.study)


def _adopt(context: TrialContext) -> None:
    """A helper without the leader's folder puts its trials below the leader's run, if that is known."""
    assert context.study is not None
    run = context.study.user_attrs.get(_RUN)
    if run:
        tracking.adopt(context.workspace.home, context.plan.folder, run, f"{WORD} {context.plan.settings.arm}")


def _tell_run(context: TrialContext, tracked: tracking.Run) -> None:
    run = tracked.provenance()["mlflow_run"]
    if run and context.study is not None:
        with contextlib.suppress(Exception):  # for other machines alone; they wait for nothing
            context.study.set_user_attr(_RUN, run)


def folder_of(plan: Study) -> Path:
    """Where a study's report is published."""
    return Path(ARTIFACTS) / WORD / plan.settings.arm


def status(plan: Study) -> dict[str, Any]:
    """The summary so far, and who is at work on which trial. Raises DmatError if the study was not begun."""
    rdb = storage.connect(plan.storage)
    with speaking(plan.storage):
        study = _begun(plan, rdb)
        claims = Claims(rdb.engine, plan.name)
        at_work = [
            f"trial {one.number}: {len(one.intermediate_values)} reports, "
            f"{claims.holder(trial_key(one.number)) or 'nobody at work; it goes on with `dmat tune start`'}"
            for one in study.get_trials(deepcopy=False)
            if not one.state.is_finished()
        ]
        return {**report.summary(plan, study), "at_work": at_work}


def apply_best(path: Path, plan: Study, params: Params, name: str, seeds: list[int]) -> tuple[int, list[str]]:
    """Number of the best trial, now an arm of the file, and the keys written."""
    rdb = storage.connect(plan.storage)
    with speaking(plan.storage):
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
