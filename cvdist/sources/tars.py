"""The tar format: where the bytes of each member lie, read from the headers alone. Nothing is unpacked.

Source: POSIX.1-2017, pax, "ustar Interchange Format" and "pax Extended Header"; GNU tar's manual, "Basic Tar Format".
"""

from __future__ import annotations

import dataclasses
import io
import re
import tarfile
from collections.abc import Iterator
from typing import NoReturn

from cvdist import storage
from cvdist.errors import DataError

BLOCK_BYTES = 512
MAX_NAME_BYTES = 1 << 20  # of the long names and extended headers that come before a member
NEAR_BYTES = 64 * 1024  # what lies so near is read on the way
MIN_FETCH_BYTES, MAX_FETCH_BYTES = 4096, 1 << 20
FILE_TYPES = (b"0", b"\0", b"7")
LINK_TYPES = (b"1", b"2")
FOLDER_TYPE = b"5"
NO_DATA_TYPES = (*LINK_TYPES, b"3", b"4", FOLDER_TYPE, b"6")


@dataclasses.dataclass(frozen=True)
class Member:
    """An entry of an archive.

    Attributes:
        name: As it is written; bytes that are no UTF-8 are surrogates.
        kind: file, folder, link or other.
        offset: Where its data begins in the outermost archive.
        size_bytes: Length of its data.
    """

    name: str
    kind: str
    offset: int
    size_bytes: int


class HeaderFile:
    """A file of which small parts are read in ascending order: alone where they lie far apart, at a stretch where they are near."""

    def __init__(self, url: str) -> None:
        """Opens the file."""
        self.url = url
        # Without its buffer, which would fetch 128 KiB for each header.
        self._raw: io.RawIOBase = storage.open_read(url, readahead_bytes=0).detach()
        self.size_bytes = self._raw.seek(0, io.SEEK_END)
        self._piece, self._start = b"", 0
        self._fetch_bytes = MIN_FETCH_BYTES

    def __enter__(self) -> HeaderFile:
        """Returns itself."""
        return self

    def __exit__(self, *error: object) -> None:
        """Closes the file."""
        self._raw.close()

    def read_at(self, offset: int, length: int) -> bytes:
        """Returns the bytes at an offset, fewer at the end of the file."""
        start = offset - self._start
        if not 0 <= start <= start + length <= len(self._piece):
            gap = offset - self._start - len(self._piece)
            is_near = -length <= gap <= NEAR_BYTES
            self._fetch_bytes = min(2 * self._fetch_bytes, MAX_FETCH_BYTES) if is_near else MIN_FETCH_BYTES
            self._piece, self._start, start = self._fetch(offset, max(length, self._fetch_bytes)), offset, 0
        return self._piece[start : start + length]

    def _fetch(self, offset: int, length: int) -> bytes:
        self._raw.seek(offset)
        pieces: list[bytes] = []
        while length and (piece := self._raw.read(length)):
            pieces.append(piece)
            length -= len(piece)
        return b"".join(pieces)


def members(file: HeaderFile, start: int = 0, end: int | None = None, name: str = "") -> Iterator[Member]:
    """Yields the members of an archive in order.

    Args:
        file: The file it lies in.
        start: Where it begins in the file.
        end: Where it ends; by default with the file.
        name: What it is called, where it is not the whole file.

    Raises:
        DataError: It is damaged, cut off, or compressed.
    """
    position, end = start, file.size_bytes if end is None else end
    archive = f"{file.url}{'/' + name if name else ''}"
    local: dict[str, str] = {}
    everywhere: dict[str, str] = {}
    while True:
        block = file.read_at(position, BLOCK_BYTES) if position + BLOCK_BYTES <= end else b""
        if not block:
            fail(
                archive,
                position - start,
                "the archive ends here without the zeros that close it",
                "copy it again; it is cut off",
            )
        if not any(block):
            break
        header, position = parse_header(archive, block, position - start), position + BLOCK_BYTES
        if header.type == tarfile.GNUTYPE_SPARSE:
            position += sparse_bytes(file, block, position)
        size_bytes = header.size if header.type not in NO_DATA_TYPES else 0
        if header.isreg() and "size" in (extended := everywhere | local):
            size_bytes = number(archive, extended["size"], position - start)
        if size_bytes < 0 or position + size_bytes > end:
            fail(
                archive, position - start, f"{header.name!a} has {size_bytes} bytes and {end - position} are left",
                "copy it again; it is cut off or damaged",
            )  # fmt: skip
        if header.type in (b"x", b"X", b"g", b"L", b"K"):
            data = file.read_at(position, name_bytes(archive, size_bytes, position - start))
            if header.type in (b"L", b"K"):
                local["path" if header.type == b"L" else "linkpath"] = decode(data.split(b"\0")[0])
            else:
                (everywhere if header.type == b"g" else local).update(pax_records(archive, data, position - start))
        else:
            extended = everywhere | local
            yield Member(extended.get("path", header.name), kind_of(header, extended), position, size_bytes)
            local = {}
        position += -(-size_bytes // BLOCK_BYTES) * BLOCK_BYTES
    require_zeros(file, archive, position, start, end)


def parse_header(archive: str, block: bytes, position: int) -> tarfile.TarInfo:
    """Reads the 512 bytes before a member."""
    try:
        return tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except (tarfile.HeaderError, ValueError) as error:
        compressed = re.match(rb"\x1f\x8b|BZh|\xfd7zXZ|\x28\xb5\x2f\xfd", block) if position == 0 else None
        if compressed:
            raise refuse_compressed(archive) from None
        fail(archive, position, f"no header of a member ({error})", "copy it again; it is damaged, or no tar file")


def refuse_compressed(archive: str) -> DataError:
    """Words the error about a compressed archive."""
    return DataError(
        f"{archive}: is compressed, and the members of a compressed archive cannot be read by ranges; expected a plain tar file;"
        " unpack the compression, for example by gunzip"
    )


def fail(archive: str, position: int, found: str, fix: str) -> NoReturn:
    """Raises the DataError about a damaged archive."""
    raise DataError(f"{archive}: byte {position}: {found}; expected a whole tar file; {fix}")


def kind_of(header: tarfile.TarInfo, extended: dict[str, str]) -> str:
    """Says what a member is."""
    if header.type in LINK_TYPES:
        return "link"
    if header.type == FOLDER_TYPE:
        return "folder"
    is_sparse = any(key.startswith("GNU.sparse") for key in extended)
    return "file" if header.type in FILE_TYPES and not is_sparse else "other"


def name_bytes(archive: str, size_bytes: int, position: int) -> int:
    """Returns the size of a long name or extended header, where it is one that can be."""
    if size_bytes > MAX_NAME_BYTES:
        fail(archive, position, f"a name of {size_bytes} bytes", "make it again with names that fit")
    return size_bytes


def decode(data: bytes) -> str:
    """Returns a name; bytes that are no UTF-8 become surrogates."""
    return data.decode("utf-8", "surrogateescape")


def number(archive: str, text: str, position: int) -> int:
    """Returns the number that an extended header holds."""
    if not re.fullmatch(r"[0-9]{1,18}", text):
        fail(archive, position, f"the size {text[:40]!a}", "copy it again; it is damaged")
    return int(text)


def pax_records(archive: str, data: bytes, position: int) -> dict[str, str]:
    """Reads an extended header: records of LENGTH, a space, KEY=VALUE and a line feed."""
    found, start = {}, 0
    while start < len(data) and data[start]:
        match = re.compile(rb"(\d{1,8}) ([^=]+)=").match(data, start)
        stop = start + int(match[1]) if match else 0
        if not match or not match.end() < stop <= len(data) or data[stop - 1 : stop] != b"\n":
            fail(archive, position + start, "no record of an extended header", "copy it again; it is damaged")
        found[decode(match[2])] = decode(data[match.end() : stop - 1])
        start = stop
    return found


def sparse_bytes(file: HeaderFile, block: bytes, position: int) -> int:
    """Returns the length of the further headers of a sparse file of old GNU tars."""
    length, is_extended = 0, block[482]
    while is_extended:
        further = file.read_at(position + length, BLOCK_BYTES)
        length += BLOCK_BYTES
        is_extended = further[504] if len(further) == BLOCK_BYTES else 0
    return length


def require_zeros(file: HeaderFile, archive: str, position: int, start: int, end: int) -> None:
    """Refuses an archive with anything behind the zeros that close it, as one that others were appended to."""
    while position < end:
        data = file.read_at(position, min(MAX_FETCH_BYTES, end - position))
        if any(data):
            fail(
                archive, position - start, "data behind the zeros that close the archive",
                "join archives by tar --concatenate, or leave them apart",
            )  # fmt: skip
        position += len(data) or end
