"""Exact sums of an evaluation, and a meter of throughput. NumPy only."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from cvdist.errors import DataError

if TYPE_CHECKING:
    from numpy.typing import NDArray

NUM_SCALARS = 5
# More classes than this have no confusion matrix: it would be larger than the memory it must share (128 MiB here).
MAX_CONFUSION_CLASSES = 4096


@dataclasses.dataclass(frozen=True)
class Sums:
    """Sums over samples that add up over batches and ranks; divided once, by `result`.

    Attributes:
        samples: Samples counted.
        loss_sum: Sum of their cross-entropies, natural logarithm.
        top1: Samples whose label has the largest logit.
        top5: Samples whose label has one of the five largest logits.
        nonfinite: Samples with a NaN or infinite logit: they are wrong, make the loss NaN, and are not in `confusion`.
        confusion: int64 (K, K), label by prediction; (0, 0) for more than 4,096 classes.
    """

    samples: int
    loss_sum: float
    top1: int
    top5: int
    nonfinite: int
    confusion: NDArray[np.int64]

    @classmethod
    def zeros(cls, num_classes: int) -> Sums:
        """Returns the sums of no sample; `num_classes` is 2 for a single logit."""
        side = num_classes if num_classes <= MAX_CONFUSION_CLASSES else 0
        return cls(0, 0.0, 0, 0, 0, np.zeros((side, side), np.int64))

    def __add__(self, other: Sums) -> Sums:
        """Returns the sums of both sets of samples."""
        return Sums(
            samples=self.samples + other.samples,
            loss_sum=self.loss_sum + other.loss_sum,
            top1=self.top1 + other.top1,
            top5=self.top5 + other.top5,
            nonfinite=self.nonfinite + other.nonfinite,
            confusion=self.confusion + other.confusion,
        )

    def to_vector(self) -> NDArray[np.float64]:
        """Returns everything as one float64 vector, which ranks may sum: counts below 2**53 stay exact."""
        scalars = [self.samples, self.loss_sum, self.top1, self.top5, self.nonfinite]
        return np.concatenate([np.array(scalars, np.float64), self.confusion.ravel().astype(np.float64)])

    @classmethod
    def from_vector(cls, vector: NDArray[np.float64]) -> Sums:
        """Returns the sums that `to_vector`, or a sum of such vectors, holds."""
        samples, loss_sum, top1, top5, nonfinite = vector[:NUM_SCALARS].tolist()
        side = round(float(np.sqrt(len(vector) - NUM_SCALARS)))
        confusion = np.rint(vector[NUM_SCALARS:]).astype(np.int64).reshape(side, side)
        return cls(round(samples), loss_sum, round(top1), round(top5), round(nonfinite), confusion)

    def result(self) -> dict[str, float]:
        """Returns samples, top1 and top5 (fractions) and the mean loss.

        Raises:
            DataError: There is no sample to divide by.
        """
        if self.samples == 0:
            raise DataError(
                "evaluation: 0 samples were counted; expected at least one; choose a split that is not empty"
            )
        return {
            "samples": self.samples,
            "top1": self.top1 / self.samples,
            "top5": self.top5 / self.samples,
            "loss": self.loss_sum / self.samples,
        }


def batch_sums(labels: NDArray[np.integer[Any]], weights: NDArray[Any], logits: NDArray[np.floating[Any]]) -> Sums:
    """Returns the sums of one batch, computed in float64.

    Equal logits are ranked by class index, the lower first, as argmax does: constant outputs are right about one class.

    Args:
        labels: Integers (N,); those of padding are not looked at.
        weights: (N,), 1 for a sample and 0 for padding.
        logits: (N, K), or (N, 1) of a model with one sigmoid output: class 1 where its logit is above zero.

    Raises:
        DataError: A label is not one of the model's classes.
    """
    if not np.isin(weights, (0, 1)).all():
        raise ValueError(f"weights are {np.unique(weights)}; expected 0 or 1: exact sums count a sample or do not")
    counted = np.asarray(weights).astype(bool)
    labels, logits = np.asarray(labels)[counted].astype(np.int64), np.asarray(logits, np.float64)[counted]
    if logits.shape[1] == 1:
        # (N, 1) -> (N, 2): softmax over (0, z) is sigmoid(z), and so is its cross-entropy.
        logits = np.concatenate([np.zeros_like(logits), logits], axis=1)
    num_classes = logits.shape[1]
    wrong = labels[(labels < 0) | (labels >= num_classes)]
    if len(wrong):
        raise DataError(
            f"label {wrong[0]} is not a class of the model; expected 0 to {num_classes - 1};"
            " evaluate on a data set with the classes that the model was trained on"
        )
    finite = np.isfinite(logits).all(axis=1)
    num_counted, num_finite = len(labels), int(finite.sum())
    labels, logits = labels[finite], logits[finite]
    own = np.take_along_axis(logits, labels[:, None], axis=1)
    lower_index = np.arange(num_classes)[None, :] < labels[:, None]
    ranks = ((logits > own) | ((logits == own) & lower_index)).sum(axis=1)
    # Source: Goodfellow 2016, section 4.1: the largest logit is taken out, so that no exponential overflows.
    largest = logits.max(axis=1, initial=-np.inf)
    losses = np.log(np.exp(logits - largest[:, None]).sum(axis=1)) + largest - own[:, 0]
    confusion = Sums.zeros(num_classes).confusion
    if len(confusion):
        np.add.at(confusion, (labels, logits.argmax(axis=1)), 1)
    return Sums(
        samples=num_counted,
        loss_sum=float(losses.sum()) if num_finite == num_counted else float("nan"),
        top1=int((ranks < 1).sum()),
        top5=int((ranks < 5).sum()),
        nonfinite=num_counted - num_finite,
        confusion=confusion,
    )


class Meter:
    """Images per second, and the share of the time that was spent waiting for data, over the last seconds.

    Used as `with meter.waiting(): batch = next(batches)` and, when the step is done, `meter.update(len(batch))`.
    """

    def __init__(self, window_s: float = 30.0, clock: Callable[[], float] = time.monotonic) -> None:
        """Starts a meter that forgets what is more than `window_s` ago."""
        self.window_s = window_s
        self.clock = clock
        self.total_images = 0
        self.total_wait_s = 0.0
        # (time, images so far, seconds waited so far), oldest first; the first is at, or before, the window's start.
        self.marks = collections.deque([(clock(), 0, 0.0)])

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the time inside as waiting for data."""
        start_s = self.clock()
        try:
            yield
        finally:
            self.total_wait_s += self.clock() - start_s

    def update(self, num_images: int) -> None:
        """Counts the images of a step that has just ended."""
        now_s = self.clock()
        self.total_images += num_images
        self.marks.append((now_s, self.total_images, self.total_wait_s))
        while len(self.marks) > 2 and self.marks[1][0] <= now_s - self.window_s:
            self.marks.popleft()

    def restart(self) -> None:
        """Forgets what is past, so that an evaluation or a pause does not count as slow training."""
        self.marks.clear()
        self.marks.append((self.clock(), self.total_images, self.total_wait_s))

    def images_per_s(self) -> float:
        """Returns the rate between the window's start and the last step; 0 before any time has passed."""
        (start_s, start_images, _), (end_s, end_images, _) = self.marks[0], self.marks[-1]
        return (end_images - start_images) / (end_s - start_s) if end_s > start_s else 0.0

    def wait_share(self) -> float:
        """Returns the share of that time spent waiting for data, 0 to 1."""
        (start_s, _, start_wait_s), (end_s, _, end_wait_s) = self.marks[0], self.marks[-1]
        return (end_wait_s - start_wait_s) / (end_s - start_s) if end_s > start_s else 0.0
