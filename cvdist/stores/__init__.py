"""The file systems behind storage.py: local disk, HDFS, and whatever else fsspec serves.

A store works on paths, blocks as long as its file system does, and raises that file system's errors; `explain` turns
those into cvdist's. Deadlines, retries and the atomic write are storage.py's, the only user of these modules.
"""

from __future__ import annotations

from cvdist.stores.base import FileInfo, Reader, Store, Writer
from cvdist.stores.generic import FsspecStore
from cvdist.stores.hdfs import HdfsStore
from cvdist.stores.local import LocalStore

__all__ = ["FileInfo", "Reader", "Store", "Writer", "known_schemes", "open_store"]


def open_store(scheme: str, authority: str) -> Store:
    """Makes the store of a scheme and, for those that have one, a host.

    Raises:
        StorageError: Its client cannot be made or cannot connect.
    """
    if scheme == "file":
        return LocalStore()
    if scheme == "hdfs":
        return HdfsStore(authority)
    return FsspecStore(scheme, authority)


def known_schemes() -> list[str]:
    """Returns the schemes that fsspec can serve here."""
    import fsspec

    return sorted(fsspec.available_protocols())
