"""A folder of images: one sub-folder per class, perhaps in sub-folders of splits.

It is read from the same list of files as its checksum (`files.visible_files`): every file is read, refused with its
name, or left out and counted. Shapes: N images, H height, W width, C channels.
"""

import collections
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dmat import files
from dmat.data.data_sets import NOT_STATED
from dmat.data.formats.image_files import FORMATS, is_image_name, read_image
from dmat.data.formats.split_files import SPLIT_FOLDERS
from dmat.data.image_source import ImageSource, expect_folder, listing, shape_text
from dmat.errors import DmatError

NON_IMAGE_SUFFIXES = (".csv", ".db", ".html", ".ini", ".json", ".log", ".md", ".tsv", ".txt", ".xml", ".yaml", ".yml")


def folder(path: Path | None) -> ImageSource:
    """Reads a folder with one sub-folder of images per class, or with such sub-folders in `train` and `test`.

    Classes are sorted by name, or by number if all names are numbers. All images must have the same size, and all must
    be grey or all in colour. Pixels are taken as stored; the rotation in EXIF data is ignored.
    """
    root = expect_folder(path, "a folder with one sub-folder of images per class")
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
    first = read_image(paths[0])
    expected_shape = shape or first.shape
    images = np.empty((len(paths), *expected_shape), dtype=np.uint8)
    for k, path in enumerate(paths):
        image = read_image(path) if k else first
        if image.shape != expected_shape:
            raise DmatError(
                f"{path} is {shape_text(image.shape)}; expected {shape_text(expected_shape)} like the other images; "
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


def contains_images(path: Path) -> bool:
    """Whether a sub-folder has a file with the suffix of an image."""
    return any(is_image_name(file.name) for file in files.visible_files(path) if file.parent != path)
