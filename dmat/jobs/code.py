"""Which source files a stage computes with, read from import statements.

`dvc.yaml` lists the same files (a test compares), and a finished result is published again only while they are as they
were when it was computed.
"""

import ast
from functools import cache
from pathlib import Path

from dmat import files

_ROOT = Path(__file__).parent.parent.parent

# What computes results. The rest of the library carries them: reading, tracking, checkpoints, commands.
COMPUTING = (
    *("dmat.data.", "dmat.diffusion.", "dmat.robust.", "dmat.metrics.", "dmat.report."),
    *("dmat.evaluation.measures", "dmat.evaluation.checks", "dmat.evaluation.evaluate"),
    *("dmat.training.classifier", "dmat.training.denoiser", "dmat.training.schedules", "dmat.training.averaging"),
)
# Used for pictures only: an edit must not retrain a model.
PICTURES = {"train_diffusion": ("dmat.diffusion.samplers",)}
ALWAYS_PICTURES = ("dmat.metrics.pictures",)
TEMPLATES = {"write_report": ("dmat/report/page.html.j2", "dmat/report/page.js")}


def of_stage(word: str) -> list[str]:
    """Paths below the project's root: the job file, its templates, the computing modules that it needs."""
    unused = (*PICTURES.get(word, ()), *ALWAYS_PICTURES)
    modules = [name for name in needed(f"dmat.jobs.{word}") if name.startswith(COMPUTING) and name not in unused]
    return [f"dmat/jobs/{word}.py", *TEMPLATES.get(word, ()), *(_relative(name) for name in sorted(modules))]


def checksums(word: str) -> dict[str, str]:
    """SHA-256 of each file of `of_stage`."""
    return {path: files.sha256(_ROOT / path) for path in of_stage(word)}


@cache
def imported(module: str) -> frozenset[str]:
    """Modules of dmat in a module's import statements: functions included, type-checking blocks not."""
    tree = ast.parse(_path(module).read_text())
    for block in [node for node in ast.walk(tree) if isinstance(node, ast.If)]:
        if ast.unparse(block.test) == "TYPE_CHECKING":
            block.body = []
    found = set[str]()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = (f"{node.module}.{alias.name}" for alias in node.names)
            found |= {name if _path(name).is_file() else node.module for name in names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return frozenset(name for name in found if name.partition(".")[0] == "dmat")


def needed(module: str) -> set[str]:
    """`imported`, transitively, without the module itself."""
    reached, waiting = set[str](), [module]
    while waiting:
        for name in imported(waiting.pop()) - reached:
            reached.add(name)
            waiting.append(name)
    return reached - {module}


def _path(module: str) -> Path:
    base = _ROOT / module.replace(".", "/")
    return base / "__init__.py" if base.is_dir() else base.with_suffix(".py")


def _relative(module: str) -> str:
    return _path(module).relative_to(_ROOT).as_posix()
