"""Augmentation of whole batches on their device. All functions share one signature: (images, generator) -> images.

Images are float32 [B, C, H, W] in [0, 1]: B batch, C channels, H height, W width; K classes. Random numbers are drawn
on the CPU: a batch depends on its generator alone, and the CPU never waits for a GPU. Distributions equal those of the
per-image originals (tests/test_augmentation.py compares with torchvision).
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
    """Returns the images [B, C, H, W] unchanged."""
    return images


def crop(images: Tensor, generator: np.random.Generator, pad: int) -> Tensor:
    """Shifts each image by -pad..pad pixels along both axes and fills with zeros (random crop of a padded image).

    images and result: [B, C, H, W].
    """
    size, _, height, width = images.shape
    shifts = send(generator.integers(0, 2 * pad + 1, (2, size)), images.device)
    padded = F.pad(images, (pad, pad, pad, pad)).permute(0, 2, 3, 1)  # [B, H + 2 pad, W + 2 pad, C]
    # A view of all windows of each image, [B, 1 + 2 pad, 1 + 2 pad, H, W, C]: one whole window is copied per image.
    windows = padded.unfold(1, height, 1).unfold(2, width, 1).permute(0, 1, 2, 4, 5, 3)
    return windows[torch.arange(size, device=images.device), shifts[0], shifts[1]].permute(0, 3, 1, 2)


def flip(images: Tensor, generator: np.random.Generator) -> Tensor:
    """Mirrors each image left to right with probability 1/2. images and result: [B, C, H, W]."""
    mirrored = send(generator.random(len(images)) < 0.5, images.device)
    return torch.where(mirrored[:, None, None, None], images.flip(3), images)


def crop_flip(images: Tensor, generator: np.random.Generator, pad: int) -> Tensor:
    """Random crop, then flip: the base augmentation of CIFAR training. images and result: [B, C, H, W]."""
    return flip(crop(images, generator, pad), generator)


def crop_flip_rotate(images: Tensor, generator: np.random.Generator, pad: int, degrees: float) -> Tensor:
    """Crop and flip, then rotation by up to `degrees` in either direction: the CIFAR-100 recipe of Wang et al.

    Interpolation is nearest neighbour. images and result: [B, C, H, W].
    """
    images = crop_flip(images, generator, pad)
    return operations.rotate(images, _send_float64(generator.uniform(-degrees, degrees, len(images)), images))


def cutout(images: Tensor, generator: np.random.Generator, side: int) -> Tensor:
    """Sets a square around a random pixel to zero; the border cuts the square off (DeVries and Taylor 2017).

    images and result: [B, C, H, W]. side: of the square, an even number of pixels.
    """
    height, width = images.shape[2:]
    rows, columns = generator.integers(0, height, len(images)), generator.integers(0, width, len(images))
    half = side // 2
    return torch.where(_box_mask(images, rows - half, columns - half, rows + half, columns + half), 0.0, images)


def crop_flip_cutout(images: Tensor, generator: np.random.Generator, pad: int, side: int) -> Tensor:
    """Crop and flip, then cutout. images and result: [B, C, H, W]."""
    return cutout(crop_flip(images, generator, pad), generator, side)


def autoaugment(images: Tensor, generator: np.random.Generator, pil: bool = False) -> Tensor:
    """Crop and flip, then the CIFAR-10 policy of AutoAugment, then cutout with side 18.

    The policy is that of Cubuk et al. 2019, Table 7, as in torchvision. Each image gets one of 25 pairs of operations;
    each operation has its own probability and strength. images and result: [B, C, H, W].

    pil: computes as the code of Wang et al. does: PIL's operations (grey outside the image, bicubic shears), and
    rotation counter-clockwise only.
    """
    operation_by_name = pil_operations.OPERATIONS if pil else operations.OPERATIONS
    size = len(images)
    levels = _levels(crop_flip(images, generator, 4))
    table = _policies()
    policies = generator.integers(0, len(table), size)
    draws, signs = generator.random((2, size)), generator.integers(0, 2, (2, size)) * 2 - 1
    for k in range(2):
        names = np.array([table[policy][k][0] for policy in policies])
        probabilities = np.array([table[policy][k][1] for policy in policies])
        bins = np.array([table[policy][k][2] or 0 for policy in policies])
        names = np.where(draws[k] <= probabilities, names, "Identity")
        strengths = _strengths(names, bins, 10, signs[k], images.shape[2:])
        if pil:
            strengths = np.where(names == "Rotate", np.abs(strengths), strengths)
            strengths = np.where(names == "Solarize", 256 * (1 - bins / 9), strengths)
        levels = _apply_by_name(levels, names, strengths, operation_by_name)
    return cutout(levels / 255, generator, 18)


def randaugment(images: Tensor, generator: np.random.Generator, count: int, magnitude: int) -> Tensor:
    """Applies `count` random operations of one magnitude 0..30, then crop and flip (RandAugment, Cubuk et al. 2020).

    The 14 operations and their scales are torchvision's. Wang et al. used another implementation, whose list also has
    inversion, cutout and a second solarisation. images and result: [B, C, H, W].
    """
    levels = _levels(images)
    for _ in range(count):
        names = np.array(_RANDAUGMENT)[generator.integers(0, len(_RANDAUGMENT), len(images))]
        signs = generator.integers(0, 2, len(images)) * 2 - 1
        bins = np.full(len(images), magnitude)
        strengths = _strengths(names, bins, 31, signs, images.shape[2:])
        levels = _apply_by_name(levels, names, strengths, operations.OPERATIONS)
    return crop_flip(levels / 255, generator, 4)


def idbh(images: Tensor, generator: np.random.Generator) -> Tensor:
    """IDBH "CIFAR-10, weak" (Li and Spratling 2023).

    Steps: flip, crop-shift by up to 10 pixels, one of eight operations (most of them change colours), and a random box
    of zeros with probability 1/2. images and result: [B, C, H, W].
    """
    levels = _levels(crop_shift(flip(images, generator), generator, 10))
    kinds = generator.integers(0, len(_IDBH), len(images))
    fractions, signs = generator.random(len(images)), generator.integers(0, 2, len(images)) * 2 - 1
    axes = generator.integers(0, 2, len(images))
    for kind, (operation, low, high) in enumerate(_IDBH):
        rows = np.flatnonzero(kinds == kind)
        strength = low + (high - low) * fractions[rows]
        if operation == "shear":
            angles = np.tan(strength * signs[rows])
            for axis, shear in ((0, operations.shear_x), (1, operations.shear_y)):
                on_axis = axes[rows] == axis
                levels = _apply_to_rows(levels, rows[on_axis], partial(shear, about_corner=False), angles[on_axis])
        elif operation == "rotate":
            levels = _apply_to_rows(levels, rows, operations.rotate, np.floor(strength) * signs[rows])
        else:
            levels = _apply_to_rows(levels, rows, operations.OPERATIONS[operation], strength)
    return erase(levels / 255, generator, 0.5)


def crop_shift(images: Tensor, generator: np.random.Generator, max_removed: int) -> Tensor:
    """Crops each image at random and pastes the crop at a random position over zeros (Li and Spratling 2023).

    The crop has (height - a) x (width - b) pixels, with a + b uniform in 0..max_removed. images and result:
    [B, C, H, W].
    """
    size, _, height, width = images.shape
    total = generator.integers(0, max_removed + 1, size)
    removed_columns = generator.integers(0, total + 1)
    source_indices = []
    for extent, removed in ((height, total - removed_columns), (width, removed_columns)):
        start, offset = generator.integers(0, removed + 1), generator.integers(0, removed + 1)
        position = np.arange(extent)[None] + (offset - removed)[:, None]  # in the crop
        inside = (position >= 0) & (position < (extent - removed)[:, None])
        source_indices.append(np.where(inside, position + start[:, None], -1))
    rows, columns = (send(index, images.device) for index in source_indices)
    return operations.pick(images, rows[:, :, None], columns[:, None, :])


def erase(images: Tensor, generator: np.random.Generator, probability: float) -> Tensor:
    """Random erasing (Zhong et al. 2020) as in torchvision: sets a random box to zero with `probability`.

    The box covers 2 to 33 % of the area and has an aspect ratio of 0.3 to 3.3. If ten boxes in a row do not fit, the
    image stays unchanged. images and result: [B, C, H, W].
    """
    size, (height, width) = len(images), images.shape[2:]
    area = height * width * generator.uniform(0.02, 0.33, (size, 10))
    ratio = np.exp(generator.uniform(np.log(0.3), np.log(3.3), (size, 10)))
    tall, wide = np.rint(np.sqrt(area * ratio)).astype(int), np.rint(np.sqrt(area / ratio)).astype(int)
    fits = (tall < height) & (wide < width)
    first = fits.argmax(1)
    h, w = tall[np.arange(size), first], wide[np.arange(size), first]
    erased = fits.any(1) & (generator.random(size) < probability)
    h, w = np.where(erased, h, 0), np.where(erased, w, 0)
    top, left = generator.integers(0, height - h + 1), generator.integers(0, width - w + 1)
    return torch.where(_box_mask(images, top, left, top + h, left + w), 0.0, images)


def cutmix(
    images: Tensor, targets: Tensor, generator: np.random.Generator, alpha: float = 1.0
) -> tuple[Tensor, Tensor]:
    """CutMix (Yun et al. 2019) as in the code of Wang et al.: returns the mixed images and targets.

    One box serves the whole batch. Inside it, each image takes the pixels of another image of the batch.

    images: [B, C, H, W]. targets: [B, K], class probabilities; they are mixed in proportion to the area that the box
    really covers. alpha: both parameters of the beta distribution of the uncut share.
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
    """Grey or colour levels: whole numbers 0..255 in float32, [B, C, H, W], from images in [0, 1]."""
    return (images * 255).round()


def _send_float64(values: np.ndarray, images: Tensor) -> Tensor:
    """Sends values of any shape to the device of `images`, as float64."""
    return send(np.asarray(values, dtype=np.float64), images.device)


def _box_mask(images: Tensor, top: np.ndarray, left: np.ndarray, bottom: np.ndarray, right: np.ndarray) -> Tensor:
    """Whether a pixel is in the box of its image: bool [B, 1, H, W].

    top, left, bottom, right: integers [B]; bottom and right are exclusive.
    """
    height, width = images.shape[2:]
    y, x = torch.arange(height, device=images.device), torch.arange(width, device=images.device)
    edges = [send(edge, images.device)[:, None] for edge in (top, bottom, left, right)]
    rows, columns = (y >= edges[0]) & (y < edges[1]), (x >= edges[2]) & (x < edges[3])
    return (rows[:, :, None] & columns[:, None, :])[:, None]


def _apply_by_name(
    levels: Tensor, names: np.ndarray, strengths: np.ndarray, operation_by_name: dict[str, operations.Operation]
) -> Tensor:
    """Applies to each image the operation of its name. levels and result: [B, C, H, W]; names, strengths: [B]."""
    for name in sorted(set(names.tolist()) - {"Identity"}):
        rows = np.flatnonzero(names == name)
        levels = _apply_to_rows(levels, rows, operation_by_name[name], strengths[rows])
    return levels


def _apply_to_rows(levels: Tensor, rows: np.ndarray, operation: operations.Operation, strengths: np.ndarray) -> Tensor:
    """Applies an operation to the images of the batch at `rows`; the others stay unchanged.

    levels and result: [B, C, H, W]. rows, strengths: [N], for the N selected images. The rows are on the CPU, so the
    CPU does not wait for a GPU.
    """
    if not len(rows):
        return levels
    index = send(rows, levels.device)
    return levels.index_copy(0, index, operation(levels.index_select(0, index), _send_float64(strengths, levels)))


def _strengths(names: np.ndarray, bins: np.ndarray, count: int, signs: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    """Strength of each image's operation, [B]: what a bin 0..count - 1 means to that operation.

    The scales are torchvision's, which are those of the papers. names, bins, signs: [B]. size: height and width.
    """
    height, width = size
    share = bins / (count - 1)
    max_strength = {
        **dict.fromkeys(("ShearX", "ShearY"), 0.3),
        **dict.fromkeys(("Brightness", "Color", "Contrast", "Sharpness"), 0.9),
        "TranslateX": 150 / 331 * width,
        "TranslateY": 150 / 331 * height,
        "Rotate": 30.0,
    }
    signed = share * np.array([max_strength.get(name, 0.0) for name in names]) * signs
    with_solarise = np.where(names == "Solarize", 255 * (1 - share), signed)
    return np.where(names == "Posterize", 8 - np.rint(4 * share), with_solarise)


@functools.cache
def _policies() -> list[tuple[tuple[str, float, int | None], ...]]:
    """The 25 pairs of AutoAugment's CIFAR-10 policy; each operation is (name, probability, bin of 10 or None)."""
    # importing torchvision takes seconds: only where it is used
    from torchvision.transforms import AutoAugment, AutoAugmentPolicy  # type: ignore[import-untyped]

    pairs: list[tuple[tuple[str, float, int | None], ...]] = AutoAugment(AutoAugmentPolicy.CIFAR10).policies
    return pairs


_RANDAUGMENT = (
    *("Identity", "ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate", "Brightness", "Color"),
    *("Contrast", "Sharpness", "Posterize", "Solarize", "AutoContrast", "Equalize"),
)
# (operation, weakest, strongest): colour factors as differences from 1, shear in radians, rotation in whole degrees
_IDBH = (
    *(("Color", -0.9, 0.9), ("Brightness", -0.5, 0.9), ("Contrast", -0.5, 0.9), ("Sharpness", -0.9, 0.9)),
    *(("AutoContrast", 0.0, 0.0), ("Equalize", 0.0, 0.0), ("shear", 0.05, 0.15), ("rotate", 1.0, 11.0)),
)

# A pad of 1 pixel is the same share of an 8-pixel digit as the usual 4 pixels of a 32-pixel image.
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

# Images must be higher and wider than this many pixels; of smaller ones an augmentation may leave nothing.
LARGER_THAN = {"cutout18": 18, "autoaugment": 18, "autoaugment_pil": 18, "idbh": 10}


def check(name: str, height: int, width: int) -> None:
    """Raises UnfitError if an augmentation could leave nothing of images of this size (pixels)."""
    limit = LARGER_THAN.get(name, 0)
    if min(height, width) <= limit:
        raise UnfitError(
            f"augmentation {name} removes up to {limit} pixels of a side, these images are {height}x{width}; expected "
            f"larger images; choose another augmentation, for example crop1"
        )
