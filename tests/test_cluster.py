"""The scripts of slurm/ with stand-ins for SLURM's commands: shares of shards, requeueing, a training of two tasks."""

import os
import re
import signal
import subprocess
import sys

import psutil
import pytest
import yaml

from tests import fork_server, slurm
from tests.conftest import ROOT
from tests.forked import until
from tests.projects import STAGE_OPTIONS
from tests.servers import free_port, kill

JOB, RANK = ROOT / "slurm/job.sh", ROOT / "slurm/rank.sh"
TRAINING = ["dmat", "train-robust", *STAGE_OPTIONS["train_robust"], "--json"]
ENDS_BY_ITSELF = "import sys; sys.exit(int(sys.argv[1]))"
SAVES = """
import pathlib, signal, sys, time
if pathlib.Path("saved").exists():
    sys.exit(0)
def save(*_):
    pathlib.Path("saved").touch()
    time.sleep(0.3)
    sys.exit(75)
signal.signal(signal.SIGUSR1, save)
pathlib.Path("begun").touch()
while True:
    time.sleep(0.02)
"""


@pytest.fixture
def start(tmp_path):
    """Starts a command in a folder, with SLURM's on PATH, and `dmat` where it is named. It ends with the test."""
    programs, started = slurm.install(tmp_path / "slurm-bin"), []

    def run(*command, folder=tmp_path, **environment):
        folders = [programs, *([fork_server.folder()] if "dmat" in command else [])]  # it takes a while to start
        path = ":".join(map(str, [*folders, os.environ["PATH"]]))
        process = subprocess.Popen(
            [str(part) for part in command], cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env=os.environ | {"PATH": path, "PYTHONPATH": str(ROOT), **environment},
        )  # fmt: skip
        started.append(process)
        return process

    run.programs = programs
    yield run
    for process in started:
        kill(process)


@pytest.mark.parametrize(("shards", "tasks"), [(10, 3), (1000, 64), (2, 5), (7, 7)])
def test_the_tasks_of_an_array_divide_all_shards(start, shards, tasks):
    process = start("sbatch", f"--array=5-{tasks + 4}", JOB, "echo", SHARDS=str(shards))
    text, _ = process.communicate(timeout=120)
    assert process.returncode == 0, text
    ranges = [range(int(first), int(end)) for first, end in re.findall(r"--shards (\d+):(\d+)", text)]
    assert [number for numbers in ranges for number in numbers] == [*range(shards)]
    assert max(map(len, ranges)) - min(map(len, ranges)) <= 1


@pytest.mark.parametrize("code", [0, 2, 75, 130])
def test_only_a_command_that_asks_for_it_is_requeued(start, code):
    process = start(JOB, sys.executable, "-c", ENDS_BY_ITSELF, code, SLURM_JOB_ID="77")
    process.communicate(timeout=60)
    assert process.returncode == code
    requeued = start.programs / "requeued"
    assert requeued.exists() == (code == 75)
    assert code != 75 or requeued.read_text() == "77"


def test_a_signal_reaches_the_command_which_saves_and_resumes_in_the_next_job(start, tmp_path):
    process = start("sbatch", "--gpus=1", JOB, sys.executable, "-c", SAVES)
    until((tmp_path / "begun").exists)
    (job,) = _children(process)
    os.kill(job, signal.SIGUSR1)
    text, _ = process.communicate(timeout=60)
    assert process.returncode == 0, text
    assert (tmp_path / "saved").exists()
    assert (start.programs / "requeued.started").exists()


def test_an_array_evaluates_what_one_command_does(start, finished, tmp_path):
    project = finished.copy_without("evaluate_robust", tmp_path / "project")
    options = ["evaluate-robust", *STAGE_OPTIONS["evaluate_robust"], "--json"]
    array = start("sbatch", "--array=0-2", JOB, "dmat", *options, folder=project.folder, SHARDS="8")
    text, _ = array.communicate(timeout=600)
    assert array.returncode == 0, text
    assert re.findall(r'"shards": \[(\d), (\d)\]', text) == [("0", "2"), ("2", "5"), ("5", "8")]
    assert not (project.folder / "artifacts/evaluate_robust/generated-1").exists()
    project.run("evaluate_robust")
    assert project.outputs("evaluate_robust") == finished.outputs("evaluate_robust")


@pytest.fixture
def training(finished, tmp_path):
    """A project whose training divides among processes."""
    project = finished.copy_without("train_robust", tmp_path / "project")
    project.write({"train_robust": {"images_seen": 1280, "evaluate_every": 320, "synchronise_batch_norm": True}})
    project.run("mix_images")
    return project


def test_a_training_of_two_tasks_is_requeued_and_resumes_bit_for_bit(start, training, tmp_path):
    undisturbed = training.copy_without("train_robust", tmp_path / "undisturbed")
    command = ["sbatch", "--nodes=1", JOB, "srun", "--ntasks=2", RANK, *TRAINING]
    for project, stop in ((undisturbed, False), (training, True)):
        process = start(*command, folder=project.folder)
        if stop:
            # a checkpoint follows a step, so both tasks are in the training
            until(lambda: list((training.folder / "runs/train_robust").glob("*/checkpoint.dmat")), 300)
            (job,) = _children(process)
            os.kill(job, signal.SIGUSR1)
        text, _ = process.communicate(timeout=600)
        assert process.returncode == 0, text
        assert (start.programs / "requeued.started").exists() == stop, text
    assert training.outputs("train_robust") == undisturbed.outputs("train_robust")


@pytest.mark.slow
def test_two_torchrun_train_one_model(start, training):
    options = ["--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{free_port()}"]
    launch = [sys.executable, "-m", "torch.distributed.run", *options, "-m", "cli.main", *TRAINING[1:]]
    hosts = [start(*launch, folder=training.folder, PYTHONSAFEPATH="1", DMAT_TRACKING="off") for _ in range(2)]
    texts = [host.communicate(timeout=900)[0] for host in hosts]
    assert [host.returncode for host in hosts] == [0, 0], texts
    assert "best_validation_robust" in "".join(texts)
    assert (training.folder / "artifacts/metrics/train_robust/generated-1.json").exists()


def test_the_pods_of_the_page_divide_all_shards(tmp_path):
    """The job of docs/cluster.md, as bash in each of its pods would run it."""
    (text,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs/cluster.md").read_text(), re.DOTALL)
    job = yaml.safe_load(text)["spec"]
    container = job["template"]["spec"]["containers"][0]
    variables = {entry["name"]: entry["value"] for entry in container["env"]}
    assert int(variables["TASKS"]) == job["completions"]
    (tmp_path / "dmat").write_text('#!/bin/sh\necho "$@"\n')
    (tmp_path / "dmat").chmod(0o755)
    end = 0
    for index in range(job["completions"]):
        environment = variables | {"JOB_COMPLETION_INDEX": str(index), "PATH": f"{tmp_path}:{os.environ['PATH']}"}
        printed = subprocess.run(
            container["command"] + container["args"], env=environment, capture_output=True, text=True, check=True
        ).stdout
        first, stop = map(int, re.search(r"--shards (\d+):(\d+)$", printed.strip()).groups())
        assert first == end
        end = stop
    assert end == int(variables["SHARDS"])


def _children(process):
    return [child.pid for child in psutil.Process(process.pid).children()]
