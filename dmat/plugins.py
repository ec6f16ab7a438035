"""Code of a project itself by import path: `my_nets:SmallNet` is `SmallNet` of `plugins/my_nets.py`.

Only params.yaml leads to code. `offer` notes what is named there, and `find` gives nothing else: a word of a sidecar,
such as that of a downloaded model, runs nothing.
"""

import ast
import contextlib
import importlib
import importlib.util
import re
import sys
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from dmat.errors import DmatError, first_line

FOLDER = "plugins"
_WORD = re.compile(r"(?P<module>[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*):(?P<name>[A-Za-z_]\w*)", re.ASCII)
_offered: dict[str, Path] = {}  # import path -> the folder of plugins of the project that names it
_searched: set[Path] = set()  # folders of plugins that were in sys.path
_reading: list[Path] = []  # the folder of the project whose params.yaml is read now

Found = TypeVar("Found")


def is_path(word: str) -> bool:
    return _WORD.fullmatch(word) is not None


@contextlib.contextmanager
def of_project(root: Path) -> Iterator[None]:
    """Inside, import paths that are offered are of the project in this folder."""
    _reading.append((root / FOLDER).resolve())
    try:
        yield
    finally:
        _reading.pop()


def offer(word: str) -> None:
    """Lets `find` load what an import path of params.yaml names; runs nothing. Raises ValueError where it is not."""
    if _reading:
        folder = _reading[-1]
        path = file_of(word, folder)
        if path is None:
            raise ValueError(f"expected a module in {FOLDER}/, which has no {_module(word).replace('.', '/')}.py")
        try:
            names = _top_names(ast.parse(path.read_bytes()))
        except (SyntaxError, ValueError) as error:
            raise ValueError(f"{path} is not valid Python ({error})") from None
        if (name := word.partition(":")[2]) not in names:
            raise ValueError(f"expected one of {', '.join(sorted(names)) or '(nothing)'} of {path}; it has no {name}")
        _offered[word] = folder
    elif word not in _offered:
        raise ValueError("import paths are read from the params.yaml of a project alone")


def find(table: Mapping[str, Found], word: str) -> Found:
    """What a word of a table stands for, or an import path that params.yaml names. Raises DmatError for others."""
    return table[word] if word in table else _load(word)


def words(value: Any) -> set[str]:
    """The offered import paths in a JSON value."""
    inside = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    own = {value} if isinstance(value, str) and value in _offered else set()
    return own.union(*map(words, inside))


def folder_of(word: str) -> Path:
    """Where an offered import path is looked for."""
    return _offered[word]


def file_of(word: str, folder: Path) -> Path | None:
    """The file of the module of an import path, or of a dotted name."""
    base = folder.joinpath(*_module(word).split("."))
    return next((path for path in (base.with_suffix(".py"), base / "__init__.py") if path.is_file()), None)


def _module(word: str) -> str:
    return word.partition(":")[0]


def _load(word: str) -> Any:
    if word not in _offered:
        raise DmatError(
            f"{word!r} is code of a project; expected one that params.yaml names, as nothing else may run code; run in "
            f"that project"
        )
    folder, module, name = _offered[word], _module(word), word.partition(":")[2]
    _forget_others(folder)
    _expect_free_names(folder)
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
        _searched.add(folder)
    try:
        return getattr(importlib.import_module(module), name)
    except DmatError:
        raise
    except Exception as error:
        inner = [frame for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename).parts[0] != "<"]
        place = f"{inner[-1].filename}, line {inner[-1].lineno}" if inner else module
        raise DmatError(
            f"{word} cannot be loaded ({type(error).__name__}: {first_line(error)}; {place}); expected code that can "
            f"be imported; mend it"
        ) from error


def _forget_others(folder: Path) -> None:
    """Modules of another project's plugins make room: one process may read several projects."""
    others = _searched - {folder}
    sys.path[:] = [one for one in sys.path if Path(one) not in others]
    for name, module in list(sys.modules.items()):
        path = getattr(module, "__file__", None)
        if path and any(Path(path).is_relative_to(one) for one in others):
            del sys.modules[name]
    importlib.invalidate_caches()


def _expect_free_names(folder: Path) -> None:
    """Raises DmatError for a file that would stand in the way of a package of the same name."""
    for path in sorted(folder.iterdir()):
        name = path.stem if path.suffix == ".py" else path.name if (path / "__init__.py").is_file() else ""
        spec = importlib.util.find_spec(name) if name else None
        if spec is not None and (spec.origin is None or not Path(spec.origin).is_relative_to(folder)):
            raise DmatError(f"{path} has the name of another package; expected one that is free; name it otherwise")


def _top_names(tree: ast.Module) -> set[str]:
    """What a module defines or imports at its top."""
    found = set[str]()
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Assign):
            found |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found.add(node.target.id)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            found |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
    return found
