"""Only what was computed is published: damaged work is computed again, and no result is published under settings or
inputs other than its own."""

import contextlib
import json
import shutil
from pathlib import Path

import pytest

from cli import stages
from dmat import dvc_lock, files
from dmat.errors import DmatError
from dmat.jobs import mix_images
from dmat.pipeline import STAGES, code_identity
from dmat.upkeep import doctor
from dmat.workspace import Workspace


def _truncate(path):
    """Replaces the file by its first half, as an editor or a crash would: hard links elsewhere keep the old content."""
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content[: len(content) // 2])


def _alter(path):
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content[:-9] + bytes(b ^ 1 for b in content[-9:]))


def _change_a_number(path):
    """Leaves a valid record with one number that nobody computed."""
    record = json.loads(path.read_text())
    record["metrics"]["real"] += 1
    path.write_text(json.dumps(record))


def _work(project, stage_name):
    return next((project.folder / "runs" / stage_name).iterdir())


@pytest.mark.parametrize(
    ("stage_name", "name", "harm"),
    [
        ("train_scorer", "result/scorer/best.safetensors", _alter),  # again from its checkpoint
        ("train_diffusion", "pictures/loss.png", _truncate),
        ("generate_images", "result/images/labels-00001.npy", _alter),  # again that shard alone
        ("select_images", "result/selection/indices.npy", lambda path: path.unlink()),
        ("evaluate_robust", "result/evaluation/summary.json", _truncate),  # again from its shards
        ("mix_images", "metrics.json", _alter),
        ("mix_images", "finished.json", _truncate),
        ("mix_images", "finished.json", lambda path: path.write_text("{}")),
        ("mix_images", "finished.json", _change_a_number),
    ],
)
def test_a_damaged_result_is_computed_again_and_not_published(finished, tmp_path, stage_name, name, harm):
    project = finished.copy_without(f"no-{stage_name}", tmp_path / "copy")
    before, work = project.outputs(stage_name), _work(project, stage_name)
    content = (work / name).read_bytes()
    harm(work / name)
    assert (work / name).parent.is_dir()
    shutil.rmtree(project.folder / "artifacts" / stage_name)
    text = project.run(stage_name)
    assert "changed after the result was computed" in text
    assert project.outputs(stage_name) == before
    assert (work / name).is_file()
    assert name == "finished.json" or (work / name).read_bytes() == content
    assert "changed after" not in project.run(stage_name)


def test_a_file_that_no_job_wrote_is_not_published(finished, tmp_path):
    project = finished.copy_without("no-stage", tmp_path / "copy")
    before, work = project.outputs("mix_images"), _work(project, "mix_images")
    (work / "result/mix/notes.txt").write_text("mine")
    stamp = (work / "finished.json").stat().st_mtime_ns
    project.run("mix_images")
    assert project.outputs("mix_images") == before
    assert (work / "finished.json").stat().st_mtime_ns == stamp  # nothing was computed again
    assert [path.read_text() for path in work.glob("before-*/result/mix/notes.txt")] == ["mine"]


@pytest.fixture
def half_generated(finished, tmp_path):
    """A project whose generation was killed after its two shards, and its pool of shards."""
    project = finished.copy_without("no-stage", tmp_path / "half")
    expected, work = project.outputs("generate_images"), _work(project, "generate_images")
    (work / "finished.json").unlink()
    (work / "result/images/manifest.json").unlink()
    shutil.rmtree(project.folder / "artifacts/generate_images")
    (pool,) = (project.folder / "runs/pools").glob("generate_images-*")
    return project, pool, expected


@pytest.mark.parametrize(
    "harm",
    [
        lambda pool: _truncate(pool / "images-00000.npy"),
        lambda pool: _alter(pool / "labels-00001.npy"),
        lambda pool: (pool / "images-00001.npy").unlink(),
        lambda pool: _truncate(pool / "00000.json"),
        lambda pool: (pool / "00000.json").write_text("[]"),
        lambda pool: shutil.copy(pool / "00001.json", pool / "00000.json"),
    ],
    ids=["images cut", "labels altered", "images gone", "record cut", "record of another kind", "record of another"],
)
def test_a_resumed_generation_regenerates_damaged_shards(half_generated, harm):
    project, pool, expected = half_generated
    stamps = [(pool / f"images-0000{k}.npy").stat().st_mtime_ns for k in range(2)]
    harm(pool)
    text = project.run("generate_images")
    assert text.count("the shard is computed again") == 1
    assert project.outputs("generate_images") == expected
    new_stamps = [(pool / f"images-0000{k}.npy").stat().st_mtime_ns for k in range(2)]
    assert sum(a != b for a, b in zip(stamps, new_stamps, strict=True)) == 1  # the other was not made again


def test_an_unfinished_set_takes_its_shards_from_the_pool(half_generated):
    project, pool, expected = half_generated
    work = _work(project, "generate_images")
    _alter(work / "result/images/images-00000.npy")
    project.run("generate_images")
    assert project.outputs("generate_images") == expected
    assert (work / "result/images/images-00000.npy").samefile(pool / "images-00000.npy")


def _mix(project):
    with contextlib.chdir(project.folder):
        return stages.run(STAGES["mix_images"], {"arm": "generated"}, Path("params.yaml"), False, False, True)


def _during(monkeypatch, action):
    """Calls `action` while mix_images runs."""
    compute = mix_images.run

    def run(settings, job):
        metrics = compute(settings, job)
        action()
        return metrics

    monkeypatch.setattr(mix_images, "run", run)


def test_parameters_edited_while_a_stage_runs_do_not_name_its_result(finished, tmp_path, monkeypatch):
    project = finished.copy_without("mix_images", tmp_path / "copy")
    as_planned = (project.folder / "params.yaml").read_text()
    shutil.rmtree(project.folder / "artifacts/provenance/mix_images")
    _during(monkeypatch, lambda: project.write({"arms": {"generated": {"generated_share": 0.5}}}))
    with pytest.raises(DmatError) as error:
        _mix(project)
    assert "generated_share was 0.7 and is 0.5 while mix_images generated was computed" in str(error.value)
    assert "nothing was published" in str(error.value)
    assert not (project.folder / "artifacts/mix_images").exists()
    assert not (project.folder / "artifacts/provenance/mix_images").exists()

    monkeypatch.undo()  # the result is not lost: with the old parameters it is published as it is
    (project.folder / "params.yaml").write_text(as_planned)
    stamp = (_work(project, "mix_images") / "finished.json").stat().st_mtime_ns
    _mix(project)
    assert (_work(project, "mix_images") / "finished.json").stat().st_mtime_ns == stamp
    assert project.outputs("mix_images") == finished.outputs("mix_images")


@pytest.mark.parametrize("edit", ["train: [", "arms: {other: {images: none}}"])
def test_parameters_that_no_longer_name_the_instance_are_reported(finished, tmp_path, monkeypatch, edit):
    project = finished.copy_without("mix_images", tmp_path / "copy")
    _during(monkeypatch, lambda: (project.folder / "params.yaml").write_text(edit))
    with pytest.raises(DmatError, match="while mix_images generated was computed its parameters or inputs changed"):
        _mix(project)
    assert not (project.folder / "artifacts/mix_images").exists()


def test_inputs_changed_while_a_stage_runs_do_not_become_its_inputs(finished, tmp_path, monkeypatch):
    project = finished.copy_without("mix_images", tmp_path / "copy")
    shutil.rmtree(project.folder / "artifacts/provenance")
    _during(monkeypatch, lambda: _alter(project.folder / "artifacts/select_images/edm18_best/indices.npy"))
    with pytest.raises(DmatError, match=r"edm18_best was \w{12} and is \w{12} while mix_images generated was computed"):
        _mix(project)
    assert not (project.folder / "artifacts/mix_images").exists()


OTHER_CODE = 32 * "0"


def _lock_identity(project, identity, same=()):
    """Writes another identity of mix_images to code.yaml. same: further identities that code.yaml accepts."""
    locked = code_identity.read(project.folder)
    entries = [{"code": code, "why": "a test", "compared": "nothing"} for code in same]
    identities = {**locked.identities, "mix_images": identity}
    code_identity.write(project.folder, code_identity.CodeLock(identities, {"mix_images": entries}))


def test_code_that_code_yaml_does_not_name_computes_nothing(finished, tmp_path):
    project = finished.copy_without("mix_images", tmp_path / "copy")
    current = code_identity.of_stage("mix_images")
    _lock_identity(project, OTHER_CODE)
    assert project.run("mix_images", code=2).splitlines()[-1] == (
        f"error: the code of mix_images is {current[:12]}; code.yaml says 000000000000; run `dmat lock` (the stage "
        f"reruns) or `dmat lock --same mix_images --why ...` if it computes the same"
    )
    (project.folder / "code.yaml").unlink()
    assert "code.yaml does not exist" in (text := project.run("mix_images", code=2))
    assert text.endswith("run `dmat lock`\n")
    assert not (project.folder / "runs/mix_images").exists()


def _code_changes(project, monkeypatch):
    monkeypatch.setattr(code_identity, "of_stage", lambda *_: OTHER_CODE)
    return "the code of mix_images is 000000000000; code.yaml says"


def _lock_changes(project, monkeypatch):
    _lock_identity(project, OTHER_CODE, [code_identity.of_stage("mix_images")])
    return "and says 000000000000"


@pytest.mark.parametrize("change", [_code_changes, _lock_changes])
def test_code_changed_while_a_stage_runs_does_not_name_its_result(finished, tmp_path, monkeypatch, change):
    project = finished.copy_without("mix_images", tmp_path / "copy")
    shutil.rmtree(project.folder / "artifacts/provenance/mix_images")
    before, messages = (project.folder / "code.yaml").read_text(), []
    _during(monkeypatch, lambda: messages.append(change(project, monkeypatch)))
    with pytest.raises(DmatError, match="while mix_images generated was computed its code changed") as error:
        _mix(project)
    assert messages[0] in str(error.value)
    assert "nothing was published, the result is kept in" in str(error.value)
    assert not (project.folder / "artifacts/mix_images").exists()
    assert not (project.folder / "artifacts/provenance/mix_images").exists()

    monkeypatch.undo()
    (project.folder / "code.yaml").write_text(before)  # the result is not lost: it is published as it is
    stamp = (_work(project, "mix_images") / "finished.json").stat().st_mtime_ns
    _mix(project)
    assert (_work(project, "mix_images") / "finished.json").stat().st_mtime_ns == stamp
    assert project.outputs("mix_images") == finished.outputs("mix_images")
    provenance = files.read_json(project.folder / "artifacts/provenance/mix_images/generated.json")
    assert provenance["code"] == code_identity.of_stage("mix_images")


def test_other_code_has_a_work_folder_of_its_own_and_the_old_one_is_found_again(finished, tmp_path):
    project = finished.copy_without("nothing", tmp_path / "copy")
    (old,), current = (project.folder / "runs/mix_images").iterdir(), code_identity.of_stage("mix_images")
    stamp = (old / "finished.json").stat().st_mtime_ns
    _lock_identity(project, OTHER_CODE, [current])
    _mix(project)
    (new,) = {*(project.folder / "runs/mix_images").iterdir()} - {old}
    assert files.read_json(new / "finished.json")["code"] == OTHER_CODE
    _lock_identity(project, current)
    shutil.rmtree(project.folder / "artifacts/mix_images")
    _mix(project)
    assert (old / "finished.json").stat().st_mtime_ns == stamp
    assert project.outputs("mix_images") == finished.outputs("mix_images")


def test_an_edit_that_changes_nothing_for_the_stage_is_allowed(finished, tmp_path, monkeypatch):
    project = finished.copy_without("mix_images", tmp_path / "copy")
    _during(monkeypatch, lambda: project.write({"evaluate_robust": {"pgd_steps": 7}}))
    _mix(project)
    assert project.outputs("mix_images") == finished.outputs("mix_images")


def test_a_checksum_is_that_of_the_current_bytes(tmp_path):
    """Also if the size and, on a coarse clock, the time stay the same."""
    path = tmp_path / "file"
    for content in (b"one", b"two", b"six"):
        path.write_bytes(content)
        first = files.sha256(path)
        path.write_bytes(content[::-1])
        assert files.sha256(path) != first


def test_a_dvc_lock_that_is_being_written_or_merged_is_left_alone(tmp_path, monkeypatch):
    path = tmp_path / "dvc.lock"
    path.write_text("<<<<<<< HEAD\nschema: '2.0'\n=======\n>>>>>>> other\n")
    with pytest.raises(DmatError, match="holds two versions after a merge; expected one; choose one by"):
        dvc_lock.restore(tmp_path, tmp_path)
    path.write_text("")
    monkeypatch.setattr(doctor.dvc_files, "repository_holder", lambda root: "process 1")
    assert ["nothing was changed" in message for message in doctor.fix(Workspace(tmp_path, tmp_path))] == [True]
    assert path.read_text() == ""


LOCK = "schema: '2.0'\nstages:\n  prepare_data:\n    cmd: dmat prepare-data\n"


@pytest.mark.parametrize(
    ("text", "sound"),
    [(LOCK, True), ("schema: '2.0'\n", True), ("", False), ("\0" * 9, False), (LOCK[:40], False), ("stages: {}", False),
     ("schema: '2.0'\nstages:\n", False), ("schema: '2.0'\nstages:\n  a:\n", False), ("{", False), ("[]", False)],
)  # fmt: skip
def test_a_damaged_dvc_lock_is_recognised(text, sound):
    assert dvc_lock.is_sound(text.encode()) == sound


def test_a_dvc_lock_that_a_kill_emptied_is_restored(tmp_path):
    path = tmp_path / "dvc.lock"
    path.write_text(LOCK)
    dvc_lock.remember(tmp_path, tmp_path)
    path.write_text("")  # DVC was killed while it wrote
    dvc_lock.remember(tmp_path, tmp_path)  # the next stage does not copy that
    (message,) = dvc_lock.restore(tmp_path, tmp_path)
    assert "brought back from the copy that the last stage kept" in message
    assert path.read_text() == LOCK
    assert dvc_lock.restore(tmp_path, tmp_path) == []
    other = tmp_path / "tune/dvc.lock"  # of the study's own pipeline, of which there is no copy
    other.parent.mkdir()
    other.write_text("schema: ")
    assert ["`dvc repro` starts over" in message for message in dvc_lock.restore(tmp_path, tmp_path)] == [True]
    assert not other.exists()
    assert [copy.read_text() for copy in (tmp_path / "runs").glob("tune-dvc.lock-*")] == ["schema: "]


def test_every_stage_keeps_a_copy_of_dvc_lock(finished, tmp_path):
    project = finished.copy_without("mix_images", tmp_path / "copy")
    (project.folder / "dvc.lock").write_text(LOCK)
    project.run("mix_images")
    assert (project.folder / "runs/dvc.lock").read_text() == LOCK
    assert json.loads(next((project.folder / "artifacts/provenance/mix_images").iterdir()).read_text())["outputs"]
