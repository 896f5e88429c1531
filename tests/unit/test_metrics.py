"""Sums of an evaluation are exact, on any number of ranks; broken outputs are never right."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, confusion_matrix, log_loss, top_k_accuracy_score

from cvdist import metrics
from cvdist.errors import DataError
from cvdist.metrics import Meter, Sums, batch_sums


def a_batch(n: int, num_logits: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Returns labels (n,) and float32 logits (n, num_logits), right more often than chance."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, max(2, num_logits), n)
    logits = rng.normal(0, 2, (n, num_logits)).astype(np.float32)
    if num_logits > 1:
        logits[np.arange(n), labels] += 1.5
    return labels, logits


def softmax(logits: np.ndarray) -> np.ndarray:
    """Returns probabilities, float64."""
    exponentials = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    return exponentials / exponentials.sum(axis=1, keepdims=True)


def test_sums_agree_with_scikit_learn() -> None:
    labels, logits = a_batch(500, 12)
    sums = batch_sums(labels, np.ones(500), logits)
    result, classes = sums.result(), np.arange(12)
    assert result["samples"] == 500
    assert result["top1"] == accuracy_score(labels, logits.argmax(axis=1))
    assert result["top5"] == top_k_accuracy_score(labels, logits, k=5, labels=classes)
    assert result["loss"] == pytest.approx(log_loss(labels, softmax(logits), labels=classes), rel=1e-12)
    np.testing.assert_array_equal(sums.confusion, confusion_matrix(labels, logits.argmax(axis=1), labels=classes))
    assert 0.1 < result["top1"] < result["top5"] < 1


def test_one_logit_agrees_with_scikit_learn_too() -> None:
    labels, logits = a_batch(300, 1)
    sums = batch_sums(labels, np.ones(300), logits)
    result, predictions = sums.result(), (logits[:, 0] > 0).astype(int)
    probabilities = 1 / (1 + np.exp(-logits[:, 0].astype(np.float64)))
    assert result["top1"] == accuracy_score(labels, predictions)
    assert result["top5"] == 1.0
    assert result["loss"] == pytest.approx(log_loss(labels, probabilities), rel=1e-12)
    np.testing.assert_array_equal(sums.confusion, confusion_matrix(labels, predictions))


def test_large_logits_neither_overflow_nor_vanish() -> None:
    logits = np.array([[3e38, -3e38], [0, 1000]], np.float32)
    assert batch_sums(np.array([0, 0]), np.ones(2), logits).loss_sum == pytest.approx(1000)
    assert batch_sums(np.array([0, 1]), np.ones(2), np.array([[1000], [1000]])).loss_sum == pytest.approx(1000)


def test_padding_counts_for_nothing_whatever_it_holds() -> None:
    labels, logits = a_batch(10, 4)
    weights = np.array([1, 0] * 5)
    labels[1], logits[3] = -1, np.nan
    expected = batch_sums(labels[::2], np.ones(5), logits[::2]).to_vector()
    np.testing.assert_array_equal(batch_sums(labels, weights, logits).to_vector(), expected)
    assert batch_sums(labels, np.zeros(10), logits).to_vector().sum() == 0


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 60), num_ranks=st.integers(1, 5), num_logits=st.integers(1, 7), seed=st.integers(0, 99))
def test_sums_of_ranks_are_the_sums_of_all(n: int, num_ranks: int, num_logits: int, seed: int) -> None:
    labels, logits = a_batch(n, num_logits, seed)
    whole = batch_sums(labels, np.ones(n), logits)
    parts = [
        batch_sums(labels[rank::num_ranks], np.ones(len(labels[rank::num_ranks])), logits[rank::num_ranks])
        for rank in range(num_ranks)
    ]
    reduced = Sums.from_vector(np.sum([part.to_vector() for part in parts], axis=0))
    added = sum(parts, start=Sums.zeros(max(2, num_logits)))
    for sums in (reduced, added):
        assert (sums.samples, sums.top1, sums.top5) == (whole.samples, whole.top1, whole.top5)
        assert sums.loss_sum == pytest.approx(whole.loss_sum, rel=1e-12)
        np.testing.assert_array_equal(sums.confusion, whole.confusion)
        assert sums.confusion.dtype == np.int64
    assert whole.confusion.sum() == n
    assert np.trace(whole.confusion) == whole.top1


def test_a_vector_and_back_is_the_same() -> None:
    labels, logits = a_batch(20, 6)
    sums = batch_sums(labels, np.ones(20), logits)
    back = Sums.from_vector(sums.to_vector())
    assert sums.to_vector().dtype == np.float64
    assert (back.samples, back.loss_sum, back.top1, back.top5, back.nonfinite) == (
        sums.samples,
        sums.loss_sum,
        sums.top1,
        sums.top5,
        sums.nonfinite,
    )
    np.testing.assert_array_equal(back.confusion, sums.confusion)


def test_constant_outputs_are_right_about_one_class_only() -> None:
    labels = np.arange(20)
    sums = batch_sums(labels, np.ones(20), np.full((20, 20), 0.7, np.float32))
    assert (sums.top1, sums.top5) == (1, 5)
    assert batch_sums(np.array([0, 1]), np.ones(2), np.zeros((2, 1))).top1 == 1


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("num_logits", [1, 8])
def test_outputs_that_are_not_finite_are_wrong_and_show(bad: float, num_logits: int) -> None:
    logits = np.full((3, num_logits), 0.5, np.float32)
    logits[0] = bad
    logits[1, 0] = bad
    sums = batch_sums(np.array([0, 0, 0]), np.ones(3), logits)
    assert sums.samples == 3
    assert sums.nonfinite == 2
    assert sums.confusion.sum() == 1
    assert sums.top1 == (1 if num_logits > 1 else 0)
    assert sums.top5 == 1
    assert math.isnan(sums.result()["loss"])
    assert Sums.from_vector(sums.to_vector()).nonfinite == 2


def test_five_classes_or_fewer_are_always_in_the_top_five() -> None:
    labels, logits = a_batch(50, 5)
    assert batch_sums(labels, np.ones(50), logits).result()["top5"] == 1.0


def test_a_label_that_the_model_does_not_know_is_an_error() -> None:
    for label in (-1, 4):
        with pytest.raises(DataError, match=f"label {label} is not a class of the model; expected 0 to 3"):
            batch_sums(np.array([0, label]), np.ones(2), np.zeros((2, 4)))


def test_weights_other_than_zero_and_one_are_refused() -> None:
    with pytest.raises(ValueError, match="expected 0 or 1"):
        batch_sums(np.array([0]), np.array([0.5]), np.zeros((1, 4)))


def test_no_samples_have_no_result() -> None:
    with pytest.raises(DataError, match="0 samples were counted"):
        Sums.zeros(3).result()


def test_very_many_classes_have_no_confusion_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "MAX_CONFUSION_CLASSES", 5)
    labels, logits = a_batch(30, 6)
    sums = Sums.zeros(6) + batch_sums(labels, np.ones(30), logits)
    assert sums.confusion.shape == (0, 0)
    assert len(sums.to_vector()) == 5
    assert Sums.from_vector(sums.to_vector()).result() == sums.result()


class Clock:
    """A clock that goes on only when told to."""

    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def test_the_meter_measures_images_per_second_and_the_wait_for_data() -> None:
    clock = Clock()
    meter = Meter(window_s=10, clock=clock)
    assert meter.images_per_s() == 0
    assert meter.wait_share() == 0
    for _ in range(4):
        with meter.waiting():
            clock.now_s += 0.5
        clock.now_s += 1.5
        meter.update(32)
    assert meter.images_per_s() == 16
    assert meter.wait_share() == 0.25


def test_the_meter_forgets_what_is_older_than_its_window() -> None:
    clock = Clock()
    meter = Meter(window_s=10, clock=clock)
    with meter.waiting():
        clock.now_s += 60  # a slow first step
    meter.update(10)
    for _ in range(12):
        clock.now_s += 1
        meter.update(10)
    assert meter.images_per_s() == 10
    assert meter.wait_share() == 0
    assert len(meter.marks) == 11


def test_steps_longer_than_the_window_are_still_measured() -> None:
    clock = Clock()
    meter = Meter(window_s=1, clock=clock)
    for _ in range(3):
        clock.now_s += 20
        meter.update(40)
    assert meter.images_per_s() == 2


def test_a_restart_leaves_an_evaluation_out() -> None:
    clock = Clock()
    meter = Meter(window_s=1000, clock=clock)
    clock.now_s += 500
    meter.restart()
    clock.now_s += 2
    meter.update(8)
    assert meter.images_per_s() == 4


def test_a_wait_that_fails_is_counted() -> None:
    clock = Clock()
    meter = Meter(clock=clock)

    def fail() -> None:
        with meter.waiting():
            clock.now_s += 3
            raise StopIteration

    with pytest.raises(StopIteration):
        fail()
    assert meter.total_wait_s == 3
