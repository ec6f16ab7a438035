"""Every job killed with -9 at random moments and started again ends bit for bit where an undisturbed one ends."""

import random
import shutil
import signal

import pytest
import yaml

from dmat import files
from dmat.jobs import STAGES
from tests import forked

IN_ORDER = {
    "prepare_data": [],
    "train_scorer": [],
    "train_diffusion": ["--generator", "edm"],
    "generate_images": ["--chunk", "edm18-0000"],
    "score_images": ["--chunk", "edm18-0000"],
    "select_images": ["--selection", "edm18_best"],
    "measure_images": ["--selection", "edm18_best"],
    "mix_images": ["--arm", "generated"],
    "train_robust": ["--arm", "generated", "--seed", "1"],
    "evaluate_robust": ["--arm", "generated", "--seed", "1"],
}
RESUMABLE = ("train_scorer", "train_diffusion", "generate_images", "train_robust", "evaluate_robust")


class Project:
    """A folder with params.yaml and artifacts, without git and DVC."""

    def __init__(self, folder, params):
        self.folder, self.params = folder, params
        (folder / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))

    def command(self, word, **environment):
        return forked.Command(self.folder, STAGES[word].command, *IN_ORDER[word], "--json", **environment)

    def run(self, word, code=0):
        found, text = self.command(word).wait()
        assert found == code, text
        return text

    def outputs(self, word):
        """Hash of everything that an instance leaves for other stages and for people, provenance apart."""
        folder = self.folder / "artifacts"
        found = sorted(p for p in (folder / word, folder / "metrics" / word) if p.exists())
        work = list((self.folder / "runs" / word).glob("*/metrics.jsonl"))
        return {str(p.relative_to(self.folder)): files.checksum(p) for p in [*found, *work]}

    def copy_without(self, word, to):
        """The same project as it was before a stage ran."""
        leave = [f"runs/{word}", f"artifacts/{word}", f"artifacts/metrics/{word}"]
        shutil.copytree(
            self.folder, to, ignore=lambda at, names: {n for n in names if f"{at}/{n}".endswith(tuple(leave))}
        )
        return Project(to, self.params)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, tiny_params_once):
    tiny_params_once["compute"]["save_every_seconds"] = 0.05
    tiny_params_once["evaluate_robust"] |= {"auto_attack": "standard", "shard": 5}
    project = Project(tmp_path_factory.mktemp("undisturbed"), tiny_params_once)
    for word in IN_ORDER:
        project.run(word)
    return project


def _killed_until_done(project, word, kills, seconds):
    """Kills at moments spread at random over the time the job takes; returns how many attempts went on from another."""
    rng, resumed = random.Random(f"{word}-{kills}"), 0
    for _ in range(kills):
        resumed += any((project.folder / "runs" / word).glob("*/checkpoint.dmat"))
        resumed += any((project.folder / "runs" / word).glob("*/result"))
        if not project.command(word).kill_after(rng.uniform(0.05, seconds)):
            shutil.rmtree(project.folder / "runs" / word)  # it was done: from the start again
    project.run(word)
    return resumed


def _seconds(project, word):
    path = next((project.folder / "artifacts/provenance" / word).glob("*.json"))
    return files.read_json(path)["seconds"]


@pytest.mark.parametrize("word", RESUMABLE)
def test_a_job_killed_at_random_moments_ends_as_if_undisturbed(undisturbed, tmp_path, word):
    project = undisturbed.copy_without(word, tmp_path / "killed")
    assert _killed_until_done(project, word, 5, _seconds(undisturbed, word)) >= 1
    assert project.outputs(word) == undisturbed.outputs(word)


@pytest.mark.slow
@pytest.mark.parametrize("word", IN_ORDER)
def test_every_job_killed_twenty_times(undisturbed, tmp_path, word):
    project = undisturbed.copy_without(word, tmp_path / "killed")
    _killed_until_done(project, word, 20, _seconds(undisturbed, word))
    assert project.outputs(word) == undisturbed.outputs(word)


@pytest.mark.parametrize("word", ["prepare_data", "score_images", "select_images", "measure_images", "mix_images"])
def test_a_short_job_killed_at_random_moments_starts_over(undisturbed, tmp_path, word):
    project = undisturbed.copy_without(word, tmp_path / "killed")
    _killed_until_done(project, word, 2, max(0.3, _seconds(undisturbed, word)))
    assert project.outputs(word) == undisturbed.outputs(word)


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
def test_signals_save_and_exit(undisturbed, tmp_path, word, number, code):
    project = undisturbed.copy_without(word, tmp_path / "stopped")
    command = project.command(word)
    forked.until(lambda: list((project.folder / "runs" / word).glob("*/code.json")))
    command.signal(number)
    found, text = command.wait()
    assert found == code, text
    assert "the same command goes on from here" in text
    assert "Traceback" not in text
    project.run(word)
    assert project.outputs(word) == undisturbed.outputs(word)


def test_a_result_is_published_again_after_a_kill_before_dvc_noted_it(undisturbed, tmp_path):
    """DVC deletes outputs before a stage: after the kill of everything just then, the work folder has the result."""
    project = undisturbed.copy_without("nothing", tmp_path / "lost")
    shutil.rmtree(project.folder / "artifacts/train_robust")
    stamp = next((project.folder / "runs/train_robust").glob("*/finished.json")).stat().st_mtime_ns
    project.run("train_robust")
    assert project.outputs("train_robust") == undisturbed.outputs("train_robust")
    assert next((project.folder / "runs/train_robust").glob("*/finished.json")).stat().st_mtime_ns == stamp


def test_one_writer_at_a_time_and_the_second_is_told_who(undisturbed, tmp_path):
    project = undisturbed.copy_without("train_diffusion", tmp_path / "two")
    first = project.command("train_diffusion")
    forked.until(lambda: list((project.folder / "runs/train_diffusion").glob("*/holder.json")))
    second = project.run("train_diffusion", code=2)
    assert f"is being computed by process {first.process.pid}" in second
    assert first.wait()[0] == 0
    assert project.outputs("train_diffusion") == undisturbed.outputs("train_diffusion")


def test_work_that_goes_on_under_changed_code_says_so(undisturbed, tmp_path):
    project = undisturbed.copy_without("train_scorer", tmp_path / "changed")
    command = project.command("train_scorer")
    forked.until(lambda: list((project.folder / "runs/train_scorer").glob("*/checkpoint.dmat")))
    command.kill_after(0)
    note = next((project.folder / "runs/train_scorer").glob("*/code.json"))
    files.write_json(note, files.read_json(note) | {"dmat/training/classifier.py": "an earlier version"})
    project.run("train_scorer")
    provenance = files.read_json(project.folder / "artifacts/provenance/train_scorer/all.json")
    assert provenance["code_changed"] is True
    before = files.read_json(undisturbed.folder / "artifacts/provenance/train_scorer/all.json")
    assert before["code_changed"] is False
