"""Found, expected, what to do: sentences from the errors of pydantic."""

import math
from collections.abc import Mapping
from typing import Any

from dmat.config.fields import Record

_YES_OR_NO = {"yes": "true", "on": "true", "y": "true", "no": "false", "off": "false", "n": "false"}  # YAML 1.1


def sentence(where: str, item: Any, record: type[Record]) -> str:
    """Found, expected, from a pydantic error."""
    path = ".".join([where, *(str(part) for part in item["loc"])])
    if item["type"] == "extra_forbidden":
        return f"{path} is not known; expected one of {', '.join(record.model_fields)}"
    if item["type"] == "missing":
        return f"{path} is missing; give it a value"
    message, found = item["msg"].removeprefix("Value error, "), item["input"]
    message = message if message.startswith("expected") else message[0].lower() + message[1:]
    message = message.replace("input should be", "expected")
    if item["type"] in ("model_type", "dict_type"):
        message = "expected a mapping of keys"
    if isinstance(found, Mapping):  # a problem between keys; most begin with the one to change
        return f"{path}.{message}" if message.partition(" ")[0] in found else f"{path}: {message}"
    return f"{path} is {found!r}; {message}{_advice(item['type'], found)}"


def _advice(problem: str, found: Any) -> str:
    """What to write instead of a value of the wrong type, where it is clear what was meant."""
    if problem == "bool_type" and isinstance(found, str) and found.lower() in _YES_OR_NO:
        return f" (YAML 1.2 reads {found} as text; write {_YES_OR_NO[found.lower()]})"
    if problem == "string_type" and isinstance(found, bool | int | float):
        return " (put it in quotes)"
    number = _number(found)
    if problem == "int_type" and number is not None and number == int(number):
        return f" (write {int(number)})"
    if problem == "float_type" and number is not None:
        return f" (YAML reads {found} as text; write {number})"
    return ""


def _number(value: Any) -> float | None:
    """A finite number of a usual size, from a number or text."""
    try:
        number = float(value) if isinstance(value, float | str) else math.nan
    except ValueError:
        return None
    return number if abs(number) <= 1e15 else None


def names(values: Any) -> str:
    return ", ".join(sorted(values)) or "(none defined)"
