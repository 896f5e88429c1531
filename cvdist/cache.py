"""The local cache: parts of shards, exactly as they were fetched, on a disk of this node, shared by all its ranks.

There is a file for each part, named by the sha256 of its shard, so a name means the same bytes in every data set and process, and
nothing has to be invalidated. A file appears under its name only when it is complete, and is compared with the manifest's checksum
whenever it is read; where it is damaged it goes. Whatever is wrong with the disk costs speed, never a run.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import logging
import os
import time
import uuid
from collections.abc import Iterator
from typing import TYPE_CHECKING

import xxhash

from cvdist.errors import ConfigError

if TYPE_CHECKING:
    from typing_extensions import Buffer

log = logging.getLogger("cvdist.cache")

# Where files have to go, room is made for more than one, because looking for them means looking at all.
ROOM_SHARE = 0.05
# How long a disk that takes no more is left alone.
PAUSE_S = 60.0
# How long to wait for another process that counts; a frozen one holds its lock for ever.
LOCK_WAIT_S = 2.0
LOCK_POLL_S = 0.002


class LocalCache:
    """Parts of shards on local disk. Threads may share it, forked children may go on with it, and processes may share its folder.

    A full cache evicts what nobody has used since this object was made, the longest unused first, and then takes no more. To
    replace parts that this run has used would be worse: an epoch reads each part once in an order of its own, so that with
    room for half of the data the longest unused would be evicted in time for 15 % hits, where keeping them gives 50 %.
    """

    def __init__(self, path: str, limit_bytes: int) -> None:
        """Opens a cache, and deletes what killed processes have left unfinished in it.

        Args:
            path: An existing folder that nothing else uses.
            limit_bytes: Most bytes of the parts in it, whoever has put them there.

        Raises:
            ConfigError: The folder is not there or cannot be written.
        """
        self._path, self._limit_bytes = path, limit_bytes
        self._parts_path, self._unfinished_path = os.path.join(path, "parts"), os.path.join(path, "unfinished")
        self._is_counted = self._has_warned = False
        self._paused_until_s = 0.0
        self._opened_s = time.time()
        if not os.path.isdir(path):
            raise ConfigError(f"loader.cache_path: {path} is no folder; expected an existing one; make or mount it")
        try:
            os.makedirs(self._parts_path, exist_ok=True)
            os.makedirs(self._unfinished_path, exist_ok=True)
            with contextlib.suppress(TimeoutError), self._lock():
                os.close(self._create_unfinished(0)[1])
                self._delete_abandoned()
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                self._refuse(error)
                return
            raise ConfigError(
                f"loader.cache_path: {path} cannot be written ({error.strerror}); expected a folder on a disk of this node with"
                " room; choose another"
            ) from None

    def get(self, name: str, num_bytes: int, xxh3: str) -> bytes | None:
        """Returns a part; None where it is not there, or not (any more) what was written.

        Args:
            name: Of the part.
            num_bytes: Its size.
            xxh3: Its xxHash3-64, in hex.
        """
        place = self._place(name)
        try:
            with open(place, "rb", buffering=0) as file:
                data = file.read(num_bytes + 1)
                if xxhash.xxh3_64_hexdigest(data) == xxh3:
                    os.utime(file.fileno())  # when it was used last
                    return data
            problem = f"{len(data)} bytes that differ from their checksum"
        except FileNotFoundError:
            return None
        except OSError as error:
            problem = str(error.strerror)
        log.warning("%s: damaged in the local cache (%s); it is fetched anew", place, problem)
        with contextlib.suppress(OSError):
            os.unlink(place)
        return None

    def put(self, name: str, data: Buffer) -> None:
        """Keeps a part if there is room for it; a disk that cannot take it is warned about once."""
        place = self._place(name)
        if time.monotonic() < self._paused_until_s or os.path.exists(place):
            return
        try:
            self._write(place, memoryview(data))
        except OSError as error:
            self._refuse(error)

    def _place(self, name: str) -> str:
        """Returns the file of a part: a hash, because names come from manifests, which may hold anything."""
        hashed = hashlib.sha256(name.encode()).hexdigest()
        return os.path.join(self._parts_path, hashed[:2], hashed[2:])

    def _pause(self) -> None:
        """Leaves the disk alone for a while, but for reading."""
        self._paused_until_s = time.monotonic() + PAUSE_S

    def _refuse(self, error: OSError) -> None:
        """Leaves a disk alone that takes no more, and says so once."""
        self._pause()
        if not self._has_warned:
            self._has_warned = True
            log.warning("%s: the local cache takes no more (%s); going on without", self._path, error.strerror)

    def _write(self, place: str, data: memoryview) -> None:
        """Writes a part under another name, then gives it its own."""
        with self._lock() as lock:
            if not self._reserve(lock, len(data)):
                self._pause()
                return
            path, file = self._create_unfinished(len(data))
        try:
            left = data
            while left:
                left = left[os.write(file, left) :]
            os.makedirs(os.path.dirname(place), exist_ok=True)
            os.rename(path, place)
        except OSError:
            os.unlink(path)
            raise
        finally:
            os.close(file)

    def _create_unfinished(self, num_bytes: int) -> tuple[str, int]:
        """Makes a file, whose lock says that its writer lives, and whose size says what it will take; returns path and descriptor.

        To be called under the lock of the cache, so that nobody sees it before it is locked.
        """
        path = os.path.join(self._unfinished_path, uuid.uuid4().hex)
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(file, num_bytes)
        except OSError:
            os.close(file)
            raise
        return path, file

    @contextlib.contextmanager
    def _lock(self) -> Iterator[int]:
        """Holds the lock of the cache, which the kernel takes from a killed process; yields its file.

        Raises:
            TimeoutError: Another process does not let go of it.
        """
        file = os.open(os.path.join(self._path, "used-bytes"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            end_s = time.monotonic() + LOCK_WAIT_S
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > end_s:
                        raise TimeoutError(0, f"its lock was not free for {LOCK_WAIT_S:g} s") from None
                    time.sleep(LOCK_POLL_S)
            try:
                yield file
            finally:
                fcntl.flock(file, fcntl.LOCK_UN)  # also in a child that was forked just now
        finally:
            os.close(file)

    def _reserve(self, lock: int, num_bytes: int) -> bool:
        """Notes that a part will be written and makes room for it; says whether there is any.

        What is noted before a write that fails counts as used until somebody looks at all files: never too little.
        """
        noted = os.pread(lock, 32, 0)
        used_bytes = int(noted) if noted.strip().isdigit() else self._limit_bytes
        if not self._is_counted or used_bytes + num_bytes > self._limit_bytes:
            used_bytes = self._make_room(num_bytes)
            self._is_counted = True
        fits = used_bytes + num_bytes <= self._limit_bytes
        os.pwrite(lock, b"%020d\n" % (used_bytes + num_bytes * fits), 0)
        return fits

    def _make_room(self, num_bytes: int) -> int:
        """Looks at all files and evicts some where there is not room for `num_bytes`; returns how many bytes are in use then."""
        used_bytes = self._delete_abandoned()
        parts = []
        for folder in os.scandir(self._parts_path):
            for entry in os.scandir(folder.path):
                with contextlib.suppress(FileNotFoundError):
                    status = entry.stat()
                    parts.append((status.st_mtime, status.st_size, entry.path))
                    used_bytes += status.st_size
        if used_bytes + num_bytes <= self._limit_bytes:
            return used_bytes
        room_bytes = max(num_bytes, int(ROOM_SHARE * self._limit_bytes))
        for used_s, size_bytes, path in sorted(parts):
            if used_bytes + room_bytes <= self._limit_bytes or used_s >= self._opened_s:
                break
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            used_bytes -= size_bytes
        return used_bytes

    def _delete_abandoned(self) -> int:
        """Deletes unfinished files whose writers are gone; returns the bytes of the others."""
        num_bytes = 0
        for entry in os.scandir(self._unfinished_path):
            with contextlib.suppress(FileNotFoundError):
                file = os.open(entry.path, os.O_RDONLY | os.O_CLOEXEC)
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    os.unlink(entry.path)
                except BlockingIOError:
                    num_bytes += os.fstat(file).st_size
                finally:
                    os.close(file)
        return num_bytes
