"""AutoAugment's operations on whole batches, computed as PIL computes them for one image.

The published code of Wang et al. calls PIL. All operations share the signature of those in `operations`:
operation(levels, strength) -> levels, with levels [B, C, H, W] (B batch, C channels, H height, W width) and strength
[B]. The OPERATIONS there are torchvision's; these differ in the fill outside an image (grey, level 128), in shears
(bicubic) and in the rounding of colours. A test compares with PIL.
"""

import torch
from torch import Tensor

from dmat.data import operations
from dmat.data.operations import Operation, pick

GREY = 128.0  # level outside the image


def rotate(levels: Tensor, degrees: Tensor) -> Tensor:
    """Rotates counter-clockwise around the centre: nearest neighbour, positions in units of 1/65536 pixel.

    levels: [B, C, H, W]; degrees: [B].
    """
    height, width = levels.shape[2:]
    angle = -torch.deg2rad(degrees)
    cosine, sine = angle.cos()[:, None, None], angle.sin()[:, None, None]
    y, x = _edges(height, levels)[:, None].long(), _edges(width, levels).long()
    down, across = 0.5 - height / 2, 0.5 - width / 2  # of the first pixel, from the centre of the image
    columns = _fixed(cosine * across + sine * down + width / 2) + _fixed(cosine) * x + _fixed(sine) * y
    rows = _fixed(cosine * down - sine * across + height / 2) - _fixed(sine) * x + _fixed(cosine) * y
    return pick(levels, rows >> 16, columns >> 16, GREY)


def shear_x(levels: Tensor, amount: Tensor) -> Tensor:
    """Shears along x: x moves by amount * y. The fixed point is the upper left corner.

    Interpolation is bicubic, truncated to whole numbers. levels: [B, C, H, W]; amount: [B].
    """
    height, width = levels.shape[2:]
    y, x = _edges(height, levels)[:, None] + 0.5, _edges(width, levels) + 0.5
    source = x + amount[:, None, None] * y  # [B, H, W]
    first = (source - 0.5).floor()
    d = ((source - 0.5) - first)[:, None]
    rows = torch.arange(height, device=levels.device)[None, :, None]
    near = [(first.long() + k).clamp(0, width - 1) for k in (-1, 0, 1, 2)]
    v1, v2, v3, v4 = (pick(levels, rows, columns).double() for columns in near)
    value = v2 + d * (v3 - v1 + d * (2 * (v1 - v2) + v3 - v4 + d * (v2 - v1 + v4 - v3)))
    inside = ((source >= 0) & (source < width))[:, None]
    return torch.where(inside, value.clamp(0, 255).floor(), GREY).to(levels.dtype)


def shear_y(levels: Tensor, amount: Tensor) -> Tensor:
    """Shears along y: y moves by amount * x. levels: [B, C, H, W]; amount: [B]. See `shear_x`."""
    return shear_x(levels.transpose(2, 3), amount).transpose(2, 3)


def translate_x(levels: Tensor, pixels: Tensor) -> Tensor:
    """Moves to the left by `pixels`, nearest neighbour. levels: [B, C, H, W]; pixels: [B]."""
    columns = (_edges(levels.shape[3], levels) + 0.5 + pixels[:, None]).floor().long()
    rows = torch.arange(levels.shape[2], device=levels.device)
    return pick(levels, rows[None, :, None], columns[:, None], GREY)


def translate_y(levels: Tensor, pixels: Tensor) -> Tensor:
    """Moves up by `pixels`, nearest neighbour. levels: [B, C, H, W]; pixels: [B]."""
    return translate_x(levels.transpose(2, 3), pixels).transpose(2, 3)


def brightness(levels: Tensor, amount: Tensor) -> Tensor:
    """Multiplies the levels by 1 + amount. levels: [B, C, H, W]; amount: [B]."""
    return _blend(levels, torch.zeros_like(levels), amount)


def saturation(levels: Tensor, amount: Tensor) -> Tensor:
    """Moves the levels away from the grey image: -1 gives grey, 0 the image. levels: [B, C, H, W]; amount: [B]."""
    return _blend(levels, _grey(levels), amount)


def contrast(levels: Tensor, amount: Tensor) -> Tensor:
    """Moves the levels away from the rounded mean grey level: -1 gives that level, 0 the image itself.

    levels: [B, C, H, W]; amount: [B].
    """
    return _blend(levels, (_grey(levels).double().mean((1, 2, 3), keepdim=True) + 0.5).floor().float(), amount)


def sharpness(levels: Tensor, amount: Tensor) -> Tensor:
    """Moves the levels away from a blurred copy: -1 gives the copy, 0 the image. levels: [B, C, H, W]; amount: [B]."""
    return _blend(levels, operations.smooth(levels), amount)


def autocontrast(levels: Tensor, _: Tensor) -> Tensor:
    """Stretches each channel to 0..255; a channel with a single level stays unchanged.

    levels: [B, C, H, W]; the strength is not used.
    """
    low, high = levels.double().amin((2, 3), keepdim=True), levels.double().amax((2, 3), keepdim=True)
    scale = torch.where(low == high, 1.0, torch.full_like(low, 255) / (high - low))  # 255 / x would round twice
    offset = torch.where(low == high, 0.0, -low * scale)
    return (levels.double() * scale + offset).clamp(0, 255).floor().to(levels.dtype)


def _edges(count: int, levels: Tensor) -> Tensor:
    """Left or upper edges of `count` pixels: float64 [count], 0, 1, ..., on the device of `levels` [B, C, H, W]."""
    return torch.arange(count, device=levels.device, dtype=torch.float64)


def _fixed(values: Tensor) -> Tensor:
    """Rounds to fixed-point numbers with 16 fractional bits, int64. values: any shape."""
    return (values * 65536 + 0.5).floor().long()


def _grey(levels: Tensor) -> Tensor:
    """Grey levels [B, 1, H, W] in whole numbers. Images without three channels are returned unchanged."""
    if levels.shape[1] != 3:
        return levels
    red, green, blue = levels.long().unbind(1)
    return ((19595 * red + 38470 * green + 7471 * blue + 32768) >> 16)[:, None].to(levels.dtype)


def _blend(levels: Tensor, other: Tensor, amount: Tensor) -> Tensor:
    """other + (1 + amount) * (levels - other), truncated to 0..255. levels, other: [B, C, H, W]; amount: [B]."""
    factor = (1 + amount).float()[:, None, None, None]
    return (other + factor * (levels - other)).clamp(0, 255).floor()


OPERATIONS: dict[str, Operation] = {
    **operations.OPERATIONS,
    "ShearX": shear_x,
    "ShearY": shear_y,
    "TranslateX": translate_x,
    "TranslateY": translate_y,
    "Rotate": rotate,
    "Brightness": brightness,
    "Color": saturation,
    "Contrast": contrast,
    "Sharpness": sharpness,
    "AutoContrast": autocontrast,
}
