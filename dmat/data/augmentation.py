"""Augmentation of whole batches on their device, all of one signature: (images in [0, 1], generator) -> images.

Images are [B, C, H, W]. Random numbers are drawn on the CPU, so a batch is named by its generator, and a GPU is never
waited for. Distributions are those of the per-image originals (tests/test_augmentation.py compares with torchvision).
"""

import functools
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from dmat.data import operations, pil_operations
from dmat.devices import send
from dmat.errors import UnfitError

Augmentation = Callable[[Tensor, np.random.Generator], Tensor]


def none(images: Tensor, generator: np.random.Generator) -> Tensor:
    return images


def crop(images: Tensor, generator: np.random.Generator, pad: int) -> Tensor:
    """Each image shifted by -pad..pad pixels along both axes over a border of zeros (random crop of a padded image)."""
    size, _, height, width = images.shape
    shifts = send(generator.integers(0, 2 * pad + 1, (2, size)), images.device)
    rows = shifts[0][:, None] + torch.arange(height, device=images.device)  # [B, H]
    columns = shifts[1][:, None] + torch.arange(width, device=images.device)  # [B, W]
    padded = F.pad(images, (pad, pad, pad, pad)).permute(0, 2, 3, 1)  # [B, H + 2 pad, W + 2 pad, C]
    batch = torch.arange(size, device=images.device)
    return padded[batch[:, None, None], rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def flip(images: Tensor, generator: np.random.Generator) -> Tensor:
    """Each image mirrored left to right with probability 1/2."""
    mirrored = send(generator.random(len(images)) < 0.5, images.device)
    return torch.where(mirrored[:, None, None, None], images.flip(3), images)


def crop_flip(images: Tensor, generator: np.random.Generator, pad: int) -> Tensor:
    """The base augmentation of CIFAR training: random crop, then flip."""
    return flip(crop(images, generator, pad), generator)


def crop_flip_rotate(images: Tensor, generator: np.random.Generator, pad: int, degrees: float) -> Tensor:
    """Crop and flip, then turned by up to `degrees` either way, nearest neighbour: Wang et al.'s CIFAR-100 recipe."""
    images = crop_flip(images, generator, pad)
    return operations.rotate(images, _to(generator.uniform(-degrees, degrees, len(images)), images))


def cutout(images: Tensor, generator: np.random.Generator, side: int) -> Tensor:
    """Zeros in a square around a random pixel, cut off at the border (DeVries and Taylor 2017). side: even pixels."""
    height, width = images.shape[2:]
    rows, columns = generator.integers(0, height, len(images)), generator.integers(0, width, len(images))
    half = side // 2
    return torch.where(_boxes(images, rows - half, columns - half, rows + half, columns + half), 0.0, images)


def crop_flip_cutout(images: Tensor, generator: np.random.Generator, pad: int, side: int) -> Tensor:
    return cutout(crop_flip(images, generator, pad), generator, side)


def autoaugment(images: Tensor, generator: np.random.Generator, pil: bool = False) -> Tensor:
    """Crop and flip, the CIFAR-10 policy of AutoAugment (Cubuk et al. 2019, Table 7, as torchvision has it), cutout 18.

    Each image gets one of 25 pairs of operations, each with its own probability and strength. pil: as Wang et al.'s
    code has it, with PIL's operations (grey outside, bicubic shears), rotated counter-clockwise only.
    """
    known = pil_operations.OPERATIONS if pil else operations.OPERATIONS
    size = len(images)
    levels = _levels(crop_flip(images, generator, 4))
    table = _policies()
    policies = generator.integers(0, len(table), size)
    chances, signs = generator.random((2, size)), generator.integers(0, 2, (2, size)) * 2 - 1
    for k in range(2):
        names = np.array([table[policy][k][0] for policy in policies])
        often = np.array([table[policy][k][1] for policy in policies])
        bins = np.array([table[policy][k][2] or 0 for policy in policies])
        names = np.where(chances[k] <= often, names, "Identity")
        strengths = _strengths(names, bins, 10, signs[k], images.shape[2:])
        if pil:
            strengths = np.where(names == "Rotate", np.abs(strengths), strengths)
            strengths = np.where(names == "Solarize", 256 * (1 - bins / 9), strengths)
        levels = _apply(levels, names, strengths, known)
    return cutout(levels / 255, generator, 18)


def randaugment(images: Tensor, generator: np.random.Generator, count: int, magnitude: int) -> Tensor:
    """`count` random operations of one magnitude 0..30 in turn, then crop and flip (Cubuk et al. 2020).

    The 14 operations and their scales are torchvision's. Wang et al. used another implementation, whose list also has
    inversion, cutout and a second solarisation.
    """
    levels = _levels(images)
    for _ in range(count):
        names = np.array(_RANDAUGMENT)[generator.integers(0, len(_RANDAUGMENT), len(images))]
        signs = generator.integers(0, 2, len(images)) * 2 - 1
        bins = np.full(len(images), magnitude)
        strengths = _strengths(names, bins, 31, signs, images.shape[2:])
        levels = _apply(levels, names, strengths, operations.OPERATIONS)
    return crop_flip(levels / 255, generator, 4)


def idbh(images: Tensor, generator: np.random.Generator) -> Tensor:
    """IDBH "CIFAR-10, weak" (Li and Spratling 2023): flip, crop-shift by up to 10 pixels, one of eight operations, most
    of them of colour, and a random box of zeros with probability 1/2."""
    levels = _levels(crop_shift(flip(images, generator), generator, 10))
    kinds = generator.integers(0, len(_IDBH), len(images))
    shares, signs = generator.random(len(images)), generator.integers(0, 2, len(images)) * 2 - 1
    across = generator.integers(0, 2, len(images))
    for kind, (operation, low, high) in enumerate(_IDBH):
        rows = np.flatnonzero(kinds == kind)
        strength = low + (high - low) * shares[rows]
        if operation == "shear":
            angles = np.tan(strength * signs[rows])
            for axis, move in ((0, operations.shear_x), (1, operations.shear_y)):
                some = across[rows] == axis
                levels = _at(levels, rows[some], partial(move, about_corner=False), angles[some])
        elif operation == "rotate":
            levels = _at(levels, rows, operations.rotate, np.floor(strength) * signs[rows])
        else:
            levels = _at(levels, rows, operations.OPERATIONS[operation], strength)
    return erase(levels / 255, generator, 0.5)


def crop_shift(images: Tensor, generator: np.random.Generator, most: int) -> Tensor:
    """A random crop of (height - a) x (width - b) pixels with a + b uniform in 0..most, put back somewhere at random
    over zeros (Li and Spratling 2023)."""
    size, _, height, width = images.shape
    total = generator.integers(0, most + 1, size)
    across = generator.integers(0, total + 1)
    picked = []
    for extent, lost in ((height, total - across), (width, across)):
        start, back = generator.integers(0, lost + 1), generator.integers(0, lost + 1)
        place = np.arange(extent)[None] + (back - lost)[:, None]  # in the crop
        inside = (place >= 0) & (place < (extent - lost)[:, None])
        picked.append(np.where(inside, place + start[:, None], -1))
    rows, columns = (send(index, images.device) for index in picked)
    return operations.pick(images, rows[:, :, None], columns[:, None, :])


def erase(images: Tensor, generator: np.random.Generator, probability: float) -> Tensor:
    """Random erasing (Zhong et al. 2020) as in torchvision: a box of 2 to 33 % of the area, aspect ratio 0.3 to 3.3, of
    zeros; an image for which ten boxes in a row do not fit stays."""
    size, (height, width) = len(images), images.shape[2:]
    area = height * width * generator.uniform(0.02, 0.33, (size, 10))
    ratio = np.exp(generator.uniform(np.log(0.3), np.log(3.3), (size, 10)))
    tall, wide = np.rint(np.sqrt(area * ratio)).astype(int), np.rint(np.sqrt(area / ratio)).astype(int)
    fits = (tall < height) & (wide < width)
    first = fits.argmax(1)
    h, w = tall[np.arange(size), first], wide[np.arange(size), first]
    wanted = fits.any(1) & (generator.random(size) < probability)
    h, w = np.where(wanted, h, 0), np.where(wanted, w, 0)
    top, left = generator.integers(0, height - h + 1), generator.integers(0, width - w + 1)
    return torch.where(_boxes(images, top, left, top + h, left + w), 0.0, images)


def cutmix(
    images: Tensor, targets: Tensor, generator: np.random.Generator, alpha: float = 1.0
) -> tuple[Tensor, Tensor]:
    """CutMix (Yun et al. 2019) as in Wang et al.'s code: one box for the batch, into which each image takes the pixels
    of another one. targets: shares of the classes [B, K]; they are mixed by the area that the box really covers.

    alpha: both parameters of the beta distribution of the uncut share.
    """
    height, width = images.shape[2:]
    cut = np.sqrt(1 - generator.beta(alpha, alpha))
    h, w = int(height * cut) // 2, int(width * cut) // 2
    row, column = int(generator.integers(0, height)), int(generator.integers(0, width))
    rows = slice(max(0, row - h), min(height, row + h))
    columns = slice(max(0, column - w), min(width, column + w))
    share = (rows.stop - rows.start) * (columns.stop - columns.start) / (height * width)
    partners = send(generator.permutation(len(images)), images.device)
    mixed = images.clone()
    mixed[:, :, rows, columns] = images[partners][:, :, rows, columns]
    return mixed, (1 - share) * targets + share * targets[partners]


def _levels(images: Tensor) -> Tensor:
    """Whole numbers 0..255."""
    return (images * 255).round()


def _to(values: np.ndarray, images: Tensor) -> Tensor:
    return send(np.asarray(values, dtype=np.float64), images.device)


def _boxes(images: Tensor, top: np.ndarray, left: np.ndarray, bottom: np.ndarray, right: np.ndarray) -> Tensor:
    """Whether a pixel is in the box of its image: bool [B, 1, H, W]. The ends are left out."""
    height, width = images.shape[2:]
    y, x = torch.arange(height, device=images.device), torch.arange(width, device=images.device)
    edges = [send(edge, images.device)[:, None] for edge in (top, bottom, left, right)]
    rows, columns = (y >= edges[0]) & (y < edges[1]), (x >= edges[2]) & (x < edges[3])
    return (rows[:, :, None] & columns[:, None, :])[:, None]


def _apply(levels: Tensor, names: np.ndarray, strengths: np.ndarray, known: dict[str, operations.Operation]) -> Tensor:
    """To each image the operation of its name."""
    for name in sorted(set(names.tolist()) - {"Identity"}):
        rows = np.flatnonzero(names == name)
        levels = _at(levels, rows, known[name], strengths[rows])
    return levels


def _at(levels: Tensor, rows: np.ndarray, operation: operations.Operation, strengths: np.ndarray) -> Tensor:
    """An operation on some images of the batch. Which ones is known on the CPU: a GPU is not waited for."""
    if not len(rows):
        return levels
    index = send(rows, levels.device)
    return levels.index_copy(0, index, operation(levels.index_select(0, index), _to(strengths, levels)))


def _strengths(names: np.ndarray, bins: np.ndarray, count: int, signs: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    """What a bin 0..count - 1 means to each operation: torchvision's scales, which are those of the papers."""
    height, width = size
    share = bins / (count - 1)
    most = {
        **dict.fromkeys(("ShearX", "ShearY"), 0.3),
        **dict.fromkeys(("Brightness", "Color", "Contrast", "Sharpness"), 0.9),
        "TranslateX": 150 / 331 * width,
        "TranslateY": 150 / 331 * height,
        "Rotate": 30.0,
    }
    signed = share * np.array([most.get(name, 0.0) for name in names]) * signs
    with_solarise = np.where(names == "Solarize", 255 * (1 - share), signed)
    return np.where(names == "Posterize", 8 - np.rint(4 * share), with_solarise)


@functools.cache
def _policies() -> list[tuple[tuple[str, float, int | None], ...]]:
    """25 pairs of (operation, probability, bin of 10)."""
    # seconds to import: only where it is used
    from torchvision.transforms import AutoAugment, AutoAugmentPolicy  # type: ignore[import-untyped]

    found: list[tuple[tuple[str, float, int | None], ...]] = AutoAugment(AutoAugmentPolicy.CIFAR10).policies
    return found


_RANDAUGMENT = (
    *("Identity", "ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate", "Brightness", "Color"),
    *("Contrast", "Sharpness", "Posterize", "Solarize", "AutoContrast", "Equalize"),
)
# operation, weakest, strongest; colours as differences from 1, shear in radians, rotation in whole degrees
_IDBH = (
    *(("Color", -0.9, 0.9), ("Brightness", -0.5, 0.9), ("Contrast", -0.5, 0.9), ("Sharpness", -0.9, 0.9)),
    *(("AutoContrast", 0.0, 0.0), ("Equalize", 0.0, 0.0), ("shear", 0.05, 0.15), ("rotate", 1.0, 11.0)),
)

# pad 1 is the same share of an 8-pixel digit as the usual 4 pixels of a 32-pixel image.
AUGMENTATIONS: dict[str, Augmentation] = {
    "none": none,
    "crop1": partial(crop, pad=1),
    "crop4": partial(crop, pad=4),
    "crop4_flip": partial(crop_flip, pad=4),
    "crop4_flip_rotate15": partial(crop_flip_rotate, pad=4, degrees=15.0),
    "cutout18": partial(crop_flip_cutout, pad=4, side=18),
    "autoaugment": autoaugment,
    "autoaugment_pil": partial(autoaugment, pil=True),
    "randaugment": partial(randaugment, count=2, magnitude=14),
    "idbh": idbh,
}

# Images must be higher and wider than this many pixels, or nothing of them may be left.
LARGER_THAN = {"cutout18": 18, "autoaugment": 18, "autoaugment_pil": 18, "idbh": 10}


def check(name: str, height: int, width: int) -> None:
    """Raises UnfitError where an augmentation would leave nothing of images this small."""
    least = LARGER_THAN.get(name, 0)
    if min(height, width) <= least:
        raise UnfitError(
            f"augmentation {name} takes up to {least} pixels of a side, these images are {height}x{width}; expected "
            f"larger images; choose another augmentation, for example crop1"
        )
