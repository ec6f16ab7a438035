"""Tuning studies, and the only importer of Optuna: which values of an arm give the highest PGD accuracy on the
validation split, at equal images seen.

A trial is a short run of `train_robust` that starts from an arm. It reports at every evaluation and is stopped early
when it falls behind the others. Any number of workers share a study through its storage. Trials live in
`runs/tune/<arm>-<fingerprint>/`, where each goes on from its own checkpoint after any kill.
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
