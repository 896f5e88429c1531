"""The open files of storage.py: reading with read-ahead, writing in bounded pieces."""

from __future__ import annotations

import functools
import io
import os
from typing import TYPE_CHECKING

from cvdist import deadline
from cvdist.deadline import Call, Caller, Limits, UnavailableError
from cvdist.errors import StorageError

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from cvdist.stores import Reader, Writer

# The first piece after a jump; pieces then grow fourfold while reading goes straight on.
FIRST_PIECE_BYTES = 256 * 1024
# Where a DataNode is dead, hdfs-native hangs less often in writes that fit in its queue of 100 packets of 64 KiB.
WRITE_PIECE_BYTES = Limits.chunk_bytes // 2


class ReadAhead(io.RawIOBase):
    """A seekable file that fetches the next piece in another thread while the caller uses this one.

    Two pieces are held at most, the one in use and the next; a jump drops both. Use it through io.BufferedReader, which makes
    small reads cheap and lets threads share it.
    """

    def __init__(self, raw: Reader, caller: Caller, readahead_bytes: int) -> None:
        """Takes an open file; with `readahead_bytes` 0 nothing is fetched that was not asked for."""
        self._raw = raw
        self._caller = caller
        self._readahead_bytes = readahead_bytes
        self._position = 0
        self._piece, self._piece_start = b"", 0
        self._next: tuple[int, Call[bytes]] | None = None
        self._process = os.getpid()

    def readable(self) -> bool:
        """Is true."""
        return True

    def seekable(self) -> bool:
        """Is true."""
        return True

    def tell(self) -> int:
        """Returns the position of the next byte."""
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Moves to a position, which may lie beyond the end."""
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._raw.size_bytes}[whence]
        if base + offset < 0:
            raise ValueError(f"negative position {base + offset}")
        self._position = base + offset
        return self._position

    def readinto(self, buffer: Buffer) -> int:
        """Fills the front of `buffer`; 0 is the end of the file."""
        view = memoryview(buffer).cast("B")
        part = self._take(len(view))
        view[: len(part)] = part
        return len(part)

    def readall(self) -> bytes:
        """Returns the rest of the file."""
        parts = []
        while part := self._take(self._raw.size_bytes):
            parts.append(bytes(part) if len(part) < len(self._piece) else self._piece)
        return b"".join(parts)

    def _take(self, wanted_bytes: int) -> memoryview:
        """Returns the bytes at the position, at most `wanted_bytes`, and moves behind them; none at the end of the file."""
        if self._position >= self._raw.size_bytes or not wanted_bytes:
            return memoryview(b"")
        if not 0 <= self._position - self._piece_start < len(self._piece):
            self._load(wanted_bytes)
        start = self._position - self._piece_start
        part = memoryview(self._piece)[start : start + wanted_bytes]
        self._position += len(part)
        return part

    def _load(self, wanted_bytes: int) -> None:
        """Makes the piece at the position the current one, and starts to fetch the next where reading goes straight on."""
        if os.getpid() != self._process:
            raise StorageError(
                f"{self._caller.url}: was opened before a fork; expected a file that this process opened; open it in the child"
            )
        position, left = self._position, self._raw.size_bytes - self._position
        straight_on = position == self._piece_start + len(self._piece)
        fetched, self._next = self._next if straight_on else None, None
        self._piece = b""
        if fetched:
            length, call = fetched
            try:
                piece = self._caller.finish(call)
            except UnavailableError:
                piece = self._caller.call(self._read(position, length))
        else:
            first_bytes = max(wanted_bytes, min(FIRST_PIECE_BYTES, self._readahead_bytes))
            length = min(left, first_bytes, Limits.chunk_bytes)
            piece = self._caller.call(self._read(position, length))
        check_length(self._caller.url, position, length, len(piece))
        ahead_bytes = min(left - length, 4 * length, self._readahead_bytes)
        if straight_on and ahead_bytes:
            self._next = ahead_bytes, deadline.start(self._read(position + length, ahead_bytes))
        self._piece, self._piece_start = piece, position

    def _read(self, position: int, length: int) -> functools.partial[bytes]:
        """Returns the call that reads one piece."""
        return functools.partial(self._raw.read_at, position, length)

    def close(self) -> None:
        """Drops what was read; a piece under way keeps the file open until it is there."""
        if not self.closed:
            super().close()
            if self._next is None:
                self._raw.close()
            self._piece, self._next = b"", None


class RangeReader:
    """An open file of which stretches are read, in no order; threads may share it, a forked child may not."""

    def __init__(self, raw: Reader, caller: Caller) -> None:
        """Takes an open file."""
        self._raw = raw
        self._caller = caller
        self.size_bytes = raw.size_bytes

    def read(self, offset: int, length: int) -> bytes:
        """Returns exactly `length` bytes from `offset` on.

        Raises:
            StorageError: The file is shorter, or the file system failed.
        """
        if not 0 <= offset <= offset + length <= self.size_bytes:
            raise StorageError(
                f"{self._caller.url}: bytes {offset} to {offset + length} are asked for, the file has {self.size_bytes};"
                " expected a range within it; check what named the range"
            )
        pieces = []
        for start in range(offset, offset + length, Limits.chunk_bytes):
            piece_bytes = min(Limits.chunk_bytes, offset + length - start)
            pieces.append(self._caller.call(functools.partial(self._raw.read_at, start, piece_bytes)))
            check_length(self._caller.url, start, piece_bytes, len(pieces[-1]))
        return b"".join(pieces)

    def close(self) -> None:
        """Gives the file back; without this it is given back when nobody holds it any more."""
        self._raw.close()


def check_length(url: str, offset: int, expected_bytes: int, found_bytes: int) -> None:
    """Refuses a read that came back short.

    Raises:
        StorageError: The file has shrunk since it was opened.
    """
    if found_bytes != expected_bytes:
        raise StorageError(
            f"{url}: {found_bytes} bytes at offset {offset}, expected {expected_bytes}; the file was cut while it was read;"
            " write new data under a new name"
        )


class FileWriter(io.RawIOBase):
    """The file that storage.create gives: takes any bytes-like object and passes it on in pieces of a bounded size.

    Attributes:
        may_repeat: The write has failed, nothing is left of it, and the same data may be written anew.
    """

    may_repeat = False

    def __init__(self, raw: Writer, caller: Caller) -> None:
        """Takes a new file."""
        self._raw = raw
        self._caller = caller
        self._pending = bytearray()
        self._written_bytes = 0

    def writable(self) -> bool:
        """Is true."""
        return True

    def tell(self) -> int:
        """Returns how many bytes were written so far."""
        return self._written_bytes

    def write(self, data: Buffer) -> int:
        """Takes all of `data` and returns its length in bytes."""
        if self.closed:
            raise ValueError(f"{self._caller.url}: the file is closed")
        view = memoryview(data)
        view = view.cast("B") if view.c_contiguous else memoryview(view.tobytes())
        for start in range(0, len(view), WRITE_PIECE_BYTES):
            piece = view[start : start + WRITE_PIECE_BYTES]
            if len(self._pending) + len(piece) > WRITE_PIECE_BYTES:
                self._send()
            if len(piece) == WRITE_PIECE_BYTES:
                self._caller.once(functools.partial(self._raw.write, piece))
            else:
                self._pending += piece
        self._written_bytes += len(view)
        return len(view)

    def _send(self) -> None:
        """Passes on what is held."""
        pending, self._pending = self._pending, bytearray()
        if pending:
            self._caller.once(functools.partial(self._raw.write, memoryview(pending)))

    def finish(self) -> int:
        """Passes on the rest, waits until it is durable and returns the length of the file."""
        self._send()
        self._caller.once(self._raw.close)
        super().close()
        return self._written_bytes
