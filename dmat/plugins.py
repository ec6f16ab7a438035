"""Code of a project itself by import path: `my_nets:SmallNet` is `SmallNet` of `plugins/my_nets.py`.

Only params.yaml leads to code. `offer` notes what is named there, and `find` gives nothing else: a word of a sidecar,
such as that of a downloaded model, runs nothing.
"""

import ast
import contextlib
import hashlib
import importlib
import importlib.machinery
import importlib.util
import re
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from dmat.errors import DmatError, first_line

FOLDER = "plugins"
_WORD = re.compile(r"(?P<module>[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*):(?P<name>[A-Za-z_]\w*)", re.ASCII)
_offered: dict[str, Path] = {}  # import path -> the folder of plugins of the project that names it
_loaded: dict[str, tuple[Path, str]] = {}  # module of plugins in sys.modules -> its file, and SHA-256 of what ran
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
        try:
            path = file_of(word, folder)
            if path is None:
                raise ValueError(f"expected a module in {FOLDER}/, which has no {_module(word).replace('.', '/')}.py")
            names = _top_names(parse(path.read_bytes(), path).body)
        except OSError as error:
            raise ValueError(f"{FOLDER}/ has no such module ({error.strerror})") from None
        except DmatError as error:
            raise ValueError(str(error)) from None
        if (name := word.partition(":")[2]) not in names and not names & {"*", "__getattr__"}:
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
    """The file of the module of an import path, or of a dotted name. Raises OSError."""
    base = folder.joinpath(*_module(word).split("."))
    return next((path for path in (base / "__init__.py", base.with_name(f"{base.name}.py")) if path.is_file()), None)


def parse(content: bytes, path: Path) -> ast.Module:
    """The syntax tree of a module. Raises DmatError for what Python would not compile."""
    try:
        tree = ast.parse(content)
        compile(tree, str(path), "exec", dont_inherit=True)  # refuses more, such as a `return` outside a function
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise DmatError(f"{path} is not valid Python ({first_line(error)}); expected a complete file; fix it") from None
    return tree


def _module(word: str) -> str:
    return word.partition(":")[0]


def _load(word: str) -> Any:
    if word not in _offered:
        raise DmatError(
            f"{word!r} is code of a project; expected one that the params.yaml here names, as nothing else may run "
            f"code; go to the folder of that project"
        )
    folder, module, name = _offered[word], _module(word), word.partition(":")[2]
    _expect_free_names(folder)
    _drop_stale(folder)
    sys.meta_path[:] = [_Finder(folder), *(one for one in sys.meta_path if not isinstance(one, _Finder))]
    try:
        found = getattr(importlib.import_module(module), name)
    except DmatError:
        raise
    except (Exception, SystemExit) as error:
        own = [one for one in traceback.extract_tb(error.__traceback__) if Path(one.filename).is_relative_to(folder)]
        place = f"; {own[-1].filename}, line {own[-1].lineno}" if own else ""
        raise DmatError(
            f"{word} cannot be loaded ({type(error).__name__}: {first_line(error)}{place}); expected code that can be "
            f"imported; fix it"
        ) from error
    if not callable(found):
        raise DmatError(f"{word} is {type(found).__name__}; expected a function or a class; name another")
    return found


class _Finder:
    """Modules of one folder of plugins, before all others. No file of them has the name of another package."""

    def __init__(self, folder: Path):
        self.folder = folder

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        file = file_of(name, self.folder)
        if file is not None:
            inside = [str(file.parent)] if file.name == "__init__.py" else None
            return importlib.util.spec_from_file_location(
                name, file, loader=_Loader(name, str(file)), submodule_search_locations=inside
            )
        if (folder := self.folder.joinpath(*name.split("."))).is_dir():  # without __init__.py
            spec = importlib.machinery.ModuleSpec(name, None, is_package=True)
            spec.submodule_search_locations = [str(folder)]
            return spec
        return None


class _Loader(importlib.machinery.SourceFileLoader):
    """Runs what is in the file: bytecode that lies beside it may be of another content of the same size and time."""

    def get_code(self, fullname: str) -> Any:
        content = self.get_data(self.path)
        _loaded[fullname] = (Path(self.path), _sha256(content))
        return self.source_to_code(content, self.path)


def _drop_stale(folder: Path) -> None:
    """Loaded modules of another project, or that are not what lies in the folder now, are imported anew: all, as they
    import each other."""

    def stays(name: str, path: Path, digest: str) -> bool:
        return file_of(name, folder) == path and _sha256(path.read_bytes()) == digest

    if not all(stays(name, *one) for name, one in _loaded.items()):
        for name in _loaded:
            sys.modules.pop(name, None)
        _loaded.clear()


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _expect_free_names(folder: Path) -> None:
    """Raises DmatError for a module that would stand in the way of a package of the same name."""
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        name = path.stem if path.suffix == ".py" and path.is_file() else path.name if path.is_dir() else ""
        if not name.isidentifier() or name.startswith("__"):
            continue
        builtin = name in sys.builtin_module_names or name in sys.stdlib_module_names
        if builtin or importlib.machinery.PathFinder.find_spec(name) is not None:
            raise DmatError(f"{path} has the name of another package; expected one that is free; name it otherwise")


def _top_names(nodes: Sequence[ast.stmt]) -> set[str]:
    """What statements define or import, blocks at the top of a module included. "*": what cannot be told."""
    found = set[str]()
    for node in nodes:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            found |= {alias.asname or alias.name.partition(".")[0] for alias in node.names}
        elif not (isinstance(node, ast.AnnAssign) and node.value is None):
            names = (one for one in ast.walk(node) if isinstance(one, ast.Name) and isinstance(one.ctx, ast.Store))
            found |= {one.id for one in names}
            for block in ("body", "orelse", "finalbody", "handlers", "cases"):
                inside = getattr(node, block, [])
                for one in inside if isinstance(inside, list) else ():
                    found |= _top_names(one.body if block in ("handlers", "cases") else [one])
    return found
