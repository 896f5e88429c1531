"""Images in tar files: a class for each archive, archives in an archive, class folders in archives, WebDataset's samples.

Archives are indexed by their headers and never unpacked; an image is a range of bytes of its archive.
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import functools
import itertools
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Generic, Literal, TypeVar

import pyarrow as pa

from cvdist import storage
from cvdist.config import PrepareConfig, canonical_split
from cvdist.errors import DataError
from cvdist.sources.columns import label_columns, listed, require_names
from cvdist.sources.rows import (
    IMAGE_SUFFIXES,
    SPLIT_FOLDERS,
    Row,
    Source,
    is_image_path,
    is_text,
    relative_to_source,
    require_text,
    split_of,
    tables,
)
from cvdist.sources.tables import Record, json_kind, learn_types
from cvdist.sources.tars import HeaderFile, Member, members, refuse_compressed
from cvdist.sources.webdataset import Fields, Sample, label_files, samples

T = TypeVar("T")
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tzst")
PROBED_FILES = 1000
THREADS = 4
MAX_WAITING_TABLES = 2  # of each thread


@dataclasses.dataclass(frozen=True)
class Archive:
    """A tar file of the source; `path` is below the source, or its name where it is the source."""

    url: str
    path: str
    split: str | None


@dataclasses.dataclass(frozen=True)
class Layout:
    """What archives hold.

    Attributes:
        kind: Where the class is found.
        above: For folders: what all paths begin with, before the class folders or the split folders.
        fields: For samples: what is read of their .json.
    """

    kind: Literal["archive_is_class", "archives", "folders", "samples"]
    above: tuple[str, ...] = ()
    fields: Fields = dataclasses.field(default_factory=Fields)


def tar(config: PrepareConfig) -> Source:
    """Finds tar files, and how they name classes.

    Raises:
        DataError: There is none, one is compressed or damaged, or they hold no images.
    """
    url = config.source_url
    num_others = 0
    if storage.stat(url).is_dir:
        files, num_others = listed(url, (".tar", *COMPRESSED))
        urls = [file.url for file in files]
    else:
        urls = [url]
    compressed = [name for name in urls if name.lower().endswith(COMPRESSED)]
    if compressed:
        raise refuse_compressed(compressed[0])
    if not urls:
        raise DataError(f"{url} holds no archive; expected files named *.tar; correct the URL")
    archives = []
    for name in urls:
        path = relative_to_source(name, url)
        require_text(path)
        archives.append(Archive(name, path, split_of(path) if name != url else None))
    layout = find_layout(config, archives)

    def read(source: Source) -> Iterator[pa.Table]:
        source.num_skipped += num_others
        for found in in_order(functools.partial(index, layout=layout), archives):
            if isinstance(found, int):
                source.num_skipped += found
            else:
                yield found

    return Source("tar", read, layout.fields.extra)


def find_layout(config: PrepareConfig, archives: Sequence[Archive]) -> Layout:
    """Looks at the first archives until one holds images or archives.

    Raises:
        DataError: None does.
    """
    names = label_columns(config)
    fields = Fields(names[0] if names else "label", names[1:], config.group_column, prefers_json=bool(names))
    for archive in archives:
        with HeaderFile(archive.url) as file:
            found = list(itertools.islice((m for m in members(file) if m.kind == "file"), PROBED_FILES))
            if any(is_archive(member.name) for member in found):
                return Layout("archives")
            images = [clean(member.name) for member in found if is_image_path(clean(member.name))]
            if not images:
                continue
            if label_files(file, found, fields) or names or config.group_column:
                return Layout("samples", fields=learn_extra(fields, archives))
        folders = images[0].split("/")[:-1]
        if not folders:
            return Layout("archive_is_class")
        is_plain = len(folders) == 1 or folders[0] in SPLIT_FOLDERS
        return Layout("folders", above=() if is_plain else shared_folders(archives))
    raise DataError(
        f"{config.source_url} holds no image in {len(archives)} archive{'s' * (len(archives) != 1)}; expected members named"
        f" {' '.join('*' + s for s in IMAGE_SUFFIXES)}; correct the URL"
    )


def learn_extra(fields: Fields, archives: Sequence[Archive]) -> Fields:
    """Reads all samples once to learn the types of further label columns, where any are asked for.

    Raises:
        DataError: A column's values cannot be labels.
    """
    if not fields.further:
        return fields
    names = (fields.label, *fields.further)

    def records() -> Iterator[tuple[str, Record]]:
        for archive in archives:
            with HeaderFile(archive.url) as file:
                for sample in samples(file, members(file)):
                    if isinstance(sample, Sample) and sample.json is not None:
                        yield archive.url, {name: sample.json.get(name) for name in names}

    types = learn_types(records(), names, json_kind)
    url = storage.parent(archives[0].url)
    require_names(url, fields.label, types[fields.label])
    for name in fields.further:
        if pa.types.is_struct(types[name]):
            raise DataError(
                f"{url}: {name!r} in .json is an array or object; expected text, numbers or truth values; leave it out of"
                " --label_columns"
            )
    return dataclasses.replace(fields, extra=pa.schema([(name, types[name]) for name in fields.further]))


def shared_folders(archives: Sequence[Archive]) -> tuple[str, ...]:
    """Returns the folders that all images of all archives lie in, above their class folders or split folders."""
    shared: list[str] | None = None
    shortest = 0
    for archive in archives:
        with HeaderFile(archive.url) as file:
            for member in members(file):
                path = clean(member.name)
                if member.kind == "file" and is_image_path(path):
                    folders = path.split("/")[:-1]
                    if shared is None:
                        shared, shortest = folders, len(folders)
                    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(shared, folders, strict=False))
                    shared, shortest = [pair[0] for pair in same], min(shortest, len(folders))
    above = itertools.takewhile(lambda name: name not in SPLIT_FOLDERS, shared or [])
    # Images that lie directly in the last shared folder make it a class folder.
    return tuple(above)[: max(0, shortest - 1)]


def index(archive: Archive, layout: Layout) -> Iterator[pa.Table | int]:
    """Yields the images of an archive as tables and, last, how many other files it holds."""
    num_skipped = 0

    def rows() -> Iterator[Row]:
        nonlocal num_skipped
        with HeaderFile(archive.url) as file:
            for row in archive_rows(file, archive, layout):
                if row is None:
                    num_skipped += 1
                else:
                    yield row

    yield from tables(rows(), layout.fields.extra)
    yield num_skipped


def archive_rows(file: HeaderFile, archive: Archive, layout: Layout) -> Iterator[Row | None]:
    """Yields what an archive lists; None for each file that is no image by its name."""
    if layout.kind == "samples":
        for found in samples(file, members(file)):
            if isinstance(found, Sample):
                row = image_row(archive, archive.path, found.image)
                yield found.labelled(row, layout.fields) if row and row.reason is None else row
            else:
                yield image_row(archive, archive.path, found) if found.kind != "beside" else None
        return
    for member in members(file):
        if layout.kind == "archives" and is_archive(member.name) and member.kind == "file":
            yield from inner_rows(file, archive, member)
        elif is_archive(member.name) and member.kind == "file":
            raise DataError(
                f"{archive.url}: holds {member.name!a} beside images; expected images, or archives, alone; take one of them out"
            )
        elif member.kind != "folder":
            row = image_row(archive, archive.path, member)
            yield classified(row, clean(member.name), archive, layout) if row and row.reason is None else row


def inner_rows(file: HeaderFile, archive: Archive, inner: Member) -> Iterator[Row | None]:
    """Lists an archive in an archive, whose name is the class."""
    name = clean(inner.name)
    path = f"{archive.path}/{name}" if is_text(name) else f"{archive.path}/{name!a}"
    split = split_of(name) or archive.split
    for member in members(file, inner.offset, inner.offset + inner.size_bytes, name):
        if is_archive(member.name) and member.kind == "file":
            raise DataError(
                f"{archive.url}: {name!a} holds the archive {member.name!a}; expected images in it; unpack the outer archive"
            )
        if member.kind != "folder":
            row = image_row(archive, path, member)
            if row and row.reason is None:
                row = with_class(row._replace(split=split), stem(name) if is_text(name) else None)
            yield row


def image_row(archive: Archive, path: str, member: Member) -> Row | None:
    """Returns a member as an input without a class; None where it is no image by its name."""
    name = clean(member.name)
    is_bad = not is_text(name) or name.startswith("/") or ".." in name.split("/") or "\0" in name
    if not (name.lower().endswith(IMAGE_SUFFIXES) if is_bad else is_image_path(name)):
        return None
    row = Row(
        f"{path}/{name!a}" if is_bad else f"{path}/{name}",
        archive.url,
        member.offset,
        member.size_bytes,
        split=archive.split,
    )
    if is_bad:
        return row.rejected("bad_name", f"the member's name is {name!a}; expected a path below the archive, in UTF-8")
    if member.kind == "link":
        return row.rejected("link", "the member is a link; expected a file")
    if member.kind == "other":
        return row.rejected("not_a_file", "the member is a device, a pipe or a sparse file; expected a plain file")
    return row


def classified(row: Row, name: str, archive: Archive, layout: Layout) -> Row:
    """Adds the class that the archive's name, or the folders in it, say."""
    if layout.kind == "archive_is_class":
        return with_class(row, stem(archive.path))
    parts = name.split("/")
    if tuple(parts[: len(layout.above)]) == layout.above:
        parts = parts[len(layout.above) :]
    if len(parts) > 2 and parts[0] in SPLIT_FOLDERS:
        row, parts = row._replace(split=canonical_split(parts[0])), parts[1:]
    return with_class(row, parts[0] if len(parts) > 1 and layout.kind == "folders" else None)


def with_class(row: Row, name: str | None) -> Row:
    """Adds a class, or the reason why there is none."""
    if not name:
        return row.rejected("no_label", "the image lies in no class folder")
    return row._replace(class_name=name)


def clean(name: str) -> str:
    """Returns a member's name without the ./ that tar puts before it."""
    while name.startswith("./"):
        name = name[2:].lstrip("/")
    return name


def is_archive(name: str) -> bool:
    """Tells whether a member is an archive by its name."""
    return name.lower().endswith(".tar") and not name.rpartition("/")[2].startswith(".")


def stem(path: str) -> str:
    """Returns an archive's name without folders and suffix."""
    return path.rpartition("/")[2][: -len(".tar")]


@dataclasses.dataclass
class Work(Generic[T]):
    """What a thread has found and nobody has taken; an empty list is the end."""

    out: queue.SimpleQueue[list[T]] = dataclasses.field(default_factory=queue.SimpleQueue)
    room: threading.Semaphore = dataclasses.field(default_factory=lambda: threading.Semaphore(MAX_WAITING_TABLES))
    is_unwanted: bool = False

    def run(self, values: Iterator[T]) -> None:
        """Works until the end, or until nobody wants the rest."""
        for value in values:
            self.room.acquire()
            if self.is_unwanted:
                return
            self.out.put([value])

    def drop(self) -> None:
        """Says that nobody wants the rest."""
        self.is_unwanted = True
        self.room.release()


def in_order(function: Callable[[Archive], Iterator[T]], archives: Sequence[Archive]) -> Iterator[T]:
    """Yields what `function` yields for each archive, in order, while a few threads work on those that follow."""
    waiting: collections.deque[tuple[Work[T], concurrent.futures.Future[None]]] = collections.deque()
    upcoming = iter(archives)
    pool = concurrent.futures.ThreadPoolExecutor(THREADS, thread_name_prefix="index")
    try:
        while True:
            for archive in itertools.islice(upcoming, THREADS - len(waiting)):
                work: Work[T] = Work()
                future = pool.submit(work.run, function(archive))
                future.add_done_callback(functools.partial(_end, work.out))
                waiting.append((work, future))
            if not waiting:
                return
            work, future = waiting[0]
            while values := work.out.get():
                yield from values
                work.room.release()
            waiting.popleft()
            future.result()
    finally:
        for work, _ in waiting:
            work.drop()
        pool.shutdown(cancel_futures=True)


def _end(out: queue.SimpleQueue[list[T]], _: object) -> None:
    """Marks the end of what a thread puts."""
    out.put([])
