"""Row groups in memory: which are read ahead, which stay, which go."""

from __future__ import annotations

import collections
from concurrent.futures import Future, ThreadPoolExecutor

from cvdist.plan import Step
from cvdist.reader import RowGroup, ShardReader

FETCH_THREADS = 4


class GroupCache:
    """Row groups in memory: fetched by threads before their use, kept while a step needs them, and after that while there is room."""

    def __init__(self, reader: ShardReader, budget_bytes: int) -> None:
        """Holds what the fetched steps need; when that is less than `budget_bytes`, what earlier steps needed fills up the rest.

        Lanes that take turns come back to a row group after some steps, so the budget has to have room for what all lanes have open.
        """
        self._reader, self._budget_bytes = reader, budget_bytes
        self._futures: collections.OrderedDict[int, Future[RowGroup]] = collections.OrderedDict()
        self._uses: collections.Counter[int] = collections.Counter()
        self._num_bytes = 0
        self._pool = ThreadPoolExecutor(FETCH_THREADS, thread_name_prefix="fetch")

    def fetch(self, step: Step) -> int:
        """Starts reading what `step` needs and no step before it has needed; returns how many bytes that is."""
        before = self._num_bytes
        for group in {int(group): None for group in step.groups}:
            self._uses[group] += 1
            if group not in self._futures:
                self._futures[group] = self._pool.submit(self._reader.read, group)
                self._num_bytes += self._reader.num_bytes(group)
        return self._num_bytes - before

    def groups(self, step: Step) -> dict[int, Future[RowGroup]]:
        """Returns the row groups of a fetched step, some of them still being read."""
        return {group: self._futures[group] for group in {int(group) for group in step.groups}}

    def release(self, step: Step) -> None:
        """Ends the need of `step`; unneeded row groups go, the longest unused first, when the budget is exceeded."""
        for group in {int(group) for group in step.groups}:
            self._uses[group] -= 1
            if not self._uses[group]:
                del self._uses[group]
            self._futures.move_to_end(group)
        for group in [group for group in self._futures if group not in self._uses]:
            if self._num_bytes <= self._budget_bytes:
                return
            del self._futures[group]
            self._num_bytes -= self._reader.num_bytes(group)

    def close(self) -> None:
        """Stops reading."""
        self._pool.shutdown(wait=False, cancel_futures=True)
