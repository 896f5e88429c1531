"""The order of an epoch: every sample once, equal steps, one order for any number of ranks, a function of integers alone."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from cvdist.plan import EpochPlan, Step
from cvdist.shards import Split
from tests.made_splits import made_split

# Shards of row groups, some of them empty or tiny.
SPLITS = st.lists(st.lists(st.integers(0, 40), max_size=8), min_size=1, max_size=5).map(
    lambda shards: made_split(*shards)
)
SEEDS = st.none() | st.integers(0, 2**32 - 1)
BATCHES = st.integers(1, 72)
LANES = st.integers(1, 80)
EPOCHS = st.integers(0, 1000)
common = settings(max_examples=80, deadline=None)


def divisors(number: int) -> list[int]:
    """Returns the numbers of ranks that a global batch divides over."""
    return [size for size in range(1, number + 1) if number % size == 0]


def epoch(plan: EpochPlan, rank: int = 0, size: int = 1) -> list[Step]:
    """Returns all steps of one rank."""
    return [plan.step(index, rank, size) for index in range(plan.num_steps)]


def delivered(plan: EpochPlan) -> list[int]:
    """Returns the samples of weight one, in order."""
    return [int(sample) for step in epoch(plan) for sample in step.samples[step.weights == 1]]


def same(one: Step, other: Step) -> bool:
    """Says whether two steps are equal in every number."""
    names = ("groups", "rows", "samples", "weights")
    return one.num_valid == other.num_valid and all(
        np.array_equal(getattr(one, name), getattr(other, name)) for name in names
    )


@common
@given(SPLITS, BATCHES, LANES, SEEDS, EPOCHS)
def test_every_sample_has_weight_one_exactly_once_per_epoch(
    split: Split, batch: int, lanes: int, seed: int | None, number: int
) -> None:
    plan = EpochPlan(split, batch, seed=seed, epoch=number, num_lanes=lanes)
    assert sorted(delivered(plan)) == list(range(split.num_rows))
    weights = np.concatenate([np.zeros(0), *(step.weights for step in epoch(plan))])
    assert len(weights) == plan.num_steps * batch == split.num_rows + plan.num_padded
    assert plan.num_padded < batch
    assert set(weights) <= {0.0, 1.0}
    assert plan.num_dropped == 0


@common
@given(SPLITS, BATCHES, LANES, SEEDS, EPOCHS)
def test_dropping_leaves_out_less_than_a_batch_and_says_how_many(
    split: Split, batch: int, lanes: int, seed: int | None, number: int
) -> None:
    plan = EpochPlan(split, batch, seed=seed, epoch=number, num_lanes=lanes, remainder="drop")
    samples = delivered(plan)
    assert len(set(samples)) == len(samples) == plan.num_steps * batch
    assert plan.num_dropped == split.num_rows - len(samples) < batch
    assert plan.num_padded == 0
    assert all((step.weights == 1).all() and step.num_valid == batch for step in epoch(plan))


@common
@given(SPLITS, BATCHES, LANES, SEEDS, st.sampled_from(["pad", "drop"]))
def test_groups_and_rows_name_the_samples(
    split: Split, batch: int, lanes: int, seed: int | None, remainder: Literal["pad", "drop"]
) -> None:
    plan = EpochPlan(split, batch, seed=seed, num_lanes=lanes, remainder=remainder)
    group_rows = [rows for shard in split.shards for rows in shard.row_group_rows]
    first = np.concatenate([[0], np.cumsum(group_rows)]).astype(int)
    for step in epoch(plan):
        assert len(step.groups) == len(step.rows) == len(step.samples) == len(step.weights) == batch
        assert step.num_valid == int(step.weights.sum())
        for group, row, sample in zip(step.groups, step.rows, step.samples, strict=True):
            assert 0 <= row < group_rows[group]
            assert first[group] + row == sample


@common
@given(SPLITS, BATCHES, LANES, SEEDS, EPOCHS, st.data())
def test_every_number_of_ranks_sees_the_same_global_batches_in_the_same_order(
    split: Split, batch: int, lanes: int, seed: int | None, number: int, data: st.DataObject
) -> None:
    size = data.draw(st.sampled_from(divisors(batch)))
    one = EpochPlan(split, batch, seed=seed, epoch=number, num_lanes=lanes)
    # Each rank plans for itself, as it does in a run.
    ranks = [
        epoch(EpochPlan(split, batch, seed=seed, epoch=number, num_lanes=lanes), rank, size) for rank in range(size)
    ]
    for index, whole in enumerate(epoch(one)):
        parts = [steps[index] for steps in ranks]
        for name in ("groups", "rows", "samples", "weights"):
            assert np.array_equal(np.concatenate([getattr(part, name) for part in parts]), getattr(whole, name))
        assert {part.num_valid for part in parts} == {whole.num_valid}
        assert {len(part.samples) for part in parts} == {batch // size}
    assert {len(steps) for steps in ranks} == {one.num_steps}


@common
@given(SPLITS, BATCHES, LANES, SEEDS, EPOCHS, st.randoms(use_true_random=False))
def test_a_step_is_a_function_of_its_number_alone(
    split: Split, batch: int, lanes: int, seed: int | None, number: int, random: Any
) -> None:
    steps = epoch(EpochPlan(split, batch, seed=seed, epoch=number, num_lanes=lanes))
    plan = EpochPlan(split, batch, seed=seed, epoch=number, num_lanes=lanes)
    order = list(range(plan.num_steps)) * 2
    random.shuffle(order)
    assert all(same(plan.step(index), steps[index]) for index in order)


@common
@given(SPLITS, BATCHES, LANES, st.integers(0, 2**32 - 1), EPOCHS)
def test_epochs_and_seeds_differ(split: Split, batch: int, lanes: int, seed: int, number: int) -> None:
    assume(sorted(count for shard in split.shards for count in shard.row_group_rows)[-2:] > [20, 20])
    orders = [
        delivered(EpochPlan(split, batch, seed=s, epoch=e, num_lanes=lanes))
        for s, e in ((seed, number), (seed, number + 1), (seed + 1, number))
    ]
    assert orders[0] != orders[1] != orders[2] != orders[0]


@common
@given(SPLITS, BATCHES)
def test_without_a_seed_the_stored_order_is_kept(split: Split, batch: int) -> None:
    assert delivered(EpochPlan(split, batch, seed=None, num_lanes=1)) == list(range(split.num_rows))
    assert delivered(EpochPlan(split, batch, seed=None, epoch=5, num_lanes=1)) == list(range(split.num_rows))


@common
@given(SPLITS, BATCHES, LANES)
def test_without_a_seed_every_lane_keeps_the_stored_order(split: Split, batch: int, lanes: int) -> None:
    plan = EpochPlan(split, batch, seed=None, num_lanes=lanes)
    full_steps = split.num_rows // batch
    samples = [plan.step(index).samples for index in range(full_steps)]
    # axes: step, lane, place within the lane's piece -> lane, step, place
    pieces = np.array(samples, np.int64).reshape(full_steps, plan.num_lanes, batch // plan.num_lanes)
    sequence = pieces.transpose(1, 0, 2).reshape(-1)
    assert sequence.tolist() == list(range(full_steps * batch))


@pytest.mark.parametrize(
    "batch, limit, lanes",
    [(64, 64, 64), (256, 64, 64), (48, 64, 48), (100, 64, 50), (96, 7, 6), (61, 64, 61), (127, 64, 1), (8, 1, 1)],
)
def test_lanes_are_as_many_as_divide_the_batch(batch: int, limit: int, lanes: int) -> None:
    assert EpochPlan(made_split([1000]), batch, seed=0, num_lanes=limit).num_lanes == lanes


def test_a_split_without_samples_has_no_steps() -> None:
    for split in (made_split(), made_split([]), made_split([0, 0])):
        plan = EpochPlan(split, 8, seed=0)
        assert (plan.num_steps, plan.num_padded, plan.num_dropped) == (0, 0, 0)


def test_a_batch_larger_than_the_split_is_padded_with_its_samples() -> None:
    plan = EpochPlan(made_split([3, 0, 2]), 16, seed=1)
    (step,) = epoch(plan)
    assert (step.num_valid, plan.num_padded) == (5, 11)
    assert set(step.samples.tolist()) == set(range(5))
    assert [plan.step(0, rank, 4).num_valid for rank in range(4)] == [5] * 4


@common
@given(
    st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=12), min_size=1, max_size=6).map(
        lambda s: made_split(*s)
    ),
    BATCHES,
    LANES,
    st.integers(0, 99),
    st.data(),
)
def test_a_row_group_is_read_by_one_rank_but_for_the_seams(
    split: Split, batch: int, lanes: int, seed: int, data: st.DataObject
) -> None:
    assume(split.num_rows >= batch)
    plan = EpochPlan(split, batch, seed=seed, num_lanes=lanes)
    size = data.draw(st.sampled_from(divisors(plan.num_lanes)))
    full_steps = split.num_rows // batch
    reads = {
        (rank, int(g)) for rank in range(size) for step in epoch(plan, rank, size)[:full_steps] for g in step.groups
    }
    groups = {group for _, group in reads}
    # The lanes of a rank lie behind each other: two neighbours share at most one row group.
    assert len(reads) <= len(groups) + size - 1
    # The last batch, where it is not full, is one stretch (and wraps around once): its row groups are dealt anew.
    tail = {
        (rank, int(g)) for rank in range(size) for step in epoch(plan, rank, size)[full_steps:] for g in step.groups
    }
    assert len(tail) <= len({group for _, group in tail}) + 2 * (size - 1) + 1


def test_a_large_epoch_reads_hardly_any_row_group_twice() -> None:
    # 100,000 samples in row groups of 50, on 8 ranks: 2,000 row groups, at most 2,000 + 7 + those of the last batch.
    plan = EpochPlan(made_split(*[[50] * 100] * 20), 512, seed=0)
    reads = [{int(g) for step in epoch(plan, rank, 8) for g in step.groups} for rank in range(8)]
    assert sum(map(len, reads)) <= 1.02 * 2000


def distinct_classes(labels: Any, plan: EpochPlan) -> float:
    """Returns how many classes 256 consecutive samples show, on average."""
    order = labels[delivered(plan)]
    windows = order[: len(order) // 256 * 256].reshape(-1, 256)
    return float(np.mean([len(np.unique(window)) for window in windows]))


def test_shuffling_mixes_classes() -> None:
    # 100 classes of 500 samples; an ideal shuffle shows 92.4 of them in 256 consecutive samples.
    split, rng = made_split(*[[50] * 100] * 10), np.random.default_rng(0)
    labels = np.repeat(np.arange(100), 500)
    plan = EpochPlan(split, 256, seed=0)
    # As prepare stores them, shuffled as a whole:
    assert distinct_classes(rng.permutation(labels), plan) > 91
    # Sorted by class, as no shard of ours is, 64 lanes show about half (measured: 50); unshuffled rows show 6.
    assert distinct_classes(labels, plan) > 44
    assert distinct_classes(labels, EpochPlan(split, 256, seed=None, num_lanes=1)) < 7


def test_every_place_in_the_epoch_is_as_likely_for_every_sample() -> None:
    # 64 samples over 400 epochs: the mean place of a sample is 31.5, its standard error 0.92.
    split = made_split([16, 16], [16, 16])
    places = np.zeros((400, 64))
    for number in range(400):
        places[number, delivered(EpochPlan(split, 8, seed=0, epoch=number))] = np.arange(64)
    assert np.abs(places.mean(axis=0) - 31.5).max() < 4.5 * 0.92
    # Each epoch is a permutation of its own.
    assert len({tuple(row) for row in places}) == 400
