"""score_images: an image set and the scorer -> how sure the scorer is of the label of each image.

The scores are those of `data.scores.SCORES`. That of Wang et al. 2023 for their 1M set is the first: the softmax
probability of the target class by a standard classifier. Images
of an unconditional model get the class of the highest probability as their label, as Gowal et al. 2021 label theirs.
"""

import functools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dmat import files
from dmat.config import ScoreImages
from dmat.data import dvc_cache, shards
from dmat.data.pixels import to_float
from dmat.data.scores import SCORES, ScoreEntry, label_file, score_file
from dmat.data.shard_pool import ShardPool, expect_numbers
from dmat.data.shards import ArrayName, Manifest, ShardRecord
from dmat.job import Job, Result
from dmat.metrics import pictures
from dmat.models.classifiers import load_classifier
from dmat.robust import prediction
from dmat.robust.networks import Classifier
from dmat.training import weights
from dmat.training.interruption import Interruption


def run(settings: ScoreImages, job: Job) -> Result:
    """Scores the shards of the image set that have no scores yet, and writes the manifest of scores."""
    images = shards.open_shards(job.inputs["images"])
    model, pool = _open(images.manifest, settings, job)
    shard_scores, shard_labels, entries = [], [], list[ScoreEntry]()
    for number, record in _records(images.manifest, model, pool, settings, job, range(len(images.images))):
        entry = images.manifest["shards"][number]
        name = score_file(entry)
        pool.link(record, {"scores": job.result / "scores" / name})
        entries.append({"file": name, "count": record["count"], "sha256": record["scores_sha256"]})
        shard_scores.append(files.load_array(job.result / "scores" / name, mapped=True)[:, 0].copy())
        if not images.labelled:
            path = job.result / "scores" / label_file(entry)
            pool.link(record, {"labels": path})
            entries[-1] |= {"labels": path.name, "labels_sha256": record["labels_sha256"]}
            shard_labels.append(files.load_array(path))
    files.write_json(
        job.result / "scores" / shards.MANIFEST,
        {"schema": 1, "shards": entries, "count": len(images)},
    )
    scores = np.concatenate(shard_scores)  # of the first kind
    title = f"{job.instance['image_set']}: how sure the scorer is of the labels"
    pictures.histogram(job.pictures / "scores.png", scores, title, "probability of the label")
    metrics = {
        "images": len(scores),
        "mean_score": float(scores.mean()),
        "share_above_half": float((scores > 0.5).mean()),
    }
    notes = []
    if shard_labels:
        counts = np.bincount(np.concatenate(shard_labels), minlength=images.classes)
        metrics |= {"fewest_of_a_class": int(counts.min()), "most_of_a_class": int(counts.max())}
        named = [f"{name}: {count}" for name, count in zip(images.manifest["class_names"], counts, strict=True)]
        notes.append(f"the labels are the scorer's; images per class: {', '.join(named)}")
    return Result(
        metrics,
        notes=notes,
        measured={f"shards_{origin}": float(count) for origin, count in pool.counts.items()},
        pools=[pool.name],
    )


def pending_shards(settings: ScoreImages, job: Job) -> range:
    """Numbers of the shards that workers score. Those whose scores the pool has cost them no time."""
    return range(len(shards.read_manifest(job.inputs["images"])["shards"]))


def run_shards(settings: ScoreImages, job: Job, numbers: range) -> None:
    """Scores some of the set's shards for the process that publishes the scores, which may run later. Opens no others.

    numbers: of the shards, from 0. Raises DmatError for numbers of shards that the set does not have.
    """
    manifest = shards.read_manifest(job.inputs["images"])
    expect_numbers(numbers, len(manifest["shards"]), f"image set {job.instance['image_set']}")
    model, pool = _open(manifest, settings, job)
    for _ in _records(manifest, model, pool, settings, job, numbers):
        pass


def _open(manifest: Manifest, settings: ScoreImages, job: Job) -> tuple[Classifier, ShardPool]:
    """The scorer, and the pool of its scores of the set with this manifest."""
    model, sidecar = load_classifier(job.inputs["scorer"] / weights.BEST, manifest, job.compute)
    pool = job.pool(
        {
            "scorer_sha256": sidecar["sha256"],
            "batch": settings.batch,
            "precision": job.compute.precision,
            "device": job.compute.device.type,
        },
        ("scores",) if shards.has_labels(manifest) else ("scores", "labels"),
    )
    _offer_cached_scores(pool, job.root)
    return model, pool


def _records(
    manifest: Manifest, model: Classifier, pool: ShardPool, settings: ScoreImages, job: Job, numbers: range
) -> Iterator[tuple[int, ShardRecord]]:
    """Yields number and record of the scores of each of these shards, once the pool has them."""
    entries = manifest["shards"]
    total = sum(entries[number]["count"] for number in numbers)
    bar = tqdm(total=total, unit=" images", desc=job.work.parent.name, disable=job.quiet, unit_scale=True)
    with Interruption() as interruption, bar:
        for number in numbers:
            make = functools.partial(_score_shard, manifest, number, model, settings, job, interruption)
            entry = entries[number]
            name = Path(score_file(entry)).stem
            yield number, pool.obtain(name, entry["count"], make, interruption.raise_if_received)
            bar.update(entry["count"])


def _offer_cached_scores(pool: ShardPool, root: Path) -> None:
    """Offers the pool its scores from DVC's cache."""
    for manifest, copies in dvc_cache.sets_of_pool(root, "score_images", pool.name):
        for entry in manifest["shards"]:
            arrays: dict[ArrayName, tuple[Path, str]] = {"scores": (copies[entry["file"]], entry["sha256"])}
            if "labels" in entry:
                arrays["labels"] = copies[entry["labels"]], entry["labels_sha256"]
            pool.offer(Path(entry["file"]).stem, arrays)


def _score_shard(
    manifest: Manifest, number: int, model: Classifier, settings: ScoreImages, job: Job, interruption: Interruption
) -> dict[ArrayName, np.ndarray]:
    """The S `SCORES` of the N images of a shard, float32 [N, S].

    If the images have no labels, those of the scorer, int64 [N], are returned too.
    """
    pixels, labels = shards.open_shard(job.inputs["images"], manifest, number)
    labelled = shards.has_labels(manifest)
    scores = np.empty((len(pixels), len(SCORES)), dtype=np.float32)
    targets = np.empty(len(pixels), dtype=np.int64)
    for start in range(0, len(pixels), settings.batch):
        interruption.raise_if_received()
        rows = slice(start, start + settings.batch)
        probabilities = prediction.logits(model, to_float(np.array(pixels[rows])), job.compute).softmax(1)
        targets[rows] = labels[rows] if labelled else probabilities.argmax(1).numpy()
        scores[rows] = _scores(probabilities, torch.from_numpy(targets[rows])).numpy()
    return {"scores": scores} if labelled else {"scores": scores, "labels": targets}


def _scores(probabilities: Tensor, targets: Tensor) -> Tensor:
    """The S `SCORES` of images with class probabilities [N, K] and labels int64 [N]: float32 [N, S]."""
    own = probabilities.gather(1, targets[:, None])  # [N, 1]
    others = probabilities.scatter(1, targets[:, None], 0.0).amax(1, keepdim=True)
    certainty = torch.xlogy(probabilities, probabilities).sum(1, keepdim=True)
    return torch.cat([own, own - others, certainty], 1)
