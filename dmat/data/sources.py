"""Where real images come from. Each source is a function (path) -> Source; none of them needs a network, and none
runs anything that is in a file.

A source may bring its own test images; otherwise `prepare_data` splits them off. `recognise` finds out by looking what
lies at a path. A folder of images is read from the list of files that its checksum is made of (`files.visible_files`),
and every file in it is read, refused by its name, or left out and counted.
"""

import collections
import dataclasses
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from dmat import files, plugins
from dmat.data import cifar, shards
from dmat.errors import DmatError, first_line

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
SPLIT_FOLDERS = {  # names of sub-folders, in any case, and what they hold; the last is not read
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("test", "testing"), "test"),
    **dict.fromkeys(("val", "valid", "validation"), "validation"),
}
FORMATS = ("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")  # of PIL: still images; none runs a program
BESIDE_IMAGES = (".csv", ".db", ".html", ".ini", ".json", ".log", ".md", ".tsv", ".txt", ".xml", ".yaml", ".yml")


@dataclasses.dataclass(frozen=True)
class ImageSource:
    """images uint8 [N, H, W, C], labels int64 [N], names of the classes in label order, licence, where it is from.

    test: images and labels of the same kind that are for testing alone; None where a source has no such split.
    split: of which one the images are, where a source says so or somebody chose; else "". notes: sentences about what
    was left out or taken for something.
    """

    images: np.ndarray
    labels: np.ndarray
    class_names: tuple[str, ...]
    licence: str
    origin: str
    test: tuple[np.ndarray, np.ndarray] | None = None
    split: str = ""
    notes: tuple[str, ...] = ()


def digits(path: Path | None = None) -> ImageSource:
    """The 1,797 handwritten 8x8 digits that ship inside scikit-learn (UCI Optical Recognition, CC BY 4.0).

    17 grey levels v = 0..16 stored as round(v * 255 / 16).
    """
    from sklearn.datasets import load_digits  # type: ignore[import-untyped]  # 3 s: only where it is used

    bunch = load_digits()
    images = np.rint(bunch.images * (255 / 16)).astype(np.uint8)[..., None]  # [1797, 8, 8, 1]
    names = tuple(str(digit) for digit in range(10))
    return ImageSource(
        images,
        bunch.target.astype(np.int64),
        names,
        "CC BY 4.0",
        "UCI Optical Recognition of Handwritten Digits, test part, from scikit-learn",
    )


def npz(path: Path | None) -> ImageSource:
    """An uncompressed or compressed .npz with `image` uint8 [N, H, W, C] and `label` integers [N] from 0, and perhaps
    `test_image`, `test_label` and `class_names`, text [classes]. Without names every class must have an image."""
    if path is None or not path.is_file():
        raise DmatError(f"prepare_data.path is {path}; expected an .npz file with `image` and `label`; give its path")
    if not zipfile.is_zipfile(path):
        raise DmatError(f"{path} is no .npz archive; expected arrays `image` and `label`; save it by numpy.savez")
    try:
        with np.load(path, allow_pickle=False) as archive:
            known = ("image", "label", "test_image", "test_label", "class_names")
            arrays = {name: archive[name] for name in archive.files if name in known}
            held = ", ".join(archive.files[:5]) or "nothing"
    except (
        Exception
    ) as error:  # damaged, encrypted or hostile archives end in any of them, and none is a defect of dmat
        said = f"{type(error).__name__}: {first_line(error)}"
        raise DmatError(f"{path} is not a whole .npz of numbers ({said}); save it again by numpy.savez") from None
    images, labels = _pair(path, arrays, held, "")
    test = _pair(path, arrays, held, "test_") if {"test_image", "test_label"} & set(arrays) else None
    if "class_names" in arrays:
        names = _names(path, arrays["class_names"])
    else:
        classes = 1 + max(int(part.max(initial=0)) for part in (labels, *(test or ())[1:]))
        names = tuple(str(k) for k in range(classes))
        _expect_no_gap(path, labels, classes)
    return ImageSource(images, labels, names, NOT_STATED, path.name, test)


def _names(path: Path, names: np.ndarray) -> tuple[str, ...]:
    if names.ndim != 1 or names.dtype.kind != "U" or len(set(names.tolist())) != len(names):
        raise DmatError(
            f"{path}: `class_names` is {names.dtype} {names.shape}; expected one line of text per class, all "
            f"different, in label order; save them again or leave them out"
        )
    return tuple(names.tolist())


def _expect_no_gap(path: Path, labels: np.ndarray, classes: int) -> None:
    """Raises DmatError where labels say that there are classes and no image is of them: they count otherwise."""
    missing = np.setdiff1d(np.arange(classes), labels)
    if len(missing) and len(labels):
        raise DmatError(
            f"{path}: no image has the label {listing(missing.tolist())}, and labels go up to {classes - 1}; "
            f"expected images of every class from 0 on; number the classes from 0 without gaps, or name all of them "
            f"in an array `class_names`"
        )


def listing(values: Sequence[object], most: int = 5) -> str:
    """The first few of a list in words: 1, 2, 3 and 7 more."""
    shown = ", ".join(map(str, values[:most]))
    return f"{shown} and {len(values) - most} more" if len(values) > most else shown


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


def cifar10(path: Path | None) -> ImageSource:
    """50,000 training and 10,000 test images 32x32 in 10 classes: `cifar-10-batches-py` or `cifar-10-batches-bin`."""
    return _cifar("cifar10", path)


def cifar100(path: Path | None) -> ImageSource:
    """50,000 training and 10,000 test images 32x32 in 100 classes: `cifar-100-python` or `cifar-100-binary`."""
    return _cifar("cifar100", path)


def _cifar(data: str, path: Path | None) -> ImageSource:
    found = cifar.read(data, _folder(path, f"a {cifar.TITLES[data]} folder"))
    return ImageSource(*found.train, found.names, NOT_STATED, found.origin, found.test)


def folder(path: Path | None) -> ImageSource:
    """A folder of images in one sub-folder per class; or such folders in `train` and `test`.

    Classes are in the order of their names, of their numbers where all names are numbers. All images have one size and
    are all grey or all in colour; pixels are taken as stored, without the rotation that EXIF may ask for.
    """
    root = _folder(path, "a folder with one sub-folder of images per class")
    found = files.visible_files(root)
    groups = _groups(root, found)
    layout, notes = _layout(root, groups)
    if not layout:
        images, labels, names, left_out = _images(root, found)
        return ImageSource(
            images, labels, names, NOT_STATED, f"images in {root.name}", notes=(*notes, *_told(left_out))
        )
    left_out = _beside(root, groups[""])
    images, labels, names, others = _images(root / layout["train"], groups[layout["train"]])
    left_out += others
    test = None
    if "test" in layout:
        *pair, test_names, others = _images(root / layout["test"], groups[layout["test"]], images.shape[1:])
        if test_names != names:
            odd = sorted(set(names) ^ set(test_names))
            raise DmatError(
                f"{root}: {layout['train']} and {layout['test']} differ in the classes {listing(odd)}; expected the "
                f"same sub-folders in both; add or remove them"
            )
        test = (pair[0], pair[1])
        left_out += others
    if "validation" in layout:
        name = layout["validation"]
        notes.append(f"{root / name} is not read ({len(groups[name]):,} files); validation images come from the others")
    return ImageSource(
        images, labels, names, NOT_STATED, f"images in {root.name}", test, notes=(*notes, *_told(left_out))
    )


def _groups(root: Path, found: Sequence[Path]) -> dict[str, list[Path]]:
    """Files by the sub-folder of `root` that they are in, empty ones too; under "" those that are in none."""
    names = [one.name for one in root.iterdir() if one.is_dir() and not files.hidden(one.name)]
    numbers = all(name.isdecimal() for name in names)  # 0, 1, ... 10: not 0, 1, 10, 2
    groups: dict[str, list[Path]] = {name: [] for name in sorted(names, key=lambda n: (int(n), n) if numbers else n)}
    groups[""] = []
    depth = len(root.parts)
    for file in found:
        inside = file.parts[depth:]
        groups[inside[0] if len(inside) > 1 else ""].append(file)
    return groups


def _layout(root: Path, groups: dict[str, list[Path]]) -> tuple[dict[str, str], list[str]]:
    """Split -> its sub-folder, nothing where all sub-folders are classes; and what a reader should know of that.

    One class may be called like a split if images lie directly in it, as in CIFAR-100, which has trains.
    """
    inside = [name for name in groups if name]
    named = [name for name in inside if name.lower() in SPLIT_FOLDERS]
    others = [name for name in inside if name not in named]
    if not named:
        return {}, []
    if others:
        if len(named) == 1 and any(file.parent == root / named[0] for file in groups[named[0]]):
            return {}, [f"{root / named[0]} is taken for a class, as images lie in it and not in sub-folders"]
        raise DmatError(
            f"{root} has {', '.join(named)} beside {listing(others)}; expected either classes alone, or train, test "
            f"and val alone with the classes in each; move the others away or give another path"
        )
    layout = {SPLIT_FOLDERS[name.lower()]: name for name in named}
    if len(layout) < len(named):
        raise DmatError(
            f"{root} has {', '.join(named)}; expected one folder of training, one of test and one of validation "
            f"images; rename or move those that are the same"
        )
    if "train" not in layout:
        raise DmatError(f"{root} has {', '.join(named)} and no train; expected classes, or train and test; add train")
    return layout, []


def _images(
    root: Path, found: Sequence[Path], shape: tuple[int, ...] | None = None
) -> tuple[np.ndarray, np.ndarray, tuple[str, ...], list[Path]]:
    """Images uint8 [N, H, W, C], labels int64 [N], class names and files left out, of the files `found` below `root`.

    shape: that all images must have, if known.
    """
    groups = _groups(root, found)
    outside = groups.pop("")
    if not groups:
        raise DmatError(f"{root} has no sub-folders; expected one per class, with its images in it; give another path")
    left_out = _beside(root, outside)
    paths, labels = list[Path](), list[int]()
    for label, own in enumerate(groups.values()):
        for file in own:
            if _is_beside(file):
                left_out.append(file)
                continue
            _expect_no_split(root, file)
            paths.append(file)
            labels.append(label)
    if empty := sorted(set(range(len(groups))) - set(labels)):
        names = list(groups)
        raise DmatError(
            f"{root} has no image of the classes {listing([names[k] for k in empty])}; expected some "
            f"({', '.join(FORMATS)}) in each sub-folder; add them or remove the sub-folder"
        )
    first = _image(paths[0])
    wanted = shape or first.shape
    images = np.empty((len(paths), *wanted), dtype=np.uint8)
    for k, path in enumerate(paths):
        image = _image(path) if k else first
        if image.shape != wanted:
            raise DmatError(
                f"{path} is {_size(image.shape)}; expected {_size(wanted)} as the other images are; make them all alike"
            )
        images[k] = image
    return images, np.array(labels, dtype=np.int64), tuple(groups), left_out


def _beside(root: Path, outside: Sequence[Path]) -> list[Path]:
    """Files that are in no sub-folder of `root`, if none may be an image."""
    for file in outside:
        if not _is_beside(file):
            raise DmatError(
                f"{file} is in no sub-folder of {root}; expected every image in the sub-folder of its class; move or "
                f"remove it"
            )
    return list(outside)


def _is_beside(file: Path) -> bool:
    """Whether a file is known to be no image, such as a list or what Windows leaves (Thumbs.db, desktop.ini)."""
    return file.suffix.lower() in BESIDE_IMAGES


def _told(left_out: Sequence[Path]) -> list[str]:
    """How many files were left out, by their kind."""
    kinds = collections.Counter(file.suffix.lower() for file in left_out)
    counts = ", ".join(f"{count:,} {kind}" for kind, count in sorted(kinds.items()))
    return [f"left out, as they are no images: {counts}; the first is {left_out[0]}"] if left_out else []


def _expect_no_split(root: Path, file: Path) -> None:
    """Raises DmatError for CLASS/test/FILE: it would be trained on as one of its class."""
    between = file.parts[len(root.parts) + 1 : -1]
    if split := next((part for part in between if part.lower() in SPLIT_FOLDERS), None):
        raise DmatError(
            f"{file.parent} is a folder {split} inside a class; expected {root}/{split}/CLASS, or no splits in a "
            f"class; move it"
        )


def _image(path: Path) -> np.ndarray:
    """One image file as uint8 [H, W, 1] or [H, W, 3]."""
    from PIL import Image

    try:
        with Image.open(path, formats=FORMATS) as opened:
            mode, frames = opened.mode, getattr(opened, "n_frames", 1)
            image = opened.convert("RGB") if mode == "P" else opened
            pixels = np.asarray(image)
    except Exception as error:  # PIL has no common one for damaged files
        raise DmatError(
            f"{path} cannot be read as an image ({error}); expected {', '.join(FORMATS)}; bring a good copy or "
            f"remove it"
        ) from None
    if frames != 1:
        raise DmatError(f"{path} has {frames} frames; expected one still image; save the one that is meant")
    if mode not in ("L", "RGB", "P"):
        raise DmatError(f"{path} is of the kind {mode}; expected 8 bits of grey or RGB a pixel; convert it")
    return pixels[..., None] if pixels.ndim == 2 else pixels


def _size(shape: tuple[int, ...]) -> str:
    return f"{shape[1]}x{shape[0]} in {'colour' if shape[2] == 3 else 'grey'}"


def sharded(path: Path | None) -> ImageSource:
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
    return ImageSource(images, labels, names, licence, origin, split=str(split or ""))


SOURCES: dict[str, Callable[[Path | None], ImageSource]] = {
    "digits": digits,
    "npz": npz,
    "cifar10": cifar10,
    "cifar100": cifar100,
    "folder": folder,
    "shards": sharded,
}


def load(name: str, path: Path | None) -> ImageSource:
    """A source by its name. Raises DmatError also for a set that is empty or that no job could take."""
    return _checked(plugins.find(SOURCES, name)(path), path or name)


def location(name: str, path: Path) -> Path:
    """The file or folder that a source reads, given its path: of a CIFAR folder's parent only that folder."""
    if not path.exists():
        raise DmatError(f"prepare_data.path is {path}, which does not exist; expected the images of source {name}")
    return cifar.located(name, path)[0] if name in cifar.LAYOUTS else path


def recognise(what: str | Path, split: str | None = None) -> ImageSource:
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
        if _holds_images(path):
            return "folder"
    state = "is nothing that dmat reads" if path.exists() else "does not exist"
    raise DmatError(
        f"{path} {state}; looked for the word digits, an .npz file, a CIFAR-10 or CIFAR-100 folder (python or binary "
        f"version), a folder of shards ({shards.MANIFEST}) and a folder with one sub-folder of images a class; give "
        f"one of these"
    )


def _holds_images(path: Path) -> bool:
    """Whether a sub-folder has a file that is called like an image."""
    from PIL import Image

    suffixes = {suffix for suffix, kind in Image.registered_extensions().items() if kind in FORMATS}
    found = (file for file in files.visible_files(path) if file.parent != path)
    return any(file.suffix.lower() in suffixes for file in found)


def _folder(path: Path | None, what: str) -> Path:
    if path is None or not path.is_dir():
        raise DmatError(f"prepare_data.path is {path}; expected {what}; give its path")
    return path


def _checked(source: ImageSource, path: Path | str) -> ImageSource:
    """The same source, if its images and labels are what every job expects."""
    parts = [("", source.images, source.labels), *([("test ", *source.test)] if source.test else [])]
    for part, images, labels in parts:
        if len(labels) == 0:
            raise DmatError(f"{path} has no {part}images; expected at least one; give another path")
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3) or 0 in images.shape:
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
