"""A selection: the sorted indices of the images kept from a set, and the identity of that set."""

from pathlib import Path
from typing import NotRequired, TypedDict, cast

import numpy as np

from dmat import files
from dmat.data import shards
from dmat.errors import DmatError

SELECTION = "selection.json"
INDICES = "indices.npy"


class SelectionRecord(TypedDict):
    """What selection.json says of a selection."""

    schema: NotRequired[int]  # added by `write_selection`
    image_set: str  # name of the set in params.yaml
    shape: list[int]  # H, W, C
    classes: int
    manifest_sha256: str  # of the set
    pool: NotRequired[int]  # number of images of the set
    kept: int  # number of selected images
    keep: NotRequired[float]  # share of each class that is selected
    class_counts: NotRequired[list[int]]  # selected images per class


def write_selection(folder: Path, indices: np.ndarray, record: SelectionRecord) -> None:
    """Writes a selection. indices: int64 [N], sorted. record: all keys but `schema`."""
    with files.writing(folder / INDICES) as file:
        np.save(file, indices)
    files.write_json(folder / SELECTION, {"schema": 1, **record})


def read_selection(folder: Path) -> SelectionRecord:
    """Reads the record of a selection. Raises DmatError if `write_selection` did not write it."""
    return cast(
        SelectionRecord,
        files.read_record(folder / SELECTION, image_set=str, shape=list, classes=int, manifest_sha256=str, kept=int),
    )


def expect_selected_from(selection: SelectionRecord, images: Path) -> None:
    """Raises DmatError if an image set is not the one of a selection; compares the checksum of its manifest."""
    if files.sha256(images / shards.MANIFEST) != selection["manifest_sha256"]:
        raise DmatError(f"{images} is not the image set of the selection; run `dvc repro` to make them agree")
