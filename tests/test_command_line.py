"""The command line as a whole: short help, completion in shells, the nearest name for an unknown one, light imports.

Run alone: pytest tests/test_command_line.py
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from optuna.pruners import NopPruner

from cli import completion, main
from dmat import config, files, recipes, tuning
from dmat.data import shards
from dmat.errors import did_you_mean
from dmat.evaluation import table
from dmat.pipeline import STAGES
from dmat.tuning import storage
from dmat.workspace import find_workspace
from tests.conftest import ROOT

PARAMS = "seeds: [1, 12]\narms:\n  real_only: {}\n  generated: {}\nimage_sets:\n  edm18: {}\n"


def _run(monkeypatch, capsys, *arguments):
    """Exit code and the two outputs of a command in this process."""
    monkeypatch.setattr(sys, "argv", ["dmat", *arguments])
    with pytest.raises(SystemExit) as exit_info:
        main.main()
    return exit_info.value.code, *capsys.readouterr()


@pytest.mark.parametrize("command", [[], ["train-robust"], ["runs"], ["runs", "list"]])
def test_h_is_help_everywhere(monkeypatch, capsys, command):
    short, long = (_run(monkeypatch, capsys, *command, option) for option in ("-h", "--help"))
    assert short == long
    assert short[0] == 0
    assert short[1].startswith("Usage: ")


@pytest.mark.parametrize(
    ("name", "names", "end"),
    [
        ("generatd", ["real_only", "generated"], "; did you mean generated?"),
        ("xyz", ["real_only", "generated"], ""),
        ("generated", [], ""),
        (7, ["generated"], ""),
    ],
)
def test_the_nearest_name_is_suggested(name, names, end):
    assert did_you_mean(name, names) == end


@pytest.mark.parametrize(
    ("arguments", "nearest"),
    [
        (["train-robst"], "'train-robust'"),
        (["recipes", "lst"], "'list'"),
        (["recipes", "show", "digit"], "digits"),
        (["recipes", "list", "--jsn"], None),
        (["lock", "--same", "train_robst", "--why", "words"], "train_robust"),
    ],
)
def test_a_mistyped_name_is_answered_with_the_nearest(root, monkeypatch, capsys, arguments, nearest):
    monkeypatch.chdir(root)
    code, _, error_output = _run(monkeypatch, capsys, *arguments)
    assert code == 2
    assert error_output.startswith("error: ")
    assert error_output.count("\n") == 1
    if nearest:
        assert f"id you mean {nearest}" in error_output


@pytest.mark.parametrize(
    ("line", "names"),
    [
        ("train-ro", ["train-robust"]),
        ("train-robust --arm ", ["real_only", "generated"]),
        ("train-robust --arm g", ["generated"]),
        ("train-robust --seed 1", ["1", "12"]),
        ("evaluate-robust --arm r", ["real_only"]),
        ("generate-images --image-set ", ["edm18"]),
        ("images seen e", ["edm18"]),
        ("images seen edm18 0 --arm g", ["generated"]),
        ("recipes show digits-", ["digits-3-seeds"]),
        ("init new --recipe smo", ["smoke"]),
        ("lock --same write", ["write_report"]),
        ("runs list --stage train_s", ["train_scorer"]),
    ],
)
def test_a_shell_completes_commands_and_names(tmp_path, monkeypatch, capsys, line, names):
    (tmp_path / "params.yaml").write_text(PARAMS)
    monkeypatch.chdir(tmp_path)
    words = f"dmat {line}"
    for variable, value in (
        ("_DMAT_COMPLETE", "complete_bash"), ("COMP_WORDS", words), ("COMP_CWORD", str(words.count(" "))),
    ):  # fmt: skip
        monkeypatch.setenv(variable, value)
    code, output, error_output = _run(monkeypatch, capsys)
    assert (code, output.split(), error_output) == (0, names, "")


@pytest.mark.parametrize("text", [None, "arms: [", "- 1", "arms: 3"])
def test_a_project_that_cannot_be_read_completes_nothing(tmp_path, monkeypatch, text):
    if text is not None:
        (tmp_path / "params.yaml").write_text(text)
    monkeypatch.chdir(tmp_path)
    assert completion.names_in("arms")("") == []


def test_recipes_and_stages_complete_to_all_without_a_start():
    assert completion.recipe_names("") == list(recipes.summaries())
    assert completion.stage_names("") == list(STAGES)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_completion_of_a_shell_can_be_shown(monkeypatch, capsys, shell):
    monkeypatch.setenv("_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION", "1")
    code, output, _ = _run(monkeypatch, capsys, "--show-completion", shell)
    assert code == 0
    assert "_DMAT_COMPLETE" in output


HEAVY = {"torch", "mlflow", "dvc", "matplotlib", "scipy", "pandas", "plotly", "sklearn", "optuna"}


def _loaded_by(commands, folder, codes=(0,)):
    """Heavy packages that commands load in `folder`. All in one process: what one of them loads stays there.

    codes: with one of which each command ends.
    """
    script = """
import contextlib, io, json, sys
import cli.main
lines, codes = map(json.loads, sys.argv[1:])
for line in lines:
    sys.argv, text = ["dmat", *line], io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
        try:
            cli.main.main()
        except SystemExit as ended:
            assert ended.code in codes, (line, text.getvalue())
print(json.dumps(sorted(sys.modules)))
"""
    command = [sys.executable, "-c", script, json.dumps(commands), json.dumps(codes)]
    result = subprocess.run(
        command, cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return HEAVY & set(json.loads(result.stdout))


def test_light_commands_load_no_torch_and_no_mlflow(root):
    commands = [
        ["--help"], ["train-robust", "--help"], ["recipes", "list"], ["recipes", "show", "digits"],
        ["recipes", "diff", "digits"], ["runs", "list"], ["sources", "list"], ["lock", "--check"],
        ["plan", "--help"], ["tune", "--help"], ["--version"],
    ]  # fmt: skip
    assert _loaded_by(commands, root, codes=(0, 2)) == set()  # the code may be new


def test_commands_that_read_the_configuration_load_no_torch_and_no_mlflow(root, tmp_path, tiny_params):
    """They read params.yaml and what stages wrote; only the commands of a study load Optuna, whose storage it is."""
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(tiny_params | {"seeds": [1, 2]}))
    shutil.copy(root / "code.yaml", tmp_path)
    params, workspace = config.load(tmp_path / "params.yaml"), find_workspace(tmp_path)
    flags = np.random.default_rng(0).random((2, 2, 40)) < 0.5
    for arm, by_seed in zip(params.arms, flags, strict=True):
        for seed, columns in zip(params.seeds, by_seed, strict=True):
            path = tmp_path / f"artifacts/evaluate_robust/{arm}-{seed}/per_image.parquet"
            table.write_table(path, {"best_pgd": columns})
    pixels, labels = np.zeros((2, 2, 2, 1), np.uint8), np.zeros(2, np.int64)
    shards.write_set(tmp_path / "images", pixels, labels, class_names=["a"], metadata={})
    commands = [["plan", "--detect", "5"], ["clean"], ["images", "info", "images"]]
    assert _loaded_by(commands, tmp_path) == {"pandas"}  # pyarrow loads it when it gives a column as an array
    for stage_name, stage in STAGES.items():  # whatever a study reads
        for instance in stage.all_instances(params):
            for path in stage.outputs(params, **instance).values():
                files.write_text(workspace.at(path) / "content", stage_name)
    study = tuning.plan(params, workspace)
    storage.begin(storage.connect(study.storage), study, NopPruner())
    commands = [["tune", "status"], ["tune", "start", "--dry-run"]]
    assert _loaded_by(commands, tmp_path) == {"optuna"}


def _two_projects(tmp_path, root, tiny_params):
    """A project with a plugin, and a folder beside it with a parameter file that names the plugin."""
    project, elsewhere = tmp_path / "project", tmp_path / "elsewhere"
    (project / "plugins").mkdir(parents=True)
    (project / "plugins/my_losses.py").write_text("def gentle(): ...\n")
    shutil.copy(root / "code.yaml", project)
    (project / "params.yaml").write_text(yaml.safe_dump(tiny_params))
    elsewhere.mkdir()
    values = config.merge(tiny_params, {"train_robust": {"loss": "my_losses:gentle"}, "prepare_data": {"train": 90}})
    (elsewhere / "params.yaml").write_text(yaml.safe_dump(values))
    return project, elsewhere


def test_a_parameter_file_elsewhere_gives_values_to_the_project_here(call, root, tmp_path, tiny_params, monkeypatch):
    """As git and DVC do, dmat takes the working folder as the project."""
    project, elsewhere = _two_projects(tmp_path, root, tiny_params)
    before = sorted(elsewhere.iterdir())
    monkeypatch.chdir(project)
    code, out, err = call("prepare-data", "--params", elsewhere / "params.yaml", "--dry-run")
    assert code == 0, err
    planned = json.loads(out)
    assert planned["settings"]["train"] == 90
    assert Path(planned["work"]).is_relative_to(project)
    code, _, err = call("runs", "lineage", "generated-1", "--params", elsewhere / "params.yaml")
    assert (code, f"{project}/artifacts/" in err, str(elsewhere) in err) == (2, True, False)
    code, _, err = call("tune", "status", "--params", "../elsewhere/params.yaml")
    assert (code, f"{project}/artifacts/" in err, str(elsewhere) in err) == (2, True, False)
    assert sorted(elsewhere.iterdir()) == before


@pytest.mark.parametrize("command", [["prepare-data", "--dry-run"], ["tune", "status"], ["runs", "lineage", "real-1"]])
def test_a_folder_without_a_project_takes_no_parameter_file_of_another(
    call, root, tmp_path, tiny_params, monkeypatch, command
):
    project, _ = _two_projects(tmp_path, root, tiny_params)
    monkeypatch.chdir(project / "plugins")
    code, _, err = call(*command, "--params", "../params.yaml")
    assert (code, "plugins is not a project" in err, "go to the folder of a project" in err) == (2, True, True), err
