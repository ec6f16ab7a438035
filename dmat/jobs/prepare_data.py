"""prepare_data: a named source -> train, validation and test splits as shards, stratified unless asked otherwise.

Test images come from those that a source brings for testing, where it brings any, and are never trained on. Exact
copies between the splits are counted and told; `evaluate_robust` decides what they mean for a headline.
"""

from pathlib import Path

import numpy as np

from dmat import files, seeds
from dmat.config import Normalisation, PrepareData
from dmat.data import overlap, shards, sources
from dmat.data.sources import ImageSource, stratified
from dmat.errors import DmatError
from dmat.job import Job, Result
from dmat.metrics import pictures

SPLITS = ("test", "validation", "train")  # drawn in this order, so that more training images keep the other splits


def run(settings: PrepareData, job: Job) -> Result:
    source = sources.load(settings.source, job.inputs.get("source"))
    wanted = {name: getattr(settings, name) for name in SPLITS}
    _expect_enough(settings.source, source, wanted)
    constants = _constants(settings.normalisation, source.images.shape[3])
    pools = {"train": (source.images, source.labels), **({"test": source.test} if source.test else {})}
    left = {pool: np.arange(len(labels)) for pool, (_, labels) in pools.items()}
    hashes: dict[str, np.ndarray] = {}  # of the images of each split
    for name, count in wanted.items():
        pool = name if name in pools else "train"
        images, labels = pools[pool]
        if name == "validation" and settings.validation_split == "first":
            chosen = left[pool][:count]
        else:
            chosen = left[pool][stratified(labels[left[pool]], count, seeds.stream(settings.seed, f"split/{name}"))]
        left[pool] = np.setdiff1d(left[pool], chosen)
        images, labels = images[chosen], labels[chosen]
        hashes[name] = overlap.digests(images)
        if name == "train":
            _expect_every_class(labels, source.class_names)
        mean, std = _moments(images) if constants is None else constants
        metadata = {
            "split": name,
            "source": settings.source,
            "origin": source.origin,
            "licence": source.licence,
            "source_indices": chosen.tolist(),
            "mean": mean,
            "std": std,
        }
        if source.test:
            metadata["source_split"] = pool  # what the indices count in
        shards.write_set(job.result / name, images, labels, class_names=source.class_names, metadata=metadata)
        if name == "train":
            pictures.sheet(job.pictures / f"{name}.png", images, labels, "Real training images, one row a class")
    files.write_text(job.result / "none", "stands for no selection: what an arm with `images: none` reads\n")
    copies = _copies(hashes)
    metrics = {**wanted, "classes": len(source.class_names), **copies}
    return Result(metrics, notes=[*source.notes, *_told(copies, wanted)])


def location(settings: PrepareData, path: Path) -> Path:
    """The file or folder at `path` whose bytes the result depends on."""
    return sources.location(settings.source, path)


def _expect_enough(name: str, source: ImageSource, wanted: dict[str, int]) -> None:
    """Raises DmatError where the splits ask for more than a source has."""
    asked, kind = dict(wanted), "images"
    if source.test:
        test = asked.pop("test")
        if test > len(source.test[1]):
            raise DmatError(
                f"prepare_data.test asks for {test} images; {name} brings {len(source.test[1])} test images of its "
                f"own; ask for fewer"
            )
        kind = "training images"
    if sum(asked.values()) > len(source.labels):
        raise DmatError(
            f"prepare_data asks for {sum(asked.values())} {kind} ({asked}); {name} has {len(source.labels)}; "
            f"ask for fewer"
        )


def _constants(normalisation: str | Normalisation, channels: int) -> tuple[list[float], list[float]] | None:
    """Mean and standard deviation of each channel as given or published; None where they are to be measured."""
    if normalisation == "measured":
        return None
    mean, std = (
        sources.NORMALISATIONS[normalisation]
        if isinstance(normalisation, str)
        else (normalisation.mean, normalisation.std)
    )
    if not len(mean) == len(std) == channels:
        raise DmatError(
            f"prepare_data.normalisation has {len(mean)} numbers of mean and {len(std)} of std; the images have "
            f"{channels} channel{'s' if channels > 1 else ''}; give one of each for every channel, or write measured"
        )
    return list(mean), list(std)


def _expect_every_class(labels: np.ndarray, names: tuple[str, ...]) -> None:
    """Raises DmatError where a class has no training image: no model learns it, and accuracy counts it as wrong."""
    missing = np.setdiff1d(np.arange(len(names)), labels)
    if len(missing):
        raise DmatError(
            f"the training split of {len(labels):,} images has none of the classes "
            f"{sources.listing([names[k] for k in missing])}; expected some of each; ask for more prepare_data.train "
            f"images, or name a source without these classes"
        )


def _copies(hashes: dict[str, np.ndarray]) -> dict[str, int]:
    """How many images of one split are exact copies of images of another, or of earlier ones of the test split."""
    pairs = {"test_in_train": ("test", "train"), "test_in_validation": ("test", "validation"),
             "validation_in_train": ("validation", "train")}  # fmt: skip
    found = {f"copies_{name}": overlap.shared(hashes[a], hashes[b]).sum() for name, (a, b) in pairs.items()}
    found["copies_within_test"] = overlap.repeated(hashes["test"]).sum()
    return {name: int(count) for name, count in found.items()}


def _told(copies: dict[str, int], wanted: dict[str, int]) -> list[str]:
    """What a reader must know of copies, if there are any."""
    if not any(copies.values()):
        return []
    return [
        f"exact copies: of {wanted['test']:,} test images {copies['copies_within_test']:,} are copies of an earlier "
        f"one, {copies['copies_test_in_train']:,} are also among the training images and "
        f"{copies['copies_test_in_validation']:,} among the validation images; of {wanted['validation']:,} validation "
        f"images {copies['copies_validation_in_train']:,} are among the training images; remove them from the source"
    ]


def _moments(images: np.ndarray) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel, in units of [0, 1]. images: uint8 [N, H, W, C].

    From whole sums: a float64 copy of all of CIFAR would take more than a GB.
    """
    count = images[..., 0].size
    total = images.sum((0, 1, 2), dtype=np.int64)
    squares = np.einsum("nhwc,nhwc->c", images, images, dtype=np.int64, casting="unsafe")
    mean = total / count
    std = np.sqrt(np.maximum(squares / count - mean**2, 0))
    return (mean / 255).round(6).tolist(), (std / 255).round(6).tolist()
