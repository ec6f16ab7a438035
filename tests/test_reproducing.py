"""Reproducing a run: what is refused, which differences are reported, and the patch of uncommitted changes.

The complete reproduction, with DVC and a training that gives the same bytes, is in tests/test_pipeline.py.
"""

import shutil
import subprocess

import pytest
import yaml

import dmat.project
from dmat import config, tracking
from dmat.errors import DmatError
from dmat.pipeline import STAGES
from dmat.tracking import origin, queries, run_record
from dmat.upkeep import reproducing
from dmat.workspace import Workspace


def _git(folder, *arguments):
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    result = subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True, text=True)
    return result.stdout.strip()


@pytest.fixture
def project(tmp_path, tiny_params, monkeypatch, put_store):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    folder = tmp_path / "project"
    put_store(folder)
    (folder / "params.yaml").write_text(yaml.safe_dump(tiny_params, sort_keys=False))
    (folder / ".gitignore").write_text("/mlruns/\n/runs/\n")
    _git(folder, "init", "-q")
    _git(folder, "add", "-A")
    _git(folder, "commit", "-qm", "one")
    return folder


def _run(project, **tags):
    """Creates a run of prepare_data with the parameters of the project."""
    client, experiment = tracking.connect(project)
    defaults = {"dmat.stage": "prepare_data", "dmat.instance": "all", "git.commit": _git(project, "rev-parse", "HEAD")}
    run_tags = {name: value for name, value in (defaults | tags).items() if value is not None}
    run = client.create_run(experiment, tags=run_tags).info.run_id
    settings = config.load(project / "params.yaml").prepare_data.plain()
    for name, value in run_record.parameters(settings).items():
        client.log_param(run, name, value)
    return client, run


def _reproduce(project, run, to="tree"):
    return reproducing.reproduce(Workspace(project, project), run, project.parent / to)


@pytest.mark.parametrize(
    ("tags", "message"),
    [
        ({"git.commit": None}, "was made outside a git repository; expected a commit"),
        ({"git.commit": 40 * "a"}, "commit aaaaaaaaaa is not in this repository"),
        ({"dmat.stage": "dvc"}, "is of 'dvc'; expected one of a stage"),
        ({"dmat.stage": "train_robust", "dmat.instance": "gone-1"}, "has no train_robust gone-1; expected one of real"),
    ],
)
def test_a_run_that_cannot_be_reproduced_is_refused_and_leaves_nothing(project, tags, message):
    _, run = _run(project, **tags)
    with pytest.raises(DmatError, match=message):
        _reproduce(project, run)
    assert not (project.parent / "tree").exists()
    assert len(_git(project, "worktree", "list").splitlines()) == 1


def test_the_training_of_an_evaluation_is_compared_where_the_run_recorded_it(project):
    """Earlier versions of dmat recorded the settings of the evaluation alone, and numbers as 5.0."""
    stage, params = STAGES["evaluate_robust"], config.load(project / "params.yaml")
    instance = {"arm": "generated", "seed": 1}
    own = run_record.parameters(stage.settings(params, **instance).plain())
    whole = run_record.parameters(stage.context(params, instance)) | own
    other = whole | {"beta": "3"}
    for recorded, differing in ((own, []), (whole, []), (other, ["beta is 5 in params.yaml and was 3"])):
        run = queries.TrackedRun("a", "", "FINISHED", 0.0, 1.0, {"dmat.instance": "generated-1"}, recorded, {})
        assert reproducing._compare_parameters(project, stage, run) == (instance, differing)


def test_parameters_and_software_that_differ_are_reported(project):
    client, run = _run(project, **{"software.torch": "1.0", "compute.device": "a GPU", "git.dirty": "True"})
    client.log_param(run, "gone", "1")
    result = _reproduce(project, run)
    assert not result.whole
    assert "gone is not there in params.yaml and was 1" in result.differences
    assert "the run had uncommitted changes that were not saved" in result.differences
    assert any(line.startswith("torch is ") and line.endswith("was 1.0") for line in result.differences)
    assert any(line.startswith("the device is cpu") and line.endswith("was a GPU") for line in result.differences)
    assert result.command.endswith("-m cli.main prepare-data")
    with pytest.raises(DmatError, match="tree exists; expected a new folder"):
        _reproduce(project, run)


def test_another_version_of_dmat_is_reported_where_the_tree_has_no_code(project, monkeypatch):
    """In such a tree the installed dmat computes, whatever the commit."""
    _, run = _run(project, **{"software.dmat": origin.code()})
    assert _reproduce(project, run).whole
    monkeypatch.setattr(origin, "code", lambda: "0.2.0")
    result = _reproduce(project, run, "second")
    assert result.differences[0].startswith("dmat is 0.2.0 here and was ")
    assert not result.whole
    (project / "dmat").mkdir()
    (project / "dmat/__init__.py").touch()
    _git(project, "add", "-A")
    _git(project, "commit", "-qm", "two")
    _, run = _run(project, **{"software.dmat": "0.1.0"})
    assert _reproduce(project, run, "third").whole


def test_a_project_below_the_top_of_its_repository_is_reproduced(tmp_path, tiny_params, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    top = tmp_path / "top"
    folder = dmat.project.make(top / "a b", "digits")
    (folder / "params.yaml").write_text(yaml.safe_dump(tiny_params, sort_keys=False))
    shutil.rmtree(folder / ".git")
    (folder / "sources/mine.npz").write_text("mine")
    (top / "other").touch()
    _git(top, "init", "-q")
    _git(top, "add", "-A")
    _git(top, "commit", "-qm", "one")
    assert origin.below_top(folder) == "a b/"
    (folder / "dvc.lock").write_text("new: 1\n")
    origin.write_patch(folder, tmp_path)
    assert origin.git(folder)["git_dirty"] is False
    client, run = _run(folder)
    client.log_artifact(run, str(tmp_path / origin.PATCH))
    result = _reproduce(folder, run, "../tree")
    assert result.whole
    assert result.tree == tmp_path / "tree/a b"
    assert (result.tree / "dvc.lock").read_text() == "new: 1\n"
    assert (result.tree / "sources/mine.npz").read_text() == "mine"
    assert (tmp_path / "tree/other").exists()
    assert f"cd '{result.tree}'" in result.command
    _git(top, "add", "-A")
    _git(top, "commit", "-qm", "two")
    (folder / "dvc.lock").write_text("new: 2\n")
    assert origin.git(folder)["git_dirty"] is False
    (top / "other").write_text("of somebody else")
    origin.write_patch(folder, tmp_path)
    assert origin.git(folder)["git_dirty"] is False
    assert "somebody else" not in (tmp_path / origin.PATCH).read_text()
    (folder / "params.yaml").write_text("changed: 1")
    assert origin.git(folder)["git_dirty"] is True


def test_the_code_is_identified_by_its_version_and_in_a_checkout_by_its_commit(tmp_path):
    package = tmp_path / "dmat"
    package.mkdir()
    (package / "__init__.py").touch()
    assert origin.code(package) == dmat.__version__
    _git(tmp_path, "init", "-q")
    assert origin.code(package) == dmat.__version__  # as for an environment inside another repository
    _git(tmp_path, "add", "-A")
    _git(tmp_path, "commit", "-qm", "one")
    commit = _git(tmp_path, "rev-parse", "HEAD")[:12]
    assert origin.code(package) == f"{dmat.__version__}+g{commit}"
    (package / "__init__.py").write_text("x = 1\n")
    assert origin.code(package) == f"{dmat.__version__}+g{commit}.changed"


def test_another_machine_alone_is_not_a_failure(project):
    _, run = _run(project, **{"software.torch": "1.0"})
    result = _reproduce(project, run)
    assert result.whole
    assert len(result.differences) == 1


def test_a_patch_restores_uncommitted_changes(project, tmp_path):
    assert origin.git(project)["git_dirty"] is False
    metrics = project / "artifacts/metrics/write_report/all.json"  # in git; DVC removes it when its stage runs
    metrics.parent.mkdir(parents=True)
    metrics.write_text("{}")
    _git(project, "add", metrics)
    (project / "dvc.lock").write_text("new: 1\n")  # git does not know it yet
    origin.write_patch(project, tmp_path)
    assert origin.git(project)["git_dirty"] is False
    text = (project / "params.yaml").read_text()
    (project / "params.yaml").write_text(f"# changed\n{text}")
    (project / "image").write_bytes(bytes(range(256)))
    (project / "latin").write_bytes("größer\n".encode("latin-1"))
    _git(project, "add", "latin")
    _git(project, "add", "image")
    assert origin.git(project)["git_dirty"] is True
    origin.write_patch(project, tmp_path)
    client, run = _run(project, **{"git.dirty": "True"})
    client.log_artifact(run, str(tmp_path / origin.PATCH))
    result = _reproduce(project, run)
    assert result.whole
    assert result.differences == ()
    assert (result.tree / "params.yaml").read_text().startswith("# changed\n")
    assert (result.tree / "dvc.lock").read_text() == "new: 1\n"
    assert (result.tree / "image").read_bytes() == bytes(range(256))
    assert (result.tree / "latin").read_bytes() == "größer\n".encode("latin-1")


@pytest.mark.parametrize(
    "settings",
    [
        *({name: value} for name, value in (
            ("diff.noprefix", "true"), ("diff.mnemonicPrefix", "true"), ("diff.external", "echo"),
            ("color.ui", "always"), ("diff.context", "0"), ("diff.interHunkContext", "50"), ("diff.relative", "true"),
            ("diff.orderFile", "nowhere"), ("diff.submodule", "log"), ("diff.renames", "copies"),
            ("core.quotePath", "false"), ("diff.suppressBlankEmpty", "true"), ("apply.whitespace", "error"),
            ("apply.ignoreWhitespace", "change"), ("diff.upper.textconv", "rev"), ("diff.upper.command", "echo"),
            ("GIT_DIFF_OPTS", "-u0"), ("GIT_EXTERNAL_DIFF", "echo"), ("GIT_LITERAL_PATHSPECS", "1"),
        )),
    ],
    ids=lambda option: next(iter(option)),
)  # fmt: skip
def test_a_patch_applies_with_any_git_settings(tmp_path, monkeypatch, settings):
    """Line ends, trailing spaces and odd names are restored byte for byte."""
    project, before, tree = tmp_path / "p", "".join(f"{n}\n\n" for n in range(30)), tmp_path / "t"
    (project / "below").mkdir(parents=True)
    (project / ".gitattributes").write_text("*.txt diff=upper\n")
    (project / "long.txt").write_text(before)
    (project / "ä b.crlf").write_bytes(b"a\r\nb\r\n")
    (project / "below/old").write_text(50 * "same\n")
    _git(project, "init", "-q")
    _git(project, "add", "-A")
    _git(project, "commit", "-qm", "one")
    for name, value in settings.items():
        monkeypatch.setenv(name, value) if name.startswith("GIT_") else _git(project, "config", name, value)
    (project / "long.txt").write_text(before.replace("4\n", "4  \n"))
    (project / "ä b.crlf").write_bytes(b"a\r\nB\t\r\n")
    (project / "below/old").rename(project / "below/new")
    _git(project, "add", "--intent-to-add", "below/new")
    (project / "dvc.lock").write_text("new: 1\n")
    origin.write_patch(project, tmp_path)
    _git(project, "worktree", "add", "--detach", str(tree))
    reproducing.apply_patch(tree, tmp_path / origin.PATCH)
    for name in ("long.txt", "ä b.crlf", "below/new", "dvc.lock"):
        assert (tree / name).read_bytes() == (project / name).read_bytes(), name
    assert not (tree / "below/old").exists()


def test_a_patch_that_does_not_fit_is_one_message_and_leaves_nothing(project, tmp_path):
    client, run = _run(project)
    (tmp_path / origin.PATCH).write_text("--- a/params.yaml\n+++ b/params.yaml\n@@ -1 +1 @@\n-other\n+words\n")
    client.log_artifact(run, str(tmp_path / origin.PATCH))
    with pytest.raises(DmatError, match=r"`git apply .* failed in .*patch does not apply|patch failed"):
        _reproduce(project, run)
    assert not (project.parent / "tree").exists()


def test_what_dvc_writes_makes_no_tree_dirty_and_is_in_the_patch(project, tmp_path):
    (project / "dvc.lock").write_text("old: 1\n")
    _git(project, "add", "dvc.lock")
    _git(project, "commit", "-qm", "two")
    (project / "dvc.lock").write_text("new: 1\n")
    assert origin.git(project)["git_dirty"] is False
    origin.write_patch(project, tmp_path)
    assert "+new: 1" in (tmp_path / origin.PATCH).read_text()


def test_a_clean_tree_has_no_patch(project, tmp_path):
    (tmp_path / origin.PATCH).write_text("of an earlier attempt")
    origin.write_patch(project, tmp_path)
    assert not (tmp_path / origin.PATCH).exists()
    assert origin.git(tmp_path / "nowhere") == {}
