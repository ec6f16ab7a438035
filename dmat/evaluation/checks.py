"""What must hold before a robust accuracy may be a headline: one function for each known way to measure a wrong one.

Nothing here trains or draws random numbers; a random start is an argument. Modes and frozen parameters are left to
the caller, as in `robust.attacks`: a check that runs the model sees it as the attack did. Wrong shapes and empty inputs
are defects of the caller and raise ValueError; everything else is a `Check` that did not pass.

Flags are bool [N], True where the prediction is right; robust flags say so of attacked images. `logits_of` maps images
[B, C, H, W] in [0, 1] to logits [B, K].
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dmat.robust import attacks
from dmat.robust.attacks import NORMS, Ball, Logits

OVERSHOOT = 0.25  # beyond [0, 1]; assumed: bicubic resizing overshoots by less, normalisation of black by more
BYTES = 2.0  # no resizing makes a pixel this bright
ONE_LEVEL = 1 / 255  # images of bytes that were divided twice are no brighter
SUM_TO_ONE = 0.01  # bfloat16 has 8 bits: a row of such probabilities sums to 1 within 0.4 %
MOST = 0.5  # share of the rows; logits never look like probabilities in more than a stray row
TIE = 1e-4  # logits: float32 sums in another order differ by less, so a smaller margin has no certain sign
LOGITS_APART = 1e-2  # of the largest logit: ten times the rounding of TF32, in which GPUs convolve (10 bits, 1e-3)
GPU_REPEATS = 1e-3  # of the largest logit: a GPU may choose another algorithm, with or without TF32, in every pass
ROUNDING = 1e-6  # pixels: images + perturbation in float32 is off by up to 2^-25 = 3e-8; as in `evaluate_robust`
PIXEL_ROUNDING = 2.0**-24  # l2: that error of every pixel, and as much again for the norm that the attack computed
ZERO_GRADIENTS = 0.05  # share of images; assumed: dead units silence single images, masking silences most
HALF_POINT = 0.005  # share of images; assumed: attacks with one random start differ by less where nothing is wrong
TRIVIAL_ACCURACY = (
    0.05  # at `grey_radius` all images can be one image; guessing among 10 classes would be right for 10 %
)
OVERFITTED = 0.3  # FGSM - PGD, linf; assumed: sound training leaves 10 points, overfitting most (Wong et al. 2020)
HALF = 0.5  # of what FGSM leaves; assumed: an undefended model loses most to FGSM already, an overfitted one nothing
COPIES = 0.01  # share of images; assumed: of fewer copies an accuracy changes by less than its 95 % interval


@dataclasses.dataclass(frozen=True)
class Check:
    """One finding. sentence: what was found; if it did not pass also what was expected, what it means, what to do."""

    name: str  # snake_case
    passed: bool
    sentence: str
    found: float | None  # the number it rests on; None where there is none or it is not finite

    def plain(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def verdict(checks: Sequence[Check]) -> list[str]:
    """Why a number may not be a headline: the sentences of what did not pass. Empty only if something was checked."""
    if not checks:
        return ["nothing was checked; expected the checks of this module; without them no accuracy is a headline"]
    return [f"{check.name}: {check.sentence}" for check in checks if not check.passed]


def in_range(images: Tensor) -> Check:
    """Floats in [0, 1], in which epsilon is measured. images [N, C, H, W]."""
    _some(images)
    low, high = images.min().item(), images.max().item()
    found = f"the pixels are {str(images.dtype).removeprefix('torch.')} from {low:.4g} to {high:.4g}"
    if images.is_floating_point() and low >= 0 and ONE_LEVEL * 1.001 < high <= 1:
        return _check("in_range", True, found, high)
    if not math.isfinite(low + high):
        cause = "some are not finite; mend the data"
    elif low < -OVERSHOOT:
        cause = "they look normalised outside the model, so epsilon is in other units; make it the model's first layer"
    elif high >= BYTES or not images.is_floating_point():
        cause = "they look like bytes that were not divided, so epsilon is next to nothing; divide by 255"
    elif low >= 0 and high <= 1:
        cause = "divided by 255 twice, epsilon covers all of an image, so divide once; if they are black, mend them"
    else:
        cause = "they look resized or augmented past the range, where attacks cannot follow; clip them"
    return _check("in_range", False, f"{found}; expected floats in [0, 1]: {cause}", low if low < 0 else high)


def logits(outputs: Tensor) -> Check:
    """Not probabilities. outputs [N, K].

    Log-probabilities pass: log-softmax leaves them as they are, so every loss, margin and gradient is that of logits.
    """
    _some(outputs)
    like = (outputs >= 0).all(1) & ((outputs.double().sum(1) - 1).abs() <= SUM_TO_ONE)
    share = like.double().mean().item()
    if share <= MOST:
        return _check("logits", True, f"{share:.0%} of the rows look like probabilities", share)
    return _check(
        "logits",
        False,
        f"{share:.0%} of the rows are at least 0 and sum to 1; expected logits: a softmax before the loss's own makes "
        "gradients vanish, so attacks look weaker than they are; take the softmax off the model",
        share,
    )


def evaluation_mode(model: nn.Module) -> Check:
    """No module in training mode, where dropout is on and batch norm mixes the images of a batch."""
    training = [name or type(model).__name__ for name, module in model.named_modules() if module.training]
    if not training:
        return _check("evaluation_mode", True, "no module is in training mode", 0)
    return _check(
        "evaluation_mode",
        False,
        f"{len(training)} of {len(list(model.modules()))} modules are in training mode, the first is {training[0]}; "
        "expected none: predictions then "
        "depend on chance or on the batch; evaluate inside modes.mode(model, training=False)",
        len(training),
    )


def same_alone(logits_of: Logits, images: Tensor) -> Check:
    """An image is classified alike alone, in this batch, in it turned round and among half of it. images [N >= 2, ...].

    Of two different predictions the larger margin must be under TIE. Logits must agree too: on few images batch
    statistics need not turn a prediction. Runs the model N + 4 times.
    """
    if len(_some(images)) < 2:
        raise ValueError("one image has no neighbours; give at least 2")
    try:
        with torch.no_grad():
            together = logits_of(images)
            halves = torch.empty_like(together)
            halves[::2], halves[1::2] = logits_of(images[::2]), logits_of(images[1::2])
            others = {
                "alone": torch.cat([logits_of(images[k : k + 1]) for k in range(len(images))]),
                "in the batch turned round": logits_of(images.flip(0)).flip(0),
                "among half of its neighbours": halves,
            }
    except ValueError as error:  # what torch's batch norm says of one value per channel in training mode
        sentence = f"the model refuses one of the batches ({error}); expected any number of images to do"
        return _check("same_alone", False, f"{sentence}; {_BATCH_MATTERS}", None)
    limit = LOGITS_APART * _scale(together)
    seen = []
    for how, other in others.items():
        turned = together.argmax(1) != other.argmax(1)
        ties = turned & (torch.maximum(_lead(together), _lead(other)) < TIE)
        seen.append((int((turned & ~ties).sum()), _apart(together, other).max().item(), int(ties.sum()), how))
    count, apart, left_out, how = max(seen)
    found = f"{count} of {len(images)} predictions differ (ties left out: {left_out}), logits by up to {apart:.2g}"
    if count == 0 and apart <= limit:
        return _check("same_alone", True, found, count)
    sentence = f"{found}, {how}; expected none and at most {limit:.2g}; {_BATCH_MATTERS}"
    return _check("same_alone", False, sentence, count or apart)


_BATCH_MATTERS = (
    "so what an image is classified as depends on its batch, and the attack did not see what is scored; evaluate "
    "in evaluation mode, with statistics of training data in every normalisation"
)


def finite(outputs: Tensor) -> Check:
    """No NaN and no infinity: an attack neither follows nor notices them. outputs [N, K]."""
    bad = int((~_some(outputs).isfinite()).any(1).sum())
    if bad == 0:
        return _check("finite", True, f"the outputs of all {len(outputs)} images are finite", bad)
    return _check(
        "finite",
        False,
        f"the outputs of {bad} of {len(outputs)} images are not finite; expected none: attacks stand still there and "
        "the images count as robust or wrong by accident; look for a diverged training or an overflow",
        bad,
    )


def deterministic(logits_of: Logits, images: Tensor) -> Check:
    """Two passes give the same logits: exactly on a CPU, within GPU_REPEATS where `images` are on a GPU."""
    with torch.no_grad():
        first, second = logits_of(_some(images)), logits_of(images)
    apart = _apart(first, second).max().item()
    limit = 0.0 if images.device.type == "cpu" else GPU_REPEATS * _scale(first)
    if apart <= limit:
        return _check("deterministic", True, f"two passes differ by {apart:.2g}", apart)
    return _check(
        "deterministic",
        False,
        f"two passes give logits {apart:.2g} apart; expected at most {limit:.2g}: the model draws random numbers, "
        "which a standard attack cannot average out, and scores adversarial images anew; switch dropout and noise off, "
        "or report an attack on the expectation",
        apart,
    )


def inside_ball(images: Tensor, adversarial: Tensor, ball: Ball) -> Check:
    """Perturbations at most epsilon, up to float32 rounding, and pixels in [0, 1]. images, adversarial [N, C, H, W].

    Sizes are computed in float64, so the tolerance is for what the attack rounded. Rounding of independent pixels adds
    up to their number's square root in l2: 3e-6 for 3x32x32, 2e-5 for 3x224x224.
    """
    if _some(images).shape != adversarial.shape:
        raise ValueError(f"images {tuple(images.shape)} and adversarial {tuple(adversarial.shape)} differ in shape")
    epsilon, pixels = float(ball.epsilon), images[0].numel()
    allowed = ROUNDING if ball.norm == "linf" else max(ROUNDING, math.sqrt(pixels) * PIXEL_ROUNDING)
    sizes = ball.size(adversarial.double() - images.double())  # [N]
    flat = adversarial.double().flatten(1)
    outside = torch.maximum(-flat.amin(1), flat.amax(1) - 1)  # [N], how far beyond [0, 1]; below 0 inside
    size, at = sizes.nan_to_num(nan=torch.inf).max(0)
    beyond, where = outside.nan_to_num(nan=torch.inf).max(0)
    found = f"the largest perturbation is {size.item():.7g} ({ball.norm})"
    too_large, too_far = int((~(sizes <= epsilon + allowed)).sum()), int((~(outside <= 0)).sum())
    if too_large:
        said, number = f"{found}, of image {int(at)}; {too_large} of {len(images)} are above {epsilon:.7g}", size.item()
    elif too_far:
        number = beyond.item()
        said = f"image {int(where)} is {number:.3g} outside [0, 1]; so are {too_far} of {len(images)}"
    else:
        return _check("inside_ball", True, f"{found} of {epsilon:.7g}", size.item())
    return _check(
        "inside_ball",
        False,
        f"{said}; expected at most {epsilon:.7g} + {allowed:.1g}, and pixels in [0, 1]: the accuracy is that of "
        "another threat; project in the pixels the model is given, after any rounding",
        number,
    )


def rescored(flags: np.ndarray, margins_same: np.ndarray, margins_other: np.ndarray) -> Check:
    """The attack's robust flags are those of the saved adversarial images, whatever the batch.

    margins_same, margins_other [N]: `attacks.logit_margin` of the saved images, in the attack's batches and in others;
    above 0 means right. Only in other batches may a flag differ, and only at margins under TIE.
    """
    n = _paired(flags, margins_same > 0, margins_other > 0)
    same = int((flags != (margins_same > 0)).sum())
    turned = flags != (margins_other > 0)
    certain = turned & ~(np.maximum(np.abs(margins_same), np.abs(margins_other)) < TIE)
    other, ties = int(certain.sum()), int((turned & ~certain).sum())
    if same == other == 0:
        return _check(
            "rescored", True, f"all {n} flags are those of the saved images (ties in other batches: {ties})", 0
        )
    return _check(
        "rescored",
        False,
        f"{same} of {n} flags differ in the same batches and {other} in others (ties left out: {ties}); expected none: "
        "the saved images are not those that were scored, or the model is not the same twice; save float32 and check "
        "the model's mode",
        max(same, other),
    )


def zero_gradients(logits_of: Logits, images: Tensor, labels: Tensor, ball: Ball, start: Tensor) -> Check:
    """Share of images that a gradient attack cannot move: gradient exactly zero or not finite at a start in the ball.

    Of the cross-entropy with respect to the input. start: perturbation [N, C, H, W], as `Ball.random_start` gives.
    """
    at = attacks.pgd(logits_of, _some(images), attacks.cross_entropy(labels), ball, start, steps=0, step_size=0)
    with torch.enable_grad():
        value = attacks.cross_entropy(labels)(logits_of(at.requires_grad_(True))).sum()
    gradient = None
    if value.requires_grad:  # not so if the model leaves torch or detaches
        (gradient,) = torch.autograd.grad(value, at, allow_unused=True)
    flat = (torch.zeros_like(at) if gradient is None else gradient).flatten(1)
    share = ((flat == 0).all(1) | ~flat.isfinite().all(1)).double().mean().item()
    found = f"{share:.1%} of {len(images)} images have no usable gradient at a random start"
    if share <= ZERO_GRADIENTS:
        return _check("zero_gradients", True, found, share)
    return _check(
        "zero_gradients",
        False,
        f"{found}; expected at most {ZERO_GRADIENTS:.0%}: gradient attacks stand still there, so the model looks "
        "robust without being so; look for rounding, saturation or huge logits, and attack without gradients (Square)",
        share,
    )


def more_steps(few: np.ndarray, many: np.ndarray, few_steps: int, many_steps: int) -> Check:
    """PGD with more steps is not weaker. few, many: robust flags [N] of the same images after PGD with either."""
    n, gain = _gain(many, few)
    found = f"{_percent(few)} are robust to PGD-{few_steps}, {_percent(many)} to PGD-{many_steps}"
    if gain <= _stray(n):
        return _check("more_steps", True, found, gain / n)
    return _check(
        "more_steps",
        False,
        f"{found}; expected no more than {_stray(n)} of {n} images to be won back: the steps do not climb, so PGD "
        "overstates robustness; look at its step size, sign and projection",
        gain / n,
    )


def black_box(black: np.ndarray, white: np.ndarray) -> Check:
    """An attack that sees only outputs is not stronger than those that see gradients. Robust flags [N] of each."""
    n, gain = _gain(white, black)
    found = f"{_percent(black)} are robust to the black-box attack, {_percent(white)} to the white-box attacks"
    if gain <= _stray(n):
        return _check("black_box", True, found, gain / n)
    return _check(
        "black_box",
        False,
        f"{found}; expected the white-box attacks to leave at most {_stray(n)} of {n} images more: gradients are "
        "masked, so the model is less robust than they say; look for rounding, noise or saturation in the model",
        gain / n,
    )


def trivial_radius(norm: str, shape: tuple[int, ...]) -> float:
    """The least radius at which every image [C, H, W] in [0, 1] can become mid grey, and so the same image."""
    if norm not in NORMS:
        raise ValueError(f"norm is {norm!r}; expected one of {', '.join(NORMS)}")
    return 0.5 if norm == "linf" else 0.5 * math.sqrt(math.prod(shape))


def large_radius(robust: np.ndarray, radius: float) -> Check:
    """Hardly anything survives PGD at `grey_radius`. robust: flags [N]."""
    n = _paired(robust)
    share = int(robust.sum()) / n
    found = f"{_percent(robust)} of {n} images are robust at radius {radius:.4g}"
    if share <= TRIVIAL_ACCURACY:
        return _check("large_radius", True, found, share)
    return _check(
        "large_radius",
        False,
        f"{found}, at which all can become the same grey; expected at most {TRIVIAL_ACCURACY:.0%}: the attack does not "
        "find what is there, at small radii neither; look for masked gradients and at the attack's steps",
        share,
    )


def fgsm_and_pgd(fgsm: np.ndarray, pgd: np.ndarray, norm: str = "linf") -> Check:
    """Robust flags [N] of one step and of many: many are not weaker, and one step is not all that is resisted.

    The latter is asked in linf alone, where one step of the whole radius is what such a model was trained with. In l2
    one step is far weaker than many against every model: 82 and 21 % of a sound one (docs/log.md, 2026-11-24).
    """
    n, gain = _gain(pgd, fgsm)
    found = f"{_percent(fgsm)} are robust to FGSM, {_percent(pgd)} to PGD"
    if gain > _stray(n):
        reason = (
            f"expected PGD to leave at most {_stray(n)} of {n} images more: it is broken or gradients are masked, and "
            "its accuracy is too high; look at its step size, sign and projection"
        )
    elif norm == "linf" and -gain > _images(OVERFITTED, n) and pgd.sum() < HALF * fgsm.sum():
        reason = (
            f"expected at most {OVERFITTED:.0%} between them: the model resists one step only, by catastrophic "
            "overfitting or because gradients vanish (zero_gradients); quote no FGSM accuracy, and train with more "
            "steps or a random start"
        )
    else:
        return _check("fgsm_and_pgd", True, found, -gain / n)
    return _check("fgsm_and_pgd", False, f"{found}; {reason}", -gain / n)


def unseen(copies: Mapping[str, np.ndarray]) -> Check:
    """Test images are not those that the model was trained on, and each is there once.

    copies: what a test image may be an exact copy of, in words -> flags [N], True where it is.
    """
    n = _paired(*copies.values())
    counts = ", ".join(f"{int(flags.sum()):,} of {name}" for name, flags in copies.items())
    found = f"of {n:,} test images these are exact copies: {counts}"
    count = int(np.logical_or.reduce(list(copies.values())).sum())
    if count <= _images(COPIES, n):
        return _check("unseen", True, found, count / n)
    return _check(
        "unseen",
        False,
        f"{found}; expected at most {COPIES:.0%} together: a model knows images that it was trained on, and an image "
        "that is there often counts often; remove the copies from the data set and prepare it anew",
        count / n,
    )


def _check(name: str, passed: bool, sentence: str, found: float | None) -> Check:
    usable = found is not None and math.isfinite(found)  # JSON knows no NaN
    return Check(name, passed, sentence, float(found) if found is not None and usable else None)


def _some(tensor: Tensor) -> Tensor:
    """The tensor, of which something can be said."""
    if len(tensor) == 0:
        raise ValueError("a check of no images would pass whatever is wrong")
    return tensor


def _paired(*columns: np.ndarray) -> int:
    """Number of images; the columns are bool and speak of the same ones."""
    if any(c.dtype != bool or c.ndim != 1 or len(c) == 0 or len(c) != len(columns[0]) for c in columns):
        kinds = ", ".join(f"{column.dtype} {column.shape}" for column in columns)
        raise ValueError(f"found {kinds}; expected bool [N] of the same N >= 1 images")
    return len(columns[0])


def _gain(ours: np.ndarray, theirs: np.ndarray) -> tuple[int, int]:
    """Number of images, and how many more flags `ours` has."""
    return _paired(ours, theirs), int(ours.sum()) - int(theirs.sum())


def _stray(n: int) -> int:
    """Half a point in whole images, or one image where that is less than one."""
    return max(1, _images(HALF_POINT, n))


def _images(share: float, n: int) -> int:
    return math.floor(share * n + 1e-9)  # 0.3 * 10 is 3


def _percent(flags: np.ndarray) -> str:
    return f"{100 * flags.mean():.1f} %"


def _lead(outputs: Tensor) -> Tensor:
    """Largest logit minus the next, [N]. outputs [N, K >= 2]."""
    top = outputs.topk(2, dim=1).values
    return top[:, 0] - top[:, 1]


def _scale(outputs: Tensor) -> float:
    """The largest finite logit, without its sign."""
    return outputs.nan_to_num(nan=0, posinf=0, neginf=0).abs().max().item()


def _apart(first: Tensor, second: Tensor) -> Tensor:
    """Largest difference of each row, [N]. Equal infinities and two NaN are no difference; one NaN is infinite."""
    equal = (first == second) | (first.isnan() & second.isnan())
    return (first - second).abs().nan_to_num(nan=torch.inf).masked_fill(equal, 0).amax(1)
