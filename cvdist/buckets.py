"""Rows on local disk, dealt by a hash: how equal ones among any number of rows meet in little memory."""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

NUM_BUCKETS = 256
TABLE_ROWS = 1 << 14


class Buckets:
    """Rows on local disk, dealt by the upper bits of a hash, so that equal ones meet in one small table."""

    def __init__(self, folder: pathlib.Path, schema: pa.Schema) -> None:
        """Makes `folder` and writes below it."""
        folder.mkdir()
        self._schema = schema
        self._paths = [folder / f"{bucket:03d}.arrows" for bucket in range(NUM_BUCKETS)]
        self._writers: dict[int, Any] = {}
        self._files = contextlib.ExitStack()
        self._held: list[tuple[pa.Table, npt.NDArray[np.uint64]]] = []  # a few rows need no files

    def add(self, rows: pa.Table, hashes: npt.NDArray[np.uint64]) -> None:
        """Takes a table, and one hash for each of its rows."""
        self._held.append((rows, hashes))
        if self._writers or sum(table.num_rows for table, _ in self._held) > TABLE_ROWS:
            self._deal()

    def _in_order(self) -> tuple[pa.Table, npt.NDArray[np.int64]]:
        """Returns what is held in memory by bucket, and the buckets."""
        buckets = (np.concatenate([hashes for _, hashes in self._held]) >> np.uint64(56)).astype(np.int64)
        order = np.argsort(buckets, kind="stable")
        return pa.concat_tables([rows for rows, _ in self._held]).take(pa.array(order)), buckets[order]

    def _deal(self) -> None:
        """Writes what is held to its buckets."""
        rows, buckets = self._in_order()
        self._held, edges = [], np.searchsorted(buckets, np.arange(NUM_BUCKETS + 1))
        for bucket in np.flatnonzero(np.diff(edges)):
            if bucket not in self._writers:
                sink = self._files.enter_context(pa.OSFile(str(self._paths[bucket]), "wb"))
                self._writers[bucket] = self._files.enter_context(pa.ipc.new_stream(sink, self._schema))
            self._writers[bucket].write_table(rows.slice(edges[bucket], edges[bucket + 1] - edges[bucket]))

    def tables(self) -> Iterator[pa.Table]:
        """Ends the writing; yields whole buckets, small ones together, in the order of their hashes."""
        if self._held and not self._writers:
            yield self._in_order()[0]
            return
        self._files.close()
        waiting: list[pa.Table] = []
        for bucket in sorted(self._writers):
            with pa.OSFile(str(self._paths[bucket]), "rb") as file:
                waiting.append(pa.ipc.open_stream(file).read_all())
            if sum(table.num_rows for table in waiting) >= TABLE_ROWS:
                yield pa.concat_tables(waiting)
                waiting = []
        if waiting:
            yield pa.concat_tables(waiting)


def sha256_hashes(column: pa.ChunkedArray) -> npt.NDArray[np.uint64]:
    """Returns the first 8 bytes of each hexadecimal sha256 as a number."""
    return np.array([int(value[:16], 16) for value in column.to_pylist()], np.uint64)


def groups_of(table: pa.Table, name: str) -> Iterator[list[dict[str, Any]]]:
    """Yields the rows that share their value of a column with another, by that value and key."""
    counts = table[name].value_counts()
    values = counts.filter(pc.greater(counts.field("counts"), 1)).field("values")
    found = table.filter(pc.is_in(table[name], values)).sort_by([(name, "ascending"), ("key", "ascending")])
    group: list[dict[str, Any]] = []
    for row in found.to_pylist():
        if group and group[0][name] != row[name]:
            yield group
            group = []
        group.append(row)
    if group:
        yield group
