"""score_images: an image set and the scorer -> the probability that the scorer gives to the label of each image.

The score of Wang et al. 2023 for their 1M set: softmax probability of the target class by a standard classifier.
"""

import functools
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from dmat import files
from dmat.config import ScoreImages
from dmat.data import dvc_cache, shards
from dmat.data.pixels import to_float
from dmat.data.scores import score_file
from dmat.data.shard_pool import ShardPool
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
    model, sidecar = load_classifier(job.inputs["scorer"] / weights.BEST, images, job.compute)
    pool = job.pool(
        {
            "scorer_sha256": sidecar["sha256"],
            "batch": settings.batch,
            "precision": job.compute.precision,
            "device": job.compute.device.type,
        },
        ("scores",),
    )
    _offer_cached_scores(pool, job.root)
    shard_scores, entries = [], []
    bar = tqdm(total=len(images), unit=" images", desc=job.work.parent.name, disable=job.quiet, unit_scale=True)
    with Interruption() as interruption, bar:
        for entry, pixels, labels in zip(images.manifest["shards"], images.images, images.labels, strict=True):
            make = functools.partial(_score_shard, pixels, labels, model, settings, job, interruption)
            name = score_file(entry)
            record = pool.obtain(Path(name).stem, entry["count"], make, interruption.raise_if_received)
            pool.link(record, {"scores": job.result / "scores" / name})
            entries.append({"file": name, "count": record["count"], "sha256": record["scores_sha256"]})
            shard_scores.append(files.load_array(job.result / "scores" / name))
            bar.update(entry["count"])
    files.write_json(
        job.result / "scores" / shards.MANIFEST,
        {"schema": 1, "shards": entries, "count": len(images)},
    )
    scores = np.concatenate(shard_scores)
    title = f"{job.instance['image_set']}: how sure the scorer is of the labels"
    pictures.histogram(job.pictures / "scores.png", scores, title, "probability of the label")
    return Result(
        {"images": len(scores), "mean_score": float(scores.mean()), "share_above_half": float((scores > 0.5).mean())},
        measured={f"shards_{origin}": float(count) for origin, count in pool.counts.items()},
        pools=[pool.name],
    )


def _offer_cached_scores(pool: ShardPool, root: Path) -> None:
    """Offers the pool its scores from DVC's cache."""
    for manifest, copies in dvc_cache.sets_of_pool(root, "score_images", pool.name):
        for entry in manifest["shards"]:
            pool.offer(Path(entry["file"]).stem, {"scores": (copies[entry["file"]], entry["sha256"])})


def _score_shard(
    pixels: np.ndarray,
    labels: np.ndarray,
    model: Classifier,
    settings: ScoreImages,
    job: Job,
    interruption: Interruption,
) -> dict[shards.ArrayName, np.ndarray]:
    """Scores float32 [N] of images uint8 [N, H, W, C] with labels int64 [N]."""
    scores = np.empty(len(labels), dtype=np.float32)
    for start in range(0, len(labels), settings.batch):
        interruption.raise_if_received()
        rows = slice(start, start + settings.batch)
        probabilities = prediction.logits(model, to_float(np.array(pixels[rows])), job.compute).softmax(1)
        scores[rows] = probabilities.gather(1, torch.from_numpy(np.array(labels[rows]))[:, None])[:, 0].numpy()
    return {"scores": scores}
