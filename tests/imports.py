"""Reads import statements without importing: which modules of the project a module needs."""

import ast
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent


@cache
def imported(module: str) -> frozenset[str]:
    """Modules of dmat and cli in a module's import statements: functions included, type-checking blocks not."""
    tree = ast.parse(path_of(module).read_text())
    found = set()
    skipped = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {name if exists(name) else node.module for name in names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return frozenset(name for name in found if name.partition(".")[0] in ("dmat", "cli"))


def needed(module: str) -> set[str]:
    """`imported`, transitively, without the module itself."""
    reached, waiting = set(), [module]
    while waiting:
        for name in imported(waiting.pop()):
            if name not in reached:
                reached.add(name)
                waiting.append(name)
    return reached - {module}


def path_of(module: str) -> Path:
    base = ROOT / module.replace(".", "/")
    return base / "__init__.py" if base.is_dir() else base.with_suffix(".py")


def exists(module: str) -> bool:
    return path_of(module).is_file()


def modules() -> list[str]:
    """Every module of dmat and cli."""
    files = [*(ROOT / "dmat").rglob("*.py"), *(ROOT / "cli").rglob("*.py")]
    return sorted(".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for file in files)
