"""The files of an evaluation, and the per-image table as Parquet."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from dmat import files

PER_IMAGE = "per_image.parquet"
SUMMARY = "summary.json"
PROTOCOL = "protocol.json"


def write_table(path: Path, rows: Mapping[str, np.ndarray]) -> None:
    """Columns [N] under their names. Equal columns are equal files."""
    import pyarrow
    import pyarrow.parquet

    with files.writing(path) as file:
        pyarrow.parquet.write_table(pyarrow.table(dict(rows)), file)


def read_table(path: Path) -> dict[str, np.ndarray]:
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(path)
    return {name: table[name].to_numpy(zero_copy_only=False) for name in table.column_names}
