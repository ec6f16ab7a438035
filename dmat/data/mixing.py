"""Which images a training step sees: an exact number of real and of generated images, computed without state.

Real images follow an endless sequence of permutations: no image repeats within an epoch of its source. Generated images
follow a sequence of their own, unless they are drawn with replacement. Position p of a sequence is a pure function of
(seed, source, p), and the position of a step is a pure function of the step. A restarted run therefore sees the same
images, and so does a run with another number of workers.
"""

import dataclasses
import math

import numpy as np

from dmat import seeds

MIX = "mix.json"  # file that `mix_images` writes for each mix


@dataclasses.dataclass(frozen=True)
class Mix:
    """Composition of a batch: round(drawn * generated_share) of its drawn images are generated, the others are real.

    real: number of real images in the training split. generated: number of generated images (0 if generated_share is
    0). batch: images in a batch, all copies counted.
    """

    real: int
    generated: int
    batch: int
    generated_share: float
    with_replacement: bool = False  # generated images are drawn anew in each step, as in the code of Wang et al.
    copies: int = 1  # of each drawn image in a batch; must divide `batch`
    reshuffle_steps: int = 0  # real images are reshuffled after so many steps, seen or not; 0: after all were seen

    @property
    def drawn(self) -> int:
        """Number of different images drawn for one batch: `batch` divided by `copies`."""
        return self.batch // self.copies

    @property
    def generated_per_batch(self) -> int:
        """Number of generated images among the drawn images of one batch."""
        return round(self.drawn * self.generated_share)

    @property
    def real_per_batch(self) -> int:
        """Number of real images among the drawn images of one batch."""
        return self.drawn - self.generated_per_batch

    def real_position(self, step: int) -> int:
        """Position in the sequence of real images at which a step begins.

        A reshuffle continues with the next permutation that was not read.
        """
        if not self.reshuffle_steps:
            return step * self.real_per_batch
        rounds, within = divmod(step, self.reshuffle_steps)
        permutations = -(-self.reshuffle_steps * self.real_per_batch // self.real)  # that one round reads from
        return rounds * permutations * self.real + within * self.real_per_batch

    def coverage(self, images_seen: int) -> dict[str, float]:
        """Images drawn, epochs and coverage of either source after `images_seen` training images.

        Coverage is the share (0 to 1) of the source that was drawn at least once. It is an expected value where chance
        decides: with `reshuffle_steps` for real images, `with_replacement` for generated images.
        """
        steps = -(-images_seen // self.batch)  # as training counts: the last step is a whole batch
        drawn = {"real": steps * self.real_per_batch, "generated": steps * self.generated_per_batch}
        sizes = {"real": self.real, "generated": self.generated}
        report: dict[str, float] = {}
        for source, count in drawn.items():
            epochs = count / sizes[source] if sizes[source] else 0.0
            covered = min(1.0, epochs)
            if self.with_replacement and source == "generated":
                covered = 1 - math.exp(-epochs)
            elif self.reshuffle_steps and source == "real":
                rounds, left = divmod(steps, self.reshuffle_steps)
                missed = [max(0.0, 1 - n * self.real_per_batch / self.real) for n in (self.reshuffle_steps, left)]
                covered = 1 - missed[0] ** rounds * missed[1]
            report |= {f"{source}_drawn": count, f"{source}_epochs": epochs, f"{source}_coverage": covered}
        return report


class ShuffledSequence:
    """An endless sequence of random permutations of `count` items, readable at any position.

    Keeps only the current permutation in memory. Several threads may read it at the same time.
    """

    def __init__(self, root: int, purpose: str, count: int):
        self.root, self.purpose, self.count = root, purpose, count
        self._current = (-1, np.zeros(0, dtype=np.int64))  # one tuple: threads never see an order of another epoch

    def at(self, position: int, length: int) -> np.ndarray:
        """Items at the N = `length` positions from `position` on: int64 [N], each from 0 to count - 1."""
        parts = []
        while length > 0:
            epoch, offset = divmod(position, self.count)
            cached_epoch, order = self._current
            if epoch != cached_epoch:
                order = seeds.order(self.root, self.purpose, epoch, self.count)
                self._current = (epoch, order)
            parts.append(order[offset : offset + length])
            position, length = position + len(parts[-1]), length - len(parts[-1])
        return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)


class BatchOrder:
    """Indices of the images of every step of a `Mix`."""

    def __init__(self, mix: Mix, seed: int):
        self.mix, self._seed = mix, seed
        self._real = ShuffledSequence(seed, "order/real", mix.real)
        self._generated = ShuffledSequence(seed, "order/generated", max(mix.generated, 1))

    def at(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Indices of the real and of the generated images of step 0, 1, ...

        Both are int64 [N], with N the constant numbers `mix.real_per_batch` and `mix.generated_per_batch`.
        """
        real, generated = self.mix.real_per_batch, self.mix.generated_per_batch
        generated_indices = (
            seeds.stream(self._seed, "draw/generated", step).integers(0, self.mix.generated, generated)
            if self.mix.with_replacement and generated
            else self._generated.at(step * generated, generated)
        )
        return self._real.at(self.mix.real_position(step), real), generated_indices
