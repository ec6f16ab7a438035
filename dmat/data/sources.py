"""Sources of real images. Each source is a function (path) -> ImageSource; no source needs the internet or executes
anything in a file.

A source may have its own test images; otherwise `prepare_data` splits them off. `recognise` detects which source fits a
path. A folder of images is read from the same list of files as its checksum (`files.visible_files`): every file is
read, refused with its name, or left out and counted.

Shapes: N images, H height, W width, C channels, K classes.
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
MAX_CLASSES = 100_000  # larger numbers are treated as a mistake
# Mean and std of each channel in [0, 1], as in the networks of Wang et al. 2023; for CIFAR the same as in RobustBench.
NORMALISATIONS = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "svhn": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "tinyimagenet": ((0.4802, 0.4481, 0.3975), (0.2302, 0.2265, 0.2262)),
}
SPLITS = ("train", "test")
SPLIT_FOLDERS = {  # names of sub-folders, upper or lower case -> split; the last one is not read
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("test", "testing"), "test"),
    **dict.fromkeys(("val", "valid", "validation"), "validation"),
}
# Formats of PIL: still images; no reader of these executes code.
FORMATS = ("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
NON_IMAGE_SUFFIXES = (".csv", ".db", ".html", ".ini", ".json", ".log", ".md", ".tsv", ".txt", ".xml", ".yaml", ".yml")


@dataclasses.dataclass(frozen=True)
class ImageSource:
    """The images of a source: images uint8 [N, H, W, C], labels int64 [N], class names in label order, licence, origin.

    test: images and labels of the test split, in the same form; None if the source has no test split. split: name of
    the split that the images belong to, if the source or the user says so; else "". notes: sentences about what was
    left out or assumed.
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

    The 17 grey levels v = 0..16 are stored as round(v * 255 / 16).
    """
    from sklearn.datasets import load_digits  # type: ignore[import-untyped]  # 3 s to import: only where it is used

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
    """Reads an uncompressed or compressed .npz with `image` uint8 [N, H, W, C] and `label` integers [N] from 0.

    Optional arrays: `test_image` and `test_label` in the same form, and `class_names`, text [K]. Without `class_names`
    every class must have an image.
    """
    if path is None or not path.is_file():
        raise DmatError(f"prepare_data.path is {path}; expected an .npz file with `image` and `label`; give its path")
    if not zipfile.is_zipfile(path):
        raise DmatError(f"{path} is not an .npz archive; expected arrays `image` and `label`; save it by numpy.savez")
    try:
        with np.load(path, allow_pickle=False) as archive:
            array_names = ("image", "label", "test_image", "test_label", "class_names")
            arrays = {name: archive[name] for name in archive.files if name in array_names}
            contents = ", ".join(archive.files[:5]) or "nothing"
    except Exception as error:  # damaged, encrypted or hostile archives may raise any exception; none is a bug of dmat
        cause = f"{type(error).__name__}: {first_line(error)}"
        raise DmatError(
            f"{path} is incomplete or not an .npz of numbers ({cause}); save it again by numpy.savez"
        ) from None
    images, labels = _npz_split(path, arrays, contents, "")
    test = _npz_split(path, arrays, contents, "test_") if {"test_image", "test_label"} & set(arrays) else None
    if "class_names" in arrays:
        names = _class_names(path, arrays["class_names"])
    else:
        classes = 1 + max(int(split_labels.max(initial=0)) for split_labels in (labels, *(test or ())[1:]))
        names = tuple(str(k) for k in range(classes))
        _expect_no_gap(path, labels, classes)
    return ImageSource(images, labels, names, NOT_STATED, path.name, test)


def _class_names(path: Path, names: np.ndarray) -> tuple[str, ...]:
    """The class names of an .npz as a tuple. names: text [K], distinct. Raises DmatError for anything else."""
    if names.ndim != 1 or names.dtype.kind != "U" or len(set(names.tolist())) != len(names):
        raise DmatError(
            f"{path}: `class_names` is {names.dtype} {names.shape}; expected one line of text per class, all "
            f"different, in label order; save them again or leave them out"
        )
    return tuple(names.tolist())


def _expect_no_gap(path: Path, labels: np.ndarray, classes: int) -> None:
    """Raises DmatError if a class below the largest label has no image: then the labels probably do not count
    from 0.

    labels: int64 [N].
    """
    missing = np.setdiff1d(np.arange(classes), labels)
    if len(missing) and len(labels):
        raise DmatError(
            f"{path}: no image has the label {listing(missing.tolist())}, and labels go up to {classes - 1}; "
            f"expected images of every class from 0 up; number the classes from 0 without gaps, or name all of them "
            f"in an array `class_names`"
        )


def listing(values: Sequence[object], limit: int = 5) -> str:
    """The first `limit` values of a list as text: "1, 2, 3 and 7 more"."""
    shown = ", ".join(map(str, values[:limit]))
    return f"{shown} and {len(values) - limit} more" if len(values) > limit else shown


def _npz_split(path: Path, arrays: dict[str, np.ndarray], contents: str, prefix: str) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 [N, H, W, C] and labels int64 [N] of one split of an .npz. prefix: "" or "test_"."""
    image, label = f"{prefix}image", f"{prefix}label"
    missing = {image, label} - set(arrays)
    if missing:
        raise DmatError(
            f"{path} lacks {', '.join(sorted(missing))}; expected arrays `{image}` and `{label}`; it holds {contents}"
        )
    images, labels = arrays[image], arrays[label]
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3):
        raise DmatError(f"{path}: `{image}` is {images.dtype} {images.shape}; expected uint8 [N, H, W, 1 or 3]")
    if labels.shape != images.shape[:1] or labels.dtype.kind not in "iu" or labels.min(initial=0) < 0:
        raise DmatError(f"{path}: `{label}` is {labels.dtype} {labels.shape}; expected {len(images)} integers from 0")
    if labels.max(initial=0) >= MAX_CLASSES:
        raise DmatError(
            f"{path}: `{label}` goes up to {labels.max()}; expected classes counted from 0, fewer than "
            f"{MAX_CLASSES:,}; renumber them"
        )
    return images, labels.astype(np.int64)


def cifar10(path: Path | None) -> ImageSource:
    """50,000 training and 10,000 test images 32x32 in 10 classes: `cifar-10-batches-py` or `cifar-10-batches-bin`."""
    return _cifar("cifar10", path)


def cifar100(path: Path | None) -> ImageSource:
    """50,000 training and 10,000 test images 32x32 in 100 classes: `cifar-100-python` or `cifar-100-binary`."""
    return _cifar("cifar100", path)


def _cifar(data: str, path: Path | None) -> ImageSource:
    data_set = cifar.read(data, _expect_folder(path, f"a {cifar.TITLES[data]} folder"))
    return ImageSource(*data_set.train, data_set.names, NOT_STATED, data_set.origin, data_set.test)


def folder(path: Path | None) -> ImageSource:
    """Reads a folder with one sub-folder of images per class, or with such sub-folders in `train` and `test`.

    Classes are sorted by name, or by number if all names are numbers. All images must have the same size, and all must
    be grey or all in colour. Pixels are taken as stored; the rotation in EXIF data is ignored.
    """
    root = _expect_folder(path, "a folder with one sub-folder of images per class")
    paths = files.visible_files(root)
    groups = _group_by_subfolder(root, paths)
    splits, notes = _split_folders(root, groups)
    if not splits:
        images, labels, names, left_out = _read_images(root, paths)
        return ImageSource(
            images, labels, names, NOT_STATED, f"images in {root.name}", notes=(*notes, *_left_out_notes(left_out))
        )
    left_out = _expect_non_images(root, groups[""])
    images, labels, names, others = _read_images(root / splits["train"], groups[splits["train"]])
    left_out += others
    test = None
    if "test" in splits:
        *pair, test_names, others = _read_images(root / splits["test"], groups[splits["test"]], images.shape[1:])
        if test_names != names:
            differing = sorted(set(names) ^ set(test_names))
            raise DmatError(
                f"{root}: {splits['train']} and {splits['test']} differ in the classes {listing(differing)}; expected "
                f"the same sub-folders in both; add or remove them"
            )
        test = (pair[0], pair[1])
        left_out += others
    if "validation" in splits:
        name = splits["validation"]
        notes.append(f"{root / name} is not read ({len(groups[name]):,} files); validation images come from the others")
    return ImageSource(
        images, labels, names, NOT_STATED, f"images in {root.name}", test, notes=(*notes, *_left_out_notes(left_out))
    )


def _group_by_subfolder(root: Path, paths: Sequence[Path]) -> dict[str, list[Path]]:
    """Maps each sub-folder of `root`, empty ones too, to the files below it; "" to the files directly in `root`."""
    names = [entry.name for entry in root.iterdir() if entry.is_dir() and not files.hidden(entry.name)]
    numbers = all(name.isdecimal() for name in names)  # sort as 0, 1, 2, 10, not as 0, 1, 10, 2
    groups: dict[str, list[Path]] = {name: [] for name in sorted(names, key=lambda n: (int(n), n) if numbers else n)}
    groups[""] = []
    depth = len(root.parts)
    for file in paths:
        relative_parts = file.parts[depth:]
        groups[relative_parts[0] if len(relative_parts) > 1 else ""].append(file)
    return groups


def _split_folders(root: Path, groups: dict[str, list[Path]]) -> tuple[dict[str, str], list[str]]:
    """Maps each split to its sub-folder (empty if all sub-folders are classes), and gives notes for people.

    A single class may have the name of a split if it directly contains images: CIFAR-100 has a class `train`.
    """
    subfolders = [name for name in groups if name]
    split_names = [name for name in subfolders if name.lower() in SPLIT_FOLDERS]
    others = [name for name in subfolders if name not in split_names]
    if not split_names:
        return {}, []
    if others:
        if len(split_names) == 1 and any(file.parent == root / split_names[0] for file in groups[split_names[0]]):
            return {}, [f"{root / split_names[0]} is treated as a class, because images are directly in it"]
        raise DmatError(
            f"{root} has {', '.join(split_names)} beside {listing(others)}; expected either classes alone, or train, "
            f"test and val alone with the classes in each; move the others away or give another path"
        )
    folder_of_split = {SPLIT_FOLDERS[name.lower()]: name for name in split_names}
    if len(folder_of_split) < len(split_names):
        raise DmatError(
            f"{root} has {', '.join(split_names)}; expected one folder of training, one of test and one of validation "
            f"images; rename or move those that are the same"
        )
    if "train" not in folder_of_split:
        raise DmatError(
            f"{root} has {', '.join(split_names)} and no train; expected classes, or train and test; add train"
        )
    return folder_of_split, []


def _read_images(
    root: Path, candidates: Sequence[Path], shape: tuple[int, ...] | None = None
) -> tuple[np.ndarray, np.ndarray, tuple[str, ...], list[Path]]:
    """Images uint8 [N, H, W, C], labels int64 [N], class names, and the files that were left out.

    candidates: the files below `root`. shape: (H, W, C) that all images must have, if known.
    """
    groups = _group_by_subfolder(root, candidates)
    outside = groups.pop("")
    if not groups:
        raise DmatError(f"{root} has no sub-folders; expected one per class, with its images in it; give another path")
    left_out = _expect_non_images(root, outside)
    paths, labels = list[Path](), list[int]()
    for label, group in enumerate(groups.values()):
        for file in group:
            if _is_non_image(file):
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
    first = _read_image(paths[0])
    expected_shape = shape or first.shape
    images = np.empty((len(paths), *expected_shape), dtype=np.uint8)
    for k, path in enumerate(paths):
        image = _read_image(path) if k else first
        if image.shape != expected_shape:
            raise DmatError(
                f"{path} is {_shape_text(image.shape)}; expected {_shape_text(expected_shape)} like the other images; "
                f"convert all images to one size and colour mode"
            )
        images[k] = image
    return images, np.array(labels, dtype=np.int64), tuple(groups), left_out


def _expect_non_images(root: Path, outside: Sequence[Path]) -> list[Path]:
    """Returns the files `outside` any sub-folder of `root`. Raises DmatError if one of them may be an image."""
    for file in outside:
        if not _is_non_image(file):
            raise DmatError(
                f"{file} is in no sub-folder of {root}; expected every image in the sub-folder of its class; move or "
                f"remove it"
            )
    return list(outside)


def _is_non_image(file: Path) -> bool:
    """Whether the suffix shows that a file is not an image: a list, or a file of Windows (Thumbs.db, desktop.ini)."""
    return file.suffix.lower() in NON_IMAGE_SUFFIXES


def _left_out_notes(left_out: Sequence[Path]) -> list[str]:
    """A note with the number of files that were left out, by suffix; no note if there are none."""
    kinds = collections.Counter(file.suffix.lower() for file in left_out)
    counts = ", ".join(f"{count:,} {kind}" for kind, count in sorted(kinds.items()))
    return [f"left out because they are not images: {counts}; the first is {left_out[0]}"] if left_out else []


def _expect_no_split(root: Path, file: Path) -> None:
    """Raises DmatError for CLASS/test/FILE: the file would become a training image of its class."""
    between = file.parts[len(root.parts) + 1 : -1]
    if split := next((part for part in between if part.lower() in SPLIT_FOLDERS), None):
        raise DmatError(
            f"{file.parent} is a folder {split} inside a class; expected {root}/{split}/CLASS, or no splits in a "
            f"class; move it"
        )


def _read_image(path: Path) -> np.ndarray:
    """Reads one image file as uint8 [H, W, 1] or [H, W, 3]. Raises DmatError for anything but one still image."""
    from PIL import Image

    try:
        with Image.open(path, formats=FORMATS) as opened:
            mode, frames = opened.mode, getattr(opened, "n_frames", 1)
            image = opened.convert("RGB") if mode == "P" else opened
            pixels = np.asarray(image)
    except Exception as error:  # PIL has no common exception for damaged files
        raise DmatError(
            f"{path} cannot be read as an image ({error}); expected {', '.join(FORMATS)}; bring back a good copy or "
            f"remove it"
        ) from None
    if frames != 1:
        raise DmatError(f"{path} has {frames} frames; expected one still image; save a single frame")
    if mode not in ("L", "RGB", "P"):
        raise DmatError(f"{path} has the colour mode {mode}; expected 8-bit grey or RGB; convert it")
    return pixels[..., None] if pixels.ndim == 2 else pixels


def _shape_text(shape: tuple[int, ...]) -> str:
    """Width, height and colour mode as text, from a shape (H, W, C)."""
    return f"{shape[1]}x{shape[0]} in {'colour' if shape[2] == 3 else 'grey'}"


def sharded(path: Path | None) -> ImageSource:
    """Reads a folder of shards with their manifest that dmat wrote. Compares every checksum."""
    root = _expect_folder(path, f"a folder of shards with its {shards.MANIFEST}")
    try:
        opened = shards.open_shards(root)
        images, labels = opened.all()
        names = tuple(str(name) for name in opened.manifest["class_names"])
    except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
        raise DmatError(
            f"{root / shards.MANIFEST} does not describe shards of dmat ({type(error).__name__}: {error}); expected "
            f"the manifest that a stage wrote; regenerate the set"
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
    """Loads a source by its name. Raises DmatError also if the set is empty or has the wrong types or shapes."""
    return _validated(plugins.find(SOURCES, name)(path), path or name)


def location(name: str, path: Path) -> Path:
    """The file or folder that a source reads, given its path.

    For CIFAR this is the data set's own folder, even if `path` is its parent.
    """
    if not path.exists():
        raise DmatError(f"prepare_data.path is {path}, which does not exist; expected the images of source {name}")
    return cifar.locate(name, path)[0] if name in cifar.LAYOUTS else path


def recognise(path_or_name: str | Path, split: str | None = None) -> ImageSource:
    """Detects which source fits a path and loads one split of it, "test" or "train". `digits` is also accepted.

    split: None means the test images. A source without a test split gives all images, and the origin says so; `split`
    is then the caller's statement about these images. Raises DmatError if the source states another split, or if no
    source fits.
    """
    if split not in (None, *SPLITS):
        raise DmatError(f"the split is {split!r}; expected test or train; name one of them")
    source = load(_source_name(path_or_name), None if path_or_name == "digits" else Path(path_or_name))
    if split and source.split not in ("", split):
        raise DmatError(f"{path_or_name} holds the split {source.split}, not {split}; name other images")
    if source.test is None:
        description, images, labels = "all images, as it has no test images of its own", source.images, source.labels
        description += f"; said to be of the split {split}" if split and not source.split else ""
        actual_split = source.split or split or ""
    elif split in (None, "test"):
        actual_split = "test"
        description, (images, labels) = "its test images", source.test
    else:
        actual_split = "train"
        description, images, labels = "its training images", source.images, source.labels
    origin = f"{source.origin}: {description}"
    return dataclasses.replace(source, images=images, labels=labels, origin=origin, test=None, split=actual_split)


def _source_name(path_or_name: str | Path) -> str:
    """Name in SOURCES of the source that fits a path. Raises DmatError if none or several do."""
    path = Path(path_or_name)
    if path_or_name == "digits":
        return "digits"
    if path.is_file() and zipfile.is_zipfile(path):
        return "npz"
    if path.is_dir():
        data_sets = [data for data in cifar.LAYOUTS if cifar.find(data, path)]
        if len(data_sets) > 1:
            raise DmatError(
                f"{path} holds CIFAR-10 and CIFAR-100; expected one of them; give the folder of that data set"
            )
        if data_sets:
            return data_sets[0]
        if (path / shards.MANIFEST).is_file():
            return "shards"
        if _contains_images(path):
            return "folder"
    state = "is not a format that dmat reads" if path.exists() else "does not exist"
    raise DmatError(
        f"{path} {state}; looked for the name digits, an .npz file, a CIFAR-10 or CIFAR-100 folder (python or binary "
        f"version), a folder of shards ({shards.MANIFEST}) and a folder with one sub-folder of images per class; give "
        f"one of these"
    )


def _contains_images(path: Path) -> bool:
    """Whether a sub-folder has a file with the suffix of an image."""
    from PIL import Image

    suffixes = {suffix for suffix, kind in Image.registered_extensions().items() if kind in FORMATS}
    nested_files = (file for file in files.visible_files(path) if file.parent != path)
    return any(file.suffix.lower() in suffixes for file in nested_files)


def _expect_folder(path: Path | None, expected: str) -> Path:
    """Returns the path. Raises DmatError if it is not a folder. expected: description of the folder."""
    if path is None or not path.is_dir():
        raise DmatError(f"prepare_data.path is {path}; expected {expected}; give its path")
    return path


def _validated(source: ImageSource, path: Path | str) -> ImageSource:
    """Returns the source. Raises DmatError if its images or labels are not what every job expects."""
    splits = [("", source.images, source.labels), *([("test ", *source.test)] if source.test else [])]
    for prefix, images, labels in splits:
        if len(labels) == 0:
            raise DmatError(f"{path} has no {prefix}images; expected at least one; give another path")
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3) or 0 in images.shape:
            raise DmatError(
                f"{path}: the {prefix}images are {images.dtype} {images.shape}; expected uint8 [N, H, W, 1 or 3]; "
                f"convert them"
            )
        if images.shape[1:] != source.images.shape[1:]:
            raise DmatError(
                f"{path}: the test images are {_shape_text(images.shape[1:])}, the others "
                f"{_shape_text(source.images.shape[1:])}; expected one size and colour mode; convert all images to it"
            )
        if labels.shape != images.shape[:1] or labels.dtype.kind not in "iu":
            raise DmatError(
                f"{path}: the {prefix}labels are {labels.dtype} {labels.shape}; expected {len(images)} integers; "
                f"convert them"
            )
        if labels.min() < 0 or labels.max() >= len(source.class_names):
            raise DmatError(
                f"{path} has {prefix}labels from {labels.min()} to {labels.max()}; expected 0 to "
                f"{len(source.class_names) - 1}, one per class; fix the labels"
            )
    return source


def stratified(labels: np.ndarray, count: int, generator: np.random.Generator) -> np.ndarray:
    """Draws `count` items whose class shares match those of `labels` as closely as whole numbers allow.

    labels: [N]. Returns sorted indices, int64 [count]. The largest remainders get the items that are left over; ties go
    to the lower class. Raises DmatError if `count` exceeds N.
    """
    classes, sizes = np.unique(labels, return_counts=True)
    if not 0 <= count <= len(labels):
        raise DmatError(f"a split of {count} images was requested, but there are {len(labels)}; ask for fewer")
    counts, remainders = np.divmod(sizes * count, max(len(labels), 1))  # whole numbers: ties are exact
    for index in np.argsort(-remainders, kind="stable")[: count - counts.sum()]:
        counts[index] += 1
    drawn = [generator.permutation(np.flatnonzero(labels == c))[:take] for c, take in zip(classes, counts, strict=True)]
    return np.sort(np.concatenate(drawn)) if drawn else np.zeros(0, dtype=np.int64)
