"""Classifiers between jobs: what their sidecars say, and whether one fits the images it is to judge."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from dmat import devices, seeds
from dmat.config import Network
from dmat.data.shards import Shards
from dmat.devices import Compute
from dmat.errors import DmatError
from dmat.jobs.execution import Job
from dmat.metrics import pictures
from dmat.models.loading import open_classifier
from dmat.robust.networks import NETWORKS, Classifier, Facts
from dmat.training import weights

if TYPE_CHECKING:  # what only opens a classifier does not compute with its training
    from dmat.training.classifier import Outcome


def facts_of(real: Shards) -> Facts:
    """Facts of a data set from the manifest of its training split."""
    return Facts(real.classes, real.shape[2], tuple(real.manifest["mean"]), tuple(real.manifest["std"]))


def new_classifier(network: Network, facts: Facts, seed: int) -> Classifier:
    """A network with initial weights named by the seed."""
    seeds.reseed_torch(seed, "initial weights", 0)
    return NETWORKS[network.name](facts, network.depth, network.width, network.activation)


def classifier_sidecar(network: Network, facts: Facts, real: Shards, job: Job, **more: Any) -> dict[str, Any]:
    """What a classifier's weights must be shipped with."""
    return {
        "kind": "classifier",
        "weights": "averaged",
        "network": network.plain(),
        "classes": facts.classes,
        "channels": facts.channels,
        "mean": list(facts.mean),
        "std": list(facts.std),
        "image_shape": list(real.shape),
        "class_names": real.manifest["class_names"],
        "licence_of_data": real.manifest["licence"],
        "precision": job.compute.precision,
        **more,
    }


def speed(images_per_second: float, flops_per_image: int, compute: Compute) -> dict[str, float]:
    """What a training reached, for provenance: of this process, and differing from run to run."""
    if not images_per_second:
        return {}
    done = images_per_second * flops_per_image
    return {
        "images_per_second": images_per_second,
        "flops_per_second": done,
        "model_flops_utilisation": done / devices.matrix_peak(compute),
    }


def draw_training(outcome: "Outcome", job: Job, of: str) -> None:
    """Accuracies with the best and the last weights marked, losses, and the learning rate, over images seen.

    Where the first curve falls from best to last, training went on too long (robust overfitting, Rice et al. 2020).
    """
    history, last = outcome.history, outcome.history[-1]
    marks = {"best": outcome.best_images_seen, "last": last["images_seen"]}
    selecting = "validation_robust" if "validation_robust" in last else "validation_clean"
    names = dict.fromkeys([selecting, "validation_clean", "train_robust", "train_clean"])
    title = f"{of}: averaged weights on validation, live weights on training batches"
    pictures.curves(job.pictures / "accuracy.png", history, list(names), title, "accuracy", marks)
    losses = ["train_loss", "train_natural_loss", "train_robust_loss"]
    pictures.curves(job.pictures / "loss.png", history, losses, f"{of}: loss on training batches", "loss")
    rate = f"{of}: learning rate of the last step before each evaluation"
    pictures.curves(job.pictures / "learning_rate.png", history, ["learning_rate"], rate, "learning rate")


def load_classifier(path: Path, images: Shards, compute: Compute) -> tuple[Classifier, dict[str, Any]]:
    """A classifier in evaluation mode without gradients, and its sidecar. Refuses one that was trained for other
    classes or another shape than `images` have."""
    sidecar = weights.read_sidecar(path, "classifier")
    trained, given = (sidecar["image_shape"], sidecar["classes"]), (list(images.shape), images.classes)
    if trained != given:
        raise DmatError(
            f"{path} is for images {trained[0]} of {trained[1]} classes, these images are {given[0]} of {given[1]}; "
            f"expected the same; train a classifier on this data set, or name other images"
        )
    model, sidecar = open_classifier(path)
    compute.place_model(model)
    return model, sidecar
