"""The paper's experiments and small versions of them, as complete parameter files. params.yaml is one of them."""

from pathlib import Path

from dmat import files
from dmat.errors import DmatError

_FOLDER = Path(__file__).parent


def summaries() -> dict[str, str]:
    """Name of each recipe -> its first comment line, without the name at its start."""
    paths = sorted(_FOLDER.glob("*.yaml"))
    return {path.stem: path.read_text().splitlines()[0].removeprefix(f"# {path.stem}: ") for path in paths}


def read(name: str) -> str:
    """The text of a recipe. Raises DmatError for an unknown name."""
    if name not in summaries():
        raise DmatError(f"recipe is {name!r}; expected one of {', '.join(summaries())}")
    return (_FOLDER / f"{name}.yaml").read_text()


def use(name: str, target: Path) -> Path | None:
    """Writes a recipe to `target`.

    An existing file with other content is renamed first. Returns its new path, or None if nothing was renamed.
    """
    text, renamed = read(name), None
    if target.exists() and target.read_text() != text:
        renamed = next(
            path for k in range(1, 10_000) if not (path := target.with_name(f"{target.stem}.{k}.yaml")).exists()
        )
        target.rename(renamed)
    files.write_text(target, text)
    return renamed
