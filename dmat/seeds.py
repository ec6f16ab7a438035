"""Randomness named by its use: (root seed, purpose, index) gives the same numbers on any device after any restart.

No generator state is ever saved. Numbers are drawn on the CPU by a counter-based generator (Philox) and moved.
"""

import hashlib

import numpy as np
import torch


def stream(root: int, purpose: str, index: int = 0) -> np.random.Generator:
    """The generator of one name. Different names are independent; the same name repeats exactly."""
    return np.random.Generator(np.random.Philox(key=_key(root, purpose, index)))


def reseed_torch(root: int, purpose: str, index: int) -> None:
    """Names the draws of torch's global generators (dropout). Called by run loops only, once per step."""
    torch.manual_seed(_key(root, purpose, index) & 0x7FFF_FFFF_FFFF_FFFF)


def _key(root: int, purpose: str, index: int) -> int:
    name = hashlib.blake2b(f"{root}/{purpose}/{index}".encode(), digest_size=16).digest()
    return int.from_bytes(name, "little")


def normal(generator: np.random.Generator, shape: tuple[int, ...]) -> torch.Tensor:
    """float32 standard normal numbers on the CPU."""
    return torch.from_numpy(generator.standard_normal(shape, dtype=np.float32))


def uniform(
    generator: np.random.Generator, shape: tuple[int, ...], low: float = 0.0, high: float = 1.0
) -> torch.Tensor:
    """float32 numbers in [low, high) on the CPU."""
    return torch.from_numpy(generator.random(shape, dtype=np.float32)).mul_(high - low).add_(low)


def order(root: int, purpose: str, epoch: int, count: int) -> np.ndarray:
    """The permutation of `count` items used in one epoch, int64."""
    return stream(root, purpose, epoch).permutation(count)
