"""The comparison while it is computed: bounds that hold the final numbers; only results of the present parameters."""

import json
import shutil

import pytest

from dmat import files
from dmat.report import interim
from dmat.report.interim import COLUMNS, InterimRun
from tests import browser
from tests.projects import Project

HISTORY = ({"images_seen": 320, "validation_clean": 0.5, "validation_robust": 0.25}, {"images_seen": 640})
BOUNDS = {"images": 1000, "broken": 120, "robust": 180, "low": 0.18, "high": 0.88,
          "likely_low": None, "likely_high": None}  # fmt: skip
ESTIMATE = {"shards": 4, "shards_done": 1, "passes_done": 300, "passes_left": 900, "seconds_left": 840.0,
            "bounds": BOUNDS}  # fmt: skip


@pytest.fixture
def project(finished, tmp_path, monkeypatch):
    """A copy of the finished project with one arm and two seeds, of which the first has run."""
    shutil.copytree(finished.folder, tmp_path / "project")
    arms = {"generated": finished.params["arms"]["generated"]}
    project = Project(tmp_path / "project", finished.params | {"arms": arms, "seeds": [1, 2]})
    project.write({"write_report": {"baseline": "generated"}})
    monkeypatch.chdir(project.folder)
    return project


def _read(call, *arguments):
    code, out, err = call("interim", "--json", *arguments)
    assert code == 0, err
    return json.loads(out)


def _unfinish(project, shards):
    """Takes back the evaluation, but for the first shards of the test images."""
    shutil.rmtree(project.folder / "artifacts/evaluate_robust/generated-1", ignore_errors=True)
    (project.folder / "artifacts/provenance/evaluate_robust/generated-1.json").unlink(missing_ok=True)
    (work,) = (project.folder / "runs/evaluate_robust").iterdir()
    (work / "finished.json").unlink(missing_ok=True)
    kept = {work / f"shards/best/shard-{number:05d}.npz" for number in range(shards)}
    for path in set((work / "shards").rglob("*.npz")) - kept:
        path.unlink()


def test_a_finished_run_has_its_result_and_a_later_one_waits(project, call):
    runs = _read(call)
    summary = files.read_json(project.folder / "artifacts/evaluate_robust/generated-1/summary.json")["best"]
    history = files.read_json(project.folder / "artifacts/train_robust/generated-1/history.json")
    name = next(name for name in summary if name.startswith("auto_attack"))
    assert runs["generated-1"]["result"] == summary[name]
    assert runs["generated-1"]["history"] == history
    assert runs["generated-2"]["training"] == "0 % of 640 images"
    assert runs["generated-2"]["estimate"] is runs["generated-2"]["result"] is None
    assert (project.folder / "runs/interim.html").exists()


def test_the_bounds_of_a_running_evaluation_hold_its_result(project, call):
    final = _read(call)["generated-1"]["result"]["value"]
    widths = []
    for shards in (4, 1, 0):
        _unfinish(project, shards)
        run = _read(call)["generated-1"]
        assert run["result"] is None
        assert run["estimate"]["shards_done"] == shards
        bounds = run["estimate"]["bounds"]
        assert bounds["low"] <= final <= bounds["high"]
        widths.append(bounds["high"] - bounds["low"])
    assert widths == [pytest.approx(0.5), pytest.approx(0.875), 1]  # 40 images in shards of 5


def test_results_of_other_parameters_do_not_count(project, call):
    project.write({"evaluate_robust": {"pgd_steps": 4}})
    run = _read(call)["generated-1"]
    assert run["result"] is None
    assert run["estimate"]["bounds"]["high"] == 1
    project.write({"train_robust": {"beta": 4.5}})
    run = _read(call)["generated-1"]
    assert (run["history"], run["training"], run["estimate"]) == ([], "0 % of 640 images", None)


def test_a_training_is_shown_while_it_writes(project, call):
    """The newest line may be incomplete, and there may be no images yet."""
    (work,) = (project.folder / "runs/train_robust").iterdir()
    shutil.rmtree(project.folder / "artifacts/train_robust")
    (project.folder / "artifacts/provenance/train_robust/generated-1.json").unlink()
    (work / "finished.json").unlink()
    lines = (work / "metrics.jsonl").read_text().splitlines(keepends=True)
    (work / "metrics.jsonl").write_text(lines[0] + lines[1][:20])
    run = _read(call)["generated-1"]
    assert run["training"] == "50 % of 640 images"
    assert run["history"] == [json.loads(lines[0])]
    shutil.rmtree(project.folder / "artifacts/mix_images")
    assert _read(call)["generated-1"]["training"] == "waits for artifacts/mix_images/generated"


def test_the_table_says_what_is_certain_and_what_is_likely():
    run = InterimRun("a", "a-1", "50 % of 640 images", HISTORY, "AutoAttack", ESTIMATE)
    cells = dict(zip(COLUMNS, interim.row(run), strict=True))
    assert (cells["validation: clean"], cells["validation: PGD"]) == ("50.0", "25.0")
    assert cells["test: certain"] == "18.0 to 88.0 (AutoAttack)"
    assert cells["test: likely, 95 %"] == "—"
    assert cells["evaluation"] == "25 %, 14 min of one process left"
    likely = ESTIMATE | {"bounds": BOUNDS | {"likely_low": 0.6, "likely_high": 0.7}}
    cells = interim.row(InterimRun("a", "a-1", "", HISTORY, "AutoAttack", likely))
    assert "60.0 to 70.0" in cells
    begun = InterimRun("a", "a-1", "", (), "AutoAttack", ESTIMATE | {"passes_done": 0})
    assert interim.row(begun)[-1] == "not begun"
    text = interim.markdown([run, begun])
    assert {line.count("|") for line in text.splitlines()} == {len(COLUMNS) + 1}


@pytest.mark.skipif(not (browser.CHROMIUM and browser.DRIVER), reason="there is no Chromium here")
@pytest.mark.parametrize("width", [390, 960])
def test_the_page_fits_and_draws_its_charts(tmp_path, width):
    likely = ESTIMATE | {"bounds": BOUNDS | {"likely_low": 0.6, "likely_high": 0.7}}
    result = {"value": 0.64, "low": 0.61, "high": 0.67, "right": 640, "n": 1000}
    history = [{"images_seen": seen, "validation_clean": 0.9, "validation_robust": 0.5} for seen in (320, 640)]
    runs = [
        InterimRun("real_only", "real_only-1", "100 % of 640 images", history, "AutoAttack", result=result),
        InterimRun("generated", "generated-1", "100 % of 640 images", history, "AutoAttack", likely),
        InterimRun("waiting", "waiting-1", "waits for artifacts/mix_images/waiting", (), "AutoAttack"),
    ]
    path = tmp_path / "interim.html"
    path.write_text(interim.render(runs, "A title with <b>", "now"))
    with browser.browser(width) as driver:
        driver.get(path.as_uri())
        assert browser.console_errors(driver) == []
        assert browser.overflowing_elements(driver) == []
        assert browser.colliding_labels(driver) == []
        bars = driver.execute_script("return document.querySelectorAll('#chart-bounds .point path').length")
        assert bars >= 2
        assert driver.execute_script("return document.querySelectorAll('[id^=chart-] .main-svg').length") >= 3
        driver.save_screenshot(str(tmp_path / f"interim-{width}.png"))
