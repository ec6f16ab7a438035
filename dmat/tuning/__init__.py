"""Tuning studies with Optuna (the only importer of it): they maximise PGD accuracy on the validation split over values
of an arm, at equal images seen.

A trial is a short run of `train_robust` that starts from an arm. It reports at every evaluation and is pruned if it is
worse than the others. Any number of workers share a study through its storage. Trials have folders in
`runs/tune/<arm>-<fingerprint>/`; after a kill, each resumes from its checkpoint.
"""

from dmat.tuning.leading import StudyOptions, apply_best, end_with_starter, folder_of, run, status
from dmat.tuning.plan import Study, plan
from dmat.tuning.trials import OBJECTIVE

__all__ = [
    "OBJECTIVE",
    "Study",
    "StudyOptions",
    "apply_best",
    "end_with_starter",
    "folder_of",
    "plan",
    "run",
    "status",
]
