"""What `select_images` and `mix_images` wrote, read by the stages after them: selection.json and mix.json.

Refuses anything that changed since it was written.
"""

from pathlib import Path
from typing import Any

import numpy as np

from dmat import ARTIFACTS, files
from dmat.data import shards
from dmat.data.mixing import Mix
from dmat.data.shards import Shards
from dmat.errors import DmatError


def read_selection(folder: Path) -> dict[str, Any]:
    """What `select_images` wrote as selection.json. Raises DmatError for anything else."""
    return files.read_record(
        folder / "selection.json", image_set=str, shape=list, classes=int, manifest_sha256=str, kept=int
    )


def expect_selected_from(selection: dict[str, Any], images: Path) -> None:
    """Raises DmatError if an image set is not the one of a selection: known by the checksum of its manifest."""
    if files.sha256(images / shards.MANIFEST) != selection["manifest_sha256"]:
        raise DmatError(f"{images} is not the set that was selected from; run `dvc repro` to bring them together")


def open_mix(folder: Path, real: Shards, root: Path) -> tuple[Mix, Shards | None, np.ndarray | None]:
    """The mix of an arm, its opened generated images and the indices kept. Refuses anything that changed since."""
    facts = files.read_record(
        folder / "mix.json",
        generated_images=int, batch=int, generated_share=(int, float), with_replacement=bool, copies=int,
        reshuffle_steps=int, selection=(dict, type(None)),
    )  # fmt: skip
    mix = Mix(
        len(real),
        facts["generated_images"],
        facts["batch"],
        facts["generated_share"],
        facts["with_replacement"],
        facts["copies"],
        facts["reshuffle_steps"],
    )
    selection = facts["selection"]
    if selection is None:
        return mix, None, None
    images = root / ARTIFACTS / "generate_images" / selection["image_set"]
    expect_selected_from(selection, images)
    indices = root / selection["path"] / "indices.npy"
    if files.sha256(indices) != selection["indices_sha256"]:
        raise DmatError(f"{indices} changed after the mix was made; run `dvc repro` to bring them together")
    return mix, shards.open_shards(images), files.load_array(indices)
