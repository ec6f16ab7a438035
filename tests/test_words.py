"""The field's words: names and phrases that must not come back, one class name for one thing, shapes of tensors."""

import ast
import collections
import io
import re
import tokenize
from pathlib import Path

import pytest

# Left out of a name's story: who reads the code should not have to learn words that say nothing of the thing.
NO_NAMES = {
    *("found", "wanted", "said", "told", "known", "given", "one", "mine", "theirs", "kin", "deaths", "word", "turn"),
    *("everything", "in_order", "to_unit", "outlook", "assist", "behind", "thorough", "leads", "averaged", "natural"),
    *("facts", "courier", "bench"),
}
FIELDS_IN_JSON = {("dmat/evaluation/checks.py", "found"), ("dmat/upkeep/doctor.py", "found")}  # written with asdict
NO_CLASSES = {
    *("Ahead", "Courier", "Memory", "Recipe", "Facts", "Bench", "Wanted", "Fraction", "Settings", "Candidate"),
    *("Outcome", "Found", "Stored", "Unread"),
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
OLD_KEYS = "dmat/config/renamed.py"  # has to say them
SHAPES = 0.8  # share of the functions with tensors that say which shapes these have
TENSORS = re.compile(r"\b(Tensor|ndarray)\b")
ANY_LINES, ANY_DICTIONARIES = 200, 80


def _sources(root: Path) -> dict[str, str]:
    return {
        path.relative_to(root).as_posix(): path.read_text()
        for folder in ("dmat", "cli")
        for path in sorted((root / folder).rglob("*.py"))
    }


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
        elif isinstance(node, ast.ExceptHandler | ast.MatchAs) and node.name:
            yield node.name, node.lineno


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
    """Comments and strings of a file, by line."""
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return [(t.start[0], t.string) for t in tokens if t.type in (tokenize.COMMENT, tokenize.STRING)]


def test_phrases_that_must_not_come_back(root):
    pattern, bad = re.compile("|".join(NO_PHRASES)), []
    for path, text in _sources(root).items():
        if path != OLD_KEYS:
            bad += [f"{path}:{line}: {m[0]}" for line, prose in _prose(text) for m in pattern.finditer(prose)]
    pages = [root / "README.md", *(p for p in (root / "docs").glob("*.md") if p.name != "log.md")]
    for page in pages:
        for number, line in enumerate(page.read_text().splitlines(), 1):
            bad += [f"{page.relative_to(root)}:{number}: {m[0]}" for m in pattern.finditer(line)]
    for path in [root / "params.yaml", *(root / "dmat/recipes").glob("*.yaml")]:
        bad += [f"{path.relative_to(root)}: {m[0]}" for m in pattern.finditer(path.read_text())]
    assert not bad, "\n".join(bad)


def _says_shapes(function: ast.FunctionDef, lines: list[str]) -> bool:
    """A shape, as [B, C, H, W], in the docstring or beside the signature; a scalar or any shape said in words."""
    head = "\n".join(lines[function.lineno - 1 : function.body[0].lineno])
    text = _comments(head) + (ast.get_docstring(function) or "")
    return bool(re.search(r"\[[^\]\n]*\b[A-Z0-9][^\]\n]*\]|\bscalar\b|any shape", text))


def _comments(text: str) -> str:
    return " ".join(re.findall(r"#(.*)", text))


def test_functions_with_tensors_say_their_shapes(root):
    silent, total = [], 0
    for path, text in _sources(root).items():
        tree, lines = ast.parse(text), text.splitlines()
        of_class = {id(f): c for c in ast.walk(tree) if isinstance(c, ast.ClassDef) for f in c.body}
        for node in ast.walk(tree):
            if not isinstance(node, ast.FunctionDef):
                continue
            annotations = [a.annotation for a in (*node.args.args, *node.args.kwonlyargs)] + [node.returns]
            if not any(a is not None and TENSORS.search(ast.unparse(a)) for a in annotations):
                continue
            total += 1
            owner = of_class.get(id(node))
            if not _says_shapes(node, lines) and not (
                owner is not None and node.name in ("forward", "__init__", "__call__")
                and re.search(r"\[[A-Z0-9]", ast.get_docstring(owner) or "")
            ):
                silent.append(f"{path}:{node.lineno}: {node.name}")
    assert len(silent) <= (1 - SHAPES) * total, f"{len(silent)} of {total} say no shapes:\n" + "\n".join(silent)


@pytest.mark.parametrize(("pattern", "limit"), [(r"\bAny\b", ANY_LINES), (r"dict\[str, Any\]", ANY_DICTIONARIES)])
def test_records_say_more_than_any(root, pattern, limit):
    lines = [line for text in _sources(root).values() for line in text.splitlines() if re.search(pattern, line)]
    assert len(lines) <= limit
