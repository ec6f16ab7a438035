"""The augmentation pipe: its labels, its matrices and its images, each against formulas of the paper's Table 6."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from dmat.diffusion import augmentation_pipe
from dmat.diffusion.augmentation_pipe import Transformations, apply, draw

SIZES = [(32, 32), (28, 40), (40, 28)]
CASES = {
    "rotation": {"rotation": 0.7},
    "quarter turn": {"rotation": math.pi / 2},
    "larger": {"scale": 0.8},
    "smaller": {"scale": -1.1},
    "stretched": {"anisotropy": 0.9, "anisotropy_angle": 0.4},
    "moved": {"translation_x": 0.7, "translation_y": -0.3},
    "all": {"rotation": -1.2, "scale": 0.5, "anisotropy": 0.6, "anisotropy_angle": 2.0, "translation_x": -0.5,
            "translation_y": 0.4},
}  # fmt: skip


def one(**numbers):
    """The transformations of a single image; numbers that are not given are 0."""
    zero = {field.name: np.zeros(1) for field in dataclasses.fields(Transformations)}
    return Transformations(**{**zero, **{name: np.array([float(value)]) for name, value in numbers.items()}})


def matrix_from_labels(labels, size):
    """Table 6 backwards: the map of pixel positions, from the nine numbers that a denoiser is told. size: H, W.

    It takes the anisotropy as positive, which they leave open.
    """
    _, _, scale, cosine, sine, along, across, x, y = labels.double().tolist()
    anisotropy, angle = math.hypot(along, across), math.atan2(across, along)
    rotation = math.atan2(sine, cosine + 1)

    def turn(a):
        return np.array([[math.cos(a), -math.sin(a), 0], [math.sin(a), math.cos(a), 0], [0, 0, 1]])

    stretch = np.diag([2 ** (0.2 * anisotropy), 2 ** (-0.2 * anisotropy), 1])
    move = np.array([[1, 0, x * size[1] / 8], [0, 1, y * size[0] / 8], [0, 0, 1]])
    return move @ turn(angle) @ stretch @ turn(-angle) @ turn(-rotation) @ np.diag([2 ** (0.2 * scale)] * 2 + [1])


def blobs(matrix, size):
    """Two smooth spots that lie away from the border, moved by a matrix: [1, 1, H, W], evaluated exactly."""
    y, x = np.mgrid[: size[0], : size[1]] - (np.array(size) - 1)[:, None, None] / 2
    inverse = np.linalg.inv(matrix)
    u, v = (inverse[k, 0] * x + inverse[k, 1] * y + inverse[k, 2] for k in (0, 1))
    spots = np.exp(-((u - 2.5) ** 2 + (v + 2.5) ** 2) / 8) + 0.5 * np.exp(-((u + 2.5) ** 2 / 10 + (v - 1.5) ** 2 / 6))
    return torch.from_numpy(spots)[None, None]


def from_inside(matrix, size):
    """Which pixels come from inside the image and not from its mirrored border: bool [1, 1, H, W]."""
    y, x = np.mgrid[: size[0], : size[1]] - (np.array(size) - 1)[:, None, None] / 2
    inverse = np.linalg.inv(matrix)
    u, v = (inverse[k, 0] * x + inverse[k, 1] * y + inverse[k, 2] for k in (0, 1))
    return torch.from_numpy((np.abs(u) < size[1] / 2 - 2) & (np.abs(v) < size[0] / 2 - 2))[None, None]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("case", CASES)
def test_images_move_as_their_labels_say(case, size):
    transformations, still = one(**CASES[case]), blobs(np.eye(3), size)
    matrix = matrix_from_labels(transformations.labels()[0], size)
    assert matrix == pytest.approx(transformations.matrices(*size)[0], abs=1e-5)
    moved, expected = apply(still, transformations), blobs(matrix, size)
    inside = from_inside(matrix, size)
    assert inside.float().mean() > 0.4
    assert (moved - expected).abs()[inside].max() < 0.03
    assert (still - expected).abs().max() > 0.15  # so the bound above says something


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("case", CASES)
def test_undoing_the_labels_gives_the_image_back(case, size):
    transformations, still = one(**CASES[case]), blobs(np.eye(3), size)
    moved = apply(still, transformations)
    matrix = matrix_from_labels(transformations.labels()[0], size)
    back = augmentation_pipe._warp(moved, np.linalg.inv(matrix)[None])
    inside = from_inside(np.linalg.inv(matrix), size)
    assert inside.float().mean() > 0.4
    assert (back - still).abs()[inside].max() < 0.06


@pytest.mark.parametrize(("flips", "axes"), [((1, 0), [3]), ((0, 1), [2]), ((1, 1), [2, 3])])
def test_flips_are_exact(flips, axes):
    image = torch.rand(1, 3, 6, 10)
    transformations = one(flip_x=flips[0], flip_y=flips[1])
    assert torch.equal(apply(image, transformations), image.flip(axes))
    assert transformations.labels().tolist() == [[*flips, 0, 0, 0, 0, 0, 0, 0]]


def test_an_image_that_is_left_alone_has_its_bytes_and_labels_of_zero():
    image = torch.rand(1, 1, 8, 8)
    assert torch.equal(apply(image, one()), image)
    assert not one().labels().any()
    # and the way through the filters alone changes nothing either, as they are orthogonal
    doubled = image.double()
    assert (augmentation_pipe._warp(doubled, np.eye(3)[None]) - doubled).abs().max() < 1e-10


def test_the_filter_is_orthogonal_and_has_six_vanishing_moments():
    """What makes a wavelet filter sym6; a digit that is wrong shows."""
    taps = np.array(augmentation_pipe._SYM6)
    for shift in range(6):
        product = (taps[2 * shift :] * taps[: len(taps) - 2 * shift]).sum()
        assert product == pytest.approx(1.0 if shift == 0 else 0.0, abs=1e-11)
    high = taps[::-1] * (-1.0) ** np.arange(12)
    for power in range(6):
        assert (high * np.arange(12.0) ** power).sum() == pytest.approx(0, abs=1e-6)


def test_random_numbers_are_those_of_the_table():
    """Means, variances and shares of 20,000 images; bounds are five standard errors."""
    drawn, count, probability = draw(np.random.default_rng(0), 20_000, 0.12), 20_000, 0.12
    share = lambda values: float((values != 0).mean())  # noqa: E731
    error = 5 * math.sqrt(0.25 / count)
    assert share(drawn.flip_x) == pytest.approx(0.5, abs=error)  # whatever the probability
    assert share(drawn.flip_y) == pytest.approx(probability / 2, abs=error)
    for name in ("scale", "rotation", "anisotropy", "anisotropy_angle", "translation_x", "translation_y"):
        assert share(getattr(drawn, name)) == pytest.approx(probability, abs=error), name
    for name in ("scale", "anisotropy", "translation_x", "translation_y"):
        values = getattr(drawn, name)[getattr(drawn, name) != 0]
        assert (values.mean(), values.std()) == pytest.approx((0, 1), abs=0.12)
    for name in ("rotation", "anisotropy_angle"):
        values = getattr(drawn, name)[getattr(drawn, name) != 0]
        assert (np.abs(values).max(), values.std()) == pytest.approx((math.pi, math.pi / math.sqrt(3)), abs=0.1)
    assert np.array_equal(drawn.translation_x != 0, drawn.translation_y != 0)
    pairs = [(drawn.scale != 0), (drawn.rotation != 0)]
    assert (pairs[0] & pairs[1]).mean() == pytest.approx(probability**2, abs=0.006)  # separately


def test_rows_of_a_batch_are_transformed_as_in_the_whole():
    """Parts of a batch and processes of a run see the same images."""
    images, drawn = torch.rand(24, 3, 8, 8), draw(np.random.default_rng(1), 24, 0.5)
    whole, labels = apply(images, drawn), drawn.labels()
    assert not torch.equal(whole, images)
    for rows in (slice(0, 7), slice(7, 24)):
        torch.testing.assert_close(apply(images[rows], drawn.rows(rows)), whole[rows], rtol=0, atol=1e-5)
        assert torch.equal(drawn.rows(rows).labels(), labels[rows])


@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (4, 6), (8, 8), (28, 28)])
def test_images_of_any_size_stay_finite(shape):
    images, drawn = torch.rand(200, 3, *shape), draw(np.random.default_rng(2), 200, 1.0)
    moved = apply(images, drawn)
    assert moved.shape == images.shape
    assert moved.isfinite().all()
    assert (moved.min(), moved.max()) == (pytest.approx(0, abs=0.6), pytest.approx(1, abs=0.6))
