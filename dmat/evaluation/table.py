"""File names of an evaluation, and its per-image table as Parquet."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from dmat import files
from dmat.errors import DmatError, first_line

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
    """The columns [N] of a table that `write_table` wrote, by name.

    Raises DmatError if it is missing, damaged, or holds something else than numbers, truth values and text.
    """
    import pyarrow.parquet

    if not path.exists():
        raise files.missing(path)
    try:
        if not path.is_file():  # opening a FIFO would wait for a writer
            raise ValueError("not a file")
        table = pyarrow.parquet.read_table(path, partitioning=None)
        for field in table.schema:
            if not (pyarrow.types.is_primitive(field.type) or pyarrow.types.is_string(field.type)):
                raise TypeError(f"the column {field.name} holds {field.type}")
        columns = {name: table[name].to_numpy(zero_copy_only=False) for name in table.column_names}
    except Exception as error:  # damaged or hostile bytes may raise any exception; none of them is a bug of dmat
        raise DmatError(
            f"{path} is incomplete or not a table of results ({first_line(error)}); expected what its evaluation "
            f"wrote; restore it (`dvc checkout`) or run evaluate_robust again"
        ) from None
    return columns
