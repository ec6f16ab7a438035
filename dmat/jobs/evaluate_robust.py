"""evaluate_robust: best and last weights on the test split -> per-image table, accuracies with intervals.

The only stage that opens the test split. Everything is computed in float32. AutoAttack runs on the best weights in
shards with a seed each: a restart loses one shard at most, and results do not depend on how often it was restarted.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dmat import files, seeds
from dmat.config import EvaluateRobust, Fraction
from dmat.data import shards
from dmat.data.pixels import everything, in_order
from dmat.devices import Compute
from dmat.jobs.classifiers import load_classifier
from dmat.jobs.execution import Job
from dmat.metrics import pictures
from dmat.metrics.intervals import wilson
from dmat.robust import attacks, auto_attack, prediction
from dmat.robust.attacks import Ball
from dmat.robust.networks import Classifier

_TOLERANCE = 1e-6  # float32 rounding of x + perturbation - x


def run(settings: EvaluateRobust, job: Job) -> dict[str, Any]:
    compute = job.compute.exact()
    opened = shards.open_shards(job.inputs["test"])
    test = everything(opened)
    train = everything(shards.open_shards(job.inputs["train"]))
    table: dict[str, np.ndarray] = {"index": np.arange(len(test[1])), "label": test[1].numpy()}
    summary: dict[str, Any] = {}
    for which in ("best", "last"):
        model, sidecar = load_classifier(job.inputs["classifier"] / f"{which}.safetensors", opened, compute)
        ball = Ball(sidecar["threat"]["norm"], Fraction(sidecar["threat"]["epsilon"]))
        clean, robust, adversarial = _pgd(model, test, ball, settings, compute)
        _, train_robust, _ = _pgd(model, train, ball, settings, compute)
        table |= {f"{which}_clean": clean, f"{which}_pgd": robust}
        summary[which] = {
            "clean": wilson(clean).plain(),
            "pgd": wilson(robust).plain(),
            "train_pgd": wilson(train_robust).plain(),
            "images_seen": sidecar["images_seen"],
            "train_test_gap": float(train_robust.mean() - robust.mean()),
        }
        if which == "best":
            _picture(job, model, test, adversarial, clean, sidecar["threat"]["epsilon"], compute)
            if settings.auto_attack == "standard":
                flags, margins, sizes = _auto_attack(model, test, ball, settings, job, compute)
                table |= {"best_auto_attack": flags, "best_margin": margins, "best_perturbation": sizes}
                summary[which]["auto_attack"] = wilson(flags).plain()
    _write_table(job.result / "evaluation" / "per_image.parquet", table)
    files.write_json(
        job.result / "evaluation" / "protocol.json",
        {
            "threat": sidecar["threat"],
            "pgd": f"PGD-{settings.pgd_steps}, CW margin loss, one random start",
            "auto_attack": settings.auto_attack,
            "precision": "fp32",
            "settings": settings.plain(),
        },
    )
    files.write_json(job.result / "evaluation" / "summary.json", summary)
    return {
        f"{which}_{name}": value["value"] if isinstance(value, dict) else value
        for which, values in summary.items()
        for name, value in values.items()
    }


def _pgd(
    model: Classifier, split: tuple[Tensor, Tensor], ball: Ball, settings: EvaluateRobust, compute: Compute
) -> tuple[np.ndarray, np.ndarray, Tensor]:
    """Flags: right on the image, right on the image and after PGD with the CW margin; and PGD's images."""
    images, labels = split
    clean = (prediction.logits(model, images, compute, settings.batch).argmax(1) == labels).numpy()
    made = []
    for where, x, y in in_order(images, labels, settings.batch):
        start = ball.random_start(seeds.stream(settings.pgd_seed, "evaluation/start", where.start), tuple(x.shape))
        made.append(
            attacks.pgd(
                model,
                compute.place(x),
                attacks.margin(y.to(compute.device)),
                ball,
                compute.place(start),
                settings.pgd_steps,
                settings.pgd_step_size,
            ).cpu()
        )
    adversarial = torch.cat(made)
    attacked = (prediction.logits(model, adversarial, compute, settings.batch).argmax(1) == labels).numpy()
    return clean, clean & attacked, adversarial


def _auto_attack(
    model: Classifier, test: tuple[Tensor, Tensor], ball: Ball, settings: EvaluateRobust, job: Job, compute: Compute
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Robust flags, margins of the worst images, sizes of their perturbations; one saved shard after the other."""
    images, labels = test
    parts = []
    with job.long_run(len(labels)) as run:
        for number, (where, x, y) in enumerate(in_order(images, labels, settings.shard)):
            path = job.work / f"auto-attack-{number:05d}.npz"
            if not path.exists():
                seed = settings.auto_attack_seed + number
                worst = auto_attack.adversarial(
                    model, compute.place(x), y.to(compute.device), ball, seed, settings.batch
                )
                sizes = _checked(worst.cpu(), x, ball)
                margins = attacks.logit_margin(
                    prediction.logits(model, worst.cpu(), compute, settings.batch), y
                ).numpy()
                with files.writing(path) as file:
                    np.savez(file, margins=margins, sizes=sizes)
            with np.load(path) as saved:
                parts.append((saved["margins"], saved["sizes"]))
            run.turn(where.stop, dict)
    margins, sizes = (np.concatenate(column) for column in zip(*parts, strict=True))
    return margins > 0, margins, sizes


def _checked(adversarial: Tensor, images: Tensor, ball: Ball) -> np.ndarray:
    """Sizes of the perturbations. An attack that leaves the ball or [0, 1] is a defect, not a result."""
    sizes = ball.size(adversarial - images)
    if sizes.max() > ball.epsilon + _TOLERANCE or adversarial.min() < 0 or adversarial.max() > 1:
        raise RuntimeError(f"an adversarial image left its ball: size {sizes.max():.6f} of {float(ball.epsilon):.6f}")
    return sizes.numpy()


def _picture(
    job: Job,
    model: Classifier,
    test: tuple[Tensor, Tensor],
    adversarial: Tensor,
    clean: np.ndarray,
    epsilon: str,
    compute: Compute,
) -> None:
    """Ten right images, preferring those that PGD broke."""
    after = prediction.logits(model, adversarial, compute).argmax(1).numpy()
    labels = test[1].numpy()
    broken = np.flatnonzero(clean & (after != labels))
    chosen = np.concatenate([broken, np.flatnonzero(clean & (after == labels))])[:10]
    if len(chosen) > 1:
        natural, attacked = (t[torch.from_numpy(chosen)].permute(0, 2, 3, 1).numpy() for t in (test[0], adversarial))
        pictures.perturbations(
            job.pictures / "perturbations.png",
            natural,
            attacked,
            labels[chosen],
            labels[chosen],
            after[chosen],
            epsilon,
        )


def _write_table(path: Path, table: dict[str, np.ndarray]) -> None:
    import pyarrow
    import pyarrow.parquet

    with files.writing(path) as file:
        pyarrow.parquet.write_table(pyarrow.table(table), file)
