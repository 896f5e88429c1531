"""What every store does, and the words they share."""

from __future__ import annotations

import dataclasses
import errno
from collections.abc import Iterator
from typing import Protocol

from cvdist.errors import AlreadyExistsError, NotFoundError, StorageError


@dataclasses.dataclass(frozen=True)
class FileInfo:
    """What a file system says about a file or directory; the size of a directory is 0."""

    url: str
    size_bytes: int
    is_dir: bool
    modified_s: float


class Reader(Protocol):
    """An open file that is read at offsets; several threads may read at once."""

    size_bytes: int

    def read_at(self, offset: int, length: int) -> bytes:
        """Returns exactly `length` bytes; the range lies within the file."""

    def close(self) -> None:
        """Gives the file back."""


class Writer(Protocol):
    """A new file that is written from start to end."""

    def write(self, data: memoryview) -> None:
        """Appends all of `data`."""

    def close(self) -> None:
        """Makes what was written durable and gives the file back."""

    def abandon(self) -> None:
        """Gives the file back without finishing it; it has been deleted."""


class Store(Protocol):
    """One file system; paths start with `/` except where the scheme has buckets."""

    root: str

    def info(self, path: str) -> FileInfo:
        """Describes a file or directory, following links."""

    def list_chunks(self, path: str) -> Iterator[list[FileInfo]]:
        """Yields the entries of a directory in no order, some at a time."""

    def open_reader(self, path: str, *, one_piece: bool) -> Reader:
        """Opens a file; with `one_piece` for a single read."""

    def open_writer(self, path: str, *, after_failure: bool) -> Writer:
        """Creates a file, and the directories above it; with `after_failure` in the way least likely to fail again."""

    def rename(self, source: str, target: str, *, is_dir: bool, overwrite: bool) -> None:
        """Moves a file or directory in one step; refuses an existing target unless `overwrite`."""

    def delete_steps(self, path: str, *, recursive: bool) -> Iterator[None]:
        """Deletes a file or directory, yielding now and then where that takes long; raises FileNotFoundError when there is none."""

    def make_dirs(self, path: str) -> None:
        """Creates a directory and those above it; existing ones are fine."""

    def identity(self, path: str) -> str:
        """Returns one name for all the paths that links make of one directory."""

    def explain(self, error: BaseException, path: str) -> StorageError:
        """Turns an error of this file system into one of cvdist's, on one line."""


def parent_path(path: str) -> str:
    """Returns the directory that holds a path."""
    return path.rsplit("/", 1)[0] or "/"


def first_line(error: BaseException) -> str:
    """Returns an error's text without the Java stack that follows it."""
    lines = str(error).splitlines()
    return lines[0].strip() if lines and lines[0].strip() else type(error).__name__


COMMON: dict[type[OSError], str] = {
    NotADirectoryError: "is not a directory, or lies below a file; expected a directory; correct the URL",
    IsADirectoryError: "is a directory; expected a file; correct the URL",
    PermissionError: "access is denied; expected permission for this user; change the owner or the mode, or run as its owner",
}


def explain_common(error: BaseException, url: str) -> StorageError:
    """Words an error that means the same on every file system."""
    if isinstance(error, FileNotFoundError):
        return NotFoundError(f"{url}: not found; expected an existing file or directory; correct the URL")
    if isinstance(error, FileExistsError):
        return AlreadyExistsError(f"{url}: already exists; expected a free name; choose another or delete it first")
    if isinstance(error, OSError) and error.errno == errno.ENOTEMPTY:
        return StorageError(f"{url}: the directory is not empty; expected an empty one; delete it with what it holds")
    for kind, text in COMMON.items():
        if isinstance(error, kind):
            return StorageError(f"{url}: {text}")
    if isinstance(error, UnicodeError):
        return StorageError(f"{url!a}: the name is not valid Unicode; expected one that is; rename the file")
    return StorageError(f"{url}: {type(error).__name__}: {first_line(error)}")
