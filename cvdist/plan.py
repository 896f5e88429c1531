"""The order of an epoch: (manifest split, seed, epoch, global batch) to the samples of every step and rank. Pure.

The row groups of a split, shuffled, with their rows shuffled inside, form one sequence. The sequence is cut into as many lanes of
equal length as divide the global batch; step k takes the k-th piece of every lane. Nothing of this knows the number of ranks: a
rank is a slice of the global batch, so it reads whole lanes, and every number of ranks that divides the batch sees the same order.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import numpy as np
import numpy.typing as npt

from cvdist.shards import Split

Ints = npt.NDArray[np.int64]


@dataclasses.dataclass(frozen=True)
class Step:
    """The part of one global batch that one rank reads, in order.

    Attributes:
        groups: int64 (n,), index of the row group of each sample, counted through all shards of the split.
        rows: int64 (n,), row of each sample in its row group.
        samples: int64 (n,), index of each sample in the split: stable for a data set, whatever the order.
        weights: float32 (n,), 1, or 0 for a sample that only fills the batch.
        num_valid: Samples of weight 1 in the whole global batch.
    """

    groups: Ints
    rows: Ints
    samples: Ints
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
        num_lanes: int = 64,
        remainder: Literal["pad", "drop"] = "pad",
    ) -> None:
        """Plans an epoch.

        Args:
            split: What is read.
            global_batch: Samples of one step on all ranks.
            seed: Of the shuffle; None shuffles nothing, for evaluation: each lane keeps the stored order.
            epoch: Which epoch, from 0; each has an order of its own.
            num_lanes: Upper limit of lanes.
            remainder: pad fills the last batch with samples of weight 0; drop leaves the last samples of the order out.
        """
        self.group_rows = np.array([rows for shard in split.shards for rows in shard.row_group_rows], dtype=np.int64)
        self.num_samples = int(self.group_rows.sum())
        self.global_batch = global_batch
        self.num_steps = (
            self.num_samples // global_batch if remainder == "drop" else -(-self.num_samples // global_batch)
        )
        self.num_lanes = next(
            lanes for lanes in range(min(num_lanes, global_batch), 0, -1) if global_batch % lanes == 0
        )
        self._key = None if seed is None else (seed, epoch)
        self._first_sample = np.concatenate([[0], np.cumsum(self.group_rows)])[:-1]
        self._order = (
            np.arange(len(self.group_rows)) if self._key is None else self._rng(0).permutation(len(self.group_rows))
        )
        self._ends = np.cumsum(self.group_rows[self._order])
        self._permutations: dict[int, Ints] = {}

    @property
    def num_padded(self) -> int:
        """Samples of weight zero in the epoch."""
        return max(0, self.num_steps * self.global_batch - self.num_samples)

    @property
    def num_dropped(self) -> int:
        """Samples that the epoch leaves out."""
        return max(0, self.num_samples - self.num_steps * self.global_batch)

    def step(self, index: int, rank: int = 0, size: int = 1) -> Step:
        """Returns what `rank` of `size` reads at step `index` (from 0). `size` divides the global batch."""
        places = self._places(index)
        mine = places[rank * self.global_batch // size : (rank + 1) * self.global_batch // size]
        weights = (mine < self.num_samples).astype(np.float32)
        turns = np.searchsorted(self._ends, mine % self.num_samples, side="right")
        groups = self._order[turns]
        slots = mine % self.num_samples - (self._ends[turns] - self.group_rows[groups])
        rows = self._shuffled_rows(groups, slots)
        return Step(groups, rows, self._first_sample[groups] + rows, weights, int((places < self.num_samples).sum()))

    def _places(self, index: int) -> Ints:
        """Returns the places of global batch `index` in the sequence; those from num_samples on are padding.

        The last batch, when it is not full, lies behind the lanes: it is the tail of the sequence.
        """
        full_steps = self.num_samples // self.global_batch
        if index >= full_steps:
            return np.arange(index * self.global_batch, (index + 1) * self.global_batch)
        piece = self.global_batch // self.num_lanes
        # axes: lane, place within the lane's piece of this step
        lane_starts = np.arange(self.num_lanes)[:, None] * (full_steps * piece)
        return np.asarray(lane_starts + index * piece + np.arange(piece)[None, :], dtype=np.int64).reshape(-1)

    def _shuffled_rows(self, groups: Ints, slots: Ints) -> Ints:
        """Returns the stored rows at shuffled places `slots` of `groups`."""
        if self._key is None:
            return slots
        rows = np.empty_like(slots)
        for group in np.unique(groups):
            chosen = groups == group
            rows[chosen] = self._permutation(int(group))[slots[chosen]]
        return rows

    def _permutation(self, group: int) -> Ints:
        """Returns the order of the rows in a row group; the ones in use are few: a row group is read to its end once."""
        if group not in self._permutations:
            if len(self._permutations) > 4 * self.num_lanes:
                self._permutations.clear()
            self._permutations[group] = self._rng(1 + group).permutation(int(self.group_rows[group]))
        return self._permutations[group]

    def _rng(self, stream: int) -> np.random.Generator:
        """Returns the generator of one permutation: a function of seed, epoch and stream alone."""
        return np.random.Generator(np.random.Philox(np.random.SeedSequence([*self._key, stream])))  # type: ignore[misc]
