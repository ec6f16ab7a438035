"""Where real images come from. Each source is a function () -> Source; none of them needs a network.

A source may bring its own test images; otherwise `prepare_data` splits them off.
"""

import dataclasses
import zipfile
from pathlib import Path

import numpy as np

from dmat.errors import DmatError


@dataclasses.dataclass(frozen=True)
class Source:
    """images uint8 [N, H, W, C], labels int64 [N], names of the classes in label order, licence, where it is from."""

    images: np.ndarray
    labels: np.ndarray
    class_names: tuple[str, ...]
    licence: str
    origin: str


def digits(path: Path | None = None) -> Source:
    """The 1,797 handwritten 8x8 digits that ship inside scikit-learn (UCI Optical Recognition, CC BY 4.0).

    17 grey levels v = 0..16 stored as round(v * 255 / 16).
    """
    from sklearn.datasets import load_digits  # type: ignore[import-untyped]  # 3 s: only where it is used

    bunch = load_digits()
    images = np.rint(bunch.images * (255 / 16)).astype(np.uint8)[..., None]  # [1797, 8, 8, 1]
    names = tuple(str(digit) for digit in range(10))
    return Source(
        images,
        bunch.target.astype(np.int64),
        names,
        "CC BY 4.0",
        "UCI Optical Recognition of Handwritten Digits, test part, from scikit-learn",
    )


def npz(path: Path | None) -> Source:
    """An uncompressed or compressed .npz with `image` uint8 [N, H, W, C] and `label` integers [N] from 0."""
    if path is None or not path.is_file():
        raise DmatError(f"prepare_data.path is {path}; expected an .npz file with `image` and `label`; give its path")
    if not zipfile.is_zipfile(path):
        raise DmatError(f"{path} is no .npz archive; expected arrays `image` and `label`; save it by numpy.savez")
    with np.load(path, allow_pickle=False) as archive:
        missing = {"image", "label"} - set(archive.files)
        if missing:
            raise DmatError(
                f"{path} lacks {', '.join(sorted(missing))}; expected arrays `image` and `label`; "
                f"it holds {', '.join(archive.files) or 'nothing'}"
            )
        images, labels = archive["image"], archive["label"]
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3):
        raise DmatError(f"{path}: `image` is {images.dtype} {images.shape}; expected uint8 [N, H, W, 1 or 3]")
    if labels.shape != images.shape[:1] or labels.dtype.kind not in "iu" or labels.min(initial=0) < 0:
        raise DmatError(f"{path}: `label` is {labels.dtype} {labels.shape}; expected {len(images)} integers from 0")
    names = tuple(str(k) for k in range(int(labels.max(initial=0)) + 1))
    return Source(images, labels.astype(np.int64), names, "unknown", str(path.name))


SOURCES = {"digits": digits, "npz": npz}


def stratified(labels: np.ndarray, count: int, generator: np.random.Generator) -> np.ndarray:
    """Sorted indices of `count` items whose class shares are those of `labels` as nearly as whole numbers allow.

    Largest remainders get the odd items; ties go to the lower class.
    """
    classes, sizes = np.unique(labels, return_counts=True)
    if not 0 <= count <= len(labels):
        raise DmatError(f"a split of {count} images was asked from {len(labels)}; ask for fewer")
    takes, remainders = np.divmod(sizes * count, max(len(labels), 1))  # whole numbers: ties are exact
    for winner in np.argsort(-remainders, kind="stable")[: count - takes.sum()]:
        takes[winner] += 1
    chosen = [generator.permutation(np.flatnonzero(labels == c))[:take] for c, take in zip(classes, takes, strict=True)]
    return np.sort(np.concatenate(chosen)) if chosen else np.zeros(0, dtype=np.int64)
