"""Every job killed with -9 at random moments and started again ends bit for bit where an undisturbed one ends."""

import random
import shutil
import signal

import pytest

from dmat import files
from tests import forked
from tests.projects import IN_ORDER

RESUMABLE = ("train_scorer", "train_diffusion", "generate_images", "train_robust", "evaluate_robust")


def _killed_until_done(project, word, kills, seconds):
    """Kills at moments spread at random over the time the job takes, counted from when it is at work; a few more if no
    attempt went on from another by then. Returns how many did."""
    rng, resumed = random.Random(f"{word}-{kills}"), 0
    runs = project.folder / "runs" / word
    for k in range(4 * kills):
        resumed += any(runs.glob("*/checkpoint.dmat")) or any(runs.glob("*/result"))
        if k >= kills and resumed:
            break
        command = project.command(word)
        sign = "holder.json" if k < kills else "result/*/*"  # the few more: as soon as there is something to go on from
        forked.until(lambda: list(runs.glob(f"*/{sign}")) or not command.process.is_alive())  # noqa: B023
        if not command.kill_after(rng.uniform(0, seconds) if k < kills else 0):
            shutil.rmtree(runs)  # it was done: from the start again
    project.run(word)
    return resumed


def _seconds(project, word):
    path = next((project.folder / "artifacts/provenance" / word).glob("*.json"))
    return files.read_json(path)["seconds"]


@pytest.mark.parametrize("word", RESUMABLE)
def test_a_job_killed_at_random_moments_ends_as_if_undisturbed(finished, tmp_path, word):
    project = finished.copy_without(word, tmp_path / "killed")
    assert _killed_until_done(project, word, 5, _seconds(finished, word)) >= 1
    assert project.outputs(word) == finished.outputs(word)


@pytest.mark.slow
@pytest.mark.parametrize("word", IN_ORDER)
def test_every_job_killed_twenty_times(finished, tmp_path, word):
    project = finished.copy_without(word, tmp_path / "killed")
    _killed_until_done(project, word, 20, _seconds(finished, word))
    assert project.outputs(word) == finished.outputs(word)


@pytest.mark.parametrize("word", ["prepare_data", "score_images", "select_images", "measure_images", "mix_images"])
def test_a_short_job_killed_at_random_moments_starts_over(finished, tmp_path, word):
    project = finished.copy_without(word, tmp_path / "killed")
    _killed_until_done(project, word, 2, max(0.3, _seconds(finished, word)))
    assert project.outputs(word) == finished.outputs(word)


@pytest.mark.parametrize(
    ("word", "number", "code"),
    [
        ("train_robust", signal.SIGTERM, 143),
        ("train_diffusion", signal.SIGINT, 130),
        ("train_scorer", signal.SIGUSR1, 75),
        ("generate_images", signal.SIGTERM, 143),
        ("evaluate_robust", signal.SIGUSR1, 75),
        ("measure_images", signal.SIGINT, 130),
    ],
)
def test_signals_save_and_exit(finished, tmp_path, word, number, code):
    project = finished.copy_without(word, tmp_path / "stopped")
    command = project.command(word)
    forked.until(lambda: list((project.folder / "runs" / word).glob("*/holder.json")))
    command.signal(number)
    found, text = command.wait()
    assert found == code, text
    assert "the same command goes on from here" in text
    assert "Traceback" not in text
    project.run(word)
    assert project.outputs(word) == finished.outputs(word)


def test_a_result_is_published_again_after_a_kill_before_dvc_noted_it(finished, tmp_path):
    """DVC deletes outputs before a stage: after the kill of everything just then, the work folder has the result."""
    project = finished.copy_without("nothing", tmp_path / "lost")
    shutil.rmtree(project.folder / "artifacts/train_robust")
    stamp = next((project.folder / "runs/train_robust").glob("*/finished.json")).stat().st_mtime_ns
    project.run("train_robust")
    assert project.outputs("train_robust") == finished.outputs("train_robust")
    assert next((project.folder / "runs/train_robust").glob("*/finished.json")).stat().st_mtime_ns == stamp


def test_one_writer_at_a_time_and_the_second_is_told_who(finished, tmp_path):
    project = finished.copy_without("train_diffusion", tmp_path / "two")
    first = project.command("train_diffusion")
    forked.until(lambda: list((project.folder / "runs/train_diffusion").glob("*/holder.json")))
    second = project.run("train_diffusion", code=2)
    assert f"is being computed by process {first.process.pid}" in second
    assert first.wait()[0] == 0
    assert project.outputs("train_diffusion") == finished.outputs("train_diffusion")
