"""Operations of the augmentation policies on whole batches, each image with its own strength.

operation(levels, strength) -> levels, where levels are [B, C, H, W] whole numbers 0..255 in float32 and strength is [B]
on the same device; float64, since torchvision cuts off, so that the last bit of a factor may decide. Each gives, image
by image, what `torchvision.transforms.functional` gives for uint8 tensors (a test compares): nearest neighbour, zeros
outside, cut off to whole numbers where torchvision cuts off.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

Operation = Callable[[Tensor, Tensor], Tensor]


def pick(images: Tensor, rows: Tensor, columns: Tensor, fill: float = 0.0) -> Tensor:
    """images [B, C, H, W] at integer positions rows, columns [B, H', W'] (or broadcast to it); `fill` outside."""
    size, channels, height, width = images.shape
    rows, columns = torch.broadcast_tensors(rows, columns)
    inside = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
    flat = rows.clamp(0, height - 1) * width + columns.clamp(0, width - 1)
    index = flat.reshape(size, 1, -1).expand(-1, channels, -1)
    found = images.flatten(2).gather(2, index).reshape(size, channels, *rows.shape[1:])
    return torch.where(inside[:, None], found, torch.full((), fill, device=images.device))


def affine(images: Tensor, matrix: Tensor) -> Tensor:
    """Nearest neighbour at matrix @ (x, y, 1), [B, 2, 3], in pixels from the centre of the image."""
    height, width = images.shape[2:]
    y = torch.arange(height, device=images.device) - (height - 1) / 2
    x = torch.arange(width, device=images.device) - (width - 1) / 2
    sources = [matrix[:, k, 0, None, None] * x + matrix[:, k, 1, None, None] * y[:, None] + matrix[:, k, 2, None, None]
               for k in range(2)]  # fmt: skip
    columns, rows = ((s + (n - 1) / 2).round().long() for s, n in zip(sources, (width, height), strict=True))
    return pick(images, rows, columns)


def rotate(images: Tensor, degrees: Tensor) -> Tensor:
    """Counter-clockwise around the centre."""
    angle = torch.deg2rad(degrees)
    cosine, sine, nothing = angle.cos(), angle.sin(), torch.zeros_like(angle)
    return affine(images, _matrix((cosine, -sine, nothing), (sine, cosine, nothing)))


def shear_x(images: Tensor, amount: Tensor, about_corner: bool = True) -> Tensor:
    """x moves by amount * y; about the upper left corner as in AutoAugment, or about the centre."""
    one, nothing = torch.ones_like(amount), torch.zeros_like(amount)
    corner = amount * images.shape[2] / 2 if about_corner else nothing
    return affine(images, _matrix((one, amount, corner), (nothing, one, nothing)))


def shear_y(images: Tensor, amount: Tensor, about_corner: bool = True) -> Tensor:
    one, nothing = torch.ones_like(amount), torch.zeros_like(amount)
    corner = amount * images.shape[3] / 2 if about_corner else nothing
    return affine(images, _matrix((one, nothing, nothing), (amount, one, corner)))


def translate_x(images: Tensor, pixels: Tensor) -> Tensor:
    """To the right by whole pixels, cut off."""
    one, nothing = torch.ones_like(pixels), torch.zeros_like(pixels)
    return affine(images, _matrix((one, nothing, -pixels.trunc()), (nothing, one, nothing)))


def translate_y(images: Tensor, pixels: Tensor) -> Tensor:
    """Down by whole pixels, cut off."""
    one, nothing = torch.ones_like(pixels), torch.zeros_like(pixels)
    return affine(images, _matrix((one, nothing, nothing), (nothing, one, -pixels.trunc())))


def brightness(levels: Tensor, factor: Tensor) -> Tensor:
    return _blend(levels, torch.zeros_like(levels), factor)


def saturation(levels: Tensor, factor: Tensor) -> Tensor:
    """Grey images stay."""
    return levels if levels.shape[1] != 3 else _blend(levels, _grey(levels), factor)


def contrast(levels: Tensor, factor: Tensor) -> Tensor:
    return _blend(levels, _grey(levels).mean((1, 2, 3), keepdim=True), factor)


def sharpness(levels: Tensor, factor: Tensor) -> Tensor:
    """Against a blurred copy whose border is the image's own."""
    return _blend(levels, smooth(levels), factor)


def smooth(levels: Tensor) -> Tensor:
    """Each pixel with its eight neighbours, five times as heavy as each of them; the border stays."""
    channels = levels.shape[1]
    kernel = F.pad(torch.full((1, 1), 4.0, device=levels.device), (1, 1, 1, 1)) + 1  # kernel[1, 1] = 5 waits for a GPU
    kernel = (kernel / kernel.sum()).expand(channels, 1, 3, 3)
    blurred = levels.clone()
    blurred[:, :, 1:-1, 1:-1] = F.conv2d(levels, kernel, groups=channels).round()
    return blurred


def posterise(levels: Tensor, bits: Tensor) -> Tensor:
    """Keeps the highest bits."""
    step = (2.0 ** (8 - bits)).float()[:, None, None, None]
    return (levels / step).floor() * step


def solarise(levels: Tensor, threshold: Tensor) -> Tensor:
    """Inverts levels from the threshold on."""
    return torch.where(levels >= threshold[:, None, None, None], 255 - levels, levels)


def invert(levels: Tensor, _: Tensor) -> Tensor:
    return 255 - levels


def autocontrast(levels: Tensor, _: Tensor) -> Tensor:
    """Stretches each channel to 0..255; one of a single level stays."""
    low, high = levels.amin((2, 3), keepdim=True), levels.amax((2, 3), keepdim=True)
    flat = low == high
    scale = torch.where(flat, 1.0, 255 / (high - low))
    return ((levels - torch.where(flat, 0.0, low)) * scale).clamp(0, 255).floor()


def equalise(levels: Tensor, _: Tensor) -> Tensor:
    """Each channel's histogram made even by a look-up table, in whole numbers."""
    index = levels.long().flatten(2)  # [B, C, H W]
    ones = torch.ones_like(index)
    counts = torch.zeros((*index.shape[:2], 256), dtype=torch.long, device=levels.device).scatter_add_(2, index, ones)
    brightest = counts.gather(2, index.amax(2, keepdim=True))
    step = torch.div(index.shape[2] - brightest, 255, rounding_mode="floor")
    safe = step.clamp(min=1)
    table = torch.div(counts.cumsum(2) + torch.div(safe, 2, rounding_mode="floor"), safe, rounding_mode="floor")
    table = F.pad(table, (1, -1)).clamp(0, 255)
    return torch.where(step > 0, table.gather(2, index), index).reshape(levels.shape).to(levels.dtype)


def nothing(levels: Tensor, _: Tensor) -> Tensor:
    return levels


def _grey(levels: Tensor) -> Tensor:
    """[B, 1, H, W], cut off to whole numbers. Images without three channels are their own grey."""
    if levels.shape[1] != 3:
        return levels
    red, green, blue = levels.unbind(1)
    return (0.2989 * red + 0.587 * green + 0.114 * blue).floor()[:, None]


def _blend(levels: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    share = factor[:, None, None, None]
    return (share.float() * levels + (1 - share).float() * other).clamp(0, 255).floor()


def _matrix(first: tuple[Tensor, ...], second: tuple[Tensor, ...]) -> Tensor:
    """[B, 2, 3] of six [B]."""
    return torch.stack([torch.stack(first, 1), torch.stack(second, 1)], 1).float()


OPERATIONS: dict[str, Operation] = {
    "Identity": nothing,
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
