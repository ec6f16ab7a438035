"""Which values come next, and which trials stop early.

A proposal is a pure function of the trials so far: a sampler with a seed of its own for each trial number looks at
them in memory, so that a resumed study does not repeat its start and nothing of a sampler is ever stored. What it is
shown of trials that did not finish is decided here, because samplers differ in it and one (GP) would ignore them:
docs/tuning.md has the measurement behind the choice.
"""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.pruners import BasePruner, HyperbandPruner, MedianPruner, NopPruner
from optuna.samplers import BaseSampler, GPSampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial, TrialState, create_trial

from dmat import seeds
from dmat.config import Tune

RANDOM_FIRST = 10  # trials before a model is made of them
# How a pruned trial is shown to a sampler: not at all, as pruned, with its last report, or with what it might have
# reached: its last report and the median gain of complete trials from there on.
PRUNED_AS = ("nothing", "pruned", "last", "extended")
DEFAULT_PRUNED_AS = {"tpe": "extended", "gp": "extended", "random": "nothing"}


def propose(
    settings: Tune,
    wanted: Mapping[str, BaseDistribution],
    trials: Sequence[FrozenTrial],
    number: int,
    pruned_as: str | None = None,
) -> dict[str, Any]:
    """Values of trial `number` after `trials`, by name in the order of `wanted`."""
    seed = int(seeds.stream(settings.seed, "tune/sampler", number).integers(2**31))
    study = optuna.create_study(direction="maximize", sampler=_sampler(settings.sampler, seed))
    study.add_trials(shown(trials, pruned_as or DEFAULT_PRUNED_AS[settings.sampler]))
    found = study.ask(fixed_distributions=dict(wanted)).params
    return {name: found[name] for name in wanted}


def _sampler(name: str, seed: int) -> BaseSampler:
    if name == "random":
        return RandomSampler(seed=seed)
    if name == "gp":
        return GPSampler(seed=seed, n_startup_trials=RANDOM_FIRST)
    return TPESampler(seed=seed, n_startup_trials=RANDOM_FIRST)


def shown(trials: Sequence[FrozenTrial], pruned_as: str) -> list[FrozenTrial]:
    """Trials as a sampler is to see them. One that diverged or ran out of memory counts as the worst, so that its
    neighbourhood is left; one at work as an average one, so that workers spread."""
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE and trial.value is not None]
    values = [trial.value for trial in complete if trial.value is not None]
    found = []
    for trial in trials:
        if not trial.params:
            continue
        if trial.state == TrialState.COMPLETE:
            found.append(_as(trial, trial.value))
        elif trial.state == TrialState.PRUNED and pruned_as != "nothing" and trial.intermediate_values:
            found.append(_pruned(trial, complete, pruned_as))
        elif trial.state == TrialState.FAIL and values:
            found.append(_as(trial, min(values)))
        elif trial.state == TrialState.RUNNING and values:
            found.append(_as(trial, statistics.median(values)))
    return found


def _pruned(trial: FrozenTrial, complete: Sequence[FrozenTrial], pruned_as: str) -> FrozenTrial:
    if pruned_as == "pruned":
        return create_trial(
            state=TrialState.PRUNED,
            params=trial.params,
            distributions=trial.distributions,
            intermediate_values=trial.intermediate_values,
        )
    step = max(trial.intermediate_values)
    last = trial.intermediate_values[step]
    if pruned_as == "extended":
        gains = [
            one.value - one.intermediate_values[step]
            for one in complete
            if one.value is not None and step in one.intermediate_values
        ]
        last += statistics.median(gains) if gains else 0.0
    return _as(trial, last)


def _as(trial: FrozenTrial, value: float | None) -> FrozenTrial:
    return create_trial(state=TrialState.COMPLETE, value=value, params=trial.params, distributions=trial.distributions)


def pruner(settings: Tune, name: str | None = None) -> BasePruner:
    """Asked through `should_stop`, which keeps the warm-up."""
    chosen = name or settings.pruner
    if chosen == "hyperband":
        return HyperbandPruner(settings.evaluate_every, settings.images_seen, reduction_factor=3)
    if chosen == "median":
        return MedianPruner(settings.startup_trials, settings.warmup_images + 1)
    return NopPruner()


def should_stop(trial: optuna.Trial, images_seen: int, settings: Tune) -> bool:
    """Whether a trial falls behind the others after this report: never in its warm-up."""
    return images_seen > settings.warmup_images and trial.should_prune()
