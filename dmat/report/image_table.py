"""Measures of generated images as rows of a table, a column per selection."""

from collections.abc import Mapping, Sequence

from dmat.metrics.image_measures import MeasureRecord


def rows(measures: Mapping[str, Sequence[MeasureRecord]]) -> list[tuple[str, list[str]]]:
    """Heading and cells of each measure that a selection has. measures: selection -> its measures."""
    by_heading = {name: {_heading(record): _cell(record) for record in records} for name, records in measures.items()}
    headings = dict.fromkeys(heading for cells in by_heading.values() for heading in cells)
    return [(heading, [cells.get(heading, "—") for cells in by_heading.values()]) for heading in headings]


def frechet_distance(records: Sequence[MeasureRecord]) -> tuple[float, str]:
    """The Frechet distance of a selection, and the network that made the features."""
    (record,) = [record for record in records if record["measure"] == "frechet_distance"]
    return record["value"], str(record["network"])


def _heading(record: MeasureRecord) -> str:
    """Such as "precision: scorer, against validation"."""
    name, network = record["measure"], record["network"]
    heading = {"frechet_distance": "Fréchet distance"}.get(name, name.replace("_", " "))
    if network is None:
        return heading
    return f"{heading}: {network}" + (f", against {record['reference']}" if record["reference"] else "")


def _cell(record: MeasureRecord) -> str:
    """Such as "0.285 ± 0.004 (4,000)": the value, its deviation over several draws, and the number of images."""
    spread = "" if record["spread"] is None else f" ± {record['spread']:.2g}"
    references = f" : {record['references']:,}" if record["references"] else ""
    return f"{record['value']:.4g}{spread} ({record['images']:,}{references})"
