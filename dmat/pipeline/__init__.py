"""Stages: their table, the plan of an instance, how it is run and published, and the identity of its code."""

from dmat.pipeline.stages import STAGES, Stage

__all__ = ["STAGES", "Stage"]
