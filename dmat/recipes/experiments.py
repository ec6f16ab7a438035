"""Recipes with the source of each value, and their inheritance.

Such a file holds sections of params.yaml and these keys:

- `extends`: the recipe that it changes, which extends no other. Mappings are merged by key, and a null removes a key
  (JSON Merge Patch, RFC 7396). Without it the file is complete.
- `published`: accuracies in per cent (`clean`, `auto_attack`) that its authors report, and the `source` of them.
- `sources`: dotted key -> label of the value there and of all values below it, for every value that the file states. A
  longer key wins. A label begins with a word of `LABELS`; the numbers in brackets are those of docs/recipe.md.

A complete parameter file, which can hold no such keys, may have its `sources` in `NAME.sources.yaml`.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dmat import yaml_file
from dmat.config.merging import merge
from dmat.errors import DmatError, did_you_mean

LABELS = {
    "measured": "by an experiment of this project, in docs/log.md",
    "paper": "in a publication",
    "published code": "in the code or the instructions that the authors published",
    "assumed": "in no source that could be read; the closest published value, or a guess",
    "choice": "a decision that fits this platform or the size of the data; it claims nothing",
}
_LABEL = re.compile(rf"({'|'.join(LABELS)})( \[\d+\])*(, .+)?")
_FOLDER = Path(__file__).parent
_OWN_KEYS = ("extends", "published", "sources")

Location = tuple[str, ...]  # keys that lead to a value


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A recipe, read.

    base: name of the recipe that it extends; None if it is complete. is_flat: whether its file is a parameter file.
    published: see the module. values: the whole content of a parameter file. labels: where each value is from; empty
    for a flat file without sources.
    """

    name: str
    summary: str
    base: str | None
    is_flat: bool
    published: Mapping[str, Any]
    values: Mapping[str, Any]
    labels: Mapping[Location, str]


def summaries() -> dict[str, str]:
    """Name of each recipe -> its summary."""
    paths = sorted(path for path in _FOLDER.glob("*.yaml") if "." not in path.stem)
    heads = {path.stem: path.read_text(encoding="utf-8").partition("\n")[0] for path in paths}
    return {name: head.removeprefix(f"# {name}: ") for name, head in heads.items()}


def source_file(name: str) -> Path:
    """The file of a recipe. Raises DmatError for an unknown name."""
    if name not in (names := summaries()):
        raise DmatError(
            f"recipe is {name!r}; expected one of {', '.join(names)}{did_you_mean(name, names)}; "
            f"see `dmat recipes list`"
        )
    return _FOLDER / f"{name}.yaml"


def load(name: str) -> Experiment:
    """Reads a recipe. Raises DmatError for an unknown name, and where a value that its file states has no source."""
    stated = yaml_file.read(source_file(name)).value
    base_name, published, sources = (stated.pop(key, None) for key in _OWN_KEYS)
    base = load(base_name) if base_name else None
    if base is not None and base.base:
        raise DmatError(f"recipe {name} extends {base_name}, which extends {base.base}; expected one level")
    is_flat = base is None and sources is None
    if is_flat:
        beside = _FOLDER / f"{name}.sources.yaml"
        sources = yaml_file.read(beside).value if beside.exists() else {}
    labels = _labels(name, stated, sources) if sources else {}
    values = patched(base.values, stated) if base else stated
    inherited = base.labels if base else {}
    return Experiment(
        name,
        summaries()[name],
        base_name,
        is_flat,
        published or {},
        values,
        {location: labels.get(location) or inherited.get(location, "") for location, _ in leaves(values)},
    )


def patched(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with `changes` merged in by RFC 7396: mappings by key, null removes a key, all else replaces.

    base: without nulls.
    """
    return _without_nulls(merge(base, changes))


def _without_nulls(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _without_nulls(value) if isinstance(value, Mapping) else value
        for key, value in values.items()
        if value is not None
    }


def leaves(values: Mapping[str, Any], location: Location = ()) -> Iterator[tuple[Location, Any]]:
    """Every value that is not a mapping with entries, and the keys that lead to it. A list is one value."""
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from leaves(value, (*location, key))
        else:
            yield (*location, key), value


def differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Dotted key -> its values in two parameter files, where they differ; None where a file lacks the key."""
    left, right = dict(leaves(first)), dict(leaves(second))
    return {
        ".".join(location): (left.get(location), right.get(location))
        for location in dict.fromkeys((*left, *right))
        if left.get(location) != right.get(location)
    }


def _labels(name: str, stated: Mapping[str, Any], sources: Mapping[str, str]) -> dict[Location, str]:
    """The label of every value that a file states and does not remove."""
    labels: dict[Location, str] = {}
    used = set[str]()
    for location, value in leaves(stated):
        keys = [".".join(location[:length]) for length in range(len(location), 0, -1)]
        key = next((key for key in keys if key in sources), None)
        if key is not None:
            used.add(key)
            labels[location] = sources[key]
        elif value is not None:
            raise DmatError(f"recipe {name} does not say where {keys[0]} is from; expected it in its sources; add it")
    if unused := [key for key in sources if key not in used]:
        raise DmatError(f"recipe {name} has a source of {unused[0]}, which it does not state; remove it")
    if wrong := [label for label in sources.values() if not _LABEL.fullmatch(str(label))]:
        raise DmatError(
            f"recipe {name} has the source {wrong[0]!r}; expected one of {', '.join(LABELS)}, then numbers of "
            f"docs/recipe.md in brackets"
        )
    return labels
