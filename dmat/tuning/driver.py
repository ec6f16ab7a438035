"""The driver of a study: it alone asks, takes reports, decides on pruning and tells. Trials are tasks of the engine.

One driver per study folder: it holds the folder's lock. A driver that follows a killed one takes over its running
trials at once, with their numbers. Drivers of other folders and machines share a study through its storage by Optuna's
heartbeats: a trial without a sign of life is queued again under a new number.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState, create_trial
from tqdm import tqdm

from dmat.engine import Engine, Outcome, Task
from dmat.errors import Interrupted
from dmat.tuning import driver_identity, rank_task, ranking, sampling, space, storage, trials
from dmat.tuning.plan import MAX_LOST_WORKERS
from dmat.tuning.trials import TrialContext, TrialOutcome, TrialTask

_LOST = "workers_killed"  # attribute of a trial
_LOOK_EVERY = 1.0  # seconds between two looks at the trials of other drivers


class Driver:
    """Computes the trials of a study until `total` have ended, and ranks the best.

    in_process: trials run in this process, so that a trial that kills its process kills the driver.
    on_trial_end: called when a trial has ended. quiet: no progress bar of the ranking.
    """

    def __init__(
        self,
        context: TrialContext,
        study: optuna.Study,
        rdb: RDBStorage,
        total: int,
        in_process: bool,
        on_trial_end: Callable[[], None],
        quiet: bool,
    ):
        self._plan, self._study, self._rdb, self._total = context.plan, study, rdb, total
        self._quiet = quiet
        self._context = context.for_workers
        self._in_process, self._on_trial_end = in_process, on_trial_end
        self._study_id = rdb.get_study_id_from_name(study.study_name)
        self._identity = driver_identity.of_this_process(context.plan.folder)
        running = study.get_trials(deepcopy=False, states=[TrialState.RUNNING])
        # Number -> trial; at first those that an earlier driver of this folder left. They wait in `_left`.
        self._running = {
            trial.number: trial for trial in running if driver_identity.is_of_folder(trial, context.plan.folder)
        }
        self._left = list(self._running)
        self._lost: dict[int, int] = {}  # number -> killed workers
        self._others = set[int]()  # numbers of trials of other drivers

    def run(self, engine: Engine, check_interruption: Callable[[], None]) -> None:
        """Returns when enough trials have ended, here or in other drivers, and the best are ranked.

        Raises Interrupted and DmatError after the running trials were saved.
        """
        with storage.heartbeats(self._rdb, self._running), self._saving_counts():
            while True:
                engine.run(
                    self._next_task,
                    on_outcome=self._end,
                    on_message=self._judge,
                    on_lost=self._count_lost,
                    check_interruption=check_interruption,
                )
                if self._all_ended():
                    break
                check_interruption()
                self._context.compute.world.broadcast(trials.NO_TRIAL)
                time.sleep(_LOOK_EVERY)
        self._context.compute.world.broadcast(b"")
        self._rank(engine, check_interruption)
        self._on_trial_end()

    def _all_ended(self) -> bool:
        own = storage.own_trials(storage.current_trials(self._study))
        return len(own) >= self._total and all(trial.state.is_finished() for trial in own)

    def _next_task(self) -> Task | None:
        trial = self._next_trial()
        if trial is None:
            return None
        self._rdb.set_trial_user_attr(trial._trial_id, driver_identity.ATTRIBUTE, self._identity)
        self._running[trial.number] = trial
        self._lost[trial.number] = lost_workers = trial.user_attrs.get(_LOST, 0)
        if self._in_process:  # in case that it kills this process
            self._rdb.set_trial_user_attr(trial._trial_id, _LOST, lost_workers + 1)
        task = TrialTask(trial.number, self._with_all_values(trial), self._folder_of(trial), lost_workers)
        return Task(f"trial {trial.number}", trials.run, (self._context, task))

    def _next_trial(self) -> FrozenTrial | None:
        """A running trial that an earlier driver of this folder left, else a waiting one, else a new one if fewer than
        `total` exist. Its state is RUNNING."""
        for trial in self._running.values():  # this machine may have slept
            self._rdb.record_heartbeat(trial._trial_id)
        while self._left:
            trial = self._rdb.get_trial(self._running.pop(self._left.pop(0))._trial_id)
            if trial.state == TrialState.RUNNING:  # no other driver repeats it
                return trial
        optuna.storages.fail_stale_trials(self._study)  # a waiting trial then takes the place of each
        current, at_work = storage.current_trials(self._study), self._running.keys() | self._others
        for trial in current:
            if trial.state == TrialState.RUNNING and trial.number not in at_work:
                self._rdb.record_heartbeat(trial._trial_id)  # its driver may have been killed before the first one
                self._others.add(trial.number)
        for trial in current:
            if trial.state == TrialState.WAITING:
                # The heartbeat comes first: wherever this process is killed, the trial can be found again.
                self._rdb.record_heartbeat(trial._trial_id)
                if self._rdb.set_trial_state_values(trial._trial_id, TrialState.RUNNING):  # no driver was quicker
                    return self._rdb.get_trial(trial._trial_id)
        if len(storage.own_trials(current)) >= self._total:
            return None
        template = create_trial(state=TrialState.RUNNING, user_attrs={driver_identity.ATTRIBUTE: self._identity})
        trial_id = self._rdb.create_new_trial(self._study_id, template)
        self._rdb.record_heartbeat(trial_id)
        return self._rdb.get_trial(trial_id)

    def _with_all_values(self, trial: FrozenTrial) -> dict[str, Any]:
        """The values of a trial, after the storage has those that it lacked: `points` first, then proposals.

        The number, which only the storage can give, comes first, so that no two drivers compute the same values.
        """
        plan, search_space, values = self._plan, space.distributions(self._plan), dict(trial.params)
        if search_space.keys() > values.keys():
            others = [other for other in storage.current_trials(self._study) if other.number != trial.number]
            count = sum(other.number < trial.number for other in storage.own_trials(others))
            points = plan.points
            proposal = (
                points[count] if count < len(points) else sampling.propose(plan.settings, search_space, others, count)
            )
            for name, distribution in search_space.items():
                if name not in values:
                    internal = distribution.to_internal_repr(proposal[name])
                    self._rdb.set_trial_param(trial._trial_id, name, internal, distribution)
        return {name: self._rdb.get_trial(trial._trial_id).params[name] for name in search_space}

    def _judge(self, task: Task, message: dict[str, Any]) -> dict[str, Any]:
        """Writes the report of a trial into the study. The answer is the verdict on it."""
        frozen = self._running[_number_of(task)]
        trial = optuna.Trial(self._study, frozen._trial_id)
        images_seen = message["images_seen"]
        with storage.explain_storage_errors(self._plan.storage):
            try:
                if images_seen not in frozen.intermediate_values:  # a resumed trial repeats its last report
                    trial.report(message["value"], images_seen)
                    frozen.intermediate_values[images_seen] = message["value"]
            except UpdateFinishedTrialError:
                return {"verdict": trials.LOST}
            stop = sampling.should_stop(trial, images_seen, self._plan.settings)
        return {"verdict": trials.PRUNE if stop else trials.CONTINUE}

    def _end(self, outcome: Outcome) -> None:
        """Tells the study how a trial ended. Last, all else is recorded: a kill before it makes the trial end again."""
        number = _number_of(outcome.task)
        if isinstance(outcome.error, Interrupted):  # saved; the next driver of this folder resumes it
            return
        if outcome.error is not None:
            if self._lost[number] <= MAX_LOST_WORKERS:
                raise outcome.error
            self._left.append(number)  # `trials.run` records its failure
            return
        result: TrialOutcome = outcome.result
        trial = self._running.pop(number)
        if result.state is not None:
            self._tell(trial, result)
            # As large as the network, and not needed any more.
            (self._folder_of(trial) / "checkpoint.dmat").unlink(missing_ok=True)
        self._on_trial_end()

    def _tell(self, trial: FrozenTrial, result: TrialOutcome) -> None:
        attributes = {
            "seconds": result.seconds,
            "reason": result.reason,
            "report_seconds": result.report_seconds,
            _LOST: self._lost[trial.number],
        }
        with contextlib.suppress(UpdateFinishedTrialError):  # another driver resumed it
            for name, value in attributes.items():
                self._rdb.set_trial_user_attr(trial._trial_id, name, value)
            self._study.tell(trial.number, result.value, result.state, skip_if_finished=True)

    def _count_lost(self, task: Task) -> None:
        number = _number_of(task)
        self._lost[number] += 1
        self._rdb.set_trial_user_attr(self._running[number]._trial_id, _LOST, self._lost[number])

    @contextlib.contextmanager
    def _saving_counts(self) -> Iterator[None]:
        """Takes back, at an orderly end, that running trials may have killed this process."""
        try:
            yield
        finally:
            if self._in_process:
                for number in self._running.keys() & self._lost.keys():
                    with contextlib.suppress(Exception):  # the error that ended the block matters more
                        self._rdb.set_trial_user_attr(self._running[number]._trial_id, _LOST, self._lost[number])

    def _folder_of(self, trial: FrozenTrial) -> Path:
        return self._plan.trial_folder(space.first_number(trial))

    def _rank(self, engine: Engine, check_interruption: Callable[[], None]) -> None:
        """Ranks the best trials whose weights are here."""
        missing = rank_task.missing(self._plan, self._study)
        waiting = iter(missing)

        def next_task() -> Task | None:
            trial = next(waiting, None)
            if trial is None:
                return None
            path, folder = (
                rank_task.weights_of(self._plan, trial),
                self._plan.trial_folder(trial.number) / "auto_attack",
            )
            return Task(f"{trial.number}", rank_task.rank, (self._context, path, folder))

        def record(outcome: Outcome) -> None:
            if outcome.error is None:
                ranking.record(self._study, int(outcome.task.name), outcome.result)
                bar.update()
            elif not isinstance(outcome.error, Interrupted):
                raise outcome.error

        with tqdm(
            total=len(missing), unit=" trials", desc="rank by AutoAttack", disable=self._quiet or not missing
        ) as bar:
            engine.run(next_task, on_outcome=record, check_interruption=check_interruption)


def _number_of(task: Task) -> int:
    number: int = task.arguments[1].number
    return number
