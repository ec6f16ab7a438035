"""The paper's experiments, those of later work, and small versions of them. params.yaml is one of them.

A recipe is a file `NAME.yaml` beside this one. Its first line is `# NAME: SUMMARY`. Either it is a complete parameter
file, or it also says where its values are from (`experiments`), and then usually only what differs from another recipe.
"""

from pathlib import Path

from dmat import files
from dmat.recipes import flat_file
from dmat.recipes.experiments import Experiment, differences, load, source_file, summaries

__all__ = ["Experiment", "differences", "load", "read", "summaries", "use"]


def read(name: str) -> str:
    """The text of a recipe as a complete parameter file. Raises DmatError for an unknown name."""
    experiment = load(name)
    return source_file(name).read_text(encoding="utf-8") if experiment.is_flat else flat_file.text(experiment)


def use(name: str, target: Path) -> Path | None:
    """Writes a recipe to `target`, as a complete parameter file.

    An existing file with other content is renamed first. Returns its new path, or None if nothing was renamed.
    """
    text, renamed = read(name), None
    if target.exists() and target.read_text(encoding="utf-8") != text:
        renamed = next(
            path for k in range(1, 10_000) if not (path := target.with_name(f"{target.stem}.{k}.yaml")).exists()
        )
        target.rename(renamed)
    files.write_text(target, text)
    return renamed
