"""Proposes the values of the next trial, and decides which trials are pruned.

A proposal is a pure function of the trials so far: a sampler with its own seed for each trial number sees them in
memory. So a resumed study does not repeat its start, and no state of a sampler is stored. This module decides how
unfinished trials are presented to the sampler, because samplers differ in that and one (GP) would ignore them.
docs/results/tuning-study.md has the measurement for this choice.
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

RANDOM_FIRST = 10  # random trials before the sampler fits a model
# How a pruned trial is presented to a sampler: not at all, as pruned, with its last report, or extrapolated: its last
# report plus the median gain of complete trials from there on.
PRUNED_AS = ("nothing", "pruned", "last", "extended")
DEFAULT_PRUNED_AS = {"tpe": "extended", "gp": "extended", "random": "nothing"}


def propose(
    settings: Tune,
    distributions: Mapping[str, BaseDistribution],
    trials: Sequence[FrozenTrial],
    number: int,
    pruned_as: str | None = None,
) -> dict[str, Any]:
    """Values of trial `number` after `trials`, by name in the order of `distributions`."""
    seed = int(seeds.stream(settings.seed, "tune/sampler", number).integers(2**31))
    study = optuna.create_study(direction="maximize", sampler=_sampler(settings.sampler, seed))
    study.add_trials(shown(trials, pruned_as or DEFAULT_PRUNED_AS[settings.sampler]))
    proposed = study.ask(fixed_distributions=dict(distributions)).params
    return {name: proposed[name] for name in distributions}


def _sampler(name: str, seed: int) -> BaseSampler:
    if name == "random":
        return RandomSampler(seed=seed)
    if name == "gp":
        return GPSampler(seed=seed, n_startup_trials=RANDOM_FIRST)
    return TPESampler(seed=seed, n_startup_trials=RANDOM_FIRST)


def shown(trials: Sequence[FrozenTrial], pruned_as: str) -> list[FrozenTrial]:
    """Trials as they are presented to the sampler.

    A failed trial (diverged, out of memory) gets the worst value, so that the sampler leaves its neighbourhood. A
    running one gets the median, so that workers spread.
    """
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE and trial.value is not None]
    values = [trial.value for trial in complete if trial.value is not None]
    trials_to_show = []
    for trial in trials:
        if not trial.params:
            continue
        if trial.state == TrialState.COMPLETE:
            trials_to_show.append(_as_complete(trial, trial.value))
        elif trial.state == TrialState.PRUNED and pruned_as != "nothing" and trial.intermediate_values:
            trials_to_show.append(_pruned(trial, complete, pruned_as))
        elif trial.state == TrialState.FAIL and values:
            trials_to_show.append(_as_complete(trial, min(values)))
        elif trial.state == TrialState.RUNNING and values:
            trials_to_show.append(_as_complete(trial, statistics.median(values)))
    return trials_to_show


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
            other.value - other.intermediate_values[step]
            for other in complete
            if other.value is not None and step in other.intermediate_values
        ]
        last += statistics.median(gains) if gains else 0.0
    return _as_complete(trial, last)


def _as_complete(trial: FrozenTrial, value: float | None) -> FrozenTrial:
    return create_trial(state=TrialState.COMPLETE, value=value, params=trial.params, distributions=trial.distributions)


def pruner(settings: Tune, name: str | None = None) -> BasePruner:
    """The pruner of the settings. Use it through `should_stop`, which never prunes during the warm-up."""
    pruner_name = name or settings.pruner
    if pruner_name == "hyperband":
        return HyperbandPruner(settings.evaluate_every, settings.images_seen, reduction_factor=3)
    if pruner_name == "median":
        return MedianPruner(settings.startup_trials, settings.warmup_images + 1)
    return NopPruner()


def should_stop(trial: optuna.Trial, images_seen: int, settings: Tune) -> bool:
    """Whether to prune a trial after this report; never during its warm-up."""
    return images_seen > settings.warmup_images and trial.should_prune()
