"""Optimizers, and the learning rate as a function of the step."""

from __future__ import annotations

import math
from typing import Literal

import keras

from cvdist.config import OptimConfig
from cvdist.errors import ConfigError

# The variables that weight decay leaves alone, whatever their layer is called. While Keras steps it compares this with
# TensorFlow's name of the variable ("conv1/bias:0"), not with its own ("bias"). Source: Goyal 2017, section 5.1
# (normalisations); He 2019, Bag of Tricks, section 3.1 (biases).
NO_DECAY = [r"(^|/)(bias|gamma|beta)(:\d+)?$"]
# Ends of the steps of the rate, in epochs of 90. Source: Goyal 2017, section 5.1 (He 2016 divides at plateaus instead).
STEP_EPOCHS, STEP_EPOCHS_OF, STEP_FACTOR = (30, 60, 80), 90, 0.1


def make_optimizer(config: OptimConfig, lr: float) -> keras.optimizers.Optimizer:
    """Makes the optimizer of `config`; train.py sets its `learning_rate` before each step.

    Weight decay is decoupled (Source: Loshchilov 2019) and spares biases and normalisations. Keras keeps that exclusion
    outside an optimizer's configuration: one rebuilt by `from_config` has forgotten it. Keras clips in `apply`: with
    several ranks gradients are averaged before that.

    Raises:
        ConfigError: The name is unknown.
    """
    clip = config.clip_norm or None
    decay = config.weight_decay or None
    optimizer: keras.optimizers.Optimizer
    match config.name:
        case "sgd":
            optimizer = keras.optimizers.SGD(
                lr,
                momentum=0.9 if config.momentum is None else config.momentum,
                weight_decay=decay,
                global_clipnorm=clip,
            )
        case "adam":
            optimizer = keras.optimizers.Adam(lr, weight_decay=decay, global_clipnorm=clip)
        case "adamw":
            optimizer = keras.optimizers.AdamW(lr, weight_decay=config.weight_decay, global_clipnorm=clip)
        case "rmsprop":
            optimizer = keras.optimizers.RMSprop(
                lr, momentum=config.momentum or 0.0, weight_decay=decay, global_clipnorm=clip
            )
        case _:
            raise ConfigError(
                f"optim.name: {config.name!r} is unknown; expected sgd, adam, adamw or rmsprop; choose one of these"
            )
    optimizer.exclude_from_weight_decay(var_names=NO_DECAY)
    return optimizer


def lr_at(
    step: int,
    *,
    peak: float,
    warmup_steps: int,
    total_steps: int,
    schedule: Literal["cosine", "constant", "step"],
    steps_per_epoch: int,
) -> float:
    """Returns the learning rate of step `step`, counted from 0.

    Linear growth over `warmup_steps` steps, the last of which has the peak. After it: cosine falls from the peak to
    zero at `total_steps`; constant stays; step divides by ten when 30/90, 60/90 and 80/90 of the epochs are over,
    at the first epoch's beginning after that, counted from the start of training.
    Source: Goyal 2017, section 2.2 (warm-up) and 5.1 (step); Loshchilov 2017, equation 5 without restarts (cosine).

    Raises:
        ConfigError: The schedule is unknown.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if schedule == "constant":
        return peak
    if schedule == "cosine":
        progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
        return peak * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    if schedule == "step":
        # An epoch is over when its last step is; integers, so that no rounding moves a border.
        done = step // steps_per_epoch * steps_per_epoch
        return peak * STEP_FACTOR ** sum(done * STEP_EPOCHS_OF >= epochs * total_steps for epochs in STEP_EPOCHS)
    raise ConfigError(
        f"optim.schedule: {schedule!r} is unknown; expected cosine, constant or step; choose one of these"
    )
