"""A study's space as Optuna's distributions, and trials of a study with another space."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from optuna import Trial
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, create_trial

from dmat import config
from dmat.tuning.plan import Study, inside

ORIGIN = "imported_from"  # user attribute of a trial that another study made: {"study": name, "trial": number}


def distributions(plan: Study) -> dict[str, BaseDistribution]:
    """By dotted name, in the order of the space. A range over a whole number has whole numbers."""
    return {name: _distribution(plan, name, wanted) for name, wanted in plan.settings.space.items()}


def _distribution(plan: Study, name: str, wanted: config.Dimension) -> BaseDistribution:
    if isinstance(wanted, config.Choices):
        return CategoricalDistribution(wanted.choices)
    log = wanted.scale == "log"
    if type(plan.trial.value_of(name)) is int:
        return IntDistribution(int(wanted.low), int(wanted.high), log=log)
    return FloatDistribution(wanted.low, wanted.high, log=log)


def suggest(trial: Trial, wanted: Mapping[str, BaseDistribution]) -> None:
    """Fixes all values of a trial; one that was begun before gets those that it lacks."""
    for name, one in wanted.items():
        if isinstance(one, CategoricalDistribution):
            trial.suggest_categorical(name, one.choices)
        elif isinstance(one, IntDistribution):
            trial.suggest_int(name, one.low, one.high, log=one.log)
        elif isinstance(one, FloatDistribution):
            trial.suggest_float(name, one.low, one.high, log=one.log)


def fitting(plan: Study, study: str, trials: Sequence[FrozenTrial]) -> Iterator[FrozenTrial]:
    """Ended trials of a study with another space, as trials of this one: what they found holds here too if all their
    values lie in this space. A parameter that only one of the two has must have the arm's value."""
    wanted = distributions(plan)
    for trial in trials:
        if not trial.state.is_finished():
            continue
        values = {name: trial.params.get(name, plan.own_value(name)) for name in wanted}
        left_out = [name for name in trial.params if name not in wanted]
        if all(inside(plan.settings.space[name], value) for name, value in values.items()) and all(
            trial.params[name] == plan.own_value(name) for name in left_out
        ):
            yield create_trial(
                state=trial.state,
                value=trial.value,
                params=values,
                distributions=wanted,
                user_attrs={**trial.user_attrs, ORIGIN: origin(study, trial)},
                intermediate_values=trial.intermediate_values,
            )


def origin(study: str, trial: FrozenTrial) -> dict[str, Any]:
    """Study and number of the trial that was really computed."""
    return dict(trial.user_attrs.get(ORIGIN) or {"study": study, "trial": trial.number})
