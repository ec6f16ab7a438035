"""Attacks the weights of the best trials with AutoAttack on the validation split: a task of the engine for each.

A driver ranks the trials whose weights are in its folder.
"""

from pathlib import Path

import optuna
from optuna.trial import FrozenTrial

from dmat import files
from dmat.config import WrittenNumber
from dmat.data import shards
from dmat.data.pixels import load_all
from dmat.engine import TaskContext
from dmat.evaluation import work
from dmat.evaluation.evaluate import Evaluation
from dmat.evaluation.measures import Subject
from dmat.metrics.intervals import wilson
from dmat.models.classifiers import load_classifier
from dmat.robust import auto_attack
from dmat.robust.attacks import Ball
from dmat.training import weights
from dmat.tuning import ranking, space
from dmat.tuning.plan import Study
from dmat.tuning.trials import VALUES_FILE, TrialContext, TrialValues
from dmat.workspace import RESULT


def missing(plan: Study, study: optuna.Study) -> list[FrozenTrial]:
    """Candidates without a ranking whose weights this project has."""
    results = ranking.auto_attack_results(study)
    return [
        trial for trial in ranking.candidates(plan, study) if trial.number not in results and _has_weights(plan, trial)
    ]


def weights_of(plan: Study, trial: FrozenTrial) -> Path:
    """Path of the best EMA weights of a trial, also of one that another study of this project computed."""
    source = space.origin(plan.name, trial)
    folder = plan.folder.parent / source["study"] / f"trial-{source['trial']:04d}"
    return folder / RESULT / "classifier" / weights.BEST


def _has_weights(plan: Study, trial: FrozenTrial) -> bool:
    """Whether the weights exist and are of this trial. If the study of an imported trial was restarted, its number
    belongs to another trial."""
    path = weights_of(plan, trial)
    values_path = path.parents[2] / VALUES_FILE
    if not path.exists() or not values_path.exists():
        return False
    values = files.read_record(values_path, TrialValues)["params"]
    return all(values.get(name, value) == value for name, value in trial.params.items())


def rank(engine: TaskContext, context: TrialContext, path: Path, folder: Path) -> dict[str, object]:
    """Attacks the weights at `path` on the validation split; a task of the engine. Resumes from the shards in `folder`.

    Returns the accuracy: value, low, high, n and the name of the attacks.
    """
    plan, compute = context.plan, context.compute.exact()
    validation = shards.open_shards(context.workspace.at(plan.inputs["validation"]["path"]))
    settings = context.params.evaluate_robust
    model, sidecar = load_classifier(path, validation.manifest, compute)
    images, labels = load_all(validation)
    by_standard = settings.auto_attack in ("none", "quick")  # ranks are called AutoAttack, which quick is not
    suite = auto_attack.suite("standard" if by_standard else settings.auto_attack, validation.classes)
    ball = Ball(sidecar["threat"]["norm"], WrittenNumber(sidecar["threat"]["epsilon"]))
    evaluation = Evaluation(
        folder,
        Subject("validation", model, validation.classes, images, labels, ball, suite, full_suite=True),
        settings.model_copy(update={"sweep": ()}),
        compute,
        {
            "weights": sidecar["sha256"],
            "images": plan.inputs["validation"]["sha256"],
            "settings": files.fingerprint(settings.plain()),
        },
    )
    for shard in evaluation.shards:
        engine.check_interruption()
        work.compute_all([shard], quiet=True)
    return {**wilson(evaluation.columns()["auto_attack"]).plain(), "attacks": suite.name}
