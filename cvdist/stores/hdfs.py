"""HDFS, through hdfs-native: no JVM, no libhdfs."""

from __future__ import annotations

import errno
import os
import re
import socket
from collections.abc import Iterator
from typing import Any

from cvdist.deadline import UnavailableError
from cvdist.errors import ConfigError, StorageError
from cvdist.stores.base import FileInfo, explain_common, first_line, parent_path

# How long the first connection to a NameNode may take. Without it a host that drops packets takes the kernel's two minutes.
CONNECT_S = 2.5
# hdfs-native's own retries are cut short (its defaults take 175 s to report a dead NameNode), because ours come on top. A DataNode
# that answers nothing for 8 s is given up while our default deadline of 30 s still leaves time for another replica.
HDFS_OPTIONS = {
    "dfs.client.failover.max.attempts": "2",
    "dfs.client.failover.sleep.base.millis": "100",
    "dfs.client.failover.sleep.max.millis": "1000",
    "dfs.client.socket-timeout": "8000",
}
# What a NameNode says while it starts or hands over; everything else it refuses for good.
HDFS_PASSING = ("RetriableException", "StandbyException", "SafeModeException", "ObserverRetryOnActiveException")


class HdfsReader:
    """A file on HDFS."""

    def __init__(self, raw: Any) -> None:
        """Takes hdfs-native's reader."""
        self._raw = raw
        self.size_bytes = len(raw)

    def read_at(self, offset: int, length: int) -> bytes:
        """Returns exactly `length` bytes; native code panics beyond the end of the file, so callers stay within."""
        data: bytes = self._raw.read_range(offset, length)
        return data

    def close(self) -> None:
        """Does nothing: a reader holds no connection between calls."""


class HdfsWriter:
    """A new file on HDFS."""

    def __init__(self, raw: Any) -> None:
        """Takes hdfs-native's writer."""
        self._raw = raw

    def write(self, data: memoryview) -> None:
        """Appends all of `data`."""
        self._raw.write(bytes(data))

    def close(self) -> None:
        """Waits until the DataNodes and the NameNode have everything."""
        self._raw.close()

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
        import fsspec

        self.root, self.authority = f"hdfs://{authority}", authority
        self.host, _, port = authority.rpartition(":") if ":" in authority else (authority, "", "")
        self.port = int(port) if port else None
        reason = self._unreachable()
        if reason:
            raise UnavailableError(self._down(reason))
        try:
            filesystem = fsspec.filesystem(
                "hdfs", host=self.host, port=self.port, skip_instance_cache=True, **HDFS_OPTIONS
            )
        except RuntimeError as error:
            raise ConfigError(
                f"{self.root} has no port and no Hadoop configuration names it ({first_line(error)}); expected"
                f" hdfs://host:port or a nameservice of HADOOP_CONF_DIR; use {self.root}:8020 if that is the NameNode's port"
            ) from error
        # The file system itself would parse paths as URLs and cut them at # and ?.
        self._client = filesystem.client

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

    def open_reader(self, path: str) -> HdfsReader:
        """Opens a file."""
        return HdfsReader(self._client.read(path))

    def open_writer(self, path: str) -> HdfsWriter:
        """Creates a file, and the directories above it."""
        import hdfs_native

        # The name is ours alone: where an answer was lost and the call is repeated, the first file is replaced.
        return HdfsWriter(self._client.create(path, hdfs_native.WriteOptions(overwrite=True)))

    def rename(self, source: str, target: str, *, is_dir: bool, overwrite: bool) -> None:
        """Moves a file or directory; the NameNode does it in one step."""
        self._client.mkdirs(parent_path(target), 0o755, True)
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
        return UnavailableError(f"{self.root}{path}: HDFS failed ({text}); expected healthy DataNodes; see their logs")
