"""How often each sample occurs in an epoch, where that is not once: bagging, weights, balanced classes. Pure.

Each function returns counts, int64 (samples of the split,), for `EpochPlan(counts=...)`. They follow from their arguments alone, so
they are the same on every rank and after a resume.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from cvdist.errors import DataError

Ints = npt.NDArray[np.int64]

# Streams of random numbers of an epoch. A number keeps its meaning for ever: changing one changes every run. Not 0, which
# SeedSequence takes for nothing.
GROUPS, ROWS, BOOTSTRAP, WEIGHTED, BALANCED = range(1, 6)


def bootstrap(num_samples: int, seed: int, member: int) -> Ints:
    """Draws as many samples as there are, each at random among all: what `member` (from 0) of an ensemble trains on.

    Source: Breiman 1996, Bagging Predictors, section 1.
    """
    drawn = generator(seed, member, BOOTSTRAP).integers(max(1, num_samples), size=num_samples)
    return np.bincount(drawn, minlength=num_samples).astype(np.int64)


def weighted(weights: npt.NDArray[np.floating[Any]], num_draws: int, seed: int, epoch: int) -> Ints:
    """Draws `num_draws` samples so that each is expected in proportion to its weight, and its count is that number rounded up or down.

    Systematic sampling of what rounding down leaves, with the samples in random order.
    Source: Madow 1949, On the Theory of Systematic Sampling, II; as resampling: Kitagawa 1996, Monte Carlo Filter and Smoother, appendix.

    Args:
        weights: Floats (samples of the split,), 0 or more.
        num_draws: Samples of the epoch.
        seed: Of the run.
        epoch: Which epoch, from 0.

    Raises:
        DataError: A weight is negative or no number, or none is above 0.
    """
    weights = np.asarray(weights, np.float64)
    bad = np.flatnonzero(~(weights >= 0) | np.isinf(weights))
    if len(bad) or not weights.any():
        found = f"sample {bad[0]} has weight {weights[bad[0]]}" if len(bad) else "no sample has a weight above 0"
        raise DataError(f"{found}; expected numbers of 0 or more, some above; correct the weights of the data set")
    weights = weights / weights.max()
    expected = weights / weights.sum() * num_draws
    counts: Ints = np.floor(expected).astype(np.int64)
    num_left = num_draws - int(counts.sum())
    if not num_left:
        return counts
    random = generator(seed, epoch, WEIGHTED)
    order = random.permutation(np.flatnonzero(expected > counts))
    ends = np.cumsum((expected - counts)[order])
    # One sample for each of `num_left` equal stretches: no sample fills a whole one, so none is hit twice.
    hits = (np.arange(num_left) + random.random()) * (ends[-1] / num_left)
    np.add.at(counts, order[np.minimum(np.searchsorted(ends, hits, side="right"), len(order) - 1)], 1)
    return counts


def class_balanced(labels: Ints, num_classes: int, num_draws: int, seed: int, epoch: int) -> Ints:
    """Draws `num_draws` samples, of each class the same number and of each sample of a class the same number, both but for one.

    Args:
        labels: Ints (samples of the split,), from 0 to num_classes - 1.
        num_classes: Classes of the data set.
        num_draws: Samples of the epoch.
        seed: Of the run.
        epoch: Which epoch, from 0.

    Raises:
        DataError: A class has no samples, or a label is of no class.
    """
    labels = np.asarray(labels, np.int64)
    if len(labels) and not (labels.min() >= 0 and labels.max() < num_classes):
        raise DataError(
            f"labels from {labels.min()} to {labels.max()}; expected 0 to {num_classes - 1}; prepare the data set again"
        )
    class_rows = np.bincount(labels, minlength=num_classes)
    if not class_rows.all():
        raise DataError(
            f"class {int(class_rows.argmin())} has no samples; expected some of each of {num_classes} classes;"
            " leave the class out of the data set, or do not balance classes"
        )
    random = generator(seed, epoch, BALANCED)
    quotas = num_draws // num_classes + (random.permutation(num_classes) < num_draws % num_classes).astype(np.int64)
    order = random.permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]  # class by class, at random inside
    firsts = np.cumsum(class_rows) - class_rows
    turns = np.empty_like(labels)  # of each sample in its class
    turns[order] = np.arange(len(labels)) - firsts[labels[order]]
    shares, num_more = np.divmod(quotas, class_rows)
    return np.asarray(shares[labels] + (turns < num_more[labels]), np.int64)


def generator(seed: int, epoch: int, stream: int) -> np.random.Generator:
    """Returns the generator of one stream of an epoch, or of a member of an ensemble: a function of its arguments alone."""
    return np.random.Generator(np.random.Philox(key=key(seed, epoch, stream)))


def key(seed: int, epoch: int, stream: int) -> npt.NDArray[np.uint64]:
    """Returns the key, uint64 (2,), of the counter-based generator of one stream."""
    return np.asarray(np.random.SeedSequence([seed, epoch, stream]).generate_state(2, np.uint64), np.uint64)
