"""In which order the generated images of a training are taken from the selections of a mixture, without state.

A mixture is an endless sequence of turns, and each turn belongs to one selection. A pattern of W turns repeats for
ever: w_k of them belong to selection k, spread as evenly as whole turns allow (smooth weighted round robin). Any part
of the sequence therefore has the shares as written, to within a few turns. A turn is one image, or, where selections
rotate, all generated images of an epoch. Position p of the training and position q within a selection are functions of
each other.

Shapes: N positions, K selections, W turns in the pattern.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

MAX_TURNS = 10_000  # in a pattern; shares of at most four decimals need no more


@dataclasses.dataclass(frozen=True)
class Turns:
    """sizes: images of each selection [K]. weights: turns of each selection in the pattern [K], whole numbers from 1.

    turn_length: number of consecutive generated images from one selection.
    """

    sizes: tuple[int, ...]
    weights: tuple[int, ...]
    turn_length: int = 1

    @functools.cached_property
    def _pattern(self) -> np.ndarray:  # int64 [W]: the selection of each turn
        total, credit = sum(self.weights), np.zeros(len(self.weights), dtype=np.int64)
        pattern = np.empty(total, dtype=np.int64)
        for k in range(total):
            credit += self.weights
            pattern[k] = credit.argmax()
            credit[pattern[k]] -= total
        return pattern

    @functools.cached_property
    def _rank(self) -> np.ndarray:  # int64 [W]: number of earlier turns of the same selection
        rank = np.empty(len(self._pattern), dtype=np.int64)
        for k in range(len(self.weights)):
            rank[self._pattern == k] = np.arange(self.weights[k])
        return rank

    def selections(self, positions: np.ndarray) -> np.ndarray:
        """The selection at each position [N]: int64 [N], each from 0 to K - 1."""
        selections: np.ndarray = self._pattern[positions // self.turn_length % len(self._pattern)]
        return selections

    def own_positions(self, positions: np.ndarray) -> np.ndarray:
        """How many earlier positions have the same selection, for positions [N]: int64 [N]."""
        turns, within = np.divmod(positions, self.turn_length)
        repeats, at = np.divmod(turns, len(self._pattern))
        own_turns = repeats * np.array(self.weights)[self._pattern[at]] + self._rank[at]
        own: np.ndarray = own_turns * self.turn_length + within
        return own

    def positions(self, selection: int, own_positions: np.ndarray) -> np.ndarray:
        """The inverse: positions of the images `own_positions` [N] of a selection, int64 [N]."""
        turns, within = np.divmod(own_positions, self.turn_length)
        repeats, rank = np.divmod(turns, self.weights[selection])
        at = np.flatnonzero(self._pattern == selection)[rank]
        positions: np.ndarray = (repeats * len(self._pattern) + at) * self.turn_length + within
        return positions

    def drawn(self, positions: int) -> list[int]:
        """Images of each selection [K] at the first `positions` positions."""
        turns, rest = divmod(positions, self.turn_length)
        repeats, left = divmod(turns, len(self._pattern))
        drawn = repeats * np.array(self.weights) + np.bincount(self._pattern[:left], minlength=len(self.sizes))
        drawn = drawn * self.turn_length
        drawn[self._pattern[left]] += rest
        return [int(count) for count in drawn]

    @functools.cached_property
    def starts(self) -> np.ndarray:
        """Where each selection begins in the list of all images, one selection after the other: int64 [K + 1]."""
        return np.concatenate([[0], np.cumsum(self.sizes)])


def weights_of(shares: Sequence[float]) -> tuple[int, ...]:
    """The smallest whole numbers in the ratio of the shares as written: (1, 3) of 0.25 and 0.75.

    Raises ValueError if a pattern would need more than `MAX_TURNS` turns.
    """
    fractions = [Fraction(str(share)) for share in shares]
    common = math.lcm(*(fraction.denominator for fraction in fractions))
    numbers = [int(fraction * common) for fraction in fractions]
    divisor = math.gcd(*numbers)
    weights = tuple(number // divisor for number in numbers)
    if sum(weights) > MAX_TURNS:
        raise ValueError(f"a pattern of {sum(weights):,} turns; expected at most {MAX_TURNS:,}; round the shares")
    return weights
