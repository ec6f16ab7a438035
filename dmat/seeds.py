"""Randomness named by its use: (root seed, purpose, index) gives the same numbers on any device after any restart.

No generator state is saved, as the generators are counter-based (Philox, Salmon et al. 2011). Most draw on the CPU and
callers move the numbers to a device; `normals` draws for many indices at once, on the device itself.
"""

import hashlib
import math

import numpy as np
import torch
from torch import Tensor

_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57  # of Philox4x32 (Salmon et al. 2011, Table 2), as the next two
_KEY_STEPS = 0x9E3779B9, 0xBB67AE85
_ROUNDS = 10
_WORD = 0xFFFFFFFF  # 32 bits


def stream(root: int, purpose: str, index: int = 0) -> np.random.Generator:
    """Returns the generator named (root, purpose, index). Equal names give equal numbers; others are independent."""
    return np.random.Generator(np.random.Philox(key=_key(root, purpose, index)))


def reseed_torch(root: int, purpose: str, index: int) -> None:
    """Seeds torch's global generators, for dropout, by name. Only run loops call it, once per step."""
    torch.manual_seed(_key(root, purpose, index) & 0x7FFF_FFFF_FFFF_FFFF)


def _key(root: int, purpose: str, index: int) -> int:
    name = hashlib.blake2b(f"{root}/{purpose}/{index}".encode(), digest_size=16).digest()
    return int.from_bytes(name, "little")


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Computes Philox4x32-10 (Salmon et al. 2011): four random words for each counter and key.

    Words are in [0, 2^32). counter: four int64 tensors that broadcast to any shape; returns four of that shape.
    """
    a, b, c, d = counter
    for round_number in range(_ROUNDS):
        low_key, high_key = ((part + round_number * step) & _WORD for part, step in zip(key, _KEY_STEPS, strict=True))
        # A product of two words has 64 bits. int64 holds them all; its sign is masked away.
        first, second = a * _MULTIPLIERS[0], c * _MULTIPLIERS[1]
        a, b, c, d = (
            ((second >> 32) & _WORD) ^ b ^ low_key,
            second & _WORD,
            ((first >> 32) & _WORD) ^ d ^ high_key,
            first & _WORD,
        )
    return a, b, c, d


def normals(root: int, purpose: str, indices: np.ndarray, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Draws standard normal numbers for each index, float32 [B, *shape], on the device.

    indices: int64 [B], from 0. Row i depends on (root, purpose, indices[i]) alone, not on the other rows. The random
    integers are equal on every device. The logarithm and cosine of Box and Muller (1958) are computed in float64, so
    after rounding a number differs between devices by at most one unit in the last place, and hardly ever by that.
    """
    count = math.prod(shape)
    digest = hashlib.blake2b(f"{root}/{purpose}".encode(), digest_size=8).digest()
    key = int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")
    index = torch.from_numpy(np.asarray(indices, dtype=np.int64)).to(device)[:, None]  # [B, 1]
    pair = torch.arange(-(-count // 2), device=device)[None]  # [1, P] for P pairs of numbers
    zero = torch.zeros_like(pair)
    words = philox((pair, zero, index & _WORD, index >> 32), key)  # [B, P] each
    radius = (-2 * _open_uniform(words[0], words[1]).log()).sqrt()
    angle = 2 * math.pi * _open_uniform(words[2], words[3])
    pairs = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=2)  # [B, P, 2] float64
    return pairs.flatten(1)[:, :count].float().reshape(len(indices), *shape)


def _open_uniform(high: Tensor, low: Tensor) -> Tensor:
    """Uniform numbers in (0, 1), float64 [B, P], from the upper 52 bits of two words, int64 [B, P] each."""
    return (((high << 20) | (low >> 12)).double() + 0.5) * 2.0**-52


def normal(generator: np.random.Generator, shape: tuple[int, ...]) -> Tensor:
    """Draws standard normal numbers of any shape, float32, on the CPU."""
    return torch.from_numpy(generator.standard_normal(shape, dtype=np.float32))


def uniform(generator: np.random.Generator, shape: tuple[int, ...], low: float = 0.0, high: float = 1.0) -> Tensor:
    """Draws uniform numbers in [low, high) of any shape, float32, on the CPU."""
    return torch.from_numpy(generator.random(shape, dtype=np.float32)).mul_(high - low).add_(low)
