"""mix_images: train split and a selection, a mixture of selections or none -> exactly which images an arm trains on.

Writes the one file that `train_robust` needs to find its images. It depends on the content of the selection and not on
how it was made, so `real_only` never depends on a generator, and an unchanged selection retrains nothing.
"""

import dataclasses

from dmat import ARTIFACTS, files
from dmat.config import NONE, MixImages
from dmat.data import shards
from dmat.data.mixing import MIX, Mix
from dmat.data.mixtures import read_mixture, turns_of
from dmat.data.selections import checksums, read_selection
from dmat.errors import DmatError
from dmat.job import Job, Result


def run(settings: MixImages, job: Job) -> Result:
    """Writes mix.json. Raises DmatError where the selection does not fit the training images or the batch."""
    real = shards.open_shards(job.inputs["train"])
    mixture = None if settings.images == NONE else read_mixture(job.inputs["selection"])
    selection = None if settings.images == NONE or mixture is not None else read_selection(job.inputs["selection"])
    generated = selection or mixture
    if generated is not None and (generated["shape"], generated["classes"]) != (list(real.shape), real.classes):
        raise DmatError(
            f"arm {job.instance['arm']}: selection {settings.images} holds images {generated['shape']} of "
            f"{generated['classes']} classes, the training images are {list(real.shape)} of {real.classes}; expected "
            f"the same; name images of a generator that was trained on this data set"
        )
    mix = Mix(
        len(real),
        generated["kept"] if generated is not None else 0,
        settings.batch,
        settings.generated_share,
        settings.generated_sampling,
        settings.copies,
        settings.reshuffle_steps,
    )
    if mixture is not None:
        mix = dataclasses.replace(mix, turns=turns_of(mixture, mix.generated_per_batch, mix.steps(mix.real)))
    if generated is not None and not mix.generated:
        raise DmatError(
            f"arm {job.instance['arm']}: selection {settings.images} keeps 0 generated images; expected some; run its "
            f"selection again"
        )
    if generated is not None and not 0 < mix.generated_per_batch < mix.drawn:
        raise DmatError(
            f"arm {job.instance['arm']}: generated_share {settings.generated_share} of {mix.drawn} images leaves "
            f"{mix.generated_per_batch} generated and {mix.real_per_batch} real images; expected some of both; "
            f"change the share or the batch"
        )
    steps, per_step = mix.steps(settings.images_seen), mix.generated_per_batch
    names = [settings.images] if mixture is None else list(mixture["selections"])
    for name, size, needed in zip(names, mix.sizes, mix.generated_drawn(steps * per_step), strict=True):
        if settings.generated_sampling == "one_pass" and needed > size:
            raise DmatError(
                f"arm {job.instance['arm']}: {steps:,} steps with {per_step} generated images each need "
                f"{needed:,} images of selection {name}; it has {size:,}, and generated_sampling is one_pass; generate "
                f"more, train on fewer images, or draw them without_replacement"
            )
    per_batch = {"real": mix.real_per_batch, "generated": mix.generated_per_batch}
    files.write_json(
        job.result / "mix" / MIX,
        {
            "schema": 1,
            "real_images": mix.real,
            "generated_images": mix.generated,
            "generated_share": mix.generated_share,
            "generated_sampling": mix.generated_sampling,
            "batch": mix.batch,
            "copies": mix.copies,
            "reshuffle_steps": mix.reshuffle_steps,
            "per_batch": per_batch,
            "generated_to_real": f"{mix.generated_per_batch}:{mix.real_per_batch}",
            "images_seen": settings.images_seen,
            "coverage": mix.coverage(settings.images_seen),
            "selection": None
            if selection is None
            else {
                "path": f"{ARTIFACTS}/select_images/{settings.images}",
                **selection,
                **checksums(job.inputs["selection"], selection),
            },
            **({} if mixture is None else {"mixture": mixture}),
        },
    )
    return Result({**per_batch, **mix.coverage(settings.images_seen)})
