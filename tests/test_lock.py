"""`dmat lock`: code.yaml names the current code, and code can be shown to compute the same.

Run alone: pytest tests/test_lock.py
"""

import json
import shutil

import pytest
import yaml

from cli.main import main
from dmat import config, files, seeds
from dmat.errors import DmatError
from dmat.pipeline import STAGES, code_identity, planning
from dmat.robust.networks import Classifier
from dmat.upkeep import locking
from dmat.workspace import find_workspace
from tests.projects import Project

OTHER = 32 * "0"


@pytest.fixture
def dmat(monkeypatch, capsys):
    """Runs `dmat <arguments>` in a folder, in this process; returns exit code and output."""

    def run(folder, *arguments):
        monkeypatch.chdir(folder)
        monkeypatch.setattr("sys.argv", ["dmat", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code, "".join(capsys.readouterr())

    return run


@pytest.fixture
def project(tmp_path, tiny_params):
    return Project(tmp_path, tiny_params)


def _set_identities(folder, **identities):
    """Writes other identities of some stages to code.yaml."""
    locked = code_identity.read(folder)
    code_identity.write(folder, code_identity.CodeLock({**locked.identities, **identities}, locked.same))


def test_the_repository_is_locked(project, dmat):
    before = (project.folder / "code.yaml").read_bytes()
    code, text = dmat(project.folder, "lock", "--check")
    assert code == 0
    assert [line.split() for line in text.splitlines()] == [[stage, "unchanged"] for stage in STAGES]
    assert dmat(project.folder, "lock")[0] == 0
    assert (project.folder / "code.yaml").read_bytes() == before


def test_a_stage_with_other_code_is_reported_and_locked(project, dmat):
    current, before = code_identity.of_stage("mix_images"), (project.folder / "code.yaml").read_bytes()
    _set_identities(project.folder, mix_images=OTHER)
    stale = (project.folder / "code.yaml").read_bytes()
    code, text = dmat(project.folder, "lock", "--check")
    assert code == 2
    assert f"mix_images        000000000000 -> {current[:12]} (it reruns)\n" in text
    assert text.count("unchanged") == len(STAGES) - 1
    assert "error: code.yaml records other code; expected the loaded code; run `dmat lock` (the stages" in text
    assert (project.folder / "code.yaml").read_bytes() == stale
    code, text = dmat(project.folder, "lock")
    assert (code, text.count("it reruns")) == (0, 1)
    assert (project.folder / "code.yaml").read_bytes() == before


def test_lock_creates_a_missing_file_and_refuses_a_folder_without_project(project, dmat, tmp_path_factory):
    whole = (project.folder / "code.yaml").read_bytes()
    (project.folder / "code.yaml").unlink()
    code, text = dmat(project.folder, "lock", "--check")
    assert (code, "code.yaml does not exist; expected" in text) == (2, True)
    code, text = dmat(project.folder, "lock")
    assert (code, text.count("none -> ")) == (0, len(STAGES))
    assert (project.folder / "code.yaml").read_bytes() == whole
    code, text = dmat(tmp_path_factory.mktemp("empty"), "lock")
    assert (code, "is not a project: it has neither params.yaml nor mlruns" in text) == (2, True)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--same", "nobody", "--why", "x"], "--same is 'nobody'; expected one of prepare_data, train_scorer"),
        (["--same", "mix_images"], "expected --same and --why together"),
        (["--why", "x"], "expected --same and --why together"),
        (["--check", "--same", "mix_images", "--why", "x"], "and --check alone"),
        (["--same", "mix_images", "--why", "x"], "the code of mix_images is that of code.yaml; expected other code"),
    ],
)
def test_inconsistent_options_are_refused(project, dmat, arguments, sentence):
    code, text = dmat(project.folder, "lock", *arguments)
    assert (code, sentence in text) == (2, True), text


@pytest.mark.parametrize(
    "text",
    [
        "<<<<<<< HEAD\n",
        "[]",
        "mix_images: 1234\n",
        "same: {mix_images: [{code: '1'}]}\n",
        "same: 3\n",
        "same: [a]\n",
        "",
    ],
)
def test_a_malformed_code_yaml_is_refused_by_all_commands(project, dmat, text):
    (project.folder / "code.yaml").write_text(text)
    for arguments in (["lock"], ["mix-images", "--arm", "generated"]):
        code, output = dmat(project.folder, *arguments)
        assert code == 2
        assert "expected what `dmat lock` wrote; restore it from git, or delete it and run `dmat lock`" in output
    assert (project.folder / "code.yaml").read_text() == text


def test_a_stage_missing_from_code_yaml_is_reported(project, dmat):
    text = (project.folder / "code.yaml").read_text()
    (project.folder / "code.yaml").write_text("".join(x for x in text.splitlines(True) if "mix_images" not in x))
    code, output = dmat(project.folder, "mix-images", "--arm", "generated")
    assert (code, "code.yaml has no mix_images; expected a line for each stage; run `dmat lock`" in output) == (2, True)


def test_same_keeps_results_in_a_project_that_lacks_a_new_stage(edited, dmat):
    locked = code_identity.read(edited.folder)
    fewer = {stage: identity for stage, identity in locked.identities.items() if stage != "combine_selections"}
    code_identity.write(edited.folder, code_identity.CodeLock(fewer, locked.same))
    code, text = dmat(edited.folder, "lock", "--same", "mix_images", "--why", "tidier")
    assert (code, "mix_images        the same" in text) == (0, True)
    assert "combine_selections" not in code_identity.read(edited.folder).identities
    assert dmat(edited.folder, "lock")[0] == 0
    assert set(code_identity.read(edited.folder).identities) == {*STAGES}


@pytest.mark.parametrize("identity", ["1" * 32, "0" * 31 + "9", "1e" + "3" * 30, "0x" + "1" * 30, "null", "0o17"])
def test_an_identity_that_yaml_could_take_for_a_number_stays_text(project, identity):
    """In dmat's reader and in DVC's."""
    _set_identities(project.folder, mix_images=identity)
    assert code_identity.read(project.folder).identities["mix_images"] == identity
    assert yaml.safe_load((project.folder / "code.yaml").read_text())["mix_images"] == identity


def test_equivalent_code_is_recorded_kept_and_dropped(project, dmat):
    current = code_identity.of_stage("mix_images")
    entry = {"code": current, "why": 'naïve: "quotes", \\ and\nlines 🙂', "compared": "all"}
    old = code_identity.read(project.folder)
    same = code_identity.CodeLock({**old.identities, "mix_images": OTHER}, {"mix_images": [entry]})
    code_identity.write(project.folder, same)
    assert code_identity.read(project.folder) == same
    assert code_identity.expect("mix_images", project.folder) == OTHER
    code, text = dmat(project.folder, "lock")
    assert (code, text.count("unchanged")) == (0, len(STAGES))
    assert code_identity.read(project.folder) == same
    locked = code_identity.CodeLock(same.identities, {"mix_images": [{**entry, "code": 32 * "1"}]})
    assert code_identity.lock_current_code(locked) == old, "the code is neither of them"


# Code that computes the same


@pytest.fixture
def edited(finished, tmp_path, monkeypatch):
    """A finished project, and code that differs in its identity alone."""
    project = finished.copy_without("nothing", tmp_path / "project")
    monkeypatch.setattr(code_identity, "of_stage", lambda stage, *_: OTHER)
    return project


def _accept(project, stage, why="only faster"):
    workspace = find_workspace(project.folder)
    return locking.accept(workspace, config.load(project.folder / "params.yaml"), STAGES[stage], why)


def _content(project):
    return {str(path): path.read_bytes() for path in project.folder.rglob("*") if path.is_file()}


COMPARED = {
    "prepare_data": "prepare_data all: all ",
    "train_scorer": 'train_scorer all: the first record of metrics.jsonl, {"images_seen": 1280,',
    "train_diffusion": 'train_diffusion edm: the first record of metrics.jsonl, {"images_seen": 256,',
    "generate_images": "generate_images edm18: the first 25 images",
    "score_images": "score_images edm18: all 3 files and the metrics",
    "select_images": "select_images edm18_best: all 2 files and the metrics",
    "measure_images": "measure_images edm18_best: all 1 files and the metrics",
    "mix_images": "mix_images generated: all 1 files and the metrics",
    "train_robust": 'train_robust generated-1: the first record of metrics.jsonl, {"images_seen": 320,',
    "evaluate_robust": "evaluate_robust generated-1: the first shard, 5 images",
}


@pytest.mark.parametrize("stage", COMPARED)
def test_part_of_each_stage_is_recomputed_and_nothing_published(edited, stage):
    before, locked = _content(edited), code_identity.read(edited.folder)
    compared = _accept(edited, stage)
    assert compared.startswith(COMPARED[stage])
    lock_now = code_identity.read(edited.folder)
    assert lock_now.identities == locked.identities
    assert lock_now.same == {stage: [{"code": OTHER, "why": "only faster", "compared": compared}]}
    assert lock_now.accepts(stage, OTHER)
    after = _content(edited)
    changed = {path for path in {*before, *after} if before.get(path) != after.get(path)}
    assert changed == {str(edited.folder / "code.yaml")}


@pytest.mark.parametrize(
    ("key", "accepted"), [("awp_gamma", True), ("learning_rate", False), ("label_smoothing", False)]
)
def test_a_result_from_before_a_setting_existed_is_compared_if_the_setting_has_its_default(edited, key, accepted):
    """Not if a value is another one: the default of `label_smoothing` is not what params.yaml says."""
    workspace, stage = find_workspace(edited.folder), STAGES["train_scorer"]
    locked = code_identity.read(edited.folder).identity_of("train_scorer")
    plan = planning.plan(stage, {}, config.load(edited.folder / "params.yaml"), workspace, locked)
    path = workspace.at(stage.provenance_path({}))
    provenance = json.loads(path.read_text())
    assert provenance["fingerprint"] == plan.fingerprint
    del provenance["settings"][key]
    older = planning.with_fingerprint(plan, provenance["settings"], workspace)
    assert older.fingerprint != plan.fingerprint
    plan.work.rename(older.work)
    files.write_json(path, provenance | {"fingerprint": older.fingerprint})
    if accepted:
        assert _accept(edited, "train_scorer").startswith(COMPARED["train_scorer"])
    else:
        with pytest.raises(DmatError, match="there is no result of that code with these parameters and inputs"):
            _accept(edited, "train_scorer")


@pytest.mark.parametrize(
    ("stage", "sentence"),
    [
        ("generate_images", "of the first 25 images differ from the finished result; expected the same bytes"),
        ("train_diffusion", "the first record of metrics.jsonl, "),
        ("train_robust", "the first record of metrics.jsonl, "),
        ("prepare_data", "artifacts/prepare_data/test/images-00000.npy, "),
        ("evaluate_robust", "of the first shard differ from the finished result"),
    ],
)
def test_code_with_other_results_is_refused(edited, monkeypatch, stage, sentence):
    """The code draws other random numbers."""
    before, stream, normals = _content(edited), seeds.stream, seeds.normals
    monkeypatch.setattr(seeds, "stream", lambda root, purpose, index=0: stream(root + 5, purpose, index))
    monkeypatch.setattr(seeds, "normals", lambda root, *others: normals(root + 1, *others))
    if stage == "evaluate_robust":  # other random starts alone may end in the same flags
        forward = Classifier.forward
        monkeypatch.setattr(Classifier, "forward", lambda self, images: forward(self, images).roll(1, 1))
    with pytest.raises(
        DmatError, match="the code computes something else: `dmat lock`, and the stage reruns"
    ) as refused:
        _accept(edited, stage)
    assert str(refused.value).startswith(f"{stage} ")
    assert sentence in str(refused.value)
    assert _content(edited) == before


def _without_provenance(project, stage):
    shutil.rmtree(project.folder / "artifacts/provenance" / stage)


def _of_other_code(project, stage):
    _set_identities(project.folder, **{stage: 32 * "1"})


def _without_work(project, stage):
    shutil.rmtree(project.folder / "runs" / stage)


def _from_another_device(project, stage):
    (path,) = (project.folder / "artifacts/provenance" / stage).iterdir()
    provenance = json.loads(path.read_text())
    provenance["compute"] |= {"device": "NVIDIA H100", "torch": "1.0"}
    files.write_json(path, provenance)


@pytest.mark.parametrize(
    ("harm", "sentence"),
    [
        (_without_provenance, "there is no result of that code with these parameters and inputs"),
        (_of_other_code, "there is no result of that code with these parameters and inputs"),
        (_without_work, "generated-1 lacks "),
        (_from_another_device, "generated-1 was computed on device NVIDIA H100 and not cpu"),
    ],
)
def test_a_stage_without_comparable_result_is_refused(edited, harm, sentence):
    harm(edited, "train_robust")
    with pytest.raises(DmatError, match="train_robust has nothing to compare with") as refused:
        _accept(edited, "train_robust")
    assert sentence in str(refused.value)
    assert "run train_robust first, with the code that code.yaml names, or `dmat lock`" in str(refused.value)


def test_code_that_changes_while_it_is_compared_is_refused(edited, monkeypatch):
    identities = iter([OTHER, 32 * "1"])
    monkeypatch.setattr(code_identity, "of_stage", lambda *_: next(identities))
    before = _content(edited)
    with pytest.raises(DmatError, match="the code of mix_images changed while it was compared; expected no change"):
        _accept(edited, "mix_images")
    assert _content(edited) == before


def test_the_command_reports_the_comparison_and_the_stage_publishes_the_old_result(edited, dmat, monkeypatch):
    code, text = dmat(edited.folder, "lock", "--same", "mix_images", "--same", "select_images", "--why", "tidier")
    assert code == 0, text
    assert text.splitlines() == [
        "mix_images        the same: mix_images generated: all 1 files and the metrics",
        "select_images     the same: select_images edm18_best: all 2 files and the metrics",
    ]
    monkeypatch.setattr(code_identity, "_loaded_identity", lambda stage: OTHER)
    (work,) = (edited.folder / "runs/mix_images").iterdir()
    stamp = (work / "finished.json").stat().st_mtime_ns
    code, text = dmat(edited.folder, "mix-images", "--arm", "generated", "--json")
    assert code == 0, text
    assert (work / "finished.json").stat().st_mtime_ns == stamp
    assert [*(edited.folder / "runs/mix_images").iterdir()] == [work]
