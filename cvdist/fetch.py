"""The bytes of row groups and footers, each compared with the checksum that the manifest has of it."""

from __future__ import annotations

import xxhash

from cvdist import storage
from cvdist.errors import DataError, NotFoundError
from cvdist.shards import Shard, footer_offset, row_group_offsets


class Fetcher:
    """Fetches stretches of the shards below one data set. Threads may share it."""

    def __init__(self, data_url: str) -> None:
        """Opens nothing yet."""
        self._url = data_url
        self._footers: dict[str, bytes] = {}  # parsed when used: parsed ones take fifteen times the room

    def url(self, shard: Shard) -> str:
        """Returns where a shard lies."""
        return storage.join(self._url, shard.path)

    def row_group(self, shard: Shard, index: int) -> tuple[bytes, bool]:
        """Returns the bytes of a row group, and whether they are those that were written.

        Raises:
            DataError: The shard is missing.
            StorageError: The file system failed.
        """
        try:
            data = storage.read_range(self.url(shard), row_group_offsets(shard)[index], shard.row_group_bytes[index])
        except NotFoundError:
            raise self._missing(shard) from None
        return data, xxhash.xxh3_64_hexdigest(data) == shard.row_group_xxh3[index]

    def footer(self, shard: Shard) -> bytes:
        """Returns the footer of a shard, read once; threads may read it twice, to the same effect.

        Raises:
            DataError: The shard is missing, or not the one that the manifest names.
            StorageError: The file system failed.
        """
        if shard.path not in self._footers:
            url, start = self.url(shard), footer_offset(shard)
            try:
                size = storage.stat(url).size_bytes
                if size != shard.num_bytes:
                    raise DataError(
                        f"{url} holds {size} bytes; expected {shard.num_bytes}; restore the shard or prepare again"
                    )
                footer = storage.read_range(url, start, size - start)
            except NotFoundError:
                raise self._missing(shard) from None
            if xxhash.xxh3_64_hexdigest(footer) != shard.footer_xxh3:
                raise DataError(
                    f"{url}: the footer differs from its checksum; expected what prepare wrote; restore the shard or prepare again"
                )
            self._footers[shard.path] = footer
        return self._footers[shard.path]

    def _missing(self, shard: Shard) -> DataError:
        """Words the error about a shard that is not there."""
        return DataError(
            f"{self.url(shard)} does not exist; expected the shard that the manifest names; restore it or prepare again"
        )
