"""The average of the weights of several classifiers: a model soup (Wortsman et al. 2022; Croce et al. 2023 for robust
classifiers).

It is a good model only where the trainings lie in one basin, as when they continue from the same weights. Trainings
from different initial weights do not, and their average is expected at chance level.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from typing_extensions import TypedDict

from dmat.errors import DmatError
from dmat.models.loading import SUFFIX, expect_pair, open_classifier
from dmat.training import weights
from dmat.training.weights import ClassifierSidecar

_ALIKE = ("network", "classes", "channels", "mean", "std")  # keys of a sidecar in which all must agree
_KEPT = (*_ALIKE, "kind", "image_shape", "class_names", "data")
_OF_ALL = ("threat", "loss", "beta", "licence", "licence_of_data", "precision")  # kept where all have the same
_EXACT = 1e-6  # by how much the sum of the shares may differ from 1


class SoupPart(TypedDict):
    """A classifier that an average holds."""

    file: str
    sha256: str  # of its weights
    share: float


class AveragedSidecar(ClassifierSidecar):
    """The sidecar of an average. It has no seed, arm and images_seen, which are those of one training."""

    soup: list[SoupPart]


def average(paths: Sequence[Path], target: Path, shares: Sequence[float] = ()) -> AveragedSidecar:
    """Writes the weighted mean of the weights of classifiers, batch-norm statistics included, and its sidecar.

    Means are computed in float64; counters of batches are those of the first. shares: of each, which sum to 1; empty:
    equal ones. A threat model, a loss and a licence are kept where all have the same. Raises DmatError for fewer than
    two classifiers, classifiers that differ in network, classes or normalisation, shares that do not fit, and an
    existing target.
    """
    shares = list(shares) or [1 / len(paths)] * len(paths)
    _expect_fitting(paths, shares, target)
    mean: dict[str, Tensor] = {}  # float64 of any shape
    first, sidecars, parts = dict[str, Tensor](), list[ClassifierSidecar](), list[SoupPart]()
    for path, share in zip(map(expect_pair, paths), shares, strict=True):  # one after the other: they may be large
        model, sidecar = open_classifier(path)
        sidecars.append(sidecar)
        _expect_alike(paths[0], sidecars[0], path, sidecar)
        first = first or model.state_dict()
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                mean[name] = mean.get(name, torch.zeros((), dtype=torch.float64)) + share * tensor.double()
        parts.append({"file": path.name, "sha256": sidecar["sha256"], "share": share})
    values = {name: value for name, value in sidecars[0].items() if name in _KEPT}
    for name in _OF_ALL:
        of_each = [sidecar.get(name) for sidecar in sidecars]
        if of_each[0] is not None and all(value == of_each[0] for value in of_each):
            values[name] = of_each[0]
    result: AveragedSidecar = {**values, "weights": "averaged", "soup": parts}  # type: ignore[typeddict-item]
    state = {name: mean[name].to(tensor.dtype) if name in mean else tensor for name, tensor in first.items()}
    weights.save(target, state, result)
    return result


def _expect_fitting(paths: Sequence[Path], shares: Sequence[float], target: Path) -> None:
    if len(paths) < 2:
        raise DmatError(f"{len(paths)} classifiers cannot be averaged; expected two or more; name another")
    if len(shares) != len(paths) or min(shares) < 0 or not abs(sum(shares) - 1) <= _EXACT:
        raise DmatError(
            f"the shares of {len(paths)} classifiers are {', '.join(f'{share:g}' for share in shares)}; expected as "
            f"many numbers from 0 on, whose sum is 1"
        )
    if target.suffix != SUFFIX:
        raise DmatError(
            f"--to is {target}; expected a name that ends in {SUFFIX}; give one such as {target.stem}{SUFFIX}"
        )
    if target.exists():
        raise DmatError(f"{target} exists; expected a new file; give another name with --to, or delete it")


def _expect_alike(first_path: Path, first: ClassifierSidecar, path: Path, sidecar: ClassifierSidecar) -> None:
    for key in _ALIKE:
        if sidecar[key] != first[key]:  # type: ignore[literal-required]
            raise DmatError(
                f"{path} has the {key} {sidecar[key]}, {first_path} {first[key]}; "  # type: ignore[literal-required]
                f"expected the same; average classifiers of one network and one kind of data"
            )
