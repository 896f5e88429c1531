"""The ledger of an epoch: what was read, checked against the manifest when the epoch ends."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt

from cvdist.augment import mix
from cvdist.errors import DataError
from cvdist.plan import EpochPlan

CHUNK = 1 << 20


@dataclasses.dataclass
class Ledger:
    """What one rank, or all of them together, have read of an epoch.

    Attributes:
        epoch: From 0.
        first_step: 0, or where a resumed run went on.
        steps: Global batches.
        samples: Of weight 1.
        padded: Of weight 0.
        digest: Sum over the samples of a hash of each one's index, modulo 2**64: which samples these are, in any order.
        bytes_read: From storage, for this epoch and what was read ahead in it.
        cache_hits: Row groups that came from the local cache.
        cache_misses: Row groups that were not in it; 0 where there is none.
        retries: Row groups that were read again because their checksum did not fit.
        wait_s: Time that the consumer waited for batches.
        total_s: Time from the first wait to the last batch.
        started_s: When that first wait began, on a clock of the rank's own.
    """

    epoch: int = 0
    first_step: int = 0
    steps: int = 0
    samples: int = 0
    padded: int = 0
    digest: int = 0
    bytes_read: int = 0
    cache_hits: int = 0
    cache_misses: int = 0
    retries: int = 0
    wait_s: float = 0.0
    total_s: float = 0.0
    started_s: float = 0.0

    def count(self, samples: npt.NDArray[np.int64], weights: npt.NDArray[np.float32]) -> None:
        """Counts a batch, of the samples (N,) that were decoded for it."""
        counted = samples[weights > 0]
        self.steps += 1
        self.samples += len(counted)
        self.padded += len(samples) - len(counted)
        self.digest = (self.digest + digest(counted)) % 2**64

    def waited(self, begun_s: float, now_s: float) -> None:
        """Counts the wait for a batch, between two readings of one monotonic clock."""
        self.started_s = begun_s if self.steps == 1 else self.started_s
        self.wait_s += now_s - begun_s
        self.total_s = now_s - self.started_s

    def sums(self) -> npt.NDArray[np.int64]:
        """Returns what adds up over ranks, int64 (9,); times in microseconds."""
        digest = self.digest - 2**64 if self.digest >= 2**63 else self.digest
        times = [round(self.wait_s * 1e6), round(self.total_s * 1e6)]
        counts = [self.samples, self.padded, digest, self.bytes_read, self.cache_hits, self.cache_misses, self.retries]
        return np.array([*counts, *times], np.int64)

    def with_sums(self, sums: npt.NDArray[np.int64]) -> Ledger:
        """Returns the ledger of all ranks, of the sum over ranks of `sums`; its times are rank-seconds."""
        samples, padded, digest, bytes_read, hits, misses, retries, wait_us, total_us = (int(value) for value in sums)
        return dataclasses.replace(
            self, samples=samples, padded=padded, digest=digest % 2**64, bytes_read=bytes_read, cache_hits=hits,
            cache_misses=misses, retries=retries, wait_s=wait_us / 1e6, total_s=total_us / 1e6,
        )  # fmt: skip

    def check(self, plan: EpochPlan, what: str) -> dict[str, Any]:
        """Returns the line for the log, when these are the samples that the manifest has, each as often as it should be.

        Args:
            plan: Of the epoch.
            what: Data set and split, for the message.

        Raises:
            DataError: They are not.
        """
        samples, expected_digest = planned(plan, self.first_step)
        if (self.samples, self.digest) != (samples, expected_digest):
            raise DataError(
                f"{what}: {self.samples} samples were read from step {self.first_step} of epoch {self.epoch} on (digest"
                f" {self.digest:016x}); expected {samples} ({expected_digest:016x}), each once; this is an error in cvdist: report it"
            )
        line = dataclasses.asdict(self) | {"digest": f"{self.digest:016x}", "dropped": plan.num_dropped}
        del line["started_s"]
        line["wait_share"] = round(self.wait_s / self.total_s, 4) if self.total_s else 0.0
        return line


def digest(samples: npt.NDArray[np.int64], counts: npt.NDArray[np.int64] | int = 1) -> int:
    """Returns the sum of the hashes of sample indices (N,), each as often as `counts` says, modulo 2**64."""
    return int((mix(samples.astype(np.uint64)) * np.asarray(counts).astype(np.uint64)).sum(dtype=np.uint64))


def planned(plan: EpochPlan, first_step: int = 0) -> tuple[int, int]:
    """Returns how many samples an epoch has from a step on, and their digest: those of the split but what came before or is dropped."""
    total = sum(
        digest(*plan.occurrences(start, min(start + CHUNK, plan.split_samples)))
        for start in range(0, plan.split_samples, CHUNK)
    )
    left_out = [plan.dropped()]
    for index in range(first_step):
        step = plan.step(index)
        left_out.append(step.samples[step.weights > 0])
    return plan.num_samples - sum(map(len, left_out)), (total - sum(map(digest, left_out))) % 2**64
