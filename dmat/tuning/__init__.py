"""Tuning studies with Optuna (the only importer of it): they maximise PGD accuracy on the validation split over values
of an arm, at equal images seen.

A trial is a short run of `train_robust` that starts from an arm. It reports at every evaluation and is pruned if it is
worse than the others. The driver of a study alone talks with Optuna; its trials are tasks of the engine. Trials have
folders in `runs/tune/<arm>-<fingerprint>/`; after a kill, each resumes from its checkpoint.
"""

from dmat.tuning.plan import Study, plan
from dmat.tuning.studies import StudyOptions, apply_best, folder_of, run, status
from dmat.tuning.trials import OBJECTIVE

__all__ = [
    "OBJECTIVE",
    "Study",
    "StudyOptions",
    "apply_best",
    "folder_of",
    "plan",
    "run",
    "status",
]
