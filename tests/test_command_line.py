"""The command line as a whole: short help, completion in shells, the nearest name for an unknown one, light imports.

Run alone: pytest tests/test_command_line.py
"""

import json
import subprocess
import sys

import pytest

from cli import completion, main
from dmat import recipes
from dmat.errors import did_you_mean
from dmat.pipeline import STAGES

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


def test_light_commands_load_no_torch_and_no_mlflow(root):
    """All in one process: what one of them loads stays in sys.modules."""
    script = """
import contextlib, io, json, sys
import cli.main
for line in json.loads(sys.argv[1]):
    sys.argv = ["dmat", *line]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            cli.main.main()
        except SystemExit as ended:
            assert ended.code in (0, 2), line
print(sorted({"torch", "mlflow", "dvc", "matplotlib", "scipy", "optuna"} & set(sys.modules)))
"""
    commands = [
        ["--help"], ["train-robust", "--help"], ["recipes", "list"], ["recipes", "show", "digits"],
        ["recipes", "diff", "digits-3-seeds"], ["runs", "list"], ["sources", "list"], ["lock", "--check"],
        ["plan", "--help"], ["tune", "--help"], ["--version"],
    ]  # fmt: skip
    command = [sys.executable, "-c", script, json.dumps(commands)]
    result = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"
