"""The bytes of row groups and footers, each compared with the checksum that the manifest has of it."""

from __future__ import annotations

import collections
import dataclasses
import logging
import os
import threading
import time

import xxhash

from cvdist import storage
from cvdist.cache import LocalCache
from cvdist.errors import DataError, NotFoundError
from cvdist.shards import MAGIC, Shard, footer_offset, row_group_offsets

log = logging.getLogger("cvdist.fetch")

# Shards held open: on HDFS each saves a question to the NameNode, on local disk half of the calls.
MAX_OPEN_FILES = 128
# A read that takes longer may have waited for a dead DataNode: the file is opened anew the next time, which asks the NameNode anew.
SLOW_READ_S = 1.0
# Footers held in memory; parsed ones would take fifteen times the room.
MAX_FOOTER_BYTES = 4 << 20


@dataclasses.dataclass
class Counters:
    """What a fetcher has done.

    Attributes:
        bytes_read: Bytes read from the data set itself.
        cache_bytes: Bytes read from the local cache instead.
        cache_hits: Row groups and footers found in the local cache.
        cache_misses: Those that were looked for there in vain.
        retries: Times that bytes differed from their checksum and were read once more.
    """

    bytes_read: int = 0
    cache_bytes: int = 0
    cache_hits: int = 0
    cache_misses: int = 0
    retries: int = 0


@dataclasses.dataclass(frozen=True)
class Part:
    """A stretch of a shard that has a checksum of its own; `name` is for the cache, `what` for people."""

    name: str
    what: str
    offset: int
    num_bytes: int
    xxh3: str


class Fetcher:
    """Fetches stretches of the shards below one data set. Threads may share it, and forked children may go on with it."""

    def __init__(self, data_url: str, cache: LocalCache | None = None) -> None:
        """Opens nothing yet; what is in `cache` is taken from there, what is not is put there."""
        self._url, self._cache = data_url, cache
        self._counters = Counters()
        self._checked: set[str] = set()  # the shards whose footers are right
        self._footers: collections.OrderedDict[str, bytes | memoryview] = collections.OrderedDict()
        self._start_in_this_process()

    def _start_in_this_process(self) -> None:
        """Forgets the files that a parent process has opened, and its lock, which one of its threads may have held."""
        self._lock, self._process = threading.Lock(), os.getpid()
        self._files: collections.OrderedDict[str, storage.RangeReader] = collections.OrderedDict()

    def _guard(self) -> threading.Lock:
        """Returns the lock of what threads share."""
        if self._process != os.getpid():
            self._start_in_this_process()
        return self._lock

    @property
    def counters(self) -> Counters:
        """What it has done so far."""
        with self._guard():
            return dataclasses.replace(self._counters)

    def _count(self, **changes: int) -> None:
        """Adds to the counters."""
        with self._guard():
            for name, change in changes.items():
                setattr(self._counters, name, getattr(self._counters, name) + change)

    def url(self, shard: Shard) -> str:
        """Returns where a shard lies."""
        return storage.join(self._url, shard.path)

    def row_group(self, shard: Shard, index: int) -> tuple[bytes | memoryview, bool]:
        """Returns the bytes of a row group, and whether they are those that were written; if not, they have been read twice.

        Raises:
            DataError: The shard is missing, or not the one that the manifest names.
            StorageError: The file system failed.
        """
        offset, num_bytes = row_group_offsets(shard)[index], shard.row_group_bytes[index]
        return self._part(shard, Part(str(index), f"row group {index}", offset, num_bytes, shard.row_group_xxh3[index]))

    def check_footer(self, shard: Shard) -> None:
        """Compares the footer of a shard with its checksum, once; threads may do so twice, to the same effect.

        Raises:
            DataError: The shard is missing, or not the one that the manifest names.
            StorageError: The file system failed.
        """
        if shard.path not in self._checked:
            self.footer(shard)
            self._checked.add(shard.path)

    def footer(self, shard: Shard) -> bytes | memoryview:
        """Returns the footer of a shard; the last ones are held.

        Raises:
            DataError: The shard is missing, or not the one that the manifest names.
            StorageError: The file system failed.
        """
        with self._guard():
            if (known := self._footers.get(shard.path)) is not None:
                self._footers.move_to_end(shard.path)
                return known
        start = footer_offset(shard)
        part = Part("footer", "the footer", start, shard.num_bytes - start, shard.footer_xxh3)
        footer, is_intact = self._part(shard, part)
        if not is_intact:
            raise DataError(
                f"{self.url(shard)}: the footer differs from its checksum; expected what prepare wrote;"
                " restore the shard or prepare again"
            )
        with self._guard():
            self._footers[shard.path] = footer
            while len(self._footers) > 1 and sum(map(len, self._footers.values())) > MAX_FOOTER_BYTES:
                self._footers.popitem(last=False)
        return footer

    def _part(self, shard: Shard, part: Part) -> tuple[bytes | memoryview, bool]:
        """Returns a part from the cache or from the shard, and whether it is what was written."""
        if self._cache is None:
            return self._read(shard, part)
        name = f"{shard.sha256}-{part.name}"
        cached = self._cache.get(name, part.num_bytes, part.xxh3)
        if cached is not None:
            self._count(cache_hits=1, cache_bytes=len(cached))
            return cached, True
        self._count(cache_misses=1)
        data, is_intact = self._read(shard, part)
        if is_intact:
            self._cache.put(name, data)
        return data, is_intact

    def _read(self, shard: Shard, part: Part) -> tuple[bytes | memoryview, bool]:
        """Reads a part from the shard; where it differs from its checksum, once more from the file opened anew."""
        magic, data, is_intact = self._read_once(shard, part, anew=False)
        if not is_intact or magic != MAGIC:
            log.warning("%s, %s: not what was written; it is read once more", self.url(shard), part.what)
            self._count(retries=1)
            magic, data, is_intact = self._read_once(shard, part, anew=True)
        if is_intact and magic != MAGIC:
            raise DataError(
                f"{self.url(shard)} begins with {magic!r}; expected {MAGIC!r}; restore the shard or prepare again"
            )
        return data, is_intact

    def _read_once(self, shard: Shard, part: Part, *, anew: bool) -> tuple[bytes, bytes | memoryview, bool]:
        """Reads a part; the magic, which no checksum covers, together with the part that follows on it.

        Returns:
            The magic, as read or as it should be; the part; and whether this is the one that was written.
        """
        start = 0 if part.offset == len(MAGIC) else part.offset
        file, begun_s = self._open(shard, anew=anew), time.monotonic()
        found = file.read(start, part.offset + part.num_bytes - start)
        self._count(bytes_read=len(found))
        if time.monotonic() - begun_s > SLOW_READ_S:
            with self._guard():
                self._files.pop(shard.path, None)
        magic, data = (MAGIC, found) if start else (found[: len(MAGIC)], memoryview(found)[len(MAGIC) :])
        return magic, data, xxhash.xxh3_64_hexdigest(data) == part.xxh3

    def _open(self, shard: Shard, *, anew: bool) -> storage.RangeReader:
        """Returns a shard held open, or opens it."""
        with self._guard():
            if not anew and (file := self._files.get(shard.path)):
                self._files.move_to_end(shard.path)
                return file
        url = self.url(shard)
        try:
            file = storage.open_ranges(url)
        except NotFoundError:
            raise DataError(
                f"{url} does not exist; expected the shard that the manifest names; restore it or prepare again"
            ) from None
        if file.size_bytes != shard.num_bytes:
            raise DataError(
                f"{url} holds {file.size_bytes} bytes; expected {shard.num_bytes}; restore the shard or prepare again"
            )
        with self._guard():
            self._files[shard.path] = file  # one that goes is closed when the last thread that reads it lets go
            while len(self._files) > MAX_OPEN_FILES:
                self._files.popitem(last=False)
        return file
