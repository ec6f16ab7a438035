"""`python -m tests.imports_seen FOLDER`: runs every stage once in a project, each in a process of its own, and prints
which modules of dmat imported which while it ran, as JSON: stage -> pairs."""

import builtins
import importlib
import json
import os
import sys
from pathlib import Path

# What jobs use of other packages, loaded once. No module of dmat is loaded before the first fork.
import matplotlib.pyplot as plt
import plotly.express
import pyarrow.parquet
import pydantic
import sklearn.datasets
import torch
import torch._dynamo
from pyautoattack import AutoAttack

LOADED = (plt, plotly.express, pyarrow.parquet, pydantic, sklearn.datasets, AutoAttack)


def _watch() -> set[tuple[str, str]]:
    """Importer and imported from now on, whether by a statement or by name."""
    seen: set[tuple[str, str]] = set()
    statement, by_name = builtins.__import__, importlib.import_module

    def note(importer: str, imported: str) -> None:
        if imported in sys.modules and importer.startswith("dmat") and imported.startswith("dmat"):
            seen.add((importer, imported))

    def import_statement(name, globals=None, locals=None, fromlist=(), level=0):  # noqa: A002 - as Python names them
        found = statement(name, globals, locals, fromlist, level)
        importer = (globals or {}).get("__name__", "")
        note(importer, name)
        for one in fromlist or ():
            note(importer, f"{name}.{one}")
        return found

    def import_by_name(name, package=None):
        found = by_name(name, package)
        note(sys._getframe(1).f_globals["__name__"], found.__name__)
        return found

    builtins.__import__, importlib.import_module = import_statement, import_by_name
    return seen


def _run(words: list[str], answer: Path) -> None:
    seen = _watch()
    sys.argv, sys.stdout = ["dmat", *words], sys.stderr
    try:
        importlib.import_module("cli.main").main()
    except SystemExit as ended:
        if not ended.code:
            answer.write_text(json.dumps(sorted(seen)))


def main(folder: Path, commands: dict[str, list[str]]) -> dict[str, list[list[str]]]:
    os.chdir(folder)
    os.environ["DMAT_TRACKING"] = "off"
    torch.set_num_threads(1)
    assert not [name for name in sys.modules if name.startswith("dmat")]
    found = {}
    for word, words in commands.items():
        answer = folder / f"{word}.imports"
        if not (child := os.fork()):
            try:
                _run(words, answer)
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        found[word] = json.loads(answer.read_text())
    return found


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(Path(sys.argv[1]), json.loads(sys.argv[2]))))
