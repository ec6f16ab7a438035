"""The order of the best trials by AutoAttack on the validation split, because the order by PGD can differ.

The results of `rank_task` are attributes of the study (Optuna does not allow changes of ended trials). Loads no torch.
"""

from collections.abc import Mapping
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from dmat.tuning.plan import Study
from dmat.tuning.storage import ended

_PREFIX = "auto_attack."  # of an attribute of the study; the number of the trial follows


def candidates(plan: Study, study: optuna.Study) -> list[FrozenTrial]:
    """The best complete trials by PGD, at most `rerank`, best first; equal ones by number."""
    complete = [t for t in ended(study) if t.state == TrialState.COMPLETE and t.value is not None]
    return sorted(complete, key=lambda trial: (-(trial.value or 0.0), trial.number))[: plan.settings.rerank]


def auto_attack_results(study: optuna.Study) -> dict[int, dict[str, Any]]:
    """Trial number -> AutoAttack accuracy on validation (value, low, high, n) of the best EMA weights."""
    return {
        int(name.removeprefix(_PREFIX)): dict(value)
        for name, value in study.user_attrs.items()
        if name.startswith(_PREFIX) and isinstance(value, Mapping)
    }


def record(study: optuna.Study, number: int, result: Mapping[str, Any]) -> None:
    """Writes the result of `rank_task.rank` for a trial into the study."""
    study.set_user_attr(f"{_PREFIX}{number}", dict(result))


def best(plan: Study, study: optuna.Study) -> FrozenTrial | None:
    """The best trial: by AutoAttack among the ranked ones, by PGD if none is ranked; None without complete trials."""
    results = auto_attack_results(study)
    ranking_candidates = candidates(plan, study)
    ranked = [candidate for candidate in ranking_candidates if candidate.number in results]
    if ranked:
        return max(ranked, key=lambda trial: (results[trial.number]["value"], trial.value or 0.0, -trial.number))
    complete = [t for t in ended(study) if t.state == TrialState.COMPLETE]
    return max(complete, key=lambda trial: (trial.value or 0.0, -trial.number), default=None)
