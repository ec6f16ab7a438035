"""Writes the best trial of a study as an arm into params.yaml, and keeps comments and order of the file."""

import io
from pathlib import Path
from typing import Any

from optuna.trial import FrozenTrial
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap

from dmat import config, files
from dmat.config import Params
from dmat.errors import ConfigError, DmatError
from dmat.tuning.plan import Study


def apply(
    path: Path,
    plan: Study,
    params: Params,
    winner: FrozenTrial,
    name: str,
    seeds: list[int],
    project: Path | None = None,
) -> list[str]:
    """Writes arm `name` (and an image set and a selection of that name, if the winner changed them), and `seeds` unless
    empty. Returns the written keys. Raises ConfigError, and writes nothing, if the file would be invalid.

    The arm gets the values of the winner, but not the `overrides` of the study, which are for short runs. project: as
    in `config.load`.
    """
    document = YAML()  # keeps comments and order
    document.preserve_quotes, document.width = True, 120
    raw = document.load(path.read_text(encoding="utf-8"))
    config.expect_name("--name", name)
    study = f"study {plan.name}, trial {winner.number}"
    images = _image_entries(raw, params.arms[plan.settings.arm].images, winner, name)
    for section, keys in {"arms": [name], **{part: list(entries) for part, entries in images.items()}}.items():
        for key in keys:
            if key in raw[section] and not _was_applied(raw[section], key):
                raise DmatError(
                    f"{path} has {section}.{key}, which no study wrote; expected a free name; say --name ANOTHER"
                )
    arm = dict(raw["arms"][plan.settings.arm] or {})
    arm = config.merge(arm, config.nested_values(winner.params)[0])
    written = [f"arms.{name}"]
    if images:
        arm["images"] = name
        for section, entries in images.items():
            for key, entry in entries.items():
                raw[section][key] = CommentedMap(entry)
                raw[section].yaml_add_eol_comment(f"{_MARK} {study}", key)
                written.append(f"{section}.{key}")
    raw["arms"][name] = CommentedMap(arm)
    raw["arms"].yaml_add_eol_comment(f"{_MARK} {study}", name)
    if seeds:
        raw["seeds"] = seeds
        written.append("seeds")
    text = io.StringIO()
    document.dump(raw, text)
    trial = path.with_name(f".{path.name}.applied")
    files.write_text(trial, text.getvalue())
    try:
        config.load(trial, project)  # reports every problem before the file is replaced
        trial.replace(path)
    except ConfigError as error:
        raise ConfigError(f"{path} with what is to be written", error.problems) from None
    finally:
        trial.unlink(missing_ok=True)
    return written


_MARK = "written by `dmat tune apply`:"


def _was_applied(arms: Any, name: str) -> bool:
    comment = arms.ca.items.get(name)
    return comment is not None and any(_MARK in part.value for part in comment if hasattr(part, "value"))


def _image_entries(raw: Any, selection: str, winner: FrozenTrial, name: str) -> dict[str, dict[str, Any]]:
    """Entries of the lists of image sets and selections that the winner needs; none if it changes no images.
    selection: that of the arm."""
    _, of_set, of_selection = config.nested_values(winner.params)
    if not of_set and not of_selection:
        return {}
    entry = config.merge(raw["selections"][selection], of_selection)
    if not of_set:
        return {"selections": {name: entry}}
    image_set = config.merge(raw["image_sets"][entry["image_set"]], of_set)
    return {"image_sets": {name: image_set}, "selections": {name: entry | {"image_set": name}}}
