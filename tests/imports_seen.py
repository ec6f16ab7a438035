"""`python -m tests.imports_seen FOLDER`: runs every stage once in a project, each in a separate process, and prints
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
import torch._dynamo  # by optimisers
import torch_fidelity
from pyautoattack import AutoAttack

LOADED = (plt, plotly.express, pyarrow.parquet, pydantic, sklearn.datasets, torch._dynamo, torch_fidelity, AutoAttack)


def _watch() -> set[tuple[str, str]]:
    """Records (importer, imported) from now on, for import statements and for imports by name."""
    seen: set[tuple[str, str]] = set()
    statement, by_name = builtins.__import__, importlib.import_module

    def record(importer: str, imported: str) -> None:
        if imported in sys.modules and importer.startswith("dmat") and imported.startswith("dmat"):
            seen.add((importer, imported))

    def import_statement(name, globals=None, locals=None, fromlist=(), level=0):  # noqa: A002 - as Python names them
        module = statement(name, globals, locals, fromlist, level)
        importer = (globals or {}).get("__name__", "")
        record(importer, name)
        for attribute in fromlist or ():
            record(importer, f"{name}.{attribute}")
        return module

    def import_by_name(name, package=None):
        module = by_name(name, package)
        record(sys._getframe(1).f_globals["__name__"], module.__name__)
        return module

    builtins.__import__, importlib.import_module = import_statement, import_by_name
    return seen


def _run(arguments: list[str], output_path: Path) -> None:
    seen = _watch()
    sys.argv, sys.stdout = ["dmat", *arguments], sys.stderr
    try:
        importlib.import_module("cli.main").main()
    except SystemExit as ended:
        if not ended.code:
            output_path.write_text(json.dumps(sorted(seen)), encoding="utf-8")


def main(folder: Path, commands: dict[str, list[str]]) -> dict[str, list[list[str]]]:
    os.chdir(folder)
    os.environ["DMAT_TRACKING"] = "off"
    torch.set_num_threads(1)
    assert not [name for name in sys.modules if name.startswith("dmat")]
    imports = {}
    for stage_name, arguments in commands.items():
        output_path = folder / f"{stage_name}.imports"
        if not (child := os.fork()):
            try:
                _run(arguments, output_path)
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        imports[stage_name] = json.loads(output_path.read_text())
    return imports


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(Path(sys.argv[1]), json.loads(sys.argv[2]))))
