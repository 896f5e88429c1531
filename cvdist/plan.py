"""The order of an epoch: (manifest split, seed, epoch, global batch) to the samples of every step and rank. Pure.

The row groups of a split, shuffled, with their rows shuffled inside, form one sequence of places. It is cut into lanes, which are
read side by side: even lanes from their first place to their last, odd lanes backwards, so that two neighbours meet in the row
group that their border cuts, and it is read once. Every position of the global batch has lanes of its own, in turns, or positions
share a lane. Nothing of this knows the number of ranks: a rank is a slice of the positions, so it reads whole lanes, and every
number of ranks sees the same order.
"""

from __future__ import annotations

import dataclasses
import heapq
import itertools
from typing import Literal

import numpy as np
import numpy.typing as npt

from cvdist import sampling
from cvdist.shards import Split

Ints = npt.NDArray[np.int64]


@dataclasses.dataclass(frozen=True)
class Step:
    """The part of one global batch that one rank reads, in order.

    Attributes:
        groups: int64 (n,), index of the row group of each sample, counted through all shards of the split.
        rows: int64 (n,), row of each sample in its row group.
        samples: int64 (n,), index of each sample in the split: stable for a data set, whatever the order.
        draws: int64 (n,), what the random changes of each sample are drawn by: `samples`, and for the r-th repeat of a sample in the
            epoch, r * samples of the split more.
        weights: float32 (n,), 1, or 0 for a sample that only fills the batch.
        num_valid: Samples of weight 1 in the whole global batch.
    """

    groups: Ints
    rows: Ints
    samples: Ints
    draws: Ints
    weights: npt.NDArray[np.float32]
    num_valid: int


class EpochPlan:
    """One epoch over a split. Every sample has weight one exactly once (remainder=pad), in the same order for any ranks."""

    def __init__(
        self,
        split: Split,
        global_batch: int,
        *,
        seed: int | None,
        epoch: int = 0,
        num_lanes: int = 256,
        remainder: Literal["pad", "drop"] = "pad",
        counts: Ints | None = None,
    ) -> None:
        """Plans an epoch.

        Args:
            split: What is read.
            global_batch: Samples of one step on all ranks.
            seed: Of the shuffle; None shuffles nothing: each lane keeps the stored order, and a single lane is the stored order.
            epoch: Which epoch, from 0; each has an order of its own.
            num_lanes: Lanes; as many row groups are open at a time on all ranks together. See `lanes_within`.
            remainder: pad fills the last batch with samples of weight 0; drop leaves the last samples of the lanes out.
            counts: int64 (samples of the split,), how often each sample occurs in the epoch; by default once. See `sampling`.

        Raises:
            ValueError: `counts` are not one number for each sample, none of them negative.
        """
        rows = (shard.row_group_rows for shard in split.shards)
        self.group_rows = np.fromiter(itertools.chain.from_iterable(rows), dtype=np.int64)
        self._first_sample = before(self.group_rows)[:-1]
        self.split_samples = int(self.group_rows.sum())
        self._repeats = None if counts is None else Repeats(counts, self.split_samples)
        lengths = self.group_rows
        if self._repeats:
            lengths = self._repeats.in_ranges(self._first_sample, self._first_sample + self.group_rows)
        self._order = (
            np.arange(len(lengths))
            if seed is None
            else sampling.generator(seed, epoch, sampling.GROUPS).permutation(len(lengths))
        )
        self._first_place = before(lengths[self._order])
        self.num_samples = int(self._first_place[-1])
        self.global_batch = global_batch
        # The first `_num_longer` positions have one sample more than the others: those of the last batch, when it is not full.
        self._full_steps, self._num_longer = divmod(self.num_samples, global_batch)
        self.num_steps = self._full_steps + (remainder == "pad" and self._num_longer > 0)
        self._lanes = Lanes.cut(self.num_samples, global_batch, num_lanes)
        self._row_orders = None if seed is None else RowOrders(lengths, self.num_lanes, seed, epoch)

    @property
    def num_lanes(self) -> int:
        """Lanes that the epoch is woven from."""
        return len(self._lanes.origins)

    @property
    def num_padded(self) -> int:
        """Samples of weight zero in the epoch."""
        return max(0, self.num_steps * self.global_batch - self.num_samples)

    @property
    def num_dropped(self) -> int:
        """Samples that the epoch leaves out."""
        return max(0, self.num_samples - self.num_steps * self.global_batch)

    def step(self, index: int, rank: int = 0, size: int = 1) -> Step:
        """Returns what `rank` of `size` reads at step `index` (from 0): a slice of the positions of the global batch.

        Raises:
            IndexError: The epoch has no such step.
        """
        if not 0 <= index < self.num_steps:
            raise IndexError(f"step {index} of an epoch of {self.num_steps} steps; expected 0 to {self.num_steps - 1}")
        return self._step(index, rank, size)

    def dropped(self) -> Ints:
        """Returns the samples, int64 (num_dropped,), that the epoch leaves out."""
        if not self.num_dropped:
            return np.zeros(0, np.int64)
        step = self._step(self.num_steps, 0, 1)
        return step.samples[step.weights > 0]

    def occurrences(self, start: int, end: int) -> tuple[Ints, Ints]:
        """Returns samples from `start` to before `end`, and how often each occurs in the epoch and what it drops: from the split alone."""
        samples = np.arange(start, end, dtype=np.int64)
        if self._repeats is None:
            return samples, np.ones_like(samples)
        return samples, self._repeats.in_ranges(samples, samples + 1)

    def _step(self, index: int, rank: int, size: int) -> Step:
        """Returns a step, or what would be the one behind the last."""
        positions = np.arange(rank * self.global_batch // size, (rank + 1) * self.global_batch // size)
        is_full = index < self._full_steps
        weights = np.ones(len(positions), np.float32)
        turns: Ints | int = index
        if not is_full:
            # A position that has no more gives what it gave before, with weight zero: its row group has been read. In the first step,
            # it gives what the last position that has something gives.
            has_more = positions < self._num_longer
            weights = has_more.astype(np.float32)
            turns = np.where(has_more, index, max(0, index - 1))
            positions = positions if index else np.minimum(positions, self._num_longer - 1)
        places = self._lanes.places(positions, turns)
        order_index = np.searchsorted(self._first_place, places, side="right") - 1
        groups = self._order[order_index]
        rows = places - self._first_place[order_index]
        if self._row_orders:
            rows = self._row_orders.rows(groups, rows)
        first = self._first_sample[groups]
        samples = draws = first + rows
        if self._repeats:
            samples, draws = self._repeats.samples(first, rows)
            rows = samples - first
        return Step(groups, rows, samples, draws, weights, self.global_batch if is_full else self._num_longer)


@dataclasses.dataclass(frozen=True)
class Lanes:
    """How the places of a sequence are dealt to the positions of the global batch.

    Position p takes at its turn t (the step) the place number (t // num_lanes[p]) * strides[p] + offsets[p] of its lane
    first_lanes[p] + t % num_lanes[p]; places are counted from origins[lane] on, up or down.

    Attributes:
        first_lanes: int64 (positions,).
        num_lanes: int64 (positions,), lanes of its own that a position takes from in turns.
        strides: int64 (positions,), places of the lane that one step takes: as many as positions share it.
        offsets: int64 (positions,), which of those is this position's.
        origins: int64 (lanes,), place that a lane begins with.
        directions: int64 (lanes,), 1 or -1.
    """

    first_lanes: Ints
    num_lanes: Ints
    strides: Ints
    offsets: Ints
    origins: Ints
    directions: Ints

    @classmethod
    def cut(cls, num_places: int, global_batch: int, num_lanes: int) -> Lanes:
        """Cuts `num_places`, as many as samples, into `num_lanes` lanes."""
        positions = np.arange(global_batch)
        full_steps, num_longer = divmod(num_places, global_batch)
        if num_lanes >= global_batch:
            # Position p has the lanes l with l * positions // lanes == p, and they share its samples.
            first_lanes = ceil_div(np.arange(global_batch + 1) * num_lanes, global_batch)
            lanes_of = np.diff(first_lanes)
            owners = np.repeat(positions, lanes_of)
            turns = full_steps + (owners < num_longer)
            lengths = ceil_div(turns - (np.arange(num_lanes) - first_lanes[owners]), lanes_of[owners])
            return cls._of_lengths(lengths, first_lanes[:-1], lanes_of, np.ones_like(positions), 0 * positions)
        first_positions = shared_lanes(global_batch, num_lanes)
        widths = np.diff(first_positions, append=global_batch)
        lane_of = np.repeat(np.arange(len(widths)), widths)
        lengths = full_steps * widths + np.clip(num_longer - first_positions, 0, widths)
        offsets = positions - first_positions[lane_of]
        return cls._of_lengths(lengths, lane_of, np.ones_like(positions), widths[lane_of], offsets)

    @classmethod
    def _of_lengths(cls, lengths: Ints, first_lanes: Ints, num_lanes: Ints, strides: Ints, offsets: Ints) -> Lanes:
        """Builds lanes of the given lengths (lanes,) that lie behind each other, even ones forwards, odd ones backwards."""
        borders = before(lengths)
        is_odd = np.arange(len(lengths)) % 2 == 1
        origins = np.where(is_odd, borders[1:] - 1, borders[:-1])
        return cls(first_lanes, num_lanes, strides, offsets, origins, np.where(is_odd, -1, 1))

    def places(self, positions: Ints, turns: Ints | int) -> Ints:
        """Returns the places, int64 (n,), of `positions` (n,) at their turns (n,)."""
        rounds, lanes = np.divmod(turns, self.num_lanes[positions])
        lanes = lanes + self.first_lanes[positions]
        steps = rounds * self.strides[positions] + self.offsets[positions]
        places: Ints = self.origins[lanes] + self.directions[lanes] * steps
        return places


def shared_lanes(global_batch: int, num_lanes: int) -> Ints:
    """Returns the first position of each lane, int64 (num_lanes,), where there are more positions than lanes.

    Lanes begin where ranks do, for as many numbers of ranks as there are lanes for, from few ranks to many: a lane of two ranks would
    be read by both. What lies between is cut evenly.
    """
    cuts = np.zeros(1, np.int64)
    for size in range(2, num_lanes + 1):
        if global_batch % size == 0:
            more = np.union1d(cuts, np.arange(0, global_batch, global_batch // size))
            if len(more) > num_lanes:
                break
            cuts = more
    # Each further lane goes to where lanes are widest: (-width, first position, positions, lanes).
    gaps = [
        (-gap, start, gap, 1)
        for start, gap in zip(cuts.tolist(), np.diff(cuts, append=global_batch).tolist(), strict=True)
    ]
    heapq.heapify(gaps)
    for _ in range(num_lanes - len(gaps)):
        _, start, gap, lanes = gaps[0]
        heapq.heapreplace(gaps, (-gap / (lanes + 1), start, gap, lanes + 1))
    return np.sort(np.concatenate([start + ceil_div(np.arange(lanes) * gap, lanes) for _, start, gap, lanes in gaps]))


def lanes_within(split: Split, num_lanes: int, shuffle_bytes: int) -> int:
    """Returns how many lanes, from 1 to `num_lanes`, hold at most `shuffle_bytes` of open row groups on one rank.

    A lane has one row group open, and stays in it for as many steps as it has rows: the mean is weighted by rows. It is a function of
    the manifest and the settings alone, so that the order does not depend on where a run goes on.
    """
    rows = np.fromiter(itertools.chain.from_iterable(shard.row_group_rows for shard in split.shards), np.float64)
    num_bytes = np.fromiter(itertools.chain.from_iterable(shard.row_group_bytes for shard in split.shards), np.float64)
    if not rows.sum():
        return num_lanes
    mean_bytes = max(1.0, float((rows * num_bytes).sum() / rows.sum()))
    return int(min(num_lanes, max(1, shuffle_bytes // mean_bytes)))


class RowOrders:
    """The shuffled order of the rows inside of row groups, drawn when a row group is first asked for and kept for a while."""

    def __init__(self, lengths: Ints, num_lanes: int, seed: int, epoch: int) -> None:
        """Prepares orders of row groups of `lengths` (groups,) rows; the order of a row group follows from its index alone."""
        self._lengths = lengths
        self._philox = np.random.Philox(key=sampling.key(seed, epoch, sampling.ROWS))
        self._state = self._philox.state
        self._generator = np.random.Generator(self._philox)
        mean_rows = int(lengths.sum()) // max(1, np.count_nonzero(lengths)) + 1
        # Room for what is open, four times: all orders are drawn again when it is full.
        self._pool = np.empty(min(int(lengths.sum()), 4 * num_lanes * mean_rows), np.int32)
        self._starts = np.full(len(lengths), -1)  # where the order of a row group lies in the pool
        self._drawn: list[int] = []
        self._used = 0

    def rows(self, groups: Ints, slots: Ints) -> Ints:
        """Returns the rows, int64 (n,), at shuffled places `slots` (n,) of `groups` (n,)."""
        starts = self._starts[groups]
        if starts.min(initial=0) < 0:
            self._draw(groups)
            starts = self._starts[groups]
        return np.asarray(self._pool[starts + slots], np.int64)

    def _draw(self, groups: Ints) -> None:
        """Draws the orders of `groups` that are not there."""
        wanted = set(groups[self._starts[groups] < 0].tolist())
        if self._used + int(self._lengths[list(wanted)].sum()) > len(self._pool):
            self._starts[self._drawn] = -1
            self._drawn, self._used, wanted = [], 0, set(groups.tolist())
            if (num_rows := int(self._lengths[list(wanted)].sum())) > len(self._pool):
                self._pool = np.empty(num_rows, np.int32)
        for group in wanted:
            num_rows = int(self._lengths[group])
            # A counter-based generator: each row group has a stretch of the stream of its own.
            self._state["state"]["counter"][:] = 0, group, 0, 0
            self._philox.state = self._state
            self._pool[self._used : self._used + num_rows] = self._generator.permutation(num_rows)
            self._starts[group] = self._used
            self._used += num_rows
        self._drawn.extend(wanted)


class Repeats:
    """A split of which samples occur any number of times: it is as if each row were stored that often, behind each other."""

    def __init__(self, counts: Ints, num_samples: int) -> None:
        """Takes how often each sample occurs, (samples of the split,).

        Raises:
            ValueError: They are not one number for each sample, none of them negative.
        """
        if counts.shape != (num_samples,) or (counts < 0).any():
            raise ValueError(
                f"counts of shape {counts.shape}, at least {counts.min(initial=0)}; expected one number for each of"
                f" {num_samples} samples, 0 or more; use a function of cvdist.sampling"
            )
        self._before = before(counts)

    def in_ranges(self, starts: Ints, ends: Ints) -> Ints:
        """Returns how often samples from `starts` (n,) to before `ends` (n,) occur together, int64 (n,)."""
        return np.asarray(self._before[ends] - self._before[starts])

    def samples(self, first: Ints, rows: Ints) -> tuple[Ints, Ints]:
        """Returns (samples, draws), int64 (n,), of the virtual `rows` (n,) of row groups that begin with samples `first` (n,)."""
        virtual = self._before[first] + rows
        samples = np.searchsorted(self._before, virtual, side="right") - 1
        return samples, samples + (virtual - self._before[samples]) * (len(self._before) - 1)


def before(lengths: Ints) -> Ints:
    """Returns how much lies before each of `lengths` (n,), and last before none of them: int64 (n + 1,), from 0 to the sum."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])


def ceil_div(numbers: Ints, divisors: Ints | int) -> Ints:
    """Returns the quotients, rounded up."""
    return np.asarray(-(-numbers // divisors), np.int64)
