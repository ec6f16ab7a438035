"""A worker: one trial after the other until enough have ended, then ranks of the best. Any number of them, anywhere.

What comes next is decided in turns (`claims.turn`): a trial that nobody holds any more, else a new one if fewer than
wanted were begun. A new trial is first stored as waiting, with its values, so that a worker that dies between two
words leaves a trial that the next one takes as it is.
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

_LOOK_EVERY = 1.0  # seconds between two looks whether somebody left a trial
_AVOID = 30.0  # seconds for which a trial that another process has open is left alone
_TELL_EVERY = 60.0  # seconds after which waiting processes hear that there is nothing yet
_WAIT, _END = "wait", "end"  # what the leading process tells the others between two trials


def work(
    context: TrialContext, total: int, asked: Callable[[], None], after: Callable[[], None] = lambda: None
) -> None:
    """Computes until `total` trials have ended and the best are ranked, by whomever.

    asked: is called between two pieces of work and may raise. after: is called when a trial has ended, here or
    elsewhere.
    """
    assert context.study is not None and context.claims is not None
    study, claims, world, told = context.study, context.claims, context.compute.world, time.monotonic()
    known = -1
    busy: dict[int, float] = {}  # trials that a process still has open which did not renew its claim -> until when
    while True:
        asked()
        avoid = [number for number, until in busy.items() if time.monotonic() < until]
        trial = _next(context.plan, study, claims, total, avoid)
        count = len(storage.ended(study))
        if count != known:
            known = count
            after()
        if isinstance(trial, FrozenTrial):
            if not _compute(context, claims, trial):
                busy[trial.number] = time.monotonic() + _AVOID
            told = time.monotonic()
        elif trial:
            if world.size > 1 and time.monotonic() - told > _TELL_EVERY:
                world.broadcast(_WAIT.encode())
                told = time.monotonic()
            time.sleep(_LOOK_EVERY)
        else:
            break
    world.broadcast(_END.encode())
    _rank(context, claims, asked)
    after()


def follow(context: TrialContext) -> None:
    """The other processes of `torchrun`: the trials that the leading one takes, in step with it."""
    while True:
        told = (context.compute.world.broadcast(None) or b"").decode()
        if told == _END:
            return
        if told != _WAIT:
            trials.follow(context, json.loads(told)["values"])


def _compute(context: TrialContext, claims: Claims, trial: FrozenTrial) -> bool:
    """Whether it was computed here; False: a process that still lives has it open, and it is left to that."""
    name = trials.trial_key(trial.number)
    try:
        return trials.run(context, trial) is not None
    except LostError:
        if context.compute.world.size > 1:
            raise
        return True
    finally:
        with contextlib.suppress(Exception):  # what happened inside is what matters
            claims.give_back(name)


def _next(
    plan: Study, study: optuna.Study, claims: Claims, total: int, avoid: Collection[int] = ()
) -> FrozenTrial | bool:
    """The trial to compute, none of `avoid`; True: there is none now but others still compute; False: all is done."""
    all_trials = study.get_trials(deepcopy=False)
    own = storage.own(all_trials)
    at_work = [one for one in own if one.state == TrialState.RUNNING]
    if not at_work and len(own) >= total and all(one.state.is_finished() for one in own):
        return False
    with claims.turn():
        all_trials = study.get_trials(deepcopy=False)
        own = storage.own(all_trials)
        for one in [one for one in own if one.state == TrialState.RUNNING and one.number not in avoid]:
            if claims.take(trials.trial_key(one.number)):
                whole = _whole(plan, study, one.number)
                if whole is not None:
                    return whole
                claims.give_back(trials.trial_key(one.number))  # it ended between the look and the claim
        if not any(one.state == TrialState.WAITING for one in own):
            if len(own) >= total:
                return any(one.state == TrialState.RUNNING for one in own)
            study.enqueue_trial(_values(plan, all_trials, len(own)))
        number = study.ask().number
        claims.take(trials.trial_key(number))
        return _whole(plan, study, number) or True


def _values(plan: Study, all_trials: list[FrozenTrial], count: int) -> dict[str, Any]:
    """Of the trial after `count` own ones: known points first."""
    wanted = space.distributions(plan)
    points = plan.points
    if count < len(points):
        return {name: points[count][name] for name in wanted}
    return sampling.propose(plan.settings, wanted, all_trials, count)


def _whole(plan: Study, study: optuna.Study, number: int) -> FrozenTrial | None:
    """A trial with all its values; None if it has ended."""
    frozen = study.get_trials(deepcopy=False)[number]
    if frozen.state.is_finished():
        return None
    space.suggest(optuna.Trial(study, frozen._trial_id), space.distributions(plan))
    return study.get_trials(deepcopy=False)[number]


def _rank(context: TrialContext, claims: Claims, asked: Callable[[], None]) -> None:
    """Ranks what nobody else ranks, and waits for the others."""
    assert context.study is not None
    while True:
        asked()
        waiting = ranking.missing(context.plan, context.study)
        mine = next((one for one in waiting if claims.take(ranking.ranking_key(one.number))), None)
        if not waiting:
            return
        if mine is None:
            time.sleep(_LOOK_EVERY)
            continue
        try:
            ranking.rank(context, mine)
        finally:
            with contextlib.suppress(Exception):
                claims.give_back(ranking.ranking_key(mine.number))
