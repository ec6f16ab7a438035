"""Reads YAML files that people write, with DVC's own parser (YAML 1.2), so that dmat and DVC read the same values.

Content that DVC would drop, such as a key that is a number, is refused. Errors name the line.
"""

import dataclasses
import re
import warnings
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.constructor import ConstructorError, SafeConstructor
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode
from ruamel.yaml.reader import ReaderError

from dmat.errors import DmatError, first_line

_TAG_PREFIX = "tag:yaml.org,2002:"
_TEXT_TAG, _MERGE_TAG = f"{_TAG_PREFIX}str", f"{_TAG_PREFIX}merge"
_PLAIN_TAGS = {_TEXT_TAG, *(f"{_TAG_PREFIX}{kind}" for kind in ("int", "float", "bool", "null", "map", "seq"))}
_READ_AS = {"int": "a number", "float": "a number", "bool": "true or false", "null": "nothing", "timestamp": "a date"}
_MAX_DIGITS = 300  # of a whole number: no float holds more
_MAX_ENTRIES = 1_000_000  # aliases counted as often as they are used: they double a file with every line
_ADVICE = {  # part of a parser message -> how to fix the file
    "could not find expected ':'": "write `key: value`, with a space after the colon",
    "mapping values are not allowed": "put text with a colon in quotes, and indent the keys of a mapping alike",
    "character '\\t'": "indent with spaces, not with tabs",
    "unexpected end of stream": "close the quotes",
    "undefined alias": "put text that begins with * in quotes",
    "cannot start any token": "put text that begins so in quotes",
    "expected ',' or": "close the bracket, or put a comma between the entries",
    "expected <block end>": "indent the keys of a mapping alike",
    "another document": "keep one document in the file",
}


@dataclasses.dataclass(frozen=True)
class Document:
    """A parsed file.

    value: mappings, lists, text, numbers, true, false and None.
    root: the node tree with line numbers; None for an empty file.
    """

    value: Any
    root: Node | None

    def line_of(self, sentence: str) -> int | None:
        """Line, counted from 1, of the entry whose dotted name begins a sentence, such as
        "tune.space.network.width is 0".

        For a name that the file does not hold completely: the line of its deepest entry in the file; None without one.
        """
        node, line, rest = self.root, None, sentence
        while node is not None and rest:
            node, line, rest = _next_entry(node, line, rest)
        return line


def read(path: Path) -> Document:
    """Reads a file. Raises FileNotFoundError, and DmatError with the line but without the path."""
    if path.exists() and not path.is_file():  # opening a FIFO would wait for a writer
        raise DmatError("it is not a file; expected YAML; restore it")
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise DmatError(f"it cannot be read ({error.strerror}); expected YAML; make it readable") from None
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DmatError(f"line {line}: not UTF-8 text; expected UTF-8; save the file in that encoding") from None
    return parse(text.replace("\r\n", "\n").replace("\r", "\n"))


def parse(text: str) -> Document:
    """Parses text. Raises DmatError with the line."""
    yaml = YAML(typ="safe", pure=True)
    yaml.Constructor = _Constructor
    root: Node | None = None
    try:
        # Warnings are about style: an anchor used again, YAML 1.1 numbers without a dot.
        with warnings.catch_warnings(action="ignore"):
            root = yaml.compose(text)
            if root is None:
                return Document(None, None)
            _expect_plain(root, {})
            return Document(yaml.constructor.construct_document(root), root)
    except MarkedYAMLError as error:
        raise DmatError(_marked_sentence(error)) from None
    except ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise DmatError(f"line {line}: not valid YAML: {error.reason}; remove the character") from None
    except (YAMLError, AssertionError) as error:  # the latter for a YAML version that does not exist
        raise DmatError(f"not valid YAML: {first_line(error)}") from None
    except RecursionError:
        raise DmatError("not readable: nested too deeply; expected a few levels") from None


class _Constructor(SafeConstructor):
    """Names the line of a value that cannot be constructed, such as `!!int x`."""

    def construct_object(self, node: Node, deep: bool = False) -> object:
        try:
            return super().construct_object(node, deep)
        except (ValueError, IndexError, KeyError, TypeError) as error:
            raise ConstructorError(None, None, f"{node.value!r} cannot be read ({error})", node.start_mark) from None


def _expect_plain(node: Node, sizes: dict[Node, int]) -> int:
    """Number of entries that a node stands for, with aliases counted in full.

    sizes: number of entries of each visited node; 0 while the node is being counted, so that meeting a 0 again means a
    cycle of aliases.
    Raises ConstructorError for a cycle, a duplicate key, a key that is not text, another type and a file too large.
    """
    if node in sizes:
        if sizes[node] == 0:
            raise _refusal(node, "holds itself through an alias; expected an end; write it out")
        return sizes[node]
    sizes[node] = 0
    entries: list[Node] = []
    if isinstance(node, MappingNode):
        first_keys = dict[str, Node]()
        for key, value in node.value:
            if key.tag not in (_TEXT_TAG, _MERGE_TAG):
                raise _refusal(
                    key, f"the key {_reading(key)}, which DVC drops; expected a name; begin it with a letter"
                )
            if key.value in first_keys:
                lines = f"{first_keys[key.value].start_mark.line + 1} and {key.start_mark.line + 1}"
                raise _refusal(key, f"{key.value} is given twice, in lines {lines}; keep one of them")
            first_keys[key.value] = key
            entries.append(value)
    elif isinstance(node, SequenceNode):
        entries = node.value
    if str(node.tag) not in _PLAIN_TAGS:
        raise _refusal(node, f"{_reading(node)}; expected text, a number, true or false; put text in quotes")
    if node.tag == f"{_TAG_PREFIX}int" and len(node.value) > _MAX_DIGITS:
        raise _refusal(node, f"a number of {len(node.value)} digits; expected at most {_MAX_DIGITS}")
    size = 1 + sum(_expect_plain(entry, sizes) for entry in entries)
    if size > _MAX_ENTRIES:
        raise _refusal(node, f"aliases make more than {_MAX_ENTRIES:,} entries; expected fewer; write them out")
    sizes[node] = size
    return size


def _refusal(node: Node, sentence: str) -> ConstructorError:
    return ConstructorError(None, None, sentence, node.start_mark)


def _reading(node: Node) -> str:
    """A sentence with the text of a node and the type that YAML reads it as."""
    kind = str(node.tag).removeprefix(_TAG_PREFIX)
    written = (node.value or "(empty)") if isinstance(node, ScalarNode) else "(mapping or list)"
    return f"{written} is read as {_READ_AS.get(kind, f'a value of type {kind}')}"


def _marked_sentence(error: MarkedYAMLError) -> str:
    """A problem with its line. For quotes or brackets that are never closed this is the line where they open."""
    end_mark, start_mark = error.problem_mark, error.context_mark
    problem = str(error.problem or error.context)
    unclosed = start_mark is not None and ("scanning" in str(error.context) or "flow" in str(error.context))
    mark = start_mark if unclosed or end_mark is None else end_mark
    message = problem if isinstance(error, ConstructorError) else f"not valid YAML: {problem}"
    if unclosed and end_mark is not None and end_mark.line != start_mark.line:
        message += f" {'in' if 'flow' in str(error.context) else 'until'} line {end_mark.line + 1}"
    advice = next((advice for part, advice in _ADVICE.items() if part in problem), None)
    return f"line {mark.line + 1}: {message}" + (f"; {advice}" if advice else "")


def _next_entry(node: Node, line: int | None, sentence: str) -> tuple[Node | None, int | None, str]:
    """Follows one part of a dotted name: returns the entry, its line and the rest of the sentence. Keys may hold
    dots."""
    entries: list[tuple[str, Node, Node]] = []  # name, node of the key, node of the value
    if isinstance(node, MappingNode):
        entries = [(key.value, key, value) for key, value in node.value]
    elif isinstance(node, SequenceNode):
        entries = [(str(k), value, value) for k, value in enumerate(node.value)]
    matches = [entry for entry in entries if re.match(re.escape(entry[0]) + r"([.:, ]|$)", sentence)]
    if not matches:
        return None, line, ""
    name, key_node, value = max(matches, key=lambda entry: len(entry[0]))
    rest = sentence[len(name) :]
    return value, key_node.start_mark.line + 1, rest[1:] if rest.startswith(".") else ""
