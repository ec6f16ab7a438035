"""Opens the mix of an arm as `mix_images` wrote it. Refuses files that changed since then."""

from pathlib import Path

from dmat import ARTIFACTS, files
from dmat.data.mixing import MIX, Mix
from dmat.data.selections import SelectedImages, checksums, expect_selected_from, open_selection
from dmat.data.shards import Shards
from dmat.errors import DmatError


def open_mix(folder: Path, real: Shards, root: Path) -> tuple[Mix, SelectedImages | None]:
    """The mix of an arm and its generated images; None for a mix of real images alone.

    real: the training split. root: of the project.
    Raises DmatError if the selection or the image set changed after the mix was written.
    """
    record = files.read_record(
        folder / MIX,
        generated_images=int, batch=int, generated_share=(int, float), generated_sampling=str, copies=int,
        reshuffle_steps=int, selection=(dict, type(None)),
    )  # fmt: skip
    mix = Mix(
        len(real),
        record["generated_images"],
        record["batch"],
        record["generated_share"],
        record["generated_sampling"],
        record["copies"],
        record["reshuffle_steps"],
    )
    selection = record["selection"]
    if selection is None:
        return mix, None
    images = root / ARTIFACTS / "generate_images" / selection["image_set"]
    expect_selected_from(selection, images)
    path = root / selection["path"]
    if any(checksum != selection.get(name) for name, checksum in checksums(path, selection).items()):
        raise DmatError(f"{path} changed after the mix was written; run `dvc repro` to make them agree")
    return mix, open_selection(path, images)
