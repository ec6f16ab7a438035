"""Robust accuracies that others published, with date and source, and how a measurement of ours differs from them.

`leaderboard.json` is a snapshot that somebody wrote down, not a copy of all of RobustBench; nothing here asks a server.
Percentages are in %, as the leaderboard writes them.
"""

import dataclasses
import difflib
import functools
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from dmat import files
from dmat.errors import DmatError
from dmat.metrics.intervals import wilson

_TABLE = Path(__file__).with_name("leaderboard.json")
_OURS = ("norm", "epsilon", "images", "suite", "precision")


@dataclasses.dataclass(frozen=True)
class Authors:
    """What the authors report themselves. None: equal to the leaderboard's, or not known."""

    clean: float | None
    auto_attack: float | None
    epsilon: str
    source: str


@dataclasses.dataclass(frozen=True)
class Entry:
    """A row of the leaderboard at the date `snapshot`."""

    name: str
    id: str | None  # as load_model of robustbench 1.1.1 takes it; None where it was not looked up
    data: str
    norm: str  # linf or l2
    epsilon: str  # as the leaderboard writes it: "8/255", "0.5"
    architecture: str
    clean: float
    auto_attack: float  # standard suite
    external: float | None  # under a stronger attack, where the leaderboard knows a lower number
    external_attack: str | None  # None: there is none, or its name is not known
    extra_data: str
    images: int  # attacked, of the test set
    authors: Authors | None  # None: they report the same
    snapshot: str
    source: str

    @property
    def ranked(self) -> float:
        """The number that the leaderboard sorts by."""
        return self.auto_attack if self.external is None else self.external


def entries(data: str, norm: str) -> list[Entry]:
    """All entries of a data set and norm, the best ranked first."""
    tables = _tables()
    if (data, norm) not in tables:
        known = ", ".join(" ".join(key) for key in tables)
        raise DmatError(
            f"no published numbers for {data} {norm}; expected one of {known}; compare with a paper instead"
        )
    return list(tables[data, norm])


def entry(data: str, norm: str, name: str) -> Entry:
    """The entry with this name or this id of RobustBench."""
    named = {word: one for one in entries(data, norm) for word in (one.name, one.id) if word}
    if name not in named:
        lower = {word.lower(): word for word in named}
        near = difflib.get_close_matches(name.lower(), lower, n=3, cutoff=0.4) or list(lower)[:3]
        raise DmatError(
            f"no entry {name!r} for {data} {norm}; expected a name or an id of RobustBench; "
            f"say for example {', '.join(lower[word] for word in near)}"
        )
    return named[name]


def compared(entry: Entry, ours: Mapping[str, Any]) -> list[str]:
    """Sentences about what makes our accuracy another measurement than the entry's.

    ours: norm, epsilon (text), images (attacked), suite ("standard" or another word), precision ("fp32", "bf16").
    """
    missing = [key for key in _OURS if key not in ours]
    if missing:
        raise DmatError(f"a protocol without {', '.join(missing)}; expected {', '.join(_OURS)}; add what is missing")
    said = _about_threat(entry, ours["norm"], ours["epsilon"])
    said += _about_images(entry, ours["images"])
    said += _about_suite(entry, ours["suite"])
    said.append(
        "We attack in shards, each with a seed and batches of its own; RobustBench attacks all images in one run and "
        "sets no seed: random starts and the queries of Square differ."
    )
    if ours["precision"] != "fp32":
        said.append(
            f"We compute in {ours['precision']}, RobustBench in fp32: coarser gradients can make an attack weaker."
        )
    return said


def _about_threat(entry: Entry, norm: str, epsilon: str) -> list[str]:
    if norm != entry.norm:
        return [f"We attack in {norm}, the entry is for {entry.norm}: the two numbers do not compare."]
    ours, theirs = _radius(epsilon), _radius(entry.epsilon)
    if ours == theirs:
        return []
    size, effect = ("larger", "lower") if ours > theirs else ("smaller", "higher")
    said = [
        f"Our epsilon is {epsilon}, the leaderboard's {entry.epsilon}: ours is {size} by "
        f"{100 * float(abs(ours / theirs - 1)):.1f} %, which makes our accuracy {effect}."
    ]
    authors = entry.authors
    if authors and authors.auto_attack is not None and _radius(authors.epsilon) == ours:
        said.append(
            f"With epsilon {authors.epsilon} the authors report {authors.auto_attack:.2f} % ({authors.source}): "
            f"compare with that number instead of {entry.auto_attack:.2f} %."
        )
    return said


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
    said = []
    if suite != "standard":
        said.append(f"Our attack is {suite}, the leaderboard's standard AutoAttack: the two numbers do not compare.")
    if entry.external is not None:
        by = f" under {entry.external_attack}" if entry.external_attack else " under a stronger attack"
        said.append(
            f"The leaderboard ranks the entry by {entry.external:.2f} %{by}; its number for AutoAttack is "
            f"{entry.auto_attack:.2f} %."
        )
    return said


def _radius(text: str) -> Fraction:
    try:
        radius = Fraction(text)
    except (ValueError, ZeroDivisionError, TypeError):
        radius = Fraction(0)
    if radius <= 0:
        raise DmatError(f"epsilon is {text!r}; expected a number above 0 as text; write it as 8/255 or 0.5")
    return radius


@functools.cache
def _tables() -> dict[tuple[str, str], tuple[Entry, ...]]:
    """The file as records, by data set and norm."""
    content = files.read_json(_TABLE)
    common = {key: content[key] for key in ("snapshot", "source", "images")}
    found = {}
    for table in content["tables"]:
        shared = common | {key: table[key] for key in ("data", "norm", "epsilon")}
        rows = (Entry(**{**shared, **row, "authors": _authors(row)}) for row in table["entries"])
        found[table["data"], table["norm"]] = tuple(sorted(rows, key=lambda one: -one.ranked))
    return found


def _authors(row: Mapping[str, Any]) -> Authors | None:
    return Authors(**row["authors"]) if row["authors"] else None
