"""Tracking with MLflow; the only importer of it. One run per stage instance, runs of one `dvc repro` under one parent.

Training never waits for MLflow. Metrics are written to `metrics.jsonl` first. A separate process sends what is new and
records its progress in the work folder; it also ends the run of a training that was killed. The next run or
`dmat runs sync` sends what an outage delayed, and ends runs whose sending process died too.
"""

from dmat.tracking.open_runs import reap, set_aside, sync
from dmat.tracking.parents import begin_parent, record_stage_error
from dmat.tracking.registry import RegistryCandidate
from dmat.tracking.run_record import FILES, parameters
from dmat.tracking.runs import Run, open_run, recorded_runs, seconds_before
from dmat.tracking.stores import artifact_folder, connect, store_uri

__all__ = [
    "FILES",
    "RegistryCandidate",
    "Run",
    "artifact_folder",
    "begin_parent",
    "connect",
    "open_run",
    "parameters",
    "reap",
    "record_stage_error",
    "recorded_runs",
    "seconds_before",
    "set_aside",
    "store_uri",
    "sync",
]
