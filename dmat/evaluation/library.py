"""`dmat.evaluate`: the evaluation of any torch module on any images, without a project.

Shapes: N images, C channels, H height, W width, K classes.
"""

import contextlib
import dataclasses
import hashlib
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from dmat import config, devices, modes
from dmat.data import overlap
from dmat.devices import Compute
from dmat.errors import DmatError
from dmat.evaluation import work
from dmat.evaluation.evaluate import Evaluation, EvaluationProtocol, Summary, Verdict
from dmat.evaluation.measures import Subject, images_sha256
from dmat.evaluation.table import write_results
from dmat.metrics.intervals import AccuracyRecord
from dmat.robust import auto_attack
from dmat.robust.attacks import Ball


@dataclasses.dataclass(frozen=True)
class LibraryResult:
    """What `dmat.evaluate` returns. `print(result)` shows accuracies, intervals, and whether the checks passed.

    summary, protocol: as in summary.json and protocol.json of `dmat evaluate-robust`. table: a row per image, columns
    [N]: label, prediction, clean, pgd, fgsm, the flag of the suite and the attack that broke the image first, attacked
    (the prediction under attack), margin, perturbation. adversarial: float32 [N, C, H, W] in [0, 1], the image with
    which AutoAttack broke the model, else PGD's last attempt.
    """

    summary: Summary
    protocol: EvaluationProtocol
    verdict: Verdict
    table: Mapping[str, np.ndarray]
    adversarial: np.ndarray

    @property
    def clean(self) -> AccuracyRecord:
        """Accuracy without an attack."""
        return self.summary["clean"]

    @property
    def pgd(self) -> AccuracyRecord:
        """Accuracy under PGD."""
        return self.summary["pgd"]

    @property
    def auto_attack(self) -> AccuracyRecord:
        """Accuracy under the suite of attacks, whether or not it may be quoted; that of PGD without a suite."""
        return self.summary[self.verdict.measure]

    @property
    def quotable(self) -> bool:
        """Whether this is a result of standard AutoAttack against which no check speaks."""
        return not self.verdict.reasons

    def __str__(self) -> str:
        values = {"clean": self.clean, "pgd": self.pgd, self.verdict.measure: self.auto_attack}
        lines = [
            f"{name:24s}{100 * value['value']:6.2f} %  [{100 * value['low']:.2f}, {100 * value['high']:.2f}]  "
            f"n = {value['n']:,}"
            for name, value in values.items()
        ]
        return "\n".join([*lines, *(self.verdict.sentences or [f"all {len(self.verdict.checks)} checks passed"])])


def evaluate(
    model: nn.Module,
    images: Tensor | np.ndarray,
    labels: Tensor | np.ndarray,
    norm: str,
    epsilon: float | str,
    settings: Mapping[str, object],
    folder: Path | None,
    quiet: bool,
) -> LibraryResult:
    """See `dmat.evaluate`. images: float [N, C, H, W] in [0, 1]. labels: whole numbers [N]."""
    pixels, targets = _images(images), _labels(labels)
    threat, evaluate_robust = config.threat(norm, epsilon), config.evaluation(settings)
    if (sentence := config.step_problem(threat, evaluate_robust.pgd_step_size)) is not None:
        raise DmatError(f"pgd_step_size {sentence}")
    if len(pixels) != len(targets):
        raise DmatError(f"there are {len(pixels)} images and {len(targets)} labels; expected a label for each image")
    if evaluate_robust.images:
        pixels, targets = pixels[: evaluate_robust.images], targets[: evaluate_robust.images]
    with _prepared(model) as compute, contextlib.ExitStack() as stack:
        wrapped = _Contiguous(model)
        classes = _classes(wrapped, pixels, compute)
        suite = evaluate_robust.auto_attack
        subject = Subject(
            "model",
            wrapped,
            classes,
            pixels,
            targets,
            Ball(threat.norm, float(threat.epsilon)),
            None if suite == "none" else auto_attack.suite(suite, classes),
            full_suite=True,
        )
        identity = {
            "weights": _weights_sha256(model),
            "images": images_sha256(pixels, targets),
            "threat": threat.plain(),
            "settings": evaluate_robust.plain() | {"pgd_step": evaluate_robust.pgd_step(threat.norm, threat.epsilon)},
        }
        shards = folder / "work" if folder else Path(stack.enter_context(tempfile.TemporaryDirectory()))
        evaluation = Evaluation(shards, subject, evaluate_robust, compute, identity)
        work.compute_all(evaluation.tasks, quiet=quiet)
        columns = evaluation.columns()
        pixel_bytes = pixels.permute(0, 2, 3, 1).contiguous().numpy()
        copies = {"earlier images": overlap.repeated(overlap.digests(pixel_bytes))}
        verdict = evaluation.verdict(columns, len(targets), copies)
        result = LibraryResult(
            evaluation.summary(columns, verdict),
            evaluation.protocol(threat.plain(), len(targets)),
            verdict,
            {"label": targets.numpy(), **evaluation.rows(columns, verdict)},
            columns["adversarial"],
        )
        if folder is not None:
            write_results(folder, result.table, result.summary, result.protocol)
            evaluation.draw(folder, columns, threat.epsilon.text, [str(k) for k in range(classes)], verdict)
    return result


class _Contiguous(nn.Module):
    """Gives a model contiguous images, [B, C, H, W] -> [B, K]: it may flatten them by `view`."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:  # [B, C, H, W] -> [B, K]
        result: Tensor = self.model(images.contiguous())
        return result


@contextlib.contextmanager
def _prepared(model: nn.Module) -> Iterator[Compute]:
    """The device of the model, which is in evaluation mode and without gradients of parameters inside the block."""
    tensors = [*model.parameters(), *model.buffers()]
    if wrong := {t.dtype for t in tensors if t.is_floating_point()} - {torch.float32}:
        raise DmatError(
            f"the model has tensors of {', '.join(map(str, sorted(wrong, key=str)))}; expected float32, the precision "
            f"of reported accuracies; call model.float()"
        )
    device = tensors[0].device if tensors else torch.device("cpu")
    tf32 = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    compute = devices.resolve(device.type, "fp32", torch.get_num_threads()).exact()
    try:
        with modes.mode(model, training=False), modes.frozen(model):
            yield dataclasses.replace(compute, device=device)
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = tf32


def _images(images: Tensor | np.ndarray) -> Tensor:
    """Images as float32 [N, C, H, W] on the CPU; `Evaluation` checks their range."""
    tensor = torch.as_tensor(images).detach().cpu()
    if tensor.ndim != 4 or not tensor.is_floating_point():
        raise DmatError(
            f"images are {str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}; expected floating-point "
            f"numbers [N, C, H, W] in [0, 1]; for bytes [N, H, W, C]: images.permute(0, 3, 1, 2) / 255"
        )
    return tensor.float().contiguous()


def _labels(labels: Tensor | np.ndarray) -> Tensor:
    """Labels as int64 [N] on the CPU."""
    tensor = torch.as_tensor(labels).detach().cpu()
    if tensor.ndim != 1 or tensor.is_floating_point() or tensor.dtype == torch.bool:
        raise DmatError(
            f"labels are {str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}; expected one class number "
            f"for each image, [N]; for one-hot labels: labels.argmax(1)"
        )
    return tensor.long()


def _classes(model: nn.Module, images: Tensor, compute: Compute) -> int:
    """The number of classes of a model, from the logits of the first of the images [N, C, H, W]."""
    if not len(images):
        raise DmatError("there are 0 images; expected 1 or more; pass some")
    with torch.no_grad():
        logits = model(compute.to_device(images[:2]))
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(images[:2]):
        state = f"a tensor {list(logits.shape)}" if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
        raise DmatError(
            f"the model returned {state} for {len(images[:2])} images; expected logits [N, K]; wrap it in a module "
            f"that returns them"
        )
    return logits.shape[1]


def _weights_sha256(model: nn.Module) -> str:
    """SHA-256 of all tensors of a model, their names, and the names of its modules' classes."""
    digest = hashlib.sha256()
    for name, module in model.named_modules():
        digest.update(f"{name} {type(module).__qualname__}\n".encode())
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
