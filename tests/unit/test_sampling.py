"""How often samples occur in an epoch: bagging, weights, balanced classes; the same on every rank, and as the formulas say."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cvdist import sampling
from cvdist.errors import DataError
from cvdist.plan import EpochPlan
from tests.made_splits import made_split

common = settings(max_examples=100, deadline=None)
SEEDS = st.integers(0, 2**64 - 1)
WEIGHTS = st.lists(st.one_of(st.just(0.0), st.floats(1e-6, 1e6), st.just(1.0)), min_size=1, max_size=60).filter(any)


@common
@given(st.integers(0, 500), SEEDS, st.integers(0, 100))
def test_a_bootstrap_draws_as_many_samples_as_there_are(num_samples: int, seed: int, member: int) -> None:
    counts = sampling.bootstrap(num_samples, seed, member)
    assert counts.dtype == np.int64
    assert counts.shape == (num_samples,)
    assert counts.sum() == num_samples


def test_a_bootstrap_leaves_a_share_of_one_over_e_out_and_members_differ() -> None:
    members = [sampling.bootstrap(100_000, 1, member) for member in range(3)]
    for counts in members:
        # Poisson(1) but for the fixed sum: 36.8 % zero, 36.8 % one, 18.4 % two; standard error 0.15 %.
        for number, share in ((0, 0.3679), (1, 0.3679), (2, 0.1839)):
            assert abs(np.mean(counts == number) - share) < 0.006
    assert not np.array_equal(members[0], members[1])
    assert abs(np.corrcoef(members[0], members[1])[0, 1]) < 0.02


@common
@given(WEIGHTS, st.integers(0, 2000), SEEDS, st.integers(0, 100))
def test_a_weighted_count_is_its_expectation_rounded_up_or_down(
    weights: list[float], num_draws: int, seed: int, epoch: int
) -> None:
    counts = sampling.weighted(np.array(weights), num_draws, seed, epoch)
    expected = np.array(weights) / sum(weights) * num_draws
    assert counts.dtype == np.int64
    assert counts.sum() == num_draws
    assert (counts >= np.floor(expected - 1e-9 * (1 + expected))).all()
    assert (counts <= np.ceil(expected + 1e-9 * (1 + expected))).all()
    assert not counts[np.array(weights) == 0].any()


def test_the_mean_of_weighted_counts_is_in_proportion_to_the_weights() -> None:
    weights = np.array([0.0, 1.0, 2.0, 3.5, 0.1, 7.0, 1.0])
    counts = np.array([sampling.weighted(weights, 10, 3, epoch) for epoch in range(4000)])
    expected = weights / weights.sum() * 10
    # Each count is one of two neighbours: a standard error of at most 0.5 / sqrt(4000) = 0.008.
    assert np.abs(counts.mean(axis=0) - expected).max() < 0.035


def test_equal_weights_of_a_whole_epoch_give_every_sample_once() -> None:
    for num_samples in (1, 3, 7, 49, 1000, 99_991):
        counts = sampling.weighted(np.full(num_samples, 0.1), num_samples, 0, 0)
        assert (counts == 1).all()


def test_which_samples_are_rounded_up_together_differs_from_epoch_to_epoch() -> None:
    # Half as many draws as samples: without a random order it would always be the even samples or the odd ones.
    drawn = {tuple(sampling.weighted(np.ones(40), 20, 0, epoch).tolist()) for epoch in range(50)}
    assert len(drawn) == 50


@pytest.mark.parametrize(
    "weights, found",
    [
        ([1, -0.5, 1], "sample 1 has weight -0.5"),
        ([1, 1, np.nan], "sample 2 has weight nan"),
        ([np.inf, 1], "sample 0 has weight inf"),
        ([0, 0], "no sample has a weight above 0"),
        ([], "no sample has a weight above 0"),
    ],
)
def test_weights_that_say_nothing_are_refused(weights: list[float], found: str) -> None:
    with pytest.raises(DataError, match=f"{found}; expected numbers of 0 or more, some above; correct the weights"):
        sampling.weighted(np.array(weights), 10, 0, 0)


@common
@given(st.lists(st.integers(1, 30), min_size=1, max_size=8), st.integers(0, 400), SEEDS, st.integers(0, 9), st.data())
def test_classes_and_their_samples_occur_equally_often(
    class_rows: list[int], num_draws: int, seed: int, epoch: int, data: st.DataObject
) -> None:
    labels = np.array(data.draw(st.permutations(np.repeat(np.arange(len(class_rows)), class_rows).tolist())))
    counts = sampling.class_balanced(labels, len(class_rows), num_draws, seed, epoch)
    assert counts.dtype == np.int64
    assert counts.sum() == num_draws
    by_class = [counts[labels == label] for label in range(len(class_rows))]
    totals = [int(numbers.sum()) for numbers in by_class]
    assert max(totals) - min(totals) <= 1
    assert all(numbers.max() - numbers.min() <= 1 for numbers in by_class)


def test_balanced_classes_give_every_sample_of_a_class_the_same_chance() -> None:
    labels = np.repeat([0, 1, 2], [2, 10, 50])
    counts = np.array([sampling.class_balanced(labels, 3, 61, 5, epoch) for epoch in range(4000)])
    # A third of 61 draws for each class, divided over its samples; a standard error of at most 0.5 / sqrt(4000) = 0.008.
    expected = np.repeat([61 / 3 / 2, 61 / 3 / 10, 61 / 3 / 50], [2, 10, 50])
    assert np.abs(counts.mean(axis=0) - expected).max() < 0.035


@pytest.mark.parametrize(
    "labels, message",
    [
        ([0, 2, 2], "class 1 has no samples; expected some of each of 3 classes"),
        ([], "class 0 has no samples"),
        ([0, 1, 2, 3], "labels from 0 to 3; expected 0 to 2"),
        ([-1, 0, 1, 2], "labels from -1 to 2; expected 0 to 2"),
    ],
)
def test_classes_that_cannot_be_balanced_are_refused(labels: list[int], message: str) -> None:
    with pytest.raises(DataError, match=message):
        sampling.class_balanced(np.array(labels, np.int64), 3, 10, 0, 0)


LABELS = np.arange(300) % 7
DRAWN: dict[str, Any] = {
    "bootstrap": lambda seed, epoch: sampling.bootstrap(300, seed, epoch),
    "weighted": lambda seed, epoch: sampling.weighted(1.0 + np.arange(300), 450, seed, epoch),
    "class_balanced": lambda seed, epoch: sampling.class_balanced(LABELS, 7, 450, seed, epoch),
}


@pytest.mark.parametrize("name", DRAWN)
def test_counts_follow_from_seed_and_epoch_alone(name: str) -> None:
    draw = DRAWN[name]
    first = draw(4, 2)
    assert np.array_equal(first, draw(4, 2))
    assert not np.array_equal(first, draw(4, 3))
    assert not np.array_equal(first, draw(5, 2))


@pytest.mark.parametrize("name", DRAWN)
def test_an_epoch_reads_each_sample_as_often_as_it_was_drawn(name: str) -> None:
    counts = DRAWN[name](4, 2)
    plan = EpochPlan(made_split([50, 50, 0, 50], [100, 50]), 24, seed=4, epoch=2, counts=counts)
    steps = [plan.step(index, rank, 3) for index in range(plan.num_steps) for rank in range(3)]
    samples = np.concatenate([step.samples[step.weights == 1] for step in steps])
    assert np.array_equal(np.bincount(samples, minlength=300), counts)


def test_streams_of_random_numbers_are_independent() -> None:
    streams = [sampling.generator(0, 0, stream).random(1000) for stream in (sampling.GROUPS, sampling.ROWS)]
    streams += [sampling.generator(*key, sampling.GROUPS).random(1000) for key in ((1, 0), (0, 1), (2**32, 0))]
    correlations = np.corrcoef(streams) - np.eye(len(streams))
    assert np.abs(correlations).max() < 0.15
