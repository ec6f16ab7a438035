"""Whether an image set can be sampled from its generator, as far as the settings of both say it.

What only the weights say, those of an imported generator for example, `generate_images` checks when it opens them.
"""

from collections.abc import Iterator

from dmat import NONE
from dmat.config import names
from dmat.config.generate_images import ImageSet
from dmat.config.train_diffusion import Generator

_TOLERANCE = 1e-6  # levels that are computed twice may differ in their last bits


def sampling_problems(name: str, image_set: ImageSet, generator: Generator) -> Iterator[str]:
    """Sentences about settings of an image set that its generator, trained here, cannot serve. name: of the set."""
    if generator.source != NONE:
        return
    path = f"image_sets.{name}"
    if image_set.classes and not generator.conditional:
        yield f"{path}.classes has no effect, as generator {image_set.generator} is not conditional; leave it out"
    if image_set.sampler.guidance != 1 and not (generator.conditional and generator.network.label_dropout):
        yield (
            f"{path}.sampler.guidance is {image_set.sampler.guidance}; generator {image_set.generator} never learns to "
            f"denoise without labels; expected 1, or a generator with network.label_dropout"
        )
    yield from _level_problems(path, image_set, generator)


def _level_problems(path: str, image_set: ImageSet, generator: Generator) -> Iterator[str]:
    """Noise levels of the sampler outside of those that the generator learns."""
    if image_set.sampler.schedule == names.SEARCHED or generator.formulation in names.WITHOUT_LIMITS:
        return
    from dmat.diffusion.formulations import FORMULATIONS  # late, as they load torch
    from dmat.diffusion.samplers import called_levels, noise_levels

    lowest, highest = FORMULATIONS[generator.formulation](generator).sigma_range
    called = called_levels(noise_levels(image_set.sampler).tolist(), image_set.sampler)
    if min(called) < lowest * (1 - _TOLERANCE) or max(called) > highest * (1 + _TOLERANCE):
        yield (
            f"{path}.sampler calls the model at noise levels from {max(called):.6g} to {min(called):.6g}; generator "
            f"{image_set.generator} of the formulation {generator.formulation} learns {lowest:.6g} to {highest:.6g}; "
            f"expected levels inside; change schedule, sigma_min, sigma_max or s_churn"
        )
