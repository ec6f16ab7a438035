"""Classifiers of the stages: creates them, describes them in sidecars, and loads them for given images."""

from pathlib import Path
from typing import Unpack, cast

from dmat import plugins, seeds
from dmat.config import Network
from dmat.data.shards import Manifest, Shards
from dmat.devices import Compute
from dmat.errors import DmatError
from dmat.models.loading import open_classifier
from dmat.robust.networks import NETWORKS, Classifier, DataSpec
from dmat.training import weights
from dmat.training.weights import NetworkRecord, TrainedSidecar, TrainingRecord


def data_spec_of(real: Shards) -> DataSpec:
    """Returns the DataSpec of a data set: classes, channels, mean and std from the manifest of its training split."""
    return DataSpec(real.classes, real.shape[2], tuple(real.manifest["mean"]), tuple(real.manifest["std"]))


def new_classifier(network: Network, data_spec: DataSpec, seed: int) -> Classifier:
    """Returns a new network; its initial weights depend on the seed alone."""
    seeds.reseed_torch(seed, "initial weights", 0)
    return plugins.find(NETWORKS, network.name)(data_spec, network.depth, network.width, network.activation)


def classifier_sidecar(
    network: Network, data_spec: DataSpec, real: Shards, compute: Compute, **more: Unpack[TrainingRecord]
) -> TrainedSidecar:
    """Returns the sidecar that is written beside a classifier's weights."""
    sidecar: TrainedSidecar = {
        "kind": "classifier",
        "weights": "averaged",
        "network": cast(NetworkRecord, network.plain()),
        "classes": data_spec.classes,
        "channels": data_spec.channels,
        "mean": list(data_spec.mean),
        "std": list(data_spec.std),
        "image_shape": list(real.shape),
        "class_names": real.manifest["class_names"],
        "licence_of_data": real.manifest["licence"],
        "precision": compute.precision,
    }
    return {**sidecar, **more}


def load_classifier(path: Path, images: Manifest, compute: Compute) -> tuple[Classifier, TrainedSidecar]:
    """Loads a classifier of a stage, in evaluation mode without gradients, on the device of `compute`, and its sidecar.

    images: manifest of the images to classify. Raises DmatError if the image shape or the number of classes of the
    classifier is another.
    """
    sidecar = weights.read_sidecar(path, "classifier")
    trained_on = sidecar["image_shape"], sidecar["classes"]
    requested = images["shape"], len(images["class_names"])
    if trained_on != requested:
        raise DmatError(
            f"{path} is for images {trained_on[0]} of {trained_on[1]} classes, these images are {requested[0]} of "
            f"{requested[1]}; expected the same; train a classifier on this data set, or name other images"
        )
    model, sidecar = open_classifier(path)
    compute.model_to_device(model)
    return model, cast(TrainedSidecar, sidecar)  # a stage wrote it
