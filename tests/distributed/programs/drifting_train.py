"""A training run in which rank 1 changes one of its weights by the smallest step at step 7, as a failing memory would."""

from __future__ import annotations

import sys
from typing import Any

import keras
import numpy as np

from cvdist import cli, comm, optim
from cvdist.comm import World

RANK, STEP = 1, 7


class DriftingSGD(keras.optimizers.SGD):
    """SGD that on one rank, at one step, leaves one weight one bit off."""

    world = World.alone()

    def apply(self, grads: Any, trainable_variables: Any = None) -> None:
        super().apply(grads, trainable_variables)
        if self.world.rank == RANK:
            bias = trainable_variables[1]
            hit = keras.ops.cast(keras.ops.equal(self.iterations, STEP), bias.dtype)
            bias.assign_add(hit * np.float32(1e-7) * keras.ops.ones_like(bias))


def make_drifting(config: Any, lr: float) -> keras.optimizers.Optimizer:
    DriftingSGD.world = comm.init()
    return DriftingSGD(lr, momentum=0.9)


if __name__ == "__main__":
    optim.make_optimizer = make_drifting
    sys.exit(cli.main(["train", *sys.argv[2:]]))
