"""The paper's experiments, and small relatives of them, as complete parameter files. params.yaml is one of them."""

from pathlib import Path

from dmat import files
from dmat.errors import DmatError

_FOLDER = Path(__file__).parent


def summaries() -> dict[str, str]:
    """Name -> first comment line of each recipe, which begins with its name."""
    found = sorted(_FOLDER.glob("*.yaml"))
    return {path.stem: path.read_text().splitlines()[0].removeprefix(f"# {path.stem}: ") for path in found}


def read(name: str) -> str:
    if name not in summaries():
        raise DmatError(f"recipe is {name!r}; expected one of {', '.join(summaries())}")
    return (_FOLDER / f"{name}.yaml").read_text()


def use(name: str, target: Path) -> Path | None:
    """Writes a recipe to `target`. A file there with other content is renamed first; returns its new name."""
    text, kept = read(name), None
    if target.exists() and target.read_text() != text:
        kept = next(
            path for k in range(1, 10_000) if not (path := target.with_name(f"{target.stem}.{k}.yaml")).exists()
        )
        target.rename(kept)
    files.write_text(target, text)
    return kept
