"""MLflow, and nobody else imports it: one run per stage instance, all runs of one `dvc repro` under one parent.

Training never waits for it. Metrics are in `metrics.jsonl` first; a process of its own sends what is new and remembers
how far it came in the work folder, and ends the run of a training that was killed. What an outage kept back, and the
end of runs whose sending process died too, is sent by the next command or by `dmat runs sync`.
"""

from dmat.tracking.open_runs import reap, set_aside, sync
from dmat.tracking.parents import tell
from dmat.tracking.registry import RegistryCandidate
from dmat.tracking.run_record import FILES, parameters
from dmat.tracking.runs import Run, adopt, open_run, remembered_runs, seconds_before
from dmat.tracking.stores import artifact_folder, connect, store

__all__ = [
    "FILES",
    "RegistryCandidate",
    "Run",
    "adopt",
    "artifact_folder",
    "connect",
    "open_run",
    "parameters",
    "reap",
    "remembered_runs",
    "seconds_before",
    "set_aside",
    "store",
    "sync",
    "tell",
]
