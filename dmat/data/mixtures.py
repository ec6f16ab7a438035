"""Mixtures of selections, such as those of several generators (Bartoldson et al. 2024). Images are never copied.

A mixture is one file: its selections, with their checksums and shares.
"""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import numpy as np
from typing_extensions import TypedDict

from dmat import files
from dmat.data.selections import SelectedImages, SelectionRecord
from dmat.data.turns import Turns, weights_of

MIXTURE = "mixture.json"


class MixtureRecord(TypedDict):
    """What mixture.json says, and mix.json of an arm that trains on it."""

    shape: list[int]  # H, W, C
    classes: int
    kept: int  # number of images
    rotate: Literal["none", "epoch"]
    shares: dict[str, float]  # selection -> its share of the generated images, in any unit
    selections: dict[str, SelectionRecord]  # each with its path below the project and the checksums of its arrays


def read_mixture(folder: Path) -> MixtureRecord | None:
    """The record of a mixture; None if the folder holds a selection."""
    if not (folder / MIXTURE).is_file():
        return None
    return files.read_record(folder / MIXTURE, MixtureRecord)


def turns_of(record: MixtureRecord, generated_per_batch: int, steps_per_epoch: int) -> Turns:
    """In which order a training takes its generated images from the selections of a mixture.

    generated_per_batch: number of generated images of a training step. steps_per_epoch: steps in which as many images
    are used as there are real ones.
    """
    return Turns(
        tuple(selection["kept"] for selection in record["selections"].values()),
        weights_of(list(record["shares"].values())),
        1 if record["rotate"] == "none" else max(1, generated_per_batch * steps_per_epoch),
    )


@dataclasses.dataclass(frozen=True)
class CombinedImages:
    """The images of several selections, by name, numbered one selection after the other."""

    selections: Mapping[str, SelectedImages]

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def parts(self) -> tuple[SelectedImages, ...]:
        """The selections."""
        return tuple(self.selections.values())

    @functools.cached_property
    def _starts(self) -> np.ndarray:  # int64 [K + 1]
        return np.concatenate([[0], np.cumsum([len(part) for part in self.parts])])

    def names(self, positions: np.ndarray) -> dict[str, list[int]]:
        """Indices in their whole sets of positions [B] in the list of all images, for a file that people read."""
        return {
            f"generated of {name}": part.indices_at(positions[rows] - start).tolist()
            for (name, part), (start, rows) in zip(self.selections.items(), self._rows(positions), strict=True)
        }

    def take(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Images uint8 [B, H, W, C] and labels int64 [B] at positions [B] in the list of all images."""
        images = np.empty((len(positions), *self.parts[0].images.shape), dtype=np.uint8)
        labels = np.empty(len(positions), dtype=np.int64)
        self.gather(positions, images, labels, np.arange(len(positions)))
        return images, labels

    def gather(self, positions: np.ndarray, images: np.ndarray, labels: np.ndarray, rows: np.ndarray) -> None:
        """Copies the images at positions [B], and their labels, to `rows` [B] of the arrays.

        images: uint8 [N, H, W, C]. labels: int64 [N].
        """
        for part, (start, own) in zip(self.parts, self._rows(positions), strict=True):
            if len(own):
                part.gather(positions[own] - start, images, labels, rows[own])

    def _rows(self, positions: np.ndarray) -> list[tuple[int, np.ndarray]]:
        """Of each selection: where it starts, and which of the positions [B] lie in it, int64 [M]."""
        numbers = np.searchsorted(self._starts, positions, side="right") - 1
        return [(int(self._starts[k]), np.flatnonzero(numbers == k)) for k in range(len(self.selections))]


GeneratedImages = SelectedImages | CombinedImages  # that an arm trains on
