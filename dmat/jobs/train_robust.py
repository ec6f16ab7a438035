"""train_robust: an arm's images and a seed -> best and last averaged weights of a robust classifier, history."""

import math
from typing import Any

from dmat import files
from dmat.config import TrainRobust
from dmat.data import augmentation, shards
from dmat.data.batches import MixedBatches
from dmat.data.mix_file import open_mix
from dmat.data.pixels import everything
from dmat.errors import DmatError
from dmat.jobs.classifiers import classifier_sidecar, draw_training, facts_of, new_classifier, speed
from dmat.jobs.execution import Job
from dmat.robust import flops
from dmat.robust.attacks import Ball
from dmat.robust.losses import Recipe
from dmat.training import classifier, weights


def run(settings: TrainRobust, job: Job) -> dict[str, Any]:
    seed = job.chosen["seed"]
    real = shards.open_shards(job.inputs["train"])
    mix, generated, kept = open_mix(job.inputs["mix"], real, job.root)
    facts = facts_of(real)
    augmentation.check(settings.augmentation, *real.shape[:2])
    largest = math.sqrt(math.prod(real.shape))
    if settings.threat.norm == "l2" and settings.threat.epsilon > largest:
        raise DmatError(
            f"arm {job.chosen['arm']}: threat.epsilon {settings.threat.epsilon.text} is larger than the distance "
            f"from a black to a white image of {real.shape}, {largest:.2f}; expected less, for example 128/255"
        )
    model = new_classifier(settings.network, facts, seed)
    ball = Ball(settings.threat.norm, settings.threat.epsilon)
    recipe = Recipe(
        ball,
        settings.attack_steps,
        settings.attack_step_size,
        settings.beta,
        settings.label_smoothing,
        settings.alpha,
    )
    with job.long_run(settings.images_seen) as run:
        outcome = classifier.train(
            model,
            facts.classes,
            MixedBatches(mix, seed, real, generated, kept),
            everything(shards.open_shards(job.inputs["validation"])),
            recipe,
            settings,
            seed,
            run,
            job.compute,
        )
    forward = flops.forward(model, (real.shape[2], *real.shape[:2]))
    step_flops = forward * flops.forwards_of_a_step(settings.loss, settings.attack_steps)
    job.measured.update(speed(outcome.images_per_second, step_flops, job.compute))
    folder = job.result / "classifier"
    sidecar = classifier_sidecar(
        settings.network,
        facts,
        real,
        job,
        threat=settings.threat.plain(),
        seed=seed,
        arm=job.chosen["arm"],
        loss=settings.loss,
        beta=settings.beta,
        mix_sha256=files.sha256(job.inputs["mix"] / "mix.json"),
    )
    weights.save(folder / "best.safetensors", outcome.best, sidecar | {"images_seen": outcome.best_images_seen})
    weights.save(
        folder / "last.safetensors", outcome.last, sidecar | {"images_seen": outcome.history[-1]["images_seen"]}
    )
    files.write_json(folder / "history.json", outcome.history)
    draw_training(outcome, job, f"{job.chosen['arm']}, seed {seed}")
    last = outcome.history[-1]
    return {
        "best_validation_robust": outcome.best_accuracy,
        "best_images_seen": outcome.best_images_seen,
        "last_validation_robust": last.get("validation_robust", 0.0),
        "last_validation_clean": last["validation_clean"],
        "parameters": sum(p.numel() for p in model.parameters()),
        "forward_flops": forward,
        "training_flops": step_flops * last["images_seen"],
    }
