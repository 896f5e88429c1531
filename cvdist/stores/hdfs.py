"""HDFS, through hdfs-native: no JVM, no libhdfs."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from cvdist.deadline import Limits, UnavailableError
from cvdist.errors import ConfigError, StorageError
from cvdist.stores.base import FileInfo, explain_common, first_line, parent_path

# How long the first connection to a NameNode may take. Without it a host that drops packets takes the kernel's two minutes.
CONNECT_S = 2.5
# hdfs-native's own retries are cut short (its defaults take 175 s to report a dead NameNode), because ours come on top.
OPTIONS = {
    "dfs.client.failover.max.attempts": "2",
    "dfs.client.failover.sleep.base.millis": "100",
    "dfs.client.failover.sleep.max.millis": "1000",
}
# hdfs-native asks a silent DataNode up to three times before it turns to another replica: that must fit in our deadline.
SILENCES_PER_DEADLINE = 5
# hdfs-native keeps idle connections to DataNodes for 3 s, and a forked child inherits them.
IDLE_CONNECTION_S = 3.5
MAX_REASON = 200
# What a NameNode says while it starts or hands over; everything else it refuses for good.
HDFS_PASSING = ("RetriableException", "StandbyException", "SafeModeException", "ObserverRetryOnActiveException")


_making_client = threading.Lock()
_clients: list[Any] = []
_event_loops: set[int] = set()
_usable_from_s = 0.0


class HdfsReader:
    """A file on HDFS."""

    def __init__(self, client: Any, path: str, *, one_piece: bool) -> None:
        """Opens the file; one that is read in several pieces costs another question to the NameNode."""
        self._client, self._path = client, path
        self._version = None if one_piece else self._current_version()
        self._raw = client.read(path)
        self._is_suspect = False
        self.size_bytes = len(self._raw)

    def _current_version(self) -> tuple[int, int]:
        """Returns what tells this file from another that takes its name."""
        status = self._client.get_file_info(self._path)
        return status.length, status.modification_time

    def read_at(self, offset: int, length: int) -> bytes:
        """Returns exactly `length` bytes; native code panics beyond the end of the file, so callers stay within."""
        if self._is_suspect:
            self._open_again()
        try:
            data: bytes = self._raw.read_range(offset, length)
        except (OSError, RuntimeError):
            self._is_suspect = True
            raise
        return data

    def _open_again(self) -> None:
        """Asks the NameNode after a failure where the blocks are now; while it is down, the places known before must do."""
        with contextlib.suppress(OSError, RuntimeError):
            raw = self._client.read(self._path)
            if len(raw) != self.size_bytes or (self._version and self._version != self._current_version()):
                raise StorageError(
                    f"{self._path}: was replaced or appended to while it was read; expected a file that stays; read it again"
                )
            self._raw, self._is_suspect = raw, False

    def close(self) -> None:
        """Does nothing: a reader holds no connection between calls."""


class HdfsWriter:
    """A new file on HDFS."""

    def __init__(self, raw: Any, complete: Callable[[], object] = lambda: None) -> None:
        """Takes hdfs-native's writer, and what is to be done once the file is complete."""
        self._raw = raw
        self._complete = complete

    def write(self, data: memoryview) -> None:
        """Appends all of `data`."""
        self._raw.write(bytes(data))

    def close(self) -> None:
        """Waits until the DataNodes and the NameNode have everything."""
        self._raw.close()
        self._complete()

    def abandon(self) -> None:
        """Drops the writer; were the file still there, this would complete it, cut as it is."""
        self._raw = None


class HdfsStore:
    """One HDFS, through hdfs-native: no JVM, no libhdfs."""

    def __init__(self, authority: str) -> None:
        """Makes a client; it connects when it is first used.

        Raises:
            UnavailableError: Nobody listens there.
            ConfigError: The name has no port and no Hadoop configuration explains it.
        """
        self.root, self.authority = f"hdfs://{authority}", authority
        match = re.fullmatch(r"(.*?)(?::(\d+))?", authority)
        self.host, self.port = (match[1], int(match[2]) if match[2] else None) if match else (authority, None)
        if reason := self._unreachable():
            raise UnavailableError(self._down(reason))
        try:
            self._client = _make_client(self.host, self.port)
        except RuntimeError as error:
            raise ConfigError(
                f"{self.root} has no port and no Hadoop configuration names it ({first_line(error)}); expected"
                f" hdfs://host:port or a nameservice of HADOOP_CONF_DIR; use {self.root}:8020 if that is the NameNode's port"
            ) from error

    def _unreachable(self) -> str:
        """Says why nobody can connect to the NameNode; empty when somebody can, or when its address is configured elsewhere."""
        if self.port is None:
            return ""
        try:
            with socket.create_connection((self.host.strip("[]"), self.port), timeout=CONNECT_S):
                return ""
        except OSError as error:
            return (error.strerror or str(error)).lower()

    def _down(self, reason: str) -> str:
        """Words the message about a NameNode that is not there."""
        return (
            f"{self.root} does not answer ({reason}); expected a running NameNode at {self.authority};"
            " start it or correct the URL"
        )

    def _describe(self, status: Any) -> FileInfo:
        """Turns hdfs-native's words into ours."""
        return FileInfo(
            self.root + status.path, 0 if status.isdir else status.length, status.isdir, status.modification_time / 1000
        )

    def info(self, path: str) -> FileInfo:
        """Describes a file or directory."""
        return self._describe(self._client.get_file_info(path))

    def list_chunks(self, path: str) -> Iterator[list[FileInfo]]:
        """Yields the entries of a directory, as many at a time as the NameNode sends at once."""
        chunk = []
        for status in self._client.list_status(path, False):
            if status.path == path and path != "/":
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path)
            chunk.append(self._describe(status))
            if len(chunk) == 1000:
                yield chunk
                chunk = []
        yield chunk

    def open_reader(self, path: str, *, one_piece: bool) -> HdfsReader:
        """Opens a file."""
        return HdfsReader(self._client, path, one_piece=one_piece)

    def open_writer(self, path: str, *, after_failure: bool) -> HdfsWriter:
        """Creates a file, and the directories above it.

        The name is ours alone: where an answer was lost and the call is repeated, the first file is replaced.

        hdfs-native cannot leave out a DataNode that is dead while the NameNode does not know it yet (10 minutes by default): on
        a small cluster most new blocks meet it. So after a failure one replica is written, which meets it the least, and
        the NameNode makes the others as soon as the file is complete.
        """
        import hdfs_native

        raw = self._client.create(path, hdfs_native.WriteOptions(overwrite=True))
        if not after_failure:
            return HdfsWriter(raw)
        replication = self._client.get_file_info(path).replication
        raw = self._client.create(path, hdfs_native.WriteOptions(overwrite=True, replication=1))
        return HdfsWriter(raw, lambda: self._client.set_replication(path, replication))

    def rename(self, source: str, target: str, *, is_dir: bool, overwrite: bool) -> None:
        """Moves a file or directory; the NameNode does it in one step."""
        if parent_path(target) != parent_path(source):
            self.make_dirs(parent_path(target))
        self._client.rename(source, target, overwrite and not is_dir)

    def delete_steps(self, path: str, *, recursive: bool) -> Iterator[None]:
        """Deletes a file or directory; the NameNode does it in one step."""
        if not self._client.delete(path, recursive):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        yield

    def make_dirs(self, path: str) -> None:
        """Creates a directory and those above it."""
        self._client.mkdirs(path, 0o755, True)

    def identity(self, path: str) -> str:
        """Returns the path: links are off in HDFS."""
        return path

    def explain(self, error: BaseException, path: str) -> StorageError:
        """Reads the Java or Rust error inside of hdfs-native's bare ones."""
        text = first_line(error)
        remote = re.match(r'(?:Fatal)?RPCError\("([\w.$]+)", "(.*?)(?:\\n|"\)|$)', text)
        if remote:
            java, text = remote[1].rsplit(".", 1)[-1], remote[2]
            if "could only be written to" in text:
                return UnavailableError(
                    f"{self.root}{path}: no DataNode takes another block ({text}); expected live DataNodes with room; see"
                    " `hdfs dfsadmin -report`"
                )
            if java in HDFS_PASSING:
                return UnavailableError(
                    f"{self.root}{path}: the NameNode is not ready ({java}: {text}); try again later"
                )
            if java == "PathIsNotEmptyDirectoryException":
                return explain_common(OSError(errno.ENOTEMPTY, ""), self.root + path)
            if java == "ParentNotDirectoryException":
                return explain_common(OSError(errno.ENOTDIR, ""), self.root + path)
            if java == "AccessControlException":
                return explain_common(OSError(errno.EACCES, ""), self.root + path)
            return StorageError(f"{self.root}{path}: the NameNode refused ({java}: {text})")
        if isinstance(error, FileNotFoundError) and "is not a file" in text:
            return explain_common(OSError(errno.EISDIR, ""), self.root + path)
        if isinstance(error, FileExistsError) and ("not a directory" in text or "as a directory" in text):
            return StorageError(f"{self.root}{path}: {text}; choose another name or delete it first")
        named = isinstance(error, OSError) and isinstance(
            error, (FileNotFoundError, FileExistsError, PermissionError, NotADirectoryError, IsADirectoryError)
        )
        if named or not isinstance(error, (OSError, RuntimeError)):
            return explain_common(error, self.root + path)
        reason = self._unreachable()
        if reason:
            return UnavailableError(self._down(reason))
        text = re.sub(r'^\w+\("(.*)"\)$', r"\1", text)  # how Rust prints its errors
        text = text if len(text) < MAX_REASON else text[:MAX_REASON] + "..."
        return UnavailableError(f"{self.root}{path}: HDFS failed ({text}); expected healthy DataNodes; see their logs")


def _make_client(host: str, port: int | None) -> Any:
    """Makes hdfs-native's client, as fsspec's registered file system does."""
    import fsspec

    time.sleep(max(0.0, _usable_from_s - time.monotonic()))
    silence_ms = int(1000 * Limits.from_environment().deadline_s / SILENCES_PER_DEADLINE)
    options = {**OPTIONS, "dfs.client.socket-timeout": str(max(silence_ms, 100))}
    with _making_client:
        before = _open_event_loops()
        filesystem = fsspec.filesystem("hdfs", host=host, port=port, skip_instance_cache=True, **options)
        _event_loops.update(_open_event_loops() - before)
    # Its own methods would parse paths as URLs and cut them at # and ?.
    _clients.append(filesystem.client)
    return filesystem.client


def _open_event_loops() -> set[int]:
    """Returns the file descriptors of this process that are event loops of native code."""
    found = set()
    for descriptor in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # closed meanwhile
            if os.readlink(f"/proc/self/fd/{descriptor}") == "anon_inode:[eventpoll]":
                found.add(int(descriptor))
    return found


def _disarm_inherited_clients() -> None:
    """Makes sure that a forked child leaves its parent's connections alone.

    Measured without this: a child that reads takes an idle connection that the parent uses as well, a child that drops one
    unregisters it in the event loop that both share, so that the parent hangs, and a child that exits waits for threads that only
    its parent has. So the child's copies of the event loops are replaced, its first client waits until the idle connections
    have expired, and the inherited clients are never freed.
    """
    global _making_client, _usable_from_s  # noqa: PLW0603 - the child's own state
    _making_client = threading.Lock()
    if not _clients:
        return
    nothing = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    for descriptor in _event_loops:
        os.dup2(nothing, descriptor, inheritable=False)
    os.close(nothing)
    _event_loops.clear()
    for client in _clients:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(client))
    _clients.clear()
    _usable_from_s = time.monotonic() + IDLE_CONNECTION_S


os.register_at_fork(after_in_child=_disarm_inherited_clients)
