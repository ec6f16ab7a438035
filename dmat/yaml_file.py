"""YAML files that people write, read by DVC's own parser, so that they mean here what they mean to DVC: YAML 1.2.

What DVC would drop, such as a key that is a number, is refused. Errors name the line.
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

_TAG = "tag:yaml.org,2002:"
_TEXT, _MERGE = f"{_TAG}str", f"{_TAG}merge"
_PLAIN = {_TEXT, *(f"{_TAG}{kind}" for kind in ("int", "float", "bool", "null", "map", "seq"))}
_READ_AS = {"int": "a number", "float": "a number", "bool": "true or false", "null": "nothing", "timestamp": "a date"}
_MAX_DIGITS = 300  # of a whole number: no float holds more
_MAX_ENTRIES = 1_000_000  # aliases counted as often as they are used: they double a file with every line
_ADVICE = {  # part of what the parser says -> what the person meant
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
    """value: mappings, lists, text, numbers, true, false and None. root: knows the lines; None for an empty file."""

    value: Any
    root: Node | None

    def line_of(self, sentence: str) -> int | None:
        """Line, from 1, of the entry whose dotted name a sentence begins with, such as "tune.space.network.width is 0".
        Of a name that leads further than the file does: that of the deepest entry on the way; else None."""
        node, line, rest = self.root, None, sentence
        while node is not None and rest:
            node, line, rest = _step(node, line, rest)
        return line


def read(path: Path) -> Document:
    """Raises FileNotFoundError, and DmatError with the line, without the path."""
    content = path.read_bytes()
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DmatError(f"line {line}: not UTF-8 text; expected UTF-8; save the file in that encoding") from None
    return parse(text.replace("\r\n", "\n").replace("\r", "\n"))


def parse(text: str) -> Document:
    """Raises DmatError with the line."""
    yaml = YAML(typ="safe", pure=True)
    yaml.Constructor = _Constructor
    root: Node | None = None
    try:
        with warnings.catch_warnings(action="ignore"):  # of style: an anchor used again, YAML 1.1 numbers without a dot
            root = yaml.compose(text)
            if root is None:
                return Document(None, None)
            _expect_plain(root, {})
            return Document(yaml.constructor.construct_document(root), root)
    except MarkedYAMLError as error:
        raise DmatError(_marked(error)) from None
    except ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise DmatError(f"line {line}: not valid YAML: {error.reason}; remove the character") from None
    except (YAMLError, AssertionError) as error:  # the latter of a version that does not exist
        raise DmatError(f"not valid YAML: {first_line(error)}") from None
    except RecursionError:
        raise DmatError("not readable: nested too deeply; expected a few levels") from None


class _Constructor(SafeConstructor):
    """Says where a value stands that cannot be made, such as `!!int x`."""

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, IndexError, KeyError, TypeError) as error:
            raise ConstructorError(None, None, f"{node.value!r} cannot be read ({error})", node.start_mark) from None


def _expect_plain(node: Node, sizes: dict[Node, int]) -> int:
    """How many entries a node stands for, aliases counted in full. Raises ConstructorError.

    sizes: of nodes that were seen; 0 while their own entries are counted, which only a loop meets again.
    """
    if node in sizes:
        if sizes[node] == 0:
            raise _refusal(node, "holds itself through an alias; expected an end; write it out")
        return sizes[node]
    sizes[node] = 0
    entries: list[Node] = []
    if isinstance(node, MappingNode):
        first = dict[str, Node]()
        for key, value in node.value:
            if key.tag not in (_TEXT, _MERGE):
                raise _refusal(key, f"the key {_said(key)}, which DVC drops; expected a name; begin it with a letter")
            if key.value in first:
                lines = f"{first[key.value].start_mark.line + 1} and {key.start_mark.line + 1}"
                raise _refusal(key, f"{key.value} is given twice, in lines {lines}; keep one of them")
            first[key.value] = key
            entries.append(value)
    elif isinstance(node, SequenceNode):
        entries = node.value
    if str(node.tag) not in _PLAIN:
        raise _refusal(node, f"{_said(node)}; expected text, a number, true or false; put text in quotes")
    if node.tag == f"{_TAG}int" and len(node.value) > _MAX_DIGITS:
        raise _refusal(node, f"a number of {len(node.value)} digits; expected at most {_MAX_DIGITS}")
    size = 1 + sum(_expect_plain(entry, sizes) for entry in entries)
    if size > _MAX_ENTRIES:
        raise _refusal(node, f"aliases make more than {_MAX_ENTRIES:,} entries; expected fewer; write them out")
    sizes[node] = size
    return size


def _refusal(node: Node, sentence: str) -> ConstructorError:
    return ConstructorError(None, None, sentence, node.start_mark)


def _said(node: Node) -> str:
    """What is written, and what YAML takes it for."""
    kind = str(node.tag).removeprefix(_TAG)
    written = (node.value or "(empty)") if isinstance(node, ScalarNode) else "(mapping or list)"
    return f"{written} is read as {_READ_AS.get(kind, f'a value of type {kind}')}"


def _marked(error: MarkedYAMLError) -> str:
    """A problem with the line of the mistake, which for what was begun and never ended is the line of its beginning."""
    found, began = error.problem_mark, error.context_mark
    problem = str(error.problem or error.context)
    unended = began is not None and ("scanning" in str(error.context) or "flow" in str(error.context))
    mark = began if unended or found is None else found
    what = problem if isinstance(error, ConstructorError) else f"not valid YAML: {problem}"
    if unended and found is not None and found.line != began.line:
        what += f" {'in' if 'flow' in str(error.context) else 'until'} line {found.line + 1}"
    advice = next((advice for part, advice in _ADVICE.items() if part in problem), None)
    return f"line {mark.line + 1}: {what}" + (f"; {advice}" if advice else "")


def _step(node: Node, line: int | None, sentence: str) -> tuple[Node | None, int | None, str]:
    """One entry further along a dotted name: the entry, its line, the rest of the sentence. Keys may hold dots."""
    entries: list[tuple[str, Node, Node]] = []  # name, where it stands, what it holds
    if isinstance(node, MappingNode):
        entries = [(key.value, key, value) for key, value in node.value]
    elif isinstance(node, SequenceNode):
        entries = [(str(k), value, value) for k, value in enumerate(node.value)]
    fits = [entry for entry in entries if re.match(re.escape(entry[0]) + r"([.:, ]|$)", sentence)]
    if not fits:
        return None, line, ""
    name, place, value = max(fits, key=lambda entry: len(entry[0]))
    rest = sentence[len(name) :]
    return value, place.start_mark.line + 1, rest[1:] if rest.startswith(".") else ""
