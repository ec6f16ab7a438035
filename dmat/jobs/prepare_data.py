"""prepare_data: a named source -> train, validation and test splits as shards, stratified unless set otherwise.

Test images come from the source's own test images where it has any, and are never trained on. Exact copies between the
splits are counted and reported; `evaluate_robust` decides what they mean for a headline.
"""

from pathlib import Path

import numpy as np

from dmat import files, seeds
from dmat.config import Normalisation, PrepareData
from dmat.data import croissant, overlap, shards, sources
from dmat.data.data_sets import DATA_SETS, NORMALISATIONS
from dmat.data.image_source import ImageSource, listing
from dmat.data.sources import stratified
from dmat.errors import DmatError
from dmat.job import Job, Result
from dmat.metrics import pictures

SPLITS = ("test", "validation", "train")  # drawn in this order, so more training images do not change other splits
_MOMENT_BLOCK = 1_000  # images whose levels are counted at once


def run(settings: PrepareData, job: Job) -> Result:
    """Draws the splits and writes one shard set per split. Raises DmatError where the source cannot provide them."""
    source = sources.load(settings.source, job.inputs.get("source"))
    split_sizes = {name: getattr(settings, name) for name in SPLITS}
    _expect_enough(settings.source, source, split_sizes)
    constants = _constants(settings.normalisation, source.images.shape[3])
    available = {"train": (source.images, source.labels), **({"test": source.test} if source.test else {})}
    remaining = {pool: np.arange(len(labels)) for pool, (_, labels) in available.items()}
    split_digests: dict[str, np.ndarray] = {}  # of the images of each split
    for name, count in split_sizes.items():
        pool = name if name in available else "train"
        images, labels = available[pool]
        if name == "validation" and settings.validation_split == "first":
            selected = remaining[pool][:count]
        else:
            selected = remaining[pool][
                stratified(labels[remaining[pool]], count, seeds.stream(settings.seed, f"split/{name}"))
            ]
        remaining[pool] = np.setdiff1d(remaining[pool], selected)
        images, labels = images[selected], labels[selected]
        split_digests[name] = overlap.digests(images)
        if name == "train":
            _expect_every_class(labels, source.class_names)
        mean, std = _channel_moments(images) if constants is None else constants
        metadata: shards.SetMetadata = {
            "split": name,
            "source": settings.source,
            "origin": source.origin,
            "licence": source.licence,
            "source_indices": selected.tolist(),
            "mean": mean,
            "std": std,
        }
        if source.test:
            metadata["source_split"] = pool  # what the indices count in
        shards.write_set(job.result / name, images, labels, class_names=source.class_names, metadata=metadata)
        croissant.write(job.result / name, f"{settings.source}_{name}")
        if name == "train":
            pictures.sheet(job.pictures / f"{name}.png", images, labels, "Real training images")
    files.write_text(job.result / "no_selection", "stands for no selection: what an arm with `images: none` reads\n")
    files.write_text(job.result / "no_generator", "stands for no generator: what image sets that are imported read\n")
    copies = _copies(split_digests)
    metrics = {**split_sizes, "classes": len(source.class_names), **copies}
    notes = [*source.notes, *_differences(settings.source, source), *_copy_notes(copies, split_sizes)]
    return Result(metrics, notes=notes)


def _differences(name: str, source: ImageSource) -> list[str]:
    """Notes on how a source that has the name of a published data set differs from it."""
    if (published := DATA_SETS.get(name)) is None or not published.layouts:
        return []
    counts = {"training": (len(source.labels), published.train)}
    if source.test is not None:
        counts["test"] = len(source.test[1]), published.test
    differences = [
        f"{actual:,} {kind} images, published are {expected:,}"
        for kind, (actual, expected) in counts.items()
        if actual != expected
    ]
    height, width, channels = source.images.shape[1:]
    if (height, width, channels) != (published.size, published.size, published.channels):
        differences.append(
            f"images {height} x {width} x {channels}, published are {published.size} x {published.size} x "
            f"{published.channels}"
        )
    return [f"{name} is not as published: {'; '.join(differences)}"] if differences else []


def location(settings: PrepareData, path: Path) -> Path:
    """The file or folder at `path` whose bytes determine the result."""
    return sources.location(settings.source, path)


def _expect_enough(name: str, source: ImageSource, split_sizes: dict[str, int]) -> None:
    """Raises DmatError where the splits ask for more than a source has."""
    requested, kind = dict(split_sizes), "images"
    if source.test:
        test = requested.pop("test")
        if test > len(source.test[1]):
            raise DmatError(
                f"prepare_data.test asks for {test} images; {name} has {len(source.test[1])} test images of its own; "
                f"ask for fewer"
            )
        kind = "training images"
    if sum(requested.values()) > len(source.labels):
        raise DmatError(
            f"prepare_data asks for {sum(requested.values())} {kind} ({requested}); {name} has {len(source.labels)}; "
            f"ask for fewer"
        )


def _constants(normalisation: str | Normalisation, channels: int) -> tuple[list[float], list[float]] | None:
    """Mean and standard deviation per channel, as configured or published; None where they are to be measured.

    Raises DmatError where their number is not that of the channels.
    """
    if normalisation == "measured":
        return None
    mean, std = (
        NORMALISATIONS[normalisation] if isinstance(normalisation, str) else (normalisation.mean, normalisation.std)
    )
    if not len(mean) == len(std) == channels:
        raise DmatError(
            f"prepare_data.normalisation has {len(mean)} values of mean and {len(std)} of std; the images have "
            f"{channels} channel{'s' if channels > 1 else ''}; give one of each per channel, or write measured"
        )
    return list(mean), list(std)


def _expect_every_class(labels: np.ndarray, names: tuple[str, ...]) -> None:
    """Raises DmatError where a class has no training image: no model learns it, and its images count as wrong.

    Also where there is a single class, which every model predicts. labels [N].
    """
    if len(names) < 2:
        raise DmatError(
            "the source has images of one class; expected two or more, as a classifier has nothing to learn from one; "
            "name another source"
        )
    missing = np.setdiff1d(np.arange(len(names)), labels)
    if len(missing):
        raise DmatError(
            f"the training split of {len(labels):,} images has none of the classes "
            f"{listing([names[k] for k in missing])}; expected some of each; ask for more prepare_data.train "
            f"images, or name a source without these classes"
        )


def _copies(digests: dict[str, np.ndarray]) -> dict[str, int]:
    """Numbers of exact copies: images of one split that are in another, and repeated images of the test split.

    digests: split -> one digest per image [N].
    """
    pairs = {"test_in_train": ("test", "train"), "test_in_validation": ("test", "validation"),
             "validation_in_train": ("validation", "train")}  # fmt: skip
    copies = {f"copies_{name}": overlap.shared(digests[a], digests[b]).sum() for name, (a, b) in pairs.items()}
    copies["copies_within_test"] = overlap.repeated(digests["test"]).sum()
    return {name: int(count) for name, count in copies.items()}


def _copy_notes(copies: dict[str, int], split_sizes: dict[str, int]) -> list[str]:
    """A note on exact copies for the reader of the result; empty if there are none."""
    if not any(copies.values()):
        return []
    return [
        f"exact copies: of {split_sizes['test']:,} test images {copies['copies_within_test']:,} are copies of an "
        f"earlier one, {copies['copies_test_in_train']:,} are also among the training images and "
        f"{copies['copies_test_in_validation']:,} among the validation images; of {split_sizes['validation']:,} "
        f"validation images {copies['copies_validation_in_train']:,} are among the training images; remove them from "
        f"the source"
    ]


def _channel_moments(images: np.ndarray) -> tuple[list[float], list[float]]:
    """Mean and standard deviation per channel, in units of [0, 1]. images: uint8 [N, H, W, C].

    From a histogram of the 256 levels, so from sums of integers: a float64 copy of all of CIFAR would take more than a
    GB.
    """
    histogram = np.zeros((images.shape[-1], 256), dtype=np.int64)
    for start in range(0, len(images), _MOMENT_BLOCK):
        for channel in range(len(histogram)):
            values = images[start : start + _MOMENT_BLOCK, ..., channel].reshape(-1)
            histogram[channel] += np.bincount(values, minlength=256)
    levels, count = np.arange(256), images[..., 0].size
    mean = histogram @ levels / count
    std = np.sqrt(np.maximum(histogram @ levels**2 / count - mean**2, 0))
    return (mean / 255).round(6).tolist(), (std / 255).round(6).tolist()
