"""Damaged, missing and unfitting files, and folders that cannot be written: exit code 2, a message that says what was
found, what was expected and what to do, no traceback, nothing lost."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess

import pytest

from dmat import files
from tests import forked
from tests.projects import Project

REMOVED, CUT, ALTERED, EMPTY = "removed", "cut", "altered", "an empty object"
SPLITS, IMAGES = "artifacts/prepare_data", "artifacts/generate_images/edm18"
DENOISER, SCORER = "artifacts/train_diffusion/edm", "artifacts/train_scorer/scorer"
SCORES = "artifacts/score_images/edm18/*-*.npy"
ROBUST, SELECTION = "artifacts/train_robust/generated-1", "artifacts/select_images/edm18_best"

DEEPER = {"name": "wide_resnet", "depth": 16, "width": 1, "activation": "silu"}

# stage that reads the file, file, damage (or JSON values put into it), fragments of the message
DAMAGE = [
    ("train_scorer", f"{SPLITS}/train", REMOVED, ["train does not exist", "dvc repro"]),
    ("train_scorer", f"{SPLITS}/train/manifest.json", REMOVED, ["manifest.json does not exist", "dvc repro"]),
    ("train_scorer", f"{SPLITS}/train/manifest.json", CUT, ["manifest.json is not valid JSON", "run its stage again"]),
    ("train_scorer", f"{SPLITS}/train/manifest.json", {"schema": 99}, ["has schema 99", "reads 1"]),
    ("train_scorer", f"{SPLITS}/train/images-00000.npy", REMOVED, ["images-00000.npy does not exist", "dvc repro"]),
    ("train_scorer", f"{SPLITS}/train/images-00000.npy", CUT, ["has checksum", "manifest says", "dvc checkout"]),
    ("train_scorer", f"{SPLITS}/validation/labels-00000.npy", ALTERED, ["has checksum", "altered or cut"]),
    ("train_diffusion", f"{SPLITS}/train/images-00000.npy", ALTERED, ["has checksum", "altered or cut"]),
    ("generate_images", f"{DENOISER}/denoiser.safetensors", REMOVED, ["denoiser.safetensors does not exist"]),
    ("generate_images", f"{DENOISER}/denoiser.safetensors", CUT, ["its sidecar says", "run its stage again"]),
    ("generate_images", f"{DENOISER}/denoiser.safetensors", ALTERED, ["its sidecar says", "run its stage again"]),
    ("generate_images", f"{DENOISER}/denoiser.json", REMOVED, ["denoiser.json does not exist", "dvc repro"]),
    ("generate_images", f"{DENOISER}/denoiser.json", {"schema": 2}, ["has schema 2", "this dmat reads 1"]),
    ("generate_images", f"{DENOISER}/denoiser.json", {"kind": "classifier"}, ["holds a classifier", "a denoiser"]),
    ("score_images", f"{IMAGES}/images-00001.npy", ALTERED, ["images-00001.npy has checksum", "altered or cut"]),
    ("score_images", f"{IMAGES}/labels-00000.npy", CUT, ["labels-00000.npy has checksum", "altered or cut"]),
    ("score_images", f"{SCORER}/best.safetensors", ALTERED, ["best.safetensors has checksum", "its sidecar says"]),
    ("score_images", f"{SCORER}/best.json", {"classes": 7}, ["of 7 classes", "of 10", "train a classifier on this"]),
    ("score_images", f"{SCORER}/best.json", {"image_shape": [32, 32, 3]}, ["[32, 32, 3]", "[8, 8, 1]"]),
    ("score_images", f"{SCORER}/best.json", {"network": DEEPER}, ["does not fit the network", "one run"]),
    ("select_images", SCORES, REMOVED, [".npy does not exist", "dvc repro"]),
    ("select_images", SCORES, CUT, ["score_images/edm18/", ".npy has checksum", "its manifest says"]),
    ("measure_images", f"{SELECTION}/selection.json", CUT, ["selection.json is not valid JSON", "run its stage again"]),
    ("measure_images", f"{SELECTION}/indices.npy", CUT, ["indices.npy", "is incomplete or not an array"]),
    ("mix_images", f"{SELECTION}/selection.json", {"classes": 7}, ["of 7 classes", "of 10", "expected the same"]),
    ("mix_images", f"{SELECTION}/selection.json", {"kept": 0}, ["arm generated", "0 generated"]),
    ("mix_images", f"{SELECTION}/selection.json", EMPTY, ["selection.json lacks keys", "image_set", "dvc checkout"]),
    ("train_robust", "artifacts/mix_images/generated/mix.json", EMPTY, ["mix.json lacks keys", "generated_images"]),
    ("select_images", f"{IMAGES}/labels-00000.npy", ALTERED, ["labels-00000.npy has checksum", "altered or cut"]),
    ("train_robust", "artifacts/mix_images/generated/mix.json", REMOVED, ["mix.json does not exist", "dvc repro"]),
    ("train_robust", f"{IMAGES}/manifest.json", {"seed": 2}, ["is not the image set of the selection", "dvc repro"]),
    ("train_robust", f"{IMAGES}/images-00000.npy", ALTERED, ["images-00000.npy has checksum", "altered or cut"]),
    ("train_robust", f"{SELECTION}/indices.npy", ALTERED,
     ["edm18_best changed after the mix was written", "dvc repro"]),
    ("evaluate_robust", f"{ROBUST}/best.safetensors", ALTERED, ["best.safetensors has checksum", "its sidecar says"]),
    ("evaluate_robust", f"{ROBUST}/last.safetensors", REMOVED, ["last.safetensors does not exist", "dvc repro"]),
    ("evaluate_robust", f"{ROBUST}/best.json", {"classes": 7}, ["of 7 classes", "of 10"]),
    ("evaluate_robust", f"{SPLITS}/test/images-00000.npy", CUT, ["images-00000.npy has checksum", "altered or cut"]),
]  # fmt: skip


def _damage(path, damage):
    """Damages the file, never through a hard link: the copy in the work folder stays as it was."""
    if path.is_dir():
        shutil.rmtree(path)
        return
    content = path.read_bytes()
    path.unlink()
    if damage == CUT:
        path.write_bytes(content[: len(content) // 2])
    elif damage == ALTERED:
        path.write_bytes(content[:-8] + bytes(b ^ 1 for b in content[-8:]))
    elif damage == EMPTY:
        path.write_text("{}")
    elif damage != REMOVED:
        path.write_text(json.dumps(json.loads(content) | damage))


def _refused(project, stage_name, **environment):
    text = project.run(stage_name, code=2, **environment)
    assert "error: " in text
    assert "Traceback" not in text
    return text


@pytest.mark.parametrize(
    ("stage_name", "path", "damage", "fragments"),
    DAMAGE,
    ids=[f"{path}-{str(damage)[:20]}" for _, path, damage, _ in DAMAGE],
)
def test_damaged_input_is_refused(finished, tmp_path, stage_name, path, damage, fragments):
    """By the stage that reads it, also if no record of the written file is left."""
    project = finished.copy_without(stage_name, tmp_path / "damaged")
    shutil.rmtree(project.folder / "artifacts/provenance")
    _damage(next(project.folder.glob(path)), damage)
    text = _refused(project, stage_name)
    assert all(fragment in text for fragment in fragments), text
    assert not _published(project, stage_name)


@pytest.mark.parametrize(
    ("stage_name", "path", "maker"),
    [
        ("mix_images", f"{SELECTION}/indices.npy", "select_images"),  # not read there, yet part of the result
        ("select_images", f"{IMAGES}/images-00000.npy", "generate_images"),
        ("evaluate_robust", f"{ROBUST}/history.json", "train_robust"),
    ],
)
def test_a_stage_started_directly_refuses_altered_inputs(finished, tmp_path, stage_name, path, maker):
    project = finished.copy_without(stage_name, tmp_path / "altered")
    _damage(project.folder / path, ALTERED)
    text = _refused(project, stage_name)
    assert re.search(rf"has checksum \w+; {maker} wrote \w+: it was altered since; restore it", text), text
    assert not _published(project, stage_name)


@pytest.fixture
def stopped(finished, tmp_path):
    """A project whose scorer was stopped half-way."""
    project = finished.copy_without("train_scorer", tmp_path / "stopped")
    command = project.command("train_scorer")
    folder = project.folder / "runs/train_scorer"
    forked.until(lambda: list(folder.glob("*/checkpoint.dmat")))
    command.signal(signal.SIGTERM)
    assert command.wait()[0] == 143
    return project, next(folder.glob("*/checkpoint.dmat"))


def _published(project, stage_name):
    return [path for path in project.outputs(stage_name) if path.startswith("artifacts/")]


def _header(path, **values):
    first, _, rest = path.read_bytes().partition(b"\n")
    path.write_bytes(json.dumps(json.loads(first) | values).encode() + b"\n" + rest)


@pytest.mark.parametrize(
    ("harm", "fragments"),
    [
        (lambda path: _damage(path, CUT), ["was cut or altered", "bring back a good copy"]),
        (lambda path: _damage(path, ALTERED), ["was cut or altered", "bring back a good copy"]),
        (lambda path: path.write_bytes(b""), ["is not a checkpoint of dmat", "delete it"]),
        (lambda path: path.write_bytes(b"\x80\x02PK"), ["is not a checkpoint of dmat", "delete it"]),
        (lambda path: _header(path, schema=2), ["has checkpoint schema 2", "this dmat reads 1"]),
        (lambda path: _header(path, precision="bf16"), ["was computed in bf16", "would use fp32", "--fresh"]),
    ],
    ids=["cut", "altered", "empty", "other file", "newer schema", "other precision"],
)  # fmt: skip
def test_a_bad_checkpoint_is_refused_and_kept(finished, stopped, harm, fragments):
    project, checkpoint = stopped
    good = checkpoint.read_bytes()
    harm(checkpoint)
    bad = checkpoint.read_bytes()
    text = _refused(project, "train_scorer")
    assert all(fragment in text for fragment in [str(checkpoint), *fragments]), text
    assert checkpoint.read_bytes() == bad
    checkpoint.write_bytes(good)  # the advice works
    project.run("train_scorer")
    assert project.outputs("train_scorer") == finished.outputs("train_scorer")


@contextlib.contextmanager
def _small_disk(folder, size):
    """Mounts a small file system on `folder`; only root may."""
    if (
        os.geteuid()
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], check=False, capture_output=True
        ).returncode
    ):
        pytest.skip("needs the right to mount a tmpfs")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("stage_name", ["train_scorer", "train_diffusion", "generate_images", "train_robust"])
def test_a_full_disk_loses_nothing(finished, tmp_path, stage_name):
    """Full while saving: one message, the last complete state stays, and with room again the command resumes."""
    project = finished.copy_without(stage_name, tmp_path / "project")
    (project.folder / "runs" / stage_name).mkdir(parents=True)
    with _small_disk(project.folder / "runs" / stage_name, "40M"):
        ballast = project.folder / "runs" / stage_name / "ballast"
        command = project.command(stage_name)
        forked.until(lambda: list((project.folder / "runs" / stage_name).glob("*/holder.json")))
        with contextlib.suppress(OSError), open(ballast, "wb", buffering=0) as file:
            while True:
                file.write(bytes(1 << 12))
        code, text = command.wait()
        assert code == 2, text
        assert "No space left on device" in text
        assert "run the same command again" in text
        assert "Traceback" not in text
        ballast.unlink()
        project.run(stage_name)
        assert project.outputs(stage_name) == finished.outputs(stage_name)


@pytest.mark.parametrize("name", ["runs", "artifacts/train_scorer"])
def test_a_folder_that_cannot_be_written_is_named(finished, tmp_path, name):
    project = finished.copy_without("train_scorer", tmp_path / "project")
    shutil.rmtree(project.folder / name, ignore_errors=True)
    (project.folder / name).write_text("a file where a folder should be")
    text = _refused(project, "train_scorer")
    assert str(project.folder / name) in text
    assert "run the same command again" in text
    (project.folder / name).unlink()
    project.run("train_scorer")
    assert files.checksum(project.folder / "artifacts/train_scorer") == files.checksum(
        finished.folder / "artifacts/train_scorer"
    )


def test_a_read_only_disk_is_named(finished, tmp_path):
    project = finished.copy_without("train_scorer", tmp_path / "project")
    (project.folder / "runs").mkdir(exist_ok=True)
    with _small_disk(project.folder / "runs", "1M"):
        subprocess.run(["mount", "-o", "remount,ro", str(project.folder / "runs")], check=True)
        text = _refused(project, "train_scorer")
        assert "Read-only file system" in text
        assert "run the same command again" in text


@pytest.mark.parametrize(
    ("arguments", "fragments"),
    [
        (["train-robust", "--arm", "nobody", "--seed", "1"], ["no instance 'nobody-1'", "real_only-1, generated-1"]),
        (["train-robust", "--arm", "generated", "--seed", "7"], ["no instance 'generated-7'", "expected one of"]),
        (["generate-images", "--image-set", "edm19"], ["no instance 'edm19'", "edm18"]),
        (["select-images", "--selection", "none"], ["no instance 'none'", "edm18_best"]),
        (["prepare-data", "--params", "nowhere.yaml"], ["nowhere.yaml does not exist", "dmat recipes use"]),
        (["recipes", "use", "nobody"], ["recipe is 'nobody'", "digits-3-seeds"]),
        (["train-robust", "--arm", "generated", "--seed", "one"], ["Invalid value for '--seed'", "valid integer"]),
        (["train-robust", "--arm", "generated"], ["Missing option '--seed'"]),
        (["train-robot"], ["No such command 'train-robot'"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)  # fmt: skip
def test_a_wrong_command_is_answered(tiny_params, tmp_path, arguments, fragments):
    code, text = forked.run(Project(tmp_path, tiny_params).folder, *arguments)
    assert code == 2
    assert all(fragment in text for fragment in fragments), text
    assert "Traceback" not in text


def test_a_selection_that_keeps_nothing_is_refused(finished, tmp_path):
    project = finished.copy_without("select_images", tmp_path / "project")
    project.write({"select_images": {"keep": 0.01}})
    text = _refused(project, "select_images")
    assert "keep 0.01 of 100 images leaves none" in text
    assert "generate more images" in text


def test_a_share_that_a_batch_cannot_hold_is_refused(finished, tmp_path):
    project = finished.copy_without("mix_images", tmp_path / "project")
    project.write({"arms": {"generated": {"generated_share": 0.001}}})
    text = _refused(project, "mix_images")
    assert "leaves 0 generated and 64 real images" in text
    assert "change the share or the batch" in text


def test_an_l2_radius_that_turns_black_into_white_is_refused(finished, tmp_path):
    project = finished.copy_without("train_robust", tmp_path / "project")
    project.write({"arms": {"generated": {"threat": {"norm": "l2", "epsilon": 9}}}})
    text = _refused(project, "train_robust")
    assert "threat.epsilon 9 is larger than the distance from a black to a white image" in text
    assert "8.00" in text


def test_a_generator_that_halves_odd_images_is_refused(finished, tmp_path):
    project = finished.copy_without("train_diffusion", tmp_path / "project")
    project.write({"train_diffusion": {"network": {"multipliers": [1, 1, 1, 1, 1]}}})
    text = _refused(project, "train_diffusion")
    assert "5 multipliers halve the images 4 times, which 8x8 pixels do not allow" in text
