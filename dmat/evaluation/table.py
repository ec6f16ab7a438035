"""File names of an evaluation, and its per-image table as Parquet."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from dmat import files

PER_IMAGE = "per_image.parquet"
SUMMARY = "summary.json"
PROTOCOL = "protocol.json"


def write_table(path: Path, columns: Mapping[str, np.ndarray]) -> None:
    """Writes columns [N] under their names to `path`. Equal columns give equal files."""
    import pyarrow
    import pyarrow.parquet

    with files.writing(path) as file:
        pyarrow.parquet.write_table(pyarrow.table(dict(columns)), file)


def write_results(
    folder: Path, rows: Mapping[str, np.ndarray], summary: Mapping[str, object], protocol: Mapping[str, object]
) -> None:
    """Writes the table, the protocol and the summary of one model. rows: columns [N]."""
    write_table(folder / PER_IMAGE, rows)
    files.write_json(folder / PROTOCOL, dict(protocol))
    files.write_json(folder / SUMMARY, dict(summary))


def read_table(path: Path) -> dict[str, np.ndarray]:
    """The columns [N] of a table that `write_table` wrote, by name."""
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(path)
    return {name: table[name].to_numpy(zero_copy_only=False) for name in table.column_names}
