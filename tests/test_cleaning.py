"""`dmat clean` on small projects made by hand: what goes, what must never go, and what the disk gets back."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import filelock
import pytest
import yaml
from typer.testing import CliRunner

from cli.main import app
from dmat import config, files
from dmat.errors import DmatError
from dmat.pipeline import STAGES
from dmat.upkeep import cleaning
from dmat.workspace import find_workspace

NOW, OLD = "a" * 12, "b" * 12  # fingerprints
ARM = {"stage": "train_robust", "instance": "generated-1"}
MEGABYTE = 1 << 20


class Project:
    """params.yaml of the repository, and work, artifacts and a DVC cache as execution and DVC would leave them."""

    def __init__(self, folder: Path, params: dict):
        self.folder, self.params = folder, params
        self.locked: dict[str, dict] = {}
        (folder / ".dvc/tmp").mkdir(parents=True)
        self.write()

    def write(self) -> None:
        (self.folder / "params.yaml").write_text(yaml.safe_dump(self.params, sort_keys=False))

    def at(self, path: str) -> Path:
        return self.folder / path

    def put(self, path: str, content: bytes = b"x") -> Path:
        self.at(path).parent.mkdir(parents=True, exist_ok=True)
        self.at(path).write_bytes(content)
        return self.at(path)

    def work(self, stage: str, instance_name: str, fingerprint: str = NOW, checkpoint: int = MEGABYTE) -> Path:
        """A stopped run."""
        folder = f"runs/{stage}/{instance_name}-{fingerprint}"
        self.put(f"{folder}/lock", b"")
        self.put(f"{folder}/holder.json", b'{"pid": 1}')
        self.put(f"{folder}/checkpoint.dmat", bytes(checkpoint))
        return self.at(folder)

    def finish(self, stage: str, instance_name: str, fingerprint: str = NOW, out: str | None = None, **more) -> Path:
        """A finished run, published to artifacts/ by hard links."""
        work = self.work(stage, instance_name, fingerprint, **more)
        (work / "result/out").mkdir(parents=True)
        (work / "result/out/weights").write_bytes(f"{stage} {instance_name} {fingerprint}".encode() * 100)
        provenance = {"stage": stage, "instance": instance_name, "fingerprint": fingerprint, "settings": {"beta": 5.0}}
        files.write_json(work / "finished.json", {"metrics": {"n": 1}, "code": NOW, "provenance": provenance})
        files.publish(work / "result/out", self.at(out or f"artifacts/{stage}/{instance_name}"))
        files.write_json(self.at(f"artifacts/metrics/{stage}/{instance_name}.json"), {"n": 1})
        files.write_json(self.at(f"artifacts/provenance/{stage}/{instance_name}.json"), provenance)
        return work

    def commit(self, stage: str, instance_name: str, out: str | None = None, lock: bool = True) -> None:
        """As DVC ends a stage: outputs hard-linked into its cache, named by the run cache and (lock) by dvc.lock."""
        paths = [out or f"artifacts/{stage}/{instance_name}"]
        paths += [f"artifacts/{kind}/{stage}/{instance_name}.json" for kind in ("metrics", "provenance")]
        entry = {"cmd": "dmat", "outs": [{"path": p, "hash": "md5", "md5": self._add(self.at(p))} for p in paths]}
        name = hashlib.sha256(repr(entry).encode()).hexdigest()
        self.put(f".dvc/cache/runs/{name[:2]}/{name}/{name}", yaml.safe_dump(entry).encode())
        if lock:
            self.locked[f"{stage}@{instance_name}"] = entry
            self.put("dvc.lock", yaml.safe_dump({"schema": "2.0", "stages": self.locked}).encode())

    def _add(self, path: Path) -> str:
        if path.is_dir():
            inside = [{"md5": self._add(f), "relpath": str(f.relative_to(path))} for f in files.visible_files(path)]
            text = json.dumps(inside).encode()
            md5 = f"{hashlib.md5(text).hexdigest()}.dir"
            self.put(f".dvc/cache/files/md5/{md5[:2]}/{md5[2:]}", text)
            return md5
        md5 = hashlib.md5(path.read_bytes()).hexdigest()
        cached = self.at(f".dvc/cache/files/md5/{md5[:2]}/{md5[2:]}")
        cached.parent.mkdir(parents=True, exist_ok=True)
        if not cached.exists():
            os.link(path, cached)
        return md5

    def done(self, stage: str = "train_robust", instance_name: str = "generated-1", **more) -> Path:
        work = self.finish(stage, instance_name, **more)
        self.commit(stage, instance_name)
        return work

    def survey(self, **options) -> cleaning.Survey:
        return cleaning.survey(find_workspace(self.folder), config.load(self.at("params.yaml")), **options)

    def goes(self, **options) -> dict[str, str]:
        """First path -> kind."""
        return {self.name(one.paths[0]): one.kind for one in self.survey(**options).candidates}

    def kept(self, **options) -> dict[str, str]:
        return {self.name(one.path): one.reason for one in self.survey(**options).kept}

    def name(self, path: Path) -> str:
        return path.relative_to(self.folder).as_posix()

    def clean(self, **options) -> tuple[int, list[cleaning.KeptPath]]:
        return cleaning.remove(self.survey(**options).candidates)

    def drop_arm(self) -> None:
        """params.yaml without the arm `generated`, which a study may name too."""
        self.params.pop("tune", None)
        del self.params["arms"]["generated"]
        self.write()

    def tree(self, *below: str) -> dict[str, bytes]:
        return {
            self.name(path): path.read_bytes()
            for base in below or (".",)
            for path in sorted(self.at(base).rglob("*"))
            if path.is_file()
        }


@pytest.fixture
def project(tmp_path, tiny_params):
    return Project(tmp_path, tiny_params)


@pytest.fixture
def dead() -> int:
    """A process number that nobody has."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


WORK = f"runs/train_robust/generated-1-{NOW}"


# Finished work


def test_a_recorded_result_frees_its_checkpoint_and_nothing_else_changes(project):
    work = project.done()
    others = project.tree("artifacts", ".dvc")
    assert project.goes() == {WORK: "finished"}
    notes = sum((work / name).stat().st_size for name in ("finished.json", "holder.json"))
    freed, stayed = project.clean()
    assert (freed, stayed) == (MEGABYTE + notes, [])  # result/ has two more names: artifacts/ and DVC's cache
    assert list(project.at("runs/train_robust").iterdir()) == []
    assert project.tree("artifacts", ".dvc") == others
    assert project.goes() == {}


@pytest.mark.parametrize("lock", [False, True])
def test_work_stays_until_dvc_has_recorded_its_result(project, lock):
    """The window in which the work folder is the only copy: published, and DVC killed before it wrote anything."""
    project.finish(**ARM)
    if lock:  # of an earlier result of the same instance
        project.done("mix_images", "generated")
    assert WORK not in project.goes()
    assert "only one" in project.kept()[WORK]
    project.clean()
    assert project.at(f"{WORK}/result/out/weights").exists()


def test_another_result_of_the_same_instance_is_no_record(project):
    project.done(fingerprint=OLD)
    project.finish(**ARM)  # published over the old one, not recorded
    assert "only one" in project.kept()[WORK]
    old = WORK.replace(NOW, OLD)
    assert project.goes() == {old: "finished"}


@pytest.mark.parametrize("suffix", ["", ".dir"])
def test_a_result_that_dvc_lost_from_its_cache_is_no_record(project, suffix):
    work = project.done()
    outs = project.locked["train_robust@generated-1"]["outs"]
    md5 = outs[0]["md5"] if suffix else hashlib.md5((work / "result/out/weights").read_bytes()).hexdigest()
    project.at(f".dvc/cache/files/md5/{md5[:2]}/{md5[2:]}").unlink()
    assert project.goes() == {}
    assert "only one" in project.kept()[WORK]


def test_an_earlier_result_goes_when_the_run_cache_has_it(project):
    old = project.done(fingerprint=OLD)
    work = project.done()
    survey = project.survey()
    reasons = {one.paths[0]: one.reason for one in survey.candidates}
    assert "dvc.lock names another" in reasons[old]
    assert "artifacts/ has it" in reasons[work]


def test_a_result_that_is_not_in_artifacts_stays(project):
    project.done()
    shutil.rmtree(project.at("artifacts/train_robust/generated-1"))
    assert project.goes() == {}
    assert "dvc checkout" in project.kept()[WORK]


def test_the_cache_may_be_elsewhere(project, tmp_path_factory):
    project.done()
    elsewhere = tmp_path_factory.mktemp("cache") / "dvc"
    project.at(".dvc/cache").rename(elsewhere)
    assert project.goes() == {}
    project.put(".dvc/config", b"[core]\n    analytics = false\n[cache]\n    type = hardlink\n")
    project.put(".dvc/config.local", f"[cache]\n    dir = {elsewhere}\n['remote \"x\"']\n    url = /x\n".encode())
    assert project.goes() == {WORK: "finished"}


def test_copies_count_like_links(project):
    """Where DVC copies instead of linking, content decides, and the copy in runs/ is freed."""
    work = project.done()
    for file in (project.at("artifacts/train_robust/generated-1/weights"), work / "result/out/weights"):
        content = file.read_bytes()
        file.unlink()
        file.write_bytes(content)
    assert project.goes() == {WORK: "finished"}
    assert cleaning.freed([work]) == cleaning.size([work])


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("notes.txt", "no job wrote notes.txt"),
        ("best-model/weights", "no job wrote best-model"),
        ("result/out/mine.npy", "no copy of result/out/mine.npy"),
        ("result/.mine", "no copy of result/.mine"),
        ("pictures/mine.png", "no copy of pictures/mine.png"),
    ],
)
def test_a_work_folder_with_unexpected_content_is_left_alone(project, path, said):
    project.done()
    project.put(f"{WORK}/{path}")
    before = project.tree()
    assert said in project.kept()[WORK]
    project.clean()
    assert project.tree() == before


def test_folders_that_no_job_named_are_left_alone(project):
    work = project.done()
    for name in ("backup", "generated-1", f"generated-1-{NOW}-copy"):
        shutil.copytree(work, project.at(f"runs/train_robust/{name}"))
    shutil.copytree(work, project.at(f"runs/my_stage/generated-1-{NOW}"))
    project.at(f"runs/train_robust/real_only-1-{NOW}").symlink_to(work)
    renamed = WORK.replace(NOW, OLD)  # the note inside names another folder
    shutil.copytree(work, project.at(renamed))
    assert project.goes() == {WORK: "finished"}
    assert "is not the note" in project.kept()[renamed]
    project.clean()
    left = {project.name(path) for path in project.at("runs").glob("*/*")}
    assert len(left) == 6
    assert all(project.at(path).exists() for path in left if "real_only" not in path)


def test_work_that_was_moved_elsewhere_and_linked_is_left_alone(project, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("disk") / "work"
    project.done().rename(elsewhere)
    project.at(WORK).symlink_to(elsewhere)
    assert project.goes() == {}
    assert "not named as work" in project.kept()[WORK]


def test_a_held_lock_keeps_everything_in_a_work_folder(project):
    project.done()
    project.put(f"{WORK}/before-20260101-000000/checkpoint.dmat")
    before = project.tree("runs")
    with filelock.FileLock(project.at(f"{WORK}/lock")):
        files.write_json(project.at(f"{WORK}/holder.json"), {"pid": os.getpid()})
        before = project.tree("runs")
        assert project.goes(unfinished=True) == {}
        assert project.kept()[WORK] == f"process {os.getpid()} works in it"
        project.clean(unfinished=True)
    assert project.tree("runs") == before
    assert project.goes() == {WORK: "finished"}


def test_a_lock_taken_after_the_look_keeps_the_folder(project):
    work = project.done()
    seen = project.survey().candidates
    with filelock.FileLock(work / "lock"):
        freed, stayed = cleaning.remove(seen)
    assert freed == 0
    assert [one.reason for one in stayed] == ["somebody began to work in it meanwhile"]
    assert (work / "result/out/weights").exists()


def test_what_changed_after_the_look_stays(project):
    stopped = project.work(**ARM)
    seen = project.survey(unfinished=True).candidates
    os.utime(stopped / "checkpoint.dmat", (1, time.time() + 5))
    freed, stayed = cleaning.remove(seen)
    assert freed == 0
    assert "changed meanwhile" in stayed[0].reason
    assert (stopped / "checkpoint.dmat").exists()


def test_a_run_that_mlflow_lacks_part_of_stays(project):
    work = project.done()
    aside = project.put(f"{WORK}/before-20260101-000000/checkpoint.dmat", b"x").parent
    note = {"pid": 1, "started": 0.0, "host": "h", "by_children": False, "store": "embedded"}
    for name, folder in (("work", work), ("aside", aside)):
        relative = str(folder.relative_to(project.folder))
        project.put(f"mlruns/active/{name}.json", json.dumps(note | {"folder": relative}).encode())
    assert project.goes() == {}
    assert "dmat runs sync" in project.kept()[WORK]
    assert "dmat runs sync" in project.kept()[f"{WORK}/before-20260101-000000"]


# Work set aside, work that was stopped


def test_work_set_aside_goes_alone(project):
    work = project.finish(**ARM)
    project.put(f"{WORK}/before-20260101-000000/checkpoint.dmat", bytes(MEGABYTE))
    project.put(f"{WORK}/before-me/keep")
    assert project.goes() == {f"{WORK}/before-20260101-000000": "aside"}
    assert project.clean() == (MEGABYTE, [])
    assert (work / "result/out/weights").exists()
    assert (work / "before-me/keep").exists()


def test_a_folder_is_offered_once(project):
    project.done()
    project.put(f"{WORK}/before-20260101-000000/checkpoint.dmat", bytes(MEGABYTE))
    assert project.goes() == {WORK: "finished"}
    assert cleaning.freed([project.at(WORK)]) > 2 * MEGABYTE


def test_stopped_work_goes_only_when_asked_for(project):
    work = project.work(**ARM)
    assert project.goes() == {}
    assert "--unfinished" in project.kept()[WORK]
    project.clean()
    assert work.exists()
    assert project.goes(unfinished=True) == {WORK: "unfinished"}
    freed, _ = project.clean(unfinished=True)
    assert freed >= MEGABYTE
    assert not work.exists()


def test_a_study_keeps_its_trials_and_counts_as_work(project):
    work = project.work("tune", "generated")
    project.put(f"runs/tune/generated-{NOW}/trial-0000/result/weights")
    project.put(f"runs/tune/generated-{NOW}/before-20260101-000000/trial-0000/weights")
    project.put("runs/tune/studies.db")
    project.put("artifacts/tune/generated/trials.csv")
    project.done()
    project.drop_arm()
    with filelock.FileLock(work / "lock"):
        assert "computes tune generated" in project.kept()["artifacts/train_robust/generated-1"]
    assert project.goes(unfinished=True) == {
        WORK: "finished",
        "artifacts/train_robust/generated-1": "unlisted",
        f"runs/tune/generated-{NOW}/before-20260101-000000": "aside",
    }


# Artifacts of instances that are gone from params.yaml


def test_a_removed_arm_goes_and_the_others_stay(project):
    for arm in ("real_only", "generated"):
        project.done("mix_images", arm)
        project.done("train_robust", f"{arm}-1")
    assert set(project.goes().values()) == {"finished"}
    project.drop_arm()
    survey = project.survey()
    unlisted = {project.name(path) for one in survey.candidates if one.kind == "unlisted" for path in one.paths}
    assert unlisted == {
        *("artifacts/mix_images/generated", "artifacts/train_robust/generated-1"),
        *(f"artifacts/{kind}/mix_images/generated.json" for kind in ("metrics", "provenance")),
        *(f"artifacts/{kind}/train_robust/generated-1.json" for kind in ("metrics", "provenance")),
    }
    assert survey.reruns_report  # it reads artifacts/mix_images and artifacts/train_robust
    before = project.tree()
    cleaning.remove(survey.candidates)
    after = project.tree()
    assert [path for path in unlisted if project.at(path).exists()] == []
    for path in before:
        if "generated" not in path and path.startswith(("artifacts/", ".dvc/")):
            assert after[path] == before[path]
    assert project.goes() == {}


def test_bytes_count_when_the_last_name_goes(project):
    """The same file in runs/ and artifacts/: neither alone frees it, both do, unless DVC's cache has it too."""
    work = project.finish(**ARM)
    artifact = project.at("artifacts/train_robust/generated-1")
    length = (artifact / "weights").stat().st_size
    assert cleaning.freed([work / "result"]) == cleaning.freed([artifact]) == 0
    assert cleaning.freed([work / "result", artifact]) == length
    project.commit(**ARM)
    assert cleaning.freed([work / "result", artifact]) == 0


def test_unlisted_artifacts_that_dvc_never_had_stay(project):
    project.finish(**ARM)
    project.drop_arm()
    assert project.goes() == {}
    assert "DVC has no copy of artifacts/train_robust/generated-1/weights" in project.kept()[
        "artifacts/train_robust/generated-1"
    ]  # fmt: skip


def test_unlisted_artifacts_with_unexpected_content_stay_whole(project):
    project.done()
    project.drop_arm()
    project.put("artifacts/train_robust/generated-1/notes.txt")
    project.put("artifacts/train_robust/my_backup/weights")
    before = project.tree("artifacts")
    assert "notes.txt" in project.kept()["artifacts/train_robust/generated-1"]
    assert set(project.goes().values()) == {"finished"}
    project.clean()
    assert project.tree("artifacts") == before


def test_an_image_set_that_is_named_no_more_goes_alone(project):
    for image_set in ("other", "edm18"):
        out = f"artifacts/generate_images/{image_set}"
        project.finish("generate_images", image_set, OLD if image_set == "other" else NOW, out)
        project.commit("generate_images", image_set, out)
    candidates = [one for one in project.survey().candidates if one.kind == "unlisted"]
    assert [project.name(one.paths[0]) for one in candidates] == ["artifacts/generate_images/other"]


def test_a_pool_goes_after_every_work_folder_of_its_stage(project):
    """Shards come back from DVC's cache then; an unfinished set still takes its own from the pool."""
    project.done("generate_images", "edm18")
    for stage in ("generate_images", "score_images"):
        project.put(f"runs/pools/{stage}-{NOW}/images-00000.npy")
    stopped = project.work("generate_images", "larger")
    assert f"runs/pools/generate_images-{NOW}" not in project.goes()
    assert project.goes()[f"runs/pools/score_images-{NOW}"] == "pool"
    assert project.goes(unfinished=True)[f"runs/pools/generate_images-{NOW}"] == "pool"
    with filelock.FileLock(stopped / "lock"):
        assert f"runs/pools/generate_images-{NOW}" not in project.goes(unfinished=True)
    project.clean(unfinished=True)
    assert list(project.at("runs/pools").iterdir()) == []


def test_artifacts_stay_while_somebody_works(project):
    project.done()
    project.drop_arm()
    project.work("train_robust", "real_only-1")
    artifact = "artifacts/train_robust/generated-1"
    with filelock.FileLock(project.at(f"runs/train_robust/real_only-1-{NOW}/lock")):
        assert "computes train_robust real_only-1" in project.kept()[artifact]
        assert artifact not in project.goes()
    # a process with dvc in its command, as DVC notes itself while a stage runs
    dvc = subprocess.Popen([sys.executable, "-c", "input()", "dvc", "repro"], stdin=subprocess.PIPE)
    try:
        claim = {"pid": dvc.pid, "cmd": "dvc repro"}
        project.put(".dvc/tmp/rwlock", json.dumps({"write": {"/x": claim}, "read": {"/y": [claim]}}).encode())
        assert f"`dvc repro` (process {dvc.pid}) is running" in project.kept()[artifact]
    finally:
        dvc.communicate(b"\n")
    assert project.goes()[artifact] == "unlisted"  # a claim of a dead process keeps nothing


def test_every_stage_puts_files_where_clean_looks(project):
    """The places of an instance that is gone are those that the table names while it is there."""
    params = config.load(project.at("params.yaml"))
    workspace = find_workspace(project.folder)
    seen = 0
    for stage_name, stage in STAGES.items():
        for instance in stage.choices(params) if stage.keys else ():
            beside = (stage.pictures_path(instance), stage.metrics_path(instance), stage.provenance_path(instance))
            wanted = [*stage.outputs(params, **instance).values(), *beside]
            for path in wanted:
                project.put(path)
            found = cleaning._places_of(workspace, stage_name, stage.instance_name(instance))
            assert [project.name(path) for path in found] == wanted
            seen += 1
    assert seen == 11


# Leftovers of killed processes


def test_leftovers_go_when_their_process_is_gone(project, dead):
    goes = [
        f"artifacts/metrics/train_robust/.generated-1.json.{dead}.tmp",
        f"artifacts/train_robust/.generated-1.{dead}.new/weights",
        f"{WORK}/.checkpoint.dmat.{dead}.tmp",
        f"runs/train_robust/.real_only-1-{NOW}.{dead}.gone/checkpoint.dmat",
        f".params.yaml.{dead}.tmp",
    ]
    stays = [
        f"artifacts/metrics/train_robust/.generated-1.json.{os.getpid()}.tmp",
        f"artifacts/train_robust/.generated-1.{dead}.old/weights",  # nothing stands in its place
        f"artifacts/train_robust/generated-1.{dead}.tmp",
        f"artifacts/train_robust/.generated-1.{dead}.bak",
        f".env.{dead}.old",
        f".notes.{dead}.tmp",
        f"mlruns/.x.{dead}.tmp",
        f"docs/.x.{dead}.tmp",
    ]
    for path in (*goes, *stays):
        project.put(path)
    offered = project.goes()
    assert set(offered.values()) == {"leftover"}
    assert len(offered) == len(goes)
    assert [path for path in project.kept() if path.endswith(".gone")] == []
    assert "none in its place" in project.kept()[f"artifacts/train_robust/.generated-1.{dead}.old"]
    project.clean()
    assert [path for path in goes if project.at(path).exists()] == []
    assert [path for path in stays if not project.at(path).exists()] == []
    project.put("artifacts/train_robust/generated-1/weights")
    assert project.goes() == {f"artifacts/train_robust/.generated-1.{dead}.old": "leftover"}


def test_a_removal_that_is_cut_short_leaves_nothing_that_looks_whole(project, monkeypatch):
    work = project.done()
    monkeypatch.setattr(shutil, "rmtree", lambda path: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        project.clean()
    assert not work.exists()
    (left,) = project.at("runs/train_robust").iterdir()
    assert left.name == f".{work.name}.{os.getpid()}.gone"
    assert project.goes() == {}  # its process, this one, lives


def test_a_removal_that_fails_is_told_and_not_counted(project, monkeypatch):
    project.done()
    project.put(f"artifacts/metrics/.x.{2**22 + 1}.tmp", bytes(1000))  # beyond the largest process number

    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(shutil, "rmtree", refuse)
    freed, stayed = project.clean()
    assert freed == 1000
    assert "Permission denied" in stayed[0].reason


# Age, the command line


def test_older_than_counts_from_the_newest_file(project):
    work = project.done()
    past = time.time() - 3 * 86400
    for path in work.rglob("*"):
        os.utime(path, (past, past))
    assert project.goes(older_than=2) == {WORK: "finished"}
    assert project.goes(older_than=4) == {}
    assert project.kept(older_than=4) == {WORK: "changed in the last 4 days"}
    os.utime(work / "lock")  # asked for, not changed
    assert project.goes(older_than=2) == {WORK: "finished"}
    os.utime(work / "result/out/weights")
    assert project.goes(older_than=2) == {}


def run(project: Project, monkeypatch, *words: str, code: int = 0) -> str:
    monkeypatch.chdir(project.folder)
    result = CliRunner().invoke(app, ["clean", *words])
    assert result.exit_code == code, result.output
    return result.output


def test_the_command_shows_and_deletes_only_with_yes(project, monkeypatch):
    project.done()
    project.drop_arm()
    before = project.tree()
    shown = run(project, monkeypatch)
    assert project.tree() == before
    assert f"1.0 MiB of 1.0 MiB      {WORK}" in shown
    assert "artifacts/train_robust/generated-1 and 2 more: params.yaml has no train_robust generated-1" in shown
    assert "Nothing was deleted" in shown
    assert "the next `dvc repro` makes the report again" in shown
    assert "dvc gc -w" in shown
    record = json.loads(run(project, monkeypatch, "--json"))
    assert project.tree() == before
    assert record["deleted"] is False
    assert {one["kind"] for one in record["candidates"]} == {"finished", "unlisted"}
    deleted = run(project, monkeypatch, "--yes")
    assert "Deleted 2; 1.0 MiB came free." in deleted
    assert not project.at(WORK).exists()
    assert "Nothing can go." in run(project, monkeypatch, "--yes")


def test_nothing_is_cleaned_by_wrong_parameters(project, monkeypatch):
    """Without valid parameters nobody knows what is current."""
    project.done()
    project.at("params.yaml").write_text("arms: {}\n")
    before = project.tree()
    monkeypatch.chdir(project.folder)
    result = CliRunner().invoke(app, ["clean", "--yes"])
    assert isinstance(result.exception, DmatError)
    assert project.tree() == before


def test_a_copy_of_an_experiment_is_refused(project, tiny_params):
    inner = project.at(".dvc/tmp/exps/one")
    inner.mkdir(parents=True)
    with pytest.raises(DmatError, match="clean in"):
        Project(inner, tiny_params).survey()


def test_a_damaged_lock_file_of_dvc_stops_it(project):
    project.done()
    project.at("dvc.lock").write_text("<<<<<<< HEAD\n: {")
    with pytest.raises(DmatError, match=r"dvc\.lock is not valid YAML"):
        project.survey()
