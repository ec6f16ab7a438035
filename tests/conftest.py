"""Fixtures of all tests. Each process has one thread: tests run in parallel and would compete for the two cores."""

import multiprocessing
import os
import shutil
import sys
from pathlib import Path

import psutil
import pytest
import torch
import yaml

ROOT = Path(__file__).parent.parent

os.environ["DMAT_TRACKING"] = "off"  # tests of tracking switch it on
torch.set_num_threads(1)


# Files whose tests take minutes, the longest first: a long file that starts last leaves the other core idle.
SLOWEST_FIRST = (
    *("pipeline", "tuning", "processes", "resume", "wheel", "evaluate_command", "auto_attack", "published_denoisers"),
    *("kills", "tracking", "growth", "evaluation", "image_sets", "refusals", "code_identity", "schedule_search"),
    *("unconditional", "models", "reproducing", "ui"),
)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Ends what failed tests left running."""
    from tests.servers import command_line, kill_tree

    if session.config.getoption("numprocesses", None) and not hasattr(session.config, "workerinput"):
        return  # its children are the workers of xdist, which do this themselves
    children = psutil.Process().children()
    own = [child for child in children if "multiprocessing" not in " ".join(command_line(child))]  # not its servers
    for process in (*own, *multiprocessing.active_children()):
        kill_tree(process.pid)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    positions = {f"test_{name}.py": position for position, name in enumerate(SLOWEST_FIRST)}
    items.sort(key=lambda test: positions.get(test.path.name, len(SLOWEST_FIRST)))  # keeps the order within a file


@pytest.fixture(autouse=True)
def one_thread():
    """Commands that run in the process of the tests set the number of threads for all that follow."""
    yield
    torch.set_num_threads(1)


@pytest.fixture
def root() -> Path:
    """The repository."""
    return ROOT


@pytest.fixture
def tiny_params() -> dict:
    """params.yaml of the repository with values so small that every stage takes about a second."""
    return _tiny_params()


@pytest.fixture(scope="module")
def tiny_params_once() -> dict:
    """`tiny_params` for fixtures that live as long as a test file."""
    return _tiny_params()


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A project in which every stage but the report has run once without interruption. Tests work on copies."""
    from tests import built_once
    from tests.projects import STAGE_OPTIONS, Project

    params = _tiny_params()
    params["compute"]["save_every_seconds"] = 0.05
    params["evaluate_robust"] |= {"auto_attack": "standard", "shard": 5}

    def build(folder):
        project = Project(folder, params)
        for stage_name in STAGE_OPTIONS:
            project.run(stage_name)

    return Project(built_once.folder(tmp_path_factory, "finished", build), params, is_new=False)


@pytest.fixture(scope="session")
def put_store(tmp_path_factory):
    """Puts an embedded MLflow store without runs into a project. MLflow takes more than a second to create one."""
    from dmat import tracking
    from tests import built_once

    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        store = built_once.folder(tmp_path_factory, "store", tracking.connect) / "mlruns" / "mlflow.db"

    def put(home):
        (home / "mlruns").mkdir(parents=True, exist_ok=True)
        shutil.copy(store, home / "mlruns")

    return put


def _tiny_params() -> dict:
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    params["compute"] |= {"threads": 1, "precision": "fp32", "save_every_seconds": 0.5}
    params["prepare_data"] |= {"train": 100, "validation": 50, "test": 40}
    params["train_scorer"] |= {"images_seen": 2560, "evaluate_every": 1280}
    params["train_diffusion"] |= {"images_seen": 1024, "batch": 64, "log_every": 256}
    params["train_diffusion"]["network"]["channels"] = 8
    params["generate_images"] |= {"shard": 50, "block": 25, "sampler": {"name": "heun", "steps": 3}}
    params["image_sets"]["edm18"]["images"] = 100
    params["measure_images"] |= {"images": 60}
    params["train_robust"] |= {
        "images_seen": 640,
        "batch": 64,
        "evaluate_every": 320,
        "schedule_every": 64,
        "attack_steps": 2,
        "selection_steps": 2,
    }
    params["evaluate_robust"] |= {"pgd_steps": 3, "shard": 20, "batch": 20, "auto_attack": "none",
                                  "sweep": [2.0], "check_images": 10, "check_queries": 20}  # fmt: skip
    params["write_report"] |= {"bootstrap": 100}
    params["tune"] |= {"images_seen": 640, "evaluate_every": 128, "warmup_images": 0, "startup_trials": 2,
                       "overrides": {}, "sampler": "tpe", "pruner": "median", "rerank": 0}  # fmt: skip
    return params


@pytest.fixture(scope="session")
def postgres():
    """A real PostgreSQL server."""
    from tests.databases import server

    with server() as database:
        yield database


@pytest.fixture
def call(monkeypatch, capsys):
    """Runs `dmat <arguments>` in this process; returns exit code, standard output and standard error."""

    from cli.main import main

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["dmat", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_info:
            main()
        out, err = capsys.readouterr()
        return exit_info.value.code, out, err

    return run
