"""The identity of a stage's code: 32 hex digits that change where the code may compute something else, and stay where
only comments, docstrings, formatting or the texts of errors changed.

It is a hash of the syntax trees of all modules that a stage computes with, of the defaults of its settings, and of what
else decides its result. Modules are read by path, never imported. `code.yaml` in a project names the code that the
results of each stage are of: `dmat lock` writes it, DVC reads it as parameters, and every stage command compares.
"""

import ast
import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import re
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import dmat
from dmat import files, plugins, yaml_file
from dmat.errors import DmatError
from dmat.pipeline.stages import STAGES

NAME = "code.yaml"
_SAME = "same"  # its key for code of another identity that was shown to compute the same
_HEAD = "# Written by `dmat lock` alone: the code that the results of each stage are of (docs/architecture.md).\n"
_ROOT = Path(dmat.__file__).parent.parent
_SHORT = 12  # digits of an identity that people see

# Modules, with all below them, that carry results and never decide them. What only they import decides nothing either.
CARRIERS = {
    "dmat.data.dvc_cache": "copies of shards, compared by their checksums",
    "dmat.data.shard_pool": "which shards are made and which are there, with the bytes that were made",
    "dmat.config": "reads params.yaml; of a stage's own record its defaults and functions count",
    "dmat.errors": "sentences and exit codes",
    "dmat.evaluation.work": "which process computes which shard",
    "dmat.files": "bytes on disk, as they were given",
    "dmat.job": "where a job reads and writes, and what it gives back",
    "dmat.metrics.pictures": "pictures, which no other stage reads",
    "dmat.plugins": "finds code of a project, which counts by itself",
    "dmat.tracking": "MLflow",
    "dmat.training.curves": "pictures, which no other stage reads",
    "dmat.training.interruption": "signals",
    "dmat.training.long_run": "checkpoints, metrics and the progress bar: a resumed run ends as an undisturbed one",
    "dmat.workspace": "where the files of a project are",
}
_CARRIERS_OF = {"train_diffusion": {"dmat.diffusion.samplers"}}  # for a picture of samples alone
_DECIDING = {"write_report": {"dmat.report.lineage", "dmat.metrics.pictures"}}  # the report shows them

_PACKAGES = ("pyautoattack",)  # whose version decides results
_WARNINGS = {"warnings.warn", "tqdm.write"}  # functions whose texts decide nothing
_NOT_WRITTEN = {"ctx", "kind", "type_comment", "type_params"}  # said by the rest, or not in every Python


# Syntax trees


def written(source: str) -> str:
    """The syntax tree of a source file as text, the same in Python 3.11, 3.12 and 3.13 (unlike `ast.dump`).

    Left out: docstrings and other statements that do nothing, blocks for type checkers, and the texts of errors,
    assertions and warnings. Raises SyntaxError.
    """
    return _written(ast.parse(source))


def _written(node: Any, texts: bool = True) -> str:
    """texts: False inside a warning, whose strings do not count."""
    if isinstance(node, list):
        return f"[{' '.join(_written(one, texts) for one in node)}]"
    if isinstance(node, ast.Constant):
        return _constant(node.value) if texts or not isinstance(node.value, str) else "text"
    if isinstance(node, ast.JoinedStr):
        return f"JoinedStr[{' '.join(_parts(node, texts))}]"
    if not isinstance(node, ast.AST):
        return "nothing" if node is None else _constant(node)
    fields = {name: value for name, value in ast.iter_fields(node) if name not in _NOT_WRITTEN}
    if isinstance(node, ast.Raise):
        fields = {"exc": node.exc.func if isinstance(node.exc, ast.Call) else node.exc}
    elif isinstance(node, ast.Assert):
        del fields["msg"]
    elif isinstance(node, ast.Call):
        texts = texts and _dotted(node.func) not in _WARNINGS
    inside = []
    for name in sorted(fields):  # an empty field is None in one version of Python and missing in another
        value = _doing(fields[name]) if isinstance(fields[name], list) else fields[name]
        if value is not None and value != []:
            inside.append(f"{name}={_written(value, texts)}")
    return f"{type(node).__name__}({' '.join(inside)})"


def _doing(nodes: list[Any]) -> list[Any]:
    """Without statements that do nothing. A block for type checkers gives way to its `else`."""
    found = []
    for node in nodes:
        if isinstance(node, ast.If) and _dotted(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            found += _doing(node.orelse)
        elif not (isinstance(node, ast.Pass) or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))):
            found.append(node)
    return found


def _dotted(node: ast.AST) -> str:
    """A name, or a name with one attribute; "" for anything else."""
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
        return f"{node.value.id}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def _parts(node: ast.JoinedStr, texts: bool) -> Iterator[str]:
    """Of an f-string: neighbouring texts as one, because versions of Python cut them at different places."""
    text = ""
    for part in [*node.values, None]:
        if isinstance(part, ast.Constant):
            text += str(part.value) if texts else ""
            continue
        if text:
            yield _constant(text)
        if part is not None:
            yield _written(part, texts)
        text = ""


def _constant(value: Any) -> str:
    """With its type, as 1, 1.0 and True are equal. The `repr` of text depends on the Unicode tables of a Python."""
    if isinstance(value, str):
        return f"str:{value.encode('utf-8', 'surrogatepass').hex()}"
    if isinstance(value, bytes):
        return f"bytes:{value.hex()}"
    return f"{type(value).__name__}:{f'{value:x}' if type(value) is int else repr(value)}"


# Modules


@dataclasses.dataclass(frozen=True)
class _SourceModule:
    """What counts of a source file. imports: dots before it, dotted name and name inside, of everything imported."""

    digest: str  # of `written`
    imports: frozenset[tuple[int, str, str]]
    texts: frozenset[str]


@functools.cache
def _parsed(content: bytes) -> _SourceModule:
    """Kept by content: a command looks at the same files again before it publishes."""
    tree = ast.parse(content)
    imports, texts = set[tuple[int, str, str]](), set[str]()
    for node in _nodes(tree):
        if isinstance(node, ast.ImportFrom):
            start = [node.module] if node.module else []
            imports |= {(node.level, ".".join([*start, one.name]), one.asname or one.name) for one in node.names}
        elif isinstance(node, ast.Import):
            imports |= {(0, one.name, one.asname or one.name) for one in node.names}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            texts.add(node.value)
    return _SourceModule(_digest(_written(tree)), frozenset(imports), frozenset(texts))


def _names(parsed: _SourceModule, module: str, package: bool) -> set[tuple[str, str]]:
    """The full name of everything that a module imports, and what it calls it."""
    inside = module.split(".") if package else module.split(".")[:-1]
    return {
        (".".join([*inside[: len(inside) + 1 - level], name]) if level else name, own)
        for level, name, own in parsed.imports
    }


def _nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those of statements that do nothing."""
    waiting = [tree]
    while waiting:
        node = waiting.pop()
        yield node
        for _, value in ast.iter_fields(node):
            inside = _doing(value) if isinstance(value, list) else [value]
            waiting += [one for one in inside if isinstance(one, ast.AST)]


class Sources:
    """Source files of dmat by the names of their modules. root: the folder that holds `dmat`."""

    def __init__(self, root: Path = _ROOT):
        self._root = root

    def content(self, module: str) -> bytes:
        """Raises DmatError for a file that cannot be read."""
        path = self._path(module)
        try:
            return path.read_bytes()
        except OSError as error:
            raise DmatError(
                f"{path} cannot be read ({error.strerror}); expected a source file; bring it back"
            ) from None

    def digest(self, module: str) -> str:
        return self._module(module).digest

    def closure(self, roots: Iterable[str], carriers: Iterable[str] = ()) -> set[str]:
        """These and all modules that they need, with their packages. Left out: carriers, and what only they need."""
        found, seen, waiting = set[str](), {"dmat"}, {*roots}
        while waiting:
            module = waiting.pop()
            if module not in seen:
                seen.add(module)
                waiting |= {self.module_in(module.rpartition(".")[0]) or "dmat"}  # its package is loaded before it
                if not is_below(module, carriers):
                    found.add(module)
                    waiting |= self.imported(module) | self.named(module)
        return found

    def imported(self, module: str) -> set[str]:
        """Modules of dmat in import statements, also in those inside functions."""
        return {found for name, _ in self.names(module) if (found := self.module_in(name))}

    def packages(self, module: str) -> set[str]:
        """The first names of everything that is imported."""
        return {name.partition(".")[0] for name, _ in self.names(module)}

    def names(self, module: str) -> set[tuple[str, str]]:
        """The full name of everything that is imported, and what the module calls it."""
        return _names(self._module(module), module, package=self._path(module).name == "__init__.py")

    def named(self, module: str) -> set[str]:
        """Modules of dmat that a text names, as tables of import strings and calls of importlib do. A text of which
        only the beginning is written stands for everything below that package."""
        found = set[str]()
        for text in self._module(module).texts:
            if re.fullmatch(r"dmat(\.\w+)+\.", text):
                found |= self._below(text.rstrip("."))
            elif re.fullmatch(r"dmat(\.\w+)+(:\w+)?", text) and (name := self.module_in(text.partition(":")[0])):
                found.add(name)
        return found

    def beside(self, module: str) -> set[Path]:
        """Files in its folder that a module names, such as templates."""
        names = {text for text in self._module(module).texts if re.fullmatch(r"\w[\w.-]*\.\w+", text)}
        paths = {self._path(module).parent / name for name in names}
        return {path for path in paths if path.suffix != ".py" and path.is_file()}

    def module_in(self, name: str) -> str | None:
        """The longest beginning of a dotted name that is a module of dmat."""
        parts = name.split(".")
        beginnings = [".".join(parts[:k]) for k in range(len(parts), 0, -1)] if parts[0] == "dmat" else []
        return next((one for one in beginnings if self._path(one).is_file()), None)

    def _module(self, module: str) -> _SourceModule:
        content = self.content(module)
        try:
            return _parsed(content)
        except (SyntaxError, ValueError) as error:
            path = self._path(module)
            raise DmatError(f"{path} is not valid Python ({error}); expected a whole file; fix it") from None

    def _path(self, module: str) -> Path:
        """Where a module's file would be."""
        base = self._root.joinpath(*module.split("."))
        return base / "__init__.py" if base.is_dir() else base.with_suffix(".py")

    def _below(self, package: str) -> set[str]:
        paths = self._root.joinpath(*package.split(".")).rglob("*.py")
        names = (".".join(path.relative_to(self._root).with_suffix("").parts) for path in paths)
        return {name.removesuffix(".__init__") for name in names}


def is_below(module: str, modules: Iterable[str]) -> bool:
    """Whether it is one of these or inside one of them."""
    return any(module == one or module.startswith(f"{one}.") for one in modules)


# Stages


def carriers_of(stage: str) -> set[str]:
    """The modules that carry a stage's results and never decide them."""
    return ({*CARRIERS} | _CARRIERS_OF.get(stage, set())) - _DECIDING.get(stage, set())


def closure_of(stage: str, sources: Sources | None = None) -> set[str]:
    """The modules that decide a stage's results. sources: those of the loaded dmat, if not given."""
    sources = sources or Sources()
    used = {module for record in _records(stage) for module in _used(record, sources)}
    return sources.closure({f"dmat.jobs.{stage}", *used}, carriers_of(stage))


def of_stage(stage: str, sources: Sources | None = None) -> str:
    """The identity of a stage's code as it lies on the disk now."""
    sources = sources or Sources()
    records, modules = _records(stage), closure_of(stage, sources)
    beside = {path for module in modules for path in sources.beside(module)}
    packages = {package for module in modules for package in sources.packages(module)}
    return _digest(
        {
            "modules": {module: sources.digest(module) for module in modules},
            "files": {path.name: files.sha256(path) for path in beside},
            "defaults": {record.__name__: _defaults(record) for record in records},
            "functions": {record.__name__: _functions(record, sources)[0] for record in records},
            "packages": {name: importlib.metadata.version(name) for name in _PACKAGES if name in packages},
        }
    )


@functools.cache
def _when_loaded(stage: str) -> str:
    """`of_stage` at the first call: a command plans right after it loaded its code."""
    return of_stage(stage)


def of_plugins(named: Iterable[str], *stages: str) -> dict[str, str]:
    """Import path -> identity of that code of a project: its module and what that imports of the same folder, files
    there that they name, and the modules of dmat that these use and the stages themselves do not."""
    named = sorted(named)
    if not named:
        return {}
    known = set.union(*map(closure_of, stages)), set.union(*map(carriers_of, stages))
    return {word: _of_plugin(word, *known) for word in named}


def _of_plugin(word: str, closure: set[str], carriers: set[str]) -> str:
    folder, sources = plugins.folder_of(word), Sources()
    modules, data, used, waiting = dict[str, str](), dict[str, str](), set[str](), {word.partition(":")[0]}
    while waiting:
        module = waiting.pop()
        path = plugins.file_of(module, folder)
        if path is None or module in modules:
            continue
        content = path.read_bytes()
        plugins.parse(content, path)
        parsed = _parsed(content)
        modules[module] = parsed.digest
        names = {name for name, _ in _names(parsed, module, package=path.name == "__init__.py")} | {module}
        texts = {text for text in parsed.texts if re.fullmatch(r"[\w./-]{1,200}", text)}
        used |= {one for name in (*names, *texts) if (one := sources.module_in(name))}
        waiting |= {name.rsplit(".", k)[0] for name in names for k in range(name.count(".") + 1)}
        waiting |= {text for text in texts if re.fullmatch(r"\w+(\.\w+)*", text)}
        paths = {(base / text).resolve() for base in (path.parent, folder) for text in texts}
        paths = {path for path in paths if path.is_relative_to(folder) and path.suffix != ".py" and path.is_file()}
        data |= {path.relative_to(folder).as_posix(): files.sha256(path) for path in paths}
    of_dmat = {module: sources.digest(module) for module in sources.closure(used, carriers) - closure}
    return _digest({"word": word, "own": modules, "files": data, "dmat": of_dmat})


def _digest(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _records(stage: str) -> list[Any]:
    """The class of a stage's settings and those inside it."""
    from dmat import config  # late: pydantic takes a third of the command line's start

    entries = {kind.section: kind.record for kind in config.LISTS.values()}
    waiting: list[Any] = [
        {**config.SECTIONS, **entries, "mix_images": config.MixImages, "write_report": config.Report}[stage]
    ]
    found: list[Any] = []
    while waiting:
        kind = waiting.pop(0)
        if not hasattr(kind, "model_fields"):
            waiting += typing.get_args(kind)
        elif kind not in found:
            found.append(kind)
            waiting += [field.annotation for field in kind.model_fields.values()]
    return found


def _defaults(record: Any) -> dict[str, list[Any]]:
    """Field -> its default in a list; an empty list where a value must be given."""
    return {
        name: [] if field.is_required() else [field.get_default(call_default_factory=True)]
        for name, field in record.model_fields.items()
    }


def _homes(record: Any) -> list[Any]:
    """A record's class and those of dmat that it inherits from."""
    return [kind for kind in record.__mro__ if kind.__module__.startswith("dmat.") and kind.__name__ != "Record"]


def _functions(record: Any, sources: Sources) -> tuple[str, frozenset[str]]:
    """What computes in a record, such as a default that follows other values, as text, and the names it uses."""
    found = [_methods(sources.content(kind.__module__), kind.__name__) for kind in _homes(record)]
    return " ".join(text for text, _ in found), frozenset(name for _, names in found for name in names)


@functools.cache
def _methods(content: bytes, name: str) -> tuple[str, frozenset[str]]:
    """The same of one class; without what checks values of a file."""
    functions = [
        function
        for definition in ast.parse(content).body
        if isinstance(definition, ast.ClassDef) and definition.name == name
        for function in definition.body
        if isinstance(function, ast.FunctionDef)
        and not any("validator" in ast.unparse(decorator) for decorator in function.decorator_list)
    ]
    nodes = [node for function in functions for node in ast.walk(function)]
    return _written(functions), frozenset(node.id for node in nodes if isinstance(node, ast.Name))


def _used(record: Any, sources: Sources) -> set[str]:
    """Modules of dmat that the functions of a record use."""
    _, used = _functions(record, sources)
    names = {full for kind in _homes(record) for full, own in sources.names(kind.__module__) if own in used}
    return {module for full in names if (module := sources.module_in(full))}


# code.yaml


@dataclasses.dataclass(frozen=True)
class CodeLock:
    """What code.yaml says. same: stage -> `code`, `why` and `compared` of each code that computes the same."""

    identities: Mapping[str, str]
    same: Mapping[str, Sequence[Mapping[str, str]]]

    def of(self, stage: str) -> str:
        """Raises DmatError for a stage that was added since."""
        if stage not in self.identities:
            raise DmatError(f"{NAME} has no {stage}; expected a line for each stage; run `dmat lock`")
        return self.identities[stage]

    def accepts(self, stage: str, identity: str) -> bool:
        """Whether results of this code are results of the stage."""
        return identity in {self.identities.get(stage), *(entry["code"] for entry in self.same.get(stage, ()))}


def read(root: Path) -> CodeLock:
    """Raises DmatError where there is no code.yaml, or another one than `dmat lock` writes."""
    path = root / NAME
    try:
        found = yaml_file.read(path).value
        same = found.pop(_SAME, {})
        entries = [entry for stage in same for entry in same[stage]]
        texts = [*found.values(), *(entry[key] for entry in entries for key in ("code", "why", "compared"))]
        if all(isinstance(text, str) for text in texts):
            return CodeLock(found, same)
        problem = "something there is not text"
    except FileNotFoundError:
        raise DmatError(
            f"{path} does not exist; expected the code that each stage's results are of; run `dmat lock`"
        ) from None
    except (DmatError, AttributeError, KeyError, TypeError) as error:
        problem = str(error)
    raise DmatError(
        f"{path}: {problem}; expected what `dmat lock` wrote; take it from git, or delete it and run `dmat lock`"
    )


def write(root: Path, locked: CodeLock) -> None:
    """In quotes, because YAML reads some identities as numbers."""
    lines = [f"{stage}: {_quoted(locked.identities[stage])}\n" for stage in STAGES]
    for stage in [stage for stage in STAGES if locked.same.get(stage)]:
        lines += [] if f"{_SAME}:\n" in lines else [f"{_SAME}:\n"]
        lines.append(f"  {stage}:\n")
        for entry in locked.same[stage]:
            values = [f"{key}: {_quoted(entry[key])}\n" for key in ("code", "why", "compared")]
            lines.append("    - " + "      ".join(values))
    files.write_text(root / NAME, _HEAD + "".join(lines))


def up_to_date(before: CodeLock) -> CodeLock:
    """What is to be written now. What was shown to compute the same stays as long as the code is that."""
    now = {stage: of_stage(stage) for stage in STAGES}
    kept = {stage for stage in STAGES if before.accepts(stage, now[stage])}
    identities = {stage: before.identities[stage] if stage in kept else now[stage] for stage in STAGES}
    return CodeLock(identities, {stage: entries for stage, entries in before.same.items() if stage in kept})


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def expect(stage: str, root: Path, again: bool = False) -> str:
    """The identity that a project's code.yaml names for a stage. Raises DmatError if the loaded code is of another.

    again: looks at the source files once more, to find what changed while something was computed.
    """
    locked = read(root)
    identity, found = locked.of(stage), of_stage(stage) if again else _when_loaded(stage)
    if not locked.accepts(stage, found):
        raise DmatError(
            f"the code of {stage} is {found[:_SHORT]}; {NAME} says {identity[:_SHORT]}; run `dmat lock` (the stage "
            f"reruns) or `dmat lock --same {stage} --why ...` if it computes the same"
        )
    return identity
