"""Turns errors of pydantic into sentences: what was found, what was expected, what to do."""

import math
from collections.abc import Iterable, Mapping

from pydantic_core import ErrorDetails

from dmat.config.fields import Record
from dmat.errors import did_you_mean

_YES_OR_NO = {"yes": "true", "on": "true", "y": "true", "no": "false", "off": "false", "n": "false"}  # YAML 1.1


def sentence(name: str, error_details: ErrorDetails, record: type[Record]) -> str:
    """A sentence for one pydantic error: what was found and what was expected.

    name: dotted name of the record. error_details: an element of `ValidationError.errors()`. record: the record class.
    """
    key_path = ".".join([name, *(str(part) for part in error_details["loc"])])
    if error_details["type"] == "extra_forbidden":
        owner = _nested_record(record, error_details["loc"][:-1])
        names = ", ".join(owner.model_fields)
        nearest = did_you_mean(error_details["loc"][-1], owner.model_fields)
        return f"{key_path} is not known; expected one of {names}{nearest}"
    if error_details["type"] == "missing":
        return f"{key_path} is missing; give it a value"
    message, value = error_details["msg"].removeprefix("Value error, "), error_details["input"]
    message = message if message.startswith("expected") else message[0].lower() + message[1:]
    message = message.replace("input should be", "expected").replace("tuple", "list")
    if error_details["type"] in ("model_type", "dict_type"):
        message = "expected a mapping of keys"
    if error_details["type"] == "too_short" and isinstance(value, Mapping):
        return f"{key_path} has {len(value)} entries; expected at least {error_details['ctx']['min_length']}"
    if isinstance(value, Mapping):  # a problem between keys; most begin with the one to change
        return f"{key_path}.{message}" if message.partition(" ")[0] in value else f"{key_path}: {message}"
    return f"{key_path} is {value!r}; {message}{_advice(error_details['type'], value)}"


def _nested_record(record: type[Record], path: tuple[int | str, ...]) -> type[Record]:
    """The class of the record at a path of keys below a record: `Network` at ("network",) of `TrainRobust`."""
    for key in path:
        field = record.model_fields.get(str(key))
        if field is None or not isinstance(field.annotation, type) or not issubclass(field.annotation, Record):
            return record
        record = field.annotation
    return record


def _advice(error_type: str, value: object) -> str:
    """What to write instead of a value of the wrong type; empty if it is not clear what was meant."""
    if error_type == "bool_type" and isinstance(value, str) and value.lower() in _YES_OR_NO:
        return f" (YAML 1.2 reads {value} as text; write {_YES_OR_NO[value.lower()]})"
    if error_type == "string_type" and isinstance(value, bool | int | float):
        return " (put it in quotes)"
    number = _finite_number(value)
    if error_type == "int_type" and number is not None and number == int(number):
        return f" (write {int(number)})"
    if error_type == "float_type" and number is not None:
        return f" (YAML reads {value} as text; write {number})"
    return ""


def _finite_number(value: object) -> float | None:
    """A number or text as a number; None for other values, and for numbers above 1e15 or not finite."""
    try:
        number = float(value) if isinstance(value, float | str) else math.nan
    except ValueError:
        return None
    return number if abs(number) <= 1e15 else None


def name_list(values: Iterable[str]) -> str:
    """Sorted names, separated by commas, for a message."""
    return ", ".join(sorted(values)) or "(none defined)"
