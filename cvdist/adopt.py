"""Adopts Parquet files that others have written, Petastorm's among them, as a data set: no byte of them is changed, none is executed.

foreign.py has found the files; here everything is read once, for checksums, labels and the headers of the images, and the manifest is
written. Petastorm's own metadata, which is a pickle, is not opened.
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import hashlib
import json
import threading
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import xxhash

from cvdist import storage
from cvdist.config import AdoptConfig, dump
from cvdist.config.adopt import SPLIT_NAMES
from cvdist.errors import DataError
from cvdist.foreign import PREPARE, File, damaged, read_footer
from cvdist.hashing import HashingReader
from cvdist.images import ImageSpec, read_stored_header
from cvdist.reader import Window, image_buffers, leaf, partition_value, plain_bytes, plain_labels, read_columns
from cvdist.shards import MAGIC, Adopted, Manifest, Shard, Split, write_manifest
from cvdist.sources.columns import shown

THREADS = 4
MAX_NAMED = 10
MAX_CLASSES = 100_000

Value = int | str


@dataclasses.dataclass(frozen=True)
class Content:
    """What a file holds: its entry of the manifest, how many rows of each label and format, and the rows that cannot be used."""

    shard: Shard
    values: Mapping[Value, int]
    formats: Mapping[str, int]
    num_bad: int
    bad: tuple[str, ...]


def adopt(
    config: AdoptConfig, files: Sequence[File], *, progress: Callable[[int], None] = lambda num_rows: None
) -> Manifest:
    """Reads all files once and writes the manifest.

    Args:
        config: Settings.
        files: What `find_files` has found.
        progress: Told the rows of each row group that is done.

    Raises:
        DataError: A file is damaged or has changed, rows have no label or no image, or labels are outside of the classes.
        StorageError: The file system failed.
    """
    lock, shape = threading.Lock(), config.pixel_shape()

    def done(num_rows: int) -> None:
        with lock:
            progress(num_rows)

    codec = "pixels" if shape else "any"
    spec = ImageSpec(config.image_size, "none", config.channels, codec, 0, shape=shape)  # type: ignore[arg-type]
    pool = concurrent.futures.ThreadPoolExecutor(THREADS, thread_name_prefix="adopt")
    try:
        contents = list(pool.map(lambda file: read_file(config, file, spec, done), files))
    finally:
        pool.shutdown(cancel_futures=True)
    num_bad = sum(content.num_bad for content in contents)
    if num_bad:
        named = "; ".join([row for content in contents for row in content.bad][:MAX_NAMED])
        raise DataError(
            f"{config.url}: {num_bad} of {sum(file.num_rows for file in files)} rows cannot be used: {named}"
            f"{'; ...' if num_bad > MAX_NAMED else ''}; expected an image and a label in each; remove these rows, {PREPARE}, which"
            " leaves them out"
        )
    manifest = made_manifest(config, files, contents, spec)
    write_manifest(config.url, manifest, overwrite=config.replace)
    return manifest


def read_file(config: AdoptConfig, file: File, spec: ImageSpec, progress: Callable[[int], None]) -> Content:
    """Reads a file from end to end, one row group in memory at a time.

    Raises:
        DataError: It is damaged, or changes meanwhile.
    """
    url = storage.join(config.url, file.path)
    try:
        footer_start, footer = read_footer(url, file.num_bytes)
        metadata = pq.read_metadata(pa.BufferReader(footer))
        names = [file.image] if file.is_partition else [file.image, config.label]
        gathered = Gathered(config, file, spec)
        groups: list[tuple[int, int, int, str]] = []  # start, bytes, rows, checksum
        with storage.open_read(url) as stream:
            reader = HashingReader(stream)
            if reader.take(len(MAGIC)) != MAGIC:
                raise ValueError(f"it does not begin with {MAGIC!r}")
            for index in range(metadata.num_row_groups):
                start, end = needed_range(metadata.row_group(index), names, reader.num_bytes)
                if not reader.num_bytes <= start <= end <= footer_start:
                    raise ValueError(f"row group {index} lies at {start} to {end}, not behind the one before it")
                reader.skip_to(start)
                data = reader.take(end - start)
                table = read_columns(Window(data, start, file.num_bytes), metadata, index, names)
                gathered.add(index, table)
                groups.append((start, len(data), table.num_rows, xxhash.xxh3_64_hexdigest(data)))
                progress(table.num_rows)
            reader.skip_to(footer_start)
            if reader.take(len(footer) + 1) != footer:
                raise ValueError("it changes while it is read")
    except (pa.ArrowException, OSError, ValueError) as error:
        raise damaged(url, error) from None
    starts, num_bytes, rows, checksums = zip(*groups, strict=True) if groups else ((), (), (), ())
    if not sum(rows) == file.num_rows == sum(gathered.values.values()) + gathered.num_bad:
        raise damaged(url, f"{sum(rows)} rows in its row groups, {file.num_rows} by its footer")
    shard = Shard(
        path=file.path,
        num_rows=file.num_rows,
        num_bytes=file.num_bytes,
        sha256=reader.sha256.hexdigest(),
        row_group_rows=rows,
        row_group_bytes=num_bytes,
        row_group_xxh3=checksums,
        footer_xxh3=xxhash.xxh3_64_hexdigest(footer),
        row_group_starts=starts,
        footer_start=footer_start,
    )
    return Content(shard, gathered.values, gathered.formats, gathered.num_bad, tuple(gathered.bad))


def needed_range(group: pq.RowGroupMetaData, names: Sequence[str], place: int) -> tuple[int, int]:
    """Returns where the stretch of a row group begins and ends that holds these columns, their dictionaries included."""
    columns = [group.column(index) for index in range(group.num_columns)] if group.num_rows else []
    ranges = []
    for column in columns:
        if column.path_in_schema in names and column.total_compressed_size:
            start = min(column.data_page_offset, column.dictionary_page_offset or column.data_page_offset)
            ranges.append((start, start + column.total_compressed_size))
    return (min(start for start, _ in ranges), max(end for _, end in ranges)) if ranges else (place, place)


class Gathered:
    """What the row groups of a file hold, added up."""

    def __init__(self, config: AdoptConfig, file: File, spec: ImageSpec) -> None:
        """Begins with nothing."""
        self._config, self._file, self._spec = config, file, spec
        self.values: collections.Counter[Value] = collections.Counter()
        self.formats: collections.Counter[str] = collections.Counter()
        self.num_bad = 0
        self.bad: list[str] = []

    def add(self, index: int, table: pa.Table) -> None:
        """Looks at the label and at the header of the image of each row."""
        images, labels = leaf(table, self._file.image), self._labels(table)
        bad: dict[int, str] = {}
        for row in rows_where(pc.is_null(images)):
            bad[row] = "no image"
        wrong = pc.less(labels, 0) if pa.types.is_integer(labels.type) else pc.equal(labels, "")
        for row in rows_where(pc.fill_null(wrong, True)):
            bad.setdefault(row, f"the label is {labels[row].as_py()!r}")
        data, offsets = image_buffers(pc.fill_null(plain_bytes(images), b""))
        for row in range(table.num_rows):
            if row in bad:
                continue
            try:
                header = read_stored_header(data[offsets[row] : offsets[row + 1]], self._spec)
                self.formats[header.format] += 1
            except ValueError as error:
                bad[row] = str(error)
        good = labels.filter(pa.array([row not in bad for row in range(table.num_rows)], pa.bool_())) if bad else labels
        for entry in pc.value_counts(good):
            self.values[entry["values"].as_py()] += entry["counts"].as_py()
        if len(self.values) > MAX_CLASSES:
            raise ValueError(f"more than {MAX_CLASSES} labels in {self._config.label!r}, which is no column of classes")
        self.num_bad += len(bad)
        for row in sorted(bad)[: MAX_NAMED - len(self.bad)]:
            self.bad.append(f"{self._file.path}, row group {index}, row {row}: {bad[row]}")

    def _labels(self, table: pa.Table) -> pa.ChunkedArray:
        if not self._file.is_partition:
            return plain_labels(leaf(table, self._config.label))
        value = partition_value(self._file.path, self._config.label)
        return pa.chunked_array([pa.array([value] * table.num_rows, pa.string())])


def rows_where(mask: pa.ChunkedArray) -> list[int]:
    """Returns the numbers of the rows that are true."""
    return [int(row) for row in np.flatnonzero(mask.to_numpy())]


def made_manifest(config: AdoptConfig, files: Sequence[File], contents: Sequence[Content], spec: ImageSpec) -> Manifest:
    """Puts together what the files hold."""
    values: collections.Counter[Value] = collections.Counter()
    formats: collections.Counter[str] = collections.Counter()
    for content in contents:
        values.update(content.values)
        formats.update(content.formats)
    classes, is_by_name = classes_of(config, files, values)
    labels = {name: label for label, name in enumerate(classes)}
    splits = {}
    for name in SPLIT_NAMES:
        mine = [content for file, content in zip(files, contents, strict=True) if file.split == name]
        class_rows = [0] * len(classes)
        for content in mine:
            for value, rows in content.values.items():
                class_rows[labels[str(value)] if is_by_name else int(value)] += rows
        if mine:
            splits[name] = Split(tuple(content.shard for content in mine), tuple(class_rows))
    num_rows = sum(split.num_rows for split in splits.values())
    adopted = Adopted(files[0].image, config.label, files[0].is_partition, is_by_name, dict(sorted(formats.items())))
    settings = {name: value for name, value in dump(config).items() if name not in ("url", "replace")}
    listing = [(shard.path, shard.sha256, name) for name, split in splits.items() for shard in split.shards]
    return Manifest(
        classes=classes,
        image=spec,
        splits=splits,
        num_inputs=num_rows,
        num_quarantined=0,
        num_skipped=0,
        digest=hashlib.sha256(json.dumps([settings, listing]).encode()).hexdigest(),
        settings=settings,
        adopted=adopted,
    )


def classes_of(config: AdoptConfig, files: Sequence[File], values: Mapping[Value, int]) -> tuple[tuple[str, ...], bool]:
    """Returns the classes, and whether labels are their names, not their numbers.

    Numbers are those of the classes as long as at least half of them occur; others, such as numbers of a catalogue, are names.

    Raises:
        DataError: There are no labels, labels of no class, or files with different names.
    """
    if not values:
        raise DataError(f"{config.url} holds no rows; expected some; correct the URL")
    is_number = files[0].is_number or (
        files[0].is_partition and all(str(value).isdecimal() and str(int(value)) == value for value in values)
    )
    known = config.class_names()
    if not known and is_number and any(file.class_names for file in files):
        known = files[0].class_names
        if other := next((file for file in files if file.class_names != known), None):
            raise DataError(
                f"{config.url}: {other.path} has other class names than {files[0].path}; expected the same; say them by --classes"
            )
    if is_number:
        top = max(int(value) for value in values)
        if known and top >= len(known):
            raise DataError(
                f"{config.url}: label {top} is none of {len(known)} classes ({shown(known)[:200]}); expected 0 to {len(known) - 1};"
                " name them all by --classes"
            )
        if known or top < 2 * len(values):
            return known or tuple(str(label) for label in range(top + 1)), False
        return tuple(str(value) for value in sorted(int(value) for value in values)), True
    names = sorted(str(value) for value in values)
    if known and (unknown := [name for name in names if name not in known]):
        raise DataError(
            f"{config.url}: the label {unknown[0]!r} is none of the classes {shown(known)[:200]}; expected all of them; add it to"
            " --classes"
        )
    return known or tuple(names), True
