"""Saves one checkpoint after the other to RUN_URL, from step START on, until it is killed; prints each step that is complete."""

from __future__ import annotations

import itertools
import sys

import numpy as np

from cvdist.checkpoint import Checkpointer, State


class Variable:
    """What a checkpoint needs of a Keras variable, without the seconds that importing Keras takes."""

    dtype, shape = "float32", (250_000,)

    def __init__(self, index: int, step: int) -> None:
        self.path, self.value, self._step = f"layer_{index}/kernel", self, step

    def numpy(self) -> np.ndarray:
        return np.full(self.shape, self._step, self.dtype)


class Model:
    """Four megabytes that all hold the number of the step."""

    def __init__(self, step: int) -> None:
        self.variables = [Variable(index, step) for index in range(4)]


if __name__ == "__main__":
    run_url, start = sys.argv[1], int(sys.argv[2])
    with Checkpointer(run_url, keep=2, report=lambda line: print("report", line, flush=True)) as checkpointer:
        print("removed", checkpointer.remove_unfinished(), flush=True)
        for step in itertools.count(start):
            checkpointer.save(Model(step), None, State(model="m", epoch=0, step=step, seed=0, global_batch=1))
            checkpointer.wait()
            print("saved", step, flush=True)
