"""TinyImageNet (Stanford CS231n): the published folder, or the two .npz files of the code of Wang et al. 2023.

    tiny-imagenet-200/wnids.txt                        the 200 WordNet ids that are classes
                      words.txt                        words for every WordNet id
                      train/<id>/images/*.JPEG
                      val/images/*.JPEG                their classes are in val/val_annotations.txt
                      test/                            without labels, not read

The validation images are the test split, as in that paper, because the test images have no labels. Labels number the
WordNet ids in their order, as torchvision's ImageFolder does. Grey images become colour images with three equal
channels. Shapes: N images.
"""

import collections
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dmat import files
from dmat.data import data_sets
from dmat.data.data_sets import DATA_SETS
from dmat.data.formats import npz_files
from dmat.data.formats.image_files import read_image
from dmat.data.image_source import ImageSource, Pair, listing, numbered_classes, shape_text
from dmat.errors import DmatError

_NAME = "tinyimagenet"
_SHAPE = (DATA_SETS[_NAME].size, DATA_SETS[_NAME].size, DATA_SETS[_NAME].channels)
_AGAIN = "unpack the archive again"
_CLASSES, _WORDS, _ANNOTATIONS = "wnids.txt", "words.txt", "val/val_annotations.txt"


def find(name: str, path: Path) -> Path | None:
    """Returns the folder of the data set, or None: `path` or its published sub-folder, or the folder of the .npz."""
    (published,), npz = DATA_SETS[name].layouts
    for folder in (path, path / published):
        if any((folder / file).is_file() for file in (_CLASSES, _ANNOTATIONS)):
            return folder
    return path if any((path / file).is_file() for file in npz) else None


def read(name: str, folder: Path) -> ImageSource:
    """Reads both splits. Raises DmatError if a file is missing, damaged, or not one of TinyImageNet."""
    _, npz = DATA_SETS[name].layouts
    return _read_npz(folder, npz) if any((folder / file).is_file() for file in npz) else _read_folder(folder)


def _read_npz(folder: Path, names: Sequence[str]) -> ImageSource:
    """Reads train.npz and val.npz, which name no classes."""
    pairs = [npz_files.read_parts([_existing(folder / name)])[0] for name in names]
    for name, (images, _) in zip(names, pairs, strict=True):
        if images.shape[1:] != _SHAPE:
            raise DmatError(
                f"{folder / name} holds images {shape_text(images.shape[1:])}; expected {shape_text(_SHAPE)}; bring "
                f"back a good copy"
            )
    train, test = pairs
    return _source(train, test, numbered_classes(folder, train[1], test[1]), "two .npz files")


def _read_folder(folder: Path) -> ImageSource:
    """Reads the published folder."""
    ids = sorted(_existing(folder / _CLASSES).read_text(encoding="utf-8", errors="replace").split())
    if not ids or len(set(ids)) < len(ids):
        raise DmatError(f"{folder / _CLASSES} does not hold distinct WordNet ids; expected one per class; {_AGAIN}")
    names = _class_names(folder / _WORDS, ids)
    train = _read_images(*_training_files(folder / "train", ids))
    test = _read_images(*_validation_files(folder, ids))
    return _source(train, test, names, "JPEG files")


def _source(train: Pair, test: Pair, names: tuple[str, ...], version: str) -> ImageSource:
    """A source of images uint8 [N, 64, 64, 3] and labels int64 [N]."""
    origin = data_sets.origin(_NAME, version, len(train[1]), len(test[1]))
    return ImageSource(*train, names, DATA_SETS[_NAME].licence, origin, test)


def _existing(path: Path) -> Path:
    """Returns the path. Raises DmatError if it is not a file."""
    if not path.is_file():
        raise DmatError(f"{path} does not exist; expected it beside the other files; {_AGAIN}")
    return path


def _class_names(path: Path, ids: Sequence[str]) -> tuple[str, ...]:
    """The first word of each WordNet id; with the id behind it where two classes have the same word."""
    lines = _existing(path).read_text(encoding="utf-8", errors="replace").splitlines()
    words = {wordnet_id: text.split(",")[0].strip() for wordnet_id, _, text in (line.partition("\t") for line in lines)}
    if missing := [wordnet_id for wordnet_id in ids if not words.get(wordnet_id)]:
        raise DmatError(f"{path} has no words for {listing(missing)}; expected some for every class; {_AGAIN}")
    counts = collections.Counter(words[wordnet_id] for wordnet_id in ids)
    return tuple(
        words[wordnet_id] if counts[words[wordnet_id]] == 1 else f"{words[wordnet_id]} ({wordnet_id})"
        for wordnet_id in ids
    )


def _training_files(root: Path, ids: Sequence[str]) -> tuple[list[Path], list[int]]:
    """The files of all classes, class by class, and their labels."""
    folders = {entry.name for entry in root.iterdir() if not files.hidden(entry.name)} if root.is_dir() else set()
    if folders != set(ids):
        missing, surplus = sorted(set(ids) - folders), sorted(folders - set(ids))
        problem = f"lacks the folders {listing(missing)}" if missing else f"has {listing(surplus)}"
        raise DmatError(f"{root} {problem}; expected one folder for each id in {_CLASSES}; {_AGAIN}")
    paths, labels = list[Path](), list[int]()
    for label, wordnet_id in enumerate(ids):
        images = files.visible_files(root / wordnet_id / "images")
        if not images:
            raise DmatError(f"{root / wordnet_id / 'images'} is empty; expected the images of the class; {_AGAIN}")
        paths += images
        labels += [label] * len(images)
    return paths, labels


def _validation_files(folder: Path, ids: Sequence[str]) -> tuple[list[Path], list[int]]:
    """The labelled validation files, in the order of their list, and their labels."""
    annotations, label_of = _existing(folder / _ANNOTATIONS), {wordnet_id: k for k, wordnet_id in enumerate(ids)}
    images = {path.name: path for path in files.visible_files(folder / "val/images")}
    paths, labels = list[Path](), list[int]()
    for number, line in enumerate(annotations.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        name, _, rest = line.partition("\t")
        label = label_of.get(rest.partition("\t")[0])
        if label is None or name not in images:
            problem = (
                f"names {name}, which is not in val/images or is named twice" if label is not None else "has no class"
            )
            raise DmatError(f"{annotations}, line {number}, {problem}; expected an image and its WordNet id; {_AGAIN}")
        paths.append(images.pop(name))
        labels.append(label)
    if images:
        raise DmatError(f"{annotations} lacks {listing(sorted(images))}; expected every image in val/images; {_AGAIN}")
    return paths, labels


def _read_images(paths: Sequence[Path], labels: Sequence[int]) -> Pair:
    """Images uint8 [N, 64, 64, 3] in one array, and labels int64 [N]."""
    images = np.empty((len(paths), *_SHAPE), dtype=np.uint8)
    for k, path in enumerate(paths):
        image = read_image(path)
        if image.shape[:2] != _SHAPE[:2]:
            raise DmatError(f"{path} is {shape_text(image.shape)}; expected {shape_text(_SHAPE)}; {_AGAIN}")
        images[k] = image
    return images, np.array(labels, dtype=np.int64)
