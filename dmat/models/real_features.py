"""Features of real images and their moments, kept in the user's cache folder: the same for all sets that are measured.

A record is named by the images, the weights of the network, and where and how it computes. Before a record is used, its
first batch of features is computed again: if today's code does not compute these bits, the record is not used, nor is a
damaged one. Nothing depends on this cache.
Shapes: N images, D features, H height, W width, C channels.
"""

import contextlib
import hashlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import platformdirs
import safetensors.numpy
import torch

from dmat import files
from dmat.errors import DmatError
from dmat.metrics import quality
from dmat.metrics.quality import Moments
from dmat.models.feature_networks import FeatureNetwork


class RealFeatures(NamedTuple):
    """Features [N, D], float32, of real images, and their moments."""

    features: np.ndarray
    moments: Moments


def of_images(network: FeatureNetwork, images: np.ndarray, quiet: bool = True) -> RealFeatures:
    """The features of images uint8 [N, H, W, C], from the cache if it has them. quiet: without a progress bar.

    One batch is computed in any case, so that many are never cached.
    """
    first, _ = network(images[: network.batch])
    if len(images) <= network.batch:
        return RealFeatures(first, quality.moments(first))
    path = _path(network, images)
    cached = _read(path)
    if (
        cached is not None
        and len(cached.features) == len(images)
        and np.array_equal(cached.features[: len(first)], first)
    ):
        return cached
    others, _ = network(images[network.batch :], quiet)
    features = np.concatenate([first, others])
    computed = RealFeatures(features, quality.moments(features))
    with contextlib.suppress(DmatError, OSError):  # no room, or not writable
        _write(path, computed)
    return computed


def folder() -> Path:
    """The folder of the records; it may be deleted at any time."""
    return Path(platformdirs.user_cache_dir("dmat")) / "features"


def _path(network: FeatureNetwork, images: np.ndarray) -> Path:
    """Path of the record of images uint8 [N, H, W, C]."""
    compute = network.compute
    identity = {
        "images": hashlib.sha256(np.ascontiguousarray(images).data).hexdigest(),
        "shape": list(images.shape),
        "network": [network.name, network.sha256, network.batch],
        "compute": [compute.device.type, compute.precision, torch.__version__],
    }
    return folder() / f"{network.name}-{files.fingerprint(identity)}.safetensors"


def _write(path: Path, computed: RealFeatures) -> None:
    arrays = {"features": computed.features, **computed.moments._asdict()}
    with files.writing(path) as file:
        file.write(safetensors.numpy.save(arrays, {"sha256": _digest(arrays)}))


def _read(path: Path) -> RealFeatures | None:
    """A record; None if there is none, or if it is not what was written."""
    try:
        with safetensors.safe_open(path, "numpy") as file:
            arrays = {name: file.get_tensor(name) for name in ("features", *Moments._fields)}
            intact = (file.metadata() or {}).get("sha256") == _digest(arrays)
    except Exception:  # damaged bytes may raise any exception
        return None
    return RealFeatures(arrays["features"], Moments(arrays["mean"], arrays["covariance"])) if intact else None


def _digest(arrays: dict[str, np.ndarray]) -> str:
    """SHA-256 of arrays of any shape: names, shapes and bytes."""
    digest = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.dtype} {array.shape} ".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()
