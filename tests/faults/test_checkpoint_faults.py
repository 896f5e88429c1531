"""A process that dies while it saves: a whole checkpoint is always there, and the next process cleans up.

This file is also the program that is killed: `python test_checkpoint_faults.py RUN_URL STEP` saves one checkpoint after the other,
from STEP on, and prints each step that is complete.
"""

from __future__ import annotations

import itertools
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from cvdist import checkpoint, storage
from cvdist.checkpoint import Checkpointer, State

ROOT = Path(__file__).resolve().parents[2]
KILLS = {"file": 15, "hdfs": 8}


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


def save_for_ever(run_url: str, start: int) -> None:
    """Saves from step `start` on."""
    with Checkpointer(run_url, keep=2, report=lambda line: print("report", line, flush=True)) as checkpointer:
        print("removed", checkpointer.remove_unfinished(), flush=True)
        for step in itertools.count(start):
            checkpointer.save(Model(step), None, State(model="m", epoch=0, step=step, seed=0, global_batch=1))
            checkpointer.wait()
            print("saved", step, flush=True)


def kill_while_saving(run_url: str, start: int, after_s: float) -> tuple[list[int], int]:
    """Lets a process save, kills it; returns the steps it said were complete, and how many unfinished saves it removed."""
    command = [sys.executable, __file__, run_url, str(start)]
    with subprocess.Popen(
        command, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout
        lines = []
        while not lines or (lines[-1] and not lines[-1].startswith("saved")):
            lines.append(process.stdout.readline())
        time.sleep(after_s)
        process.send_signal(signal.SIGKILL)
        lines += process.stdout.readlines()
    words = [line.split() for line in lines if not line.startswith("report removed ")]
    assert {kind for kind, *_ in words} == {"removed", "saved"}, lines
    return [int(step) for kind, step in words if kind == "saved"], int(words[0][1])


def never(message: str) -> None:
    raise AssertionError(f"nothing was to be reported: {message}")


@pytest.mark.timeout(300)
def test_kill_9_in_a_save_loses_nothing_that_was_saved(storage_url: str) -> None:
    kills = KILLS[storage_url.partition(":")[0]]
    draw = random.Random(1)
    folder = storage.join(storage_url, "checkpoints")
    step, num_hidden, total_hidden = 1, 0, 0
    for _ in range(kills):
        saved, num_removed = kill_while_saving(storage_url, step, draw.uniform(0.0, 0.3))
        assert num_removed == num_hidden, "the start of a run removes what dead saves left, and nothing else"
        found = checkpoint.latest(storage_url, never)
        assert found is not None
        assert found.state.step in (saved[-1], saved[-1] + 1), "the last one may have become whole just before the kill"
        for name, array in found.arrays(list(found.index)):
            np.testing.assert_array_equal(array, found.state.step, err_msg=name)
        entries = [storage.name(entry.url) for entry in storage.list_dir(folder)]
        num_hidden = len([name for name in entries if name.startswith(".tmp-")])
        assert num_hidden <= 2
        visible = [name for name in entries if name.startswith("step-")]
        assert min(2, found.state.step) <= len(visible) <= 3
        for name in visible:
            checkpoint.read(storage.join(folder, name))
        total_hidden += num_hidden
        step = found.state.step + 1
    assert total_hidden >= kills // 3, "too few kills hit a save to prove anything"


@pytest.mark.timeout(300)
def test_kill_9_while_a_checkpoint_is_replaced_leaves_an_older_one(tmp_path: Path) -> None:
    run_url = f"file://{tmp_path}"
    kill_while_saving(run_url, 1, 0.2)
    newest = checkpoint.require_latest(run_url, never).state.step
    draw = random.Random(2)
    for _ in range(5):
        # The steps that are there are saved again, as after a resume from an older checkpoint.
        saved, _ = kill_while_saving(run_url, newest - 1, draw.uniform(0.0, 0.1))
        found = checkpoint.require_latest(run_url, never)
        assert found.state.step >= min(newest - 1, saved[-1])
        newest = max(newest, found.state.step)


if __name__ == "__main__":
    save_for_ever(sys.argv[1], int(sys.argv[2]))
