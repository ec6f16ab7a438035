"""evaluate_robust: best and last weights on the test split -> per-image table, accuracies with intervals, headline.

The only stage that opens the test split. It also opens what the arm trained on, to count test images that are exact
copies of those. Everything is computed in float32 and in shards (`dmat.evaluation`): a restart
loses one shard at most, and several processes share them. AutoAttack and the checks are about the best weights.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dmat import files
from dmat.config import EvaluateRobust, WrittenNumber
from dmat.data import overlap, shards
from dmat.data.mixes import open_mix
from dmat.data.pixels import load_all
from dmat.data.shards import Shards
from dmat.evaluation import work
from dmat.evaluation.evaluate import Evaluation
from dmat.evaluation.measures import Subject, images_sha256
from dmat.evaluation.table import PER_IMAGE, PROTOCOL, SUMMARY, write_table
from dmat.job import Job, Result
from dmat.metrics.intervals import wilson
from dmat.models.classifiers import load_classifier
from dmat.robust import auto_attack
from dmat.robust.attacks import Ball
from dmat.robust.networks import Classifier
from dmat.tracking import registry
from dmat.training import weights

WHICH = {"best": weights.BEST, "last": weights.LAST}


def run(settings: EvaluateRobust, job: Job) -> Result:
    test = shards.open_shards(job.inputs["test"])
    models = _models(job)
    sidecars = {which: sidecar for which, (_, sidecar) in models.items()}
    sidecar_sha256 = weights.sidecar_sha256(_weights(job, "best"), sidecars["best"])
    evaluations = _evaluations(settings, job, models)
    best = evaluations["best"]
    copies = _copies(test, len(best.subject.labels), job)  # before the hours: it may miss images
    work.compute_all(_units(evaluations), wait=True, quiet=job.quiet)
    columns = {name: one.columns() for name, one in evaluations.items()}
    verdict = best.verdict(columns["best"], len(test), copies, test.manifest["split"])
    threat, names = sidecars["best"]["threat"], test.manifest["class_names"]
    best.draw(job.pictures, columns["best"], threat["epsilon"], names, verdict)
    table: dict[str, np.ndarray] = {
        "index": np.arange(len(best.subject.labels)),
        "label": best.subject.labels.numpy(),
    }
    summary: dict[str, Any] = {}
    for which in WHICH:
        own, train = columns[which], columns[f"{which}-train"]
        rows = evaluations[which].rows(own, verdict)
        table |= {f"{which}_{name}": values for name, values in rows.items()}
        measured = (
            best.summary(own, verdict) if which == "best" else {n: wilson(own[n]).plain() for n in ("clean", "pgd")}
        )
        summary[which] = {
            **measured,
            "train_pgd": wilson(train["pgd"]).plain(),
            "images_seen": sidecars[which]["images_seen"],
            "train_test_gap": float(train["pgd"].mean() - own["pgd"].mean()),
        }
    folder = job.result / "evaluation"
    write_table(folder / PER_IMAGE, table)
    files.write_json(folder / PROTOCOL, best.protocol(threat, len(test)))
    files.write_json(folder / SUMMARY, summary)
    all_images = images_sha256(*load_all(test))
    candidate = registry.RegistryCandidate(
        registry.name_of(test.manifest["source"], all_images, threat["norm"], threat["epsilon"]),
        _weights(job, "best"),
        {
            **{f"dmat.{name}": value for name, value in job.instance.items()},
            "data.test.sha256": all_images,
            **verdict.about_model(summary["best"], threat),
        },
        summary["best"]["headline"]["value"] if summary["best"]["headline"] else None,
        weights_sha256=sidecars["best"]["sha256"],
        sidecar_sha256=sidecar_sha256,
    )
    metrics = {
        f"{which}_{name}": value["value"] if isinstance(value, dict) else value
        for which, values in summary.items()
        for name, value in values.items()
        if name != "headline" and (isinstance(value, int | float) or (isinstance(value, dict) and "value" in value))
    }
    return Result(metrics, notes=verdict.sentences, tags=verdict.tags, models=[candidate])


def _copies(test: Shards, count: int, job: Job) -> dict[str, np.ndarray]:
    """Which of the first `count` test images are exact copies, and of what: flags [count], as `checks.unseen` takes."""
    real = shards.open_shards(job.inputs["train"])
    _, generated, kept = open_mix(job.inputs["mix"], real, job.root)
    found = overlap.digests_of(test, np.arange(count))
    copies = {
        "earlier test images": overlap.repeated(found),
        "real training images": overlap.shared(found, overlap.digests_of(real)),
    }
    if generated is not None:
        copies["generated training images"] = overlap.shared(found, overlap.digests_of(generated, kept))
    return copies


def run_worker(settings: EvaluateRobust, job: Job) -> None:
    """Computes shards that nobody else is computing, until none is left."""
    work.compute_all(_units(_evaluations(settings, job, _models(job))), wait=False, quiet=job.quiet)


def estimate(settings: EvaluateRobust, job: Job) -> dict[str, Any]:
    """What `--dry-run` says: the attacks, and the time left."""
    models = _models(job)
    evaluations = _evaluations(settings, job, models)
    test = shards.open_shards(job.inputs["test"])
    protocol = evaluations["best"].protocol(models["best"][1]["threat"], len(test))
    return {"protocol": protocol} | work.estimate(_units(evaluations))


def first_shard(settings: EvaluateRobust, job: Job) -> work.ShardTask:
    """Of the best weights on the test split."""
    return _evaluations(settings, job, _models(job))["best"].shards[0]


def _units(evaluations: dict[str, Evaluation]) -> list[work.ShardTask]:
    return [unit for one in evaluations.values() for unit in one.tasks]


def _models(job: Job) -> dict[str, tuple[Classifier, dict[str, Any]]]:
    """By name of the weights: the classifier in evaluation mode and its sidecar, which was checked against them."""
    test = shards.open_shards(job.inputs["test"])
    return {which: load_classifier(_weights(job, which), test, job.compute.exact()) for which in WHICH}


def _evaluations(
    settings: EvaluateRobust, job: Job, models: Mapping[str, tuple[Classifier, dict[str, Any]]]
) -> dict[str, Evaluation]:
    """By name: best and last weights on test and, for the gap between them, on train."""
    compute = job.compute.exact()
    splits = {name: shards.open_shards(job.inputs[name]) for name in ("test", "train")}
    found = {}
    for which, (model, sidecar) in models.items():
        ball = Ball(sidecar["threat"]["norm"], WrittenNumber(sidecar["threat"]["epsilon"]))
        for split, opened in splits.items():
            name = which if split == "test" else f"{which}-{split}"
            full_suite = name == "best"
            images, labels = load_all(opened)
            if split == "test" and settings.images:
                images, labels = images[: settings.images], labels[: settings.images]
            suite = (
                auto_attack.suite(settings.auto_attack, opened.classes)
                if full_suite and settings.auto_attack != "none"
                else None
            )
            found[name] = Evaluation(
                job.work / "shards" / name,
                Subject(name, model, images, labels, ball, suite, full_suite),
                settings,
                compute,
                {
                    "weights": sidecar["sha256"],
                    "images": files.checksum(job.inputs[split]),
                    "pgd_step": settings.pgd_step(ball.norm, ball.epsilon),
                },
            )
    return found


def _weights(job: Job, which: str) -> Path:
    return job.inputs["classifier"] / WHICH[which]
