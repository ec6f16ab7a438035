"""The field's words: names and phrases that must not come back, one class name for one thing, shapes of tensors."""

import ast
import collections
import io
import re
import tokenize
from pathlib import Path

import pytest

# They say nothing about the thing that they name, or are words of this project for what the field has a word for.
NO_NAMES = {
    *("found", "wanted", "said", "told", "known", "given", "one", "mine", "theirs", "kin", "deaths", "word", "turn"),
    *("everything", "in_order", "to_unit", "outlook", "assist", "behind", "thorough", "leads", "averaged", "natural"),
    *("facts", "courier", "bench"),
}
FIELDS_IN_JSON = {("dmat/evaluation/checks.py", "found"), ("dmat/upkeep/doctor.py", "found")}  # written with asdict
NO_CLASSES = {
    *("Ahead", "Courier", "Memory", "Recipe", "Facts", "Bench", "Wanted", "Fraction", "Settings", "Candidate"),
    *("Found", "Stored", "Unread"),
}
NO_CONSTANTS = {"MOST", "HALF", "BYTES", "MOST_DEATHS"}
NO_PHRASES = (
    r"\bmend(s|ed|ing)?\b",
    r"\bis no (whole|number)\b",
    r"\bare no (whole|numbers)\b",
    r"\bgoes on (where|from)\b",
    r"\bby hand\b",
    r"\b(images|steps|tokens) a second\b",
    r"\bone a class\b",
    r"\bmake the set again\b",
    r"\bno number\b",
    r"\bwithout a word\b",
    r"\baverage_(tau|warm_up|half_life)\b",
    r"\bwarm_up\b",
)
OLD_KEYS = {("dmat/config/renamed.py", "avera"), ("dmat/config/renamed.py", "warm_")}  # it has to say them
SILENT = 3  # functions with tensors that say no shapes, because they take tensors of any kind
# [B, C, H, W], int64 [5], "scalar", "any shape"; not a range of pixels as [0, 1].
SHAPE = re.compile(r"\[(?!-?\d+, -?\d+\])[^\]\n]*\b[A-Z][^\]\n]*\]|\w+\d \[\d+\]|\bscalar\b|any shape")
TENSORS = re.compile(r"\b(Tensor|ndarray)\b")
ANY_LINES, ANY_DICTIONARIES = 195, 66


def _sources(root: Path) -> dict[str, str]:
    sources = {
        path.relative_to(root).as_posix(): path.read_text()
        for folder in ("dmat", "cli")
        for path in sorted((root / folder).rglob("*.py"))
    }
    assert len(sources) > 100, "the guards would hold nothing"
    return sources


def _bound(tree: ast.AST):
    """Every name that a file gives to something: variables, parameters, functions, imports under another name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id, node.lineno
        elif isinstance(node, ast.arg):
            yield node.arg, node.lineno
        elif isinstance(node, ast.FunctionDef):
            yield node.name, node.lineno
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr, node.lineno
        elif isinstance(node, ast.ExceptHandler | ast.MatchAs | ast.MatchStar) and node.name:
            yield node.name, node.lineno
        elif isinstance(node, ast.alias) and node.asname:
            yield node.asname, node.lineno


def test_names_say_what_things_are(root):
    bad = [
        f"{path}:{line}: {name}"
        for path, text in _sources(root).items()
        for name, line in _bound(ast.parse(text))
        if name.lstrip("_") in NO_NAMES | NO_CONSTANTS and (path, name) not in FIELDS_IN_JSON
    ]
    assert not bad, f"{len(bad)} names that say nothing of the thing:\n" + "\n".join(bad)


def test_a_class_name_means_one_thing(root):
    places = collections.defaultdict(list)
    for path, text in _sources(root).items():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ClassDef):
                places[node.name.lstrip("_")].append(path)
    assert {name: paths for name, paths in places.items() if len(paths) > 1} == {}
    assert not NO_CLASSES & set(places)


def _prose(text: str) -> list[tuple[int, str]]:
    """Comments and strings of a file, by line; strings that stand beside each other, and their lines, in one piece."""
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    comments = [(t.start[0], t.string) for t in tokens if t.type == tokenize.COMMENT]
    nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Constant | ast.JoinedStr)]
    parts = {id(part) for node in nodes if isinstance(node, ast.JoinedStr) for part in node.values}
    strings = [(node.lineno, _written(node)) for node in nodes if id(node) not in parts]
    return [(line, " ".join(string.split())) for line, string in (*comments, *strings)]


def _written(node: ast.Constant | ast.JoinedStr) -> str:
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else "{}" for part in node.values)
    return node.value if isinstance(node.value, str) else ""


def _phrases(prose: str) -> list[str]:
    return [match[0] for match in re.finditer("|".join(NO_PHRASES), prose, re.IGNORECASE)]


def test_phrases_that_must_not_come_back(root):
    bad = []
    for path, text in _sources(root).items():
        for line, prose in _prose(text):
            bad += [f"{path}:{line}: {phrase}" for phrase in _phrases(prose) if (path, phrase[:5]) not in OLD_KEYS]
    pages = [root / "README.md", *(p for p in (root / "docs").glob("*.md") if p.name != "log.md")]
    files = [root / "params.yaml", *(root / "dmat/recipes").glob("*.yaml"), *(root / "dmat/report").glob("page*")]
    for path in (*pages, *files, *(p for p in (root / "dmat/project").rglob("*") if p.suffix in (".md", ".yaml"))):
        bad += [f"{path.relative_to(root)}: {phrase}" for phrase in _phrases(" ".join(path.read_text().split()))]
    assert not bad, "\n".join(bad)


@pytest.mark.parametrize(
    "source",
    [
        '"""Goes on\n    from there."""', "raise E(f'{n} images '\n 'a second')", "x = 1  # BY HAND",
        "a = 'average_tau'",
    ],
)  # fmt: skip
def test_the_guard_sees_phrases_in_any_kind_of_text(source):
    assert [phrase for _, prose in _prose(source) for phrase in _phrases(prose)]


@pytest.mark.parametrize(
    "source", ["found = 1", "import x as found", "def f(one): 0", "for said in y: 0", "a.told = 1"]
)
def test_the_guard_sees_names_of_any_kind(source):
    assert NO_NAMES & {name for name, _ in _bound(ast.parse(source))}


def _says_shapes(function: ast.FunctionDef, lines: list[str]) -> bool:
    """A shape, as [B, C, H, W], in the docstring or beside the signature; a scalar or any shape said in words."""
    head = "\n".join(lines[function.lineno - 1 : function.body[0].lineno])
    text = _comments(head) + (ast.get_docstring(function) or "")
    return bool(SHAPE.search(text))


def _comments(text: str) -> str:
    return " ".join(re.findall(r"#(.*)", text))


def test_functions_with_tensors_say_their_shapes(root):
    silent = []
    for path, text in _sources(root).items():
        tree, lines = ast.parse(text), text.splitlines()
        of_class = {id(f): c for c in ast.walk(tree) if isinstance(c, ast.ClassDef) for f in c.body}
        for node in ast.walk(tree):
            if not isinstance(node, ast.FunctionDef) or "overload" in map(ast.unparse, node.decorator_list):
                continue
            arguments = (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs, node.args.vararg)
            annotations = [a.annotation for a in arguments if a is not None] + [node.returns]
            if not any(a is not None and TENSORS.search(ast.unparse(a)) for a in annotations):
                continue
            owner = of_class.get(id(node))
            if not _says_shapes(node, lines) and not (
                owner is not None and node.name in ("forward", "__init__", "__call__")
                and SHAPE.search(ast.get_docstring(owner) or "")
            ):
                silent.append(f"{path}:{node.lineno}: {node.name}")
    assert len(silent) <= SILENT, "\n".join(silent)


@pytest.mark.parametrize(("pattern", "limit"), [(r"\bAny\b", ANY_LINES), (r"dict\[str, Any\]", ANY_DICTIONARIES)])
def test_records_say_more_than_any(root, pattern, limit):
    lines = [line for text in _sources(root).values() for line in text.splitlines() if re.search(pattern, line)]
    assert len(lines) <= limit
