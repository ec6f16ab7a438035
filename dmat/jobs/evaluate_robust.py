"""evaluate_robust: best and last weights on the test split -> per-image table, accuracies with intervals, headline.

The only stage that opens the test split. It also opens the training images of the arm, to count test images that are
exact copies of them. Everything is computed in float32 and in shards (`dmat.evaluation`): a restart loses one shard at
most, and several processes share the work. AutoAttack and the checks apply to the best weights only.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from dmat import files
from dmat.config import EvaluateRobust, WrittenNumber
from dmat.data import overlap, shards
from dmat.data.mixes import open_mix
from dmat.data.pixels import load_all
from dmat.data.shard_pool import expect_numbers
from dmat.data.shards import Shards
from dmat.evaluation import work
from dmat.evaluation.evaluate import Evaluation, Summary
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
from dmat.training.weights import TrainedSidecar

WEIGHTS_FILES = {"best": weights.BEST, "last": weights.LAST}


def run(settings: EvaluateRobust, job: Job) -> Result:
    """Evaluates best and last weights and writes table, protocol, summary and pictures."""
    test = shards.open_shards(job.inputs["test"])
    models = _models(job)
    sidecars = {weights_name: sidecar for weights_name, (_, sidecar) in models.items()}
    sidecar_sha256 = weights.sidecar_sha256(_weights_path(job, "best"), sidecars["best"])
    evaluations = _evaluations(settings, job, models)
    best = evaluations["best"]
    copies = _copies(test, len(best.subject.labels), job)  # before hours of attacks: it fails if images are missing
    work.compute_all(_tasks(evaluations), quiet=job.quiet)
    columns = {name: evaluation.columns() for name, evaluation in evaluations.items()}
    verdict = best.verdict(columns["best"], len(test), copies, test.manifest["split"])
    threat, class_names = sidecars["best"]["threat"], test.manifest["class_names"]
    best.draw(job.pictures, columns["best"], threat["epsilon"], class_names, verdict)
    table: dict[str, np.ndarray] = {
        "index": np.arange(len(best.subject.labels)),
        "label": best.subject.labels.numpy(),
    }
    summary: dict[str, Summary] = {}
    for weights_name in WEIGHTS_FILES:
        test_columns, train_columns = columns[weights_name], columns[f"{weights_name}-train"]
        rows = evaluations[weights_name].rows(test_columns, verdict)
        table |= {f"{weights_name}_{name}": values for name, values in rows.items()}
        measured: Summary = (
            best.summary(test_columns, verdict)
            if weights_name == "best"
            else {"clean": wilson(test_columns["clean"]).plain(), "pgd": wilson(test_columns["pgd"]).plain()}
        )
        summary[weights_name] = {
            **measured,
            "train_pgd": wilson(train_columns["pgd"]).plain(),
            "images_seen": sidecars[weights_name]["images_seen"],
            "train_test_gap": float(train_columns["pgd"].mean() - test_columns["pgd"].mean()),
        }
    folder = job.result / "evaluation"
    write_table(folder / PER_IMAGE, table)
    files.write_json(folder / PROTOCOL, best.protocol(threat, len(test)))
    files.write_json(folder / SUMMARY, summary)
    headline = summary["best"]["headline"]
    all_images = images_sha256(*load_all(test))
    candidate = registry.RegistryCandidate(
        registry.model_name(test.manifest["source"], all_images, threat["norm"], threat["epsilon"]),
        _weights_path(job, "best"),
        {
            **{f"dmat.{name}": value for name, value in job.instance.items()},
            "data.test.sha256": all_images,
            **weights.licences(sidecars["best"]),
            **verdict.model_tags(summary["best"], threat),
        },
        headline["value"] if headline else None,
        weights_sha256=sidecars["best"]["sha256"],
        sidecar_sha256=sidecar_sha256,
    )
    metrics = {
        f"{weights_name}_{name}": value["value"] if isinstance(value, dict) else value
        for weights_name, values in summary.items()
        for name, value in values.items()
        if name != "headline" and (isinstance(value, int | float) or (isinstance(value, dict) and "value" in value))
    }
    headlines = {"auto_attack": headline["value"]} if headline else {}
    return Result(metrics, headlines=headlines, notes=verdict.sentences, tags=verdict.tags, models=[candidate])


def _copies(test: Shards, count: int, job: Job) -> dict[str, np.ndarray]:
    """Which of the first `count` test images are exact copies of what: bool [N], as `checks.unseen` takes them."""
    real = shards.open_shards(job.inputs["train"])
    _, generated = open_mix(job.inputs["mix"], real, job.root)
    test_digests = overlap.digests_of(test, np.arange(count))
    copies = {
        "earlier test images": overlap.repeated(test_digests),
        "real training images": overlap.shared(test_digests, overlap.digests_of(real)),
    }
    if generated is not None:
        copies["generated training images"] = np.logical_or.reduce(
            [overlap.shared(test_digests, overlap.digests_of(part.images, part.indices)) for part in generated.parts]
        )
    return copies


def pending_shards(settings: EvaluateRobust, job: Job) -> list[int]:
    """Numbers of the shards that are not done, in the order in which `run` computes them."""
    tasks = _tasks(_evaluations(settings, job, _models(job)))
    return [number for number, task in enumerate(tasks) if not task.done]


def run_shards(settings: EvaluateRobust, job: Job, numbers: range) -> None:
    """Computes some of the shards for the process that publishes the evaluation, which may run later.

    numbers: of the shards, from 0, in the order in which `run` computes them. Raises DmatError for numbers of shards
    that the evaluation does not have.
    """
    tasks = _tasks(_evaluations(settings, job, _models(job)))
    expect_numbers(numbers, len(tasks), f"the evaluation of {job.instance['arm']}-{job.instance['seed']}")
    work.compute_all(tasks[numbers.start : numbers.stop], quiet=job.quiet)


def estimate(settings: EvaluateRobust, job: Job) -> dict[str, object]:
    """What `--dry-run` prints: the protocol of the attacks, and the time left."""
    models = _models(job)
    evaluations = _evaluations(settings, job, models)
    test = shards.open_shards(job.inputs["test"])
    protocol = evaluations["best"].protocol(models["best"][1]["threat"], len(test))
    return {"protocol": protocol, **work.Monitor(_tasks(evaluations)).estimate()}


def monitor(settings: EvaluateRobust, job: Job) -> work.Monitor:
    """Reads how far the evaluation is while others compute it."""
    return work.Monitor(_tasks(_evaluations(settings, job, _models(job))))


def first_shard(settings: EvaluateRobust, job: Job) -> work.ShardTask:
    """The first shard of the best weights on the test split."""
    return _evaluations(settings, job, _models(job))["best"].shards[0]


def _tasks(evaluations: dict[str, Evaluation]) -> list[work.ShardTask]:
    return [task for evaluation in evaluations.values() for task in evaluation.tasks]


def _models(job: Job) -> dict[str, tuple[Classifier, TrainedSidecar]]:
    """Name of the weights -> classifier in evaluation mode, and its sidecar, which was checked against the weights."""
    test = shards.open_shards(job.inputs["test"])
    return {
        weights_name: load_classifier(_weights_path(job, weights_name), test.manifest, job.compute.exact())
        for weights_name in WEIGHTS_FILES
    }


def _evaluations(
    settings: EvaluateRobust, job: Job, models: Mapping[str, tuple[Classifier, TrainedSidecar]]
) -> dict[str, Evaluation]:
    """Evaluations by name: best and last weights on the test split and, for the train-test gap, on the training one."""
    compute = job.compute.exact()
    splits = {name: shards.open_shards(job.inputs[name]) for name in ("test", "train")}
    evaluations = {}
    for weights_name, (model, sidecar) in models.items():
        ball = Ball(sidecar["threat"]["norm"], WrittenNumber(sidecar["threat"]["epsilon"]))
        for split, split_shards in splits.items():
            name = weights_name if split == "test" else f"{weights_name}-{split}"
            full_suite = name == "best"
            images, labels = load_all(split_shards)
            if split == "test" and settings.images:
                images, labels = images[: settings.images], labels[: settings.images]
            suite = (
                auto_attack.suite(settings.auto_attack, split_shards.classes)
                if full_suite and settings.auto_attack != "none"
                else None
            )
            evaluations[name] = Evaluation(
                job.work / "shards" / name,
                Subject(name, model, split_shards.classes, images, labels, ball, suite, full_suite),
                settings,
                compute,
                {
                    "weights": sidecar["sha256"],
                    "images": files.checksum(job.inputs[split]),
                    "pgd_step": settings.pgd_step(ball.norm, ball.epsilon),
                },
            )
    return evaluations


def _weights_path(job: Job, weights_name: str) -> Path:
    return job.inputs["classifier"] / WEIGHTS_FILES[weights_name]
