"""Checks that a robust accuracy must pass before it may be a headline, one function per known measurement error.

Nothing here trains or draws random numbers; a random start is an argument. Train or eval mode and frozen parameters are
left to the caller, as in `robust.attacks`: a check that runs the model sees it as the attack did. Wrong shapes and
empty inputs are defects of the caller and raise ValueError. Everything else returns a `Check` that did not pass.

Flags are bool [N], True where the prediction is right. Robust flags are True where it is right under attack.
`logits_of` maps images [B, C, H, W] in [0, 1] to logits [B, K].
Legend: B batch, N images, C channels, H height, W width, K classes.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import TypedDict

import numpy as np
import torch
from torch import Tensor, nn

from dmat.robust import attacks
from dmat.robust.attacks import NORMS, Ball, Logits

MAX_OVERSHOOT = 0.25  # beyond [0, 1]; assumed: bicubic resizing overshoots by less, normalisation of black by more
MIN_BYTE_MAXIMUM = 2.0  # brightest pixel from which images count as bytes; no resizing makes a pixel this bright
ONE_LEVEL = 1 / 255  # byte images that were divided by 255 twice are no brighter than this
SUM_TOLERANCE = 0.01  # bfloat16 has 8 bits: a row of such probabilities sums to 1 within 0.4 %
MAX_PROBABILITY_ROWS = 0.5  # share of the rows; logits never look like probabilities in more than a stray row
TIE_MARGIN = 1e-4  # logits: float32 sums in another order differ by less, so a smaller margin has no certain sign
# Of the largest logit: ten times the rounding of TF32, in which GPUs convolve (10 bits, 1e-3).
MAX_BATCH_DIFFERENCE = 1e-2
# Of the largest logit: a GPU may choose another algorithm, with or without TF32, in every pass.
MAX_GPU_DIFFERENCE = 1e-3
ROUNDING = 1e-6  # pixels: images + perturbation in float32 is off by up to 2^-25 = 3e-8; as in `evaluate_robust`
PIXEL_ROUNDING = 2.0**-24  # l2: that error of every pixel, and as much again for the norm that the attack computed
MAX_ZERO_GRADIENTS = 0.05  # share of images; assumed: dead units silence single images, masking silences most
MAX_CHANCE_GAIN = 0.005  # share of images; assumed: attacks with one random start differ by less if nothing is wrong
# At `trivial_radius` all images can become one image; guessing among 10 classes would be right for 10 %.
MAX_TRIVIAL_ACCURACY = 0.05
MAX_FGSM_GAP = 0.3  # FGSM - PGD, linf; assumed: sound training leaves 10 points, overfitting most (Wong et al. 2020)
# PGD's accuracy as a share of FGSM's; assumed: an undefended model loses most to FGSM, an overfitted one nothing.
MIN_PGD_OF_FGSM = 0.5
MAX_COPIES = 0.01  # share of images; assumed: fewer copies change an accuracy by less than its 95 % interval


class CheckRecord(TypedDict):
    """A check as summary.json holds it; the fields of `Check`."""

    name: str
    passed: bool
    sentence: str
    found: float | None


@dataclasses.dataclass(frozen=True)
class Check:
    """The outcome of one check.

    sentence: what was found. If the check did not pass, also what was expected, what it means and what to do.
    """

    name: str  # snake_case
    passed: bool
    sentence: str
    found: float | None  # the number that decided; None where there is none or it is not finite

    def plain(self) -> CheckRecord:
        """The fields as a dict that JSON can hold."""
        return {"name": self.name, "passed": self.passed, "sentence": self.sentence, "found": self.found}


def verdict(checks: Sequence[Check]) -> list[str]:
    """Why a number may not be a headline: the sentences of the checks that did not pass.

    Without any check there is a reason too, so the list is empty only if something was checked.
    """
    if not checks:
        return ["nothing was checked; expected the checks of this module; without them no accuracy is a headline"]
    return [f"{check.name}: {check.sentence}" for check in checks if not check.passed]


def in_range(images: Tensor) -> Check:
    """Images are floats in [0, 1], the unit of epsilon. images [N, C, H, W]."""
    _nonempty(images)
    lowest, highest = images.min().item(), images.max().item()
    observation = f"the pixels are {str(images.dtype).removeprefix('torch.')} from {lowest:.4g} to {highest:.4g}"
    if images.is_floating_point() and lowest >= 0 and ONE_LEVEL * 1.001 < highest <= 1:
        return _check("in_range", True, observation, highest)
    if not math.isfinite(lowest + highest):
        cause = "some are NaN or infinite; fix the data"
    elif lowest < -MAX_OVERSHOOT:
        cause = "they look normalised outside the model, so epsilon is in other units; make it the model's first layer"
    elif highest >= MIN_BYTE_MAXIMUM or not images.is_floating_point():
        cause = "they look like bytes that were not scaled, so epsilon is next to nothing; divide by 255"
    elif lowest >= 0 and highest <= 1:
        cause = "if divided by 255 twice, epsilon covers all of an image, so divide once; if black, fix the data"
    else:
        cause = "they look resized or augmented beyond the range, which attacks cannot reach; clip them"
    return _check(
        "in_range", False, f"{observation}; expected floats in [0, 1]: {cause}", lowest if lowest < 0 else highest
    )


def logits(outputs: Tensor) -> Check:
    """Outputs are logits, not probabilities. outputs [N, K].

    Log-probabilities pass: log-softmax does not change them, so every loss, margin and gradient equals that of logits.
    """
    _nonempty(outputs)
    is_probability = (outputs >= 0).all(1) & ((outputs.double().sum(1) - 1).abs() <= SUM_TOLERANCE)
    share = is_probability.double().mean().item()
    if share <= MAX_PROBABILITY_ROWS:
        return _check("logits", True, f"{share:.0%} of the rows look like probabilities", share)
    return _check(
        "logits",
        False,
        f"{share:.0%} of the rows are at least 0 and sum to 1; expected logits: a softmax before the loss's own "
        "softmax makes gradients vanish, so attacks look weaker than they are; remove the softmax from the model",
        share,
    )


def evaluation_mode(model: nn.Module) -> Check:
    """No module is in training mode, where dropout is active and batch norm mixes the images of a batch."""
    training = [name or type(model).__name__ for name, module in model.named_modules() if module.training]
    if not training:
        return _check("evaluation_mode", True, "no module is in training mode", 0)
    return _check(
        "evaluation_mode",
        False,
        f"{len(training)} of {len(list(model.modules()))} modules are in training mode, the first is {training[0]}; "
        "expected none: predictions then "
        "depend on random numbers or on the batch; evaluate inside modes.mode(model, training=False)",
        len(training),
    )


def same_alone(logits_of: Logits, images: Tensor) -> Check:
    """The prediction does not depend on the batch: alone, reversed and half batches agree. images [N >= 2, C, H, W].

    Two predictions may differ only in a tie: the larger margin must be below TIE_MARGIN. Logits must agree too, within
    MAX_BATCH_DIFFERENCE: on few images batch statistics need not change a prediction. Runs the model N + 4 times.
    Raises ValueError for fewer than 2 images.
    """
    if len(_nonempty(images)) < 2:
        raise ValueError("found 1 image, which makes no batch to compare with; expected at least 2; pass more images")
    try:
        with torch.no_grad():
            batch_logits = logits_of(images)
            halves = torch.empty_like(batch_logits)
            halves[::2], halves[1::2] = logits_of(images[::2]), logits_of(images[1::2])
            logits_by_batching = {
                "alone": torch.cat([logits_of(images[k : k + 1]) for k in range(len(images))]),
                "in the reversed batch": logits_of(images.flip(0)).flip(0),
                "in half of the batch": halves,
            }
    except ValueError as error:  # raised by torch's batch norm in training mode for one value per channel
        sentence = f"the model refuses one of the batches ({error}); expected it to accept any number of images"
        return _check("same_alone", False, f"{sentence}; {_BATCH_MATTERS}", None)
    limit = MAX_BATCH_DIFFERENCE * _largest_logit(batch_logits)
    comparisons = []
    for batching, other_logits in logits_by_batching.items():
        changed = batch_logits.argmax(1) != other_logits.argmax(1)
        ties = changed & (torch.maximum(_top_margin(batch_logits), _top_margin(other_logits)) < TIE_MARGIN)
        comparisons.append(
            (
                int((changed & ~ties).sum()),
                _row_differences(batch_logits, other_logits).max().item(),
                int(ties.sum()),
                batching,
            )
        )
    changed_count, difference, tie_count, batching = max(comparisons)
    observation = (
        f"{changed_count} of {len(images)} predictions differ (ties left out: {tie_count}), logits by up to "
        f"{difference:.2g}"
    )
    if changed_count == 0 and difference <= limit:
        return _check("same_alone", True, observation, changed_count)
    sentence = f"{observation}, {batching}; expected none and at most {limit:.2g}; {_BATCH_MATTERS}"
    return _check("same_alone", False, sentence, changed_count or difference)


_BATCH_MATTERS = (
    "so the prediction of an image depends on its batch, and the attack did not see what is scored; evaluate in "
    "evaluation mode, with the training data's statistics in every normalisation layer"
)


def finite(outputs: Tensor) -> Check:
    """Outputs are neither NaN nor infinite: attacks make no progress there and do not notice. outputs [N, K]."""
    bad_count = int((~_nonempty(outputs).isfinite()).any(1).sum())
    if bad_count == 0:
        return _check("finite", True, f"the outputs of all {len(outputs)} images are finite", bad_count)
    return _check(
        "finite",
        False,
        f"the outputs of {bad_count} of {len(outputs)} images are NaN or infinite; expected none: attacks make no "
        "progress there and the images count as robust or wrong by accident; look for a diverged training or an "
        "overflow",
        bad_count,
    )


def deterministic(logits_of: Logits, images: Tensor) -> Check:
    """Two passes give the same logits. images [N, C, H, W].

    Exactly the same on a CPU; within MAX_GPU_DIFFERENCE of the largest logit where `images` are on a GPU.
    """
    with torch.no_grad():
        first, second = logits_of(_nonempty(images)), logits_of(images)
    difference = _row_differences(first, second).max().item()
    limit = 0.0 if images.device.type == "cpu" else MAX_GPU_DIFFERENCE * _largest_logit(first)
    if difference <= limit:
        return _check("deterministic", True, f"two passes differ by {difference:.2g}", difference)
    return _check(
        "deterministic",
        False,
        f"two passes give logits {difference:.2g} apart; expected at most {limit:.2g}: the model draws random numbers, "
        "which a standard attack cannot average out, and draws new ones when adversarial images are scored; switch "
        "dropout and noise off, or report an attack on the expectation",
        difference,
    )


def inside_ball(images: Tensor, adversarial: Tensor, ball: Ball) -> Check:
    """Perturbations are at most epsilon, up to float32 rounding, and pixels are in [0, 1].

    images, adversarial [N, C, H, W]. Sizes are computed in float64, so the tolerance covers only what the attack
    rounded. In l2 the rounding of independent pixels grows with the square root of their number: 3e-6 for 3x32x32,
    2e-5 for 3x224x224. Raises ValueError where the shapes differ.
    """
    if _nonempty(images).shape != adversarial.shape:
        raise ValueError(
            f"images {tuple(images.shape)} and adversarial {tuple(adversarial.shape)} differ in shape; expected one"
        )
    epsilon, pixels = float(ball.epsilon), images[0].numel()
    tolerance = ROUNDING if ball.norm == "linf" else max(ROUNDING, math.sqrt(pixels) * PIXEL_ROUNDING)
    sizes = ball.size(adversarial.double() - images.double())  # [N]
    flat = adversarial.double().flatten(1)
    excess = torch.maximum(-flat.amin(1), flat.amax(1) - 1)  # [N], how far beyond [0, 1]; below 0 inside
    largest_size, largest_index = sizes.nan_to_num(nan=torch.inf).max(0)
    largest_excess, excess_index = excess.nan_to_num(nan=torch.inf).max(0)
    observation = f"the largest perturbation is {largest_size.item():.7g} ({ball.norm})"
    oversized_count, out_of_range_count = int((~(sizes <= epsilon + tolerance)).sum()), int((~(excess <= 0)).sum())
    if oversized_count:
        sentence, value = (
            f"{observation}, of image {int(largest_index)}; {oversized_count} of {len(images)} are above {epsilon:.7g}",
            largest_size.item(),
        )
    elif out_of_range_count:
        value = largest_excess.item()
        sentence = f"image {int(excess_index)} is {value:.3g} outside [0, 1]; {out_of_range_count} of {len(images)} are"
    else:
        return _check("inside_ball", True, f"{observation} of {epsilon:.7g}", largest_size.item())
    return _check(
        "inside_ball",
        False,
        f"{sentence}; expected at most {epsilon:.7g} + {tolerance:.1g}, and pixels in [0, 1]: the accuracy is that of "
        "another threat model; project in the pixel space of the model's input, after any rounding",
        value,
    )


def rescored(flags: np.ndarray, margins_same: np.ndarray, margins_other: np.ndarray) -> Check:
    """The attack's robust flags match the saved adversarial images, whatever the batch. flags [N].

    margins_same, margins_other [N]: `attacks.logit_margin` of the saved images, in the attack's batches and in others;
    above 0 means right. A flag may differ only in other batches, and only at margins below TIE_MARGIN.
    """
    n = _paired(flags, margins_same > 0, margins_other > 0)
    differing_same = int((flags != (margins_same > 0)).sum())
    changed = flags != (margins_other > 0)
    certain_changes = changed & ~(np.maximum(np.abs(margins_same), np.abs(margins_other)) < TIE_MARGIN)
    differing_other, tie_count = int(certain_changes.sum()), int((changed & ~certain_changes).sum())
    if differing_same == differing_other == 0:
        return _check(
            "rescored", True, f"all {n} flags are those of the saved images (ties in other batches: {tie_count})", 0
        )
    return _check(
        "rescored",
        False,
        f"{differing_same} of {n} flags differ in the same batches and {differing_other} in others (ties left out: "
        f"{tie_count}); expected none: the saved images are not those that were scored, or the model is not "
        "deterministic; save float32 and check the model's mode",
        max(differing_same, differing_other),
    )


def zero_gradients(logits_of: Logits, images: Tensor, labels: Tensor, ball: Ball, start: Tensor) -> Check:
    """At most MAX_ZERO_GRADIENTS of the images have a gradient that is exactly zero or not finite.

    A gradient attack cannot move such an image. The gradient is that of the cross-entropy with respect to the input, at
    a start in the ball. images [N, C, H, W], labels [N]. start: perturbation [N, C, H, W], as from `Ball.random_start`.
    """
    points = attacks.pgd(logits_of, _nonempty(images), attacks.cross_entropy(labels), ball, start, steps=0, step_size=0)
    with torch.enable_grad():
        loss = attacks.cross_entropy(labels)(logits_of(points.requires_grad_(True))).sum()
    gradient = None
    if loss.requires_grad:  # False if the model leaves torch or detaches
        (gradient,) = torch.autograd.grad(loss, points, allow_unused=True)
    flat = (torch.zeros_like(points) if gradient is None else gradient).flatten(1)
    share = ((flat == 0).all(1) | ~flat.isfinite().all(1)).double().mean().item()
    observation = f"{share:.1%} of {len(images)} images have no usable gradient at a random start"
    if share <= MAX_ZERO_GRADIENTS:
        return _check("zero_gradients", True, observation, share)
    return _check(
        "zero_gradients",
        False,
        f"{observation}; expected at most {MAX_ZERO_GRADIENTS:.0%}: gradient attacks make no progress there, so the "
        "model looks robust without being so; look for rounding, saturation or huge logits, and attack without "
        "gradients (Square)",
        share,
    )


def more_steps(few: np.ndarray, many: np.ndarray, few_steps: int, many_steps: int) -> Check:
    """PGD with more steps is not weaker than PGD with few. few, many: robust flags [N] of the same images."""
    n, gain = _gain(many, few)
    observation = f"{_percent(few)} are robust to PGD-{few_steps}, {_percent(many)} to PGD-{many_steps}"
    if gain <= _allowed_gain(n):
        return _check("more_steps", True, observation, gain / n)
    return _check(
        "more_steps",
        False,
        f"{observation}; expected the longer attack to leave no more than {_allowed_gain(n)} of {n} images more: its "
        "steps do not climb the loss, so PGD overstates robustness; check its step size, sign and projection",
        gain / n,
    )


def black_box(black: np.ndarray, white: np.ndarray) -> Check:
    """A black-box attack is not stronger than white-box attacks. black, white: robust flags [N] of each.

    A black-box attack sees only outputs, white-box attacks see gradients.
    """
    n, gain = _gain(white, black)
    observation = f"{_percent(black)} are robust to the black-box attack, {_percent(white)} to the white-box attacks"
    if gain <= _allowed_gain(n):
        return _check("black_box", True, observation, gain / n)
    return _check(
        "black_box",
        False,
        f"{observation}; expected the white-box attacks to leave at most {_allowed_gain(n)} of {n} images more: "
        "gradients are masked, so the model is less robust than they say; look for rounding, noise or saturation in "
        "the model",
        gain / n,
    )


def trivial_radius(norm: str, shape: tuple[int, ...]) -> float:
    """The smallest radius at which every image [C, H, W] in [0, 1] can become mid grey, and so the same image.

    In pixels of [0, 1], by the norm. Raises ValueError for a norm that is not in NORMS.
    """
    if norm not in NORMS:
        raise ValueError(f"norm is {norm!r}; expected one of {', '.join(NORMS)}")
    return 0.5 if norm == "linf" else 0.5 * math.sqrt(math.prod(shape))


def large_radius(robust: np.ndarray, radius: float) -> Check:
    """At most MAX_TRIVIAL_ACCURACY of the images survive PGD at `trivial_radius`. robust: flags [N]."""
    n = _paired(robust)
    share = int(robust.sum()) / n
    observation = f"{_percent(robust)} of {n} images are robust at radius {radius:.4g}"
    if share <= MAX_TRIVIAL_ACCURACY:
        return _check("large_radius", True, observation, share)
    return _check(
        "large_radius",
        False,
        f"{observation}, at which all can become the same grey; expected at most {MAX_TRIVIAL_ACCURACY:.0%}: the "
        "attack misses adversarial images that exist, and will miss them at small radii too; look for masked gradients "
        "and check the attack's steps",
        share,
    )


def fgsm_and_pgd(fgsm: np.ndarray, pgd: np.ndarray, norm: str = "linf") -> Check:
    """PGD is not weaker than FGSM, and the model does not resist FGSM alone. fgsm, pgd: robust flags [N] of each.

    The second condition is checked in linf only: there one step of the whole radius is what a model with catastrophic
    overfitting was trained with. In l2 one step is far weaker than many steps against every model: 82 and 21 % of a
    sound one (docs/log.md, 2026-11-24).
    """
    n, gain = _gain(pgd, fgsm)
    observation = f"{_percent(fgsm)} are robust to FGSM, {_percent(pgd)} to PGD"
    if gain > _allowed_gain(n):
        reason = (
            f"expected PGD to leave at most {_allowed_gain(n)} of {n} images more: it is broken or gradients are "
            "masked, and its accuracy is too high; check its step size, sign and projection"
        )
    elif norm == "linf" and -gain > _image_count(MAX_FGSM_GAP, n) and pgd.sum() < MIN_PGD_OF_FGSM * fgsm.sum():
        reason = (
            f"expected at most {MAX_FGSM_GAP:.0%} between them: the model resists one step only, by catastrophic "
            "overfitting or because gradients vanish (zero_gradients); do not quote the FGSM accuracy, and train with "
            "more steps or a random start"
        )
    else:
        return _check("fgsm_and_pgd", True, observation, -gain / n)
    return _check("fgsm_and_pgd", False, f"{observation}; {reason}", -gain / n)


def unseen(copies: Mapping[str, np.ndarray]) -> Check:
    """Test images are not training images, and none occurs twice.

    copies: what a test image may be an exact copy of, in words -> flags [N], True where it is a copy. At most
    MAX_COPIES of the images may be copies of anything, each counted once.
    """
    n = _paired(*copies.values())
    counts = ", ".join(f"{int(flags.sum()):,} of {name}" for name, flags in copies.items())
    observation = f"of {n:,} test images these are exact copies: {counts}"
    copy_count = int(np.logical_or.reduce(list(copies.values())).sum())
    if copy_count <= _image_count(MAX_COPIES, n):
        return _check("unseen", True, observation, copy_count / n)
    return _check(
        "unseen",
        False,
        f"{observation}; expected at most {MAX_COPIES:.0%} together: the model was fitted to its training images, and "
        "a repeated image counts repeatedly; remove the copies from the data set and prepare it again",
        copy_count / n,
    )


def _check(name: str, passed: bool, sentence: str, value: float | None) -> Check:
    usable = value is not None and math.isfinite(value)  # JSON has no NaN
    return Check(name, passed, sentence, float(value) if value is not None and usable else None)


def _nonempty(tensor: Tensor) -> Tensor:
    """The tensor [N, ...], unchanged. Raises ValueError where it holds no images."""
    if len(tensor) == 0:
        raise ValueError("a check of no images would pass whatever is wrong; expected 1 or more; pass some images")
    return tensor


def _paired(*columns: np.ndarray) -> int:
    """Number of images N of bool columns [N]. Raises ValueError where they are not bool or not of the same images."""
    if any(c.dtype != bool or c.ndim != 1 or len(c) == 0 or len(c) != len(columns[0]) for c in columns):
        kinds = ", ".join(f"{column.dtype} {column.shape}" for column in columns)
        raise ValueError(f"found {kinds}; expected bool [N] of the same N >= 1 images; pass flags of the same images")
    return len(columns[0])


def _gain(flags: np.ndarray, reference: np.ndarray) -> tuple[int, int]:
    """Number of images, and how many more flags are True than in the reference. flags, reference [N]."""
    return _paired(flags, reference), int(flags.sum()) - int(reference.sum())


def _allowed_gain(n: int) -> int:
    """Number of images of n that count as chance: MAX_CHANCE_GAIN of them, at least one."""
    return max(1, _image_count(MAX_CHANCE_GAIN, n))


def _image_count(share: float, n: int) -> int:
    return math.floor(share * n + 1e-9)  # so that 0.3 * 10 is 3


def _percent(flags: np.ndarray) -> str:  # [N]
    return f"{100 * flags.mean():.1f} %"


def _top_margin(outputs: Tensor) -> Tensor:
    """Largest logit minus the next, [N]. outputs [N, K >= 2]."""
    top = outputs.topk(2, dim=1).values
    return top[:, 0] - top[:, 1]


def _largest_logit(outputs: Tensor) -> float:
    """The largest magnitude of a finite logit. outputs [N, K]."""
    return outputs.nan_to_num(nan=0, posinf=0, neginf=0).abs().max().item()


def _row_differences(first: Tensor, second: Tensor) -> Tensor:
    """Largest absolute difference of each row, [N]. first, second [N, K].

    Equal infinities and two NaN do not differ. One NaN is an infinite difference.
    """
    equal = (first == second) | (first.isnan() & second.isnan())
    return (first - second).abs().nan_to_num(nan=torch.inf).masked_fill(equal, 0).amax(1)
