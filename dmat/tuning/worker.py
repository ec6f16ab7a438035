"""A worker computes one trial after the other until enough have ended, then ranks the best. Any number may run, on any
machine.

One worker at a time chooses its next trial (`Claims.exclusive`): an unfinished trial without a holder, else a new one
if fewer than `total` exist. A new trial is first stored as waiting, with its values. If the worker dies then, the next
one takes the trial as it is.
"""

import contextlib
import json
import time
from collections.abc import Callable, Collection
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from dmat.tuning import ranking, sampling, space, storage, trials
from dmat.tuning.claims import Claims
from dmat.tuning.plan import Study
from dmat.tuning.trials import LostError, TrialContext

_LOOK_EVERY = 1.0  # seconds between two checks for a trial without a holder
_AVOID = 30.0  # seconds for which a trial that another process has open is not tried again
_TELL_EVERY = 60.0  # seconds between messages to waiting processes that there is no trial yet
_WAIT, _END = "wait", "end"  # messages of the main process to the others between two trials


def work(
    context: TrialContext,
    total: int,
    check_interruption: Callable[[], None],
    on_trial_end: Callable[[], None] = lambda: None,
) -> None:
    """Computes until `total` trials have ended and the best are ranked, by this worker or others.

    check_interruption: is called between two pieces of work and may raise. on_trial_end: is called when any worker has
    ended a trial.
    """
    assert context.study is not None and context.claims is not None
    study, claims, world, last_message = context.study, context.claims, context.compute.world, time.monotonic()
    ended_count = -1
    busy: dict[int, float] = {}  # trials that a process has open without renewing its claim -> until when to avoid
    while True:
        check_interruption()
        avoid = [number for number, until in busy.items() if time.monotonic() < until]
        trial = _next_trial(context.plan, study, claims, total, avoid)
        count = len(storage.ended(study))
        if count != ended_count:
            ended_count = count
            on_trial_end()
        if isinstance(trial, FrozenTrial):
            if not _compute(context, claims, trial):
                busy[trial.number] = time.monotonic() + _AVOID
            last_message = time.monotonic()
        elif trial:
            if world.size > 1 and time.monotonic() - last_message > _TELL_EVERY:
                world.broadcast(_WAIT.encode())
                last_message = time.monotonic()
            time.sleep(_LOOK_EVERY)
        else:
            break
    world.broadcast(_END.encode())
    _rank(context, claims, check_interruption)
    on_trial_end()


def follow(context: TrialContext) -> None:
    """The part of the other processes under `torchrun`: computes the trials that the main process takes."""
    while True:
        message = (context.compute.world.broadcast(None) or b"").decode()
        if message == _END:
            return
        if message != _WAIT:
            trials.follow(context, json.loads(message)["values"])


def _compute(context: TrialContext, claims: Claims, trial: FrozenTrial) -> bool:
    """Computes a trial. False: a running process has it open, so it is left to that process."""
    name = trials.trial_key(trial.number)
    try:
        return trials.run(context, trial) is not None
    except LostError:
        if context.compute.world.size > 1:
            raise
        return True
    finally:
        with contextlib.suppress(Exception):  # an error inside the block matters more
            claims.release(name)


def _next_trial(
    plan: Study, study: optuna.Study, claims: Claims, total: int, avoid: Collection[int] = ()
) -> FrozenTrial | bool:
    """The trial to compute, none of `avoid`. True: none now, but others still compute. False: all is done."""
    all_trials = study.get_trials(deepcopy=False)
    own_trials = storage.own_trials(all_trials)
    at_work = [trial for trial in own_trials if trial.state == TrialState.RUNNING]
    if not at_work and len(own_trials) >= total and all(trial.state.is_finished() for trial in own_trials):
        return False
    with claims.exclusive():
        all_trials = study.get_trials(deepcopy=False)
        own_trials = storage.own_trials(all_trials)
        for trial in [trial for trial in own_trials if trial.state == TrialState.RUNNING and trial.number not in avoid]:
            if claims.take(trials.trial_key(trial.number)):
                complete = _with_all_values(plan, study, trial.number)
                if complete is not None:
                    return complete
                claims.release(trials.trial_key(trial.number))  # it ended before the claim was taken
        if not any(trial.state == TrialState.WAITING for trial in own_trials):
            if len(own_trials) >= total:
                return any(trial.state == TrialState.RUNNING for trial in own_trials)
            study.enqueue_trial(_new_values(plan, all_trials, len(own_trials)))
        number = study.ask().number
        claims.take(trials.trial_key(number))
        return _with_all_values(plan, study, number) or True


def _new_values(plan: Study, all_trials: list[FrozenTrial], count: int) -> dict[str, Any]:
    """Values of the trial after `count` own ones: those of `points` first, then proposals of the sampler."""
    search_space = space.distributions(plan)
    points = plan.points
    if count < len(points):
        return {name: points[count][name] for name in search_space}
    return sampling.propose(plan.settings, search_space, all_trials, count)


def _with_all_values(plan: Study, study: optuna.Study, number: int) -> FrozenTrial | None:
    """The trial, after setting the values that it lacks; None if it has ended."""
    frozen = study.get_trials(deepcopy=False)[number]
    if frozen.state.is_finished():
        return None
    space.suggest(optuna.Trial(study, frozen._trial_id), space.distributions(plan))
    return study.get_trials(deepcopy=False)[number]


def _rank(context: TrialContext, claims: Claims, check_interruption: Callable[[], None]) -> None:
    """Ranks the trials that no other worker ranks, and waits for the others."""
    assert context.study is not None
    while True:
        check_interruption()
        waiting = ranking.missing(context.plan, context.study)
        own_trial = next((trial for trial in waiting if claims.take(ranking.ranking_key(trial.number))), None)
        if not waiting:
            return
        if own_trial is None:
            time.sleep(_LOOK_EVERY)
            continue
        try:
            ranking.rank(context, own_trial)
        finally:
            with contextlib.suppress(Exception):
                claims.release(ranking.ranking_key(own_trial.number))
