"""The option --params: a file with values for the project in the working folder, wherever the file is."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from dmat.config import Params
    from dmat.workspace import Workspace

DEFAULT = Path("params.yaml")
ParameterFile = Annotated[
    Path,
    typer.Option(
        "--params", help="Parameter file. It gives values; data, plugins and results are those of the working folder."
    ),
]


def load(path: Path) -> "tuple[Params, Workspace]":
    """The parameters in a file, and the project of the working folder, as git and DVC look for it.

    Raises DmatError for a file in another folder where the working folder is not a project.
    """
    from dmat import config
    from dmat.workspace import current_workspace, find_workspace

    workspace = find_workspace(Path.cwd())
    params = config.load(path, workspace.root)
    if path.resolve().parent != workspace.root:
        current_workspace()
    return params, workspace
