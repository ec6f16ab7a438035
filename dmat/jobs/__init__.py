"""One file per stage, and `STAGES`: the table that names them once for parameters, DVC, commands and folders."""

from dmat.jobs.stages import STAGES, Stage

__all__ = ["STAGES", "Stage"]
