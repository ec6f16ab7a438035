"""Overrides of a section."""

from collections.abc import Mapping
from typing import Any


def merge(base: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """base with overrides, mappings merged by key."""
    merged = dict(base)
    for key, value in overrides.items():
        nested = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = merge(merged[key], value) if nested else value
    return merged


def reaches(value: Any, location: tuple[Any, ...]) -> bool:
    """Whether `value` itself holds the key at `location`; a location without keys is nobody's own."""
    for key in location:
        if not isinstance(value, Mapping) or key not in value:
            return False
        value = value[key]
    return bool(location)
