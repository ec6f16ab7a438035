"""Plots of the training history of a classifier."""

from pathlib import Path

from dmat.metrics import pictures
from dmat.training.classifier import TrainedClassifier

# Key of the history -> what the legend says. The history keeps the keys of earlier versions.
_LOSS_LABELS = {
    "train_loss": "train loss",
    "train_natural_loss": "train clean loss",
    "train_robust_loss": "train robust loss",
}


def draw(folder: Path, trained: TrainedClassifier, run_name: str) -> None:
    """Plots accuracies, losses and the learning rate over images seen, with the best and the last weights marked.

    Where the first curve falls from best to last, training was too long (robust overfitting, Rice et al. 2020).
    """
    history, last = trained.history, trained.history[-1]
    marks = {"best": trained.best_images_seen, "last": last["images_seen"]}
    selecting = "validation_robust" if "validation_robust" in last else "validation_clean"
    names = dict.fromkeys([selecting, "validation_clean", "train_robust", "train_clean"])
    title = f"{run_name}: EMA weights on validation, live weights on training batches"
    pictures.curves(folder / "accuracy.png", history, list(names), title, "accuracy", marks)
    losses = [{_LOSS_LABELS.get(name, name): value for name, value in record.items()} for record in history]
    pictures.curves(
        folder / "loss.png", losses, list(_LOSS_LABELS.values()), f"{run_name}: loss on training batches", "loss"
    )
    rate_title = f"{run_name}: learning rate of the last step before each evaluation"
    pictures.curves(folder / "learning_rate.png", history, ["learning_rate"], rate_title, "learning rate")
