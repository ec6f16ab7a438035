"""Pictures of how a training of a classifier went."""

from pathlib import Path

from dmat.metrics import pictures
from dmat.training.classifier import TrainedClassifier


def draw(folder: Path, outcome: TrainedClassifier, of: str) -> None:
    """Accuracies with the best and the last weights marked, losses, and the learning rate, over images seen.

    Where the first curve falls from best to last, training went on too long (robust overfitting, Rice et al. 2020).
    """
    history, last = outcome.history, outcome.history[-1]
    marks = {"best": outcome.best_images_seen, "last": last["images_seen"]}
    selecting = "validation_robust" if "validation_robust" in last else "validation_clean"
    names = dict.fromkeys([selecting, "validation_clean", "train_robust", "train_clean"])
    title = f"{of}: averaged weights on validation, live weights on training batches"
    pictures.curves(folder / "accuracy.png", history, list(names), title, "accuracy", marks)
    losses = ["train_loss", "train_natural_loss", "train_robust_loss"]
    pictures.curves(folder / "loss.png", history, losses, f"{of}: loss on training batches", "loss")
    rate = f"{of}: learning rate of the last step before each evaluation"
    pictures.curves(folder / "learning_rate.png", history, ["learning_rate"], rate, "learning rate")
