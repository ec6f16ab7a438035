"""Settings of write_report."""

from typing import Annotated

from pydantic import Field

from dmat.config.fields import Name, Record, Seed


class WriteReport(Record):
    title: str
    baseline: Name  # the arm that the others are compared with
    bootstrap: Annotated[int, Field(ge=100, le=10**7)]  # resamples
    seed: Seed


class Report(WriteReport):
    """What there is to report; taken from the lists, so that nothing is written twice."""

    seeds: tuple[int, ...] = Field(strict=False)
    arms: dict[str, list[str]]  # name -> its instances of train_robust, one for each seed
    instances: dict[str, list[str]]  # stage -> names, in the order of the stages
