"""Settings of write_report."""

from typing import Annotated

from pydantic import Field

from dmat.config.fields import Name, Record, Seed


class WriteReport(Record):
    title: str
    baseline: Name  # the arm that the others are compared with
    bootstrap: Annotated[int, Field(ge=100, le=10**7)]  # resamples
    seed: Seed
