"""Merges overrides into a section."""

from collections.abc import Mapping
from typing import Any


def merge(base: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with `overrides`; mappings are merged by key, at any depth."""
    merged = dict(base)
    for key, value in overrides.items():
        nested = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = merge(merged[key], value) if nested else value
    return merged


def contains(value: object, location: tuple[object, ...]) -> bool:
    """Whether nested mappings hold the key at `location`, a path of keys; False for an empty path."""
    for key in location:
        if not isinstance(value, Mapping) or key not in value:
            return False
        value = value[key]
    return bool(location)
