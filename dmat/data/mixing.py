"""Which images a training step sees: an exact number of real and of generated ones, by name, without state.

Real images, and generated ones unless they are drawn with replacement, follow their own endless sequence of
permutations (without replacement within an epoch of that source); position p of a sequence is a pure function of (seed,
source, p), and the position of a step one of the step. A restarted run therefore asks for the same images, and so does
a run with another number of workers.
"""

import dataclasses
import math

import numpy as np

from dmat import seeds

MIX = "mix.json"  # what `mix_images` writes of one


@dataclasses.dataclass(frozen=True)
class Mix:
    """A batch of `batch` images of which round(batch * generated_share) are generated (of one copy, if several).

    real: how many real images there are; generated: how many generated ones (0 with generated_share 0).
    """

    real: int
    generated: int
    batch: int
    generated_share: float
    with_replacement: bool = False  # generated images are drawn anew in each step, as in Wang et al.'s code
    copies: int = 1  # of each drawn image in a batch, which it must divide
    reshuffle_steps: int = 0  # after so many steps real images are shuffled anew, seen or not; 0: once all were seen

    @property
    def drawn(self) -> int:
        """Images drawn for one batch."""
        return self.batch // self.copies

    @property
    def generated_per_batch(self) -> int:
        """Of those drawn."""
        return round(self.drawn * self.generated_share)

    @property
    def real_per_batch(self) -> int:
        return self.drawn - self.generated_per_batch

    def real_position(self, step: int) -> int:
        """Where a step begins in the sequence of real images. A reshuffle goes on with the next unread permutation."""
        if not self.reshuffle_steps:
            return step * self.real_per_batch
        rounds, within = divmod(step, self.reshuffle_steps)
        permutations = -(-self.reshuffle_steps * self.real_per_batch // self.real)  # that a round reads from
        return rounds * permutations * self.real + within * self.real_per_batch

    def coverage(self, images_seen: int) -> dict[str, float]:
        """How far `images_seen` training images go: drawn, epochs and distinct share of either source.

        The share is what is to be expected where chance decides: real images reshuffled, generated ones drawn anew.
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


class Sequence:
    """An endless shuffled order of `count` items, readable at any position; remembers the current permutation only.

    Several threads may read it.
    """

    def __init__(self, root: int, purpose: str, count: int):
        self.root, self.purpose, self.count = root, purpose, count
        self._current = (-1, np.zeros(0, dtype=np.int64))  # one pair: never an order of another epoch

    def at(self, position: int, length: int) -> np.ndarray:
        """Items at positions [position, position + length), int64."""
        parts = []
        while length > 0:
            epoch, offset = divmod(position, self.count)
            known, order = self._current
            if epoch != known:
                order = seeds.order(self.root, self.purpose, epoch, self.count)
                self._current = (epoch, order)
            parts.append(order[offset : offset + length])
            position, length = position + len(parts[-1]), length - len(parts[-1])
        return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)


class BatchOrder:
    """Indices of the images of every step of a `Mix`."""

    def __init__(self, mix: Mix, seed: int):
        self.mix, self._seed = mix, seed
        self._real = Sequence(seed, "order/real", mix.real)
        self._generated = Sequence(seed, "order/generated", max(mix.generated, 1))

    def at(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Indices of real and of generated images of step 0, 1, ...: int64, of fixed lengths."""
        real, generated = self.mix.real_per_batch, self.mix.generated_per_batch
        chosen = (
            seeds.stream(self._seed, "draw/generated", step).integers(0, self.mix.generated, generated)
            if self.mix.with_replacement and generated
            else self._generated.at(step * generated, generated)
        )
        return self._real.at(self.mix.real_position(step), real), chosen
