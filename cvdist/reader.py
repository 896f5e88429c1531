"""Shards to row groups in memory: the bytes as fetch.py verified them, parsed as Parquet, image by image against its own checksum.

Files that others have written and that were adopted (adopt.py) have no checksum for each image: nothing of a row group is parsed that
differs from the checksum of the whole.
"""

from __future__ import annotations

import dataclasses
import io
import logging
import os
import re
import urllib.parse
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import xxhash

from cvdist import pages
from cvdist.cache import LocalCache
from cvdist.errors import DataError
from cvdist.fetch import Fetcher
from cvdist.images import ImageSpec, is_plain, read_known_header
from cvdist.shards import Adopted, Manifest, Shard, row_group_offsets

COLUMNS = ("label", "image", "height", "width", "image_xxh3")
MAX_OFFSET = (1 << 31) - 1  # of 32 bits

log = logging.getLogger("cvdist.reader")


@dataclasses.dataclass(frozen=True)
class RowGroup:
    """The columns of one row group in memory, N rows.

    Attributes:
        where: For errors.
        images: Memory that holds the stored images.
        starts: Integers (N,), where each begins in it.
        ends: Integers (N,), where each ends.
        labels: int32 (N,), class indices.
        heights: int32 (N,), pixels, of the upright image.
        widths: int32 (N,).
        checksums: int64 (N,), xxHash3-64 of each image; None where the bytes of the row group were verified as a whole.
        is_plain: bool (N,), of adopted images: is it an upright JPEG, which decodes as one of the codec jpeg does. None: all are what
            the codec says.
    """

    where: str
    images: memoryview
    starts: npt.NDArray[np.int32] | npt.NDArray[np.int64]
    ends: npt.NDArray[np.int32] | npt.NDArray[np.int64]
    labels: npt.NDArray[np.int32]
    heights: npt.NDArray[np.int32]
    widths: npt.NDArray[np.int32]
    checksums: npt.NDArray[np.int64] | None
    is_plain: npt.NDArray[np.bool_] | None = None

    def image(self, row: int) -> memoryview:
        """Returns the stored bytes of one image.

        Raises:
            DataError: They are not the bytes that were written.
        """
        data = self.images[self.starts[row] : self.ends[row]]
        if self.checksums is None:
            return data
        if xxhash.xxh3_64_intdigest(data) != int(self.checksums[row]) & 0xFFFFFFFFFFFFFFFF:
            raise DataError(
                f"{self.where}, row {row}: the image differs from its checksum; expected what prepare wrote; restore the shard"
            )
        return data


class ShardReader:
    """Reads row groups of the shards of a split, by their number counted through all shards."""

    def __init__(self, data_url: str, manifest: Manifest, split: str, cache: LocalCache | None = None) -> None:
        """Takes the split's shards from the manifest; opens nothing yet."""
        self._meaning = meaning_of(manifest)
        self.fetcher = Fetcher(data_url, cache)
        self._shards = manifest.splits[split].shards
        counts = [len(shard.row_group_rows) for shard in self._shards]
        self._first_groups = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])

    @property
    def num_groups(self) -> int:
        """Row groups of the split."""
        return int(self._first_groups[-1])

    @property
    def total_bytes(self) -> int:
        """Stored bytes of all row groups of the split."""
        return sum(sum(shard.row_group_bytes) for shard in self._shards)

    def num_bytes(self, group: int) -> int:
        """Returns the stored bytes of a row group."""
        shard, index = self._place(group)
        return shard.row_group_bytes[index]

    def _place(self, group: int) -> tuple[Shard, int]:
        """Returns the shard of a row group, and its number in it."""
        number = int(np.searchsorted(self._first_groups, group, side="right")) - 1
        return self._shards[number], group - int(self._first_groups[number])

    def read(self, group: int) -> RowGroup:
        """Reads one row group.

        Raises:
            DataError: The shard is missing, or not the one that the manifest names.
        """
        shard, index = self._place(group)
        where = f"{self.fetcher.url(shard)}, row group {index}"
        meaning = self._meaning
        self.fetcher.check_footer(shard)  # not needed in most cases, but part of the shard
        data, is_intact = self.fetcher.row_group(shard, index)
        if is_intact and not meaning:
            plain = plain_rows(where, memoryview(data), shard.row_group_rows[index])
            if plain:
                return plain
        try:
            footer = pq.read_metadata(pa.BufferReader(self.fetcher.footer(shard)))
            if meaning and not is_intact:
                raise differs(where)
            names = adopted_columns(meaning.adopted) if meaning else COLUMNS
            table = read_columns(Window(data, row_group_offsets(shard)[index], shard.num_bytes), footer, index, names)
            rows = adopted_rows(where, table, shard.path, meaning) if meaning else row_group(where, table)
        except (pa.ArrowException, OSError, ValueError) as error:
            raise DataError(
                f"{where} cannot be read ({error}); expected the shard that prepare wrote; restore it or prepare again"
            ) from None
        if not is_intact:
            for row in range(table.num_rows):
                rows.image(row)  # names the row, where it is an image that is damaged
            raise differs(where)
        return rows


def differs(where: str) -> DataError:
    """Words the error about a row group that is not what the manifest says."""
    return DataError(
        f"{where} differs from its checksum; expected what prepare wrote, or what was adopted; restore the shard, or prepare or"
        " adopt again"
    )


def plain_rows(where: str, data: memoryview, num_rows: int) -> RowGroup | None:
    """Returns the columns of a row group that prepare wrote, of which errors speak as `where`; None where pyarrow has to read it."""
    columns = pages.Columns(data, num_rows)
    try:
        columns.skip()  # the key; in the order of shards.SCHEMA
        labels = columns.numbers(np.int32)
        starts, ends = columns.binaries()
        heights, widths = columns.numbers(np.int32), columns.numbers(np.int32)
        checksums = columns.numbers(np.int64)
    except pages.NotPlainError as error:
        log.debug("%s: left to pyarrow: %s", where, error)
        return None
    return RowGroup(where, data, starts, ends, labels, heights, widths, checksums)


def row_group(where: str, table: pa.Table) -> RowGroup:
    """Returns the columns of a table of one row group, of which errors speak as `where`."""
    images, offsets = image_buffers(table["image"])
    columns = [table[name].to_numpy() for name in ("label", "height", "width", "image_xxh3")]
    return RowGroup(where, images, offsets[:-1], offsets[1:], *columns)


def adopted_columns(adopted: Adopted) -> list[str]:
    """Returns the columns of adopted files that are read."""
    return [adopted.image] if adopted.is_partition else list(dict.fromkeys((adopted.image, adopted.label)))


@dataclasses.dataclass(frozen=True)
class Meaning:
    """What the columns of an adopted data set mean."""

    adopted: Adopted
    classes: tuple[str, ...]
    spec: ImageSpec


def meaning_of(manifest: Manifest) -> Meaning | None:
    """Returns what the columns of an adopted data set mean; None for one of cvdist's own."""
    return Meaning(manifest.adopted, manifest.classes, manifest.image) if manifest.adopted else None


def adopted_rows(where: str, table: pa.Table, path: str, meaning: Meaning) -> RowGroup:
    """Returns the columns of a row group of the file at `path` of an adopted data set, whose bytes were verified.

    Raises:
        ValueError: They are not what was adopted.
    """
    images, offsets = image_buffers(plain_bytes(leaf(table, meaning.adopted.image)))
    headers = []
    for row in range(table.num_rows):
        try:
            headers.append(read_known_header(images[offsets[row] : offsets[row + 1]], meaning.spec))
        except ValueError as error:
            raise ValueError(f"row {row}: {error}") from None
    return RowGroup(
        where=where,
        images=images,
        starts=offsets[:-1],
        ends=offsets[1:],
        labels=adopted_labels(table, path, meaning),
        heights=np.array([header.height for header in headers], np.int32),
        widths=np.array([header.width for header in headers], np.int32),
        checksums=None,
        is_plain=np.array([is_plain(header) for header in headers], np.bool_),
    )


def adopted_labels(table: pa.Table, path: str, meaning: Meaning) -> npt.NDArray[np.int32]:
    """Returns the class indices, int32 (N,), of a row group, or of all, of the file at `path` of an adopted data set.

    Raises:
        ValueError: They are not what was adopted.
    """
    adopted, num_classes = meaning.adopted, len(meaning.classes)
    values = [partition_value(path, adopted.label)] * table.num_rows if adopted.is_partition else None
    labels = pa.array(values, pa.string()) if values is not None else plain_labels(leaf(table, adopted.label))
    numbers = pc.index_in(labels.cast(pa.string()), pa.array(meaning.classes)) if adopted.is_by_name else labels
    if numbers.null_count:
        raise ValueError("a label is null, or of no class")
    classes = numbers.cast(pa.int64()).to_numpy(zero_copy_only=False)
    if len(classes) and not 0 <= classes.min() <= classes.max() < num_classes:
        raise ValueError(f"labels from {classes.min()} to {classes.max()}; expected 0 to {num_classes - 1}")
    return np.asarray(classes, np.int32)


def leaf(table: pa.Table, name: str) -> pa.ChunkedArray:
    """Returns a column; `image.bytes` is the field `bytes` of the column `image`, if no column has this very name."""
    top, *fields = [name] if name in table.column_names else name.split(".")
    column = table[top]
    for field in fields:
        column = pc.struct_field(column, field)
    return column


def plain_bytes(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Returns a column of bytes as binary, or where that is too small as large_binary."""
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    is_large = pa.types.is_large_binary(column.type) or column.nbytes > MAX_OFFSET
    return column.cast(pa.large_binary() if is_large else pa.binary())


def image_buffers(column: pa.ChunkedArray) -> tuple[memoryview, npt.NDArray[np.int32] | npt.NDArray[np.int64]]:
    """Returns the values of what `plain_bytes` gave behind each other, and where each begins and the last ends.

    Raises:
        ValueError: There are nulls.
    """
    if column.null_count:
        raise ValueError(f"{column.null_count} images are null")
    array = column.chunk(0) if column.num_chunks == 1 else pa.concat_arrays([pa.array([], column.type), *column.chunks])
    if not len(array):
        return memoryview(b""), np.zeros(1, np.int32)
    _, starts, values = array.buffers()
    rows = slice(array.offset, array.offset + len(array) + 1)
    is_large = pa.types.is_large_binary(column.type)
    offsets = np.frombuffer(starts, np.int64)[rows] if is_large else np.frombuffer(starts, np.int32)[rows]
    return memoryview(values or b"").cast("B"), offsets


def plain_labels(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Returns labels as int64, or as text: names, and truth values."""
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    return column.cast(pa.int64() if pa.types.is_integer(column.type) else pa.string())


def partition_value(path: str, name: str) -> str | None:
    """Returns VALUE of a folder NAME=VALUE in the path of a file, as Hive and Spark write it; None for no value."""
    found = re.findall(rf"(?:^|/){re.escape(name)}=([^/]*)(?=/)", path)
    return urllib.parse.unquote(found[-1]) if found and found[-1] != "__HIVE_DEFAULT_PARTITION__" else None


class Window(io.RawIOBase):
    """A stretch of a file in memory that answers as the whole file; reading outside the stretch is an error."""

    def __init__(self, data: bytes | memoryview, offset: int, size: int) -> None:
        """Holds `data`, which lies at `offset` of a file of `size` bytes."""
        self._data, self._offset, self._size, self._place = memoryview(data), offset, size, 0

    def readable(self) -> bool:
        """True: this is for reading only."""
        return True

    def seekable(self) -> bool:
        """True."""
        return True

    def tell(self) -> int:
        """Returns the place in the whole file."""
        return self._place

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Moves to a place in the whole file."""
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self._size}[whence]
        self._place = base + offset
        return self._place

    def read(self, size: int = -1) -> bytes:
        """Reads from the stretch."""
        end = self._size if size < 0 else min(self._place + size, self._size)
        start = self._place
        if start < self._offset or end > self._offset + len(self._data):
            raise ValueError(f"bytes {start} to {end} lie outside of the stretch at {self._offset} + {len(self._data)}")
        self._place = end
        return bytes(self._data[start - self._offset : end - self._offset])


def read_columns(window: Window, footer: pq.FileMetaData, index: int, columns: Sequence[str]) -> pa.Table:
    """Returns columns of row group `index`, whose bytes are in memory.

    Raises:
        pyarrow.ArrowException, OSError, ValueError: The bytes are no such row group.
    """
    if not footer.row_group(index).num_rows:  # some writers leave a dictionary there, and no page
        return footer.schema.to_arrow_schema().empty_table()
    file = pq.ParquetFile(pa.PythonFile(window), metadata=footer, pre_buffer=False)
    return file.read_row_group(index, columns=list(columns), use_threads=False)
