"""prepare_data: a named source -> stratified train, validation and test splits as shards."""

from typing import Any

import numpy as np

from dmat import seeds
from dmat.config import PrepareData
from dmat.data import shards
from dmat.data.sources import SOURCES, stratified
from dmat.errors import DmatError
from dmat.jobs.execution import Job
from dmat.metrics import pictures

SPLITS = ("test", "validation", "train")  # drawn in this order, so that more training images keep the other splits


def run(settings: PrepareData, job: Job) -> dict[str, Any]:
    source = SOURCES[settings.source](job.project_path(settings.path))
    wanted = {name: getattr(settings, name) for name in SPLITS}
    if sum(wanted.values()) > len(source.labels):
        raise DmatError(
            f"prepare_data asks for {sum(wanted.values())} images ({wanted}); {settings.source} has "
            f"{len(source.labels)}; ask for fewer"
        )
    left = np.arange(len(source.labels))
    for name, count in wanted.items():
        chosen = left[stratified(source.labels[left], count, seeds.stream(settings.seed, f"split/{name}"))]
        left = np.setdiff1d(left, chosen)
        images, labels = source.images[chosen], source.labels[chosen]
        unit = images.astype(np.float64) / 255
        facts = {
            "split": name,
            "source": settings.source,
            "origin": source.origin,
            "licence": source.licence,
            "source_indices": chosen.tolist(),
            "mean": unit.mean((0, 1, 2)).round(6).tolist(),
            "std": unit.std((0, 1, 2)).round(6).tolist(),
        }
        shards.write_set(job.result / name, images, labels, class_names=source.class_names, facts=facts)
        if name == "train":
            pictures.sheet(job.pictures / f"{name}.png", images, labels, "Real training images, one row a class")
    return {**wanted, "classes": len(source.class_names)}
