"""train_robust: an arm's images and a seed -> best and last EMA weights of a robust classifier, history.

EMA: exponential moving average of the weights (weight averaging).
"""

import math
from typing import cast

from dmat import files, machine_speed
from dmat.config import TrainRobust
from dmat.data import augmentation, shards
from dmat.data.batches import open_batches
from dmat.data.mixes import open_mix
from dmat.data.mixing import MIX
from dmat.data.pixels import load_all
from dmat.devices import Compute
from dmat.errors import DmatError
from dmat.job import Job, Result
from dmat.models.classifiers import classifier_sidecar, data_spec_of, new_classifier
from dmat.robust import flops
from dmat.robust.attacks import Ball
from dmat.robust.losses import LossSettings
from dmat.training import HISTORY, classifier, curves, weights


def run(settings: TrainRobust, job: Job) -> Result:
    """Trains the classifier of one arm and seed, or resumes. Raises DmatError where settings do not fit the images."""
    seed = cast(int, job.instance["seed"])  # a number in every instance, as `seeds` in params.yaml holds numbers alone
    real = shards.open_shards(job.inputs["train"])
    mix, generated = open_mix(job.inputs["mix"], real, job.root)
    data_spec = data_spec_of(real)
    augmentation.check(settings.augmentation, *real.shape[:2])
    largest = math.sqrt(math.prod(real.shape))
    if settings.threat.norm == "l2" and settings.threat.epsilon > largest:
        raise DmatError(
            f"arm {job.instance['arm']}: threat.epsilon {settings.threat.epsilon.text} is larger than the distance "
            f"from a black to a white image of {real.shape}, {largest:.2f}; expected less, for example 128/255"
        )
    model = new_classifier(settings.network, data_spec, seed)
    ball = Ball(settings.threat.norm, settings.threat.epsilon)
    loss_settings = LossSettings(
        ball,
        settings.attack_steps,
        settings.attack_step_size,
        settings.beta,
        settings.label_smoothing,
        settings.alpha,
        settings.temperature,
        settings.gkl_gamma,
    )
    with job.long_run(settings.images_seen) as run:
        outcome = classifier.train(
            model,
            data_spec.classes,
            open_batches(mix, seed, real, generated, job.compute.device),
            load_all(shards.open_shards(job.inputs["validation"])),
            loss_settings,
            settings,
            seed,
            run,
            job.compute,
        )
    forward = flops.forward(model, (real.shape[2], *real.shape[:2]))
    # passes per image, of steps with and without perturbation of the weights
    passes, perturbed = (
        flops.forward_passes_per_step(settings.loss, settings.attack_steps, perturbs_weights)
        for perturbs_weights in (False, settings.awp_gamma > 0)
    )
    step_flops = round(forward * (passes + (perturbed - passes) * (1 - settings.awp_warmup)))
    folder = job.result / "classifier"
    sidecar = classifier_sidecar(
        settings.network,
        data_spec,
        real,
        job.compute,
        threat=settings.threat.plain(),
        seed=seed,
        arm=cast(str, job.instance["arm"]),
        loss=settings.loss,
        beta=settings.beta,
        mix_sha256=files.sha256(job.inputs["mix"] / MIX),
    )
    if outcome.compiled:
        sidecar["compiled"] = True
    if generated is not None:  # whose licence the classifier inherits
        sidecar["licence_of_data"] = "; ".join(
            dict.fromkeys(images.manifest["licence"] for images in (real, *(part.images for part in generated.parts)))
        )
    best_sidecar: weights.TrainedSidecar = {**sidecar, "images_seen": outcome.best_images_seen}
    weights.save(folder / weights.BEST, outcome.best, best_sidecar)
    images_seen = cast(int, outcome.history[-1]["images_seen"])  # whole, unlike other values of a history
    last_sidecar: weights.TrainedSidecar = {**sidecar, "images_seen": images_seen}
    weights.save(folder / weights.LAST, outcome.last, last_sidecar)
    files.write_json(folder / HISTORY, outcome.history)
    curves.draw(job.pictures, outcome, f"{job.instance['arm']}, seed {seed}")
    last = outcome.history[-1]
    metrics = {
        "best_validation_robust": outcome.best_accuracy,
        "best_images_seen": outcome.best_images_seen,
        "last_validation_robust": last.get("validation_robust", 0.0),
        "last_validation_clean": last["validation_clean"],
        "parameters": sum(p.numel() for p in model.parameters()),
        "forward_flops": forward,
        "training_flops": step_flops * last["images_seen"],
    }
    measured = _speed(outcome.images_per_second, step_flops, job.compute)
    return Result(metrics, measured=measured, compiled=outcome.compiled)


def _speed(images_per_second: float, flops_per_image: int, compute: Compute) -> dict[str, float]:
    """Throughput of the training in this process; empty where it was not measured.

    flops_per_image: of one image in one training step.
    """
    if not images_per_second:
        return {}
    flops_per_second = images_per_second * flops_per_image
    return {
        "images_per_second": images_per_second,
        "flops_per_second": flops_per_second,
        "model_flops_utilisation": flops_per_second / machine_speed.matrix_peak(compute),
    }
