"""Stages: the table of them, what an instance would do, how it is run and published, and the identity of its code."""

from dmat.pipeline.stages import STAGES, Stage

__all__ = ["STAGES", "Stage"]
