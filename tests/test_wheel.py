"""dmat as users install it: a wheel in an environment without the repository, and a project from `dmat init`."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
import yaml

import dmat


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """A wheel built from a copy: setuptools leaves folders beside the source and reuses those of an earlier build."""
    from tests.conftest import ROOT

    copy, built = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, names.split("\0")):
        if os.path.lexists(ROOT / name):
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy / name, follow_symlinks=False)
    script = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
    result = subprocess.run(
        [sys.executable, "-c", script, str(built)], cwd=copy, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    (wheel_path,) = built.glob("*.whl")
    return wheel_path


def test_the_wheel_holds_all_data_of_the_packages(wheel, root):
    """Links of the repository are files in the wheel."""
    with zipfile.ZipFile(wheel) as archive:
        sizes = {entry.filename: entry.file_size for entry in archive.infolist()}
        pipeline = archive.read("dmat/project/pipeline.yaml").decode()
    tracked = subprocess.run(["git", "ls-files", "dmat", "cli"], cwd=root, capture_output=True, text=True, check=True)
    expected = {name for name in tracked.stdout.splitlines() if (root / name).is_file()}
    assert len([name for name in expected if not name.endswith(".py")]) >= 12
    assert {name for name in sizes if ".dist-info/" not in name} == expected
    assert {name: size for name, size in sizes.items() if name in expected} == {
        name: (root / name).stat().st_size for name in expected
    }
    assert pipeline == (root / "dvc.yaml").read_text()


def test_a_plain_install_is_light(wheel):
    """Studies and database drivers need extras; the core packages are always installed."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        lines = archive.read(name).decode().splitlines()
    needed = [line.removeprefix("Requires-Dist: ") for line in lines if line.startswith("Requires-Dist: ")]
    plain = {line.split("<")[0].split(">")[0].split("=")[0] for line in needed if "extra ==" not in line}
    assert {"torch", "torchvision", "mlflow", "dvc", "typer", "pyautoattack"} <= plain
    assert plain.isdisjoint(
        {"optuna", "optuna-dashboard", "sqlalchemy", "scipy", "psycopg[binary]", "dvc-s3", "pytest", "torchmetrics"}
        | {"dask", "distributed", "dask-jobqueue"}
    )
    assert {line.removeprefix("Provides-Extra: ") for line in lines if line.startswith("Provides-Extra")} == {
        *("tune", "team", "measures", "cluster", "services", "all", "dev"),
    }


class Installed:
    """An environment with the wheel, the packages of this one and nothing of the repository."""

    def __init__(self, folder: Path, wheel: Path):
        venv.create(folder, with_pip=False)
        self.bin = folder / "bin"
        site = self.ask("import sysconfig; print(sysconfig.get_path('purelib'))")
        # Packages of a folder that a .pth file names are found; its own .pth files, such as the editable one, are not.
        (Path(site) / "shared.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
        uv = Path(sys.executable).with_name("uv")
        arguments = [uv, "pip", "install", "--quiet", "--offline", "--no-deps", "--python", self.bin / "python", wheel]
        subprocess.run(arguments, check=True)

    def start(self, *arguments: str, directory: Path) -> subprocess.CompletedProcess[str]:
        path = f"{self.bin}:{Path(sys.executable).parent}:{os.environ['PATH']}"
        environment = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "DVC_NO_ANALYTICS": "1"}
        environment.pop("PYTHONPATH", None)
        return subprocess.run(
            [str(self.bin / arguments[0]), *arguments[1:]],
            cwd=directory,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )

    def run(self, *arguments: str, directory: Path, code: int = 0) -> str:
        result = self.start(*arguments, directory=directory)
        assert result.returncode == code, result.stdout + result.stderr
        return result.stdout

    def ask(self, script: str) -> str:
        return self.run("python", "-c", script, directory=self.bin).strip()


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Installed:
    return Installed(tmp_path_factory.mktemp("environment") / "venv", wheel)


def test_the_wheel_is_what_runs(installed, root):
    module = Path(installed.ask("import dmat; print(dmat.__file__)"))
    assert module.is_relative_to(installed.bin.parent)
    assert installed.ask("from dmat.tracking import origin; print(origin.code())") == dmat.__version__
    # the processes that dmat starts find it without a path that would put all packages before Python's own modules
    script = "from dmat.tracking import sender; print([sender.popen_options('.')['env']['PYTHONPATH']])"
    assert installed.ask(script) == "['']"


# A network of the project, which several processes train.
NETWORK = """
import torch
from torch import nn

from dmat.robust.networks import Classifier, Normalise


class Small(Classifier):
    def __init__(self, data_spec):
        super().__init__()
        self.normalise = Normalise(data_spec.mean, data_spec.std)
        self.convolution = nn.Conv2d(data_spec.channels, 8, 3, padding=1)
        self.logits = nn.Linear(8, data_spec.classes)

    def features(self, images):
        return torch.relu(self.convolution(self.normalise(images))).mean((2, 3))


def small(data_spec, depth, width, activation):
    return Small(data_spec)
"""


@pytest.fixture
def project(installed, tmp_path, tiny_params) -> Path:
    """A committed project from `dmat init`, with parameters for seconds, its own network, and a folder of the user that
    has the name of one of dmat's packages."""
    output = installed.run("dmat", "init", "mine", directory=tmp_path)
    assert output.splitlines()[1].endswith("dvc repro")
    folder = tmp_path / "mine"
    (folder / "cli").mkdir()
    (folder / "cli" / "__init__.py").write_text("raise SystemExit('the wrong cli')\n")
    (folder / "plugins" / "my_nets.py").write_text(NETWORK)
    tiny_params["train_scorer"]["network"]["name"] = "my_nets:small"
    tiny_params["arms"]["generated"]["network"] = {"name": "my_nets:small"}
    tiny_params["compute"] = {**tiny_params.get("compute", {}), "processes": 2}
    (folder / "params.yaml").write_text(yaml.safe_dump(tiny_params, sort_keys=False))
    for arguments in (
        ["add", "--all"],
        ["-c", "user.name=t", "-c", "user.email=t@example.org", "commit", "-qm", "one"],
    ):
        subprocess.run(["git", *arguments], cwd=folder, check=True)
    return folder


def _repro(installed: Installed, project: Path, *stages: str) -> list[str]:
    """Names of the stages that ran."""
    output = installed.run("python", "-m", "dvc", "repro", *stages, directory=project)
    return [line.split("'")[1] for line in output.splitlines() if line.startswith("Running stage")]


def test_stages_run_in_a_project_without_the_repository(installed, project):
    """Each stage runs once, and its provenance names the dmat that computed it."""
    stages = ["prepare_data", "train_scorer"]
    assert _repro(installed, project, *stages) == stages
    assert _repro(installed, project, *stages) == []
    for stage in stages:
        provenance = json.loads((project / f"artifacts/provenance/{stage}/all.json").read_text())
        assert provenance["dmat"] == dmat.__version__
        assert provenance["git_dirty"] is False
        assert list(provenance.get("plugins", {})) == (["my_nets:small"] if stage == "train_scorer" else [])
    changed = subprocess.run(["git", "status", "--short"], cwd=project, capture_output=True, text=True, check=True)
    assert changed.stdout == "?? dvc.lock\n"
    doctor = installed.start("dmat", "doctor", directory=project).stdout
    assert "no constraints.txt to compare with" in doctor
    assert "the check itself failed" not in doctor
    _upgrade(installed, project, stages)


def _upgrade(installed: Installed, project: Path, stages: list[str]) -> None:
    """Another version of dmat reruns, after `dmat lock`, exactly the stages that it computes otherwise."""
    params = yaml.safe_load((project / "params.yaml").read_text())
    params["compute"]["processes"] = 1  # no dependency of a stage, and less to import
    (project / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    module = Path(installed.ask("import dmat.modes; print(dmat.modes.__file__)"))
    before = module.read_text(encoding="utf-8")
    module.write_text(before + "\n# Of the next version.\n", encoding="utf-8")
    assert _repro(installed, project, *stages) == []
    module.write_text(before.replace("layer.momentum = momentum", "layer.momentum = 1 - momentum"), encoding="utf-8")
    assert module.read_text(encoding="utf-8") != before
    refusal = installed.start("dmat", "train-scorer", directory=project)
    assert (refusal.returncode, "run `dmat lock`" in refusal.stderr) == (2, True), refusal.stderr
    assert _repro(installed, project, *stages) == [], "the results are still those of the code that code.yaml names"
    changed = [
        line.split()[0] for line in installed.run("dmat", "lock", directory=project).splitlines() if "->" in line
    ]
    assert set(changed) == {"train_scorer", "train_diffusion", "train_robust"}
    assert _repro(installed, project, *stages) == ["train_scorer"]


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_project_runs_to_its_report_without_the_repository(installed, project):
    """A complete `dvc repro` takes minutes; a second one runs nothing."""
    assert len(_repro(installed, project)) == 14
    page = (project / "artifacts/write_report/report/report.html").read_text()
    assert f"by dmat {dmat.__version__}" in page
    assert _repro(installed, project) == []
