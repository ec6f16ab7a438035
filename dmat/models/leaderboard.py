"""Published robust accuracies with date and source, and how a measurement with dmat differs from them.

`leaderboard.json` is a snapshot that was written down manually, not a copy of all of RobustBench; nothing here contacts
a server. Accuracies are in %, as on the leaderboard.
"""

import dataclasses
import difflib
import functools
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

from dmat import files
from dmat.errors import DmatError
from dmat.metrics.intervals import wilson

_TABLE = Path(__file__).with_name("leaderboard.json")


@dataclasses.dataclass(frozen=True)
class Authors:
    """The numbers that the authors report themselves. None: equal to the leaderboard's, or unknown."""

    clean: float | None
    auto_attack: float | None
    epsilon: str
    source: str


@dataclasses.dataclass(frozen=True)
class Entry:
    """A row of the leaderboard on the date `snapshot`. Accuracies in %."""

    name: str
    id: str | None  # argument of load_model in robustbench 1.1.1; None if it was not looked up
    data: str
    norm: str  # linf or l2
    epsilon: str  # as on the leaderboard: "8/255", "0.5"
    architecture: str
    clean: float
    auto_attack: float  # standard suite
    external: float | None  # under a stronger attack, if the leaderboard has a lower number
    external_attack: str | None  # None: there is none, or its name is unknown
    extra_data: str
    images: int  # number of attacked images of the test set
    authors: Authors | None  # None: they report the same
    snapshot: str
    source: str

    @property
    def ranked(self) -> float:
        """The accuracy that the leaderboard sorts by, in %."""
        return self.auto_attack if self.external is None else self.external


class MeasurementProtocol(TypedDict):
    """How an accuracy was measured here."""

    norm: str  # linf or l2
    epsilon: str  # "8/255", "0.5"
    images: int  # number of attacked images
    suite: str  # "standard" or another name
    precision: str  # "fp32" or "bf16"


_PROTOCOL_KEYS = tuple(MeasurementProtocol.__annotations__)


def entries(data: str, norm: str) -> list[Entry]:
    """All entries of a data set and norm, the best ranked first. Raises DmatError if there are none."""
    tables = _tables()
    if (data, norm) not in tables:
        available = ", ".join(" ".join(key) for key in tables)
        raise DmatError(
            f"no published numbers for {data} {norm}; expected one of {available}; compare with a paper instead"
        )
    return list(tables[data, norm])


def entry(data: str, norm: str, name: str) -> Entry:
    """The entry with this name or this id of RobustBench. Raises DmatError if there is none."""
    entry_of_name = {
        name_or_id: candidate
        for candidate in entries(data, norm)
        for name_or_id in (candidate.name, candidate.id)
        if name_or_id
    }
    if name not in entry_of_name:
        lower = {name_or_id.lower(): name_or_id for name_or_id in entry_of_name}
        close_matches = difflib.get_close_matches(name.lower(), lower, n=3, cutoff=0.4) or list(lower)[:3]
        raise DmatError(
            f"no entry {name!r} for {data} {norm}; expected a name or an id of RobustBench; "
            f"say for example {', '.join(lower[name_or_id] for name_or_id in close_matches)}"
        )
    return entry_of_name[name]


def differences(entry: Entry, protocol: MeasurementProtocol) -> list[str]:
    """Sentences about the differences between our measurement and that of the entry.

    Raises DmatError if a key is missing or a value is invalid.
    """
    missing = [key for key in _PROTOCOL_KEYS if key not in protocol]
    if missing:
        raise DmatError(
            f"a protocol without {', '.join(missing)}; expected {', '.join(_PROTOCOL_KEYS)}; add what is missing"
        )
    sentences = _about_threat(entry, protocol["norm"], protocol["epsilon"])
    sentences += _about_images(entry, protocol["images"])
    sentences += _about_suite(entry, protocol["suite"])
    sentences.append(
        "We attack in shards, each with a seed and batches of its own; RobustBench attacks all images in one run and "
        "sets no seed: random starts and the queries of Square differ."
    )
    if protocol["precision"] != "fp32":
        sentences.append(
            f"We compute in {protocol['precision']}, RobustBench in fp32: coarser gradients can make an attack weaker."
        )
    return sentences


def _about_threat(entry: Entry, norm: str, epsilon: str) -> list[str]:
    if norm != entry.norm:
        return [f"We attack in {norm}, the entry is for {entry.norm}: the two numbers are not comparable."]
    our_radius, entry_radius = _parse_radius(epsilon), _parse_radius(entry.epsilon)
    if our_radius == entry_radius:
        return []
    size, effect = ("larger", "lower") if our_radius > entry_radius else ("smaller", "higher")
    sentences = [
        f"Our epsilon is {epsilon}, the leaderboard's {entry.epsilon}: ours is {size} by "
        f"{100 * float(abs(our_radius / entry_radius - 1)):.1f} %, which makes our accuracy {effect}."
    ]
    authors = entry.authors
    if authors and authors.auto_attack is not None and _parse_radius(authors.epsilon) == our_radius:
        sentences.append(
            f"With epsilon {authors.epsilon} the authors report {authors.auto_attack:.2f} % ({authors.source}): "
            f"compare with that number instead of {entry.auto_attack:.2f} %."
        )
    return sentences


def _about_images(entry: Entry, images: int) -> list[str]:
    if images < 1:
        raise DmatError(f"images is {images}; expected 1 or more; say how many test images were attacked")
    if images == entry.images:
        return []
    share = wilson(np.arange(images) < round(images * entry.auto_attack / 100))
    return [
        f"We attack {images:,} images, the leaderboard {entry.images:,}: an accuracy of {100 * share.value:.1f} % of "
        f"{images:,} has a 95 % interval from {100 * share.low:.1f} to {100 * share.high:.1f} %."
    ]


def _about_suite(entry: Entry, suite: str) -> list[str]:
    sentences = []
    if suite != "standard":
        sentences.append(
            f"Our attack is {suite}, the leaderboard's standard AutoAttack: the two numbers are not comparable."
        )
    if entry.external is not None:
        by = f" under {entry.external_attack}" if entry.external_attack else " under a stronger attack"
        sentences.append(
            f"The leaderboard ranks the entry by {entry.external:.2f} %{by}; its number for AutoAttack is "
            f"{entry.auto_attack:.2f} %."
        )
    return sentences


def _parse_radius(text: str) -> Fraction:
    """A radius as an exact fraction. Raises DmatError unless it is above 0."""
    try:
        radius = Fraction(text)
    except (ValueError, ZeroDivisionError, TypeError):
        radius = Fraction(0)
    if radius <= 0:
        raise DmatError(f"epsilon is {text!r}; expected a number above 0 as text; write it as 8/255 or 0.5")
    return radius


@functools.cache
def _tables() -> dict[tuple[str, str], tuple[Entry, ...]]:
    """The entries of leaderboard.json by (data set, norm), the best ranked first."""
    content = files.read_json(_TABLE)
    common = {key: content[key] for key in ("snapshot", "source", "images")}
    entries_of_table = {}
    for table in content["tables"]:
        shared = common | {key: table[key] for key in ("data", "norm", "epsilon")}
        rows = (Entry(**{**shared, **row, "authors": _authors(row)}) for row in table["entries"])
        entries_of_table[table["data"], table["norm"]] = tuple(sorted(rows, key=lambda entry: -entry.ranked))
    return entries_of_table


def _authors(row: Mapping[str, Any]) -> Authors | None:
    return Authors(**row["authors"]) if row["authors"] else None
