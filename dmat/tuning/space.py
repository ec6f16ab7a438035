"""The search space of a study as Optuna distributions, and the import of trials of studies with another space."""

from collections.abc import Iterator, Sequence
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, create_trial

from dmat import config
from dmat.tuning.plan import Study

ORIGIN = "imported_from"  # user attribute of a trial that another study made: {"study": name, "trial": number}


def distributions(plan: Study) -> dict[str, BaseDistribution]:
    """Dotted name -> distribution, in the order of the space. A range of an integer parameter gives integers."""
    return {name: _distribution(plan, name, dimension) for name, dimension in plan.settings.space.items()}


def _distribution(plan: Study, name: str, dimension: config.Dimension) -> BaseDistribution:
    if isinstance(dimension, config.Choices):
        return CategoricalDistribution(dimension.choices)
    log = dimension.scale == "log"
    if type(plan.trial.value_of(name)) is int:
        return IntDistribution(int(dimension.low), int(dimension.high), log=log)
    return FloatDistribution(dimension.low, dimension.high, log=log)


def fitting(plan: Study, study: str, trials: Sequence[FrozenTrial]) -> Iterator[FrozenTrial]:
    """Ended trials of a study with another space, as trials of this study.

    Their results are valid here if all their values lie in this space. A parameter that only one of the studies has
    must have the value of the arm.
    """
    search_space = distributions(plan)
    for trial in trials:
        if not trial.state.is_finished():
            continue
        values = {name: trial.params.get(name, plan.own_value(name)) for name in search_space}
        left_out = [name for name in trial.params if name not in search_space]
        if all(plan.settings.space[name].contains(value) for name, value in values.items()) and all(
            trial.params[name] == plan.own_value(name) for name in left_out
        ):
            yield create_trial(
                state=trial.state,
                value=trial.value,
                params=values,
                distributions=search_space,
                user_attrs={**trial.user_attrs, ORIGIN: origin(study, trial)},
                intermediate_values=trial.intermediate_values,
            )


def origin(study: str, trial: FrozenTrial) -> dict[str, Any]:
    """Study and number of the computed trial, also for an imported one. The number names its work folder."""
    return dict(trial.user_attrs.get(ORIGIN) or {"study": study, "trial": first_number(trial)})


def earlier_numbers(trial: FrozenTrial) -> list[int]:
    """Numbers of the lost trials that this one repeats, in their order; none for most trials."""
    return list(trial.system_attrs.get("retry_history", ()))  # of RetryHeartbeatStaleTrialCallback


def first_number(trial: FrozenTrial) -> int:
    """The number under which the trial was computed first, which names its work folder."""
    return [*earlier_numbers(trial), trial.number][0]
