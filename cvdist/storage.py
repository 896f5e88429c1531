"""The only door to URLs: open, list, write atomically, rename, delete; on local disk, HDFS and whatever fsspec serves.

Every call blocks a thread of ours, never the caller's, and ends at a deadline (`Limits.deadline_s`); signal handlers run while it
waits. What may be repeated is repeated a bounded number of times, with a warning for each. A file appears under its name only
when it is complete.

    with storage.create("hdfs://namenode:8020/data/a.bin") as file:
        file.write(b"...")
    with storage.open_read("hdfs://namenode:8020/data/a.bin") as file:
        file.read(3)

URLs are `file:///path` or `hdfs://host:port/path`. Nothing in them is decoded: `%`, `#` and `?` are characters of a name.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import logging
import os
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, TypeVar

from cvdist import deadline
from cvdist.deadline import MIB, Caller, Limits, TimedOutError, UnavailableError
from cvdist.errors import AlreadyExistsError, ConfigError, NotFoundError, StorageError
from cvdist.stores import FileInfo, Store, open_store
from cvdist.streams import FileWriter, RangeReader, ReadAhead, check_length
from cvdist.urls import Location, check_url, join, name, parent, parse, relative

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from cvdist.stores import Writer

__all__ = [
    "FileInfo", "FileWriter", "Limits", "RangeReader", "TimedOutError", "UnavailableError", "check_url", "create", "delete",
    "exists", "join", "list_dir", "make_dirs", "name", "open_ranges", "open_read", "parent", "read_bytes", "read_files",
    "read_range", "read_text", "relative", "rename", "scan_dir", "stat", "walk_files", "write_bytes", "write_text",
]  # fmt: skip

T = TypeVar("T")
log = logging.getLogger("cvdist.storage")

# How long a failed write waits for its temporary file to be deleted; the deletion goes on in any case.
CLEAN_UP_S = 5.0
_stores: dict[tuple[int, str, str], Store] = {}


class FailedWriteError(StorageError):
    """A file could not be written to its end, though the file system is there."""


def _store(at: Location) -> Store:
    """Returns the file system of a URL, one per process: after a fork an inherited client would hang."""
    key = (os.getpid(), at.scheme, at.authority)
    store = _stores.get(key)
    return store if store else _stores.setdefault(key, open_store(at.scheme, at.authority))


def _caller(at: Location) -> Caller:
    """Returns what makes the calls about a URL."""
    return Caller(at.url, lambda error: _store(at).explain(error, at.path))


def _call(at: Location, function: Callable[[Store], T]) -> T:
    """Makes a call that may be repeated."""
    return _caller(at).call(lambda: function(_store(at)))


def _once(at: Location, function: Callable[[Store], T]) -> T:
    """Makes a call that may not be repeated."""
    return _caller(at).once(lambda: function(_store(at)))


def stat(url: str) -> FileInfo:
    """Describes a file or directory, following links.

    Raises:
        NotFoundError: There is none.
    """
    place = parse(url)
    return _call(place, lambda store: store.info(place.path))


def exists(url: str) -> bool:
    """Says whether there is a file or directory."""
    try:
        stat(url)
    except NotFoundError:
        return False
    return True


def list_dir(url: str) -> list[FileInfo]:
    """Lists the entries of a directory by name (order of code points), hidden and temporary ones too.

    Raises:
        NotFoundError: There is no such directory.
        StorageError: It is a file.
    """
    place = parse(url)

    def attempt() -> list[FileInfo]:
        # One call for each chunk, so that a large directory is no reason to time out.
        chunks = _once(place, lambda store: store.list_chunks(place.path))
        entries: list[FileInfo] = []
        while (chunk := _once(place, lambda store: next(chunks, None))) is not None:
            entries += chunk
        return sorted(entries, key=lambda entry: name(entry.url))

    return _caller(place).again(attempt)


def scan_dir(url: str) -> Iterator[FileInfo]:
    """Yields the entries of a directory in no order, hidden and temporary ones too; a long directory is never held as a whole.

    A listing that fails after its first entries is not repeated: they have been yielded.

    Raises:
        NotFoundError: There is no such directory.
        StorageError: It is a file.
    """
    place = parse(url)

    def begin() -> tuple[Iterator[list[FileInfo]], list[FileInfo] | None]:
        chunks = _once(place, lambda store: store.list_chunks(place.path))
        return chunks, _once(place, lambda store: next(chunks, None))

    chunks, chunk = _caller(place).again(begin)
    while chunk is not None:
        yield from chunk
        chunk = _once(place, lambda store: next(chunks, None))


def walk_files(url: str) -> Iterator[FileInfo]:
    """Yields the files below a directory in no order, holding none of its directories as a whole.

    Links to directories are followed; one that leads back to a directory above it is skipped with a warning.
    """
    place = parse(url)
    yield from _walk(place, (_call(place, lambda store: store.identity(place.path)),))


def _walk(place: Location, above: tuple[str, ...]) -> Iterator[FileInfo]:
    """Walks one directory; `above` names those it lies in."""
    for entry in scan_dir(place.url):
        if not entry.is_dir:
            yield entry
            continue
        inner = parse(entry.url)
        identity = _call(inner, functools.partial(_identity, inner.path))
        if identity in above:
            log.warning("%s leads back to a directory above it: skipped", entry.url)
        else:
            yield from _walk(inner, (*above, identity))


def _identity(path: str, store: Store) -> str:
    """Returns the one name of a directory that links may give several."""
    return store.identity(path)


def open_read(url: str, readahead_bytes: int = 8 * MIB) -> io.BufferedReader:
    """Opens a file for reading; while it is read straight on, the next piece is fetched in another thread.

    Args:
        url: The file.
        readahead_bytes: Most bytes fetched ahead; at most twice as much is held. 0 fetches only what is asked for.

    Raises:
        NotFoundError: There is none.
        StorageError: It is a directory.
    """
    place = parse(url)
    raw = _call(place, lambda store: store.open_reader(place.path, one_piece=False))
    return io.BufferedReader(
        ReadAhead(raw, _caller(place), min(readahead_bytes, Limits.chunk_bytes)), buffer_size=128 * 1024
    )


def read_bytes(url: str) -> bytes:
    """Returns a whole file; a small one in a single call, because many of these make a data set."""
    place = parse(url)
    data = _call(place, functools.partial(_read_small, place))
    if data is not None:
        return data
    with open_read(url) as file:
        return file.read()


def read_files(urls: Sequence[str]) -> list[bytes | None]:
    """Returns whole small files of one file system, read by a single call: many of them cost little more than their bytes.

    None stands for a file that has to be read by itself: it is large, or this try has failed, and `read_bytes` says why.
    """
    places = [parse(url) for url in urls]
    try:
        return _once(places[0], lambda store: [_read_small(place, store) for place in places])
    except StorageError as error:
        log.debug("read one by one: %s", error)
        return [None] * len(places)


def _read_small(place: Location, store: Store) -> bytes | None:
    """Returns a file that one call can read; None where it is too large for that."""
    raw = store.open_reader(place.path, one_piece=True)
    try:
        if raw.size_bytes > Limits.chunk_bytes:
            return None
        data = raw.read_at(0, raw.size_bytes)
        check_length(place.url, 0, raw.size_bytes, len(data))
        return data
    finally:
        raw.close()


def read_text(url: str) -> str:
    """Returns a whole file as UTF-8 text.

    Raises:
        StorageError: It is not UTF-8.
    """
    try:
        return read_bytes(url).decode()
    except UnicodeDecodeError as error:
        raise StorageError(
            f"{url}: not UTF-8 at byte {error.start}; expected a text file; check what wrote it"
        ) from error


def open_ranges(url: str) -> RangeReader:
    """Opens a file of which stretches are read, and whose bytes the caller verifies: one that is replaced is not noticed.

    Raises:
        NotFoundError: There is none.
        StorageError: It is a directory.
    """
    place = parse(url)
    return RangeReader(_call(place, lambda store: store.open_reader(place.path, one_piece=True)), _caller(place))


def read_range(url: str, offset: int, length: int) -> bytes:
    """Returns exactly `length` bytes from `offset` on.

    Raises:
        StorageError: The file is shorter.
    """
    place = parse(url)
    raw = _call(place, lambda store: store.open_reader(place.path, one_piece=length <= Limits.chunk_bytes))
    file = RangeReader(raw, _caller(place))
    try:
        return file.read(offset, length)
    finally:
        file.close()


@contextlib.contextmanager
def create(url: str, overwrite: bool = False, *, after_failure: bool = False) -> Iterator[FileWriter]:
    """Writes a file that appears under its name when, and only when, the block ends without an exception.

    Until then it has a hidden temporary name beside `url`, which is deleted if the block fails; a killed process leaves it behind.
    Directories above are made.

    Args:
        url: The file.
        overwrite: Replace an existing file in one step; otherwise an existing one is an error and stays, also when several write
            at once.
        after_failure: The same write has just failed: take the way that is least likely to fail again, even if it is slower
            or starts with one replica.

    Raises:
        AlreadyExistsError: There is one, and `overwrite` is false.
    """
    place = parse(url)
    _check_target(place, overwrite)
    temporary = parse(join(parent(place.url), f".{name(place.url)[:40]}.{uuid.uuid4().hex}.tmp"))
    raw = _call(place, lambda store: store.open_writer(temporary.path, after_failure=after_failure))
    writer = FileWriter(raw, _caller(place))
    clean_up_s, moving, finished, process = CLEAN_UP_S, False, False, os.getpid()
    try:
        yield writer
        size_bytes = writer.finish()
        found_bytes = stat(temporary.url).size_bytes
        if found_bytes != size_bytes:
            raise UnavailableError(
                f"{place.url}: {found_bytes} of {size_bytes} bytes arrived; expected all; write it again, and check the disks"
            )
        moving = True
        _move(temporary, FileInfo(place.url, size_bytes, is_dir=False, modified_s=0.0), overwrite)
        finished = True
    except TimedOutError:
        clean_up_s = 1.0  # the caller has waited long enough
        raise
    finally:
        writer.close()
        if not finished and os.getpid() == process:  # a forked child that leaves the block has nothing to clean up
            writer.may_repeat = _discard(temporary, raw, clean_up_s) and not moving


def _check_target(place: Location, overwrite: bool) -> None:
    """Refuses a target before anything is written to it; the rename has the last word."""
    try:
        info = stat(place.url)
    except NotFoundError:
        return
    if info.is_dir:
        raise StorageError(f"{place.url}: is a directory; expected a file or a free name; choose another name")
    if not overwrite:
        raise _already_exists(place.url)


def _already_exists(url: str) -> AlreadyExistsError:
    """Words the error about a target that is there."""
    return AlreadyExistsError(f"{url}: already exists; expected a free name; choose another or delete it first")


def _discard(temporary: Location, raw: Writer, wait_s: float) -> bool:
    """Deletes an unfinished file, then drops its writer: the other way round, dropping it would complete the file on HDFS."""

    def clean_up() -> None:
        with contextlib.suppress(FileNotFoundError):
            for _ in _store(temporary).delete_steps(temporary.path, recursive=False):
                pass
        raw.abandon()

    call = deadline.start(clean_up)
    if call.wait(wait_s) and call.outcome()[1] is None:
        return True
    log.warning("%s: the temporary file of a failed write may be left behind", temporary.url)
    return False


def _move(source: Location, target: FileInfo, overwrite: bool) -> None:
    """Renames, and where the answer is an error looks whether the rename has happened all the same."""
    place = parse(target.url)

    def size_bytes(at: Location) -> int | None:
        try:
            return _once(at, lambda store: store.info(at.path)).size_bytes
        except NotFoundError:
            return None

    def attempt() -> None:
        try:
            _once(place, lambda store: store.rename(source.path, place.path, is_dir=target.is_dir, overwrite=overwrite))
        except TimedOutError:
            raise
        except StorageError:
            # hdfs-native repeats calls whose answer was lost; the second one then finds the source gone.
            if size_bytes(source) is not None or size_bytes(place) != target.size_bytes:
                raise

    _caller(place).again(attempt)


def rename(source_url: str, target_url: str, overwrite: bool = False) -> None:
    """Moves a file or directory within one file system, in one step; directories above the target are made.

    Args:
        source_url: What to move.
        target_url: Its new name.
        overwrite: Replace an existing file. An existing directory, and any target of a directory, is never replaced.

    Raises:
        NotFoundError: There is no source.
        AlreadyExistsError: There is a target.
    """
    source, target = parse(source_url), parse(target_url)
    if (source.scheme, source.authority) != (target.scheme, target.authority):
        raise ConfigError(
            f"url: {source.url!r} and {target.url!r} are on different file systems; expected one; copy and delete instead"
        )
    info = stat(source.url)
    if info.is_dir and exists(target.url):
        raise _already_exists(target.url)
    _move(source, dataclasses.replace(info, url=target.url), overwrite)


def delete(url: str, recursive: bool = False) -> bool:
    """Deletes a file or directory; says whether there was one.

    Raises:
        StorageError: It is a directory with content and `recursive` is false, or the root of a file system.
    """
    place = parse(url)
    if not name(place.url):
        raise StorageError(f"{place.url}: is the root of a file system; expected something in it; correct the URL")
    tries = 0

    def attempt() -> bool:
        nonlocal tries
        tries += 1
        steps = _once(place, lambda store: store.delete_steps(place.path, recursive=recursive))
        try:
            while _once(place, lambda store: next(steps, "done")) != "done":
                pass
        except NotFoundError:
            return tries > 1  # the try before this one has deleted it, only its answer was lost
        return True

    return _caller(place).again(attempt)


def make_dirs(url: str) -> None:
    """Creates a directory and those above it; an existing one is fine.

    Raises:
        StorageError: A file is in the way.
    """
    place = parse(url)
    _call(place, lambda store: store.make_dirs(place.path))


def write_bytes(url: str, data: Buffer, overwrite: bool = False) -> None:
    """Writes a whole file as `create` does; where that fails in the middle, writes it anew under another temporary name."""
    place, failures = parse(url), 0

    def attempt() -> None:
        nonlocal failures
        file = None
        try:
            with create(url, overwrite, after_failure=failures > 0) as file:
                file.write(data)
        except (UnavailableError, TimedOutError) as error:
            if file is None or not file.may_repeat:
                raise  # the file system itself does not answer, and has been asked again already
            failures += 1
            raise FailedWriteError(str(error)) from error

    # The pause gives HDFS time to notice that one of its DataNodes is gone.
    _caller(place).again(attempt, FailedWriteError, first_pause_s=2.0)


def write_text(url: str, text: str, overwrite: bool = False) -> None:
    """Writes a whole file of UTF-8 text as `write_bytes` does."""
    write_bytes(url, text.encode(), overwrite)
