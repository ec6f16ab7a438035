"""One image of a set: computed again, and the training steps that used it."""

import dataclasses

import numpy as np
from typing_extensions import TypedDict

from dmat import ARTIFACTS, files
from dmat.config import NONE, Params
from dmat.data import mixes, shards
from dmat.data.mixes import MixRecord
from dmat.data.mixing import MIX, BatchOrder
from dmat.errors import DmatError, did_you_mean
from dmat.jobs import generate_images
from dmat.pipeline import execution, planning
from dmat.pipeline.stages import STAGES
from dmat.training import HISTORY
from dmat.workspace import Provenance, Workspace


@dataclasses.dataclass(frozen=True)
class Remade:
    """An image that was computed again, beside the one in its shard.

    image, stored: uint8 [H, W, C]. label, stored_label: their classes.
    """

    image: np.ndarray
    stored: np.ndarray
    label: int
    stored_label: int

    @property
    def identical(self) -> bool:
        """Whether pixels and label are the same."""
        return self.label == self.stored_label and np.array_equal(self.image, self.stored)

    @property
    def differing_pixels(self) -> int:
        """Number of values that differ."""
        return int((self.image != self.stored).sum())

    @property
    def largest_difference(self) -> int:
        """The largest difference of a value, in grey levels."""
        return int(np.abs(self.image.astype(int) - self.stored.astype(int)).max())


@dataclasses.dataclass(frozen=True)
class Usage:
    """When a training used an image. steps: from 0; empty if it is not selected or was not drawn yet."""

    selected: bool
    steps: list[int]
    total_steps: int  # of the training: those that it made, or will make where it has no result yet
    finished: bool  # whether the training has a result


class _HistoryEntry(TypedDict):
    """An entry of history.json, as far as it is used."""

    images_seen: int


def remake(name: str, index: int, params: Params, workspace: Workspace) -> Remade:
    """Computes the image `index` of a set again, with the other images of its block, and reads the one in its shard.

    Raises DmatError if the set has no such image, or its model or source is missing.
    """
    stage, instance = STAGES["generate_images"], {"image_set": name}
    plan = planning.plan(stage, instance, params, workspace)
    opened = shards.open_shards(workspace.at(plan.outputs["images"]), verify=False)
    _expect_index(name, index, len(opened))
    provenance = files.read_record(workspace.at(stage.provenance_path(instance)), Provenance)
    if provenance["fingerprint"] != plan.fingerprint:
        raise DmatError(
            f"{name} was made with other parameters, inputs or code than those of now; expected the same, to compare "
            f"an image; run `dmat {stage.command} {' '.join(stage.options(instance))}` first"
        )
    job = execution.new_job(plan, params, workspace, execution.compute_of(stage, params), plan.work, quiet=True)
    start, images, labels = generate_images.block_of(index, plan.settings, job)  # type: ignore[arg-type]
    stored, stored_labels = opened.take(np.array([index]))
    return Remade(images[index - start], stored[0], int(labels[index - start]), int(stored_labels[0]))


def usage(name: str, index: int, arm: str, seed: int, params: Params, workspace: Workspace) -> Usage:
    """The steps at which the training of an arm and seed uses the image `index` of a set.

    Raises DmatError if the arm does not train on images of the set, or its mix is missing.
    """
    if arm not in params.arms:
        raise DmatError(
            f"{arm} is not an arm of params.yaml; expected one of {', '.join(params.arms)}"
            f"{did_you_mean(arm, params.arms)}"
        )
    image_sets = [params.selections[selection].image_set for selection in params.selections_of(arm)]
    if name not in image_sets:
        raise DmatError(
            f"arm {arm} trains on images of {', '.join(image_sets) or NONE}, not of {name}; expected an arm that uses "
            f"the set; name another"
        )
    if seed not in params.seeds:
        raise DmatError(
            f"--seed is {seed}; expected one of `seeds` in params.yaml: {', '.join(map(str, params.seeds))}"
        )
    real = shards.open_shards(workspace.at(f"{ARTIFACTS}/prepare_data/train"), verify=False)
    folder = workspace.at(STAGES["mix_images"].outputs(params, arm=arm)["mix"])
    mix, selected = mixes.open_mix(folder, real, workspace.root)
    assert selected is not None
    starts = np.cumsum([0, *(len(part) for part in selected.parts)])
    # A mixture may have several selections of the same set.
    parts = [(int(starts[k]), selected.parts[k]) for k, used in enumerate(image_sets) if used == name]
    _expect_index(name, index, len(parts[0][1].images))
    images_seen = files.read_record(folder / MIX, MixRecord)["images_seen"]
    trained = workspace.at(STAGES["train_robust"].outputs(params, arm=arm, seed=seed)["classifier"])
    finished = (trained / HISTORY).is_file()
    if finished:  # it may have ended early
        images_seen = files.read_record(trained / HISTORY, list[_HistoryEntry])[-1]["images_seen"]
    order = BatchOrder(mix, seed)
    positions = [start + at for start, part in parts if (at := part.position_of(index)) is not None]
    steps = sorted({step for position in positions for step in order.steps_of("generated", position, images_seen)})
    return Usage(bool(positions), steps, mix.steps(images_seen), finished)


def _expect_index(name: str, index: int, count: int) -> None:
    if not 0 <= index < count:
        raise DmatError(f"{name} has the images 0 to {count - 1:,}; expected one of them, not {index:,}")
