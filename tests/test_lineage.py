"""`dmat runs lineage`: the whole chain of stages behind a result, and where it is broken.

Run alone: pytest tests/test_lineage.py
"""

import json
import shutil

import pytest

from dmat import files
from dmat.report import lineage
from tests import forked
from tests.projects import STAGE_OPTIONS, Project


@pytest.fixture
def project(finished, tmp_path):
    folder = tmp_path / "project"
    shutil.copytree(finished.folder, folder)
    return Project(folder, finished.params)


def _lineage(project, *arguments, code=0):
    exit_code, text = forked.Command(project.folder, "runs", "lineage", *arguments).wait()
    assert exit_code == code, text
    return text


def test_the_chain_holds_every_stage_behind_an_evaluation(project):
    chain = json.loads(_lineage(project, "generated-1", "--json"))
    stages = [step["stage"] for step in chain["steps"]]
    assert stages == [stage_name for stage_name in STAGE_OPTIONS if stage_name != "measure_images"]
    assert chain["broken"] == []
    steps = {step["stage"]: step for step in chain["steps"]}
    assert steps["select_images"]["inputs"]["images"]["from"] == ["generate_images edm18"]
    assert steps["evaluate_robust"]["inputs"]["classifier"]["from"] == ["train_robust generated-1"]
    for step in chain["steps"]:
        for link in step["inputs"].values():
            assert link["sha256"] == files.checksum(project.folder / link["path"])


@pytest.mark.parametrize(
    ("name", "first"),
    [
        ("generated-1", "evaluate_robust generated-1"),
        ("train_robust/generated-1", "train_robust generated-1"),
        ("artifacts/train_robust/generated-1/best.safetensors", "train_robust generated-1"),
        ("select_images/edm18_best", "select_images edm18_best"),
        ("prepare_data/all", "prepare_data all"),
    ],
)
def test_a_result_can_be_named_in_several_ways(project, name, first):
    lines = _lineage(project, name).splitlines()
    assert lines[0].startswith(f"{first}  fingerprint ")
    headings = [line.split("  fing")[0].strip() for line in lines if "  fingerprint " in line]
    assert len(headings) == len(set(headings)), "each step once"


def test_a_changed_file_breaks_the_chain(project):
    path = project.folder / "artifacts/select_images/edm18_best"
    target = next(file for file in sorted(path.rglob("*.npy")))
    data = bytearray(target.read_bytes())
    data[-1] ^= 1
    target.unlink()
    target.write_bytes(data)
    text = _lineage(project, "generated-1", code=2)
    assert "selection: artifacts/select_images/edm18_best" in text
    assert "CHANGED SINCE" in text
    assert "broken: mix_images generated read artifacts/select_images/edm18_best as " in text
    assert "broken: train_robust" not in text
    broken = json.loads(_lineage(project, "generated-1", "--json", code=2))["broken"]
    assert len(broken) == 1


def test_the_chain_can_be_drawn(project):
    _lineage(project, "generated-1", "--draw", "chain.png")
    assert (project.folder / "chain.png").read_bytes()[:4] == b"\x89PNG"


def test_unknown_or_missing_results_are_refused(project):
    assert "'nobody' is not a result of params.yaml; expected stage/instance" in _lineage(project, "nobody", code=2)
    text = _lineage(project, "train_robust/real_only-1", code=2)
    assert "real_only-1.json does not exist; expected what train_robust real_only-1 writes" in text


def test_mlflow_runs_sent_later_are_found_in_the_work_folder(tmp_path):
    """The store was unavailable when the result was finished; provenance files never change afterwards."""
    work = tmp_path / "runs/mix_images/one-0123456789ab"
    older, newer = ({"mlflow_run": None, "mlflow_parent": None, "work": "runs/mix_images/one-0123456789ab",
                     "finished": time} for time in ("2026-01-01", "2026-01-02"))  # fmt: skip
    for folder, run, provenance in ((work / "before-1", "first", older), (work, "second", newer)):
        files.write_json(folder / "finished.json", {"provenance": provenance})
        files.write_json(folder / "tracking.json", {"run": run, "parent": f"above {run}"})
    assert lineage.mlflow_runs(older, tmp_path) == ("first", "above first")
    assert lineage.mlflow_runs(newer, tmp_path) == ("second", "above second")
    assert lineage.mlflow_runs(newer | {"mlflow_run": "known"}, tmp_path) == ("known", None)
    assert lineage.mlflow_runs(newer | {"finished": "2026-01-03"}, tmp_path) == (None, None)
    assert lineage.mlflow_runs({"mlflow_run": None}, tmp_path) == (None, None), "of an earlier dmat"
