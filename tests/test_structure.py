"""The structure of the project: layers, one name per stage, one home per opinionated package, and files that agree."""

import ast
import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import ruamel.yaml
import typer
import yaml

from cli import main
from cli.main import app
from dmat import config, recipes
from dmat.pipeline import STAGES, code_identity

# A module imports from its own row and from lower rows only; rows as in docs/architecture.md.
ROWS = (
    ("dmat", "dmat.errors", "dmat.redaction"),
    (
        *(
            "dmat.files",
            "dmat.checksum_cache",
            "dmat.dvc_lock",
            "dmat.yaml_file",
            "dmat.seeds",
            "dmat.modes",
            "dmat.liveness",
        ),
        *("dmat.processes", "dmat.devices", "dmat.compiler", "dmat.machine_speed", "dmat.workspace", "dmat.plugins"),
    ),
    ("dmat.data", "dmat.diffusion", "dmat.robust", "dmat.metrics"),
    ("dmat.config", "dmat.recipes", "dmat.project"),
    ("dmat.training", "dmat.tracking", "dmat.models", "dmat.evaluation", "dmat.report"),
    ("dmat.job", "dmat.jobs"),
    ("dmat.engine",),
    ("dmat.pipeline",),
    ("dmat.tuning", "dmat.upkeep"),
    ("cli",),
)
WITH_PLUGINS = {*STAGES} - {"select_images", "combine_selections", "mix_images", "write_report"}
SUBJECTS = ROWS[2]  # these do not import each other
HOMES = {  # package -> the only modules that import it
    "mlflow": {"dmat.tracking.stores", "dmat.tracking.run_record", "dmat.tracking.registry"},
    "pyautoattack": {"dmat.robust.authors_package"},
    "torch_fidelity": {"dmat.metrics.quality", "dmat.models.feature_networks"},
    "torchmetrics": set(),  # a witness of tests
    "typer": {
        "cli.main",
        "cli.evaluate",
        "cli.images",
        "cli.interim",
        "cli.lock",
        "cli.models",
        "cli.parameter_file",
        "cli.plan",
        "cli.stages",
        "cli.project",
        "cli.recipes",
        "cli.repro",
        "cli.runs",
        "cli.sources",
        "cli.tune",
        "cli.upkeep",
        "cli.reference",
    },
    "pydantic": {"dmat.config", "dmat.files"},
    "sklearn": {"dmat.data.sources"},
    "optuna": {
        f"dmat.tuning.{name}"
        for name in (
            *("applying", "driver", "driver_identity", "rank_task", "ranking", "report", "sampling", "space", "state"),
            *("storage", "studies", "trials"),
        )
    },
    "optuna_dashboard": {"dmat.tuning.dashboard"},
    "sqlalchemy": {"dmat.tuning.storage"},
    "ruamel": {"dmat.recipes.flat_file", "dmat.tuning.applying", "dmat.yaml_file"},
    "yaml": {"dmat.dvc_lock"},
    "PIL": {"dmat.data.image_export", "dmat.data.formats.image_files"},
    "pickle": {"dmat.data.formats.cifar"},  # an unpickler that accepts only arrays of bytes
    "plotly": {"dmat.report.charts", "dmat.report.interim", "dmat.report.page"},
    "jinja2": {"dmat.report.page"},
    "dvc": {"dmat.pipeline.dvc_graph"},
    "dask": {"dmat.engine.clusters"},
    "distributed": {"dmat.engine.clusters"},
}


def _modules(root: Path) -> list[str]:
    files = [*(root / "dmat").rglob("*.py"), *(root / "cli").rglob("*.py")]
    return sorted(".".join(f.relative_to(root).with_suffix("").parts).removesuffix(".__init__") for f in files)


def _owner(module: str) -> tuple[int, str]:
    """Row number and the entry of ROWS that a module belongs to (the longest that fits)."""
    fits = [
        (len(entry), row, entry)
        for row, entries in enumerate(ROWS)
        for entry in entries
        if module == entry or (module.startswith(f"{entry}.") and entry != "dmat")
    ]
    assert fits, f"{module} has no row in ROWS"
    _, row, entry = max(fits)
    return row, entry


@functools.cache
def _imports(root: Path, module: str) -> set[str]:
    """Absolute names of everything a module imports, whatever the package."""
    base = root / module.replace(".", "/")
    path = base / "__init__.py" if base.is_dir() else base.with_suffix(".py")
    imported = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} uses a relative import"
            imported |= {f"{node.module}.{alias.name}" for alias in node.names}
    return imported


def _used(sources: code_identity.Sources, module: str) -> set[str]:
    """Modules of dmat that a module imports, also by name. `dmat` itself names its public functions, from any row."""
    if not module.startswith("dmat"):
        return set()
    return sources.imported_modules(module) | (sources.modules_in_strings(module) if module != "dmat" else set())


def test_a_job_is_imported_by_name_in_one_place(root):
    """The table of stages then stays light; jobs import neither the pipeline that runs them nor each other."""
    sources = code_identity.Sources(root)
    jobs = {f"dmat.jobs.{stage_name}" for stage_name in STAGES}
    by_name = {
        module for module in _modules(root) if module.startswith("dmat") and sources.modules_in_strings(module) & jobs
    }
    assert by_name == {"dmat.pipeline.stages", "dmat.pipeline.code_identity"}
    assert {path.stem for path in (root / "dmat/jobs").glob("*.py")} == {*STAGES, "__init__"}
    for module in jobs:
        assert not {
            imported
            for imported in sources.imported_modules(module)
            if imported.startswith(("dmat.pipeline", "dmat.jobs."))
        }


def test_imports_go_down_the_layers(root):
    seen, sources = 0, code_identity.Sources(root)
    for module in _modules(root):
        row, entry = _owner(module)
        for name in _used(sources, module):
            seen += 1
            imported_row, imported_entry = _owner(name)
            assert imported_row <= row, f"{module} (row {row}) imports {name} (row {imported_row})"
            if entry in SUBJECTS and imported_entry in SUBJECTS:
                assert entry == imported_entry, f"{module} imports {name}: {entry} and {imported_entry} are strangers"
    assert seen > 100


@pytest.mark.parametrize("package", HOMES)
def test_opinionated_packages_have_one_home(root, package):
    users = {m for m in _modules(root) if any(re.match(rf"{package}(\.|$)", name) for name in _imports(root, m))}
    packages = {home for home in HOMES[package] if (root / home.replace(".", "/")).is_dir()}
    inside = {next((home for home in packages if user.startswith(f"{home}.")), user) for user in users}
    assert inside == HOMES[package]


def test_every_stage_has_one_name_everywhere(root):
    pipeline = yaml.safe_load((root / "dvc.yaml").read_text())["stages"]
    commands = {command.name for command in app.registered_commands}
    assert list(pipeline) == list(STAGES)
    assert len(STAGES) == 12
    for stage_name, stage in STAGES.items():
        assert (root / "dmat" / "jobs" / f"{stage_name}.py").is_file()
        assert stage.command in commands
        # These take all they need from their arm or mixture.
        assert stage_name in config.SECTIONS or stage_name in {"mix_images", "combine_selections"}
        assert stage.example.startswith(f"dmat {stage.command}")


def test_dvc_stages_agree_with_the_table(root):
    """Commands, dependencies and outputs that DVC resolves are those of STAGES, for every instance."""
    params = config.load(root / "params.yaml")
    resolved = {}
    for stage_name, entry in yaml.safe_load((root / "dvc.yaml").read_text())["stages"].items():
        template = entry.get("do", entry)
        for instance in STAGES[stage_name].all_instances(params):
            resolved[f"{stage_name} {STAGES[stage_name].instance_name(instance)}"] = _resolved(
                template, stage_name, instance, params
            )
    assert len(resolved) == 14
    for stage_name, stage in STAGES.items():
        for instance in stage.all_instances(params):
            entry = resolved[f"{stage_name} {stage.instance_name(instance)}"]
            assert entry["cmd"] == " ".join(["dmat", stage.command, *stage.options(instance)])
            inputs = set(stage.inputs(params, **instance).values())
            unread = {"sources/none", "plugins"}
            if stage_name == "train_diffusion":  # DVC's templates have no conditions: only judged snapshots read these
                unread |= {"artifacts/prepare_data/validation", "artifacts/train_scorer/scorer"}
                judged = {n: g.model_copy(update={"snapshot_every": 1}) for n, g in params.generators.items()}
                all_inputs = stage.inputs(dataclasses.replace(params, generators=judged), **instance)
                assert set(entry["deps"]) - {"sources/none", "plugins"} == set(all_inputs.values())
            if stage_name == "generate_images":  # only sets that are imported read it
                unread |= {"artifacts/prepare_data/train"}
            if stage_name == "write_report":  # the list of generators may be empty, and DVC refuses absent folders
                inputs -= {f"artifacts/{part}/train_diffusion" for part in ("pictures", "provenance", "metrics")}
                inputs -= {"artifacts/metrics/generate_images"}
            assert set(entry["deps"]) - unread == inputs, stage_name
            assert ("plugins" in entry["deps"]) == (stage_name in WITH_PLUGINS)
            assert entry["params"].pop(0) == {"code.yaml": [stage_name]}
            outputs = set(stage.outputs(params, **instance).values())
            outputs |= {stage.metrics_path(instance), stage.provenance_path(instance)}
            assert set(entry["outs"]) - {stage.pictures_path(instance)} == outputs, stage_name
            assert {name.partition(".")[0] for name in entry["params"]} <= {
                stage_name,
                "seeds",
                *config.LISTS,
                "train_robust",
            }


def test_the_metrics_of_the_pipeline_are_those_of_the_report_and_lie_in_git(root):
    """Then a clone without data compares revisions, and `dvc exp show` has no column for each number of each stage."""
    entries = {name: entry.get("do", entry) for name, entry in _yaml(root, "dvc.yaml")["stages"].items()}
    path = STAGES["write_report"].metrics_path({})
    assert {name: entry["metrics"] for name, entry in entries.items() if "metrics" in entry} == {
        "write_report": [{path: {"cache": False}}]
    }
    (locked,) = [out for out in _yaml(root, "dvc.lock")["stages"]["write_report"]["outs"] if out["path"] == path]
    assert locked["md5"] == _md5((root / path).read_bytes())
    git = functools.partial(subprocess.run, cwd=root, capture_output=True, check=False)
    assert git(["git", "check-ignore", "--no-index", path]).returncode == 1
    others = [stage.metrics_path(dict.fromkeys(stage.keys, "x")) for stage in STAGES.values() if stage.keys]
    ignored = git(["git", "check-ignore", "--no-index", *others], text=True).stdout.split()
    assert len(ignored) == len(others) == 9


def _yaml(root: Path, name: str) -> dict:
    return yaml.safe_load((root / name).read_text())


def test_an_evaluation_is_searched_by_the_settings_of_its_training(root):
    params, instance = config.load(root / "params.yaml"), {"arm": "generated", "seed": 1}
    context = STAGES["evaluate_robust"].context(params, instance)
    own = params.evaluate_robust.plain()
    assert {name: context[name] for name in ("arm", "seed", "beta", "generated_share")} == {
        "arm": "generated", "seed": 1, "beta": 5.0, "generated_share": 0.7,
    }  # fmt: skip
    assert not own.keys() & context.keys()
    assert (own["batch"], context["train_robust.batch"]) == (250, 128)
    assert STAGES["train_robust"].context(params, instance) == instance


def test_the_options_of_an_instance_are_those_of_its_command(root):
    params, group = config.load(root / "params.yaml"), typer.main.get_command(app)
    seen = 0
    for stage in STAGES.values():
        accepted = {option for parameter in group.commands[stage.command].params for option in parameter.opts}
        for instance in stage.all_instances(params):
            seen += 1
            assert {
                argument for argument in stage.options(instance) if argument.startswith("--")
            } <= accepted, stage.command
    assert seen == 14


def test_code_yaml_matches_this_code(root):
    identities = code_identity.read(root)
    changed = [
        stage_name for stage_name in STAGES if not identities.accepts(stage_name, code_identity.of_stage(stage_name))
    ]
    assert changed == [], "run `dmat lock`"
    assert set(identities.identities) == set(STAGES)
    assert (root / "code.yaml").read_text().startswith("# Written by `dmat lock` alone: ")


def test_a_commit_and_make_repro_check_code_yaml_first(root):
    (repository,) = yaml.safe_load((root / ".pre-commit-config.yaml").read_text())["repos"]
    (hook,) = repository["hooks"]
    assert (repository["repo"], hook["entry"]) == ("local", "dmat lock --check")
    assert hook["always_run"] is True
    recipe = re.search(r"^repro: .*\n((?:\t.*\n)+)", (root / "Makefile").read_text(), re.MULTILINE)[1]
    assert recipe.index("dmat lock --check") < recipe.index("dmat repro")


def test_dvc_lock_matches_this_code_and_these_parameters(root):
    """The last run that the repository ships was computed by its own code: a fresh clone shows no changed file."""
    current = {
        "params.yaml": ruamel.yaml.YAML(typ="safe").load((root / "params.yaml").read_text()),
        "code.yaml": code_identity.read(root).identities,
    }
    stages = yaml.safe_load((root / "dvc.lock").read_text())["stages"]
    changed, checked = set(), 0
    for name, entry in stages.items():
        stage = name.partition("@")[0]
        assert set(entry["params"].get("code.yaml", {})) == {stage}, "run `make repro` and commit dvc.lock"
        for file, recorded in entry["params"].items():
            for key, value in recorded.items():
                checked += 1
                current_value = current[file]
                for part in key.split("."):
                    current_value = current_value[part]
                changed |= {f"{key} of {name}"} if current_value != value else set()
        for dep in (dep for dep in entry.get("deps", []) if dep["path"] == "plugins"):
            checked += 1
            changed |= {f"plugins of {name}"} if dep["md5"] != _md5_of_folder(root / "plugins") else set()
    assert checked > 40
    assert changed == set(), "run `make repro` and commit dvc.lock and its results"
    assert len(stages) == 14


def _md5_of_folder(folder: Path) -> str:
    """MD5 of a folder as DVC computes it: of the list of its files."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    listed = [{"md5": _md5(path.read_bytes()), "relpath": path.relative_to(folder).as_posix()} for path in files]
    return f"{_md5(json.dumps(listed, sort_keys=True).encode())}.dir"


def _md5(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def _resolved(template: dict, stage_name: str, instance: dict, params: config.Params) -> dict:
    """The entry of one instance as DVC would resolve it; dvc.yaml uses only the templates ${key} and ${item...}."""
    stage = STAGES[stage_name]
    values = {"key": stage.instance_name(instance), **{f"item.{name}": str(value) for name, value in instance.items()}}
    values |= {"prepare_data.path": params.prepare_data.path,
               "measure_images.features_file": params.measure_images.features_file}  # fmt: skip
    lists = {"generator": params.generators, "image_set": params.image_sets, "selection": params.selections}
    for option, entries in (*lists.items(), ("arm", params.arms)):
        if stage.keys == (option,):
            values |= {f"item.{name}": value for name, value in entries[instance[option]].plain().items()}
    fill = lambda text: re.sub(r"\$\{([^}]+)\}", lambda m: values[m[1]], text)  # noqa: E731
    outs = [*template["outs"], *(path for entry in template.get("metrics", []) for path in entry)]
    return {"cmd": fill(template["cmd"]), "params": [*template["params"]], "outs": [fill(o) for o in outs],
            "deps": [fill(d) for d in template.get("deps", [])]}  # fmt: skip


def test_params_are_a_recipe(root):
    """That every recipe is valid: tests/test_recipes.py."""
    assert (root / "params.yaml").read_text() == recipes.read("digits")


def test_settings_of_training_loops_are_fields_of_the_records(root):
    """The protocols of the training loops name only fields that the records have (mypy checks their types)."""
    from dmat.diffusion.samplers import SamplerSettings
    from dmat.training import classifier, denoiser

    for protocol, record in (
        (classifier.ClassifierSettings, config.TrainRobust),
        (denoiser.DenoiserSettings, config.DenoiserTraining),
        (SamplerSettings, config.Sampler),
    ):
        names = {name for name in (*protocol.__annotations__, *vars(protocol)) if not name.startswith("_")}
        assert len(names) >= 6
        assert names <= {*record.model_fields, *vars(record)}


def test_help_is_quick_and_loads_no_torch():
    """Under a second of the processor, whatever else runs on it; the least of three."""
    script = "import sys, cli.main; print(sorted({'torch', 'mlflow', 'numpy', 'dvc', 'ruamel'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout == "[]\n"
    times: list[float] = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", "cli.main", "--help"], capture_output=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(times) < 1, times


def test_constraints_hold_every_direct_dependency(root):
    import tomllib

    pinned = {line.partition("==")[0].lower() for line in (root / "constraints.txt").read_text().splitlines()}
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    requirements = [
        *project["dependencies"],
        *(line for extra in project["optional-dependencies"].values() for line in extra),
    ]
    # `all` names the other extras by dmat[...]
    names = {re.match(r"[A-Za-z0-9_.-]+", line)[0].lower() for line in requirements} - {"dmat"}
    assert len(names) >= 20
    assert {name.replace(".", "-") for name in names} <= pinned  # as packaging writes names


def test_what_a_module_imports_is_a_dependency(root):
    """A plain install has all that is imported outside `dmat.tuning`, which needs the extra `tune`, and but for the
    weights of a feature network, which are the extra `measures`, and for Dask, which is the extra `cluster`."""
    import tomllib

    def names(lines: list[str]) -> set[str]:
        return {re.match(r"[A-Za-z0-9_.-]+", line)[0].lower().replace("_", "-") for line in lines}

    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    plain, extras = names(project["dependencies"]), project["optional-dependencies"]
    tune = names(extras["tune"])
    more = {"dmat.models.feature_networks": names(extras["measures"]), "dmat.engine.clusters": names(extras["cluster"])}
    brings = importlib.metadata.packages_distributions()
    outside = {*sys.stdlib_module_names, "dmat", "cli", "pydantic_core"}  # which pydantic pins
    seen = set()
    for module in _modules(root):
        available = plain | tune if module.startswith("dmat.tuning") else plain
        available = available | more.get(module, set())
        for package in {name.partition(".")[0] for name in _imports(root, module)} - outside:
            distributions = {name.lower().replace("_", "-") for name in brings[package]}
            assert distributions & available, f"{module} imports {package}, which {sorted(distributions)} brings"
            seen |= distributions & available
    assert len(seen) >= 20
    assert {"optuna", "optuna-dashboard", "sqlalchemy"} <= seen


def test_a_command_without_its_extra_names_it(root, monkeypatch):
    """As after a plain install, without the package."""
    script = (
        "import sys; sys.modules['optuna'] = None; sys.argv = ['dmat', 'tune', 'best']; import cli.main as m; m.main()"
    )
    result = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (2, "error: dmat tune needs optuna; pip install 'dmat[tune]'\n")
    monkeypatch.setattr(sys, "argv", ["dmat", "tune", "dashboard"])
    for package, sentence in (
        ("optuna_dashboard", "dmat tune needs optuna-dashboard; pip install 'dmat[tune]'"),
        ("sqlalchemy.exc", "dmat tune needs sqlalchemy; pip install 'dmat[tune]'"),
        ("torch", None),  # no extra of dmat would bring it
        (None, None),
    ):
        assert main.needed_extra(ImportError("no such module", name=package)) == sentence


RUNS_CONTENT = re.compile(  # what ruff's rules do not know, and the commonest of what they know
    r"weights_only=False|torch\.load\((?!.*weights_only=True)|\bpickle\.load|allow_pickle=True|yaml\.load\("
    r"|\b(?:marshal|shelve|dill|joblib|cPickle|_pickle)\b|\b(?:read_pickle|CIFAR100?)\(|(?<![.\w])(?:eval|exec)\("
)


@pytest.mark.parametrize(
    ("line", "runs"),
    [
        ("torch.load(path)", True),
        ("torch.load(path, map_location='cpu', weights_only=False)", True),
        ("torch.load(io.BytesIO(data), weights_only=True)", False),
        ("np.load(path, allow_pickle=True)", True),
        ("np.load(path, allow_pickle=False)", False),
        ("pickle.loads(data)", True),
        ("joblib.load(path)", True),
        ("eval(text)", True),
        ("network.eval()", False),
    ],
)
def test_the_guard_sees_calls_that_run_what_they_read(line, runs):
    assert bool(RUNS_CONTENT.search(line)) == runs


def test_no_code_path_runs_what_a_file_holds(root):
    """No code path runs what is in a file: the only unpickler finds no class but its own stand-ins, and the reader of
    torch's files looks up no names."""
    files = [path for folder in ("dmat", "cli", "benchmarks") for path in (root / folder).rglob("*.py")]
    assert len(files) > 40
    assert [str(f) for f in files if RUNS_CONTENT.search(f.read_text())] == []
    assert [f.name for f in files if "Unpickler" in f.read_text()] == ["cifar.py"]
    tree = ast.parse((root / "dmat/data/formats/cifar.py").read_text())
    (reader,) = [
        n for n in tree.body if isinstance(n, ast.ClassDef) and "pickle._Unpickler" in map(ast.unparse, n.bases)
    ]
    (find_class,) = [n for n in reader.body if isinstance(n, ast.FunctionDef) and n.name == "find_class"]
    assert isinstance(find_class.body[-1], ast.Raise)  # any other name is refused
    returned = [n.value for n in ast.walk(find_class) if isinstance(n, ast.Return)]
    assert len(returned) == 4
    assert all(isinstance(value, ast.Lambda) for value in returned)  # never what the name leads to, nor the parent's
    looks_up = {"getattr", "setattr", "globals", "vars", "__import__", "import_module", "eval", "exec"}
    imports = {"torch_files": {"io", "math", "pickletools", "re", "struct", "zipfile", "torch"}, "edm_pickles": set()}
    tensors = {"torch_files": {"torch.empty", "torch.frombuffer"}, "edm_pickles": set()}
    for name, modules in imports.items():
        reader = ast.parse((root / f"dmat/models/{name}.py").read_text())
        called = {ast.unparse(node.func) for node in ast.walk(reader) if isinstance(node, ast.Call)}
        assert len(called) > 30
        assert {call.rpartition(".")[2] for call in called} & {*looks_up, "load", "loads", "maker", "kind"} == set()
        assert {call for call in called if call.startswith("torch.")} == tensors[name]
        imported = {alias.name for n in ast.walk(reader) if isinstance(n, ast.Import) for alias in n.names}
        assert imported == modules | {"dataclasses", "mmap"}


@pytest.mark.parametrize(
    ("line", "rule"),
    [
        ("import pickle; pickle.load(file)", "S301"),
        ("import pickle; pickle.loads(data)", "S301"),
        ("import marshal; marshal.loads(data)", "S302"),
        ("import yaml; yaml.load(text)", "S506"),
        ("eval(text)", "S307"),
        ("exec(text)", "S102"),
        ("import subprocess; subprocess.run(text, shell=True)", "S602"),
        ("import os; os.system(text)", "S605"),
    ],
)
def test_ruff_refuses_calls_that_run_what_they_read(root, line, rule):
    """The rules are on, in every folder with code of dmat, and no comment turns them off there."""
    ruff = Path(sys.executable).with_name("ruff")
    for folder in ("dmat", "cli", "benchmarks"):
        command = [ruff, "check", "--output-format=json", "--stdin-filename", root / folder / "new.py", "-"]
        result = subprocess.run(command, input=line + "\n", cwd=root, capture_output=True, text=True, check=False)
        assert rule in {finding["code"] for finding in json.loads(result.stdout)}
    files = [path for folder in ("dmat", "cli", "benchmarks") for path in (root / folder).rglob("*.py")]
    assert not [path for path in files if re.search(r"noqa:.*\bS\d|ruff: noqa", path.read_text())]


def test_the_readme_tree_is_true(root):
    """Every path in the README's map exists, and every top-level folder and module folder is on it."""
    text = (root / "README.md").read_text()
    tree = re.search(r"```text\n(.*?)```", text, re.S)[1]
    named = {line.split()[0].rstrip("/") for line in tree.splitlines() if line.strip()}
    missing = [name for name in named if not (root / name).exists() and name not in ("artifacts", "runs", "mlruns")]
    assert missing == []
    parts = {f"dmat/{p.name}" for p in (root / "dmat").iterdir() if p.is_dir() and (p / "__init__.py").exists()}
    assert parts | {"cli", "tests", "docs", "dvc.yaml", "params.yaml", "docker-compose.yml"} <= named


def test_typer_commands_have_examples():
    group = typer.main.get_command(app)
    assert all("Example:" in (command.help or "") for command in group.commands.values())
    assert len(group.commands) >= 14


def test_every_package_is_installed(root):
    import tomllib

    listed = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    existing = [
        path.parent.relative_to(root) for name in ("cli", "dmat") for path in (root / name).rglob("__init__.py")
    ]
    assert sorted(listed) == sorted(path.as_posix().replace("/", ".") for path in existing)
