"""The order of an epoch: every sample once, equal steps, one order for any number of ranks, a function of integers alone.

Hypothesis tries 100 cases of the promises that everything rests on, 1,000 in CI, or as many as one says; 10,000 take some minutes:

    CVDIST_EXAMPLES=10000 python -m pytest tests/unit/test_plan.py -k any_number_of_ranks --hypothesis-show-statistics
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import os
import time
import tracemalloc
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from cvdist.plan import EpochPlan, Ints, Step, lanes_within, shared_lanes
from cvdist.shards import Split
from tests.made_splits import made_split

EXAMPLES = int(os.environ.get("CVDIST_EXAMPLES", "1000" if os.environ.get("CI") else "100"))
thorough = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.too_slow])
common = settings(max_examples=80, deadline=None)

# Shards of row groups, some of them empty or tiny.
SPLITS = st.lists(st.lists(st.integers(0, 40), max_size=8), min_size=1, max_size=5).map(
    lambda shards: made_split(*shards)
)
FULL_SPLITS = st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=12), min_size=1, max_size=6).map(
    lambda shards: made_split(*shards)
)
SEEDS = st.none() | st.integers(0, 2**64 - 1)
BATCHES = st.integers(1, 72)
LANES = st.integers(1, 160)
EPOCHS = st.integers(0, 1000)
SIZES = st.integers(1, 64)
ARRAYS = ("groups", "rows", "samples", "draws", "weights")


@dataclasses.dataclass(frozen=True)
class Case:
    """An epoch to plan, and by how many ranks."""

    split: Split
    batch: int
    lanes: int
    seed: int | None
    epoch: int
    remainder: Literal["pad", "drop"]
    counts: tuple[int, ...] | None
    size: int

    def plan(self) -> EpochPlan:
        """Plans it, as each rank of a run does for itself."""
        return EpochPlan(
            self.split,
            self.batch,
            seed=self.seed,
            epoch=self.epoch,
            num_lanes=self.lanes,
            remainder=self.remainder,
            counts=None if self.counts is None else np.array(self.counts, np.int64),
        )


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Any epoch on 1 to 64 ranks, some of them with a batch that does not divide over the ranks."""
    split, size = draw(SPLITS), draw(SIZES)
    batch = draw(st.integers(1, 8)) * size if draw(st.booleans()) else draw(st.integers(1, 200))
    numbers = st.lists(st.integers(0, 3), min_size=split.num_rows, max_size=split.num_rows).map(tuple)
    return Case(
        split,
        batch,
        draw(LANES),
        draw(SEEDS),
        draw(EPOCHS),
        draw(st.sampled_from(["pad", "drop"])),
        draw(st.none() | numbers),
        size,
    )


def divisors(number: int) -> list[int]:
    """Returns the numbers of ranks that a global batch divides over."""
    return [size for size in range(1, number + 1) if number % size == 0]


def steps_of(plan: EpochPlan, rank: int = 0, size: int = 1) -> list[Step]:
    """Returns all steps of one rank."""
    return [plan.step(index, rank, size) for index in range(plan.num_steps)]


def delivered(plan: EpochPlan) -> list[int]:
    """Returns the samples of weight one, in order."""
    return [int(sample) for step in steps_of(plan) for sample in step.samples[step.weights == 1]]


def same(one: Step, other: Step) -> bool:
    """Says whether two steps are equal in every number."""
    return one.num_valid == other.num_valid and all(
        np.array_equal(getattr(one, name), getattr(other, name)) for name in ARRAYS
    )


@pytest.mark.timeout(3600)
@thorough
@given(cases(), st.randoms(use_true_random=False))
def test_an_epoch_is_exact_on_any_number_of_ranks(case: Case, random: Any) -> None:
    """All promises of an order at once, for every kind of split, batch, seed, lanes, remainder, counts and 1 to 64 ranks."""
    plan, split, batch = case.plan(), case.split, case.batch
    whole = steps_of(plan)
    expected = np.repeat(np.arange(split.num_rows), case.counts if case.counts is not None else 1)

    # Every sample as often as it should be; what is missing or too much is counted.
    assert plan.num_samples == len(expected)
    assert plan.num_steps == (len(expected) // batch if case.remainder == "drop" else -(-len(expected) // batch))
    samples = np.sort(delivered(plan)).astype(int)
    if case.remainder == "pad":
        assert np.array_equal(samples, expected)
        assert plan.num_padded == plan.num_steps * batch - len(expected)
    else:
        assert len(samples) == plan.num_steps * batch
        assert np.array_equal(np.sort(np.concatenate([samples, plan.dropped()])), expected)
        assert plan.num_padded == 0
    assert len(plan.dropped()) == plan.num_dropped == len(expected) - len(samples)
    # What the ledger of an epoch is compared with follows from the split alone.
    middle = split.num_rows // 3
    occurrences = [plan.occurrences(0, middle), plan.occurrences(middle, split.num_rows)]
    assert np.array_equal(np.concatenate([np.repeat(*part) for part in occurrences]), expected)
    assert max(plan.num_padded, plan.num_dropped) < batch

    # Rows are there, and are those of the samples; all that is random of a repeated sample is another each time.
    group_rows = np.array([rows for shard in split.shards for rows in shard.row_group_rows], int)
    first = np.cumsum(group_rows) - group_rows
    draws: set[int] = set()
    for index, step in enumerate(whole):
        assert len(step.weights) == batch
        assert set(step.weights.tolist()) <= {0.0, 1.0}
        assert step.num_valid == int(step.weights.sum()) > 0
        assert step.num_valid == batch or index == plan.num_steps - 1
        assert (step.rows >= 0).all()
        assert (step.rows < group_rows[step.groups]).all()
        assert np.array_equal(first[step.groups] + step.rows, step.samples)
        assert np.array_equal(step.draws % split.num_rows, step.samples)
        repeats = step.draws // split.num_rows
        assert (repeats < (1 if case.counts is None else np.array(case.counts)[step.samples])).all()
        draws.update(step.draws[step.weights == 1].tolist())
    assert len(draws) == len(samples)

    # Equal steps on every rank; side by side they are the global batch, whatever the number of ranks.
    for size in {case.size, random.choice(divisors(batch))}:
        ranks = [steps_of(case.plan() if rank == size - 1 else plan, rank, size) for rank in range(size)]
        assert {len(steps) for steps in ranks} <= {len(whole)}
        for index, step in enumerate(whole):
            parts = [steps[index] for steps in ranks]
            assert all(
                np.array_equal(np.concatenate([getattr(part, name) for part in parts]), getattr(step, name))
                for name in ARRAYS
            )
            assert {part.num_valid for part in parts} == {step.num_valid}
            assert {len(part.samples) for part in parts} <= {batch // size, -(-batch // size)}

    # A run that goes on at any step goes on with the same samples: a step is a function of its number alone.
    fresh = case.plan()
    order = random.sample(range(plan.num_steps), min(20, plan.num_steps)) * 2
    assert all(same(fresh.step(index), whole[index]) for index in order)


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
def test_a_single_lane_without_a_seed_is_the_stored_order(split: Split, batch: int) -> None:
    assert delivered(EpochPlan(split, batch, seed=None, num_lanes=1)) == list(range(split.num_rows))
    assert delivered(EpochPlan(split, batch, seed=None, epoch=5, num_lanes=1)) == list(range(split.num_rows))
    kept = split.num_rows // batch * batch
    assert delivered(EpochPlan(split, batch, seed=None, num_lanes=1, remainder="drop")) == list(range(kept))


def written_out(num_samples: int, batch: int, lanes: int) -> list[list[int]]:
    """Returns the places of all steps, in the words of decision 0008: lanes are lists, and steps take from their ends."""
    full_steps, num_longer = divmod(num_samples, batch)
    sequence = collections.deque(range(num_samples))
    # Of each position: its lanes. Of each lane: its places, and whether it is read backwards.
    owned: list[list[tuple[collections.deque[int], bool]]] = [[] for _ in range(batch)]
    if lanes >= batch:
        owner_of = [lane * batch // lanes for lane in range(lanes)]
        for lane, owner in enumerate(owner_of):
            share, turn = full_steps + (owner < num_longer), owner_of[:lane].count(owner)
            length = len(range(turn, share, owner_of.count(owner)))
            owned[owner].append((collections.deque(sequence.popleft() for _ in range(length)), lane % 2 == 1))
    else:
        starts = [*shared_lanes(batch, lanes).tolist(), batch]
        for lane, (start, end) in enumerate(itertools.pairwise(starts)):
            length = sum(full_steps + (position < num_longer) for position in range(start, end))
            shared = (collections.deque(sequence.popleft() for _ in range(length)), lane % 2 == 1)
            for position in range(start, end):
                owned[position].append(shared)
    assert not sequence
    steps = []
    for index in range(full_steps + (num_longer > 0)):
        places = []
        for position in range(batch if index < full_steps else num_longer):
            lane_places, is_backward = owned[position][index % len(owned[position])]
            places.append(lane_places.pop() if is_backward else lane_places.popleft())
        steps.append(places)
    assert not any(lane_places for position in owned for lane_places, _ in position)
    return steps


@pytest.mark.timeout(3600)
@thorough
@given(st.integers(0, 600), BATCHES, LANES)
@example(600, 12, 48)
@example(600, 48, 12)
@example(601, 7, 20)
def test_lanes_are_read_side_by_side_in_opposite_directions(num_samples: int, batch: int, lanes: int) -> None:
    plan = EpochPlan(made_split([num_samples]), batch, seed=None, num_lanes=lanes)
    places = [step.samples[step.weights == 1].tolist() for step in steps_of(plan)]
    assert places == written_out(num_samples, batch, lanes)


@common
@given(st.integers(1, 600), BATCHES, LANES, SEEDS)
def test_padding_stands_at_the_end_and_repeats_what_its_rank_has_read(
    num_samples: int, batch: int, lanes: int, seed: int | None
) -> None:
    *_, before_last, last = [None, *steps_of(EpochPlan(made_split([num_samples]), batch, seed=seed, num_lanes=lanes))]
    assert last is not None
    assert last.weights.tolist() == [1.0] * last.num_valid + [0.0] * (batch - last.num_valid)
    padding = last.samples[last.num_valid :].tolist()
    if before_last is not None:
        assert padding == before_last.samples[last.num_valid :].tolist()
    else:
        assert padding == last.samples[last.num_valid - 1 : last.num_valid].tolist() * len(padding)


@common
@given(st.integers(1, 3000), LANES)
def test_there_are_as_many_lanes_as_were_asked_for(batch: int, lanes: int) -> None:
    assert EpochPlan(made_split([5000]), batch, seed=0, num_lanes=lanes).num_lanes == lanes


@common
@given(st.integers(2, 2000), st.integers(1, 300))
@example(1024, 256)
@example(1000, 256)
def test_lanes_that_positions_share_begin_where_ranks_do(batch: int, lanes: int) -> None:
    assume(lanes < batch)
    starts = shared_lanes(batch, lanes).tolist()
    assert len(starts) == lanes
    assert starts == sorted(set(starts))
    assert starts[0] == 0
    assert starts[-1] < batch
    # All ranks of as many numbers of ranks as there are lanes for.
    ranks_starts: set[int] = set()
    for size in divisors(batch):
        more = ranks_starts | {rank * batch // size for rank in range(size)}
        if len(more) > lanes:
            break
        ranks_starts = more
    assert ranks_starts <= set(starts)
    # The others are spread evenly between.
    widths = np.diff([*starts, batch])
    assert widths.max() <= 1 + batch / max(1, lanes - len(ranks_starts))


def test_a_split_without_samples_has_no_steps() -> None:
    for split in (made_split(), made_split([]), made_split([0, 0])):
        plan = EpochPlan(split, 8, seed=0)
        assert (plan.num_steps, plan.num_padded, plan.num_dropped) == (0, 0, 0)
    plan = EpochPlan(made_split([5]), 8, seed=0, counts=np.zeros(5, np.int64))
    assert (plan.num_steps, plan.num_samples) == (0, 0)


def test_a_batch_larger_than_the_split_is_padded_with_its_samples() -> None:
    plan = EpochPlan(made_split([3, 0, 2]), 16, seed=1)
    (step,) = steps_of(plan)
    assert (step.num_valid, plan.num_padded) == (5, 11)
    assert set(step.samples.tolist()) == set(range(5))
    assert [plan.step(0, rank, 4).num_valid for rank in range(4)] == [5] * 4


def test_a_step_that_the_epoch_does_not_have_is_refused() -> None:
    plan = EpochPlan(made_split([20]), 8, seed=1)
    for index in (-1, 3):
        with pytest.raises(IndexError, match=f"step {index} of an epoch of 3 steps; expected 0 to 2"):
            plan.step(index)


def rank_reads(plan: EpochPlan, rank: int, size: int) -> collections.Counter[int]:
    """Returns how often a rank reads each row group, when it keeps one until it was not used for four rounds of its lanes."""
    patience = 4 * -(-plan.num_lanes // plan.global_batch)
    reads: collections.Counter[int] = collections.Counter()
    last: dict[int, int] = {}
    for index, step in enumerate(steps_of(plan, rank, size)):
        for group in set(step.groups.tolist()):
            reads[group] += index - last.get(group, -patience - 1) > patience
            last[group] = index
    return reads


def all_reads(plan: EpochPlan, size: int) -> collections.Counter[int]:
    """Returns how often each row group is read by all ranks together."""
    return sum((rank_reads(plan, rank, size) for rank in range(size)), collections.Counter())


@pytest.mark.timeout(3600)
@thorough
@given(FULL_SPLITS, st.integers(1, 8), SIZES, LANES, SEEDS, st.sampled_from(["pad", "drop"]))
def test_a_row_group_is_read_once_but_where_two_ranks_meet(
    split: Split, per_rank: int, size: int, lanes: int, seed: int | None, remainder: Literal["pad", "drop"]
) -> None:
    batch = per_rank * size
    plan = EpochPlan(split, batch, seed=seed, num_lanes=lanes, remainder=remainder)
    if lanes < batch:
        assume(set(range(0, batch, per_rank)) <= set(shared_lanes(batch, lanes).tolist()))
    reads = all_reads(plan, size)
    assert reads.total() <= len(reads) + size - 1


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7, 8, 12, 16, 24, 25, 32, 40, 48, 50, 60, 64])
@pytest.mark.parametrize("lanes", [256, 2048])
def test_ten_row_groups_for_each_rank_cost_a_tenth_more_bytes_at_most(size: int, lanes: int) -> None:
    for per_rank in {1, 3, 4, 16, 20, 24, -(-256 // size), 1024 // size}:
        for num_groups in (10 * size, 10 * size + 3):
            plan = EpochPlan(made_split([16] * num_groups), per_rank * size, seed=0, num_lanes=lanes)
            assert all_reads(plan, size).total() <= 1.1 * num_groups


def test_a_large_epoch_reads_hardly_any_row_group_twice() -> None:
    # 100,000 samples in row groups of 50, on 8 ranks: 2,000 row groups, at most 2,000 + 7.
    plan = EpochPlan(made_split(*[[50] * 100] * 20), 512, seed=0)
    assert all_reads(plan, 8).total() <= 2007


@pytest.mark.parametrize("batch", [32, 64, 100, 256, 1024])
def test_no_more_row_groups_are_open_than_there_are_lanes(batch: int) -> None:
    # 16 rows each: a position that takes four places a step may be in two row groups then.
    plan = EpochPlan(made_split(*[[16] * 125] * 30), batch, seed=0, num_lanes=256)
    uses: dict[int, list[int]] = {}
    for index, step in enumerate(steps_of(plan)):
        for group in step.groups.tolist():
            uses.setdefault(group, []).append(index)
    is_open = np.zeros(plan.num_steps + 1, int)
    for steps in uses.values():
        is_open[steps[0]] += 1
        is_open[steps[-1] + 1] -= 1
    assert np.cumsum(is_open).max() <= (256 if batch <= 256 else 512)


CLASS_SORTED = np.repeat(np.arange(100), 1300)


def distinct_classes(labels: Any, plan: EpochPlan, num_samples: int = 256) -> float:
    """Returns how many classes `num_samples` consecutive samples show, on average."""
    order = labels[delivered(plan)]
    windows = order[: len(order) // num_samples * num_samples].reshape(-1, num_samples)
    return float(np.mean([len(np.unique(window)) for window in windows]))


@pytest.mark.parametrize("batch", [32, 64, 96, 129, 200, 256, 1000, 1018, 1024])
def test_class_sorted_shards_are_mixed_almost_as_well_as_by_an_ideal_shuffle(batch: int) -> None:
    # 100 classes of 1,300 samples, all rows of a class behind each other; an ideal shuffle shows 92.4 of them in 256 samples.
    split = made_split(*[[16] * 125] * 65)
    plan = EpochPlan(split, batch, seed=0, num_lanes=max(256, batch))
    assert distinct_classes(CLASS_SORTED, plan) >= 0.9 * 92.4
    # The lanes are what does it: one shows few, and unshuffled rows show one or two.
    assert distinct_classes(CLASS_SORTED, EpochPlan(split, batch, seed=0, num_lanes=1)) < 25
    assert distinct_classes(CLASS_SORTED, EpochPlan(split, batch, seed=None, num_lanes=1)) < 2


@pytest.mark.parametrize("batch", [1000, 1018, 1024])
def test_a_batch_that_shares_256_lanes_is_as_a_whole_almost_ideally_mixed(batch: int) -> None:
    # Four positions share a lane, so that 256 neighbours show the classes of 64 lanes; the batch shows 90 of 100.
    plan = EpochPlan(made_split(*[[16] * 125] * 65), batch, seed=0, num_lanes=256)
    assert distinct_classes(CLASS_SORTED, plan, batch) >= 90


def test_shuffling_mixes_shards_as_they_are_prepared() -> None:
    split, rng = made_split(*[[50] * 100] * 10), np.random.default_rng(0)
    labels = rng.permutation(np.repeat(np.arange(100), 500))
    assert distinct_classes(labels, EpochPlan(split, 256, seed=0)) > 91


def test_every_place_in_the_epoch_is_as_likely_for_every_sample() -> None:
    # 64 samples over 400 epochs: the mean place of a sample is 31.5, its standard error 0.92.
    split = made_split([16, 16], [16, 16])
    for lanes in (8, 5, 32):
        places = np.zeros((400, 64))
        for number in range(400):
            places[number, delivered(EpochPlan(split, 8, seed=0, epoch=number, num_lanes=lanes))] = np.arange(64)
        assert np.abs(places.mean(axis=0) - 31.5).max() < 4.5 * 0.92
        # Each epoch is a permutation of its own.
        assert len({tuple(row) for row in places}) == 400


def test_rows_are_shuffled_in_their_row_group_and_each_row_group_on_its_own() -> None:
    plan = EpochPlan(made_split([40, 40, 40]), 1, seed=3, num_lanes=1)
    samples = np.array(delivered(plan)).reshape(3, 40)
    orders = {tuple(row % 40) for row in samples}
    assert [len(set(row // 40)) for row in samples] == [1, 1, 1]
    assert len(orders) == 3
    assert tuple(range(40)) not in orders


def test_row_groups_without_counts_are_never_read() -> None:
    counts = np.repeat(np.array([0, 2, 0, 1, 0], np.int64), 20)
    plan = EpochPlan(made_split([20, 20], [20, 20, 20]), 16, seed=1, counts=counts)
    groups = np.concatenate([step.groups for step in steps_of(plan)])
    assert set(groups.tolist()) == {1, 3}
    assert plan.num_samples == 60


@pytest.mark.parametrize("counts", [[1, 1], [1, 1, 1, 1], [1, -1, 1], [[1, 1, 1]]])
def test_counts_that_do_not_fit_the_split_are_refused(counts: list[Any]) -> None:
    with pytest.raises(ValueError, match="expected one number for each of 3 samples, 0 or more"):
        EpochPlan(made_split([2, 1]), 4, seed=0, counts=np.array(counts, np.int64))


def test_lanes_are_limited_by_the_bytes_of_open_row_groups() -> None:
    split = made_split([50] * 10)  # 5,000 bytes each
    assert lanes_within(split, 256, 256 * 5000) == 256
    assert lanes_within(split, 256, 256 * 5000 - 1) == 255
    assert lanes_within(split, 256, 64 * 5000) == 64
    assert lanes_within(split, 16, 64 * 5000) == 16
    assert lanes_within(split, 256, 10) == 1
    assert lanes_within(made_split([], [0]), 256, 10) == 256
    # A lane is in a row group of 90 rows nine times as long as in one of 10: open are 8,200 bytes on average.
    assert lanes_within(made_split([90, 10, 0]), 256, 8200 * 20) == 20


def test_a_plan_holds_nothing_for_each_sample() -> None:
    split = made_split(*[[4000] * 100] * 50)  # 20 million samples
    tracemalloc.start()
    plan = EpochPlan(split, 64, seed=0, num_lanes=64)
    for index in range(20):
        plan.step(index)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 8_000_000


def test_a_million_row_groups_cost_a_moment() -> None:
    # Measured: 0.1 s for the plan and 0.7 us a sample on one core; ten times that for slower machines.
    split = made_split(*[[16] * 1000] * 1000)
    started_s = time.thread_time()
    plan = EpochPlan(split, 64, seed=0)
    assert time.thread_time() - started_s < 1
    started_s = time.thread_time()
    for index in range(400):
        plan.step(index)
    assert time.thread_time() - started_s < 400 * 64 * 7e-6


def arrays(step: Step) -> list[Ints]:
    """Returns the integers of a step."""
    return [step.groups, step.rows, step.samples, step.draws]


@pytest.mark.parametrize("counts", [None, np.full(100, 2, np.int64)])
@pytest.mark.parametrize("seed", [None, 5])
def test_steps_are_of_64_bit_integers_and_32_bit_weights(counts: Ints | None, seed: int | None) -> None:
    for step in steps_of(EpochPlan(made_split([60, 40]), 32, seed=seed, counts=counts)):
        assert {array.dtype for array in arrays(step)} == {np.dtype(np.int64)}
        assert step.weights.dtype == np.float32
