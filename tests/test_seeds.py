"""The counter-based random numbers that are drawn for many indices at once."""

import numpy as np
import pytest
import scipy.stats
import torch

from dmat import seeds

CPU = torch.device("cpu")

# Counter, key and output of Philox4x32-10 (Salmon et al. 2011), as published with the paper's code.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def slow_philox(counter, key):
    """Philox4x32-10 on Python's integers."""
    a, b, c, d = counter
    for k in range(10):
        first, second = a * 0xD2511F53, c * 0xCD9E8D57
        low, high = (key[0] + k * 0x9E3779B9) % 2**32, (key[1] + k * 0xBB67AE85) % 2**32
        a, b, c, d = (second >> 32) ^ b ^ low, second % 2**32, (first >> 32) ^ d ^ high, first % 2**32
    return a, b, c, d


def words(counter, key):
    return tuple(int(word) for word in seeds.philox(tuple(torch.tensor(word) for word in counter), key))


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_philox_gives_the_published_answers(counter, key, expected):
    assert words(counter, key) == slow_philox(counter, key) == expected


def test_philox_equals_python_integers():
    rng = np.random.default_rng(1)
    for _ in range(50):
        counter, key = (tuple(map(int, rng.integers(0, 2**32, count))) for count in (4, 2))
        assert words(counter, key) == slow_philox(counter, key)


def test_a_row_depends_on_its_name_alone():
    indices = np.array([0, 7, 2**40 + 7, 3])
    together = seeds.normals(1, "latents", indices, (2, 3, 3), CPU)
    assert together.dtype == torch.float32
    for row, index in zip(together, indices, strict=True):
        assert torch.equal(row, seeds.normals(1, "latents", np.array([index]), (2, 3, 3), CPU)[0])
        shorter = seeds.normals(1, "latents", np.array([index]), (5,), CPU)[0]
        assert torch.equal(row.flatten()[:5], shorter), "the first numbers do not depend on how many are drawn"
    others = [seeds.normals(2, "latents", indices, (18,), CPU), seeds.normals(1, "churn/0", indices, (18,), CPU)]
    rows = torch.cat([together.flatten(1), *others])
    assert len({tuple(row.tolist()) for row in rows}) == len(rows)


def test_numbers_are_normal_and_independent():
    numbers = seeds.normals(3, "latents", np.arange(2000), (51,), CPU)
    assert scipy.stats.kstest(numbers.flatten().numpy(), "norm").pvalue > 0.001
    correlation = np.corrcoef(numbers.numpy(), rowvar=False) - np.eye(51)  # [51, 51], between positions
    assert np.abs(correlation).max() < 5 / np.sqrt(2000)
    squares = np.corrcoef(numbers.square().numpy(), rowvar=False) - np.eye(51)  # a pair shares its radius and angle
    assert np.abs(squares).max() < 6 / np.sqrt(2000)
    assert numbers.abs().max() > 4


def test_numbers_equal_box_and_muller_on_slow_words():
    from hashlib import blake2b

    digest = blake2b(b"1/latents", digest_size=8).digest()
    key = int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")
    index = 2**33 + 5
    expected = []
    for pair in range(4):
        a, b, c, d = slow_philox((pair, 0, index % 2**32, index >> 32), key)
        first, second = ((high * 2**20 + (low >> 12) + 0.5) / 2**52 for high, low in ((a, b), (c, d)))
        radius = np.sqrt(-2 * np.log(first))
        expected += [radius * np.cos(2 * np.pi * second), radius * np.sin(2 * np.pi * second)]
    actual = seeds.normals(1, "latents", np.array([index]), (7,), CPU)[0]
    np.testing.assert_allclose(actual.numpy(), np.float32(expected[:7]), rtol=2e-7)


def test_uniform_numbers_never_reach_their_ends():
    """The half step keeps the logarithm of Box and Muller finite for the smallest words, and the largest below 1."""
    words = torch.tensor([0, 0xFFFFFFFF])
    smallest, largest = seeds._open_uniform(words, words).tolist()
    assert smallest == 2.0**-53
    assert 0 < smallest < largest < 1
    assert np.sqrt(-2 * np.log(smallest)) == pytest.approx(8.57, abs=0.01), "no normal number is larger"


@pytest.mark.gpu
def test_a_gpu_draws_the_same_numbers():
    """At most one unit in the last place from the CPU's, and equal in all but one of 10^5."""
    names = (5, "latents", np.arange(500), (3, 32, 32))
    cpu = seeds.normals(*names, CPU).numpy()
    gpu = seeds.normals(*names, torch.device("cuda")).cpu().numpy()
    assert np.abs(cpu - gpu).max() <= np.spacing(np.abs(cpu)).max()
    assert (np.abs(cpu - gpu) <= np.spacing(np.abs(cpu))).all()
    assert (cpu != gpu).mean() <= 1e-5
