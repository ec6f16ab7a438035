"""Which images a training step sees: an exact number of real and of generated images, computed without state.

Real images follow an endless sequence of permutations: no image repeats within an epoch of its source. Generated images
follow a sequence of their own, unless they are drawn with replacement or read once, in their order. Position p of a
sequence is a pure function of (seed, source, p), and the position of a step is a pure function of the step. A restarted
run therefore sees the same images, and so does a run with another number of processes.

Shapes: D images drawn for a batch, R of them real and G generated.
"""

import dataclasses
import functools
import math

import numpy as np

from dmat import seeds
from dmat.data.permutation import Permutation
from dmat.data.turns import Turns

MIX = "mix.json"  # file that `mix_images` writes for each mix
# A batch consists of so many parts, each with its share of generated images and with random numbers of its own. Every
# process of a training loads whole parts, so results do not depend on the number of processes.
_MAX_PARTS = 8


@dataclasses.dataclass(frozen=True)
class Mix:
    """Composition of a batch: int(drawn * generated_share) of its drawn images are generated, the others are real.

    Fractions are cut off as in the code of Wang et al. 2023. real: number of real images in the training split.
    generated: number of generated images (0 if generated_share is 0). batch: images in a batch, all copies counted.
    generated_sampling: "without_replacement"; "with_replacement", drawn anew in each step, as in the code of Wang et
    al.; "one_pass", each image at most once and in the order of the selection, which suits slow disks.
    turns: of the selections of a mixture; None for one selection. Each selection has an order of its own.
    """

    real: int
    generated: int
    batch: int
    generated_share: float
    generated_sampling: str = "without_replacement"
    copies: int = 1  # of each drawn image in a batch; must divide `batch`
    reshuffle_steps: int = 0  # real images are reshuffled after so many steps, seen or not; 0: after all were seen
    turns: Turns | None = None

    @property
    def drawn(self) -> int:
        """Number of different images drawn for one batch: `batch` divided by `copies`."""
        return self.batch // self.copies

    @property
    def generated_per_batch(self) -> int:
        """Number of generated images among the drawn images of one batch."""
        return int(self.drawn * self.generated_share)

    @property
    def real_per_batch(self) -> int:
        """Number of real images among the drawn images of one batch."""
        return self.drawn - self.generated_per_batch

    @property
    def parts(self) -> int:
        """Number of equal parts of a batch."""
        return math.gcd(self.drawn, _MAX_PARTS)

    @functools.cached_property
    def is_generated(self) -> np.ndarray:
        """Which of the drawn images of a batch are generated: bool [D], in each part first real, then generated ones.

        Parts differ by at most one generated image, so every process of a training has its share of both sources.
        """
        size, real = self.drawn // self.parts, self.real_per_batch
        real_of_part = np.diff(np.arange(self.parts + 1) * real // self.parts)  # [parts]
        return (np.arange(size) >= real_of_part[:, None]).ravel()

    def rows_of_parts(self, rows: slice) -> slice:
        """The rows of all parts that hold any of these rows of a batch."""
        size = self.drawn // self.parts
        first, end = rows.start // size, -(-rows.stop // size)
        return slice(first * size, end * size)

    def steps(self, images_seen: int) -> int:
        """Steps of a training of `images_seen` images: the last one is a whole batch."""
        return -(-images_seen // self.batch)

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
        decides: with `reshuffle_steps` for real images, "with_replacement" for generated images.
        """
        steps = self.steps(images_seen)
        drawn = {"real": steps * self.real_per_batch, "generated": steps * self.generated_per_batch}
        sizes = {"real": self.real, "generated": self.generated}
        report: dict[str, float] = {}
        for source, count in drawn.items():
            epochs = count / sizes[source] if sizes[source] else 0.0
            covered = min(1.0, epochs)
            if source == "generated":
                covered = self._generated_coverage(count)
            elif self.reshuffle_steps and source == "real":
                rounds, left = divmod(steps, self.reshuffle_steps)
                missed = [max(0.0, 1 - n * self.real_per_batch / self.real) for n in (self.reshuffle_steps, left)]
                covered = 1 - missed[0] ** rounds * missed[1]
            report |= {f"{source}_drawn": count, f"{source}_epochs": epochs, f"{source}_coverage": covered}
        return report

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of generated images of each selection."""
        return (self.generated,) if self.turns is None else self.turns.sizes

    def generated_drawn(self, count: int) -> list[int]:
        """How many of the first `count` generated images that a training draws are of each selection."""
        return [count] if self.turns is None else self.turns.drawn(count)

    def _generated_coverage(self, count: int) -> float:
        """The share of the generated images that are among the first `count` drawn ones, or are expected to be."""
        covered = 0.0
        for size, drawn in zip(self.sizes, self.generated_drawn(count), strict=True):
            epochs = drawn / size if size else 0.0
            share = 1 - math.exp(-epochs) if self.generated_sampling == "with_replacement" else min(1.0, epochs)
            covered += share * size
        return covered / self.generated if self.generated else 0.0


class ShuffledSequence:
    """An endless sequence of random permutations of `count` items, readable at any position.

    Needs no memory that grows with `count`. Several threads may read it at the same time.
    """

    def __init__(self, root: int, purpose: str, count: int):
        self.root, self.purpose, self.count = root, purpose, count
        self._permutation = functools.lru_cache(2)(lambda epoch: Permutation(count, root, purpose, epoch))

    def at(self, position: int, length: int) -> np.ndarray:
        """Items at the N = `length` positions from `position` on: int64 [N], each from 0 to count - 1."""
        parts = [np.zeros(0, dtype=np.int64)]
        while length > 0:
            epoch, offset = divmod(position, self.count)
            positions = np.arange(offset, min(offset + length, self.count))
            parts.append(self._permutation(epoch).items(positions))
            position, length = position + len(positions), length - len(positions)
        return np.concatenate(parts)

    def positions(self, item: int, end: int) -> list[int]:
        """All positions below `end` at which an item is, in rising order: one in each epoch."""
        epochs = range(-(-end // self.count))
        at = [epoch * self.count + int(self._permutation(epoch).positions(np.array([item]))[0]) for epoch in epochs]
        return [position for position in at if position < end]


class BatchOrder:
    """Indices of the images of every step of a `Mix`."""

    def __init__(self, mix: Mix, seed: int):
        self.mix = mix
        self._real = ShuffledSequence(seed, "order/real", mix.real)
        self._generated = [
            _GeneratedSequence(mix.generated_sampling, seed, k, max(size, 1)) for k, size in enumerate(mix.sizes)
        ]

    def at(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Indices of the real and of the generated images of step 0, 1, ...

        int64 [R] and int64 [G], with R = `mix.real_per_batch` and G = `mix.generated_per_batch`, which are constant.
        The images of a mixture are numbered one selection after the other.
        """
        real = self._real.at(self.mix.real_position(step), self.mix.real_per_batch)
        return real, self._generated_at(step, self.mix.generated_per_batch)

    def _generated_at(self, step: int, count: int) -> np.ndarray:  # int64 [G]
        turns = self.mix.turns
        if turns is None:
            return self._generated[0].at(step, step * count, count)
        positions = np.arange(step * count, (step + 1) * count)
        selections, own_positions = turns.selections(positions), turns.own_positions(positions)
        indices = np.empty(count, dtype=np.int64)
        for k in np.unique(selections):
            rows = np.flatnonzero(selections == k)
            first = int(own_positions[rows[0]])  # of consecutive positions in this selection
            indices[rows] = turns.starts[k] + self._generated[k].at(step, first, len(rows))
        return indices

    def steps_of(self, source: str, index: int, images_seen: int) -> list[int]:
        """The steps of a training of `images_seen` images that use one image. source: "real" or "generated".

        index: of the image in the training split, or among the generated images as `at` numbers them. Where images are
        drawn anew in each step, all steps are searched; else the permutations are inverted.
        """
        steps = self.mix.steps(images_seen)
        per_batch = self.mix.real_per_batch if source == "real" else self.mix.generated_per_batch
        if not per_batch:
            return []
        if source == "generated":
            if self.mix.generated_sampling == "with_replacement":
                return [step for step in range(steps) if index in self._generated_at(step, per_batch)]
            positions = self._generated_positions(index, steps * per_batch)
            return sorted({position // per_batch for position in positions})
        if self.mix.reshuffle_steps:
            end = self.mix.real_position(steps - 1) + per_batch
            starts = np.array([self.mix.real_position(step) for step in range(steps)])
            positions_read = np.array(self._real.positions(index, end), dtype=np.int64)
            step = np.searchsorted(starts, positions_read, side="right") - 1
            return sorted({int(s) for s, p in zip(step, positions_read, strict=True) if p < starts[s] + per_batch})
        return sorted({position // per_batch for position in self._real.positions(index, steps * per_batch)})

    def _generated_positions(self, index: int, end: int) -> list[int]:
        """All positions below `end` of the sequence of generated images at which one of them is."""
        turns = self.mix.turns
        if turns is None:
            return self._generated[0].positions(index, end)
        k = int(np.searchsorted(turns.starts, index, side="right")) - 1
        own_positions = self._generated[k].positions(index - int(turns.starts[k]), turns.drawn(end)[k])
        return turns.positions(k, np.array(own_positions, dtype=np.int64)).tolist()


class _GeneratedSequence:
    """The order in which the images of one selection are used. number: of the selection in a mixture, else 0."""

    def __init__(self, sampling: str, seed: int, number: int, count: int):
        self._sampling, self._seed, self._count = sampling, seed, count
        self._suffix = f"/{number}" if number else ""
        self._shuffled = ShuffledSequence(seed, f"order/generated{self._suffix}", count)

    def at(self, step: int, position: int, length: int) -> np.ndarray:
        """Images at N = `length` positions from `position` on, which step `step` reads: int64 [N]."""
        if self._sampling == "with_replacement" and length:
            return seeds.stream(self._seed, f"draw/generated{self._suffix}", step).integers(0, self._count, length)
        if self._sampling == "one_pass":
            return np.arange(position, position + length)
        return self._shuffled.at(position, length)

    def positions(self, item: int, end: int) -> list[int]:
        """All positions below `end` at which an image is, in rising order. Not for images drawn anew in each step."""
        if self._sampling == "one_pass":
            return [item] if item < end else []
        return self._shuffled.positions(item, end)
