"""A selection: the kept images of a set as sorted indices, and what they were selected from."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dmat import files
from dmat.data import shards
from dmat.errors import DmatError

SELECTION = "selection.json"
INDICES = "indices.npy"


def write_selection(folder: Path, indices: np.ndarray, record: Mapping[str, Any]) -> None:
    """indices: int64 [kept], sorted. facts: JSON values, with what `read_selection` asks for."""
    with files.writing(folder / INDICES) as file:
        np.save(file, indices)
    files.write_json(folder / SELECTION, {"schema": 1, **record})


def read_selection(folder: Path) -> dict[str, Any]:
    """The facts of a selection. Raises DmatError for what `write_selection` did not write."""
    return files.read_record(folder / SELECTION, image_set=str, shape=list, classes=int, manifest_sha256=str, kept=int)


def expect_selected_from(selection: dict[str, Any], images: Path) -> None:
    """Raises DmatError if an image set is not the one of a selection: known by the checksum of its manifest."""
    if files.sha256(images / shards.MANIFEST) != selection["manifest_sha256"]:
        raise DmatError(f"{images} is not the set that was selected from; run `dvc repro` to bring them together")
