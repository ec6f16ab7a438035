"""`dmat clean` on small constructed projects: what it removes, what it must never remove, and how much it frees."""

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
ARM = {"stage": "train_robust", "instance_name": "generated-1"}
MEGABYTE = 1 << 20


class Project:
    """params.yaml of the repository, and work, artifacts and a DVC cache as execution and DVC would write them."""

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
        compute = {"device": "cpu", "precision": "fp32", "precision_reason": "", "threads": 1, "processes": 1}
        provenance = {
            "stage": stage, "instance": instance_name, "fingerprint": fingerprint, "code": NOW,
            "settings": {"beta": 5.0}, "inputs": {}, "compute": compute | {"torch": "2"},
            "seconds": 1.0, "measured": {}, "outputs": {},
            "mlflow_run": None, "mlflow_parent": None, "work": f"runs/{work.name}", "finished": "2026-11-29T12:00:00Z",
            "host_cores": 2,
        }  # fmt: skip
        record = {"metrics": {"n": 1}, "notes": [], "code": NOW, "files": {}, "provenance": provenance}
        files.write_json(work / "finished.json", record)
        files.publish(work / "result/out", self.at(out or f"artifacts/{stage}/{instance_name}"))
        files.write_json(self.at(f"artifacts/metrics/{stage}/{instance_name}.json"), {"n": 1})
        files.write_json(self.at(f"artifacts/provenance/{stage}/{instance_name}.json"), provenance)
        return work

    def commit(self, stage: str, instance_name: str, out: str | None = None, lock: bool = True) -> None:
        """As DVC ends a stage: links outputs into its cache and names them in the run cache and (lock) in dvc.lock."""
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

    def removable(self, **options) -> dict[str, str]:
        """First path of each candidate -> its kind."""
        return {self.name(candidate.paths[0]): candidate.kind for candidate in self.survey(**options).candidates}

    def kept_reasons(self, **options) -> dict[str, str]:
        return {self.name(entry.path): entry.reason for entry in self.survey(**options).kept}

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
    """The number of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


WORK = f"runs/train_robust/generated-1-{NOW}"


# Finished work


def test_a_recorded_result_frees_its_checkpoint_and_nothing_else_changes(project):
    work = project.done()
    others = project.tree("artifacts", ".dvc")
    assert project.removable() == {WORK: "finished"}
    record_sizes = sum((work / name).stat().st_size for name in ("finished.json", "holder.json"))
    freed, remaining = project.clean()
    assert (freed, remaining) == (MEGABYTE + record_sizes, [])  # result/ has two more names: artifacts/ and DVC's cache
    assert list(project.at("runs/train_robust").iterdir()) == []
    assert project.tree("artifacts", ".dvc") == others
    assert project.removable() == {}


@pytest.mark.parametrize("lock", [False, True])
def test_work_stays_until_dvc_has_recorded_its_result(project, lock):
    """The work folder is the only copy: the result was published, and DVC was killed before it recorded anything."""
    project.finish(**ARM)
    if lock:  # of an earlier result of the same instance
        project.done("mix_images", "generated")
    assert WORK not in project.removable()
    assert "only one" in project.kept_reasons()[WORK]
    project.clean()
    assert project.at(f"{WORK}/result/out/weights").exists()


def test_another_result_of_the_same_instance_does_not_count_as_recorded(project):
    project.done(fingerprint=OLD)
    project.finish(**ARM)  # published over the old one, not recorded
    assert "only one" in project.kept_reasons()[WORK]
    old = WORK.replace(NOW, OLD)
    assert project.removable() == {old: "finished"}


@pytest.mark.parametrize("suffix", ["", ".dir"])
def test_a_result_missing_from_the_dvc_cache_does_not_count_as_recorded(project, suffix):
    work = project.done()
    outs = project.locked["train_robust@generated-1"]["outs"]
    md5 = outs[0]["md5"] if suffix else hashlib.md5((work / "result/out/weights").read_bytes()).hexdigest()
    project.at(f".dvc/cache/files/md5/{md5[:2]}/{md5[2:]}").unlink()
    assert project.removable() == {}
    assert "only one" in project.kept_reasons()[WORK]


def test_an_earlier_result_is_removable_when_the_run_cache_has_it(project):
    old = project.done(fingerprint=OLD)
    work = project.done()
    survey = project.survey()
    reasons = {candidate.paths[0]: candidate.reason for candidate in survey.candidates}
    assert "dvc.lock names another" in reasons[old]
    assert "artifacts/ has it" in reasons[work]


def test_a_result_that_is_not_in_artifacts_stays(project):
    project.done()
    shutil.rmtree(project.at("artifacts/train_robust/generated-1"))
    assert project.removable() == {}
    assert "dvc checkout" in project.kept_reasons()[WORK]


def test_the_dvc_cache_may_be_elsewhere(project, tmp_path_factory):
    project.done()
    elsewhere = tmp_path_factory.mktemp("cache") / "dvc"
    project.at(".dvc/cache").rename(elsewhere)
    assert project.removable() == {}
    project.put(".dvc/config", b"[core]\n    analytics = false\n[cache]\n    type = hardlink\n")
    project.put(".dvc/config.local", f"[cache]\n    dir = {elsewhere}\n['remote \"x\"']\n    url = /x\n".encode())
    assert project.removable() == {WORK: "finished"}


def test_copies_count_like_links(project):
    """Where DVC copies instead of linking, content decides, and the copy in runs/ is freed."""
    work = project.done()
    for file in (project.at("artifacts/train_robust/generated-1/weights"), work / "result/out/weights"):
        content = file.read_bytes()
        file.unlink()
        file.write_bytes(content)
    assert project.removable() == {WORK: "finished"}
    assert cleaning.freed([work]) == cleaning.size([work])


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("notes.txt", "no job wrote notes.txt"),
        ("best-model/weights", "no job wrote best-model"),
        ("result/out/mine.npy", "no copy of result/out/mine.npy"),
        ("result/.mine", "no copy of result/.mine"),
        ("pictures/mine.png", "no copy of pictures/mine.png"),
    ],
)
def test_a_work_folder_with_unexpected_content_is_kept(project, path, reason):
    project.done()
    project.put(f"{WORK}/{path}")
    before = project.tree()
    assert reason in project.kept_reasons()[WORK]
    project.clean()
    assert project.tree() == before


def test_folders_without_the_name_of_a_job_are_kept(project):
    work = project.done()
    for name in ("backup", "generated-1", f"generated-1-{NOW}-copy"):
        shutil.copytree(work, project.at(f"runs/train_robust/{name}"))
    shutil.copytree(work, project.at(f"runs/my_stage/generated-1-{NOW}"))
    project.at(f"runs/train_robust/real_only-1-{NOW}").symlink_to(work)
    renamed = WORK.replace(NOW, OLD)  # the note inside names another folder
    shutil.copytree(work, project.at(renamed))
    assert project.removable() == {WORK: "finished"}
    assert "is not the record" in project.kept_reasons()[renamed]
    project.clean()
    remaining = {project.name(path) for path in project.at("runs").glob("*/*")}
    assert len(remaining) == 6
    assert all(project.at(path).exists() for path in remaining if "real_only" not in path)


def test_work_that_is_a_symbolic_link_is_kept(project, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("disk") / "work"
    project.done().rename(elsewhere)
    project.at(WORK).symlink_to(elsewhere)
    assert project.removable() == {}
    assert "not named as work" in project.kept_reasons()[WORK]


def test_a_held_lock_keeps_everything_in_a_work_folder(project):
    project.done()
    project.put(f"{WORK}/before-20260101-000000/checkpoint.dmat")
    before = project.tree("runs")
    with filelock.FileLock(project.at(f"{WORK}/lock")):
        files.write_json(project.at(f"{WORK}/holder.json"), {"pid": os.getpid()})
        before = project.tree("runs")
        assert project.removable(unfinished=True) == {}
        assert project.kept_reasons()[WORK] == f"process {os.getpid()} works in it"
        project.clean(unfinished=True)
    assert project.tree("runs") == before
    assert project.removable() == {WORK: "finished"}


def test_a_lock_taken_after_the_survey_keeps_the_folder(project):
    work = project.done()
    listed_before = project.survey().candidates
    with filelock.FileLock(work / "lock"):
        freed, remaining = cleaning.remove(listed_before)
    assert freed == 0
    assert [entry.reason for entry in remaining] == ["a process began to work in it meanwhile"]
    assert (work / "result/out/weights").exists()


def test_a_folder_that_changed_after_the_survey_is_kept(project):
    stopped = project.work(**ARM)
    listed_before = project.survey(unfinished=True).candidates
    os.utime(stopped / "checkpoint.dmat", (1, time.time() + 5))
    freed, remaining = cleaning.remove(listed_before)
    assert freed == 0
    assert "changed meanwhile" in remaining[0].reason
    assert (stopped / "checkpoint.dmat").exists()


def test_a_run_not_fully_sent_to_mlflow_is_kept(project):
    work = project.done()
    aside = project.put(f"{WORK}/before-20260101-000000/checkpoint.dmat", b"x").parent
    note = {"pid": 1, "started": "gone", "host": "h", "by_children": False, "store": "embedded"}
    for name, folder in (("work", work), ("aside", aside)):
        relative = str(folder.relative_to(project.folder))
        project.put(f"mlruns/active/{name}.json", json.dumps(note | {"folder": relative}).encode())
    assert project.removable() == {}
    assert "dmat runs sync" in project.kept_reasons()[WORK]
    assert "dmat runs sync" in project.kept_reasons()[f"{WORK}/before-20260101-000000"]


# Work set aside, work that was stopped


def test_work_set_aside_is_removed_alone(project):
    work = project.finish(**ARM)
    project.put(f"{WORK}/before-20260101-000000/checkpoint.dmat", bytes(MEGABYTE))
    project.put(f"{WORK}/before-me/keep")
    assert project.removable() == {f"{WORK}/before-20260101-000000": "aside"}
    assert project.clean() == (MEGABYTE, [])
    assert (work / "result/out/weights").exists()
    assert (work / "before-me/keep").exists()


def test_a_folder_is_listed_once(project):
    project.done()
    project.put(f"{WORK}/before-20260101-000000/checkpoint.dmat", bytes(MEGABYTE))
    assert project.removable() == {WORK: "finished"}
    assert cleaning.freed([project.at(WORK)]) > 2 * MEGABYTE


def test_stopped_work_is_removed_only_on_request(project):
    work = project.work(**ARM)
    assert project.removable() == {}
    assert "--unfinished" in project.kept_reasons()[WORK]
    project.clean()
    assert work.exists()
    assert project.removable(unfinished=True) == {WORK: "unfinished"}
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
        assert "computes tune generated" in project.kept_reasons()["artifacts/train_robust/generated-1"]
    assert project.removable(unfinished=True) == {
        WORK: "finished",
        "artifacts/train_robust/generated-1": "unlisted",
        f"runs/tune/generated-{NOW}/before-20260101-000000": "aside",
    }


# Artifacts of instances that params.yaml no longer names


def test_artifacts_of_a_removed_arm_are_removed_and_others_kept(project):
    for arm in ("real_only", "generated"):
        project.done("mix_images", arm)
        project.done("train_robust", f"{arm}-1")
    assert set(project.removable().values()) == {"finished"}
    project.drop_arm()
    survey = project.survey()
    unlisted = {
        project.name(path)
        for candidate in survey.candidates
        if candidate.kind == "unlisted"
        for path in candidate.paths
    }
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
    assert project.removable() == {}


def test_bytes_are_freed_with_the_last_hard_link(project):
    """The same file in runs/ and artifacts/: removing one name frees nothing, removing both does, unless DVC's
    cache has it too."""
    work = project.finish(**ARM)
    artifact = project.at("artifacts/train_robust/generated-1")
    length = (artifact / "weights").stat().st_size
    assert cleaning.freed([work / "result"]) == cleaning.freed([artifact]) == 0
    assert cleaning.freed([work / "result", artifact]) == length
    project.commit(**ARM)
    assert cleaning.freed([work / "result", artifact]) == 0


def test_unlisted_artifacts_without_a_copy_in_dvc_are_kept(project):
    project.finish(**ARM)
    project.drop_arm()
    assert project.removable() == {}
    assert "DVC has no copy of artifacts/train_robust/generated-1/weights" in project.kept_reasons()[
        "artifacts/train_robust/generated-1"
    ]  # fmt: skip


def test_unlisted_artifacts_with_unexpected_content_are_kept(project):
    project.done()
    project.drop_arm()
    project.put("artifacts/train_robust/generated-1/notes.txt")
    project.put("artifacts/train_robust/my_backup/weights")
    before = project.tree("artifacts")
    assert "notes.txt" in project.kept_reasons()["artifacts/train_robust/generated-1"]
    assert set(project.removable().values()) == {"finished"}
    project.clean()
    assert project.tree("artifacts") == before


def test_an_unlisted_image_set_is_removed_alone(project):
    for image_set in ("other", "edm18"):
        out = f"artifacts/generate_images/{image_set}"
        project.finish("generate_images", image_set, OLD if image_set == "other" else NOW, out)
        project.commit("generate_images", image_set, out)
    candidates = [candidate for candidate in project.survey().candidates if candidate.kind == "unlisted"]
    assert [project.name(candidate.paths[0]) for candidate in candidates] == ["artifacts/generate_images/other"]


def test_a_pool_is_removed_after_all_work_folders_of_its_stage(project):
    """Shards are then restored from DVC's cache; an unfinished set still takes shards from the pool."""
    project.done("generate_images", "edm18")
    for stage in ("generate_images", "score_images"):
        project.put(f"runs/pools/{stage}-{NOW}/images-00000.npy")
    stopped = project.work("generate_images", "larger")
    assert f"runs/pools/generate_images-{NOW}" not in project.removable()
    assert project.removable()[f"runs/pools/score_images-{NOW}"] == "pool"
    assert project.removable(unfinished=True)[f"runs/pools/generate_images-{NOW}"] == "pool"
    with filelock.FileLock(stopped / "lock"):
        assert f"runs/pools/generate_images-{NOW}" not in project.removable(unfinished=True)
    project.clean(unfinished=True)
    assert list(project.at("runs/pools").iterdir()) == []


def test_artifacts_are_kept_while_a_process_runs(project):
    project.done()
    project.drop_arm()
    project.work("train_robust", "real_only-1")
    artifact = "artifacts/train_robust/generated-1"
    with filelock.FileLock(project.at(f"runs/train_robust/real_only-1-{NOW}/lock")):
        assert "computes train_robust real_only-1" in project.kept_reasons()[artifact]
        assert artifact not in project.removable()
    # a process with dvc in its command line, as DVC records itself while a stage runs
    dvc = subprocess.Popen([sys.executable, "-c", "input()", "dvc", "repro"], stdin=subprocess.PIPE)
    try:
        claim = {"pid": dvc.pid, "cmd": "dvc repro"}
        project.put(".dvc/tmp/rwlock", json.dumps({"write": {"/x": claim}, "read": {"/y": [claim]}}).encode())
        assert f"`dvc repro` (process {dvc.pid}) is running" in project.kept_reasons()[artifact]
    finally:
        dvc.communicate(b"\n")
    assert project.removable()[artifact] == "unlisted"  # a claim of a dead process keeps nothing


def test_clean_knows_the_paths_of_every_stage(project):
    """Paths of an unlisted instance are those that the table names for a listed one."""
    params = config.load(project.at("params.yaml"))
    workspace = find_workspace(project.folder)
    instances = 0
    for stage_name, stage in STAGES.items():
        for instance in stage.all_instances(params) if stage.keys else ():
            extra_paths = (stage.pictures_path(instance), stage.metrics_path(instance), stage.provenance_path(instance))
            expected = [*stage.outputs(params, **instance).values(), *extra_paths]
            for path in expected:
                project.put(path)
            actual = cleaning._instance_paths(workspace, stage_name, stage.instance_name(instance))
            assert [project.name(path) for path in actual] == expected
            instances += 1
    assert instances == 11


# Leftovers of killed processes


def test_leftovers_are_removed_when_their_process_has_ended(project, dead):
    removable_paths = [
        f"artifacts/metrics/train_robust/.generated-1.json.{dead}.tmp",
        f"artifacts/train_robust/.generated-1.{dead}.new/weights",
        f"{WORK}/.checkpoint.dmat.{dead}.tmp",
        f"runs/train_robust/.real_only-1-{NOW}.{dead}.gone/checkpoint.dmat",
        f".params.yaml.{dead}.tmp",
    ]
    kept_paths = [
        f"artifacts/metrics/train_robust/.generated-1.json.{os.getpid()}.tmp",
        f"artifacts/train_robust/.generated-1.{dead}.old/weights",  # nothing replaced it
        f"artifacts/train_robust/generated-1.{dead}.tmp",
        f"artifacts/train_robust/.generated-1.{dead}.bak",
        f".env.{dead}.old",
        f".notes.{dead}.tmp",
        f"mlruns/.x.{dead}.tmp",
        f"docs/.x.{dead}.tmp",
    ]
    for path in (*removable_paths, *kept_paths):
        project.put(path)
    kinds = project.removable()
    assert set(kinds.values()) == {"leftover"}
    assert len(kinds) == len(removable_paths)
    assert [path for path in project.kept_reasons() if path.endswith(".gone")] == []
    assert "and the present one is missing" in project.kept_reasons()[f"artifacts/train_robust/.generated-1.{dead}.old"]
    project.clean()
    assert [path for path in removable_paths if project.at(path).exists()] == []
    assert [path for path in kept_paths if not project.at(path).exists()] == []
    project.put("artifacts/train_robust/generated-1/weights")
    assert project.removable() == {f"artifacts/train_robust/.generated-1.{dead}.old": "leftover"}


def test_an_interrupted_removal_leaves_no_folder_that_looks_complete(project, monkeypatch):
    work = project.done()
    monkeypatch.setattr(shutil, "rmtree", lambda path: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        project.clean()
    assert not work.exists()
    (remaining,) = project.at("runs/train_robust").iterdir()
    assert remaining.name == f".{work.name}.{os.getpid()}.gone"
    assert project.removable() == {}  # its process is this one, which still runs


def test_a_failed_removal_is_reported_and_not_counted(project, monkeypatch):
    project.done()
    project.put(f"artifacts/metrics/.x.{2**22 + 1}.tmp", bytes(1000))  # beyond the largest process number

    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(shutil, "rmtree", refuse)
    freed, remaining = project.clean()
    assert freed == 1000
    assert "Permission denied" in remaining[0].reason


# Age, the command line


def test_older_than_uses_the_newest_file(project):
    work = project.done()
    past = time.time() - 3 * 86400
    for path in work.rglob("*"):
        os.utime(path, (past, past))
    assert project.removable(older_than=2) == {WORK: "finished"}
    assert project.removable(older_than=4) == {}
    assert project.kept_reasons(older_than=4) == {WORK: "changed in the last 4 days"}
    os.utime(work / "lock")  # a lock that was taken is no change
    assert project.removable(older_than=2) == {WORK: "finished"}
    os.utime(work / "result/out/weights")
    assert project.removable(older_than=2) == {}


def run(project: Project, monkeypatch, *arguments: str, code: int = 0) -> str:
    monkeypatch.chdir(project.folder)
    result = CliRunner().invoke(app, ["clean", *arguments])
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
    assert "the next `dvc repro` regenerates the report" in shown
    assert "dvc gc -w" in shown
    record = json.loads(run(project, monkeypatch, "--json"))
    assert project.tree() == before
    assert record["deleted"] is False
    assert {candidate["kind"] for candidate in record["candidates"]} == {"finished", "unlisted"}
    deleted = run(project, monkeypatch, "--yes")
    assert "Deleted 2; freed 1.0 MiB." in deleted
    assert not project.at(WORK).exists()
    assert "Nothing can be deleted." in run(project, monkeypatch, "--yes")


def test_nothing_is_removed_with_invalid_parameters(project, monkeypatch):
    """Without valid parameters it is unknown which results are current."""
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


def test_a_damaged_dvc_lock_stops_clean(project):
    project.done()
    project.at("dvc.lock").write_text("<<<<<<< HEAD\n: {")
    with pytest.raises(DmatError, match=r"dvc\.lock is not valid YAML"):
        project.survey()
