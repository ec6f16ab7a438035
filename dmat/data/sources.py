"""Where real images come from. Each source is a function (path) -> Source; none of them needs a network, and none
runs anything that is in a file.

A source may bring its own test images; otherwise `prepare_data` splits them off. `recognise` finds out by looking what
lies at a path.
"""

import dataclasses
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from dmat.data import cifar, shards
from dmat.errors import DmatError

NOT_STATED = "unknown"  # licence
MOST_CLASSES = 100_000  # more is taken for a mistake
# Mean and std of each channel in [0, 1], inside the networks of Wang et al. 2023; for CIFAR RobustBench has the same.
NORMALISATIONS = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "svhn": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "tinyimagenet": ((0.4802, 0.4481, 0.3975), (0.2302, 0.2265, 0.2262)),
}
SPLITS = ("train", "test")
OTHER_SPLITS = ("val", "valid", "validation")  # beside those two; `prepare_data` draws its own


@dataclasses.dataclass(frozen=True)
class Source:
    """images uint8 [N, H, W, C], labels int64 [N], names of the classes in label order, licence, where it is from.

    test: images and labels of the same kind that are for testing alone; None where a source has no such split.
    split: of which one the images are, where a source says so or somebody chose; else "".
    """

    images: np.ndarray
    labels: np.ndarray
    class_names: tuple[str, ...]
    licence: str
    origin: str
    test: tuple[np.ndarray, np.ndarray] | None = None
    split: str = ""


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
    """An uncompressed or compressed .npz with `image` uint8 [N, H, W, C] and `label` integers [N] from 0, and perhaps
    `test_image` and `test_label`."""
    if path is None or not path.is_file():
        raise DmatError(f"prepare_data.path is {path}; expected an .npz file with `image` and `label`; give its path")
    if not zipfile.is_zipfile(path):
        raise DmatError(f"{path} is no .npz archive; expected arrays `image` and `label`; save it by numpy.savez")
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files if name.removeprefix("test_") in ("image", "label")}
            held = ", ".join(archive.files[:5]) or "nothing"
    except (ValueError, OSError, EOFError, NotImplementedError, zipfile.BadZipFile, zlib.error) as error:
        raise DmatError(f"{path} is not a whole .npz of numbers ({error}); save it again by numpy.savez") from None
    images, labels = _pair(path, arrays, held, "")
    test = _pair(path, arrays, held, "test_") if {"test_image", "test_label"} & set(arrays) else None
    classes = 1 + max(int(part.max(initial=0)) for part in (labels, *(test or ())[1:]))
    return Source(images, labels, tuple(str(k) for k in range(classes)), NOT_STATED, path.name, test)


def _pair(path: Path, arrays: dict[str, np.ndarray], held: str, prefix: str) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels of an .npz, the labels as int64."""
    image, label = f"{prefix}image", f"{prefix}label"
    missing = {image, label} - set(arrays)
    if missing:
        raise DmatError(
            f"{path} lacks {', '.join(sorted(missing))}; expected arrays `{image}` and `{label}`; it holds {held}"
        )
    images, labels = arrays[image], arrays[label]
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3):
        raise DmatError(f"{path}: `{image}` is {images.dtype} {images.shape}; expected uint8 [N, H, W, 1 or 3]")
    if labels.shape != images.shape[:1] or labels.dtype.kind not in "iu" or labels.min(initial=0) < 0:
        raise DmatError(f"{path}: `{label}` is {labels.dtype} {labels.shape}; expected {len(images)} integers from 0")
    if labels.max(initial=0) >= MOST_CLASSES:
        raise DmatError(
            f"{path}: `{label}` goes up to {labels.max()}; expected classes counted from 0, fewer than "
            f"{MOST_CLASSES:,}; number them anew"
        )
    return images, labels.astype(np.int64)


def cifar10(path: Path | None) -> Source:
    """50,000 training and 10,000 test images 32x32 in 10 classes: `cifar-10-batches-py` or `cifar-10-batches-bin`."""
    return _cifar("cifar10", path)


def cifar100(path: Path | None) -> Source:
    """50,000 training and 10,000 test images 32x32 in 100 classes: `cifar-100-python` or `cifar-100-binary`."""
    return _cifar("cifar100", path)


def _cifar(data: str, path: Path | None) -> Source:
    found = cifar.read(data, _folder(path, f"a {cifar.TITLES[data]} folder"))
    return Source(*found.train, found.names, NOT_STATED, found.origin, found.test)


def folder(path: Path | None) -> Source:
    """A folder of images in one sub-folder a class, classes in the order of their names; or such folders in `train` and
    `test`. All images have one size and are all grey or all in colour."""
    root = _folder(path, "a folder with one sub-folder of images a class")
    inside = _folders(root)
    if not set(inside) & {*SPLITS} or set(inside) - {*SPLITS, *OTHER_SPLITS}:  # a class may be called train
        images, labels, names = _images(root)
        return Source(images, labels, names, NOT_STATED, f"images in {root.name}")
    if "train" not in inside:
        raise DmatError(f"{root} has {', '.join(inside)} and no train; expected classes, or train and test; add train")
    images, labels, names = _images(root / "train")
    test = None
    if "test" in inside:
        *test_pair, test_names = _images(root / "test", images.shape[1:])
        if test_names != names:
            odd = sorted(set(names) ^ set(test_names))
            raise DmatError(
                f"{root}: train and test differ in the classes {', '.join(odd[:5])}; expected the same sub-folders in "
                f"both; add or remove them"
            )
        test = (test_pair[0], test_pair[1])
    return Source(images, labels, names, NOT_STATED, f"images in {root.name}", test)


def _images(root: Path, shape: tuple[int, ...] | None = None) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """Images uint8 [N, H, W, C], labels int64 [N] and class names below `root`. shape: that all must have, if known."""
    from torchvision.datasets.folder import (  # type: ignore[import-untyped]  # half a second: only where it is used
        IMG_EXTENSIONS,
        make_dataset,
    )

    names = _folders(root)
    try:
        files = make_dataset(str(root), {name: k for k, name in enumerate(names)}, IMG_EXTENSIONS) if names else []
    except FileNotFoundError as error:
        empty = str(error).removeprefix("Found no valid file for the classes ").partition(". Supported")[0]
        raise DmatError(
            f"{root} has no image of the classes {empty}; expected some ({', '.join(IMG_EXTENSIONS)}) in each "
            f"sub-folder; add them or remove the sub-folder"
        ) from None
    if not files:
        raise DmatError(f"{root} has no sub-folders; expected one a class, with its images in it; give another path")
    labels = np.array([label for _, label in files], dtype=np.int64)
    first = _image(Path(files[0][0]))
    wanted = shape or first.shape
    images = np.empty((len(files), *wanted), dtype=np.uint8)
    for k, (name, _) in enumerate(files):
        one = _image(Path(name)) if k else first
        if one.shape != wanted:
            raise DmatError(
                f"{name} is {_size(one.shape)}; expected {_size(wanted)} as the other images are; make them all alike"
            )
        images[k] = one
    return images, labels, tuple(names)


def _image(path: Path) -> np.ndarray:
    """One image file as uint8 [H, W, 1] or [H, W, 3]."""
    from PIL import Image

    try:
        with Image.open(path) as opened:
            mode, image = opened.mode, opened.convert("RGB") if opened.mode == "P" else opened
            pixels = np.asarray(image)
    except Exception as error:  # PIL has no common one for damaged files
        raise DmatError(f"{path} cannot be read as an image ({error}); bring a good copy or remove it") from None
    if mode not in ("L", "RGB", "P"):
        raise DmatError(f"{path} is of the kind {mode}; expected 8 bits of grey or RGB a pixel; convert it")
    return pixels[..., None] if pixels.ndim == 2 else pixels


def _size(shape: tuple[int, ...]) -> str:
    return f"{shape[1]}x{shape[0]} in {'colour' if shape[2] == 3 else 'grey'}"


def _folders(path: Path) -> list[str]:
    """Sub-folders in the order of their names, without hidden ones and those that archives of macOS leave."""
    found = (one.name for one in path.iterdir() if one.is_dir())
    return sorted(name for name in found if not name.startswith((".", "__MACOSX")))


def sharded(path: Path | None) -> Source:
    """A folder that dmat wrote: shards and their manifest. Every checksum is compared."""
    root = _folder(path, f"a folder of shards with its {shards.MANIFEST}")
    try:
        opened = shards.open_shards(root)
        images, labels = opened.all()
        names = tuple(str(name) for name in opened.manifest["class_names"])
    except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
        raise DmatError(
            f"{root / shards.MANIFEST} describes no shards of dmat ({type(error).__name__}: {error}); expected what a "
            f"stage wrote; make the set again"
        ) from None
    split = opened.manifest.get("split")
    origin = str(opened.manifest.get("origin", root.name)) + (f", split {split}" if split else "")
    licence = str(opened.manifest.get("licence", NOT_STATED))
    return Source(images, labels, names, licence, origin, split=str(split or ""))


SOURCES: dict[str, Callable[[Path | None], Source]] = {
    "digits": digits,
    "npz": npz,
    "cifar10": cifar10,
    "cifar100": cifar100,
    "folder": folder,
    "shards": sharded,
}


def load(name: str, path: Path | None) -> Source:
    """A source by its name. Raises DmatError also for a set that is empty or that no job could take."""
    return _checked(SOURCES[name](path), path or name)


def location(name: str, path: Path) -> Path:
    """The file or folder that a source reads, given its path: of a CIFAR folder's parent only that folder."""
    if not path.exists():
        raise DmatError(f"prepare_data.path is {path}, which does not exist; expected the images of source {name}")
    return cifar.located(name, path)[0] if name in cifar.LAYOUTS else path


def recognise(what: str | Path, split: str | None = None) -> Source:
    """What lies at a path, found out by looking, or the word `digits`: images and labels of the split test or train.

    Without a `split` the test images are meant. Where there is no test split all images are, and the origin says so;
    a `split` then is the word of who names it, unless the source itself says another. Raises DmatError.
    """
    if split not in (None, *SPLITS):
        raise DmatError(f"the split is {split!r}; expected test or train; name one of them")
    source = load(_kind(what), None if what == "digits" else Path(what))
    if split and source.split not in ("", split):
        raise DmatError(f"{what} holds the split {source.split}, not {split}; name other images")
    if source.test is None:
        part, images, labels = "all images, as it has no test images of its own", source.images, source.labels
        part += f"; said to be of the split {split}" if split and not source.split else ""
        found = source.split or split or ""
    elif split in (None, "test"):
        found = "test"
        part, (images, labels) = "its test images", source.test
    else:
        found = "train"
        part, images, labels = "its training images", source.images, source.labels
    origin = f"{source.origin}: {part}"
    return dataclasses.replace(source, images=images, labels=labels, origin=origin, test=None, split=found)


def _kind(what: str | Path) -> str:
    """The name in SOURCES of what lies there."""
    path = Path(what)
    if what == "digits":
        return "digits"
    if path.is_file() and zipfile.is_zipfile(path):
        return "npz"
    if path.is_dir():
        found = [data for data in cifar.LAYOUTS if cifar.find(data, path)]
        if len(found) > 1:
            raise DmatError(
                f"{path} holds CIFAR-10 and CIFAR-100; expected one of them; give the folder of the one meant"
            )
        if found:
            return found[0]
        if (path / shards.MANIFEST).is_file():
            return "shards"
        if _folders(path) and _holds_images(path):
            return "folder"
    state = "is nothing that dmat reads" if path.exists() else "does not exist"
    raise DmatError(
        f"{path} {state}; looked for the word digits, an .npz file, a CIFAR-10 or CIFAR-100 folder (python or binary "
        f"version), a folder of shards ({shards.MANIFEST}) and a folder with one sub-folder of images a class; give "
        f"one of these"
    )


def _holds_images(path: Path) -> bool:
    from torchvision.datasets.folder import IMG_EXTENSIONS

    return any(one.suffix.lower() in IMG_EXTENSIONS for one in path.rglob("*"))


def _folder(path: Path | None, what: str) -> Path:
    if path is None or not path.is_dir():
        raise DmatError(f"prepare_data.path is {path}; expected {what}; give its path")
    return path


def _checked(source: Source, path: Path | str) -> Source:
    """The same source, if its images and labels are what every job expects."""
    parts = [("", source.images, source.labels), *([("test ", *source.test)] if source.test else [])]
    for part, images, labels in parts:
        if len(labels) == 0:
            raise DmatError(f"{path} has no {part}images; expected at least one; give another path")
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3):
            raise DmatError(
                f"{path}: the {part}images are {images.dtype} {images.shape}; expected uint8 [N, H, W, 1 or 3]; "
                f"convert them"
            )
        if images.shape[1:] != source.images.shape[1:]:
            raise DmatError(
                f"{path}: the test images are {_size(images.shape[1:])}, the others {_size(source.images.shape[1:])}; "
                f"expected one size; make them all alike"
            )
        if labels.shape != images.shape[:1] or labels.dtype.kind not in "iu":
            raise DmatError(
                f"{path}: the {part}labels are {labels.dtype} {labels.shape}; expected {len(images)} integers; "
                f"convert them"
            )
        if labels.min() < 0 or labels.max() >= len(source.class_names):
            raise DmatError(
                f"{path} has {part}labels from {labels.min()} to {labels.max()}; expected 0 to "
                f"{len(source.class_names) - 1}, one a class; mend the labels"
            )
    return source


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
