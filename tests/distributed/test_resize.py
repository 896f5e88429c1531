"""A run that is killed and goes on with other numbers of ranks reads, batch by batch, what an undisturbed run reads."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cvdist.shards import read_manifest
from tests.made_data import class_tree, data_set

RunRanks = Callable[..., Any]
Batches = dict[tuple[int, int], list[int]]  # samples by (epoch, step)
GLOBAL_BATCH, EPOCHS, CHECKPOINT_STEPS = 12, 12, 5
# Ranks of each launch, and the checkpoint behind which it is killed; the last one ends by itself.
LAUNCHES = [(2, 20), (1, 45), (3, 75), (2, None)]


def arguments(data: str, run: Path, trace: Path) -> list[str]:
    """Returns the command line of a run."""
    settings = {
        "data": data,
        "run": f"file://{run}",
        "model": "mnist_convnet",
        "epochs": EPOCHS,
        "global_batch": GLOBAL_BATCH,
        "seed": 3,
        "optim.lr": 0.005,
        "checkpoint.every_steps": CHECKPOINT_STEPS,
        "evaluate.every_epochs": 0,
        "loader.trace_path": trace,
    }
    return ["-m", "cvdist.train", *(word for key, value in settings.items() for word in (f"--{key}", str(value)))]


def read_by_rank(trace: Path, rank: int) -> Batches:
    """Returns what one rank of a launch was given; a line that the rank was killed in does not count."""
    paths = list(trace.glob(f"{rank}-of-*.jsonl"))
    assert len(paths) == 1, f"{paths}: a launch has one process for each rank"
    lines = [json.loads(line) for line in paths[0].read_text().splitlines(keepends=True) if line.endswith("\n")]
    batches = {(line["epoch"], line["step"]): line["samples"] for line in lines}
    assert list(batches) == sorted(batches)
    assert len(batches) == len(lines)
    return batches


def together(ranks: list[Batches]) -> Batches:
    """Returns the global batches that all ranks were given, each the ranks' parts behind each other."""
    steps = [step for step in ranks[0] if all(step in rank for rank in ranks)]
    return {step: [sample for rank in ranks for sample in rank[step]] for step in steps}


def kill_behind(launch: Any, checkpoint: Path, trace: Path, timeout_s: float = 150) -> None:
    """Kills all ranks when they have gone on behind a checkpoint, so that the next launch repeats some steps."""
    started_s = time.monotonic()
    given_then = None
    while True:
        assert launch.process.poll() is None, (launch.folder / "output.txt").read_text()
        assert time.monotonic() - started_s < timeout_s, (launch.folder / "output.txt").read_text()
        given = sum(len(path.read_bytes().splitlines()) for path in trace.glob("0-of-*.jsonl"))
        if given_then is None and checkpoint.exists():
            given_then = given
        if given_then is not None and given > given_then:
            break
        time.sleep(0.005)
    for process in launch.ranks():
        process.send_signal(signal.SIGKILL)
    assert launch.wait(60).returncode != 0


@pytest.mark.timeout(900)
def test_a_run_killed_and_resized_reads_the_global_batches_of_an_undisturbed_run(
    start_ranks: Callable[..., Any], run_ranks: RunRanks, tmp_path: Path
) -> None:
    data, run = f"file://{tmp_path}/set", tmp_path / "run"
    data_set(class_tree(tmp_path / "images", {"down": 60, "left": 60, "right": 50}), data, image_size=32)
    num_samples = read_manifest(data).splits["train"].num_rows
    assert num_samples % GLOBAL_BATCH, "the last batch of an epoch is to be a partial one"
    outcome = run_ranks(2, "", *arguments(data, tmp_path / "undisturbed", tmp_path / "trace"), timeout_s=300)
    assert outcome.returncode == 0, outcome.output
    undisturbed = together([read_by_rank(tmp_path / "trace", rank) for rank in range(2)])
    steps = list(undisturbed)
    assert len(steps) == EPOCHS * -(-num_samples // GLOBAL_BATCH)
    for epoch in range(EPOCHS):
        assert {sample for step in steps if step[0] == epoch for sample in undisturbed[step]} == set(range(num_samples))

    seen: Batches = {}
    num_repeated = 0
    for number, (size, kill_step) in enumerate(LAUNCHES):
        trace = tmp_path / f"trace-{number}"
        command = arguments(data, run, trace) + (["--resume"] if number else [])
        if kill_step is None:
            outcome = run_ranks(size, "", *command, timeout_s=300)
            assert outcome.returncode == 0, outcome.output
        else:
            launch = start_ranks(size, "", *command, env={"CVDIST_STORAGE_DEADLINE_S": "20"})
            kill_behind(launch, run / "checkpoints" / f"step-{kill_step:08d}" / "COMMIT.json", trace)
            assert not (run / "result.json").exists(), "the run ended before it was killed; nothing was tested"
        ranks = [read_by_rank(trace, rank) for rank in range(size)]
        for rank, batches in enumerate(ranks):
            # Whatever a rank was given, however far it came, is its part of the undisturbed run's global batch.
            part = slice(rank * GLOBAL_BATCH // size, (rank + 1) * GLOBAL_BATCH // size)
            assert batches == {step: undisturbed[step][part] for step in batches}
            first = steps.index(min(batches))
            assert list(batches) == steps[first : first + len(batches)], "steps are missing"
            assert first % CHECKPOINT_STEPS == 0
            assert first >= (LAUNCHES[number - 1][1] or 0 if number else 0), "it did not go on from the checkpoint"
            assert first <= len(seen), "the steps between were skipped"
        given = together(ranks)
        num_repeated += len(given.keys() & seen.keys())
        seen |= given
    assert seen == undisturbed
    assert num_repeated > 0, "no kill fell between two checkpoints"
