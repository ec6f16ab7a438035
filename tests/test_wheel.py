"""dmat as people install it: a wheel in an environment without the repository, and a project that `dmat init` made."""

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
    """Built from a copy: setuptools leaves folders beside what it builds, and takes what an earlier build left."""
    from tests.conftest import ROOT

    copy, built = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, names.split("\0")):
        if os.path.lexists(ROOT / name):
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy / name, follow_symlinks=False)
    script = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", script, str(built)], cwd=copy, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    (found,) = built.glob("*.whl")
    return found


def test_the_wheel_holds_all_data_of_the_packages(wheel, root):
    """And what is a link in the repository is a file there."""
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
    """Studies and database drivers come with extras; what the mission names comes always."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        lines = archive.read(name).decode().splitlines()
    needed = [line.removeprefix("Requires-Dist: ") for line in lines if line.startswith("Requires-Dist: ")]
    plain = {line.split("<")[0].split(">")[0].split("=")[0] for line in needed if "extra ==" not in line}
    assert {"torch", "torchvision", "mlflow", "dvc", "typer", "pyautoattack"} <= plain
    assert plain & {"optuna", "optuna-dashboard", "sqlalchemy", "scipy", "psycopg[binary]", "dvc-s3", "pytest"} == set()
    assert {line.removeprefix("Provides-Extra: ") for line in lines if line.startswith("Provides-Extra")} == {
        *("tune", "team", "all", "dev"),
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
        words = [uv, "pip", "install", "--quiet", "--offline", "--no-deps", "--python", self.bin / "python", wheel]
        subprocess.run(words, check=True)

    def start(self, *words: str, at: Path) -> subprocess.CompletedProcess[str]:
        path = f"{self.bin}:{Path(sys.executable).parent}:{os.environ['PATH']}"
        environment = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "DVC_NO_ANALYTICS": "1"}
        environment.pop("PYTHONPATH", None)
        return subprocess.run(
            [str(self.bin / words[0]), *words[1:]], cwd=at, env=environment, capture_output=True, text=True, check=False
        )

    def run(self, *words: str, at: Path, code: int = 0) -> str:
        done = self.start(*words, at=at)
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout

    def ask(self, script: str) -> str:
        return self.run("python", "-c", script, at=self.bin).strip()


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Installed:
    return Installed(tmp_path_factory.mktemp("environment") / "venv", wheel)


def test_the_wheel_is_what_runs(installed, root):
    module = Path(installed.ask("import dmat; print(dmat.__file__)"))
    assert module.is_relative_to(installed.bin.parent)
    assert installed.ask("from dmat.tracking import origin; print(origin.code())") == dmat.__version__
    # the processes that dmat starts find it without a path that would put all packages before Python's own modules
    script = "from dmat.tracking import sender; print([sender.python('')['env']['PYTHONPATH']])"
    assert installed.ask(script) == "['']"


@pytest.fixture
def project(installed, tmp_path, tiny_params) -> Path:
    """Made by `dmat init`, with parameters for seconds and a folder of its owner that is called as one of dmat's, and
    committed."""
    said = installed.run("dmat", "init", "mine", at=tmp_path)
    assert said.splitlines()[1].endswith("dvc repro")
    folder = tmp_path / "mine"
    (folder / "cli").mkdir()
    (folder / "cli" / "__init__.py").write_text("raise SystemExit('the wrong cli')\n")
    tiny_params["compute"] = {**tiny_params.get("compute", {}), "processes": 2}
    (folder / "params.yaml").write_text(yaml.safe_dump(tiny_params, sort_keys=False))
    for words in (["add", "--all"], ["-c", "user.name=t", "-c", "user.email=t@example.org", "commit", "-qm", "one"]):
        subprocess.run(["git", *words], cwd=folder, check=True)
    return folder


def _repro(installed: Installed, project: Path, *stages: str) -> list[str]:
    """Names of the stages that ran."""
    said = installed.run("python", "-m", "dvc", "repro", *stages, at=project)
    return [line.split("'")[1] for line in said.splitlines() if line.startswith("Running stage")]


def test_stages_run_in_a_project_without_the_repository(installed, project):
    """Once; and the project says which dmat computed."""
    stages = ["prepare_data", "train_scorer"]
    assert _repro(installed, project, *stages) == stages
    assert _repro(installed, project, *stages) == []
    for stage in stages:
        provenance = json.loads((project / f"artifacts/provenance/{stage}/all.json").read_text())
        assert provenance["dmat"] == dmat.__version__
        assert provenance["git_dirty"] is False
    changed = subprocess.run(["git", "status", "--short"], cwd=project, capture_output=True, text=True, check=True)
    assert changed.stdout == "?? dvc.lock\n"
    doctor = installed.start("dmat", "doctor", at=project).stdout
    assert "no constraints.txt to compare with" in doctor
    assert "the check itself failed" not in doctor
    _upgrade(installed, project, stages)


def _upgrade(installed: Installed, project: Path, stages: list[str]) -> None:
    """Another version of dmat reruns what it computes otherwise, once its owner says so, and nothing else."""
    module = Path(installed.ask("import dmat.modes; print(dmat.modes.__file__)"))
    before = module.read_text()
    module.write_text(before + "\n# Of the next version.\n")
    assert _repro(installed, project, *stages) == []
    module.write_text(before.replace("layer.momentum = momentum", "layer.momentum = 1 - momentum"))
    assert module.read_text() != before
    refused = installed.start("dmat", "train-scorer", at=project)
    assert (refused.returncode, "run `dmat lock`" in refused.stderr) == (2, True), refused.stderr
    assert _repro(installed, project, *stages) == [], "the results are still those of the code that code.yaml names"
    changed = [line.split()[0] for line in installed.run("dmat", "lock", at=project).splitlines() if "->" in line]
    assert set(changed) == {"train_scorer", "train_diffusion", "train_robust"}
    assert _repro(installed, project, *stages) == ["train_scorer"]


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_project_runs_to_its_report_without_the_repository(installed, project):
    """The whole of `dvc repro` takes minutes; a second one runs nothing."""
    assert len(_repro(installed, project)) == 14
    page = (project / "artifacts/write_report/report/report.html").read_text()
    assert f"by dmat {dmat.__version__}" in page
    assert _repro(installed, project) == []
