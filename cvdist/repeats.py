"""Finds rows that should differ and do not: one key on several rows; one photo on several rows, in several splits or classes.

Rows are dealt to buckets by a hash, so that equal ones meet and nobody holds more than a bucket at a time. Pure: tables in, findings
out.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import operator
from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

MAX_EXAMPLES = 10
BUCKET_ROWS = 1 << 20

# Who a row is. `split` and `shard` count in the order of the manifest, `row` through the shard.
ROWS = pa.schema(
    [
        pa.field("key", pa.string()),
        pa.field("source_sha256", pa.string()),
        pa.field("split", pa.int32()),
        pa.field("label", pa.int32()),
        pa.field("shard", pa.int32()),
        pa.field("row", pa.int64()),
    ]
)
KEY_COLUMNS = ("key", "split", "label", "shard", "row")
SOURCE_COLUMNS = ("source_sha256", *KEY_COLUMNS)
SOURCE_KINDS = ("duplicates", "leaks", "conflicts")
KINDS = ("keys", *SOURCE_KINDS)


@dataclasses.dataclass(frozen=True, order=True)
class Sighting:
    """One row of an example."""

    key: str
    split: int
    label: int
    shard: int
    row: int


@dataclasses.dataclass(frozen=True)
class Repeats:
    """Rows that should differ and do not.

    Attributes:
        kind: keys: one key on several rows. Of rows with the same source file: duplicates within a class of a split, leaks between
            splits, conflicts between classes; one photo may be all three.
        num_photos: Different keys or source files concerned.
        num_samples: Rows concerned.
        examples: The first by key; of each the rows that show the fault.
    """

    kind: str
    num_photos: int = 0
    num_samples: int = 0
    examples: tuple[tuple[Sighting, ...], ...] = ()

    def __add__(self, other: Repeats) -> Repeats:
        """Adds what another bucket holds, in any order to the same effect."""
        examples = sorted((*self.examples, *other.examples))[:MAX_EXAMPLES]
        photos, samples = self.num_photos + other.num_photos, self.num_samples + other.num_samples
        return Repeats(self.kind, photos, samples, tuple(examples))


def deal(rows: pa.Table, num_buckets: int) -> Iterator[tuple[int, bytes]]:
    """Deals a table `ROWS` to buckets, twice: by key to those below num_buckets, by source file to those below twice that."""
    for first, columns in ((0, KEY_COLUMNS), (num_buckets, SOURCE_COLUMNS)):
        values = rows[columns[0]].cast(pa.binary()).to_pylist()
        buckets = np.array([xxhash.xxh3_64_intdigest(value) % num_buckets for value in values], np.int64)
        for bucket in np.unique(buckets):
            mine = rows.select(columns).filter(pa.array(buckets == bucket))
            yield first + int(bucket), stream_bytes(mine)


def stream_bytes(table: pa.Table) -> bytes:
    """Returns a table as an Arrow stream."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue())


def find_repeats(parts: Sequence[bytes]) -> list[Repeats]:
    """Finds the repeats among all parts that `deal` gave one bucket."""
    if not parts:
        return []
    rows = pa.concat_tables([pa.ipc.open_stream(part).read_all() for part in parts])
    return source_repeats(rows) if "source_sha256" in rows.column_names else [key_repeats(rows)]


def repeated(rows: pa.Table, name: str) -> Iterator[list[Sighting]]:
    """Yields the rows that share their value in a column with others, by that value, each group sorted by key."""
    counts = rows[name].value_counts()
    values = counts.filter(pc.greater(counts.field("counts"), 1)).field("values")
    order = [(column, "ascending") for column in dict.fromkeys((name, "key", "shard", "row"))]
    found = rows.filter(pc.is_in(rows[name], values)).sort_by(order)
    dicts = itertools.chain.from_iterable(batch.to_pylist() for batch in found.to_batches(max_chunksize=4096))
    for _, group in itertools.groupby(dicts, operator.itemgetter(name)):
        yield [Sighting(row["key"], row["split"], row["label"], row["shard"], row["row"]) for row in group]


def key_repeats(rows: pa.Table) -> Repeats:
    """Finds keys that several rows of a bucket have."""
    found = Repeats("keys")
    for group in repeated(rows, "key"):
        found += Repeats("keys", 1, len(group), (tuple(group[:2]),))
    return found


def source_repeats(rows: pa.Table) -> list[Repeats]:
    """Finds rows of a bucket that were made of the same file."""
    found = {kind: Repeats(kind) for kind in SOURCE_KINDS}
    for group in repeated(rows, "source_sha256"):
        places = collections.Counter((row.split, row.label) for row in group)
        same = [row for row in group if places[row.split, row.label] > 1]
        splits = {row.split: row for row in reversed(group)}
        labels = {row.label: row for row in reversed(group)}
        if same:
            first = [row for row in same if (row.split, row.label) == (same[0].split, same[0].label)][:2]
            found["duplicates"] += Repeats("duplicates", 1, len(same), (tuple(first),))
        if len(splits) > 1:
            found["leaks"] += Repeats("leaks", 1, len(group), (tuple(splits[split] for split in sorted(splits)),))
        if len(labels) > 1:
            first = [labels[label] for label in sorted(labels)[:4]]
            found["conflicts"] += Repeats("conflicts", 1, len(group), (tuple(first),))
    return list(found.values())
