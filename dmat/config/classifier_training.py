"""Settings that trainings of classifiers share."""

from typing import Annotated, Literal, Self

import pydantic
from pydantic import Field

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


class Network(Record):
    name: Annotated[str, named_in("dmat.robust.networks", "NETWORKS")]
    depth: Annotated[int, Field(ge=10, le=10_000)]
    width: Annotated[int, Field(ge=0, le=10_000)] = 0  # not of preact_resnet
    activation: Annotated[str, named_in("dmat.robust.networks", "ACTIVATIONS", own=False)]

    @pydantic.model_validator(mode="after")
    def _is_one_of_the_family(self) -> Self:
        if self.name in ("wide_resnet", "wide_resnet_symmetric") and (self.depth - 4) % 6:
            raise ValueError(f"depth is {self.depth}; expected 6 n + 4, for example 10, 16 or 28")
        if self.name in ("wide_resnet", "wide_resnet_symmetric") and self.width == 0:
            raise ValueError("width is missing; expected 1 or more, for example 10")
        if self.name == "preact_resnet" and self.depth not in (18, 34):
            raise ValueError(f"depth is {self.depth}; expected 18 or 34 with preact_resnet")
        if self.name == "preact_resnet" and self.width:
            raise ValueError(f"width is {self.width}; preact_resnet has none; leave it out")
        return self


class ClassifierTraining(Record):
    """Satisfies `training.classifier.ClassifierSettings`. Lengths are in images seen, not steps."""

    network: Network
    loss: Annotated[str, named_in("dmat.robust.losses", "LOSSES")]
    beta: NotNegative = 0.0
    alpha: NotNegative = 0.0  # of ikl
    temperature: Positive = 4.0  # of ikl: of the predictions that its class means are made of
    label_smoothing: Share = 0.0
    attack_steps: Natural = 0
    attack_step_size: StepSize = NOT_GIVEN
    images_seen: Count  # length of the run
    batch: Count
    learning_rate: Positive  # at the peak
    warmup: Share = 0.025  # of the run
    start_divisor: Annotated[float, Field(ge=1, le=1e30)] = 25.0  # the rate starts at the peak over this
    end_divisor: Annotated[float, Field(ge=1, le=1e30)] = 1e4  # and ends at the start over this
    schedule_every: Count  # images between two changes of the learning rate
    cycle_momentum: bool = True  # from the highest to the lowest and back, as published; else `momentum`
    momentum: Momentum = 0.9
    momentum_lowest: Momentum = 0.85
    momentum_highest: Momentum = 0.95
    weight_decay: NotNegative = 5e-4
    clip_gradient: NotNegative = 0.0  # 0: off
    ema_decay: Share = 0.995
    ema_warmup: Share = 0.025  # of the run, in which the average is a copy
    batch_norm_momentum: Share = 0.01
    first_batch_norm_momentum: Share = 1.0  # of the first step
    synchronise_batch_norm: bool = False  # over all processes; else each has its own statistics, as published
    augmentation: Annotated[str, named_in("dmat.data.augmentation", "AUGMENTATIONS")]
    cutmix: NotNegative = 0.0  # both parameters of its beta distribution; 0: off
    cutmix_copies: Count = 1  # of each drawn image in a batch, each with a box of its own
    evaluate_every: Count  # images
    selection_steps: Natural  # of PGD on the validation split; 0 selects on clean accuracy
    selection_step_size: StepSize = NOT_GIVEN
    patience: Natural = 0  # evaluations without a new best after which the run ends; 0: never
    on_divergence: Literal["stop", "roll_back"] = "stop"

    @pydantic.model_validator(mode="after")
    def _attacks_are_whole(self) -> Self:
        if self.loss != "standard" and self.attack_steps == 0:
            raise ValueError(
                f"attack_steps is 0 and loss is {self.loss!r}; expected at least 1 step, or loss: standard"
            )
        return self

    @pydantic.model_validator(mode="after")
    def _copies_fill_the_batch(self) -> Self:
        if self.cutmix_copies > 1 and not self.cutmix:
            raise ValueError(f"cutmix_copies is {self.cutmix_copies} and cutmix 0; expected cutmix: 1.0, or 1 copy")
        if self.batch % self.cutmix_copies:
            raise ValueError(f"cutmix_copies is {self.cutmix_copies}; expected a divisor of batch, {self.batch}")
        return self
