"""Opens the mix of an arm as `mix_images` wrote it. Refuses files that changed since then."""

import dataclasses
from pathlib import Path
from typing import NotRequired

from typing_extensions import TypedDict

from dmat import ARTIFACTS, files
from dmat.data.mixing import MIX, Mix
from dmat.data.mixtures import CombinedImages, GeneratedImages, MixtureRecord, turns_of
from dmat.data.selections import SelectedImages, SelectionRecord, checksums, expect_selected_from, open_selection
from dmat.data.shards import Shards
from dmat.errors import DmatError


class MixRecord(TypedDict):
    """What mix.json says, as far as its readers need it."""

    generated_images: int
    batch: int
    generated_share: float
    generated_sampling: str
    copies: int
    reshuffle_steps: int
    images_seen: int
    selection: SelectionRecord | None  # None without generated images, and for a mixture
    mixture: NotRequired[MixtureRecord]


def _is_possible(record: MixRecord) -> bool:
    counts = record["generated_images"], record["reshuffle_steps"], record["images_seen"]
    return 0 < record["copies"] <= record["batch"] and 0 <= record["generated_share"] <= 1 and min(counts) >= 0


def open_mix(folder: Path, real: Shards, root: Path) -> tuple[Mix, GeneratedImages | None]:
    """The mix of an arm and its generated images; None for a mix of real images alone.

    real: the training split. root: of the project.
    Raises DmatError if a selection or an image set changed after the mix was written.
    """
    record = files.read_record(folder / MIX, MixRecord)
    if not _is_possible(record):
        raise DmatError(
            f"{folder / MIX} describes no batch ({record['batch']} images in {record['copies']} copies, share "
            f"{record['generated_share']}); expected what mix_images wrote; delete it and run mix_images again"
        )
    mix = Mix(
        len(real),
        record["generated_images"],
        record["batch"],
        record["generated_share"],
        record["generated_sampling"],
        record["copies"],
        record["reshuffle_steps"],
    )
    if (mixture := record.get("mixture")) is not None:
        mix = dataclasses.replace(mix, turns=turns_of(mixture, mix.generated_per_batch, mix.steps(mix.real)))
        return mix, CombinedImages({name: _opened(part, root) for name, part in mixture["selections"].items()})
    selection = record["selection"]
    return mix, None if selection is None else _opened(selection, root)


def _opened(selection: SelectionRecord, root: Path) -> SelectedImages:
    """A selection as the mix names it."""
    images = root / ARTIFACTS / "generate_images" / selection["image_set"]
    expect_selected_from(selection, images)
    path = root / selection.get("path", "")
    if any(checksum != selection.get(name) for name, checksum in checksums(path, selection).items()):
        raise DmatError(f"{path} changed after the mix was written; run `dvc repro` to make them agree")
    return open_selection(path, images)
