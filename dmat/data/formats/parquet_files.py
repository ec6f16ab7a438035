"""Images in Parquet files as Hugging Face's `datasets` writes them: one file, or a folder of them.

A column of images holds the bytes of an image file; a column of labels holds integers. The metadata `huggingface` of
the schema names the classes. A path in the column of images is never opened. Shapes: N images, H height, W width, C
channels.
"""

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dmat.data.data_sets import NOT_STATED
from dmat.data.formats.image_files import decode_image
from dmat.data.formats.split_files import files_of_splits
from dmat.data.image_source import (
    ImageSource,
    Pair,
    expect_labels,
    expect_plausible_size,
    listing,
    numbered_classes,
    shape_text,
)
from dmat.errors import DmatError, first_line

SUFFIX = ".parquet"
MAGIC = b"PAR1"  # first bytes of a Parquet file
_LABELS = ("label", "fine_label")  # columns of classes in order of preference; CIFAR-100 has fine and coarse ones
_ROWS = 1_000  # decoded at once


@dataclasses.dataclass(frozen=True)
class Columns:
    """Names of the columns of a file, and the names of its classes in label order, () if it does not say them."""

    image: str
    label: str
    class_names: tuple[str, ...]


def parquet(path: Path | None) -> ImageSource:
    """Reads a Parquet file, or a folder of them in the order of their names.

    Files whose names begin with train and test are the splits; those of validation are not read. All images have one
    size. Grey images among colour images become colour images with three equal channels. Without class names in the
    metadata every class must have an image.
    """
    if path is None or not path.exists():
        raise DmatError(
            f"prepare_data.path is {path}; expected a {SUFFIX} file of images and labels, or a folder of them; give "
            f"its path"
        )
    splits, notes = ({"train": [path]}, []) if path.is_file() else files_of_splits(path, SUFFIX)
    columns = _columns_of_all([file for group in splits.values() for file in group])
    pairs = {}
    for split, group in splits.items():
        pairs[split], changed = _read_parts(group, columns)
        notes += [f"{changed:,} grey images of {split} became colour images"] if changed else []
    train, test = pairs["train"], pairs.get("test")
    names = columns.class_names or numbered_classes(path, train[1], test[1] if test else None)
    return ImageSource(*train, names, NOT_STATED, path.name, test, notes=tuple(notes))


def _columns_of_all(paths: Sequence[Path]) -> Columns:
    """The columns that all files have. Raises DmatError if they differ."""
    first, *others = [_columns_of_file(path) for path in paths]
    for path, columns in zip(paths[1:], others, strict=True):
        if columns != first:
            raise DmatError(
                f"{path} has the columns {columns.image} and {columns.label} and {len(columns.class_names)} class "
                f"names; expected {first.image}, {first.label} and the {len(first.class_names)} names as in "
                f"{paths[0].name}; bring back a good copy"
            )
    return first


def _columns_of_file(path: Path) -> Columns:
    with _open(path) as file:
        try:
            schema = file.schema_arrow
        except Exception as error:  # as in `_open`
            raise _damaged(path, error) from None
        return _columns(path, schema)


def _open(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path)
    except Exception as error:  # damaged or hostile bytes may raise any exception; none of them is a bug of dmat
        raise _damaged(path, error) from None


def _damaged(path: Path, error: Exception) -> DmatError:
    return DmatError(
        f"{path} is incomplete or not a Parquet file ({first_line(error)}); expected one with images and labels; bring "
        f"back a good copy"
    )


def _columns(path: Path, schema: pa.Schema) -> Columns:
    """The columns of images and labels of a file. Raises DmatError if there are none or several."""
    images = [field.name for field in schema if _has_bytes(field.type)]
    labels = [field.name for field in schema if pa.types.is_integer(field.type)]
    if len(labels) > 1:
        labels = [name for name in _LABELS if name in labels][:1]
    if len(images) != 1 or len(labels) != 1:
        types = [f"{field.name} {field.type}" for field in schema]
        raise DmatError(
            f"{path} has the columns {listing(types)}; expected one of images (a struct with the bytes of an image "
            f"file) and one of integers, or one of them named {' or '.join(_LABELS)}; save it again with these two"
        )
    return Columns(images[0], labels[0], _class_names(path, schema.metadata or {}, labels[0]))


def _has_bytes(kind: pa.DataType) -> bool:
    """Whether a column has the type of images: a struct with binary `bytes`."""
    if not pa.types.is_struct(kind) or kind.get_field_index("bytes") < 0:
        return False
    inner = kind.field("bytes").type
    return pa.types.is_binary(inner) or pa.types.is_large_binary(inner)


def _class_names(path: Path, metadata: Mapping[bytes, bytes], label: str) -> tuple[str, ...]:
    """The names of the classes in the metadata of `datasets`, () if there are none."""
    try:
        content = json.loads(metadata.get(b"huggingface", b"{}"))
        names = content.get("info", {}).get("features", {}).get(label, {}).get("names", [])
        valid = isinstance(names, list) and all(isinstance(name, str) and name for name in names)
    except (ValueError, AttributeError, RecursionError):
        valid, names = False, []
    if not valid or len(set(names)) < len(names):
        raise DmatError(
            f"{path}: the metadata `huggingface` does not hold distinct class names of {label}; expected a list of "
            f"text in info.features.{label}.names; save it again with `datasets`"
        )
    return tuple(names)


def _read_parts(paths: Sequence[Path], columns: Columns) -> tuple[Pair, int]:
    """Images uint8 [N, H, W, C] and labels int64 [N] of all files, and how many grey images became colour images."""
    count, stored = 0, sum(path.stat().st_size for path in paths)
    for path in paths:
        with _open(path) as file:
            count += file.metadata.num_rows
    images, labels = np.empty((0, 0, 0, 0), dtype=np.uint8), np.zeros(0, dtype=np.int64)
    filled = grey = 0
    for path in paths:
        for number, (content, label) in enumerate(_rows(path, columns)):
            image = decode_image(content, f"{path}, row {number}")
            if not filled:
                expect_plausible_size(path, count * image.size, stored)
                images, labels = np.empty((count, *image.shape), dtype=np.uint8), np.zeros(count, dtype=np.int64)
            if image.shape[:2] != images.shape[1:3]:
                raise DmatError(
                    f"{path}, row {number}, is {shape_text(image.shape)}; expected {shape_text(images.shape[1:])} like "
                    f"the other images; convert all images to one size"
                )
            if image.shape[2] > images.shape[3]:  # the first image in colour
                images = np.repeat(images, image.shape[2], axis=3)
            grey += image.shape[2] == 1
            images[filled], labels[filled] = image, label
            filled += 1
        if columns.class_names:
            expect_labels(path, labels[:filled], columns.class_names)
    return (images, labels), grey if images.shape[3] == 3 else 0


def _rows(path: Path, columns: Columns) -> Iterator[tuple[bytes, int]]:
    """Yields the bytes of the image and the label of each row. Raises DmatError if one is missing."""
    number = 0
    with _open(path) as file:
        rows = file.metadata.num_rows
        try:
            for batch in file.iter_batches(_ROWS, columns=[f"{columns.image}.bytes", columns.label]):
                contents = batch.column(columns.image).field("bytes").to_pylist()
                for content, label in zip(contents, batch.column(columns.label).to_pylist(), strict=True):
                    if number == rows:
                        raise _other_count(path, rows)
                    if content is None or label is None or not 0 <= label < 2**31:
                        what = "no bytes of an image" if content is None else f"the label {label}"
                        raise DmatError(
                            f"{path}, row {number}, has {what}; expected an image and a class counted from 0; save the "
                            f"files with the images inside"
                        )
                    yield content, label
                    number += 1
        except DmatError:
            raise
        except Exception as error:  # as in `_open`
            raise _damaged(path, error) from None
        if number != rows:
            raise _other_count(path, rows)


def _other_count(path: Path, rows: int) -> DmatError:
    return DmatError(
        f"{path} does not hold the {rows:,} rows that it says; expected all of them; bring back a good copy"
    )
