"""Completion of names in a shell: of params.yaml, recipes and stages. A project that cannot be read has no names."""

from collections.abc import Callable, Iterable
from pathlib import Path

Complete = Callable[[str], list[str]]


def names_in(section: str) -> Complete:
    """Completes the names or numbers that `section` of the project's params.yaml lists, such as `arms` or `seeds`."""

    def complete(incomplete: str) -> list[str]:
        from dmat import yaml_file
        from dmat.errors import DmatError

        try:
            params = yaml_file.read(Path("params.yaml")).value
        except (DmatError, OSError):
            return []
        entries = params.get(section) if isinstance(params, dict) else None
        return _starting_with(incomplete, entries if isinstance(entries, dict | list) else ())

    return complete


def recipe_names(incomplete: str) -> list[str]:
    """Completes the name of a recipe."""
    from dmat import recipes

    return _starting_with(incomplete, recipes.summaries())


def stage_names(incomplete: str) -> list[str]:
    """Completes the name of a stage, as params.yaml and MLflow write it."""
    from dmat.pipeline import STAGES

    return _starting_with(incomplete, STAGES)


def _starting_with(start: str, names: Iterable[object]) -> list[str]:
    return [str(name) for name in names if str(name).startswith(start)]
