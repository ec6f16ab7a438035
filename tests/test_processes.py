"""Several processes compute what one computes with the same global batch, and survive the end of one of them."""

import json
import os
import signal
import socket
import subprocess
import sys

import psutil
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from dmat import processes
from dmat.processes import World
from tests import forked, servers
from tests.projects import STAGE_OPTIONS


def _untrained(finished, folder):
    copy = finished.copy_without("train_robust", folder)
    copy.write({"train_robust": {"images_seen": 1280, "evaluate_every": 320, "synchronise_batch_norm": True}})
    copy.run("mix_images")
    return copy


@pytest.fixture
def project(finished, tmp_path):
    return _untrained(finished, tmp_path / "project")


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


def start(project, size, stage_name="train_robust", ranks=None):
    """Starts the processes of one run, or those of `ranks`, as torchrun would."""
    port, stage = free_port(), stage_name.replace("_", "-")
    return [
        forked.Command(
            project.folder,
            stage,
            *STAGE_OPTIONS[stage_name],
            "--json",
            output=f".output-{rank}",
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(size),
            LOCAL_WORLD_SIZE=str(size),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=port,
        )
        for rank in (range(size) if ranks is None else ranks)
    ]


def run(project, size):
    results = [command.wait() for command in start(project, size)]
    assert [code for code, _ in results] == [0] * size, results
    return results


def result(project):
    """The last weights by name, and the history."""
    (folder,) = (project.folder / "runs/train_robust").glob("*/result/classifier")
    history = json.loads((folder / "history.json").read_text())
    return {**load_file(folder / "last.safetensors")}, history


def assert_close(first, second):
    """Results agree but for rounding: sums in another order, which training amplifies to 0.3 % in 20 float32 steps."""
    weights, others = first[0], second[0]
    assert weights.keys() == others.keys()
    for name, values in weights.items():
        if values.is_floating_point():
            scale = others[name].abs().max().clamp(min=1e-3)
            assert ((values - others[name]).abs().max() / scale) < 1e-2, name
    for record, expected in zip(first[1], second[1], strict=True):
        assert record == pytest.approx(expected, abs=0.021)  # one of 50 validation images, or of a batch


def identical(first, second):
    return first[1] == second[1] and all(torch.equal(values, second[0][name]) for name, values in first[0].items())


@pytest.fixture(scope="module")
def single_process(finished, tmp_path_factory):
    """What one process computes in `project`."""
    copy = _untrained(finished, tmp_path_factory.mktemp("single") / "project")
    copy.run("train_robust")
    return result(copy)


@pytest.fixture(scope="module")
def two_processes(finished, tmp_path_factory):
    """`project` after two processes trained in it, and what they printed."""
    copy = _untrained(finished, tmp_path_factory.mktemp("two") / "project")
    return copy, [text for _, text in run(copy, 2)]


def test_two_processes_compute_what_one_computes(two_processes, single_process):
    trained, (text, other_text) = two_processes
    assert_close(result(trained), single_process)
    assert "best_validation_robust" in json.loads(text)
    assert other_text == ""  # only the main process writes and prints
    provenance = json.loads((trained.folder / "artifacts/provenance/train_robust/generated-1.json").read_text())
    assert provenance["compute"]["processes"] == 2


def test_two_processes_keep_views_together_and_perturb_weights_as_one(project, tmp_path):
    """From params.yaml on. Half a batch alone has another gradient, and so another perturbation."""
    changes = {"loss": "consistency", "alpha": 2.0, "temperature": 0.5, "augmentation": "crop1", "awp_gamma": 0.02}
    project.write({"train_robust": changes | {"learning_rate": 0.05}})
    project.run("mix_images")
    alone = project.copy_without("train_robust", tmp_path / "alone")
    alone.run("train_robust")
    run(project, 2)
    assert_close(result(project), result(alone))


def test_processes_without_synchronisation_differ_from_one(project, single_process):
    """Guards the test above: half a batch has other statistics."""
    project.write({"train_robust": {"synchronise_batch_norm": False}})
    run(project, 2)
    with pytest.raises(AssertionError):
        assert_close(result(project), single_process)


@pytest.mark.parametrize("synchronised", [True, False])
def test_a_signal_to_one_process_stops_all_and_they_resume_bit_for_bit(project, tmp_path, synchronised):
    images = 2560 if synchronised else 5120
    changes = {"synchronise_batch_norm": synchronised, "loss": "ikl", "alpha": 3.0, "images_seen": images}
    project.write({"train_robust": changes})
    project.run("mix_images")
    undisturbed = project.copy_without("train_robust", tmp_path / "whole")
    run(undisturbed, 2)
    commands = start(project, 2)
    # a checkpoint follows a step, which both processes make; before that, one process alone might get the signal
    forked.until(lambda: list((project.folder / "runs/train_robust").glob("*/checkpoint.dmat")))
    os.kill(commands[1].process.pid, signal.SIGTERM)
    results = [command.wait() for command in commands]
    assert [code for code, _ in results] == [143, 143], results
    run(project, 2)
    assert identical(result(project), result(undisturbed))


def test_a_run_resumes_onto_another_number_of_processes(project, tmp_path):
    """Longer than the others, so that the signal arrives during the work; a small rate keeps the runs comparable."""
    project.write({"train_robust": {"images_seen": 5120, "learning_rate": 0.01}})
    project.run("mix_images")
    undisturbed = project.copy_without("train_robust", tmp_path / "undisturbed")
    undisturbed.run("train_robust")
    commands = start(project, 2)
    # a checkpoint follows a step, which both processes make; before that, one process alone might get the signal
    forked.until(lambda: list((project.folder / "runs/train_robust").glob("*/checkpoint.dmat")))
    os.kill(commands[0].process.pid, signal.SIGTERM)
    assert [command.wait()[0] for command in commands] == [143, 143]
    project.run("train_robust")
    assert_close(result(project), result(undisturbed))


def test_torchrun_restarts_after_kill_9_of_one_process(project, two_processes):
    """With compute.processes the command starts torchrun itself."""
    project.write({"compute": {"processes": 2}})
    command = [sys.executable, "-m", "cli.main", "train-robust", *STAGE_OPTIONS["train_robust"], "--json"]
    environment = {**os.environ, "DMAT_TRACKING": "off"}
    with servers.running(
        command, cwd=project.folder, env=environment, stdout=subprocess.PIPE, text=True
    ) as torchrun:
        _kill_rank_1(project, torchrun)
        text, _ = torchrun.communicate()
    assert torchrun.returncode == 0
    assert "best_validation_robust" in text
    assert identical(result(project), result(two_processes[0]))


def _kill_rank_1(project, torchrun):
    forked.until(lambda: list((project.folder / "runs/train_robust").glob("*/metrics.jsonl")))
    started = [(servers.environment(process), process) for process in psutil.Process(torchrun.pid).children()]
    ranks = {int(environment["RANK"]): process for environment, process in started if "RANK" in environment}
    ranks[1].kill()


def test_a_stage_of_one_process_is_refused_before_the_processes_join(project):
    """Joining needs all processes: if one refused and ended before, the others would fail to join."""
    command, *_ = start(project, 2, "score_images", ranks=[0])
    code, text = command.wait()
    assert code == 2, text
    assert "score_images was started in 2 processes; expected one" in text
    assert "without torchrun" in text


def test_a_batch_that_does_not_divide_is_refused(project):
    project.write({"train_robust": {"batch": 63}})
    project.run("mix_images")
    for code, text in [command.wait() for command in start(project, 2)]:
        assert code == 2
        assert "a batch of 63 images does not divide among 2 processes" in text


@pytest.fixture
def denoiser_project(finished, tmp_path):
    """Without dropout, whose masks differ between parts of a batch. Two snapshots are judged, by the main process."""
    copy = finished.copy_without("train_diffusion", tmp_path / "project")
    settings = {"batch": 32, "images_seen": 512, "augment_probability": 0.3, "network": {"dropout": 0.0}}
    copy.write({"train_diffusion": {**settings, "snapshot_every": 256, "snapshot_images": 20}})
    return copy


def denoiser_of(project):
    """The best and the last weights by name, and the records of snapshots and loss."""
    (folder,) = (project.folder / "runs/train_diffusion").glob("*/result/denoiser")
    states = {
        f"{file} {name}": values
        for file in ("denoiser", "last")
        for name, values in load_file(folder / f"{file}.safetensors").items()
    }
    return states, [json.loads((folder / f"{name}.json").read_text()) for name in ("snapshots", "history")]


def test_two_processes_train_the_denoiser_that_one_trains(denoiser_project, tmp_path):
    """Adam enlarges what rounding makes of small gradients, so weights are compared as a whole."""
    alone = denoiser_project.copy_without("train_diffusion", tmp_path / "alone")
    alone.run("train_diffusion")
    denoiser_project.write({"train_diffusion": {"accumulation_steps": 4}})
    results = [command.wait() for command in start(denoiser_project, 2, "train_diffusion")]
    assert [code for code, _ in results] == [0, 0], results
    (weights, (snapshots, history)), (others, (other_snapshots, other_history)) = map(
        denoiser_of, (denoiser_project, alone)
    )
    assert weights.keys() == others.keys()
    flat, others_flat = (torch.cat([values.flatten() for values in state.values()]) for state in (weights, others))
    assert (flat - others_flat).norm() / others_flat.norm() < 2e-3
    assert (flat - others_flat).abs().max() < 0.1 * 0.002 * 16  # of the way that 16 steps can go
    for record, expected in zip(history, other_history, strict=True):
        assert record == pytest.approx(expected, rel=1e-3)
    assert [record["images_seen"] for record in snapshots] == [256, 512]
    for record, expected in zip(snapshots, other_snapshots, strict=True):
        assert record["frechet_distance_scorer_20"] == pytest.approx(expected["frechet_distance_scorer_20"], rel=0.05)


def test_a_denoiser_of_two_processes_resumes_bit_for_bit(denoiser_project, tmp_path):
    changes = {"images_seen": 1536, "snapshot_every": 768, "network": {"dropout": 0.3}}
    denoiser_project.write({"train_diffusion": changes})
    whole = denoiser_project.copy_without("train_diffusion", tmp_path / "whole")
    assert [command.wait()[0] for command in start(whole, 2, "train_diffusion")] == [0, 0]
    commands = start(denoiser_project, 2, "train_diffusion")
    forked.until(lambda: list((denoiser_project.folder / "runs/train_diffusion").glob("*/checkpoint.dmat")))
    os.kill(commands[1].process.pid, signal.SIGTERM)
    assert [command.wait()[0] for command in commands] == [143, 143]
    assert [command.wait()[0] for command in start(denoiser_project, 2, "train_diffusion")] == [0, 0]
    actual, expected = denoiser_of(denoiser_project), denoiser_of(whole)
    assert actual[1] == expected[1]
    assert all(torch.equal(values, expected[0][name]) for name, values in actual[0].items())


@pytest.mark.parametrize("size", [1, 2, 3, 7])
@pytest.mark.parametrize("count", [0, 1, 5, 64])
def test_parts_are_disjoint_and_together_all(size, count):
    rows = [list(range(count))[World(rank, size).local_rows(count)] for rank in range(size)]
    assert [row for part in rows for row in part] == list(range(count))
    assert max(map(len, rows)) - min(map(len, rows)) <= 1


def _normalise(rank, port, queue):
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    torch.manual_seed(0)
    x, weight = torch.randn(6, 3, 4, 4) * 2 + 1, torch.randn(6, 3, 4, 4)
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, momentum=0.3)).train()
    with torch.no_grad():
        model[1].weight.uniform_(0.5, 1.5)
    group = processes.world()
    processes.synchronise_batch_norm(model, group)
    rows = group.local_rows(6)
    inputs = x[rows].requires_grad_(True)
    out = model(inputs)
    (out * weight[rows]).sum().backward()
    values = group.sum_gradients(model, torch.tensor([float(rank)]))
    gradients = [p.grad for p in model.parameters()]
    tensors = [out.detach(), inputs.grad, *gradients, model[1].running_mean, model[1].running_var, values]
    queue.put((rank, [value.tolist() for value in tensors]))


def test_synchronised_batch_norm_is_that_of_the_whole_batch():
    """Outputs, gradients of inputs and parameters, running statistics."""
    queue, port = forked._context.Queue(), free_port()
    workers = [forked._context.Process(target=_normalise, args=(rank, port, queue)) for rank in range(2)]
    for worker in workers:
        worker.start()
    results = dict(queue.get(timeout=forked.LIMIT) for _ in workers)
    for worker in workers:
        worker.join()
    torch.manual_seed(0)
    x, weight = torch.randn(6, 3, 4, 4) * 2 + 1, torch.randn(6, 3, 4, 4)
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, momentum=0.3)).train()
    with torch.no_grad():
        model[1].weight.uniform_(0.5, 1.5)
    x.requires_grad_(True)
    out = model(x)
    (out * weight).sum().backward()
    expected = [*(p.grad for p in model.parameters()), model[1].running_mean, model[1].running_var]
    for rank in range(2):
        rows, inputs, *rest, values = (torch.tensor(value) for value in results[rank])
        torch.testing.assert_close(rows, out.detach()[3 * rank : 3 * rank + 3], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(inputs, x.grad[3 * rank : 3 * rank + 3], rtol=1e-4, atol=1e-5)
        for actual, reference in zip(rest, expected, strict=True):
            torch.testing.assert_close(actual, reference, rtol=1e-4, atol=1e-4)
        assert values.tolist() == [1.0]
