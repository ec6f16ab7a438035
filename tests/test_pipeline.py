"""The whole pipeline by `dvc repro` at a tiny size in a fresh copy of the repository, and what reruns when."""

import copy
import csv
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest
import yaml

from dmat import config, files
from dmat.upkeep import doctor
from dmat.workspace import find_workspace
from tests import browser, fork_server, forked, servers

pytestmark = pytest.mark.timeout(2000)  # a whole `dvc repro` on a machine that is busy with other work
PIPELINE_STAGES = 14  # instances in the repository's params.yaml


class Project:
    """A fresh clone with its own parameters. It runs its own code, not that of the installed checkout."""

    def __init__(self, folder: Path, root: Path, params: dict):
        names = subprocess.run(
            ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
            cwd=root, capture_output=True, text=True, check=True,
        ).stdout.split("\0")  # fmt: skip
        for name in filter(None, names):
            if (root / name).is_file():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(root / name, folder / name)
        (folder / "dvc.lock").unlink(missing_ok=True)
        self.folder, self.params = folder, params
        self.write()
        subprocess.run(["git", "init", "-q"], cwd=folder, check=True)
        self.commit("as cloned")

    def write(self) -> None:
        (self.folder / "params.yaml").write_text(yaml.safe_dump(self.params, sort_keys=False))

    def commit(self, message: str) -> None:
        for arguments in (["add", "-A"], ["commit", "-qm", message]):
            subprocess.run(
                ["git", "-c", "user.name=t", "-c", "user.email=t@example.org", *arguments], cwd=self.folder, check=True
            )

    def start(self, *command: str, real: bool = False, **environment: str) -> subprocess.Popen:
        """real: processes of `dmat` that start as they do for users, not as tests/fork_server.py starts them."""
        bin_folder = Path(sys.executable).parent
        path = f"{bin_folder}:{os.environ['PATH']}"
        if not real:
            path = f"{fork_server.folder()}:{path}"
        return subprocess.Popen(
            [shutil.which(command[0], path=path), *command[1:]], cwd=self.folder, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env={**os.environ, "PATH": path, "PYTHONPATH": str(self.folder),
                 "OMP_NUM_THREADS": "1", "GIT_AUTHOR_NAME": "t", "GIT_AUTHOR_EMAIL": "t@example.org",
                 "GIT_COMMITTER_NAME": "t", "GIT_COMMITTER_EMAIL": "t@example.org", **environment},
        )  # fmt: skip

    def run(self, *command: str, code: int = 0, real: bool = False, **environment: str) -> str:
        process = self.start(*command, real=real, **environment)
        try:
            text, _ = process.communicate(timeout=1500)
        except subprocess.TimeoutExpired:
            for descendant in [*psutil.Process(process.pid).children(recursive=True), process]:
                descendant.kill()
            raise
        assert process.returncode == code, text
        return text

    def repro(self, *targets: str, real: bool = False, **environment: str) -> list[str]:
        """Names of the stages that ran."""
        return self.ran(self.run("dvc", "repro", *targets, real=real, **environment))

    @staticmethod
    def ran(text: str) -> list[str]:
        return [line.split("'")[1] for line in text.splitlines() if line.startswith("Running stage")]

    def json(self, path: str):
        return json.loads((self.folder / path).read_text())


class Clone(Project):
    """A `git clone` of a project."""

    def __init__(self, folder: Path, of: Project):
        subprocess.run(["git", "clone", "-q", of.folder, folder], check=True)
        self.folder, self.params = folder, yaml.safe_load((folder / "params.yaml").read_text())


@pytest.fixture(scope="module")
def project(tmp_path_factory, request):
    from tests.conftest import ROOT

    tiny = request.getfixturevalue("tiny_params_once")
    project = Project(tmp_path_factory.mktemp("clone"), ROOT, tiny)
    project.first = project.repro(DMAT_TRACKING="on")
    return project


def test_the_pipeline_runs_and_ends_with_a_comparison(project):
    assert len(project.first) == PIPELINE_STAGES
    comparison = project.json("artifacts/write_report/report/comparison.json")
    assert set(comparison["arms"]) == {"real_only", "generated"}
    for arm in comparison["arms"].values():
        assert arm["best_clean"]["n"] == 40
        assert arm["best_pgd"]["value"] <= arm["best_clean"]["value"]
    table = (project.folder / "artifacts/write_report/report/table.md").read_text()
    assert "generated − real_only" in table
    assert "n = 40" in table
    page = (project.folder / "artifacts/write_report/report/report.html").read_text()
    assert 'src="data:image/png' in page
    assert not re.findall(
        r"""(?:src|href)=["'](?!data:|#)""", re.sub(r"<script.+?</script>", "", page, flags=re.DOTALL)
    )


def test_dmat_repro_gives_what_dvc_repro_gives(project, tmp_path_factory, tiny_params_once):
    """Two stages at once, shards in workers: every byte but that of provenance and report, and one parent run."""
    from tests.conftest import ROOT

    parallel = Project(tmp_path_factory.mktemp("parallel"), ROOT, tiny_params_once)
    dmat = str(Path(sys.executable).with_name("dmat"))  # not that of the fork server, from which the stages come
    text = parallel.run(dmat, "repro", "--workers", "2", "--json", DMAT_TRACKING="on")
    lines = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
    assert sum(line["state"] == "done" for line in lines) == PIPELINE_STAGES
    open_instances, most = set(), 0
    for line in lines:
        ended = line["state"] not in ("started", "running")
        (open_instances.discard if ended else open_instances.add)(line["instance"])
        most = max(most, len(open_instances))
    assert most >= 2, "nothing ran side by side"
    checksums = [
        {
            path.relative_to(folder).as_posix(): files.sha256(path)
            for path in (folder / "artifacts").rglob("*")
            if path.is_file() and not {"provenance", "write_report"} & {*path.relative_to(folder).parts}
        }
        for folder in (project.folder, parallel.folder)
    ]
    assert checksums[0] == checksums[1]
    assert len(checksums[0]) > 60
    parallel.run("dmat", "runs", "sync")
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{parallel.folder}/mlruns/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("dmat").experiment_id])
    (parent,) = [run for run in runs if run.data.tags["dmat.stage"] == "dvc"]
    assert parent.info.run_name == "dmat repro --workers 2 --json"
    assert {run.data.tags.get("mlflow.parentRunId") for run in runs if run is not parent} == {parent.info.run_id}
    assert len(runs) == PIPELINE_STAGES + 1
    assert {run.info.status for run in runs} == {"FINISHED"}
    assert parallel.run("dvc", "status", "dvc.yaml").strip() == "Data and pipelines are up to date."
    assert parallel.run("dmat", "repro", "--json").strip() == '{"instances": 0}'


def test_the_table_is_made_of_per_image_results(project):
    """A number of the report equals a recount from the per-image tables."""
    import pyarrow.parquet

    generated, real_only = (
        pyarrow.parquet.read_table(project.folder / f"artifacts/evaluate_robust/{arm}-1/per_image.parquet")["best_pgd"]
        .to_numpy().astype(int) for arm in ("generated", "real_only"))  # fmt: skip
    difference = project.json("artifacts/write_report/report/comparison.json")["differences"]["generated"]["best_pgd"]
    assert difference["value"] == pytest.approx((generated - real_only).mean())
    assert difference["low"] <= difference["value"] <= difference["high"]


def test_only_evaluations_and_measures_read_the_test_split(project):
    """And only the report reads the measures, so nothing is chosen by the test split."""
    lock = yaml.safe_load((project.folder / "dvc.lock").read_text())["stages"]

    def readers(path):
        return {name for name, entry in lock.items() if any(d["path"].startswith(path) for d in entry["deps"])}

    measured = {"measure_images@edm18_best"}
    evaluated = {"evaluate_robust@real_only-1", "evaluate_robust@generated-1"}
    assert readers("artifacts/prepare_data/test") == evaluated | measured
    assert readers("artifacts/measure_images") == {"write_report"}


def test_mlflow_has_one_parent_and_a_finished_run_for_each_stage(project):
    project.run("dmat", "runs", "sync")
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{project.folder}/mlruns/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("dmat").experiment_id])
    parents = [run for run in runs if run.data.tags["dmat.stage"] == "dvc"]
    children = [run for run in runs if run.data.tags["dmat.stage"] != "dvc"]
    assert len(parents) == 1
    assert len(children) == PIPELINE_STAGES
    assert {run.data.tags["mlflow.parentRunId"] for run in children} == {parents[0].info.run_id}
    assert {run.info.status for run in runs} == {"FINISHED"}
    trained = next(run for run in children if run.data.tags["dvc.stage"] == "train_robust@generated-1")
    assert trained.data.params["beta"] == "5"
    evaluated = next(run for run in children if run.data.tags["dvc.stage"] == "evaluate_robust@generated-1")
    both = {"batch", "images"}  # names that an evaluation has too
    assert {item for item in trained.data.params.items() if item[0] not in both} <= evaluated.data.params.items()
    assert evaluated.data.params["train_robust.batch"] == "64"
    assert evaluated.data.params["train_robust.images"] == "edm18_best"
    comparison = "generated_minus_baseline.best_pgd"
    report = next(run for run in children if run.data.tags["dvc.stage"] == "write_report")
    assert parents[0].data.metrics[comparison] == report.data.metrics[comparison]
    assert trained.data.params["threat.epsilon"] == "1/5"
    assert trained.data.tags["git.commit"]
    assert trained.data.tags["input.mix"]
    points = client.get_metric_history(trained.info.run_id, "validation_robust")
    assert [point.step for point in points] == [320, 640]
    assert "accuracy.png" in [artifact.path for artifact in client.list_artifacts(trained.info.run_id)]


@pytest.mark.skipif(not (browser.CHROMIUM and browser.DRIVER), reason="there is no Chromium here")
def test_the_mlflow_ui_shows_experiment_parent_children_charts_and_images(project):
    project.run("dmat", "runs", "sync")
    port = servers.free_port()
    server = project.start("dmat", "ui", "--port", str(port), real=True, DMAT_TRACKING="on")
    try:
        pages = (re.search(r"http://127.0.0.1:\d+/#/experiments/\d+/runs\S*", line) for line in server.stdout)
        page = next(filter(None, pages))[0]  # printed when the server answers
        runs = json.loads(project.run("dmat", "runs", "list", "--limit", "0", "--json"))
        ids = {run["name"]: run["id"] for run in runs}
        base_url = page.partition("?")[0]
        with browser.browser(1440, 2400) as driver:  # so tall that MLflow draws all charts at once

            def shows(address: str, *texts: str) -> None:
                driver.get(address)
                forked.until(lambda: all(text in _text(driver) for text in texts))

            shows(page, "dmat", "dvc repro")  # the parent; its children are folded
            shows(f"{base_url}/{ids['dvc repro']}", "Child runs", "train_robust generated-1", "generated − real_only")
            shows(f"{base_url}/{ids['train_robust generated-1']}", "Parent run", "validation_robust", "git.commit")
            shows(f"{base_url}/{ids['train_robust generated-1']}/model-metrics", "validation_robust", "learning_rate")
            charts = "return document.querySelectorAll('.js-plotly-plot .main-svg').length"
            forked.until(lambda: driver.execute_script(charts) >= 6)
            shows(f"{base_url}/{ids['evaluate_robust generated-1']}/artifacts/confusion.png", "confusion.png")
            image = "return [...document.images].some(image => image.naturalWidth > 300)"
            forked.until(lambda: driver.execute_script(image))
    finally:
        servers.kill(server)


def _text(driver) -> str:
    return driver.execute_script("return document.body.innerText")


def test_a_repro_links_restored_runs_and_a_run_can_be_reproduced(project, tmp_path):
    """Only the report reruns; its parent links the runs of all other stages. A training is then reproduced."""
    project.params["write_report"]["title"] = "Another title"
    project.write()
    assert project.repro(real=True, DMAT_TRACKING="on") == ["write_report"]
    project.run("dmat", "runs", "sync")
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{project.folder}/mlruns/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("dmat").experiment_id])
    newer, older = [run for run in runs if run.data.tags["dmat.stage"] == "dvc"]
    run_ids = {run.info.run_name: run.info.run_id for run in runs if run.data.tags["dmat.stage"] != "dvc"}
    restored = {k.removeprefix("restored."): v for k, v in newer.data.tags.items() if k.startswith("restored.")}
    assert not [name for name in older.data.tags if name.startswith("restored.")]
    assert restored == {name: id_ for name, id_ in run_ids.items() if name != "write_report all"}
    assert len(restored) == PIPELINE_STAGES - 1
    for run in (older, newer):
        page = run.data.tags["mlflow.note.content"]
        assert "generated − real_only" in page
        assert page.count("/runs/") == PIPELINE_STAGES
        assert page.count("restored by DVC") == (PIPELINE_STAGES - 1 if run is newer else 0)
    assert newer.data.tags["git.dirty"] == "True"
    assert older.data.tags["git.dirty"] == "False"  # what DVC writes makes no tree dirty
    report = next(run for run in runs if run.info.run_name == "write_report all")  # the newest first
    assert {artifact.path for artifact in client.list_artifacts(report.info.run_id)} >= {"report.html", "git.patch"}

    tree = tmp_path / "again"
    output = project.run("dmat", "runs", "reproduce", "train_robust/generated-1", "--to", str(tree))
    assert "all data are those that the run read" in output
    assert "gives the parameters of the run" in output
    command = re.search(r"^run it again: (.+)$", output, re.MULTILINE)[1]
    weights = "artifacts/train_robust/generated-1/best.safetensors"
    assert not (tree / weights).exists()
    project.run("/bin/bash", "-c", command, PYTHONPATH="")
    assert (tree / weights).read_bytes() == (project.folder / weights).read_bytes()

    second_tree = tmp_path / "report again"
    output = project.run("dmat", "runs", "reproduce", report.info.run_id[:8], "--to", str(second_tree))
    assert yaml.safe_load((second_tree / "params.yaml").read_text())["write_report"]["title"] == "Another title"
    refusal = project.run("dmat", "runs", "reproduce", report.info.run_id[:8], "--to", str(second_tree), code=2)
    assert f"{second_tree} exists; expected a new folder" in refusal


def test_a_second_repro_runs_nothing_and_an_experiment_with_another_beta_reruns_its_arm_only(project):
    assert project.repro() == []
    before = project.json("artifacts/metrics/train_robust/real_only-1.json")
    text = project.run("dvc", "exp", "run", "--name", "gentle", "-S", "+arms.generated.beta=3.0")
    project.params = yaml.safe_load((project.folder / "params.yaml").read_text())
    ran = project.ran(text)
    # mix_images depends on its arm as a whole: it runs for a moment and writes the same file
    assert sorted(ran) == [
        "evaluate_robust@generated-1",
        "mix_images@generated",
        "train_robust@generated-1",
        "write_report",
    ]
    assert project.json("artifacts/metrics/train_robust/real_only-1.json") == before
    assert project.json("artifacts/provenance/train_robust/generated-1.json")["settings"]["beta"] == 3.0
    assert "Ran experiment(s): gentle" in text
    rows = csv.DictReader(project.run("dvc", "exp", "show", "--csv").splitlines())
    (gentle,) = [row for row in rows if row["Experiment"] == "gentle"]
    assert gentle["arms.generated.beta"] == "3.0"
    best = project.json("artifacts/metrics/evaluate_robust/generated-1.json")["best_pgd"]
    assert float(gentle["generated.best_pgd"]) == pytest.approx(best)
    metrics = [name for name in gentle if name.startswith(("generated.", "real_only.", "generated_minus_baseline."))]
    # clean and PGD, best and last, and AutoAttack of the commit that was cloned; not every number of every instance
    assert len(metrics) == 3 * 5


def test_a_clone_pulls_everything_that_was_pushed_and_compares_its_metrics(project, tmp_path):
    project.repro()
    project.run("dvc", "remote", "add", "--default", "shared", str(tmp_path / "shared"))
    project.commit("results and where they are shared")
    project.run("dvc", "push", "--quiet")
    clone = Clone(tmp_path / "clone", project)
    metrics = "artifacts/metrics/write_report/all.json"
    before = clone.json(metrics)  # of git
    clone.run("dvc", "pull", "--quiet")
    assert clone.run("dvc", "status").strip() == "Data and pipelines are up to date."
    assert clone.repro() == []
    changed = copy.deepcopy(before)
    changed["generated_minus_baseline"]["best_pgd"] += 0.5
    files.write_json(clone.folder / metrics, changed)
    (difference,) = json.loads(clone.run("dvc", "metrics", "diff", "--json", "HEAD")).values()
    assert difference["generated_minus_baseline.best_pgd"]["diff"] == pytest.approx(0.5)


def test_two_repros_at_once_and_a_dvc_that_is_killed_alone(project):
    """The second repro names the process in the way. A stage that lost its dvc gets no second writer. A result that dvc
    could not record, as after a kill before it wrote its lock, is published and not computed again."""
    quicker = project.params["arms"]["generated"]
    project.params["arms"]["generated"] = quicker | {"images_seen": 6400, "evaluate_every": 6400}
    project.write()
    folder, target = project.folder / "runs/train_robust", "train_robust@generated-1"
    before = set(folder.glob("generated-1-*/holder.json"))
    first = project.start("dvc", "repro", target, real=True)
    forked.until(
        lambda: set(folder.glob("generated-1-*/checkpoint.dmat")) - {p.with_name("checkpoint.dmat") for p in before},
        200,
    )
    (work,) = {path.parent for path in folder.glob("generated-1-*/holder.json")} - {path.parent for path in before}
    stage = psutil.Process(json.loads((work / "holder.json").read_text())["pid"])
    stage.suspend()  # it stays at work for as long as the other commands take

    second = project.start("dvc", "repro", target).communicate(timeout=1500)[0]
    assert "is being blocked by" in second
    assert f"(PID {first.pid})" in second

    first.kill()
    first.wait()  # else it stays a zombie, which DVC treats as alive
    third = project.start("dvc", "repro", target).communicate(timeout=1500)[0]
    assert f"is being computed by process {stage.pid}" in third
    assert "Traceback" not in third

    stage.resume()
    forked.until((work / "finished.json").exists)
    forked.until(lambda: not stage.is_running() or stage.status() == psutil.STATUS_ZOMBIE)
    stamp = (work / "finished.json").stat().st_mtime_ns
    assert project.repro(target) == [target]
    assert (work / "finished.json").stat().st_mtime_ns == stamp
    assert project.repro(target) == []
    project.params["arms"]["generated"] = quicker
    project.write()


def test_a_changed_generator_leaves_the_real_arm_alone(project):
    project.params["generators"]["edm"] = {"source": "none", "learning_rate": 0.001}
    project.write()
    ran = project.repro()
    assert "train_diffusion@edm" in ran
    assert "train_robust@generated-1" in ran
    assert not [name for name in ran if "real_only" in name or name in ("prepare_data", "train_scorer")]


def test_compute_settings_are_not_a_dependency(project):
    project.params["compute"]["save_every_seconds"] = 1.0
    project.write()
    assert project.repro() == []


def test_a_result_that_dvc_lost_is_published_again(project):
    """As after a kill between the end of a stage and the writing of dvc.lock: nothing is computed twice."""
    weights = project.folder / "artifacts/train_robust/real_only-1/best.safetensors"
    before = weights.read_bytes()
    stamp = next((project.folder / "runs/train_robust").glob("real_only-1-*/finished.json")).stat().st_mtime_ns
    shutil.rmtree(weights.parent)
    project.run("dmat", "train-robust", "--arm", "real_only", "--seed", "1")
    assert weights.read_bytes() == before
    assert next((project.folder / "runs/train_robust").glob("real_only-1-*/finished.json")).stat().st_mtime_ns == stamp


def test_a_lost_image_set_is_regenerated_alone_and_identical(project):
    shard = project.folder / "artifacts/generate_images/edm18/images-00000.npy"
    before = np.load(shard)
    shutil.rmtree(shard.parent)
    project.run("dmat", "generate-images", "--image-set", "edm18", "--fresh")
    assert np.array_equal(np.load(shard), before)


def test_tampered_input_is_refused_with_one_message(project):
    labels = project.folder / "artifacts/prepare_data/validation/labels-00000.npy"
    original = labels.read_bytes()
    labels.unlink()
    labels.write_bytes(original[:-8] + bytes(8))
    text = project.run("dmat", "train-scorer", code=2)
    labels.write_bytes(original)
    assert "artifacts/prepare_data/validation has checksum" in text
    assert "it was altered since; restore it (`dvc checkout`)" in text
    assert "Traceback" not in text


def test_commands_refuse_unknown_instances(project):
    text = project.run("dmat", "train-robust", "--arm", "nobody", "--seed", "1", code=2)
    assert "no instance 'nobody-1'" in text
    assert "expected one of real_only-1, generated-1" in text


def test_dry_run_plans_without_doing(project):
    plan = json.loads(project.run("dmat", "train-robust", "--arm", "generated", "--seed", "1", "--dry-run"))
    assert plan["state"].startswith("finished")
    assert plan["settings"]["threat"]["epsilon"] == "1/5"
    assert plan["settings"]["attack_step_size"] == plan["settings"]["selection_step_size"] == "0.05"
    assert set(plan["inputs"]) == {"train", "validation", "mix"}


def test_another_list_of_seeds_or_arms_is_another_report(project):
    """Also if it reads the same files: a report of three seeds is not published for one seed."""
    works = set()
    for changes in ({}, {"seeds": [1, 2]}, {"arms": {"third": project.params["arms"]["generated"]}}):
        path = project.folder / "other.yaml"
        path.write_text(yaml.safe_dump(config.merge(project.params, changes)))
        works.add(json.loads(project.run("dmat", "write-report", "--dry-run", "--params", "other.yaml"))["work"])
    path.unlink()
    assert len(works) == 3


def test_dvc_shows_metrics_and_plots(project):
    shown = json.loads(project.run("dvc", "metrics", "show", "--json"))
    (metrics,) = shown[""]["data"].values()
    assert metrics["data"] == project.json("artifacts/metrics/write_report/all.json")
    assert "html" in project.run("dvc", "plots", "show", "-o", "plots")


def test_the_plots_of_dvc_draw_one_line_for_each_arm_and_seed(project):
    shown = json.loads(project.run("dvc", "plots", "show", "--json"))["data"]
    assert len(shown) == 2
    for (plot,) in shown.values():
        chart = plot["content"]
        assert chart["encoding"]["color"]["field"] == "run"
        assert chart["encoding"]["strokeDash"]["field"] == "rev"
        assert {row["run"] for row in chart["data"]["values"]} == {"real_only-1", "generated-1"}


def test_a_dvc_lock_that_a_kill_emptied_can_be_repaired(project):
    path = project.folder / "dvc.lock"
    before = path.read_bytes()
    path.write_bytes(b"")
    process = project.start("dvc", "status")
    process.communicate(timeout=1500)
    assert process.returncode != 0  # else DVC heals itself by now, and all of this can go
    finding = project.run("dmat", "doctor", "--json", code=2)
    assert "`dmat doctor --fix` restores the copy" in finding
    assert "brought back from the copy that the last stage kept" in project.run("dmat", "doctor", "--fix")
    assert set(yaml.safe_load(path.read_text())["stages"]) <= set(yaml.safe_load(before)["stages"])
    assert "nothing to repair" in project.run("dmat", "doctor", "--fix")
    project.run("dvc", "status")
    path.write_bytes(before)


def test_a_result_that_dvc_recorded_under_other_parameters_is_detected(project, monkeypatch):
    """As after an edit between the end of a stage and DVC's reading of params.yaml, which no stage can notice."""
    monkeypatch.setattr(doctor, "CHECKS", {"dvc results": doctor.CHECKS["dvc results"]})

    def results():
        return [*doctor.examine(find_workspace(project.folder))]

    assert [finding.mark for finding in results()] == [doctor.OK]
    lock = project.folder / "dvc.lock"
    before = lock.read_text()
    content = yaml.safe_load(before)
    content["stages"]["evaluate_robust@generated-1"]["params"]["params.yaml"]["evaluate_robust"]["pgd_steps"] = 7
    lock.write_text(yaml.safe_dump(content, sort_keys=False))
    (wrong,) = results()
    assert (wrong.mark, wrong.found) == (
        doctor.PROBLEM, "evaluate_robust@generated-1 in dvc.lock: pgd_steps is 7 there and was 3",
    )  # fmt: skip
    lock.write_text(before)
    entries = [
        path for path in (project.folder / ".dvc/cache/runs").glob("*/*/*") if "evaluate-robust" in path.read_text()
    ]
    entry = next(path for path in entries if "pgd_steps: 3" in path.read_text())
    right_entry = entry.read_text()
    wrong_entry = right_entry.replace("pgd_steps: 3", "pgd_steps: 7")
    entry.write_text(wrong_entry)
    for name in (".written.tmp", "cut"):  # what a kill leaves
        entry.with_name(name).write_text("cmd: [")
    assert "wrong entries of DVC's run cache: 1" in results()[0].found
    assert "run cache had a result of evaluate_robust@" in project.run("dmat", "doctor", "--fix")
    assert not entry.exists()
    assert [path.read_text() for path in (project.folder / "runs").glob("run-cache-*")] == [wrong_entry]
    assert [finding.mark for finding in results()] == [doctor.OK]
    entry.write_text(right_entry)


def test_the_study_is_a_stage_that_a_plain_repro_does_not_run(project):
    project.params["tune"] |= {"trials": 2, "images_seen": 128, "rerank": 0}
    project.write()
    assert not any("tune" in name for name in project.repro())
    assert not (project.folder / "artifacts/tune/generated").exists()
    ignored = project.folder / ".dvcignore"
    ignored.write_text(ignored.read_text().replace("\n/tune/\n", "\n"))
    assert project.ran(project.run("dvc", "repro", "tune/dvc.yaml"))[-1:] == ["tune/dvc.yaml:tune"]
    assert project.json("artifacts/tune/generated/summary.json")["trials"] == 2
    locked = yaml.safe_load((project.folder / "tune/dvc.lock").read_text())["stages"]["tune"]
    pinned = {dependency["path"]: dependency["md5"] for dependency in locked["deps"]}
    data = {f"artifacts/{name}" for name in ("prepare_data/train", "prepare_data/validation", "mix_images/generated")}
    assert set(pinned) == data | {"plugins"}
    assert project.ran(project.run("dvc", "repro", "tune/dvc.yaml")) == []
    for folder in ("artifacts/tune", "runs/tune"):
        shutil.rmtree(project.folder / folder)
    (project.folder / "tune/dvc.lock").unlink()
    ignored.write_text(f"{ignored.read_text()}/tune/\n")


def test_clean_removes_what_dvc_can_restore_and_the_pipeline_stays_up_to_date(project):
    """Last, because it removes what other tests read. `dmat clean` must recognise everything that a stage leaves."""
    project.repro()
    shown = json.loads(project.run("dmat", "clean", "--unfinished", "--json"))
    reasons = {entry["path"]: entry["reason"] for entry in shown["kept"]}
    # a direct command with --fresh made it, so DVC has no record of it
    assert [Path(path).parent.name for path in reasons] == ["generate_images"], reasons
    removed = {Path(entry["paths"][0]).parent.name for entry in shown["candidates"] if entry["kind"] == "finished"}
    assert len(removed | {"generate_images"}) == 11
    project.run("dmat", "clean", "--unfinished", "--yes")
    remaining = [path for path in (project.folder / "runs").glob("*/*") if path.parent.name != "pools"]
    assert [str(path) for path in remaining] == list(reasons)
    pools = {path.name.rpartition("-")[0] for path in (project.folder / "runs/pools").iterdir()}
    assert pools == {"generate_images"}, "shards stay as long as a work folder of their stage does"
    assert project.repro() == []
    # back to values whose work folders are gone: DVC has the results
    project.params["generators"]["edm"] = {"source": "none"}
    project.write()
    assert project.repro() == []
