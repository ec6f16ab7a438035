"""Types of settings that several stages share: frozen records, numbers with limits, names."""

import json
import re
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Annotated, Any, Self, TypeVar

import pydantic
from pydantic import AfterValidator, Field
from pydantic_core import CoreSchema, core_schema

from dmat import NONE, SOURCES, plugins

_NUMBER = r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?"
_MAX_NAME = 100  # bytes: file systems allow 255, of which seed, fingerprint and process take up to 60
_FRACTION = re.compile(rf"(?P<top>{_NUMBER})(/(?P<bottom>{_NUMBER}))?", re.ASCII)


class WrittenNumber(float):
    """A number that keeps the text it was written as, so that 8/255 stays 8/255 in every record and log."""

    text: str

    def __new__(cls, value: object) -> Self:
        """value: a number, or text such as "8/255". Raises ValueError for anything else."""
        text = str(value).strip()
        parts = None if isinstance(value, bool) else _FRACTION.fullmatch(text)
        if parts is None or (bottom := float(parts["bottom"] or 1)) <= 0:
            raise ValueError("expected a number or a fraction such as 8/255")
        number = float(parts["top"]) / bottom
        instance = super().__new__(cls, number)
        instance.text = text
        return instance

    def __reduce__(self) -> tuple[type[Self], tuple[str]]:
        return type(self), (self.text,)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: object, handler: object) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(
            cls, serialization=core_schema.plain_serializer_function_ser_schema(lambda value: value.text)
        )


def _radius(value: WrittenNumber) -> WrittenNumber:
    if not 0 < value < float("inf"):
        raise ValueError("expected a finite number above 0, for example 8/255")
    return value


def _step_size(value: WrittenNumber) -> WrittenNumber:
    return _radius(value) if value else NOT_GIVEN


def name_problem(value: str) -> str | None:
    """What was expected instead of this name of an entry; None if the name is valid."""
    if not value or not all(c.isalnum() or c in "_" for c in value):
        return "expected letters, digits and underscores only (it becomes a folder and a stage name)"
    if (size := len(value.encode())) > _MAX_NAME:
        return f"expected at most {_MAX_NAME} bytes, not {size} (it becomes part of the names of files)"
    return f"{NONE} says that there is none; expected another word" if value == NONE else None


def source_problem(path: str) -> str | None:
    """What was expected instead of this path of external data; None if it lies below sources/, which DVC watches."""
    pure = PurePosixPath(path)
    if path in ("", "."):
        return "expected the name of a file or folder in sources/"
    if pure.is_absolute() or ".." in pure.parts:
        return (
            f"expected a name below sources/, which DVC watches: `ln -s {path} sources/{pure.name}`, then write "
            f"{pure.name}"
        )
    if pure.parts[0] == SOURCES:
        return f"expected a name below sources/; write {PurePosixPath(*pure.parts[1:])}"
    return None


def _source(value: str) -> str:
    if value != NONE and (problem := source_problem(value)):
        raise ValueError(problem)
    return value


def _reference(value: str) -> str:
    if value != NONE and (problem := name_problem(value)):
        raise ValueError(problem)
    return value


def named_in(names: tuple[str, ...], plugins_allowed: bool = True) -> AfterValidator:
    """A validator: a value must be one of `names` or, if `plugins_allowed`, an import path of the project's code."""

    def check(value: str) -> str:
        if plugins_allowed and plugins.is_path(value):
            plugins.offer(value)
        elif value not in names:
            *first, last = map(repr, names)
            raise ValueError(f"expected {', '.join(first)} or {last}")
        return value

    return AfterValidator(check)


Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1, le=10**12)]
Natural = Annotated[int, Field(ge=0, le=10**12)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Positive = Annotated[float, Field(gt=0, le=1e30)]  # single precision ends at 3e38
NotNegative = Annotated[float, Field(ge=0, le=1e30)]
Momentum = Annotated[float, Field(ge=0, lt=1)]
Radius = Annotated[WrittenNumber, AfterValidator(_radius)]
NOT_GIVEN = WrittenNumber(0)  # a StepSize that is not given: `default_step` replaces it
StepSize = Annotated[WrittenNumber, AfterValidator(_step_size)]  # pixels in [0, 1]
Name = Annotated[str, AfterValidator(_reference)]  # of an entry of a list, or NONE
Source = Annotated[str, AfterValidator(_source)]  # a path below sources/, or NONE


class Record(pydantic.BaseModel):
    """Base class of all settings: frozen; unknown keys are refused; text is not converted to a number."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    def plain(self) -> dict[str, Any]:
        """The settings as JSON values, with fractions as written."""
        return self.model_dump(mode="json")

    def are_those_of(self, values: Mapping[str, Any]) -> bool:
        """Whether values as of `plain`, with the defaults of keys that they lack, are these settings."""
        try:
            return type(self).model_validate_json(json.dumps(values)) == self
        except pydantic.ValidationError:
            return False


AnyRecord = TypeVar("AnyRecord", bound=Record)
