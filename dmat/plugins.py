"""Loads a project's own code by import path: `my_nets:SmallNet` is `SmallNet` of `plugins/my_nets.py`.

Only import paths in params.yaml load code. `offer` records them, and `find` loads no others: an import path in a
sidecar, such as that of a downloaded model, runs nothing.
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
from types import CodeType, ModuleType
from typing import Any, TypeVar

from dmat.errors import DmatError, first_line

FOLDER = "plugins"
_IMPORT_PATH = re.compile(r"(?P<module>[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*):(?P<name>[A-Za-z_]\w*)", re.ASCII)
_offered: dict[str, Path] = {}  # import path -> plugins folder of the project whose params.yaml names it
_loaded: dict[str, tuple[Path, str]] = {}  # module of a plugin in sys.modules -> its file, and SHA-256 of what ran
_reading: list[Path] = []  # stack: the last is the plugins folder of the project whose params.yaml is being read

Value = TypeVar("Value")


def is_path(value: str) -> bool:
    """Whether text has the form of an import path, `module:name`."""
    return _IMPORT_PATH.fullmatch(value) is not None


@contextlib.contextmanager
def of_project(root: Path) -> Iterator[None]:
    """Inside this context, import paths that are offered belong to the project in the folder `root`."""
    _reading.append((root / FOLDER).resolve())
    try:
        yield
    finally:
        _reading.pop()


def offer(import_path: str) -> None:
    """Lets `find` load an import path of params.yaml; runs no code.

    Raises ValueError if the module or the name in it does not exist, and for a path that is new and not read from the
    params.yaml of a project.
    """
    if _reading:
        folder = _reading[-1]
        try:
            path = file_of(import_path, folder)
            if path is None:
                raise ValueError(
                    f"expected a module in {FOLDER}/, which has no {_module_name(import_path).replace('.', '/')}.py"
                )
            names = _top_level_names(parse(path.read_bytes(), path).body)
        except OSError as error:
            raise ValueError(f"{FOLDER}/ has no such module ({error.strerror})") from None
        except DmatError as error:
            raise ValueError(str(error)) from None
        if (name := import_path.partition(":")[2]) not in names and not names & {"*", "__getattr__"}:
            raise ValueError(f"expected one of {', '.join(sorted(names)) or '(nothing)'} of {path}; it has no {name}")
        _offered[import_path] = folder
    elif import_path not in _offered:
        raise ValueError("import paths are read from the params.yaml of a project alone")


def find(table: Mapping[str, Value], name: str) -> Value:
    """The entry `name` of a table, or the code at the import path `name`, which params.yaml must name.

    Raises DmatError for other import paths, and for code that cannot be loaded.
    """
    return table[name] if name in table else _load(name)


def import_paths(value: object) -> set[str]:
    """The offered import paths in a JSON value, at any depth."""
    children = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    offered = {value} if isinstance(value, str) and value in _offered else set()
    return offered.union(*map(import_paths, children))


def folder_of(import_path: str) -> Path:
    """The plugins folder in which an offered import path is looked up."""
    return _offered[import_path]


def file_of(import_path: str, folder: Path) -> Path | None:
    """The file of the module of an import path or dotted name; None if there is none. Raises OSError."""
    base = folder.joinpath(*_module_name(import_path).split("."))
    return next((path for path in (base / "__init__.py", base.with_name(f"{base.name}.py")) if path.is_file()), None)


def parse(content: bytes, path: Path) -> ast.Module:
    """The syntax tree of a module. Raises DmatError if Python cannot compile it."""
    try:
        tree = ast.parse(content)
        compile(tree, str(path), "exec", dont_inherit=True)  # refuses more, such as a `return` outside a function
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise DmatError(f"{path} is not valid Python ({first_line(error)}); expected a complete file; fix it") from None
    return tree


def _module_name(import_path: str) -> str:
    return import_path.partition(":")[0]


def _load(import_path: str) -> Any:
    if import_path not in _offered:
        raise DmatError(
            f"{import_path!r} is code of a project; expected one that the params.yaml here names, as nothing else may "
            f"run code; go to the folder of that project"
        )
    folder, module, name = _offered[import_path], _module_name(import_path), import_path.partition(":")[2]
    _expect_unused_names(folder)
    _drop_stale(folder)
    sys.meta_path[:] = [_Finder(folder), *(finder for finder in sys.meta_path if not isinstance(finder, _Finder))]
    try:
        plugin = getattr(importlib.import_module(module), name)
    except DmatError:
        raise
    except (Exception, SystemExit) as error:
        frames = [
            frame for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename).is_relative_to(folder)
        ]
        location = f"; {frames[-1].filename}, line {frames[-1].lineno}" if frames else ""
        raise DmatError(
            f"{import_path} cannot be loaded ({type(error).__name__}: {first_line(error)}{location}); expected code "
            f"that can be imported; fix it"
        ) from error
    if not callable(plugin):
        raise DmatError(f"{import_path} is {type(plugin).__name__}; expected a function or a class; name another")
    return plugin


class _Finder:
    """Finds modules in one plugins folder, before all other finders. No file there has the name of another package."""

    def __init__(self, folder: Path):
        self.folder = folder

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        file = file_of(name, self.folder)
        if file is not None:
            locations = [str(file.parent)] if file.name == "__init__.py" else None
            return importlib.util.spec_from_file_location(
                name, file, loader=_Loader(name, str(file)), submodule_search_locations=locations
            )
        if (folder := self.folder.joinpath(*name.split("."))).is_dir():  # without __init__.py
            spec = importlib.machinery.ModuleSpec(name, None, is_package=True)
            spec.submodule_search_locations = [str(folder)]
            return spec
        return None


class _Loader(importlib.machinery.SourceFileLoader):
    """Compiles the file itself: cached bytecode may belong to other content of the same size and time."""

    def get_code(self, fullname: str) -> CodeType:
        content = self.get_data(self.path)
        _loaded[fullname] = (Path(self.path), _sha256(content))
        return self.source_to_code(content, self.path)


def _drop_stale(folder: Path) -> None:
    """Unloads all plugins if one belongs to another project or its file changed, so that they are imported anew.

    All of them, because they import each other.
    """

    def is_current(name: str, path: Path, digest: str) -> bool:
        return file_of(name, folder) == path and _sha256(path.read_bytes()) == digest

    if not all(is_current(name, *source) for name, source in _loaded.items()):
        for name in _loaded:
            sys.modules.pop(name, None)
        _loaded.clear()


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _expect_unused_names(folder: Path) -> None:
    """Raises DmatError for a module that would hide a package of the same name."""
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        name = path.stem if path.suffix == ".py" and path.is_file() else path.name if path.is_dir() else ""
        if not name.isidentifier() or name.startswith("__"):
            continue
        builtin = name in sys.builtin_module_names or name in sys.stdlib_module_names
        if builtin or importlib.machinery.PathFinder.find_spec(name) is not None:
            raise DmatError(f"{path} has the name of another package; expected one that is free; name it otherwise")


def _top_level_names(nodes: Sequence[ast.stmt]) -> set[str]:
    """Names that statements define or import, including those in blocks at the top level of a module.

    "*" stands for names that cannot be known, as after `from module import *`.
    """
    defined = set[str]()
    for node in nodes:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            defined.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            defined |= {alias.asname or alias.name.partition(".")[0] for alias in node.names}
        elif not (isinstance(node, ast.AnnAssign) and node.value is None):
            targets = (
                child for child in ast.walk(node) if isinstance(child, ast.Name) and isinstance(child.ctx, ast.Store)
            )
            defined |= {target.id for target in targets}
            for block in ("body", "orelse", "finalbody", "handlers", "cases"):
                children = getattr(node, block, [])
                for inner in children if isinstance(children, list) else ():
                    defined |= _top_level_names(inner.body if block in ("handlers", "cases") else [inner])
    return defined
