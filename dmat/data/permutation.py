"""Seeded permutations of any size, computed item by item instead of stored.

A list of 50 million indices takes 400 MB in every process; a permutation from here takes none and is read at any
position. It is a generalised Feistel network with cycle walking (Black and Rogaway 2002, Ciphers with Arbitrary Finite
Domains, method 3). Numbers up to `size` are written as left + a * right in a domain of a * b numbers, a and b near the
square root. A round adds a hash of one half to the other, so it can be undone. A result outside of the permutation is
permuted again until it is inside; the domain is so tight that this is rare.

Shapes: N positions or items.
"""

import math

import numpy as np

from dmat import seeds

_ROUNDS = 8  # of both halves; the orders of five items are equally likely from 6 on
# Constants of the finaliser of SplitMix64 (Steele et al. 2014), which spreads a change of one bit over all 64.
_FIRST, _SECOND = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


class Permutation:
    """A permutation of 0 to size - 1, named by (root, purpose, index) as the random numbers of `seeds` are.

    It is drawn from at most 2^128 permutations. Permutations of more than a few items are therefore not all possible,
    which no training notices.
    """

    def __init__(self, size: int, root: int, purpose: str, index: int = 0):
        self.size = size
        self._left = np.uint64(max(1, math.isqrt(max(size, 1) - 1) + 1))  # a: the square root, rounded up
        self._right = np.uint64(-(-size // int(self._left)) or 1)  # b: as few as hold all items
        keys = seeds.stream(root, purpose, index).integers(0, 2**64, (_ROUNDS, 2), dtype=np.uint64)
        self._keys = [(left, right) for left, right in keys]

    def items(self, positions: np.ndarray) -> np.ndarray:
        """The items at positions [N] from 0 to size - 1: int64 [N]."""
        return self._walk(positions, inverse=False)

    def positions(self, items: np.ndarray) -> np.ndarray:
        """Where items [N] are in the permutation, the inverse of `items`: int64 [N]."""
        return self._walk(items, inverse=True)

    def _walk(self, values: np.ndarray, inverse: bool) -> np.ndarray:  # [N] -> int64 [N]
        moved = self._feistel(np.asarray(values, dtype=np.uint64), inverse)
        while len(outside := np.flatnonzero(moved >= self.size)):
            moved[outside] = self._feistel(moved[outside], inverse)
        return moved.astype(np.int64)

    def _feistel(self, values: np.ndarray, inverse: bool) -> np.ndarray:  # uint64 [N] -> uint64 [N]
        right, left = np.divmod(values, self._left)
        if inverse:
            for left_key, right_key in reversed(self._keys):
                right = (right + self._right - _hash(left, right_key) % self._right) % self._right
                left = (left + self._left - _hash(right, left_key) % self._left) % self._left
        else:
            for left_key, right_key in self._keys:
                left = (left + _hash(right, left_key) % self._left) % self._left
                right = (right + _hash(left, right_key) % self._right) % self._right
        return left + self._left * right


def _hash(values: np.ndarray, key: np.uint64) -> np.ndarray:
    """A hash of each value under a key: uint64 [N] for uint64 [N]."""
    mixed = values ^ key
    mixed = (mixed ^ (mixed >> np.uint64(30))) * _FIRST
    mixed = (mixed ^ (mixed >> np.uint64(27))) * _SECOND
    return mixed ^ (mixed >> np.uint64(31))
