"""Shards to row groups in memory: the bytes as fetch.py verified them, parsed as Parquet, image by image against its own checksum."""

from __future__ import annotations

import dataclasses
import io
import os
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from cvdist.errors import DataError
from cvdist.fetch import Fetcher
from cvdist.shards import Manifest, row_group_offsets

COLUMNS = ("label", "image", "height", "width", "image_xxh3")


@dataclasses.dataclass(frozen=True)
class RowGroup:
    """The columns of one row group in memory; `images` are its stored images behind each other, cut at `offsets`."""

    where: str
    images: memoryview
    offsets: npt.NDArray[np.int32]
    labels: npt.NDArray[np.int32]
    heights: npt.NDArray[np.int32]
    widths: npt.NDArray[np.int32]
    checksums: npt.NDArray[np.int64]

    def image(self, row: int) -> memoryview:
        """Returns the stored bytes of one image.

        Raises:
            DataError: They are not the bytes that were written.
        """
        data = self.images[self.offsets[row] : self.offsets[row + 1]]
        if xxhash.xxh3_64_intdigest(data) != int(self.checksums[row]) & 0xFFFFFFFFFFFFFFFF:
            raise DataError(
                f"{self.where}, row {row}: the image differs from its checksum; expected what prepare wrote; restore the shard"
            )
        return data


class ShardReader:
    """Reads row groups of the shards of a split, by their number counted through all shards."""

    def __init__(self, data_url: str, manifest: Manifest, split: str) -> None:
        """Takes the split's shards from the manifest; opens nothing yet."""
        self._fetcher = Fetcher(data_url)
        self._places = [
            (shard, index, offset)
            for shard in manifest.splits[split].shards
            for index, offset in enumerate(row_group_offsets(shard))
        ]

    def num_bytes(self, group: int) -> int:
        """Returns the stored bytes of a row group."""
        shard, index, _ = self._places[group]
        return shard.row_group_bytes[index]

    def read(self, group: int) -> RowGroup:
        """Reads one row group.

        Raises:
            DataError: The shard is missing, or not the one that the manifest names.
        """
        shard, index, offset = self._places[group]
        where = f"{self._fetcher.url(shard)}, row group {index}"
        try:
            footer = pq.read_metadata(pa.BufferReader(self._fetcher.footer(shard)))
            data, is_intact = self._fetcher.row_group(shard, index)
            table = read_columns(Window(data, offset, shard.num_bytes), footer, index, COLUMNS)
        except (pa.ArrowException, OSError, ValueError) as error:
            raise DataError(
                f"{where} cannot be read ({error}); expected the shard that prepare wrote; restore it or prepare again"
            ) from None
        rows = row_group(where, table)
        if not is_intact:
            for row in range(table.num_rows):
                rows.image(row)  # names the row, where it is an image that is damaged
            raise DataError(
                f"{where} differs from its checksum; expected what prepare wrote; restore the shard or prepare again"
            )
        return rows


def row_group(where: str, table: pa.Table) -> RowGroup:
    """Returns the columns of a table of one row group, of which errors speak as `where`."""
    images = table["image"].combine_chunks()
    images = images.chunk(0) if isinstance(images, pa.ChunkedArray) else images
    _, offsets, values = images.buffers()
    columns = {name: table[name].to_numpy() for name in ("label", "height", "width", "image_xxh3")}
    return RowGroup(
        where=where,
        images=memoryview(values).cast("B"),
        offsets=np.frombuffer(offsets, np.int32)[images.offset : images.offset + len(images) + 1],
        labels=columns["label"],
        heights=columns["height"],
        widths=columns["width"],
        checksums=columns["image_xxh3"],
    )


class Window(io.RawIOBase):
    """A stretch of a file in memory that answers as the whole file; reading outside the stretch is an error."""

    def __init__(self, data: bytes, offset: int, size: int) -> None:
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
    file = pq.ParquetFile(pa.PythonFile(window), metadata=footer)
    return file.read_row_group(index, columns=list(columns), use_threads=False)
