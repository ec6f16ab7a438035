"""Tuning studies with Optuna (the only importer of it): they maximise PGD accuracy on the validation split over values
of an arm, at equal images seen.

A trial is a short run of `train_robust` that starts from an arm. It reports at every evaluation and is pruned if it is
worse than the others. The driver of a study alone talks with Optuna; its trials are tasks of the engine. Trials have
folders in `runs/tune/<arm>-<fingerprint>/`; after a kill, each resumes from its checkpoint.

Importing this package loads no torch; `tuning.studies`, which runs a study, does.
"""

from dmat.tuning.plan import OBJECTIVE, Study, plan
from dmat.tuning.state import apply_best, folder_of, status

__all__ = [
    "OBJECTIVE",
    "Study",
    "apply_best",
    "folder_of",
    "plan",
    "status",
]
