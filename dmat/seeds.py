"""Randomness named by its use: (root seed, purpose, index) gives the same numbers on any device after any restart.

No generator state is saved. A counter-based generator (Philox) draws on the CPU; callers move the numbers to a device.
"""

import hashlib

import numpy as np
import torch


def stream(root: int, purpose: str, index: int = 0) -> np.random.Generator:
    """Returns the generator named (root, purpose, index). Equal names give equal numbers; others are independent."""
    return np.random.Generator(np.random.Philox(key=_key(root, purpose, index)))


def reseed_torch(root: int, purpose: str, index: int) -> None:
    """Seeds torch's global generators, for dropout, by name. Only run loops call it, once per step."""
    torch.manual_seed(_key(root, purpose, index) & 0x7FFF_FFFF_FFFF_FFFF)


def _key(root: int, purpose: str, index: int) -> int:
    name = hashlib.blake2b(f"{root}/{purpose}/{index}".encode(), digest_size=16).digest()
    return int.from_bytes(name, "little")


def normal(generator: np.random.Generator, shape: tuple[int, ...]) -> torch.Tensor:
    """Draws standard normal numbers of any shape, float32, on the CPU."""
    return torch.from_numpy(generator.standard_normal(shape, dtype=np.float32))


def uniform(
    generator: np.random.Generator, shape: tuple[int, ...], low: float = 0.0, high: float = 1.0
) -> torch.Tensor:
    """Draws uniform numbers in [low, high) of any shape, float32, on the CPU."""
    return torch.from_numpy(generator.random(shape, dtype=np.float32)).mul_(high - low).add_(low)


def order(root: int, purpose: str, epoch: int, count: int) -> np.ndarray:
    """Draws the permutation of N = `count` items of an epoch, int64 [N]."""
    return stream(root, purpose, epoch).permutation(count)
