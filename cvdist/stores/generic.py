"""Whatever else fsspec serves."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from typing import Any

from cvdist.errors import StorageError
from cvdist.stores.base import FileInfo, explain_common, parent_path


class FsspecReader:
    """A file of any fsspec file system."""

    def __init__(self, filesystem: Any, path: str) -> None:
        """Looks at the file; every read opens a range of its own, so that threads do not share a position."""
        info = filesystem.info(path)
        if info["type"] == "directory":
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
        self._filesystem, self._path = filesystem, path
        self.size_bytes = int(info["size"])

    def read_at(self, offset: int, length: int) -> bytes:
        """Returns exactly `length` bytes."""
        return bytes(self._filesystem.cat_file(self._path, start=offset, end=offset + length))

    def close(self) -> None:
        """Does nothing: no read leaves anything open."""


class FsspecWriter:
    """A new file of any fsspec file system."""

    def __init__(self, raw: Any) -> None:
        """Takes fsspec's file."""
        self._raw = raw

    def write(self, data: memoryview) -> None:
        """Appends all of `data`."""
        self._raw.write(data)

    def close(self) -> None:
        """Sends what is left."""
        self._raw.close()

    def abandon(self) -> None:
        """Drops the file, where fsspec can."""
        if hasattr(self._raw, "discard"):
            with contextlib.suppress(OSError, NotImplementedError):
                self._raw.discard()


class FsspecStore:
    """Any other file system that fsspec serves. A rename is a copy here, and two writers may both believe they were first.

    fsspec's own rm and mv take names for patterns (`*`, `?`, `[`) and may hit others: only calls without patterns are used.
    """

    def __init__(self, scheme: str, authority: str) -> None:
        """Makes the file system."""
        import fsspec

        self.root = f"{scheme}://"
        self._authority = authority
        self._filesystem = fsspec.filesystem(scheme)

    def _describe(self, info: dict[str, Any]) -> FileInfo:
        """Turns fsspec's words into ours; every file system has its own for the time."""
        is_dir = info["type"] == "directory"
        times = (info.get(key) for key in ("mtime", "modified", "LastModified", "last_modified", "created"))
        modified = next((value for value in times if value is not None), 0.0)
        modified_s = float(modified.timestamp() if hasattr(modified, "timestamp") else modified)
        name = str(info["name"]).rstrip("/")
        if not self._authority and not name.startswith("/"):
            name = "/" + name
        return FileInfo(self.root + name, 0 if is_dir else int(info["size"] or 0), is_dir, modified_s)

    def info(self, path: str) -> FileInfo:
        """Describes a file or directory."""
        return self._describe(self._filesystem.info(path))

    def list_chunks(self, path: str) -> Iterator[list[FileInfo]]:
        """Yields the entries of a directory."""
        entries = [self._describe(info) for info in self._filesystem.ls(path, detail=True)]
        if [entry.url for entry in entries] == [self.root + path] and not entries[0].is_dir:
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path)
        yield [entry for entry in entries if entry.url != self.root + path]

    def open_reader(self, path: str, *, one_piece: bool) -> FsspecReader:
        """Opens a file."""
        return FsspecReader(self._filesystem, path)

    def open_writer(self, path: str, *, after_failure: bool) -> FsspecWriter:
        """Creates a file, and the directories above it."""
        self._filesystem.makedirs(parent_path(path), exist_ok=True)
        return FsspecWriter(self._filesystem.open(path, "wb"))

    def rename(self, source: str, target: str, *, is_dir: bool, overwrite: bool) -> None:
        """Moves a file or directory, looking for the target first."""
        if (is_dir or not overwrite) and self._filesystem.exists(target):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), target)
        if is_dir:
            self._filesystem.makedirs(target, exist_ok=False)
            for entry in self._filesystem.ls(source, detail=True):
                inner = entry["name"].rstrip("/")
                moved = target + "/" + inner.rpartition("/")[2]
                self.rename(inner, moved, is_dir=entry["type"] == "directory", overwrite=False)
            self._filesystem.rmdir(source)
        else:
            self._filesystem.makedirs(parent_path(target), exist_ok=True)
            self._filesystem.cp_file(source, target)
            self._filesystem.rm_file(source)

    def delete_steps(self, path: str, *, recursive: bool) -> Iterator[None]:
        """Deletes a file or directory."""
        if self._filesystem.info(path)["type"] != "directory":
            self._filesystem.rm_file(path)
            return
        entries = self._filesystem.ls(path, detail=False)
        if entries and not recursive:
            raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), path)
        for entry in entries:
            yield from self.delete_steps(entry.rstrip("/"), recursive=True)
            yield
        self._filesystem.rmdir(path)

    def make_dirs(self, path: str) -> None:
        """Creates a directory and those above it."""
        if self._filesystem.isfile(path):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path)
        self._filesystem.makedirs(path, exist_ok=True)

    def identity(self, path: str) -> str:
        """Returns the path: fsspec knows no links."""
        return path

    def explain(self, error: BaseException, path: str) -> StorageError:
        """Takes the error's own words."""
        return explain_common(error, self.root + path)
