"""Plugins, code of a project by import path: what is found or refused, what reruns after a change, what never runs.

Run alone: pytest tests/test_plugins.py
"""

import functools
import itertools
import json
import os
import py_compile
import shutil
import sys
import types

import numpy as np
import pytest
import torch
import yaml

import dmat
from dmat import config, pipeline, plugins
from dmat.errors import ConfigError, DmatError
from dmat.pipeline import code_identity, planning
from dmat.pipeline.direct_evaluation import DirectEvaluation
from dmat.tuning import trials
from dmat.workspace import find_workspace
from tests import forked
from tests.conftest import ROOT
from tests.projects import current_code_lock

NETS = '''
"""A network of one layer."""
import torch
from torch import nn

from dmat.robust.networks import Classifier, Normalise
from my_parts import WIDTH


class Flat(Classifier):
    def __init__(self, data_spec, depth, width, activation):
        super().__init__()
        self.normalise = Normalise(data_spec.mean, data_spec.std)
        self.body = nn.Sequential(nn.Flatten(), nn.LazyLinear(WIDTH * width), nn.BatchNorm1d(WIDTH * width), nn.ReLU())
        self.body(torch.zeros(2, data_spec.channels, 8, 8))
        self.logits = nn.Linear(WIDTH * width, data_spec.classes)

    def features(self, images):
        return self.body(self.normalise(images))
'''
DATA = """
import numpy as np

from dmat.data.sources import ImageSource


def stripes(path=None):
    labels = np.arange(400, dtype=np.int64) % 2
    lying = np.indices((8, 8))[0] // 2 % 2 * 150
    noise = np.random.default_rng(0).integers(0, 100, (400, 8, 8))
    images = np.where(labels[:, None, None], lying, lying.T) + noise
    return ImageSource(images.astype(np.uint8)[..., None], labels, ("standing", "lying"), "CC0", "made by a formula")
"""
LOSSES = """
from dmat.robust.losses import trades


def mine(model, images, targets, start, settings, class_means=None):
    return trades(model, images, targets, start, settings, class_means)
"""
ATTACKS = """
from dmat.robust import attacks


def objective(labels):
    return attacks.margin(labels)
"""
DENOISERS = """
from dmat.diffusion.unet import UNet


def small(spec, settings):
    return UNet(spec.channels, spec.label_dim, settings.channels, settings.multipliers, settings.blocks, 0.0)
"""
STAGES = {
    "prepare-data": [],
    "train-scorer": [],
    "train-diffusion": ["--generator", "edm"],
    "generate-images": ["--image-set", "edm18"],
    "mix-images": ["--arm", "real_only"],
    "train-robust": ["--arm", "real_only", "--seed", "1"],
    "evaluate-robust": ["--arm", "real_only", "--seed", "1"],
}


class PluginProject:
    """A project whose networks, loss, source and PGD objective are plugins."""

    def __init__(self, folder, params):
        self.folder = folder
        code_identity.write(folder, current_code_lock())
        (folder / "plugins").mkdir()
        for name, text in (
            *(("my_nets", NETS), ("my_parts", "WIDTH = 8\n"), ("my_data", DATA), ("my_losses", LOSSES)),
            *(("my_attacks", ATTACKS), ("my_denoisers", DENOISERS)),
        ):
            (folder / f"plugins/{name}.py").write_text(text)
        self.params = config.merge(
            params,
            {
                "prepare_data": {"source": "my_data:stripes", "train": 200, "validation": 100, "test": 40},
                "train_robust": {
                    "network": {"name": "my_nets:Flat", "depth": 10, "width": 1},
                    "loss": "my_losses:mine",
                    "threat": {"epsilon": "1/20"},
                    "images_seen": 2560,
                },
                "train_diffusion": {"network": {"name": "my_denoisers:small"}},
                "evaluate_robust": {"pgd_loss": "my_attacks:objective"},
            },
        )
        self.write()

    def write(self):
        (self.folder / "params.yaml").write_text(yaml.safe_dump(self.params, sort_keys=False))

    def run(self, command, code=0):
        exit_code, text = forked.Command(self.folder, command, *STAGES[command], "--json").wait()
        assert exit_code == code, text
        return text

    def load(self):
        return config.load(self.folder / "params.yaml")

    def works(self, command):
        return {path.name for path in (self.folder / "runs" / command.replace("-", "_")).iterdir()}


@pytest.fixture(autouse=True)
def _as_in_a_new_process():
    """Starts each test with no plugin offered or loaded by another test."""
    path, modules = list(sys.path), set(sys.modules)
    yield
    plugins._offered.clear()
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        if name.startswith("my_"):
            del sys.modules[name]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_params_once):
    """A project after all its stages."""
    project = PluginProject(tmp_path_factory.mktemp("own"), tiny_params_once)
    project.printed = {command: project.run(command) for command in STAGES}
    return project


@pytest.fixture
def project(trained, tmp_path):
    shutil.copytree(trained.folder, tmp_path / "copy")
    copy = object.__new__(PluginProject)
    copy.folder, copy.params = tmp_path / "copy", trained.params
    return copy


def test_a_project_trains_and_evaluates_with_its_plugins(trained):
    assert json.loads(trained.printed["train-robust"].splitlines()[0])["best_validation_robust"] > 0.8
    lines = [json.loads(line) for line in trained.printed["evaluate-robust"].splitlines() if line[:1] == "{"]
    (metrics,) = [line for line in lines if "progress" not in line]
    assert metrics["best_pgd"] > 0.8
    for instance in ("train_diffusion/edm", "generate_images/edm18"):
        provenance = json.loads((trained.folder / f"artifacts/provenance/{instance}.json").read_text())
        assert provenance["plugins"].keys() == {"my_denoisers:small"}
    provenance = json.loads((trained.folder / "artifacts/provenance/train_robust/real_only-1.json").read_text())
    assert set(provenance["plugins"]) == {"my_nets:Flat", "my_losses:mine"}
    evaluated = json.loads((trained.folder / "artifacts/provenance/evaluate_robust/real_only-1.json").read_text())
    assert set(evaluated["plugins"]) == {"my_nets:Flat", "my_attacks:objective"}
    assert "plugins" not in json.loads((trained.folder / "artifacts/provenance/mix_images/real_only.json").read_text())


@pytest.mark.parametrize(
    ("file", "old", "new", "rerun"),
    [
        ("my_losses", "\n\n\ndef", "\n\n\n# a comment\ndef", set()),
        ("my_losses", "return trades(", "return (trades)(", set()),
        ("my_losses", "def mine(", "MORE = 1\n\n\ndef mine(", {"train-robust"}),
        ("my_parts", "8", "9", {"train-robust", "evaluate-robust"}),
        ("my_attacks", "margin", "cross_entropy", {"evaluate-robust"}),
        ("my_data", "150", "140", {"prepare-data"}),
        ("my_denoisers", "0.0", "0.1", {"train-diffusion", "generate-images"}),
    ],
)
def test_an_edit_outdates_the_results_of_what_uses_it(project, file, old, new, rerun):
    path = project.folder / f"plugins/{file}.py"
    path.write_text(path.read_text().replace(old, new, 1))
    params, workspace = project.load(), find_workspace(project.folder)
    outdated = set()
    for command in STAGES:
        stage = pipeline.STAGES[command.replace("-", "_")]
        instances = {"arm": "real_only", "seed": 1, "generator": "edm", "image_set": "edm18"}
        instance = {name: instances[name] for name in stage.keys}
        if planning.plan(stage, instance, params, workspace).work.name not in project.works(command):
            outdated.add(command)
    assert outdated == rerun


def test_a_change_while_a_stage_runs_publishes_nothing(project, monkeypatch):
    """The plugin changes after the training was planned."""
    path = project.folder / "plugins/my_losses.py"
    text = "import pathlib\npathlib.Path(__file__).write_text(pathlib.Path(__file__).read_text() + '\\nNEW = 1\\n')\n"
    path.write_text(text + path.read_text())
    before = project.works("train-robust")
    output = project.run("train-robust", code=2)
    assert "the code of my_losses:mine changed" in output
    assert len(project.works("train-robust") - before) == 1, "the work is kept"


def test_a_model_from_elsewhere_runs_nothing(trained, monkeypatch, tmp_path):
    """Its sidecar names code of a project that this process did not offer."""
    folder = trained.folder / "artifacts/train_robust/real_only-1"
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DmatError, match=r"'my_nets:Flat' is code of a project; expected one that the params\.yaml"):
        dmat.load_model(folder / "best.safetensors")
    for command in (["models", "info"], ["models", "export", "--to", "robustbench"]):
        arguments = [
            *command, str(folder / "best.safetensors"), *([str(tmp_path / "best.pt")] if "export" in command else [])
        ]  # fmt: skip
        code, text = forked.Command(tmp_path, *arguments).wait()
        assert (code, "Traceback" in text) == (2, False), text
        assert "is code of a project" in text
    assert not [name for name in sys.modules if name.startswith("my_")]
    shown = forked.Command(trained.folder, "models", "info", str(folder / "best.safetensors"), "--json").wait()
    assert (shown[0], json.loads(shown[1])["network"]["name"]) == (0, "my_nets:Flat"), "in the project it may"
    trained.load()
    assert dmat.load_model(folder / "best.safetensors")(torch.rand(3, 1, 8, 8)).shape == (3, 2)


def test_code_that_changes_during_a_study_or_an_evaluation_is_detected(project):
    params = project.load()
    named = plugins.import_paths(params.arms["real_only"].plain())
    study = types.SimpleNamespace(
        settings=params.tune, trial=params.trial, plugins=trials.plugin_identities(params.tune, params.trial)
    )
    request = types.SimpleNamespace(settings=params.evaluate_robust)
    sidecar = {"network": params.arms["real_only"].network.plain()}
    direct = types.SimpleNamespace(request=request, sidecar=sidecar)
    direct._plugin_identities = functools.partial(DirectEvaluation._plugin_identities, direct)
    direct.identity = {"plugins": direct._plugin_identities()}
    assert set(study.plugins) >= {"my_nets:Flat"} <= named
    assert set(direct.identity["plugins"]) == {"my_nets:Flat", "my_attacks:objective"}
    trials.expect_same_plugins(study)
    DirectEvaluation._expect_same_code(direct)
    path = project.folder / "plugins/my_parts.py"
    path.write_text("WIDTH = 9\n")
    with pytest.raises(DmatError, match=r"the code of my_nets:Flat.* changed while the study was running"):
        trials.expect_same_plugins(study)
    with pytest.raises(DmatError, match="the code of my_nets:Flat changed while it was evaluated with"):
        DirectEvaluation._expect_same_code(direct)


def test_reading_params_runs_nothing(trained):
    trained.load()
    assert not [name for name in sys.modules if name.startswith("my_")]


@pytest.mark.parametrize(
    ("import_path", "message"),
    [
        ("nobody:Flat", "expected a module in plugins/, which has no nobody.py"),
        ("a.b:Flat", "which has no a/b.py"),
        ("my_nets:flat", "expected one of"),
        ("my_broken:Flat", "is not valid Python"),
        ("my_nets.py:Flat", "which has no my_nets/py.py"),
        ("my-nets:Flat", "expected 'wide_resnet'"),
        ("../x:Flat", "expected 'wide_resnet'"),
    ],
)
def test_a_missing_plugin_is_refused_with_its_key(project, import_path, message):
    (project.folder / "plugins/my_broken.py").write_text("def (")
    project.params = config.merge(project.params, {"train_robust": {"network": {"name": import_path}}})
    project.write()
    with pytest.raises(ConfigError, match=r"train_robust\.network\.name is") as error:
        project.load()
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("my_losses", "1 / 0\n", "ZeroDivisionError: division by zero; .*my_losses.py, line 1"),
        ("my_losses", "import nothing_of_this_name\n", "ModuleNotFoundError"),
        ("my_losses", "raise SystemExit(0)\n", "SystemExit: 0; .*my_losses.py, line 1"),
        ("my_losses", "mine = 3\ndef mine_(): pass\n", ""),
        ("json", "", "json.py has the name of another package; expected one that is free"),
        ("torch", "", "torch.py has the name of another package"),
        ("yaml/reader", "", "yaml has the name of another package"),
    ],
)
def test_code_that_cannot_be_loaded_is_refused_with_one_message(project, name, text, message):
    path = project.folder / f"plugins/{name}.py"
    path.parent.mkdir(exist_ok=True)
    path.write_text(text + (path.read_text() if path.exists() else ""))
    project.load()
    if not message:
        path.write_text("mine = 3\n")
        message = "my_losses:mine is int; expected a function or a class"
    with pytest.raises(DmatError, match=message):
        plugins.find({}, "my_losses:mine")


def test_two_projects_may_have_modules_of_the_same_name(project, tmp_path):
    other = tmp_path / "other" / "plugins"
    other.mkdir(parents=True)
    (other / "my_parts.py").write_text("def WIDTH(): return 3\n")
    with plugins.of_project(project.folder):
        plugins.offer("my_parts:WIDTH")
    (project.folder / "plugins/my_parts.py").write_text("def WIDTH(): return 8\n")
    assert plugins.find({}, "my_parts:WIDTH")() == 8
    with plugins.of_project(other.parent):
        plugins.offer("my_parts:WIDTH")
    assert plugins.find({}, "my_parts:WIDTH")() == 3


def _load_plugin(folder, import_path):
    with plugins.of_project(folder):
        plugins.offer(import_path)
    return plugins.find({}, import_path)


def test_the_current_content_of_the_folder_is_what_runs(tmp_path):
    """Also after an edit in the same process with bytecode of the same size and time beside the file, and for a package
    with a module of the same name beside it."""
    (tmp_path / "plugins").mkdir()
    path = tmp_path / "plugins/my_x.py"
    for number in (1, 2):
        path.write_text(f"def x(): return {number}\n")
        os.utime(path, (10**9, 10**9))
        py_compile.compile(str(path)) if number == 1 else None
        assert _load_plugin(tmp_path, "my_x:x")() == number
    (tmp_path / "plugins/my_x").mkdir()
    (tmp_path / "plugins/my_x/__init__.py").write_text("from .inner import x\n")
    (tmp_path / "plugins/my_x/inner.py").write_text("def x(): return 3\n")
    assert _load_plugin(tmp_path, "my_x:x")() == 3
    before = code_identity.of_plugins(["my_x:x"], "train_robust")
    (tmp_path / "plugins/my_x/inner.py").write_text("def x(): return 4\n")
    assert code_identity.of_plugins(["my_x:x"], "train_robust") != before
    assert _load_plugin(tmp_path, "my_x:x")() == 4


def test_files_and_modules_that_are_named_in_strings_count(tmp_path):
    (tmp_path / "plugins").mkdir()
    for name, text in (
        ("my_x.py", "import importlib\nOF = 'w.json', importlib.import_module('my_y')\ndef x(): pass\n"),
        *(("my_y.py", "Y = 1\n"), ("w.json", "1"), ("other.json", "1")),
    ):
        (tmp_path / "plugins" / name).write_text(text)
    _load_plugin(tmp_path, "my_x:x")
    identities = [code_identity.of_plugins(["my_x:x"], "train_robust")]
    for name, text in (("other.json", "2"), ("w.json", "2"), ("my_y.py", "Y = 2\n")):
        (tmp_path / "plugins" / name).write_text(text)
        identities.append(code_identity.of_plugins(["my_x:x"], "train_robust"))
    assert [after != before for before, after in itertools.pairwise(identities)] == [False, True, True]


def test_what_the_stage_uses_itself_is_not_hashed_twice(tmp_path, monkeypatch):
    """So that `dmat lock --same` of a stage also keeps the results of arms with plugins."""
    (tmp_path / "plugins").mkdir()
    (tmp_path / "plugins/my_x.py").write_text("from dmat.robust import attacks, losses\ndef x(): pass\n")
    _load_plugin(tmp_path, "my_x:x")
    digest = code_identity.Sources.digest
    hashed = []
    monkeypatch.setattr(
        code_identity.Sources, "digest", lambda self, module: hashed.append(module) or digest(self, module)
    )
    code_identity.of_plugins(["my_x:x"], "train_robust")
    assert hashed == []
    code_identity.of_plugins(["my_x:x"], "prepare_data")
    assert "dmat.robust.losses" in hashed


@pytest.mark.parametrize("name", [".#my_nets.py", "my_nets.v1.py", "__main__.py", "._my_nets.py", "README.md"])
def test_files_that_are_not_modules_are_ignored(project, name):
    path = project.folder / "plugins" / name
    path.symlink_to("nobody@nowhere") if name.startswith(".#") else path.write_text("")
    project.load()
    assert callable(plugins.find({}, "my_nets:Flat"))


@pytest.mark.parametrize(
    "text",
    [
        "if True:\n    def x(): pass\n",
        "try:\n    from nothing import x\nexcept ImportError:\n    x = len\n",
        "w, x = max, min\n",
        "with open(__file__):\n    x = len\n",
        "from math import *\ndef __getattr__(name): return len\n",
        "x: type = int\n",
    ],
)
def test_every_kind_of_definition_is_found(tmp_path, text):
    (tmp_path / "plugins").mkdir()
    (tmp_path / "plugins/my_x.py").write_text(text)
    assert callable(_load_plugin(tmp_path, "my_x:x"))


@pytest.mark.parametrize("import_path", ["my_x:x", f"{'m' * 300}:x"])
@pytest.mark.parametrize(
    "text", ["x: int\n", "return 1\nx = 1\n", f"x = {'+'.join(['1'] * 100_000)}\n", "x = '\x00'\n"]
)
def test_code_that_defines_nothing_is_refused_with_one_message(tmp_path, import_path, text):
    (tmp_path / "plugins").mkdir()
    (tmp_path / "plugins/my_x.py").write_text(text)
    with plugins.of_project(tmp_path), pytest.raises(ValueError, match=r"expected|has no"):
        plugins.offer(import_path)


def test_activations_cannot_be_plugins(project):
    project.params = config.merge(project.params, {"train_robust": {"network": {"activation": "my_parts:WIDTH"}}})
    project.write()
    with pytest.raises(ConfigError, match="activation is 'my_parts:WIDTH'; expected 'relu', 'silu' or 'gelu'"):
        project.load()


def test_an_evaluation_of_a_file_resumes_only_with_the_same_code(project, tmp_path):
    model = "artifacts/train_robust/real_only-1/best.safetensors"
    sidecar = json.loads((project.folder / model).with_suffix(".json").read_text())
    images = np.random.default_rng(0).integers(0, 256, (20, *sidecar["image_shape"]), np.uint8)
    labels = np.arange(20) % 2
    np.savez(tmp_path / "some.npz", image=images, label=labels)
    arguments = ["evaluate-robust", "--model", model, "--images", str(tmp_path / "some.npz"), "--params", "params.yaml"]
    arguments += ["--to", str(tmp_path / "found"), "--json", "--classes-in-order"]
    code, text = forked.Command(project.folder, *arguments).wait()
    assert code == 0, text
    path = project.folder / "plugins/my_attacks.py"
    path.write_text(path.read_text().replace("margin", "cross_entropy"))
    code, text = forked.Command(project.folder, *arguments).wait()
    assert (code, "holds another evaluation (plugins differ)" in text) == (2, True), text


def test_outside_a_project_import_paths_are_refused():
    assert any("from the params.yaml of a project alone" in problem for problem in _problems("somewhere:Net"))
    assert plugins.import_paths({"a": ["somewhere:Net", {"b": "c:d"}]}) == set()


def _problems(import_path: str) -> list[str]:
    values = yaml.safe_load((ROOT / "params.yaml").read_text())
    values["train_robust"]["network"]["name"] = import_path
    return config.check(values)[1]
