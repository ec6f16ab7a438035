"""Operations of the augmentation policies on whole batches, each image with its own strength.

All operations share one signature: operation(levels, strength) -> levels. Levels are whole numbers 0..255 in float32,
[B, C, H, W]: B batch, C channels, H height, W width. Strength is float64 [B] on the same device: torchvision truncates,
so the last bit of a factor may decide. Each operation gives, image by image, the result of
`torchvision.transforms.functional` for uint8 tensors (a test compares): nearest neighbour, zeros outside the image,
truncation to whole numbers where torchvision truncates.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

Operation = Callable[[Tensor, Tensor], Tensor]


def pick(images: Tensor, rows: Tensor, columns: Tensor, fill: float = 0.0) -> Tensor:
    """Gathers pixels: images [B, C, H, W] at integer positions rows, columns [B, H', W'] -> [B, C, H', W'].

    rows and columns may have shapes that broadcast to [B, H', W']. Positions outside the image give `fill`.
    """
    size, channels, height, width = images.shape
    rows, columns = torch.broadcast_tensors(rows, columns)
    inside = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
    flat = rows.clamp(0, height - 1) * width + columns.clamp(0, width - 1)
    index = flat.reshape(size, 1, -1).expand(-1, channels, -1)
    values = images.flatten(2).gather(2, index).reshape(size, channels, *rows.shape[1:])
    return torch.where(inside[:, None], values, torch.full((), fill, device=images.device))


def affine(images: Tensor, matrix: Tensor) -> Tensor:
    """Affine transformation with nearest neighbour and zeros outside: images [B, C, H, W] -> [B, C, H, W].

    matrix: [B, 2, 3]. The pixel at (x, y) takes its value from matrix @ (x, y, 1); both in pixels from the centre of
    the image.
    """
    height, width = images.shape[2:]
    y = torch.arange(height, device=images.device) - (height - 1) / 2
    x = torch.arange(width, device=images.device) - (width - 1) / 2
    sources = [matrix[:, k, 0, None, None] * x + matrix[:, k, 1, None, None] * y[:, None] + matrix[:, k, 2, None, None]
               for k in range(2)]  # fmt: skip
    columns, rows = (
        (source + (size - 1) / 2).round().long() for source, size in zip(sources, (width, height), strict=True)
    )
    return pick(images, rows, columns)


def rotate(images: Tensor, degrees: Tensor) -> Tensor:
    """Rotates counter-clockwise around the centre. images: [B, C, H, W]; degrees: [B]."""
    angle = torch.deg2rad(degrees)
    cosine, sine, zeros = angle.cos(), angle.sin(), torch.zeros_like(angle)
    return affine(images, _matrix((cosine, -sine, zeros), (sine, cosine, zeros)))


def shear_x(images: Tensor, amount: Tensor, about_corner: bool = True) -> Tensor:
    """Shears along x: x moves by amount * y. images: [B, C, H, W]; amount: [B], tangent of the angle.

    about_corner: the fixed point is the upper left corner, as in AutoAugment; otherwise the centre.
    """
    ones, zeros = torch.ones_like(amount), torch.zeros_like(amount)
    corner = amount * images.shape[2] / 2 if about_corner else zeros
    return affine(images, _matrix((ones, amount, corner), (zeros, ones, zeros)))


def shear_y(images: Tensor, amount: Tensor, about_corner: bool = True) -> Tensor:
    """Shears along y: y moves by amount * x. images: [B, C, H, W]; amount: [B]. See `shear_x`."""
    ones, zeros = torch.ones_like(amount), torch.zeros_like(amount)
    corner = amount * images.shape[3] / 2 if about_corner else zeros
    return affine(images, _matrix((ones, zeros, zeros), (amount, ones, corner)))


def translate_x(images: Tensor, pixels: Tensor) -> Tensor:
    """Moves to the right by `pixels`, truncated to whole ones. images: [B, C, H, W]; pixels: [B]."""
    ones, zeros = torch.ones_like(pixels), torch.zeros_like(pixels)
    return affine(images, _matrix((ones, zeros, -pixels.trunc()), (zeros, ones, zeros)))


def translate_y(images: Tensor, pixels: Tensor) -> Tensor:
    """Moves down by `pixels`, truncated to whole ones. images: [B, C, H, W]; pixels: [B]."""
    ones, zeros = torch.ones_like(pixels), torch.zeros_like(pixels)
    return affine(images, _matrix((ones, zeros, zeros), (zeros, ones, -pixels.trunc())))


def brightness(levels: Tensor, factor: Tensor) -> Tensor:
    """Multiplies the levels: 0 gives black, 1 the image itself. levels: [B, C, H, W]; factor: [B]."""
    return _blend(levels, torch.zeros_like(levels), factor)


def saturation(levels: Tensor, factor: Tensor) -> Tensor:
    """Blends with the grey image: 0 gives grey, 1 the image itself. levels: [B, C, H, W]; factor: [B].

    Images without three channels stay unchanged.
    """
    return levels if levels.shape[1] != 3 else _blend(levels, _grey(levels), factor)


def contrast(levels: Tensor, factor: Tensor) -> Tensor:
    """Blends with the mean grey level: 0 gives that level, 1 the image itself. levels: [B, C, H, W]; factor: [B]."""
    return _blend(levels, _grey(levels).mean((1, 2, 3), keepdim=True), factor)


def sharpness(levels: Tensor, factor: Tensor) -> Tensor:
    """Blends with a blurred copy: 0 gives the copy, 1 the image itself. levels: [B, C, H, W]; factor: [B].

    The border of the blurred copy is that of the image.
    """
    return _blend(levels, smooth(levels), factor)


def smooth(levels: Tensor) -> Tensor:
    """Weighted mean of each pixel and its eight neighbours. levels and result: [B, C, H, W].

    The pixel weighs five times as much as each neighbour. The border stays unchanged.
    """
    channels = levels.shape[1]
    # kernel[1, 1] = 5 would wait for the GPU.
    kernel = F.pad(torch.full((1, 1), 4.0, device=levels.device), (1, 1, 1, 1)) + 1
    kernel = (kernel / kernel.sum()).expand(channels, 1, 3, 3)
    blurred = levels.clone()
    blurred[:, :, 1:-1, 1:-1] = F.conv2d(levels, kernel, groups=channels).round()
    return blurred


def posterise(levels: Tensor, bits: Tensor) -> Tensor:
    """Keeps the highest `bits` bits of each level. levels: [B, C, H, W]; bits: [B]."""
    step = (2.0 ** (8 - bits)).float()[:, None, None, None]
    return (levels / step).floor() * step


def solarise(levels: Tensor, threshold: Tensor) -> Tensor:
    """Inverts all levels from the threshold up. levels: [B, C, H, W]; threshold: [B]."""
    return torch.where(levels >= threshold[:, None, None, None], 255 - levels, levels)


def invert(levels: Tensor, _: Tensor) -> Tensor:
    """Inverts all levels: 255 - levels. levels: [B, C, H, W]; the strength is not used."""
    return 255 - levels


def autocontrast(levels: Tensor, _: Tensor) -> Tensor:
    """Stretches each channel to 0..255; a channel with a single level stays unchanged.

    levels: [B, C, H, W]; the strength is not used.
    """
    low, high = levels.amin((2, 3), keepdim=True), levels.amax((2, 3), keepdim=True)
    flat = low == high
    scale = torch.where(flat, 1.0, 255 / (high - low))
    return ((levels - torch.where(flat, 0.0, low)) * scale).clamp(0, 255).floor()


def equalise(levels: Tensor, _: Tensor) -> Tensor:
    """Equalises the histogram of each channel by a look-up table in integer arithmetic.

    levels: [B, C, H, W]; the strength is not used.
    """
    index = levels.long().flatten(2)  # [B, C, H W]
    ones = torch.ones_like(index)
    counts = torch.zeros((*index.shape[:2], 256), dtype=torch.long, device=levels.device).scatter_add_(2, index, ones)
    brightest = counts.gather(2, index.amax(2, keepdim=True))
    step = torch.div(index.shape[2] - brightest, 255, rounding_mode="floor")
    safe = step.clamp(min=1)
    table = torch.div(counts.cumsum(2) + torch.div(safe, 2, rounding_mode="floor"), safe, rounding_mode="floor")
    table = F.pad(table, (1, -1)).clamp(0, 255)
    return torch.where(step > 0, table.gather(2, index), index).reshape(levels.shape).to(levels.dtype)


def identity(levels: Tensor, _: Tensor) -> Tensor:
    """Returns the levels [B, C, H, W] unchanged; the strength is not used."""
    return levels


def _grey(levels: Tensor) -> Tensor:
    """Grey levels [B, 1, H, W], truncated to whole numbers. Images without three channels are returned unchanged."""
    if levels.shape[1] != 3:
        return levels
    red, green, blue = levels.unbind(1)
    return (0.2989 * red + 0.587 * green + 0.114 * blue).floor()[:, None]


def _blend(levels: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    """factor * levels + (1 - factor) * other, truncated to 0..255. levels, other: [B, C, H, W]; factor: [B]."""
    weight = factor[:, None, None, None]
    return (weight.float() * levels + (1 - weight).float() * other).clamp(0, 255).floor()


def _matrix(first_row: tuple[Tensor, ...], second_row: tuple[Tensor, ...]) -> Tensor:
    """Matrix [B, 2, 3] from two rows of three tensors [B] each."""
    return torch.stack([torch.stack(first_row, 1), torch.stack(second_row, 1)], 1).float()


OPERATIONS: dict[str, Operation] = {
    "Identity": identity,
    "ShearX": shear_x,
    "ShearY": shear_y,
    "TranslateX": translate_x,
    "TranslateY": translate_y,
    "Rotate": rotate,
    "Brightness": lambda levels, amount: brightness(levels, 1 + amount),
    "Color": lambda levels, amount: saturation(levels, 1 + amount),
    "Contrast": lambda levels, amount: contrast(levels, 1 + amount),
    "Sharpness": lambda levels, amount: sharpness(levels, 1 + amount),
    "Posterize": posterise,
    "Solarize": solarise,
    "AutoContrast": autocontrast,
    "Equalize": equalise,
    "Invert": invert,
}
