"""train_scorer: train split -> a standard classifier whose confidence scores generated images."""

from dmat.config import TrainScorer
from dmat.data import augmentation, shards
from dmat.data.batches import open_batches
from dmat.data.mixing import Mix
from dmat.data.pixels import load_all
from dmat.job import Job, Result
from dmat.models.classifiers import classifier_sidecar, data_spec_of, new_classifier
from dmat.robust.attacks import Ball
from dmat.robust.losses import LossSettings
from dmat.training import classifier, curves, weights


def run(settings: TrainScorer, job: Job) -> Result:
    """Trains the scorer, or resumes its training, without attacks."""
    real = shards.open_shards(job.inputs["train"])
    data_spec = data_spec_of(real)
    augmentation.check(settings.augmentation, *real.shape[:2])
    model = new_classifier(settings.network, data_spec, settings.seed)
    mix = Mix(len(real), 0, settings.batch, 0.0, copies=settings.cutmix_copies)
    batches = open_batches(mix, settings.seed, real, None, job.compute.device)
    loss_settings = LossSettings(Ball("linf", 0.0), 0, 0.0, 0.0, settings.label_smoothing)
    with job.long_run(settings.images_seen) as run:
        outcome = classifier.train(
            model,
            data_spec.classes,
            batches,
            load_all(shards.open_shards(job.inputs["validation"])),
            loss_settings,
            settings,
            settings.seed,
            run,
            job.compute,
        )
    sidecar = classifier_sidecar(settings.network, data_spec, real, job.compute)
    if outcome.compiled:
        sidecar["compiled"] = True
    weights.save(job.result / "scorer" / weights.BEST, outcome.best, sidecar)
    curves.draw(job.pictures, outcome, "scorer")
    metrics = {"validation_clean": outcome.best_accuracy, "best_images_seen": outcome.best_images_seen}
    return Result(metrics, compiled=outcome.compiled)
