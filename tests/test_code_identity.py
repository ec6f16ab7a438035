"""The identity of code: what changes it and what does not, and that it covers all modules that decide a result.

Run alone: pytest tests/test_code_identity.py
"""

import ast
import copy
import functools
import hashlib
import importlib.metadata
import json
import re
import shutil
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dmat.errors import DmatError
from dmat.pipeline import STAGES
from dmat.pipeline.code_identity import CARRIERS, Sources, carriers_of, closure_of, is_below, of_stage, tree_text
from tests.conftest import ROOT
from tests.projects import STAGE_OPTIONS, Project

# Sources that versions of Python parse or `repr` differently -> hash of the tree, the same in Python 3.11 to 3.13.
HASHES = {
    'f"a{b!r:>{c}}d{{}}" f"{e=}" "g" f"{h:}" f"{i:.2f}{j}"':
        "33ae479c9798afbe",
    "x = 1, 1.0, True, 1j, None, ..., 'é\\u200b', b'\\xff', 10**40, -0.0, 0x1F, 1_000, '\\ud800'":
        "8be246fafb3b4c03",
    "def f(a, /, b: int = 2, *c, d=3, e, **g) -> None:\n    'doc'\n    return lambda x, *, y=1: x":
        "9f5debc5d9cd2997",
    "@d\nclass A(B, metaclass=C):\n    x: int = 1\n    async def f(self):\n        async for a in b: await c":
        "461bf68634b4a6e6",
    "match x:\n    case {'a': 1, **r} if r: pass\n    case [1, *_] | A(b=None): y = (z := 1)":
        "625d0806de1319e2",
    "try:\n    a\nexcept* (B, C) as e:\n    raise D('text') from e\nelse:\n    assert b, 'c'\nfinally:\n    del d":
        "e2728e56d729b79a",
    "a[1:2, ::3, *b] = {**c, 'd': e, 'f': {g for g in h if i}}\nglobal j\nk = [*l, (yield)]":
        "a93be01b41b02a44",
    "with (a as b, c):\n    x = y if z else not w; u = -v ** 2 @ t\nwhile 1 < 2 <= 3 != 4:\n    break":
        "7404290435539659",
}  # fmt: skip


def _hash(source: str) -> str:
    return hashlib.sha256(tree_text(source).encode()).hexdigest()[:16]


@pytest.mark.parametrize("source", HASHES)
def test_a_source_has_the_same_hash_in_every_python(source):
    assert _hash(source) == HASHES[source]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("x = ('a'\n  'b')  # why\n\n", "x = 'ab'"),
        ("def f():\n    '''Doc.'''\n    return 1", "def f():\n  return 1"),
        ("class A:\n    '''Doc.'''", "class A:\n    pass"),
        ("def f(): ...", "def f():\n    '''Doc.'''"),
        ("raise A('one', 2) from error", "raise A(f'two {b}')"),
        ("raise a.B('one')", "raise a.B"),
        ("assert a, 'one'", "assert a"),
        ("warnings.warn(f'{a} is odd', B)", "warnings.warn(f'odd: {a}!', B)"),
        ("tqdm.write('one')", "tqdm.write('two')"),
        ("if TYPE_CHECKING:\n    import a\nx", "x"),
        ("if typing.TYPE_CHECKING:\n    import a\nelse:\n    b", "b"),
        ("x = 0x10 + 1_000", "x = 16 + 1000"),
        ("x = u'a'", "x = 'a'"),
        ("f'a{b}' 'c'", "f'a{b}c'"),
        ("x = (a)", "x = a"),
    ],
)
def test_changes_without_effect_keep_the_tree(first, second):
    assert tree_text(first) == tree_text(second)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("x = 1", "x = True"), ("x = 1", "x = 1.0"), ("x = 0.0", "x = -0.0"), ("x = 'a'", "x = b'a'"),
        ("x = {**a}", "x = {a: None}"), ("x = {None: a}", "x = {**a}"), ("def f(a, b=1): 0", "def f(a=1, b=1): 0"),
        ("def f(*, a, b=1): 0", "def f(*, a=1, b): 0"), ("a; b", "b; a"), ("a\nif b: c", "if b: c\na"),
        ("x = a < b", "x = a <= b"), ("x = a + b", "x = a - b"), ("f'{a!r}'", "f'{a!s}'"), ("f'{a}'", "f'{a:}b'"),
        ("f'{a:.2f}'", "f'{a:.3f}'"), ("raise A('x')", "raise B('x')"), ("raise A", "raise"), ("assert a", "assert b"),
        ("warnings.warn(a, B)", "warnings.warn(a, C)"), ("tqdm.write(f'{a}')", "tqdm.write(f'{b}')"),
        ("warn('a')", "warn('b')"),
        ("if a:\n    b", "if a:\n    b\nelse:\n    c"), ("from a import b", "from .a import b"),
        ("import a as b", "import a"), ("async def f(): 0", "def f(): 0"), ("[a for b in c if d]", "[a for b in c]"),
        ("x = [1, [2]]", "x = [[1], 2]"), ("x = 'ab', 'c'", "x = 'a', 'bc'"), ("@a\ndef f(): 0", "def f(): 0"),
        ("match a:\n    case None: b", "match a:\n    case True: b"), ("x: int", "x: str"), ("lambda: a", "lambda: b"),
    ],
)  # fmt: skip
def test_changes_with_a_possible_effect_change_the_tree(first, second):
    assert tree_text(first) != tree_text(second)


def test_reformatting_dmat_keeps_the_identity_of_every_stage(tmp_path):
    shutil.copytree(ROOT / "dmat", tmp_path / "dmat", ignore=shutil.ignore_patterns("__pycache__"))
    ruff = ["format", "--isolated", "--quiet", "--line-length", "50", "--config", "format.quote-style = 'single'"]
    subprocess.run([sys.executable, "-m", "ruff", *ruff, "dmat"], cwd=tmp_path, check=True)
    for path in tmp_path.rglob("*.py"):
        path.write_text(f"{_rewritten(path.read_text())}\n# the end\n")
    assert (tmp_path / "dmat/seeds.py").read_text() != (ROOT / "dmat/seeds.py").read_text()
    assert {stage: of_stage(stage, Sources(tmp_path)) for stage in STAGES} == {
        stage: of_stage(stage) for stage in STAGES
    }


def _rewritten(source: str) -> str:
    """The source with other docstrings and error messages, and without comments."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            node.body.insert(0, ast.Expr(ast.Constant("Another docstring.")))
        elif isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
            node.exc.args[0] = ast.Constant("another sentence")
        elif isinstance(node, ast.Assert):
            node.msg = ast.Constant("another sentence")
    imports = re.findall(r"^from __future__ .*$", source, re.MULTILINE)
    assert not imports, "they would have to stay the first statement"
    return ast.unparse(ast.fix_missing_locations(tree))


# Changes of one node of a tree


def _constant(node: ast.Constant) -> None:
    value = node.value
    changes = {bool: lambda: not value, int: lambda: value + 1, float: lambda: value + 0.5, str: lambda: f"{value}~"}
    node.value = changes.get(type(value), lambda: 7)()


def _operator(node: ast.BinOp) -> None:
    node.op = ast.Sub() if isinstance(node.op, ast.Add) else ast.Add()


def _comparison(node: ast.Compare) -> None:
    node.ops[0] = ast.Lt() if isinstance(node.ops[0], ast.GtE) else ast.GtE()


def _boolean(node: ast.BoolOp) -> None:
    node.op = ast.Or() if isinstance(node.op, ast.And) else ast.And()


def _name(node: ast.Name) -> None:
    node.id += "_"


def _attribute(node: ast.Attribute) -> None:
    node.attr += "_"


def _argument(node: ast.arg) -> None:
    node.arg += "_"


def _keyword(node: ast.keyword) -> None:
    node.arg = f"{node.arg}_" if node.arg else "kwargs"


def _default(node: ast.arguments) -> None:
    if node.defaults:
        node.defaults.pop()
    else:
        node.args = [ast.arg("first"), *node.args]


def _order(node: ast.FunctionDef) -> None:
    if len({ast.dump(statement) for statement in node.body[-2:]}) == 2 and not isinstance(node.body[-2], ast.Expr):
        node.body.append(node.body.pop(-2))
    else:
        node.body.append(ast.Return(ast.Constant(1)))


CHANGES = {ast.Constant: _constant, ast.BinOp: _operator, ast.Compare: _comparison, ast.BoolOp: _boolean,
           ast.Name: _name, ast.Attribute: _attribute, ast.arg: _argument, ast.keyword: _keyword,
           ast.arguments: _default, ast.FunctionDef: _order}  # fmt: skip


@functools.cache
def _deciding(module: str) -> tuple[ast.Module, list[int]]:
    """A module's tree, and which nodes of `ast.walk` decide something and can be changed."""
    tree = ast.parse(Sources().content(module))
    silent = set[ast.AST]()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            silent.add(node.value)
        elif isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            silent |= {inner for part in (*node.exc.args, *node.exc.keywords) for inner in ast.walk(part)}
            silent |= {*ast.walk(node.cause)} if node.cause else set()
        elif isinstance(node, ast.Assert) and node.msg:
            silent |= {*ast.walk(node.msg)}
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            silent |= {*ast.walk(node)}
    numbers = [k for k, node in enumerate(ast.walk(tree)) if type(node) in CHANGES and node not in silent]
    return tree, numbers


MODULES = ("dmat.robust.losses", "dmat.robust.attacks", "dmat.seeds", "dmat.modes", "dmat.data.mixing",
           "dmat.diffusion.formulations", "dmat.training.classifier", "dmat.evaluation.checks")  # fmt: skip


@settings(max_examples=80, deadline=None)
@given(st.sampled_from(MODULES), st.data())
def test_any_change_of_a_deciding_node_changes_the_tree(module, data):
    """Changes of every kind: constants, operators, names, order, defaults."""
    tree, numbers = _deciding(module)
    changed, number = copy.deepcopy(tree), data.draw(st.sampled_from(numbers))
    node = next(node for k, node in enumerate(ast.walk(changed)) if k == number)
    before = ast.unparse(node) if not isinstance(node, ast.arguments) else ""
    CHANGES[type(node)](node)
    source = ast.unparse(ast.fix_missing_locations(changed))
    assert tree_text(source) != tree_text(Sources().content(module).decode()), (
        f"{before} in line {node.lineno}" if before else ""
    )


# What counts


def _copy(tmp_path):
    shutil.copytree(ROOT / "dmat", tmp_path / "dmat", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path / "dmat"


CLASSIFIERS = {"train_scorer", "score_images", "measure_images", "train_robust", "evaluate_robust"}
WITH_DATA = {*STAGES} - {"write_report"}
EDITS = [  # file, old text, new text, the stages whose identity changes
    ("data/shards.py", "\n\n\ndef ", "\n\n\n# A comment.\ndef ", set()),
    ("robust/networks.py", '"""', '"""More words. ', set()),
    ("data/shards.py", "SCHEMA = 1", "SCHEMA = 2", WITH_DATA),
    ("seeds.py", "digest_size=16", "digest_size=32",
     WITH_DATA - {"select_images", "combine_selections"} | {"write_report"}),
    ("modes.py", "layer.momentum = momentum", "layer.momentum = 1 - momentum",
     {"train_scorer", "train_diffusion", "train_robust"}),
    ("robust/step_size.py", "else epsilon / 4", "else epsilon / 5", {"train_robust", "evaluate_robust"}),
    ("models/classifiers.py", '"initial weights", 0', '"initial weights", 1', CLASSIFIERS | {"train_diffusion"}),
    ("diffusion/samplers.py", "rho", "rho_", {"generate_images"}),
    ("metrics/pictures.py", "def sheet(", "def sheet_(", {"write_report"}),
    ("tracking/runs.py", "def seconds_before(", "def seconds_before_(", set()),
    ("pipeline/execution.py", "def estimate(", "def estimate_(", set()),
    ("report/page.js", "", "// More.\n", {"write_report"}),
    ("report/page.html.j2", "", "<!-- more -->", {"write_report"}),
    ("recipes/digits.yaml", "beta: 5.0", "beta: 6.0", set()),
]  # fmt: skip


@pytest.mark.parametrize(("file", "old", "new", "stages"), EDITS, ids=[f"{file} {new}" for file, _, new, _ in EDITS])
def test_an_edit_changes_the_stages_whose_results_it_may_change(tmp_path, file, old, new, stages):
    path = _copy(tmp_path) / file
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    changed = {stage for stage in STAGES if of_stage(stage, Sources(tmp_path)) != of_stage(stage)}
    assert changed == stages


SETTINGS = [  # edits of the records, and the stages whose identity changes
    ({"momentum: Momentum = 0.9\n": "momentum: Momentum = 0.8\n"}, {"train_scorer", "train_robust"}),
    (
        {
            "Field(ge=0.5, le=1000)] = 7.0": "Field(ge=0.5, le=1000)] = 8.0",  # of a record inside a record
            "-(-arm.schedule_every // arm.batch)": "arm.schedule_every // arm.batch",
        },
        {"generate_images", "mix_images"},
    ),
    (
        {
            "Field(ge=10, le=10_000)": "Field(ge=4, le=20_000)",
            "expected at least 1 step, or loss: standard": "expected a step",
            'device: Literal["auto", "cpu", "cuda"] = "auto"': 'device: Literal["auto", "cpu", "cuda"] = "cpu"',
        },
        set(),
    ),
]


@pytest.mark.parametrize(("edits", "stages"), SETTINGS)
def test_defaults_and_computed_fields_count_and_limits_do_not(tmp_path, edits, stages):
    folder = _copy(tmp_path)
    for old, new in edits.items():
        files = [folder / "config.py", *folder.glob("config/*.py")]
        (path,) = [path for path in files if path.is_file() and old in path.read_text()]
        path.write_text(path.read_text().replace(old, new))
    script = """
import json
from dmat.pipeline import STAGES, code_identity
print(json.dumps({stage: code_identity.of_stage(stage) for stage in STAGES}))
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)},
                          capture_output=True, text=True, check=True)  # fmt: skip
    assert {stage for stage, identity in json.loads(done.stdout).items() if identity != of_stage(stage)} == stages


@pytest.mark.parametrize(
    ("package", "stages"),
    [("pyautoattack", ["evaluate_robust"]), ("torch_fidelity", ["train_diffusion", "measure_images"])],
)
def test_the_version_of_a_package_counts_for_the_stages_that_compute_with_it(monkeypatch, package, stages):
    before = {stage: of_stage(stage) for stage in STAGES}
    version = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version(name) + (".1" if name == package else ""))
    assert [stage for stage in STAGES if of_stage(stage) != before[stage]] == stages


def test_modules_count_however_they_are_imported(tmp_path):
    for name, text in {
        "jobs/start.py": """
            import importlib
            from typing import TYPE_CHECKING
            import dmat.plain
            from dmat import member
            from dmat.jobs import near
            from .relative import x
            from ..above import y
            if TYPE_CHECKING:
                from dmat import types_only
            TABLE = {"one": "dmat.table.of:function", "two": "dmat.stage"}
            def run(name):
                "dmat.docstring"
                from dmat.inside.deep import f
                importlib.import_module("dmat.by_name")
                return importlib.import_module(f"dmat.several.{name}")
            """,
        **{f"{name}.py": "" for name in (
            "jobs/near", "jobs/relative", "above", "plain", "types_only", "docstring", "inside/deep", "by_name",
            "several/a", "several/b/c", "table/of", "only_by_carrier", "inside/__init__")},
        "member.py": "import dmat.carrier, dmat.carrying.on",
        "carrier.py": "import dmat.only_by_carrier",
        "carrying.py": "",
    }.items():  # fmt: skip
        path = tmp_path / "dmat" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        indent = "\n            "
        path.write_text(text.replace(indent, "\n").strip())
    (tmp_path / "dmat/__init__.py").write_text("import dmat.docstring")
    for folder in ("several", "several/b"):
        (tmp_path / "dmat" / folder / "__init__.py").touch()
    modules = Sources(tmp_path).closure({"dmat.jobs.start"}, {"dmat.carrier"})
    assert {name.removeprefix("dmat.") for name in modules} == {
        "jobs.start", "jobs.near", "jobs.relative", "above", "plain", "member", "inside", "inside.deep", "by_name",
        "carrying", "several", "several.a", "several.b", "several.b.c", "table.of",
    }  # fmt: skip


def test_an_incomplete_or_missing_file_is_reported(tmp_path):
    (_copy(tmp_path) / "seeds.py").write_text("def f(:")
    with pytest.raises(
        DmatError, match=r"dmat/seeds.py is not valid Python \(invalid syntax.*\); expected a complete file"
    ):
        of_stage("train_robust", Sources(tmp_path))
    (tmp_path / "dmat/jobs/mix_images.py").unlink()
    with pytest.raises(
        DmatError, match=r"mix_images.py cannot be read \(No such file or directory\); expected a source"
    ):
        of_stage("mix_images", Sources(tmp_path))


def test_the_list_of_carriers_is_short_and_names_existing_modules():
    sources = Sources()
    for stage in STAGES:
        assert {module for module in carriers_of(stage) if sources.find_module(module) != module} == set()
    imported_carriers = {
        carrier
        for stage in STAGES
        for module in closure_of(stage)
        for name in sources.imported_modules(module)
        for carrier in CARRIERS
        if is_below(name, [carrier])
    }
    assert imported_carriers == {*CARRIERS}, "nothing that decides imports the others: leave them out"
    assert len(CARRIERS) < 16
    for module in ("dmat.seeds", "dmat.modes", "dmat.processes", "dmat.devices", "dmat.training.weights"):
        assert module in closure_of("train_robust") & closure_of("train_scorer"), module


def test_every_module_that_a_stage_loads_counts_or_is_a_carrier(tmp_path, tiny_params):
    """Each stage runs once. Every import by a module that decides its result is of another such module or of a carrier,
    however it is imported."""
    params = tiny_params
    del params["arms"]["real_only"]
    params["write_report"]["baseline"] = "generated"
    params["evaluate_robust"] |= {"auto_attack": ["apgd-ce"], "images": 20}
    params["train_robust"] |= {"images_seen": 320}
    params["selections"]["hard"] = {"image_set": "edm18", "band": "hard"}
    params["mixtures"] = {"pool": {"of": {"edm18_best": 0.5, "hard": 0.5}}}
    project = Project(tmp_path, params)
    options = {
        **STAGE_OPTIONS, "combine_selections": ["--mixture", "pool"], "write_report": [],
        "measure_images hard": ["--selection", "hard"], "select_images hard": ["--selection", "hard"],
    }  # fmt: skip
    names = [*STAGES]
    for again in ("select_images hard", "measure_images hard"):  # the report and the mixture read two selections
        names.insert(names.index("measure_images"), again)
    commands = {name: [STAGES[name.split()[0]].command, *options[name], "--json"] for name in names}
    arguments = [sys.executable, "-m", "tests.imports_seen", str(project.folder), json.dumps(commands)]
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    unseen, checked = set(), 0
    for name, pairs in json.loads(done.stdout).items():
        stage = name.split()[0]
        closure, carriers = closure_of(stage), carriers_of(stage)
        for importer, imported in pairs:
            if importer in closure and imported != "dmat":
                checked += 1
                accounted = imported in closure or is_below(imported, carriers)
                unseen |= set() if accounted else {f"{stage}: {importer} loaded {imported}"}
        assert ["dmat.pipeline.stages", f"dmat.jobs.{stage}"] in pairs, "by name"
    assert unseen == set()
    assert checked > 300


@pytest.mark.parametrize("stage", STAGES)
def test_no_stage_depends_on_the_job_of_another(stage):
    """Otherwise an edit of a sampler would train every classifier again."""
    jobs = {f"dmat.jobs.{other}" for other in STAGES if other != stage}
    assert closure_of(stage) & jobs == set()
