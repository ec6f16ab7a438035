"""The identity of a stage's code, and `code.yaml`, which records it.

An identity is 32 hex digits. They change where the code may compute something else. They stay where only comments,
docstrings, formatting or the texts of errors changed. An identity is a hash of the syntax trees of all modules that a
stage computes with, of the defaults of its settings, and of what else decides its result. Modules are read by path,
never imported.

`code.yaml` in a project holds the identity of the code that the results of each stage come from. `dmat lock` writes it,
DVC reads it as parameters, and every stage command compares it with the loaded code.
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
from typing import TYPE_CHECKING, Any

import dmat
from dmat import files, plugins, yaml_file
from dmat.errors import DmatError
from dmat.pipeline.stages import STAGES

if TYPE_CHECKING:
    from dmat.config import Record

NAME = "code.yaml"
_SAME_KEY = "same"  # key in code.yaml of other identities whose code was shown to compute the same
_HEAD = "# Written by `dmat lock` alone: the code that the results of each stage are of (docs/architecture.md).\n"
_ROOT = Path(dmat.__file__).parent.parent
_SHORT_DIGITS = 12  # of an identity in messages

# Modules, with all below them, that transport results and never decide them, and why. Modules that only these import
# do not count either.
CARRIERS = {
    "dmat.data.dvc_cache": "copies of shards, compared by their checksums",
    "dmat.data.shard_pool": "which shards exist and which are computed; their bytes stay as computed",
    "dmat.config": "reads params.yaml; the defaults and functions of a stage's record count separately",
    "dmat.errors": "sentences and exit codes",
    "dmat.evaluation.progress": "counts the passes of a model, whose logits it returns unchanged",
    "dmat.evaluation.work": "which process computes which shard, and how far it is",
    "dmat.files": "bytes on disk, unchanged",
    "dmat.job": "where a job reads and writes, and what it returns",
    "dmat.metrics.pictures": "pictures, which no other stage reads",
    "dmat.plugins": "loads code of a project, which has an identity of its own",
    "dmat.tracking": "MLflow",
    "dmat.training.curves": "pictures, which no other stage reads",
    "dmat.training.interruption": "signals",
    "dmat.training.long_run": "checkpoints, metrics and the progress bar: a resumed run ends as an uninterrupted one",
    "dmat.workspace": "where the files of a project are",
}
# More carriers for one stage: used for a picture of samples only.
_CARRIERS_OF = {"train_diffusion": {"dmat.diffusion.samplers", "dmat.diffusion.multistep"}}
# Carriers that count for one stage: the report shows the pictures.
_DECIDING = {"write_report": {"dmat.metrics.pictures"}}

_PACKAGES = ("pyautoattack", "torch_fidelity")  # their versions decide results
_WARNINGS = {"warnings.warn", "tqdm.write"}  # the texts that these functions get decide nothing
_IGNORED_FIELDS = {"ctx", "kind", "type_comment", "type_params"}  # redundant, or not in every version of Python


# Syntax trees


def tree_text(source: str) -> str:
    """The syntax tree of a source file as text, the same in Python 3.11, 3.12 and 3.13 (unlike `ast.dump`).

    Left out: docstrings and other statements that do nothing, blocks for type checkers, and the texts of errors,
    assertions and warnings. Raises SyntaxError.
    """
    return _tree_text(ast.parse(source))


def _tree_text(node: object, texts: bool = True) -> str:
    """The text of a node, a list of nodes or a value in a node. texts: False inside a warning, whose strings do not
    count."""
    if isinstance(node, list):
        return f"[{' '.join(_tree_text(child, texts) for child in node)}]"
    if isinstance(node, ast.Constant):
        return _constant_text(node.value) if texts or not isinstance(node.value, str) else "text"
    if isinstance(node, ast.JoinedStr):
        return f"JoinedStr[{' '.join(_fstring_parts(node, texts))}]"
    if not isinstance(node, ast.AST):
        return "nothing" if node is None else _constant_text(node)
    fields = {name: value for name, value in ast.iter_fields(node) if name not in _IGNORED_FIELDS}
    if isinstance(node, ast.Raise):
        fields = {"exc": node.exc.func if isinstance(node.exc, ast.Call) else node.exc}
    elif isinstance(node, ast.Assert):
        del fields["msg"]
    elif isinstance(node, ast.Call):
        texts = texts and _dotted_name(node.func) not in _WARNINGS
    children = []
    for name in sorted(fields):  # an empty field is None in one version of Python and missing in another
        value = _effective_statements(fields[name]) if isinstance(fields[name], list) else fields[name]
        if value is not None and value != []:
            children.append(f"{name}={_tree_text(value, texts)}")
    return f"{type(node).__name__}({' '.join(children)})"


def _effective_statements(nodes: Iterable[object]) -> list[object]:
    """The nodes without statements that do nothing. A block for type checkers is replaced by its `else`."""
    statements = []
    for node in nodes:
        if isinstance(node, ast.If) and _dotted_name(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            statements += _effective_statements(node.orelse)
        elif not (isinstance(node, ast.Pass) or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))):
            statements.append(node)
    return statements


def _dotted_name(node: ast.AST) -> str:
    """A name, or a name with one attribute; "" for anything else."""
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
        return f"{node.value.id}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def _fstring_parts(node: ast.JoinedStr, texts: bool) -> Iterator[str]:
    """The parts of an f-string. Neighbouring texts are joined, because versions of Python split them differently."""
    text = ""
    for part in [*node.values, None]:
        if isinstance(part, ast.Constant):
            text += str(part.value) if texts else ""
            continue
        if text:
            yield _constant_text(text)
        if part is not None:
            yield _tree_text(part, texts)
        text = ""


def _constant_text(value: object) -> str:
    """A constant with its type, because 1, 1.0 and True are equal. Text is written as hex, because its `repr` depends
    on the Unicode tables of the Python version."""
    if isinstance(value, str):
        return f"str:{value.encode('utf-8', 'surrogatepass').hex()}"
    if isinstance(value, bytes):
        return f"bytes:{value.hex()}"
    return f"{type(value).__name__}:{f'{value:x}' if type(value) is int else repr(value)}"


# Modules


@dataclasses.dataclass(frozen=True)
class _SourceModule:
    """What counts of a source file. imports: leading dots, dotted name and local name of everything imported.

    texts: all string constants.
    """

    digest: str  # of `tree_text`
    imports: frozenset[tuple[int, str, str]]
    texts: frozenset[str]


@functools.cache
def _parse_source(content: bytes) -> _SourceModule:
    """Parses a source file. Cached by content, because a command reads the same files again before it publishes."""
    tree = ast.parse(content)
    imports, texts = set[tuple[int, str, str]](), set[str]()
    for node in _effective_nodes(tree):
        if isinstance(node, ast.ImportFrom):
            prefix = [node.module] if node.module else []
            imports |= {
                (node.level, ".".join([*prefix, alias.name]), alias.asname or alias.name) for alias in node.names
            }
        elif isinstance(node, ast.Import):
            imports |= {(0, alias.name, alias.asname or alias.name) for alias in node.names}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            texts.add(node.value)
    return _SourceModule(_digest(_tree_text(tree)), frozenset(imports), frozenset(texts))


def _imported_names(parsed: _SourceModule, module: str, is_package: bool) -> set[tuple[str, str]]:
    """(full name, local name) of everything that a module imports. is_package: the module is an `__init__.py`."""
    package_path = module.split(".") if is_package else module.split(".")[:-1]
    return {
        (".".join([*package_path[: len(package_path) + 1 - level], name]) if level else name, alias)
        for level, name, alias in parsed.imports
    }


def _effective_nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes except those of statements that do nothing."""
    waiting = [tree]
    while waiting:
        node = waiting.pop()
        yield node
        for _, value in ast.iter_fields(node):
            children = _effective_statements(value) if isinstance(value, list) else [value]
            waiting += [child for child in children if isinstance(child, ast.AST)]


class Sources:
    """Source files of dmat by the names of their modules. root: the folder that holds `dmat`."""

    def __init__(self, root: Path = _ROOT):
        self._root = root

    def content(self, module: str) -> bytes:
        """The bytes of a module's file. Raises DmatError if the file cannot be read."""
        path = self._path_of(module)
        try:
            return path.read_bytes()
        except OSError as error:
            raise DmatError(f"{path} cannot be read ({error.strerror}); expected a source file; restore it") from None

    def digest(self, module: str) -> str:
        """Hash of a module's syntax tree. Raises DmatError if the file cannot be read or parsed."""
        return self._parsed_module(module).digest

    def closure(self, roots: Iterable[str], carriers: Iterable[str] = ()) -> set[str]:
        """The roots and all modules that they need, with their packages. Carriers are left out, and modules that only
        carriers need."""
        needed, visited, waiting = set[str](), {"dmat"}, {*roots}
        while waiting:
            module = waiting.pop()
            if module not in visited:
                visited.add(module)
                waiting |= {self.find_module(module.rpartition(".")[0]) or "dmat"}  # its package is loaded before it
                if not is_below(module, carriers):
                    needed.add(module)
                    waiting |= self.imported_modules(module) | self.modules_in_strings(module)
        return needed

    def imported_modules(self, module: str) -> set[str]:
        """Modules of dmat in import statements, including those inside functions."""
        return {imported for name, _ in self.imported_names(module) if (imported := self.find_module(name))}

    def imported_packages(self, module: str) -> set[str]:
        """Top-level packages of everything that a module imports."""
        return {name.partition(".")[0] for name, _ in self.imported_names(module)}

    def imported_names(self, module: str) -> set[tuple[str, str]]:
        """(full name, local name) of everything that a module imports."""
        return _imported_names(
            self._parsed_module(module), module, is_package=self._path_of(module).name == "__init__.py"
        )

    def modules_in_strings(self, module: str) -> set[str]:
        """Modules of dmat that a string constant names, as in tables of import strings and calls of importlib.

        A string that ends with a dot, the constant part of an f-string, stands for everything below that package.
        """
        modules = set[str]()
        for text in self._parsed_module(module).texts:
            if re.fullmatch(r"dmat(\.\w+)+\.", text):
                modules |= self._submodules(text.rstrip("."))
            elif re.fullmatch(r"dmat(\.\w+)+(:\w+)?", text) and (name := self.find_module(text.partition(":")[0])):
                modules.add(name)
        return modules

    def data_files(self, module: str) -> set[Path]:
        """Files that are not Python, such as templates, in the module's folder and named by one of its strings."""
        names = {text for text in self._parsed_module(module).texts if re.fullmatch(r"\w[\w.-]*\.\w+", text)}
        paths = {self._path_of(module).parent / name for name in names}
        return {path for path in paths if path.suffix != ".py" and path.is_file()}

    def find_module(self, name: str) -> str | None:
        """The longest prefix of a dotted name that is a module of dmat; None if there is none."""
        parts = name.split(".")
        prefixes = [".".join(parts[:k]) for k in range(len(parts), 0, -1)] if parts[0] == "dmat" else []
        return next((prefix for prefix in prefixes if self._path_of(prefix).is_file()), None)

    def _parsed_module(self, module: str) -> _SourceModule:
        content = self.content(module)
        try:
            return _parse_source(content)
        except (SyntaxError, ValueError) as error:
            path = self._path_of(module)
            raise DmatError(f"{path} is not valid Python ({error}); expected a complete file; fix it") from None

    def _path_of(self, module: str) -> Path:
        """Path of a module's file, which may not exist."""
        base = self._root.joinpath(*module.split("."))
        return base / "__init__.py" if base.is_dir() else base.with_suffix(".py")

    def _submodules(self, package: str) -> set[str]:
        paths = self._root.joinpath(*package.split(".")).rglob("*.py")
        names = (".".join(path.relative_to(self._root).with_suffix("").parts) for path in paths)
        return {name.removesuffix(".__init__") for name in names}


def is_below(module: str, modules: Iterable[str]) -> bool:
    """Whether a module is one of `modules` or inside one of them."""
    return any(module == ancestor or module.startswith(f"{ancestor}.") for ancestor in modules)


# Stages


def carriers_of(stage: str) -> set[str]:
    """The modules that transport a stage's results and never decide them."""
    return ({*CARRIERS} | _CARRIERS_OF.get(stage, set())) - _DECIDING.get(stage, set())


def closure_of(stage: str, sources: Sources | None = None) -> set[str]:
    """The modules that decide a stage's results. sources: by default those of the loaded dmat."""
    sources = sources or Sources()
    used = {module for record in _settings_records(stage) for module in _modules_used_by(record, sources)}
    return sources.closure({f"dmat.jobs.{stage}", *used}, carriers_of(stage))


def of_stage(stage: str, sources: Sources | None = None) -> str:
    """The identity of a stage's code as it is on disk now. sources: by default those of the loaded dmat."""
    sources = sources or Sources()
    records, modules = _settings_records(stage), closure_of(stage, sources)
    data_paths = {path for module in modules for path in sources.data_files(module)}
    packages = {package for module in modules for package in sources.imported_packages(module)}
    return _digest(
        {
            "modules": {module: sources.digest(module) for module in modules},
            "files": {path.name: files.sha256(path) for path in data_paths},
            "defaults": {record.__name__: _defaults(record) for record in records},
            "functions": {record.__name__: _record_functions(record, sources)[0] for record in records},
            "packages": {name: importlib.metadata.version(name) for name in _PACKAGES if name in packages},
        }
    )


@functools.cache
def _loaded_identity(stage: str) -> str:
    """`of_stage` at the first call of the process. A command plans right after it loaded its code, so this is the
    identity of the loaded code."""
    return of_stage(stage)


def of_plugins(import_paths: Iterable[str], *stages: str) -> dict[str, str]:
    """Import path -> identity of the project's code at that path, for the code that some stages use.

    An identity covers the module, the modules of the same folder that it imports, the files of the folder that they
    name, and the modules of dmat that they use and that do not count for the stages already.
    """
    import_paths = sorted(import_paths)
    if not import_paths:
        return {}
    excluded = set.union(*map(closure_of, stages)), set.union(*map(carriers_of, stages))
    return {import_path: _of_plugin(import_path, *excluded) for import_path in import_paths}


def _of_plugin(import_path: str, closure: set[str], carriers: set[str]) -> str:
    folder, sources = plugins.folder_of(import_path), Sources()
    modules, data, dmat_modules, waiting = (
        dict[str, str](),
        dict[str, str](),
        set[str](),
        {import_path.partition(":")[0]},
    )
    while waiting:
        module = waiting.pop()
        path = plugins.file_of(module, folder)
        if path is None or module in modules:
            continue
        content = path.read_bytes()
        plugins.parse(content, path)
        parsed = _parse_source(content)
        modules[module] = parsed.digest
        names = {name for name, _ in _imported_names(parsed, module, is_package=path.name == "__init__.py")} | {module}
        texts = {text for text in parsed.texts if re.fullmatch(r"[\w./-]{1,200}", text)}
        dmat_modules |= {dmat_module for name in (*names, *texts) if (dmat_module := sources.find_module(name))}
        waiting |= {name.rsplit(".", k)[0] for name in names for k in range(name.count(".") + 1)}
        waiting |= {text for text in texts if re.fullmatch(r"\w+(\.\w+)*", text)}
        paths = {(base / text).resolve() for base in (path.parent, folder) for text in texts}
        paths = {path for path in paths if path.is_relative_to(folder) and path.suffix != ".py" and path.is_file()}
        data |= {path.relative_to(folder).as_posix(): files.sha256(path) for path in paths}
    dmat_digests = {module: sources.digest(module) for module in sources.closure(dmat_modules, carriers) - closure}
    # "word", "own": keys of earlier versions: a new name would change every identity.
    return _digest({"word": import_path, "own": modules, "files": data, "dmat": dmat_digests})


def _digest(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _settings_records(stage: str) -> "list[type[Record]]":
    """The record class of a stage's settings and the record classes of its fields."""
    from dmat import config  # late: pydantic takes a third of the command line's start

    entries = {kind.section: kind.record for kind in config.LISTS.values() if kind.section}
    waiting: list[Any] = [
        {
            **config.SECTIONS,
            **entries,
            "combine_selections": config.Mixture,
            "mix_images": config.MixImages,
            "write_report": config.Report,
        }[stage]
    ]
    records: list[type[Record]] = []
    while waiting:
        kind = waiting.pop(0)
        if not hasattr(kind, "model_fields"):
            waiting += typing.get_args(kind)
        elif kind not in records:
            records.append(kind)
            waiting += [field.annotation for field in kind.model_fields.values()]
    return records


def _defaults(record: "type[Record]") -> dict[str, list[object]]:
    """Field -> a list that holds its default; an empty list for a required field."""
    return {
        name: [] if field.is_required() else [field.get_default(call_default_factory=True)]
        for name, field in record.model_fields.items()
    }


def _record_classes(record: "type[Record]") -> list[type]:
    """A record's class and its base classes in dmat."""
    return [kind for kind in record.__mro__ if kind.__module__.startswith("dmat.") and kind.__name__ != "Record"]


def _record_functions(record: "type[Record]", sources: Sources) -> tuple[str, frozenset[str]]:
    """The functions of a record as text, such as a default that depends on other values, and the names they use."""
    functions = [_class_functions(sources.content(kind.__module__), kind.__name__) for kind in _record_classes(record)]
    return " ".join(text for text, _ in functions), frozenset(name for _, names in functions for name in names)


@functools.cache
def _class_functions(content: bytes, name: str) -> tuple[str, frozenset[str]]:
    """The same as `_record_functions` for one class. Validators are left out."""
    functions = [
        function
        for definition in ast.parse(content).body
        if isinstance(definition, ast.ClassDef) and definition.name == name
        for function in definition.body
        if isinstance(function, ast.FunctionDef)
        and not any("validator" in ast.unparse(decorator) for decorator in function.decorator_list)
    ]
    nodes = [node for function in functions for node in ast.walk(function)]
    return _tree_text(functions), frozenset(node.id for node in nodes if isinstance(node, ast.Name))


def _modules_used_by(record: "type[Record]", sources: Sources) -> set[str]:
    """The modules of dmat that the functions of a record use."""
    _, used = _record_functions(record, sources)
    names = {
        full
        for kind in _record_classes(record)
        for full, alias in sources.imported_names(kind.__module__)
        if alias in used
    }
    return {module for full in names if (module := sources.find_module(full))}


# code.yaml


@dataclasses.dataclass(frozen=True)
class CodeLock:
    """The content of code.yaml.

    identities: stage -> identity of its code. same: stage -> other identities whose code computes the same, each with
    the keys `code` (the identity), `why` and `compared`.
    """

    identities: Mapping[str, str]
    same: Mapping[str, Sequence[Mapping[str, str]]]

    def identity_of(self, stage: str) -> str:
        """The identity of a stage. Raises DmatError for a stage that is not in code.yaml, such as a new one."""
        if stage not in self.identities:
            raise DmatError(f"{NAME} has no {stage}; expected a line for each stage; run `dmat lock`")
        return self.identities[stage]

    def accepts(self, stage: str, identity: str) -> bool:
        """Whether results of code with this identity are results of the stage."""
        return identity in {self.identities.get(stage), *(entry["code"] for entry in self.same.get(stage, ()))}


def read(root: Path) -> CodeLock:
    """Reads the code.yaml of the project in `root`. Raises DmatError if it is missing or `dmat lock` did not write
    it."""
    path = root / NAME
    try:
        identities = yaml_file.read(path).value
        same = identities.pop(_SAME_KEY, {})
        entries = [entry for stage in same for entry in same[stage]]
        texts = [*identities.values(), *(entry[key] for entry in entries for key in ("code", "why", "compared"))]
        if all(isinstance(text, str) for text in texts):
            return CodeLock(identities, same)
        problem = "a value is not text"
    except FileNotFoundError:
        raise DmatError(f"{path} does not exist; expected the identity of each stage's code; run `dmat lock`") from None
    except (DmatError, AttributeError, KeyError, TypeError) as error:
        problem = str(error)
    raise DmatError(
        f"{path}: {problem}; expected what `dmat lock` wrote; restore it from git, or delete it and run `dmat lock`"
    )


def write(root: Path, locked: CodeLock) -> None:
    """Writes code.yaml in `root`. Values are quoted, because YAML reads some identities as numbers.

    A stage that is newer than the file is not in it until `dmat lock` adds it.
    """
    locked_stages = [stage for stage in STAGES if stage in locked.identities]
    lines = [f"{stage}: {_quote(locked.identities[stage])}\n" for stage in locked_stages]
    for stage in [stage for stage in STAGES if locked.same.get(stage)]:
        lines += [] if f"{_SAME_KEY}:\n" in lines else [f"{_SAME_KEY}:\n"]
        lines.append(f"  {stage}:\n")
        for entry in locked.same[stage]:
            values = [f"{key}: {_quote(entry[key])}\n" for key in ("code", "why", "compared")]
            lines.append("    - " + "      ".join(values))
    files.write_text(root / NAME, _HEAD + "".join(lines))


def lock_current_code(before: CodeLock) -> CodeLock:
    """The lock of the code on disk. A stage whose code `before` accepts keeps its identity and its `same` entries."""
    current = {stage: of_stage(stage) for stage in STAGES}
    unchanged = {stage for stage in STAGES if before.accepts(stage, current[stage])}
    identities = {stage: before.identities[stage] if stage in unchanged else current[stage] for stage in STAGES}
    return CodeLock(identities, {stage: entries for stage, entries in before.same.items() if stage in unchanged})


def _quote(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def expect(stage: str, root: Path, again: bool = False) -> str:
    """The identity that a project's code.yaml holds for a stage. Raises DmatError if it does not accept the loaded
    code.

    again: hashes the source files on disk instead, to detect changes since the code was loaded.
    """
    locked = read(root)
    identity, loaded = locked.identity_of(stage), of_stage(stage) if again else _loaded_identity(stage)
    if not locked.accepts(stage, loaded):
        raise DmatError(
            f"the code of {stage} is {loaded[:_SHORT_DIGITS]}; {NAME} says {identity[:_SHORT_DIGITS]}; run `dmat lock` "
            f"(the stage reruns) or `dmat lock --same {stage} --why ...` if it computes the same"
        )
    return identity
