"""Shards of a stage in workers: the bytes of the process alone, and refusals of workers that would compute others."""

import csv
import dataclasses
import json
import os
import shutil

import pytest
import torch

from dmat import config, devices
from dmat.engine import EngineOptions, open_engine, tasks
from dmat.errors import DmatError
from dmat.pipeline import STAGES, division, execution, planning
from dmat.workspace import find_workspace
from tests.projects import STAGE_OPTIONS

DIVIDED = [stage for stage in STAGES.values() if stage.by_shards]
EVALUATION = ("--arm", "generated", "--seed", "1")


@pytest.fixture(scope="module")
def cluster():
    with open_engine(EngineOptions(workers=2, allowed_failures=0)) as engine:
        yield engine


@pytest.fixture
def dmat(cluster, call, monkeypatch):
    """Runs a command of a project in this process, which divides its shards over the workers of the cluster."""
    monkeypatch.setenv(tasks.CLUSTER_VARIABLE, cluster.environment[tasks.CLUSTER_VARIABLE])

    def run(folder, *arguments):
        monkeypatch.chdir(folder)
        return call(*arguments)

    return run


@pytest.fixture
def project(finished, tmp_path):
    """A project whose generated images, scores and evaluations are still to be computed."""
    project = finished.copy_without("generate_images", tmp_path / "project")
    for stage in DIVIDED:
        for folder in (f"artifacts/{stage.name}", f"artifacts/metrics/{stage.name}", f"runs/{stage.name}"):
            shutil.rmtree(project.folder / folder, ignore_errors=True)
    shutil.rmtree(project.folder / "runs/pools")
    return project


def planned(project, name="generate_images"):
    """The plan of an instance, its parameters and its workspace."""
    params, workspace = config.load(project.folder / "params.yaml"), find_workspace(project.folder)
    instance = STAGES[name].all_instances(params)[0]
    return planning.plan(STAGES[name], instance, params, workspace), params, workspace


def test_shards_of_workers_are_those_of_one_process(finished, project, dmat):
    assert [stage.name for stage in DIVIDED] == ["generate_images", "score_images", "evaluate_robust"]
    for stage in DIVIDED:
        code, out, err = dmat(project.folder, stage.command, *STAGE_OPTIONS[stage.name], "--json")
        assert code == 0, out + err
        assert project.outputs(stage.name) == finished.outputs(stage.name)
    (record,) = (project.folder / "artifacts/provenance/generate_images").glob("*.json")
    assert json.loads(record.read_text())["measured"]["shards_made"] == 0  # by the driver


def test_a_model_that_no_stage_made_is_evaluated_in_workers(finished, tmp_path, dmat):
    for suffix in (".safetensors", ".json"):
        source = finished.folder / "artifacts/train_robust/generated-1"
        shutil.copy(source / f"best{suffix}", tmp_path / f"model{suffix}")
    shutil.copytree(finished.folder / "artifacts/prepare_data/test", tmp_path / "test")
    options = ("evaluate-robust", "--model", "model.safetensors", "--images", "test", "--attacks", "none", "--json")
    code, out, err = dmat(tmp_path, *options, "--first", "20")
    assert code == 0, out + err
    shards = {path.name: path.read_bytes() for path in (tmp_path / "model-evaluation/work").glob("*.npz")}
    assert len(shards) >= 2
    os.environ.pop(tasks.CLUSTER_VARIABLE)
    assert dmat(tmp_path, *options, "--first", "20", "--to", "alone")[0] == 0
    assert {path.name: path.read_bytes() for path in (tmp_path / "alone/work").glob("*.npz")} == shards


def test_trials_on_a_cluster_are_those_of_one_process(finished, tmp_path, cluster, call, monkeypatch):
    """Both are ranked, too. A driver that started with a cluster may end without."""
    results = []
    for name, options in (("cluster", ("--cluster", cluster.environment[tasks.CLUSTER_VARIABLE])), ("alone", ())):
        study = finished.copy_without("nothing", tmp_path / name)
        study.write({"tune": {"pruner": "none", "rerank": 1}, "evaluate_robust": {"auto_attack": ["apgd-ce"]}})
        monkeypatch.chdir(study.folder)
        code, out, err = call("tune", "start", "--trials", "2", "--json", *options)
        assert code == 0, out + err
        with (study.folder / "artifacts/tune/generated/trials.csv").open() as file:
            rows = [{**row, "seconds": ""} for row in csv.DictReader(file)]
        logs = sorted((study.folder / "runs/tune").glob("generated-*/trial-*/metrics.jsonl"))
        results.append((rows, [path.read_text() for path in logs], json.loads(out)["ranked"]))
    assert results[0] == results[1]
    rows, logs, ranked = results[0]
    assert [row["state"] for row in rows] == ["COMPLETE"] * 2
    assert (len(logs), len(ranked)) == (2, 1)
    code, out, err = call("tune", "start", "--trials", "3", "--json")
    assert (code, json.loads(out)["complete"]) == (0, 3), err


def test_an_error_in_a_worker_is_that_of_the_command(project, dmat):
    project.write({"image_sets": {"edm18": {"sampler": {"guidance": 3.0}}}})
    code, _, err = dmat(project.folder, "generate-images", "--image-set", "edm18", "--json")
    assert (code, err.count("error: ")) == (2, 1)
    assert "sampler.guidance is 3.0" in err


def test_a_worker_with_other_inputs_refuses(project):
    plan, params, workspace = planned(project)
    compute = division.WorkerCompute.of(execution.resolve(params))
    path = str(project.folder / "params.yaml")
    request = division._ShardRequest(workspace, path, plan.stage.name, plan.instance, "0" * 32, compute, False)
    with pytest.raises(DmatError, match="would compute generate_images edm18 from other parameters or inputs"):
        division._compute_shard(None, request, 0)
    elsewhere = dataclasses.replace(request, params="/elsewhere/params.yaml")
    with pytest.raises(DmatError, match=r"finds no /elsewhere/params\.yaml"):
        division._compute_shard(None, elsewhere, 0)


def test_a_worker_with_another_torch_or_without_the_device_refuses(monkeypatch):
    compute = division.WorkerCompute.of(devices.resolve("cpu", "fp32", 1))
    assert compute.resolve() == devices.resolve("cpu", "fp32", 1)
    with pytest.raises(DmatError, match=r"has torch .*, the driver 1\.0; expected the same"):
        dataclasses.replace(compute, torch="1.0").resolve()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DmatError, match="torch finds no CUDA device"):
        dataclasses.replace(compute, device="cuda").resolve()


@pytest.mark.parametrize(
    ("workers", "threads", "expected"), [(0, 0, 0), (1, 0, 0), (2, 0, 4), (4, 0, 2), (16, 0, 1), (2, 3, 3)]
)
def test_local_workers_divide_the_cores(project, monkeypatch, workers, threads, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(8))
    project.write({"compute": {"threads": threads}})
    params = config.load(project.folder / "params.yaml")
    assert division.with_threads_divided(params, EngineOptions(workers)).compute.threads == expected


@pytest.mark.parametrize(
    ("written", "options", "expected"),
    [
        (0, (), None),
        (3, (), EngineOptions(3)),
        (3, ("--workers", "0"), None),
        (3, ("--workers", "2"), EngineOptions(2)),
        (3, ("--cluster", "tls://host:1"), EngineOptions(0, "tls://host:1")),
    ],
)
def test_where_shards_are_computed(project, monkeypatch, call, written, options, expected):
    """`compute.workers` holds where the command line says nothing; a cluster never has local workers beside it."""
    asked = []
    monkeypatch.setattr(division, "compute_shards", lambda *_, options, **more: asked.append(options))
    monkeypatch.chdir(project.folder)
    project.write({"compute": {"workers": written}})
    code, out, err = call("generate-images", "--image-set", "edm18", "--json", *options)
    assert code == 0, out + err
    assert asked == ([] if expected is None else [expected])


def test_each_worker_has_one_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert division.gpu_environments() == ({"CUDA_VISIBLE_DEVICES": "0"}, {"CUDA_VISIBLE_DEVICES": "1"})
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    assert division.gpu_environments() == ({"CUDA_VISIBLE_DEVICES": "5"}, {"CUDA_VISIBLE_DEVICES": "7"})
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert division.gpu_environments() == ({},)
