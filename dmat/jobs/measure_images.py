"""measure_images: selected images against real ones -> quality, class agreement, memorisation, duplicates.

The measures are those of `models.image_judge`. Memorisation is a comparison with images that no generator was trained
on: the validation split. The test split is read for one comparison only: whether the images are near to it.
"""

from pathlib import Path

import numpy as np

from dmat import files
from dmat.config import MeasureImages
from dmat.data import shards
from dmat.data.permutation import Permutation
from dmat.data.selections import open_selection
from dmat.errors import DmatError
from dmat.job import Job, Result
from dmat.metrics import image_measures, pictures, quality
from dmat.metrics.quality import Nearest
from dmat.models.image_judge import ImageJudge
from dmat.training import weights

_PAIRS = 50  # nearest images that a picture shows


def run(settings: MeasureImages, job: Job) -> Result:
    """Measures `settings.draws` disjoint random samples of up to `settings.images` selected images.

    The pictures show the first sample. Raises DmatError if the selection has too few images.
    """
    selected = open_selection(job.inputs["selection"], job.inputs["images"])
    size = min(settings.images, len(selected) // settings.draws)
    if size < quality.FEWEST_IMAGES:
        raise DmatError(
            f"the selection has {len(selected)} images for {settings.draws} draws; expected at least "
            f"{quality.FEWEST_IMAGES} for each; lower measure_images.draws, or generate or keep more images"
        )
    judge = ImageJudge(
        job.inputs["scorer"] / weights.BEST,
        shards.open_shards(job.inputs["train"]),
        shards.open_shards(job.inputs["validation"]),
        job.compute,
        features=settings.features,
        features_file=job.inputs.get("source"),
        reference=settings.reference,
        test=shards.open_shards(job.inputs["test"]),
        seed=settings.seed,
        quiet=job.quiet,
    )
    order = Permutation(len(selected), settings.seed, "measured images")
    draws = []
    for draw in range(settings.draws):
        images, labels = selected.take(order.items(np.arange(draw * size, (draw + 1) * size)))
        # The scorer agrees with labels that it gave itself, which says nothing.
        judgement = judge.measure(images, None if selected.pseudo_labels is not None else labels, settings.near)
        draws.append(judgement.measures)
        if draw == 0:
            pictures.sheet(job.pictures / "kept.png", images, labels, "Kept generated images")
            for split, nearest in (("train", judgement.to_train), ("test", judgement.to_test)):
                if nearest is not None:
                    _draw_pairs(job.pictures / f"nearest_{split}.png", images, nearest, judge, split)
    measures = [*image_measures.over_draws(draws), *judge.of_real_images()]
    files.write_json(job.result / "measures" / image_measures.MEASURES, [measure.plain() for measure in measures])
    return Result({"measured": size, **image_measures.metrics(measures)}, notes=judge.network.notes)


def _draw_pairs(path: Path, images: np.ndarray, nearest: Nearest, judge: ImageJudge, split: str) -> None:
    """Draws the images uint8 [N, H, W, C] that are nearest to real ones, each beside that one."""
    closest = np.argsort(nearest.distances, kind="stable")[:_PAIRS]
    pictures.pairs(
        path, images[closest], judge.counterparts(split, nearest.indices[closest]), nearest.distances[closest],
        f"Kept images nearest to the {split} split: generated, real, distance of their pixels in [0, 1]",
    )  # fmt: skip
