"""A selection: the sorted indices of the images kept from a set, and the identity of that set.

Where the images have no labels of their own, a selection has those that score_images gave them.
"""

import dataclasses
from pathlib import Path
from typing import NotRequired

import numpy as np
from typing_extensions import TypedDict

from dmat import files
from dmat.data import shards
from dmat.data.shards import Shards
from dmat.errors import DmatError

SELECTION = "selection.json"
INDICES = "indices.npy"
LABELS = "labels.npy"


class SelectionRecord(TypedDict):
    """What selection.json says of a selection. A selection of all images has no file of indices."""

    schema: NotRequired[int]  # added by `write_selection`
    path: NotRequired[str]  # below the project, where another file says this of a selection
    image_set: str  # name of the set in params.yaml
    shape: list[int]  # H, W, C
    classes: int
    manifest_sha256: str  # of the set
    pool: int  # number of images of the set
    kept: int  # number of selected images
    keep: NotRequired[float]  # share of each class that is selected
    score: NotRequired[str]  # by which of the scores
    band: NotRequired[str]  # with "easy", "middle" or "hard" images
    min_distance: NotRequired[float]  # below which images were left out as near copies
    class_counts: NotRequired[list[int]]  # selected images per class
    pseudo_labels: NotRequired[bool]  # added by `write_selection`: whether the labels are the scorer's


@dataclasses.dataclass(frozen=True)
class SelectedImages:
    """The selected images of an opened set.

    indices: int64 [N], in the set; None where all images are selected. pseudo_labels: int64 [N], or None where the
    images have labels of their own. Both may be mapped files.
    """

    images: Shards
    indices: np.ndarray | None = None
    pseudo_labels: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.images) if self.indices is None else len(self.indices)

    @property
    def parts(self) -> tuple["SelectedImages", ...]:
        """The selections that these images come from: this one alone."""
        return (self,)

    def names(self, positions: np.ndarray) -> dict[str, list[int]]:
        """Indices in the whole set of positions [B] in the selection, for a file that people read."""
        return {"generated": self.indices_at(positions).tolist()}

    def indices_at(self, positions: np.ndarray) -> np.ndarray:
        """Indices in the set, int64 [B], of positions [B] in the selection."""
        return positions if self.indices is None else self.indices[positions]

    def position_of(self, index: int) -> int | None:
        """The position in the selection of an image of the set; None if it is not selected."""
        if self.indices is None:
            return index
        position = int(np.searchsorted(self.indices, index))
        return position if position < len(self.indices) and self.indices[position] == index else None

    def take(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Images uint8 [B, H, W, C] and labels int64 [B] at positions [B] in the selection."""
        images = np.empty((len(positions), *self.images.shape), dtype=np.uint8)
        labels = np.empty(len(positions), dtype=np.int64)
        self.gather(positions, images, labels, np.arange(len(positions)))
        return images, labels

    def gather(self, positions: np.ndarray, images: np.ndarray, labels: np.ndarray, rows: np.ndarray) -> None:
        """Copies the images at positions [B] in the selection, and their labels, to `rows` [B] of the arrays.

        images: uint8 [N, H, W, C]. labels: int64 [N].
        """
        self.images.gather(self.indices_at(positions), images, labels, rows)
        if self.pseudo_labels is not None:
            labels[rows] = self.pseudo_labels[positions]


def write_selection(
    folder: Path, indices: np.ndarray, record: SelectionRecord, pseudo_labels: np.ndarray | None = None
) -> None:
    """Writes a selection. indices: int64 [N], sorted. record: all keys but those that this adds.

    pseudo_labels: int64 [N], where the images have no labels of their own. Where all images of the set are selected,
    no indices are written: those of 50 million images would take 400 MB.
    """
    for name, array in ((INDICES, None if len(indices) == record["pool"] else indices), (LABELS, pseudo_labels)):
        if array is not None:
            with files.writing(folder / name) as file:
                np.save(file, array)
    added = {"schema": 1, **({} if pseudo_labels is None else {"pseudo_labels": True})}
    files.write_json(folder / SELECTION, {**added, **record})


def read_selection(folder: Path) -> SelectionRecord:
    """Reads the record of a selection. Raises DmatError if `write_selection` did not write it."""
    return files.read_record(folder / SELECTION, SelectionRecord)


def open_selection(folder: Path, images: Path) -> SelectedImages:
    """Opens a selection and the image set in `images`. Raises DmatError if it is of another set."""
    record = read_selection(folder)
    expect_selected_from(record, images)
    return SelectedImages(
        shards.open_shards(images),
        files.load_array(folder / INDICES, mapped=True) if record["kept"] < record["pool"] else None,
        files.load_array(folder / LABELS, mapped=True) if record.get("pseudo_labels") else None,
    )


def checksums(folder: Path, record: SelectionRecord) -> dict[str, str]:
    """The SHA-256 of the arrays of a selection, by the names that a mix gives them."""
    arrays = {
        **({"indices_sha256": INDICES} if record["kept"] < record["pool"] else {}),
        **({"labels_sha256": LABELS} if record.get("pseudo_labels") else {}),
    }
    return {name: files.sha256(folder / file) for name, file in arrays.items()}


def expect_selected_from(selection: SelectionRecord, images: Path) -> None:
    """Raises DmatError if an image set is not the one of a selection; compares the checksum of its manifest."""
    if files.sha256(images / shards.MANIFEST) != selection["manifest_sha256"]:
        raise DmatError(f"{images} is not the image set of the selection; run `dvc repro` to make them agree")
