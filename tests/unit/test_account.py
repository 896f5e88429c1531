"""The ledger: an epoch that lost, doubled or exchanged a sample does not pass."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from cvdist import account
from cvdist.account import Ledger
from cvdist.errors import DataError
from cvdist.plan import EpochPlan
from cvdist.shards import Shard, Split


def shard(index: int, rows: tuple[int, ...]) -> Shard:
    """Returns a shard of row groups of so many rows."""
    return Shard(f"train/{index}.parquet", sum(rows), 100, "", rows, tuple(rows), ("",) * len(rows), "")


SPLIT = Split(tuple(shard(index, rows) for index, rows in enumerate([(16, 16, 5), (), (16, 3, 20)])), (76,))


def read(plan: EpochPlan, *, first_step: int = 0, size: int = 1) -> Ledger:
    """Returns the ledger of all ranks that read an epoch from a step on."""
    ledgers = [Ledger(epoch=2, first_step=first_step) for _ in range(size)]
    for index in range(first_step, plan.num_steps):
        for rank, ledger in enumerate(ledgers):
            step = plan.step(index, rank, size)
            ledger.count(step.samples, step.weights)
    sums = np.sum([ledger.sums() for ledger in ledgers], axis=0)
    return ledgers[0].with_sums(sums)


@pytest.mark.parametrize("remainder", ["pad", "drop"])
@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("first_step", [0, 1, 4])
def test_an_epoch_that_was_read_passes_on_any_ranks_from_any_step(remainder: str, size: int, first_step: int) -> None:
    plan = EpochPlan(SPLIT, 12, seed=5, epoch=2, remainder=remainder)  # type: ignore[arg-type]
    line = read(plan, first_step=first_step, size=size).check(plan, "data")
    assert line["samples"] + line["dropped"] + 12 * first_step == 76
    assert line["padded"] == plan.num_padded
    assert line["steps"] == plan.num_steps - first_step
    assert line["epoch"] == 2


@pytest.mark.parametrize("remainder", ["pad", "drop"])
def test_one_sample_lost_doubled_or_exchanged_is_an_error(remainder: str) -> None:
    plan = EpochPlan(SPLIT, 12, seed=5, epoch=2, remainder=remainder)  # type: ignore[arg-type]
    for lost, extra in ((1, 0), (0, 1), (1, 1)):
        ledger = Ledger(epoch=2)
        for index in range(plan.num_steps):
            step = plan.step(index)
            samples, weights = step.samples.copy(), step.weights
            if index == 2:
                samples = np.concatenate([samples[lost:], samples[-1:].repeat(extra)])
                weights = np.ones(len(samples), np.float32)
            ledger.count(samples, weights)
        with pytest.raises(DataError, match="samples were read from step 0 of epoch 2 on"):
            ledger.check(plan, "data")


def test_repeated_samples_are_counted_as_often_as_they_occur() -> None:
    counts = np.arange(76) % 3
    plan = EpochPlan(SPLIT, 12, seed=5, counts=counts)
    line = read(plan).check(plan, "data")
    assert line["samples"] == counts.sum()
    wrong = dataclasses.replace(read(plan), digest=account.digest(np.arange(76)))
    with pytest.raises(DataError):
        wrong.check(plan, "data")


def test_sums_over_ranks_are_exact_beyond_53_bits() -> None:
    one = Ledger(samples=3, digest=2**64 - 5, bytes_read=2**60 + 1, wait_s=1.5, total_s=3.25)
    total = one.with_sums(one.sums() + one.sums())
    assert (total.samples, total.digest, total.bytes_read) == (6, (2 * (2**64 - 5)) % 2**64, 2**61 + 2)
    assert (total.wait_s, total.total_s) == (3.0, 6.5)


def test_the_share_of_waiting_is_of_the_time_since_the_first_wait() -> None:
    ledger = Ledger()
    for begun_s, ready_s in ((10.0, 12.0), (13.0, 13.5), (19.5, 20.0)):
        ledger.count(np.arange(1), np.ones(1, np.float32))
        ledger.waited(begun_s, ready_s)
    assert (ledger.wait_s, ledger.total_s) == (3.0, 10.0)
