"""Local disk."""

from __future__ import annotations

import contextlib
import errno
import os
import stat as stat_bits
from collections.abc import Iterator

from cvdist.errors import StorageError
from cvdist.stores.base import FileInfo, explain_common

# What the kernel says when a file system has no hard links.
NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)


class LocalReader:
    """A file on local disk."""

    def __init__(self, path: str) -> None:
        """Opens the file."""
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        status = os.fstat(self._fd)
        self.size_bytes = status.st_size
        if stat_bits.S_ISDIR(status.st_mode):
            self.close()
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)

    def read_at(self, offset: int, length: int) -> bytes:
        """Returns exactly `length` bytes."""
        data = os.pread(self._fd, length, offset)
        while len(data) < length:
            more = os.pread(self._fd, length - len(data), offset + len(data))
            if not more:
                break  # it has been cut since it was opened; the caller compares lengths
            data += more
        return data

    def close(self) -> None:
        """Closes the file."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __del__(self) -> None:
        """Closes a file that nobody closed."""
        with contextlib.suppress(AttributeError):  # when the file could not be opened
            self.close()


class LocalWriter:
    """A new file on local disk."""

    # Bytes are sent to the disk as they come, or the last call would have to wait for all of them at once.
    SYNC_BYTES = 64 << 20

    def __init__(self, path: str) -> None:
        """Creates the file; it must not exist."""
        os.makedirs(os.path.dirname(path), exist_ok=True)
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        self._unsynced_bytes = 0

    def write(self, data: memoryview) -> None:
        """Appends all of `data`."""
        view = data
        while view:
            view = view[os.write(self._fd, view) :]
        self._unsynced_bytes += len(data)
        if self._unsynced_bytes >= self.SYNC_BYTES:
            os.fdatasync(self._fd)
            self._unsynced_bytes = 0

    def close(self) -> None:
        """Waits until the disk has everything."""
        os.fsync(self._fd)
        self.abandon()

    def abandon(self) -> None:
        """Closes the file."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


class LocalStore:
    """The disks of this machine, and whatever is mounted there."""

    root = "file://"

    def info(self, path: str) -> FileInfo:
        """Describes a file or directory, following links."""
        try:
            return self._describe(path, os.stat(path))
        except NotADirectoryError as error:  # a file lies where the path expects a directory
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path) from error

    def _describe(self, path: str, status: os.stat_result) -> FileInfo:
        """Turns the kernel's words into ours."""
        is_dir = stat_bits.S_ISDIR(status.st_mode)
        return FileInfo(self.root + path, 0 if is_dir else status.st_size, is_dir, status.st_mtime)

    def list_chunks(self, path: str) -> Iterator[list[FileInfo]]:
        """Yields the entries of a directory; a link that leads nowhere is listed as the small file it is."""
        chunk = []
        with os.scandir(path) as entries:
            for entry in entries:
                try:
                    status = entry.stat()
                except OSError:
                    try:
                        status = entry.stat(follow_symlinks=False)
                    except FileNotFoundError:
                        continue  # deleted since the directory was opened
                chunk.append(self._describe(os.path.join(path, entry.name), status))
                if len(chunk) == 1000:
                    yield chunk
                    chunk = []
        yield chunk

    def open_reader(self, path: str, *, one_piece: bool) -> LocalReader:
        """Opens a file."""
        return LocalReader(path)

    def open_writer(self, path: str, *, after_failure: bool) -> LocalWriter:
        """Creates a file, and the directories above it."""
        return LocalWriter(path)

    def rename(self, source: str, target: str, *, is_dir: bool, overwrite: bool) -> None:
        """Moves a file or directory and makes the move durable."""
        os.makedirs(os.path.dirname(target), exist_ok=True)
        if overwrite and not is_dir:
            os.replace(source, target)
        elif is_dir:
            if os.path.lexists(target):  # os.rename would replace an empty directory
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), target)
            os.rename(source, target)
        else:
            self._rename_new(source, target)
        for folder in {os.path.dirname(source), os.path.dirname(target)}:
            self._sync_dir(folder)

    def _rename_new(self, source: str, target: str) -> None:
        """Moves a file to a name that must be free: a hard link fails where os.rename would replace."""
        try:
            os.link(source, target, follow_symlinks=False)
        except OSError as error:
            if error.errno not in NO_LINKS:
                raise
            self._rename_reserved(source, target)
        else:
            os.unlink(source)

    def _rename_reserved(self, source: str, target: str) -> None:
        """Does the same without hard links: an empty file reserves the name for the moment until the real one replaces it."""
        os.close(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC))
        try:
            os.replace(source, target)
        except OSError:
            os.unlink(target)
            raise

    def _sync_dir(self, path: str) -> None:
        """Makes the names in a directory durable, where the file system can do that."""
        with contextlib.suppress(OSError):
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)

    def delete_steps(self, path: str, *, recursive: bool) -> Iterator[None]:
        """Deletes a file, a link (not what it leads to) or a directory."""
        if not stat_bits.S_ISDIR(os.lstat(path).st_mode):
            os.unlink(path)
        elif recursive:
            yield from self._delete_tree(path)
        else:
            os.rmdir(path)

    def _delete_tree(self, path: str) -> Iterator[None]:
        """Deletes a directory with what it holds; another process may be deleting it, too."""
        with os.scandir(path) as entries:
            for count, entry in enumerate(list(entries)):
                with contextlib.suppress(FileNotFoundError):
                    if entry.is_dir(follow_symlinks=False):
                        yield from self._delete_tree(entry.path)
                    else:
                        os.unlink(entry.path)
                if count % 1000 == 999:
                    yield
        os.rmdir(path)
        yield

    def make_dirs(self, path: str) -> None:
        """Creates a directory and those above it."""
        os.makedirs(path, exist_ok=True)

    def identity(self, path: str) -> str:
        """Returns the path without links."""
        return os.path.realpath(path)

    def explain(self, error: BaseException, path: str) -> StorageError:
        """Says what the disk did; a full one with the room that is left."""
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return StorageError(
                f"{self.root}{path}: the disk is full ({_free_bytes(path)} bytes free there); expected room for the file;"
                " delete something or choose another place"
            )
        return explain_common(error, self.root + path)


def _free_bytes(path: str) -> int:
    """Returns the room on the disk that holds, or would hold, a path."""
    while path != "/" and not os.path.isdir(path):
        path = os.path.dirname(path)
    status = os.statvfs(path)
    return status.f_bavail * status.f_frsize
