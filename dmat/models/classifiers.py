"""Classifiers of the stages: new ones, what their sidecars say, and whether one fits the images it is to judge."""

from pathlib import Path
from typing import Any

from dmat import plugins, seeds
from dmat.config import Network
from dmat.data.shards import Shards
from dmat.devices import Compute
from dmat.errors import DmatError
from dmat.models.loading import open_classifier
from dmat.robust.networks import NETWORKS, Classifier, DataSpec
from dmat.training import weights


def data_spec_of(real: Shards) -> DataSpec:
    """DataSpec of a data set from the manifest of its training split."""
    return DataSpec(real.classes, real.shape[2], tuple(real.manifest["mean"]), tuple(real.manifest["std"]))


def new_classifier(network: Network, data_spec: DataSpec, seed: int) -> Classifier:
    """A network with initial weights named by the seed."""
    seeds.reseed_torch(seed, "initial weights", 0)
    return plugins.find(NETWORKS, network.name)(data_spec, network.depth, network.width, network.activation)


def classifier_sidecar(
    network: Network, data_spec: DataSpec, real: Shards, compute: Compute, **more: Any
) -> dict[str, Any]:
    """What a classifier's weights must be shipped with."""
    return {
        "kind": "classifier",
        "weights": "averaged",
        "network": network.plain(),
        "classes": data_spec.classes,
        "channels": data_spec.channels,
        "mean": list(data_spec.mean),
        "std": list(data_spec.std),
        "image_shape": list(real.shape),
        "class_names": real.manifest["class_names"],
        "licence_of_data": real.manifest["licence"],
        "precision": compute.precision,
        **more,
    }


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
    compute.model_to_device(model)
    return model, sidecar
