"""The best trials in the order of AutoAttack on the validation split: PGD's order can be another.

What was found belongs to the study (Optuna lets nobody change a trial that ended). A trial is ranked by whoever has its
weights: the machine that computed it, or all that share the project's folder.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from dmat import files
from dmat.config import WrittenNumber
from dmat.data import shards
from dmat.data.pixels import load_all
from dmat.evaluation import work
from dmat.evaluation.evaluate import Evaluation
from dmat.evaluation.measures import Subject
from dmat.metrics.intervals import wilson
from dmat.models.classifiers import load_classifier
from dmat.robust import auto_attack
from dmat.robust.attacks import Ball
from dmat.training import weights
from dmat.tuning import space
from dmat.tuning.plan import Study
from dmat.tuning.storage import ended
from dmat.tuning.trials import NOTE, TrialContext
from dmat.workspace import RESULT

_PREFIX = "auto_attack."  # of a study's attribute; then the trial's number


def ranking_key(number: int) -> str:
    """A trial's rank as a claim."""
    return f"rank-{number:04d}"


def candidates(plan: Study, study: optuna.Study) -> list[FrozenTrial]:
    """The best complete trials by PGD, best first; equal ones in their order."""
    complete = [t for t in ended(study) if t.state == TrialState.COMPLETE and t.value is not None]
    return sorted(complete, key=lambda trial: (-(trial.value or 0.0), trial.number))[: plan.settings.rerank]


def found(study: optuna.Study) -> dict[int, dict[str, Any]]:
    """AutoAttack on validation by trial: value, low, high, n, of the best averaged weights."""
    return {
        int(name.removeprefix(_PREFIX)): dict(value)
        for name, value in study.user_attrs.items()
        if name.startswith(_PREFIX) and isinstance(value, Mapping)
    }


def missing(plan: Study, study: optuna.Study) -> list[FrozenTrial]:
    """Candidates without a rank whose weights are here."""
    known = found(study)
    return [one for one in candidates(plan, study) if one.number not in known and _has_weights(plan, one)]


def weights_of(plan: Study, trial: FrozenTrial) -> Path:
    """Best averaged weights of a trial, also of one that another study of this project made."""
    made = space.origin(plan.name, trial)
    folder = plan.folder.parent / made["study"] / f"trial-{made['trial']:04d}"
    return folder / RESULT / "classifier" / weights.BEST


def _has_weights(plan: Study, trial: FrozenTrial) -> bool:
    """Also of an imported trial whose study was begun again meanwhile: its number belongs to another one then."""
    path = weights_of(plan, trial)
    note = path.parents[2] / NOTE
    if not path.exists() or not note.exists():
        return False
    values = files.read_json(note)["params"]
    return all(values.get(name, value) == value for name, value in trial.params.items())


def rank(context: TrialContext, trial: FrozenTrial) -> None:
    """Attacks one trial's weights and writes the accuracy into the study. Goes on from the shards that are there."""
    assert context.study is not None
    plan, compute = context.plan, context.compute.exact()
    validation = shards.open_shards(context.workspace.at(plan.inputs["validation"]["path"]))
    settings = context.params.evaluate_robust
    path = weights_of(plan, trial)
    model, sidecar = load_classifier(path, validation, compute)
    images, labels = load_all(validation)
    suite = auto_attack.suite(
        settings.auto_attack if settings.auto_attack != "none" else "standard", validation.classes
    )
    ball = Ball(sidecar["threat"]["norm"], WrittenNumber(sidecar["threat"]["epsilon"]))
    evaluation = Evaluation(
        plan.trial_folder(trial.number) / "auto_attack",
        Subject("validation", model, images, labels, ball, suite, full_suite=True),
        settings.model_copy(update={"sweep": ()}),
        compute,
        {
            "weights": sidecar["sha256"],
            "images": plan.inputs["validation"]["sha256"],
            "settings": files.fingerprint(settings.plain()),
        },
    )
    work.compute_all(evaluation.shards, wait=True, quiet=True)
    value = wilson(evaluation.columns()["auto_attack"]).plain() | {"attacks": suite.name}
    context.study.set_user_attr(f"{_PREFIX}{trial.number}", value)


def best(plan: Study, study: optuna.Study) -> FrozenTrial | None:
    """The winner: by AutoAttack among the trials that have it, by PGD where nothing is ranked."""
    known = found(study)
    among = candidates(plan, study)
    ranked = [one for one in among if one.number in known]
    if ranked:
        return max(ranked, key=lambda trial: (known[trial.number]["value"], trial.value or 0.0, -trial.number))
    complete = [t for t in ended(study) if t.state == TrialState.COMPLETE]
    return max(complete, key=lambda trial: (trial.value or 0.0, -trial.number), default=None)
