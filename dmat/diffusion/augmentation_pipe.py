"""The non-leaking augmentation of training images (Karras et al. 2022, appendix F.2 and Table 6).

An image is transformed by eight random numbers, and the denoiser gets nine labels made of them. All labels are zero
for an image that was left alone, and so they are when images are generated: the transformations do not leak into them.
Shapes: B batch, C channels, H height, W width.
"""

import dataclasses
import math

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

LABELS = 9  # numbers per image
_SCALE = 2**0.2  # of a step of one standard deviation; also of the anisotropic scaling
_TRANSLATION = 1 / 8  # of the image, per standard deviation
# The low-pass filter of the wavelet sym6 (Daubechies 1992, Table 6.3), with which Karras et al. 2020 resample.
_SYM6 = (
    *(0.015404109327027373, 0.0034907120842174702, -0.11799011114819057, -0.048311742585633, 0.4910559419267466),
    *(0.787641141030194, 0.3379294217276218, -0.07263752278646252, -0.021060292512300564, 0.04472490177066578),
    *(0.0017677118642428036, -0.007800708325034148),
)
_OUTSIDE = len(_SYM6) // 2 - 1  # samples that the filter reaches beyond its own pixel
_BORDER = 3  # pixels around the result that the filter needs
# Upsampled images lie that many pixels beside the middle, as the filter is not quite symmetric.
_DELAY = (sum(k * tap for k, tap in enumerate(_SYM6)) / sum(_SYM6) - (len(_SYM6) - 1) / 2) / 2


@dataclasses.dataclass(frozen=True)
class Transformations:
    """The random numbers of a batch, float64 [B] each: a_0 to a_7 of the paper's Table 6. 0: left alone."""

    flip_x: np.ndarray
    flip_y: np.ndarray
    scale: np.ndarray
    rotation: np.ndarray  # radians
    anisotropy_angle: np.ndarray  # radians
    anisotropy: np.ndarray
    translation_x: np.ndarray
    translation_y: np.ndarray

    def __len__(self) -> int:
        return len(self.flip_x)

    def rows(self, rows: slice | np.ndarray) -> "Transformations":
        """Those of some images: a slice, or a mask bool [B]."""
        return Transformations(**{field.name: getattr(self, field.name)[rows] for field in dataclasses.fields(self)})

    def labels(self) -> Tensor:
        """The labels that the denoiser gets, float32 [B, 9].

        As published, an anisotropic scaling and its opposite at the opposite angle have the same labels.
        """
        columns = (
            self.flip_x,
            self.flip_y,
            self.scale,
            np.cos(self.rotation) - 1,
            np.sin(self.rotation),
            self.anisotropy * np.cos(self.anisotropy_angle),
            self.anisotropy * np.sin(self.anisotropy_angle),
            self.translation_x,
            self.translation_y,
        )
        return torch.from_numpy(np.stack(columns, axis=1).astype(np.float32))

    def matrices(self, height: int, width: int) -> np.ndarray:
        """The geometric part as maps of positions in pixels from the centre of the image, float64 [B, 3, 3].

        Flips are no part of it. The axis of every anisotropic scaling is drawn; the published code leaves half of them
        horizontal.
        """
        scale, stretch = _SCALE**self.scale, _SCALE**self.anisotropy
        return (
            _translate(self.translation_x * _TRANSLATION * width, self.translation_y * _TRANSLATION * height)
            @ _rotate(self.anisotropy_angle)
            @ _stretch(stretch, 1 / stretch)
            @ _rotate(-self.anisotropy_angle)
            @ _rotate(-self.rotation)
            @ _stretch(scale, scale)
        )


def draw(generator: np.random.Generator, count: int, probability: float) -> Transformations:
    """Draws the transformations of B = `count` images.

    probability: that an image is transformed, for each of vertical flip, scaling, rotation, anisotropic scaling and
    translation separately, in [0, 1]. Half of the images are flipped horizontally.
    """
    # All numbers are drawn, whatever the probability: that of one image does not depend on another's.
    chosen = generator.random((5, count)) < probability
    flips = generator.integers(0, 2, (2, count)).astype(np.float64)
    rotation, angle = generator.uniform(-math.pi, math.pi, (2, count))
    scale, anisotropy, translation_x, translation_y = generator.standard_normal((4, count))
    return Transformations(
        flips[0],
        flips[1] * chosen[0],
        scale * chosen[1],
        rotation * chosen[2],
        angle * chosen[3],
        anisotropy * chosen[3],
        translation_x * chosen[4],
        translation_y * chosen[4],
    )


def apply(images: Tensor, transformations: Transformations) -> Tensor:
    """Transforms images [B, C, H, W] of any range. Flips are exact; what remains still is returned as it is."""
    for axis, flips in ((3, transformations.flip_x), (2, transformations.flip_y)):
        mask = torch.from_numpy(flips > 0).to(images.device)
        images = torch.where(mask[:, None, None, None], images.flip(axis), images)
    matrices = transformations.matrices(*images.shape[2:])
    moved = np.abs(matrices - np.eye(3)).max((1, 2)) > 0
    if moved.any():
        rows = torch.from_numpy(np.flatnonzero(moved)).to(images.device)
        images = images.index_copy(0, rows, _warp(images[rows], matrices[moved]))
    return images


def _warp(images: Tensor, matrices: np.ndarray) -> Tensor:
    """Moves images [B, C, H, W] by matrices [B, 3, 3], in pixels.

    It interpolates at twice the resolution and mirrors the images at their borders.
    """
    height, width = images.shape[2:]
    size = np.array([width, height], dtype=np.float64)
    inverse = np.linalg.inv(matrices)
    # Where the corners of the result, with the border that the filter needs, come from: in pixels from the centre.
    reach = size / 2 + _BORDER
    corners = np.stack([reach * sign for sign in ((-1, -1), (-1, 1), (1, -1), (1, 1))])  # [4, 2]
    shift = inverse[:, :2, 2] + _DELAY * (1 - inverse[:, :2, :2].sum(2))  # [B, 2]
    sources = np.einsum("bij,cj->bci", inverse[:, :2, :2], corners) + shift[:, None]  # [B, 4, 2]
    margin = np.ceil(np.abs(sources).max((0, 1)) - size / 2).astype(int).clip(0) + _BORDER
    columns, rows = (
        _mirrored(int(length), int(extra), images.device) for length, extra in zip(size, margin, strict=True)
    )
    upsampled = _upsample(images[:, :, rows][:, :, :, columns])
    theta = np.empty((len(images), 2, 3))
    # grid_sample counts both grids from -1 to 1.
    padded = size + 2 * margin
    theta[:, :, :2] = inverse[:, :2, :2] * (reach * 2)[None, None, :] / padded[None, :, None]
    theta[:, :, 2] = shift * 2 / padded
    shape = [len(images), images.shape[1], 2 * (height + 2 * _BORDER), 2 * (width + 2 * _BORDER)]
    grid = F.affine_grid(torch.from_numpy(theta).to(images), shape, align_corners=False)
    moved = F.grid_sample(upsampled, grid, mode="bilinear", padding_mode="border", align_corners=False)
    return _downsample(moved)[:, :, _BORDER:-_BORDER, _BORDER:-_BORDER]


def _mirrored(length: int, margin: int, device: torch.device) -> Tensor:
    """Indices of W = `length` pixels and M = `margin` more on both sides, mirrored as often as needed: int64 [W + 2 M].

    The outermost pixels are not repeated.
    """
    period = max(1, 2 * (length - 1))
    index = torch.arange(-margin, length + margin, device=device) % period
    return torch.minimum(index, period - index) if length > 1 else torch.zeros_like(index)


def _filters(images: Tensor) -> tuple[Tensor, Tensor]:
    """The filter for columns [C, 1, 12, 1] and for rows [C, 1, 1, 12], which keeps the mean of images [B, C, H, W]."""
    taps = torch.tensor(_SYM6, dtype=images.dtype, device=images.device) * math.sqrt(2)
    channels = images.shape[1]
    return taps.reshape(1, 1, -1, 1).repeat(channels, 1, 1, 1), taps.reshape(1, 1, 1, -1).repeat(channels, 1, 1, 1)


def _upsample(images: Tensor) -> Tensor:
    """Twice the resolution: [B, C, H, W] -> [B, C, 2 H, 2 W]. `_downsample` undoes it, as the filter is orthogonal."""
    channels = images.shape[1]
    for weight, stride, padding in zip(_filters(images), ((2, 1), (1, 2)), ((_OUTSIDE, 0), (0, _OUTSIDE)), strict=True):
        images = F.conv_transpose2d(images, weight, stride=stride, padding=padding, groups=channels)
    return images


def _downsample(images: Tensor) -> Tensor:
    """Half the resolution: [B, C, 2 H, 2 W] -> [B, C, H, W]."""
    channels = images.shape[1]
    for weight, stride, padding in zip(_filters(images), ((2, 1), (1, 2)), ((_OUTSIDE, 0), (0, _OUTSIDE)), strict=True):
        images = F.conv2d(images, weight / 2, stride=stride, padding=padding, groups=channels)
    return images


def _matrix(*entries: np.ndarray | float) -> np.ndarray:
    """[B, 3, 3] of nine entries, row by row, that are numbers or [B]."""
    stacked = np.stack(np.broadcast_arrays(*entries), axis=-1)  # [B, 9]
    return stacked.reshape(*stacked.shape[:-1], 3, 3)


def _translate(x: np.ndarray, y: np.ndarray) -> np.ndarray:  # [B] each -> [B, 3, 3]
    return _matrix(1.0, 0.0, x, 0.0, 1.0, y, 0.0, 0.0, 1.0)


def _stretch(x: np.ndarray, y: np.ndarray) -> np.ndarray:  # [B] each -> [B, 3, 3]
    return _matrix(x, 0.0, 0.0, 0.0, y, 0.0, 0.0, 0.0, 1.0)


def _rotate(angle: np.ndarray) -> np.ndarray:  # [B], radians -> [B, 3, 3]
    cosine, sine = np.cos(angle), np.sin(angle)
    return _matrix(cosine, -sine, 0.0, sine, cosine, 0.0, 0.0, 0.0, 1.0)
