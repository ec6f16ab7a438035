"""Settings that the trainings of classifiers share."""

from typing import Annotated, Literal, Self

import pydantic
from pydantic import Field

from dmat.config import names
from dmat.config.fields import (
    NOT_GIVEN,
    Count,
    Momentum,
    Natural,
    NotNegative,
    Positive,
    Record,
    Share,
    StepSize,
    named_in,
)

_Inside = Annotated[float, Field(gt=0, lt=1)]  # a fraction of a run, at neither end


class Network(Record):
    """Architecture of a classifier: a name of `robust.networks.NETWORKS` or an import path of the project's code."""

    name: Annotated[str, named_in(names.NETWORKS)]
    depth: Annotated[int, Field(ge=10, le=10_000)]
    width: Annotated[int, Field(ge=0, le=10_000)] = 0  # not of preact_resnet
    activation: Annotated[str, named_in(names.ACTIVATIONS, plugins_allowed=False)]

    @pydantic.model_validator(mode="after")
    def _depth_and_width_fit(self) -> Self:
        wide = self.name in ("wide_resnet", "wide_resnet_symmetric", "ra_wide_resnet")
        if wide and (self.depth - 4) % 6:
            raise ValueError(f"depth is {self.depth}; expected 6 n + 4, for example 10, 16 or 28")
        if (wide or self.name == "vit") and self.width == 0:
            raise ValueError("width is missing; expected 1 or more, for example 10")
        if self.name == "preact_resnet" and self.depth not in (18, 34):
            raise ValueError(f"depth is {self.depth}; expected 18 or 34 with preact_resnet")
        if self.name == "preact_resnet" and self.width:
            raise ValueError(f"width is {self.width}; preact_resnet has none; leave it out")
        return self


class ClassifierTraining(Record):
    """Settings of the training of a classifier. Lengths are in images seen, not in steps.

    Satisfies `training.classifier.ClassifierSettings`.
    """

    network: Network
    loss: Annotated[str, named_in(names.LOSSES)]
    beta: NotNegative = 0.0
    alpha: NotNegative = 0.0  # of ikl and consistency
    temperature: Positive = 4.0  # of the predictions that ikl averages per class and consistency compares
    gkl_gamma: Annotated[float, Field(gt=0, le=1)] = 1.0  # exponent of these averages; below 1, ikl is GKL
    label_smoothing: Share = 0.0
    attack_steps: Natural = 0
    attack_step_size: StepSize = NOT_GIVEN
    awp_gamma: NotNegative = 0.0  # perturbation of the weights relative to their norm; 0: off
    awp_warmup: Share = 0.0  # of the run, without perturbation of the weights
    images_seen: Count  # length of the run
    batch: Count
    learning_rate: Positive  # at the peak
    schedule: Literal["one_cycle", "cosine", "step"] = "one_cycle"
    milestones: Annotated[tuple[_Inside, ...], Field(strict=False)] = (0.5, 0.75)  # of step: fractions of the run
    milestone_factor: Annotated[float, Field(gt=0, le=1)] = 0.1  # of step, on the rate at each milestone
    warmup: Share = 0.025  # of one_cycle, as are the divisors and the cycle of the momentum: fraction of the run
    start_divisor: Annotated[float, Field(ge=1, le=1e30)] = 25.0  # the learning rate starts at the peak divided by this
    end_divisor: Annotated[float, Field(ge=1, le=1e30)] = 1e4  # and ends at its start divided by this
    schedule_every: Count  # images between two changes of the learning rate
    cycle_momentum: bool = True  # from momentum_highest to momentum_lowest and back, as published; else `momentum`
    momentum: Momentum = 0.9
    momentum_lowest: Momentum = 0.85
    momentum_highest: Momentum = 0.95
    weight_decay: NotNegative = 5e-4
    clip_gradient: NotNegative = 0.0  # 0: off
    ema_decay: Share = 0.995
    ema_warmup: Share = 0.025  # of the run, in which the EMA weights are a copy of the live ones
    batch_norm_momentum: Share = 0.01
    first_batch_norm_momentum: Share = 1.0  # in the first step
    synchronise_batch_norm: bool = False  # over all processes; else each has its own statistics, as published
    augmentation: Annotated[str, named_in(names.AUGMENTATIONS)]
    cutmix: NotNegative = 0.0  # both parameters of its beta distribution; 0: off
    cutmix_copies: Count = 1  # of each drawn image in a batch, each with its own box
    evaluate_every: Count  # images between two evaluations
    selection_steps: Natural  # of PGD on the validation split, which selects the best weights; 0: clean accuracy does
    selection_step_size: StepSize = NOT_GIVEN
    patience: Natural = 0  # evaluations without a new best after which the run ends; 0: never
    on_divergence: Literal["stop", "roll_back"] = "stop"

    @pydantic.model_validator(mode="after")
    def _attack_has_steps(self) -> Self:
        if self.loss != "standard" and self.attack_steps == 0:
            raise ValueError(
                f"attack_steps is 0 and loss is {self.loss!r}; expected at least 1 step, or loss: standard"
            )
        return self

    @property
    def copies(self) -> int:
        """Images of a batch that come from one drawn image: two views with `consistency`, copies with CutMix."""
        return 2 if self.loss == "consistency" else self.cutmix_copies

    @pydantic.model_validator(mode="after")
    def _copies_fill_the_batch(self) -> Self:
        if self.cutmix_copies > 1 and not self.cutmix:
            raise ValueError(f"cutmix_copies is {self.cutmix_copies} and cutmix 0; expected cutmix: 1.0, or 1 copy")
        if self.batch % self.cutmix_copies:
            raise ValueError(f"cutmix_copies is {self.cutmix_copies}; expected a divisor of batch, {self.batch}")
        if self.loss == "consistency" and self.batch % 2:
            raise ValueError(
                f"batch is {self.batch}; expected an even number, as consistency takes two views per image"
            )
        return self

    @pydantic.model_validator(mode="after")
    def _loss_takes_the_images(self) -> Self:
        if self.cutmix and self.loss in ("mart", "consistency"):
            why = "needs one label per image" if self.loss == "mart" else "compares two views of the same image"
            raise ValueError(f"cutmix is {self.cutmix} and loss {self.loss!r}, which {why}; expected cutmix: 0.0")
        return self

    @pydantic.model_validator(mode="after")
    def _weights_are_perturbed_against_an_attack(self) -> Self:
        if self.awp_gamma and self.loss == "standard":
            raise ValueError(
                f"awp_gamma is {self.awp_gamma} and loss is 'standard'; expected 0, or a loss that attacks the images"
            )
        return self

    @pydantic.model_validator(mode="after")
    def _schedule_is_ordered(self) -> Self:
        if self.momentum_lowest > self.momentum_highest:
            raise ValueError(
                f"momentum_lowest is {self.momentum_lowest}; expected at most momentum_highest, {self.momentum_highest}"
            )
        if list(self.milestones) != sorted(set(self.milestones)):
            raise ValueError(f"milestones is {list(self.milestones)}; expected rising fractions such as [0.5, 0.75]")
        return self
