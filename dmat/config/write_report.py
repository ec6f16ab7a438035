"""Settings of write_report."""

from typing import Annotated

from pydantic import Field

from dmat.config.fields import Name, Record, Seed


class WriteReport(Record):
    """Settings of the report."""

    title: str
    baseline: Name  # the arm that the others are compared with
    bootstrap: Annotated[int, Field(ge=100, le=10**7)]  # number of resamples
    seed: Seed


class Report(WriteReport):
    """Settings of the report with the arms, seeds and instances to report, taken from the lists of params.yaml so that
    nothing is written twice."""

    seeds: tuple[int, ...] = Field(strict=False)
    arms: dict[str, list[str]]  # name of an arm -> names of its instances of train_robust, one for each seed
    instances: dict[str, list[str]]  # stage -> names of its instances, in the order of the stages
