"""Every job that is killed with -9 at random moments and restarted ends bit for bit like an uninterrupted one."""

import random
import shutil
import signal

import pytest

from dmat import files
from tests import forked
from tests.projects import STAGE_OPTIONS

RESUMABLE = ("train_scorer", "train_diffusion", "generate_images", "train_robust", "evaluate_robust")


def _killed_until_done(project, stage_name, kills, seconds):
    """Kills the job at random moments of its duration, counted from its start; a few more times if no attempt resumed
    from another by then. Returns how many attempts resumed."""
    rng, resumed = random.Random(f"{stage_name}-{kills}"), 0
    runs = project.folder / "runs" / stage_name
    for k in range(4 * kills):
        resumed += any(runs.glob("*/checkpoint.dmat")) or any(runs.glob("*/result"))
        if k >= kills and resumed:
            break
        command = project.command(stage_name)
        marker = "holder.json" if k < kills else "result/*/*"  # extra kills: as soon as a run can be resumed
        forked.until(lambda: list(runs.glob(f"*/{marker}")) or not command.process.is_alive())  # noqa: B023
        if not command.kill_after(rng.uniform(0, seconds) if k < kills else 0):
            shutil.rmtree(runs)  # it had finished: start over
    project.run(stage_name)
    return resumed


def _seconds(project, stage_name):
    path = next((project.folder / "artifacts/provenance" / stage_name).glob("*.json"))
    return files.read_json(path)["seconds"]


@pytest.mark.parametrize("stage_name", RESUMABLE)
def test_a_killed_job_resumes_to_the_same_result(finished, tmp_path, stage_name):
    project = finished.copy_without(stage_name, tmp_path / "killed")
    assert _killed_until_done(project, stage_name, 5, _seconds(finished, stage_name)) >= 1
    assert project.outputs(stage_name) == finished.outputs(stage_name)


@pytest.mark.slow
@pytest.mark.parametrize("stage_name", STAGE_OPTIONS)
def test_every_job_killed_twenty_times_gives_the_same_result(finished, tmp_path, stage_name):
    project = finished.copy_without(stage_name, tmp_path / "killed")
    _killed_until_done(project, stage_name, 20, _seconds(finished, stage_name))
    assert project.outputs(stage_name) == finished.outputs(stage_name)


@pytest.mark.parametrize(
    "stage_name", ["prepare_data", "score_images", "select_images", "measure_images", "mix_images"]
)
def test_a_killed_short_job_starts_over_to_the_same_result(finished, tmp_path, stage_name):
    project = finished.copy_without(stage_name, tmp_path / "killed")
    _killed_until_done(project, stage_name, 2, max(0.3, _seconds(finished, stage_name)))
    assert project.outputs(stage_name) == finished.outputs(stage_name)


@pytest.mark.parametrize(
    ("stage_name", "number", "code"),
    [
        ("train_robust", signal.SIGTERM, 143),
        ("train_diffusion", signal.SIGINT, 130),
        ("train_scorer", signal.SIGUSR1, 75),
        ("generate_images", signal.SIGTERM, 143),
        ("evaluate_robust", signal.SIGUSR1, 75),
        ("measure_images", signal.SIGINT, 130),
    ],
)
def test_signals_save_and_exit(finished, tmp_path, stage_name, number, code):
    project = finished.copy_without(stage_name, tmp_path / "stopped")
    command = project.command(stage_name)
    forked.until(lambda: list((project.folder / "runs" / stage_name).glob("*/holder.json")))
    command.signal(number)
    exit_code, text = command.wait()
    assert exit_code == code, text
    assert "the same command resumes from here" in text
    assert "Traceback" not in text
    project.run(stage_name)
    assert project.outputs(stage_name) == finished.outputs(stage_name)


def test_a_result_is_published_again_after_a_kill_before_dvc_recorded_it(finished, tmp_path):
    """DVC deletes outputs before a stage: after a kill at that moment the work folder still has the result."""
    project = finished.copy_without("nothing", tmp_path / "lost")
    shutil.rmtree(project.folder / "artifacts/train_robust")
    stamp = next((project.folder / "runs/train_robust").glob("*/finished.json")).stat().st_mtime_ns
    project.run("train_robust")
    assert project.outputs("train_robust") == finished.outputs("train_robust")
    assert next((project.folder / "runs/train_robust").glob("*/finished.json")).stat().st_mtime_ns == stamp


def test_a_second_writer_is_refused_with_the_process_of_the_first(finished, tmp_path):
    project = finished.copy_without("train_diffusion", tmp_path / "two")
    first = project.command("train_diffusion")
    forked.until(lambda: list((project.folder / "runs/train_diffusion").glob("*/holder.json")))
    second = project.run("train_diffusion", code=2)
    assert f"is being computed by process {first.process.pid}" in second
    assert first.wait()[0] == 0
    assert project.outputs("train_diffusion") == finished.outputs("train_diffusion")
