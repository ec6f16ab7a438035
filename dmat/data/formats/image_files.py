"""Decodes one image file: a still image in one of a few formats, none of whose readers executes code.

Shapes: H height, W width.
"""

import functools
import io
from pathlib import Path

import numpy as np
from PIL import Image

from dmat.errors import DmatError

FORMATS = ("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")  # names of PIL


def read_image(path: Path) -> np.ndarray:
    """Reads an image file as uint8 [H, W, 1] or [H, W, 3]. Raises DmatError for anything but one still image."""
    return _decode(path, str(path))


def decode_image(content: bytes, name: str) -> np.ndarray:
    """Like `read_image`, from the bytes of a file. Returns uint8 [H, W, 1] or [H, W, 3]. name: for messages."""
    return _decode(io.BytesIO(content), name)


def _decode(file: Path | io.BytesIO, name: str) -> np.ndarray:
    """Pixels uint8 [H, W, 1] or [H, W, 3]."""
    try:
        with Image.open(file, formats=FORMATS) as opened:
            mode, frames = opened.mode, getattr(opened, "n_frames", 1)
            image = opened.convert("RGB") if mode == "P" else opened
            pixels = np.asarray(image)
    except Exception as error:  # PIL has no common exception for damaged files
        raise DmatError(
            f"{name} cannot be read as an image ({error}); expected {', '.join(FORMATS)}; bring back a good copy or "
            f"remove it"
        ) from None
    if frames != 1:
        raise DmatError(f"{name} has {frames} frames; expected one still image; save a single frame")
    if mode not in ("L", "RGB", "P"):
        raise DmatError(f"{name} has the colour mode {mode}; expected 8-bit grey or RGB; convert it")
    return pixels[..., None] if pixels.ndim == 2 else pixels


def is_image_name(name: str) -> bool:
    """Whether a file has the suffix of an image that `read_image` reads."""
    return Path(name).suffix.lower() in _suffixes()


@functools.cache
def _suffixes() -> frozenset[str]:
    return frozenset(suffix for suffix, kind in Image.registered_extensions().items() if kind in FORMATS)
