"""Files hashed on their way: as they are written, and as they are read."""

from __future__ import annotations

import hashlib
import io
from typing import Any, BinaryIO

import xxhash

PIECE_BYTES = 1 << 20


class HashingStream(io.RawIOBase):
    """Passes writes on while hashing and counting them, as a whole and since the last cut."""

    def __init__(self, stream: BinaryIO | io.RawIOBase) -> None:
        """Wraps a writable binary stream."""
        self._stream = stream
        self.sha256 = hashlib.sha256()
        self.num_bytes = 0
        self._cut_bytes = 0
        self._xxh3 = xxhash.xxh3_64()

    def writable(self) -> bool:
        """True: this is for writing only."""
        return True

    def write(self, data: Any) -> int:
        """Writes all of `data`."""
        self._stream.write(data)
        self.sha256.update(data)
        self._xxh3.update(data)
        self.num_bytes += len(data)
        return len(data)

    def cut(self) -> tuple[int, str]:
        """Returns how many bytes were written since the last cut, and their xxHash3-64 in hex."""
        piece = self.num_bytes - self._cut_bytes, self._xxh3.hexdigest()
        self._cut_bytes, self._xxh3 = self.num_bytes, xxhash.xxh3_64()
        return piece

    def tell(self) -> int:
        """Bytes written so far."""
        return self.num_bytes


class HashingReader:
    """Reads a stream from its first byte on while hashing all of it."""

    def __init__(self, stream: BinaryIO | io.BufferedReader) -> None:
        """Wraps a readable binary stream."""
        self._stream = stream
        self.sha256 = hashlib.sha256()
        self.num_bytes = 0

    def take(self, num_bytes: int) -> bytes:
        """Returns the next bytes; fewer where the stream ends."""
        data = self._stream.read(num_bytes)
        self.sha256.update(data)
        self.num_bytes += len(data)
        return data

    def skip_to(self, place: int) -> None:
        """Reads on to a place behind this one, or to the end."""
        while self.num_bytes < place and self.take(min(PIECE_BYTES, place - self.num_bytes)):
            pass
