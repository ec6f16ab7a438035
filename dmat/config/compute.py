"""Settings of how to compute, which are not part of the identity of any result."""

from typing import Annotated, Literal

from pydantic import Field

from dmat.config.fields import Positive, Record


class ComputeSettings(Record):
    """How to compute. Not part of the identity of a result, so changing it reruns nothing."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    compile: Literal["auto", "on", "off"] = "auto"  # the steps of trainings of classifiers
    threads: Annotated[int, Field(ge=0, le=4096)] = 0  # per process; 0: the number of cores
    processes: Annotated[int, Field(ge=1, le=4096)] = 1  # on this machine, for the trainings of classifiers
    workers: Annotated[int, Field(ge=0, le=4096)] = 0  # processes for shards and trials; 0: the command's own
    save_every_seconds: Positive = 60.0  # between two checkpoints
