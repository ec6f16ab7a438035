"""A recipe as a complete parameter file in which a comment says where each value is from."""

import io
from collections.abc import Mapping
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq

from dmat.recipes.experiments import LABELS, Experiment, Location, leaves

_NEVER_WRAPPED = 4096  # characters


def text(experiment: Experiment) -> str:
    """The file: a head of comments, then all sections."""
    yaml = YAML()
    yaml.width = _NEVER_WRAPPED
    stream = io.StringIO()
    yaml.dump(_node(experiment.values, experiment.labels, ()), stream)
    return f"{_head(experiment)}{stream.getvalue()}".replace("  # ", " # ")  # ruamel writes two spaces here and there


def _head(experiment: Experiment) -> str:
    lines = [f"{experiment.name}: {experiment.summary}", ""]
    if experiment.base:
        lines += [f"`dmat recipes diff {experiment.name}` shows what differs from {experiment.base}."]
    if published := published_sentence(experiment):
        lines += [published]
    lines += [
        "A comment says where the value is from, or all values below it. Numbers in brackets are sources of",
        "docs/recipe.md. docs/parameters.md explains every key.",
        *(f"  {label}: {meaning}" for label, meaning in LABELS.items()),
    ]
    return "".join(f"# {line}".rstrip() + "\n" for line in lines)


def published_sentence(experiment: Experiment) -> str:
    """What the authors report; empty if they report none."""
    headings = {"clean": "clean", "auto_attack": "AutoAttack"}
    numbers = [f"{headings[key]} {experiment.published[key]} %" for key in headings if key in experiment.published]
    return f"Published: {', '.join(numbers)} {experiment.published['source']}." if numbers else ""


def _node(value: Any, labels: Mapping[Location, str], location: Location, commented: bool = False) -> Any:
    """A value as ruamel writes it, with its comments.

    Values below a key that all have one label share the comment of that key. commented: whether a key above has the
    comment of this value.
    """
    if isinstance(value, (list, tuple)):
        sequence = CommentedSeq(value)
        sequence.fa.set_flow_style()
        return sequence
    if not isinstance(value, Mapping):
        return value
    mapping = CommentedMap()
    for key, entry in value.items():
        here = (*location, key)
        label = "" if commented else _common_label(entry, labels, here)
        mapping[key] = _node(entry, labels, here, commented or bool(label))
        if label:
            mapping.yaml_add_eol_comment(label, key)
        if not location:
            mapping.yaml_set_comment_before_after_key(key, before="\n")
    if commented and len(location) > 1:  # on one line, as no value in it needs a comment
        mapping.fa.set_flow_style()
    return mapping


def _common_label(entry: Any, labels: Mapping[Location, str], location: Location) -> str:
    """The label of all values of an entry; empty if they have several."""
    below = [(*location, *rest) for rest, _ in leaves(entry)] if isinstance(entry, Mapping) and entry else [location]
    different = {labels[leaf] for leaf in below}
    return different.pop() if len(different) == 1 else ""
