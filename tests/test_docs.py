"""docs/parameters.md and docs/commands.md against the code: complete, with the current values."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from cli import reference
from dmat import config
from dmat.config import Record, WrittenNumber
from dmat.pipeline import STAGES

ROOT = Path(__file__).parent.parent
PARAMETERS = (ROOT / "docs" / "parameters.md").read_text()
PARAMS = yaml.safe_load((ROOT / "params.yaml").read_text())
LEFT_OUT = "–"  # a key that params.yaml leaves out
RECORDS = {
    **config.SECTIONS,
    **{name: kind.record for name, kind in config.LISTS.items() if kind.parent or not kind.section},
}

Key = tuple[str, str]  # section, dotted path inside it


def fields(record: type[Record], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted path and pydantic field of every key that holds a value, those of nested records too."""
    for name, field in record.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, Record):
            yield from fields(inner, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field


def in_code() -> dict[Key, Any]:
    """Every key of the records; for entries of a list only keys that its section lacks."""
    all_fields = {(parent, path): field for parent, record in RECORDS.items() for path, field in fields(record)}
    sections = {name: kind.section for name, kind in config.LISTS.items()}
    return {
        (parent, path): field
        for (parent, path), field in all_fields.items()
        if (sections.get(parent), path) not in all_fields
    }


def tables(text: str) -> Iterator[tuple[str, list[str], list[list[str]]]]:
    """Heading above, header cells and rows of every Markdown table; backticks kept."""
    heading, lines = "", list[list[str]]()
    for line in [*text.splitlines(), ""]:
        if line.startswith("|"):
            lines.append([cell.strip() for cell in line.strip("|").split("|")])
            continue
        if lines:
            yield heading, lines[0], lines[2:]
            lines = []
        if line.startswith("#"):
            heading = line


def documented() -> dict[Key, tuple[str, str | None]]:
    """Default and shipped cell, without backticks, of every row of a parameter table. A table names its sections in
    its header, or in its heading where the file has no value to show."""
    cells: dict[Key, tuple[str, str | None]] = {}
    for heading, header, rows in tables(PARAMETERS):
        if header[0] != "key":
            continue
        columns = {name.strip("`"): k for k, name in enumerate(header) if name.strip("`") in RECORDS}
        for row in rows:
            assert len(row) == len(header), f"{heading}: {row}"
            path, default = row[0].strip("`"), row[header.index("default")].strip("`")
            assert row[0] == f"`{path}`", f"{heading}: the key {row[0]} is not in backticks"
            for section, k in columns.items():
                if row[k]:
                    assert (section, path) not in cells, f"{section}.{path} is documented twice"
                    cells[section, path] = (default, row[k].strip("`"))
            for section in [] if columns else re.findall("`(.+?)`", heading):
                cells[section, path] = (default, None)
    return cells


def same(cell: str, value: Any) -> bool:
    """Whether a cell is the YAML form of the value."""
    if isinstance(value, (WrittenNumber, str)):
        return cell == (value.text if isinstance(value, WrittenNumber) else value)
    return yaml.safe_load(cell) == (list(value) if isinstance(value, tuple) else value)


def test_every_parameter_is_documented() -> None:
    expected, actual = in_code(), documented()
    assert len(expected) >= 103
    missing = [".".join(key) for key in expected if key not in actual]
    unknown = [".".join(key) for key in actual if key not in expected]
    assert not missing, f"docs/parameters.md has no row for {', '.join(missing)}; add one to the table of the section"
    assert not unknown, f"docs/parameters.md describes {', '.join(unknown)}; no such key exists"
    for name in (*RECORDS, *config.LISTS, "seeds"):
        assert f"`{name}`" in PARAMETERS, name


def _default(field: Any) -> Any:
    return field.get_default(call_default_factory=True)


def test_documented_defaults_are_those_of_the_records() -> None:
    expected, actual = in_code(), documented()
    wrong = [
        f"{'.'.join(key)}: {actual[key][0]}, in the code {'required' if field.is_required() else repr(_default(field))}"
        for key, field in expected.items()
        if not (actual[key][0] == "required" if field.is_required() else same(actual[key][0], _default(field)))
    ]
    assert len(expected) >= 103
    assert not wrong, "defaults in docs/parameters.md: " + "; ".join(wrong)


def test_documented_values_are_those_of_params_yaml() -> None:
    wrong, compared = [], 0
    for (section, path), (_, cell) in documented().items():
        if cell is None:
            continue
        value: Any = [*PARAMS[section].values()][-1] if section in config.LISTS else PARAMS[section]
        for part in path.split("."):
            value = value.get(part, LEFT_OUT)
        compared += 1
        if not same(cell, value):
            wrong.append(f"{section}.{path}: {cell}, in the file {value}")
    assert compared >= 100
    assert not wrong, "values of params.yaml in docs/parameters.md: " + "; ".join(wrong)
    assert f"`{PARAMS['seeds']}` in `params.yaml`" in PARAMETERS


def test_every_value_has_a_source() -> None:
    sources = [
        row[header.index("source")] for _, header, rows in tables(PARAMETERS) if "source" in header for row in rows
    ]
    assert len(sources) >= 78
    assert {source.partition(" (")[0] for source in sources} <= {"paper", "measured", "assumed", "choice"}


def test_examples_are_valid_additions_to_params_yaml(tmp_path: Path) -> None:
    examples = [yaml.safe_load(text) for text in re.findall(r"```yaml\n(.+?)```", PARAMETERS, re.DOTALL)]
    assert len(examples) == 9
    together = PARAMS
    for example in examples:
        together = config.merge(together, example)
        for content in (config.merge(PARAMS, example), together):
            path = tmp_path / "params.yaml"
            path.write_text(yaml.safe_dump(content))
            params = config.load(path)
            for name, entries in example.items():
                if name == "tune":
                    assert set(entries["space"]) <= set(params.tune.space)
                else:
                    assert set(entries) <= set(getattr(params, name))


def test_table_of_reruns_is_that_of_dvc_yaml() -> None:
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    assert sorted(stages) == sorted(STAGES)
    watched: dict[str, set[str]] = {key: set() for key in PARAMS}
    for stage_name, stage in stages.items():
        for parameter in filter(lambda entry: isinstance(entry, str), stage.get("do", stage)["params"]):
            watched[parameter.partition(".")[0]].add(stage_name)
    (rows,) = [rows for heading, _, rows in tables(PARAMETERS) if heading == "## What a change reruns"]
    assert {row[0].strip("`"): set(re.findall("`(.+?)`", row[1])) for row in rows} == watched


@pytest.mark.parametrize(
    ("line", "command"), [pytest.param(line, command, id=line) for line, command in reference.commands()]
)
def test_every_command_is_documented(line: str, command: Any) -> None:
    assert f"Example: {line}" in command.help, f"the help of `{line}` ends with a line `Example: {line} ...`"
    assert f"## `{line}`\n" in (ROOT / "docs" / "commands.md").read_text()


def test_command_reference_is_fresh() -> None:
    command_lines = [command_line for command_line, _ in reference.commands()]
    assert {f"dmat {stage.command}" for stage in STAGES.values()} <= set(command_lines)
    assert len(command_lines) >= 17
    stale = "docs/commands.md is stale; run: python -m cli.reference > docs/commands.md"
    assert (ROOT / "docs" / "commands.md").read_text() == reference.markdown(), stale
