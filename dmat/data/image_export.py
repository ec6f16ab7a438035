"""An image set in the formats that other projects read: released .npz, Parquet of Hugging Face's `datasets`, WebDataset
and a folder of images per class.

Images keep the order of the set. Equal sets give equal files with the same versions of Pillow and pyarrow. An export
appears by one rename when it is complete, with a card that says what the images are and their licence.

Shapes: N images, B images of a block, H height, W width, C channels.
"""

import contextlib
import io
import itertools
import json
import math
import os
import shutil
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from dmat import files
from dmat.data import npz_stream
from dmat.data.set_inspection import open_verified
from dmat.data.shards import MANIFEST, NO_LABEL, Shards
from dmat.errors import DmatError

Blocks = Iterator[tuple[np.ndarray, np.ndarray]]  # images uint8 [B, H, W, C] and labels int64 [B]

CARD = "README.md"
NPZ = "npz"  # the one format that is a file
UNLABELLED = "unlabelled"  # folder of images without labels
_BLOCK = 1000  # images at a time, and rows of Parquet that a reader unpacks together
_PARQUET_BYTES = 512 << 20  # of pixels in a file; `datasets` writes files of about 500 MB
_TAR_IMAGES = 10_000
_MAX_NAME = 100  # characters of a class's folder


def export(
    folder: Path,
    target: Path,
    format_name: str,
    card: str,
    first: int | None = None,
    progress: Callable[[int, int], object] = lambda images, total: None,
) -> int:
    """Writes the set in a folder to `target` in one of `FORMATS`; returns the number of images.

    card: text about the set, Markdown, written to README.md, or beside an .npz with the ending .md. first: only so many
    images. progress: called with the number of images so far and of all. Raises DmatError if the set is damaged or the
    target exists.
    """
    expect_format(format_name)
    card_path = target.with_suffix(".md") if format_name == NPZ else target / CARD
    for path in (target, card_path):
        if os.path.lexists(path):
            raise DmatError(f"{path} exists; expected a new name; choose another, or move it away")
    if (target.parent / MANIFEST).is_file():
        raise DmatError(f"{target} would lie in the image set {target.parent}; expected another folder; give one")
    images = open_verified(folder)
    count = len(images) if first is None else min(first, len(images))
    blocks = _blocks(images, count, progress)
    if format_name == NPZ:
        files.write_text(card_path, card)
        with files.writing(target) as file:
            npz_stream.write_released(file, blocks, count, images.shape, images.manifest["class_names"])
    else:
        with _appearing(target) as staged:
            _FOLDER_FORMATS[format_name](staged, images, count, blocks)
            files.write_text(staged / CARD, card)
    return count


def expect_format(name: str) -> None:
    """Raises DmatError unless this is one of `FORMATS`."""
    if name not in FORMATS:
        raise DmatError(f"--format is {name!r}; expected one of {', '.join(FORMATS)}; choose one")


def _blocks(images: Shards, count: int, progress: Callable[[int, int], object]) -> Blocks:
    """Yields the first `count` images in blocks of equal size, and less in the last one."""
    for start in range(0, count, _BLOCK):
        stop = min(start + _BLOCK, count)
        yield images.take(np.arange(start, stop))
        progress(stop, count)


@contextlib.contextmanager
def _appearing(target: Path) -> Iterator[Path]:
    """A hidden folder that becomes `target` when the block ends without an error, and else is removed."""
    staged = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    staged.mkdir(parents=True)
    try:
        yield staged
        os.sync()  # once, as an fsync for each of a million small files would take hours
        os.replace(staged, target)
        files.sync_folder(target.parent)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def _write_parquet(folder: Path, images: Shards, count: int, blocks: Blocks) -> None:
    """Columns `image`, a struct of PNG bytes and path, and `label`. `datasets` reads their types from the schema."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = images.manifest["class_names"]
    label = {"_type": "ClassLabel", "names": names} if names else {"_type": "Value", "dtype": "int64"}
    features = {"image": {"_type": "Image"}, "label": label}
    image_type = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    schema = pa.schema(
        [("image", image_type), ("label", pa.int64())],
        metadata={"huggingface": json.dumps({"info": {"features": features}}, sort_keys=True)},
    )
    groups = max(1, _PARQUET_BYTES // (math.prod(images.shape) * _BLOCK))  # of rows, in a file
    file_count, index = math.ceil(count / (groups * _BLOCK)), itertools.count()
    (folder / "data").mkdir()
    for number in range(file_count):
        path = folder / "data" / f"train-{number:05d}-of-{file_count:05d}.parquet"
        with pq.ParquetWriter(path, schema) as writer:
            for pictures, labels in itertools.islice(blocks, groups):
                cells = [{"bytes": png(picture), "path": f"{next(index):08d}.png"} for picture in pictures]
                writer.write_table(pa.table({"image": cells, "label": labels}, schema=schema), row_group_size=_BLOCK)


def _write_webdataset(folder: Path, images: Shards, count: int, blocks: Blocks) -> None:
    """Tar files of KEY.png and KEY.cls, the label as text; an image without a label has no KEY.cls."""
    tar_count, index = math.ceil(count / _TAR_IMAGES), itertools.count()
    for number in range(tar_count):
        with tarfile.open(folder / f"train-{number:06d}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for pictures, labels in itertools.islice(blocks, _TAR_IMAGES // _BLOCK):
                for picture, label in zip(pictures, labels, strict=True):
                    key = f"{next(index):08d}"
                    _add(tar, f"{key}.png", png(picture))
                    if label != NO_LABEL:
                        _add(tar, f"{key}.cls", str(label).encode())


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    """Adds a member without date and owner: equal sets give equal files."""
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def _write_folder(folder: Path, images: Shards, count: int, blocks: Blocks) -> None:
    """CLASS/INDEX.png; the index is that of the image in the set."""
    names, width, index = _folder_names(images.manifest["class_names"]), max(6, len(str(count - 1))), itertools.count()
    for name in names if images.labelled else [UNLABELLED]:
        (folder / name).mkdir()
    for pictures, labels in blocks:
        for picture, label in zip(pictures, labels, strict=True):
            parent = folder / (UNLABELLED if label == NO_LABEL else names[label])
            (parent / f"{next(index):0{width}d}.png").write_bytes(png(picture))


def _folder_names(class_names: list[str]) -> list[str]:
    """Names of the classes' folders: those of the classes, or their numbers if one of them cannot be a folder."""
    if all(
        name.isprintable() and len(name.encode()) <= _MAX_NAME and not set(name) & {"/", "\\", ":"} and name[0] != "."
        for name in class_names
    ):
        return class_names
    return [f"{label:0{len(str(len(class_names) - 1))}d}" for label in range(len(class_names))]


def png(image: np.ndarray) -> bytes:
    """An image uint8 [H, W, C], grey or RGB, as a PNG file."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(file, "PNG")
    return file.getvalue()


_FOLDER_FORMATS: dict[str, Callable[[Path, Shards, int, Blocks], None]] = {
    "parquet": _write_parquet,
    "webdataset": _write_webdataset,
    "folder": _write_folder,
}
FORMATS = (NPZ, *_FOLDER_FORMATS)
