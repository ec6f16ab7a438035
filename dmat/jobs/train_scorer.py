"""train_scorer: train split -> an ordinary classifier whose confidence judges generated images."""

from typing import Any

from dmat.config import TrainScorer
from dmat.data import augmentation, shards
from dmat.data.batches import MixedBatches
from dmat.data.mixing import Mix
from dmat.data.pixels import everything
from dmat.jobs.classifiers import classifier_sidecar, draw_training, facts_of, new_classifier
from dmat.jobs.execution import Job
from dmat.robust.attacks import Ball
from dmat.robust.losses import Recipe
from dmat.training import classifier, weights


def run(settings: TrainScorer, job: Job) -> dict[str, Any]:
    real = shards.open_shards(job.inputs["train"])
    facts = facts_of(real)
    augmentation.check(settings.augmentation, *real.shape[:2])
    model = new_classifier(settings.network, facts, settings.seed)
    mix = Mix(len(real), 0, settings.batch, 0.0, copies=settings.cutmix_copies)
    batches = MixedBatches(mix, settings.seed, real, None, None)
    recipe = Recipe(Ball("linf", 0.0), 0, 0.0, 0.0, settings.label_smoothing)
    with job.long_run(settings.images_seen) as run:
        outcome = classifier.train(
            model,
            facts.classes,
            batches,
            everything(shards.open_shards(job.inputs["validation"])),
            recipe,
            settings,
            settings.seed,
            run,
            job.compute,
        )
    sidecar = classifier_sidecar(settings.network, facts, real, job)
    weights.save(job.result / "scorer" / "best.safetensors", outcome.best, sidecar)
    draw_training(outcome, job, "scorer")
    return {"validation_clean": outcome.best_accuracy, "best_images_seen": outcome.best_images_seen}
