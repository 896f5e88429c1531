"""Re-reads one shard and compares every byte, row and pixel with what the manifest says of it.

What the shards of a data set prove together is in proof.py.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import itertools
import math

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import simplejpeg
import xxhash

from cvdist import storage
from cvdist.errors import NotFoundError
from cvdist.hashing import HashingReader
from cvdist.images import ImageSpec, Pixels, decode_stored, has_stored_size
from cvdist.reader import Meaning, Window, adopted_columns, adopted_rows, read_columns
from cvdist.repeats import ROWS
from cvdist.shards import MAGIC, Shard, footer_offset, row_group_offsets

MAX_PROBLEMS = 4
# calcHist counts in float32, which is exact up to here.
COUNT_PIXELS = 1 << 24
# What decoders raise for bytes that are no image.
DECODE_ERRORS = (ValueError, OSError, RuntimeError, EOFError)


@dataclasses.dataclass(frozen=True)
class Problem:
    """Something that is not as the manifest says: where below the data set, what was found, what was expected."""

    where: str
    found: str
    expected: str = "what prepare wrote"


@dataclasses.dataclass(frozen=True)
class Scope:
    """What all shards of one audit share."""

    data_url: str
    spec: ImageSpec
    schema: pa.Schema
    num_classes: int
    num_buckets: int
    meaning: Meaning | None = None  # of adopted data sets


@dataclasses.dataclass(frozen=True)
class Task:
    """One shard to audit: its number among all, the name and number of its split, and its entry in the manifest."""

    number: int
    split: str
    split_number: int
    shard: Shard


@dataclasses.dataclass(frozen=True)
class PixelSums:
    """Exact sums over pixels: how many, and for each channel the values (0-255) and their squares."""

    num_pixels: int = 0
    values: tuple[int, ...] = ()
    squares: tuple[int, ...] = ()

    def __add__(self, other: PixelSums) -> PixelSums:
        """Adds both, in any order to the same effect."""
        values, squares = (
            tuple(a + b for a, b in itertools.zip_longest(mine, theirs, fillvalue=0))
            for mine, theirs in ((self.values, other.values), (self.squares, other.squares))
        )
        return PixelSums(self.num_pixels + other.num_pixels, values, squares)

    def mean(self) -> tuple[float, ...]:
        """Returns the mean of each channel, 0 to 1."""
        return tuple(value / (255 * self.num_pixels) for value in self.values)

    def std(self) -> tuple[float, ...]:
        """Returns the standard deviation of each channel over these pixels, 0 to 1."""
        n = self.num_pixels
        pairs = zip(self.values, self.squares, strict=True)
        return tuple(math.sqrt((n * square - value * value) / (255 * n) ** 2) for value, square in pairs)


@dataclasses.dataclass(frozen=True)
class ShardAudit:
    """What one shard holds.

    Attributes:
        number: Of the shard among all.
        class_rows: Samples of each label that occurs.
        pixels: Of the images of train; nothing for other splits.
        is_counted: Every row was read and has a label, so that the counts can be compared with the manifest's.
        num_problems: How many there are.
        problems: The first of them.
    """

    number: int
    class_rows: dict[int, int]
    pixels: PixelSums
    is_counted: bool
    num_problems: int
    problems: tuple[Problem, ...]


def audit_shard(scope: Scope, task: Task) -> tuple[ShardAudit, pa.Table]:
    """Re-reads one shard; returns what it holds and who its rows are, as the table `ROWS`.

    Raises:
        StorageError: The file system failed, which says nothing about the shard.
    """
    auditor = ShardAuditor(scope, task)
    auditor.run()
    audit = ShardAudit(
        number=task.number,
        class_rows=dict(sorted(auditor.class_rows.items())),
        pixels=auditor.pixels,
        is_counted=auditor.class_rows.total() == task.shard.num_rows,
        num_problems=auditor.num_problems,
        problems=tuple(auditor.problems),
    )
    return audit, pa.concat_tables([ROWS.empty_table(), *auditor.rows])


class ShardAuditor:
    """The audit of one shard under way."""

    def __init__(self, scope: Scope, task: Task) -> None:
        """Opens nothing yet."""
        self._scope, self._task, self._shard = scope, task, task.shard
        self._url = storage.join(scope.data_url, task.shard.path)
        self.class_rows: collections.Counter[int] = collections.Counter()
        self.pixels = PixelSums()
        self.rows: list[pa.Table] = []
        self.num_problems = 0
        self.problems: list[Problem] = []

    def _problem(self, place: str, *found_expected: str) -> None:
        self.num_problems += 1
        if len(self.problems) < MAX_PROBLEMS:
            default = ["what was adopted"] if self._scope.meaning and len(found_expected) == 1 else []
            self.problems.append(Problem(self._shard.path + place, *found_expected, *default))

    def run(self) -> None:
        """Checks the file's parts, the rows of each, and the file as a whole; a fault is named once, as narrowly as can be."""
        shard = self._shard
        lengths = {len(shard.row_group_rows), len(shard.row_group_bytes), len(shard.row_group_xxh3)}
        lengths |= {len(shard.row_group_starts)} if self._scope.meaning else set()
        footer_start = footer_offset(shard)
        if len(lengths) > 1 or sum(shard.row_group_rows) != shard.num_rows or footer_start >= shard.num_bytes:
            self._problem("", "its row groups do not add up in the manifest", "the rows and bytes of the shard")
            return
        try:
            num_bytes = storage.stat(self._url).size_bytes
            if num_bytes != shard.num_bytes:
                self._problem("", f"the file holds {num_bytes} bytes", f"{shard.num_bytes}")
                return
            footer = self._read_footer(storage.read_range(self._url, footer_start, num_bytes - footer_start))
            sha256 = self._read_through(footer)
        except NotFoundError:
            self._problem("", "the file does not exist", "the shard that the manifest names")
            return
        if sha256 != shard.sha256 and not self.num_problems:
            self._problem("", "the file differs from its sha256")

    def _read_footer(self, data: bytes) -> pq.FileMetaData | None:
        """Returns the footer, or None where rows cannot be read by it."""
        if xxhash.xxh3_64_hexdigest(data) != self._shard.footer_xxh3:
            self._problem(", footer", "it differs from its checksum")
            return None
        try:
            footer = pq.read_metadata(pa.BufferReader(data))
        except (pa.ArrowException, OSError) as error:
            self._problem(", footer", f"it cannot be read ({one_line(error)})")
            return None
        schema = footer.schema.to_arrow_schema()
        if not self._scope.meaning and not schema.equals(self._scope.schema):
            self._problem(", footer", f"the columns are {describe(schema)}", describe(self._scope.schema))
            return None
        found = tuple(footer.row_group(index).num_rows for index in range(footer.num_row_groups))
        if found != self._shard.row_group_rows:
            self._problem(", footer", f"its row groups have {found} rows", f"{self._shard.row_group_rows}")
            return None
        return footer

    def _read_through(self, footer: pq.FileMetaData | None) -> str:
        """Reads the file from end to end, one row group in memory at a time; returns its sha256."""
        with storage.open_read(self._url) as stream:
            reader = HashingReader(stream)
            magic = reader.take(len(MAGIC))
            if magic != MAGIC:
                self._problem(", first bytes", f"{magic!r}", f"{MAGIC!r}")
            check = self._check_adopted if self._scope.meaning else self._check_group
            first_row = 0
            for index, offset in enumerate(row_group_offsets(self._shard)):
                reader.skip_to(offset)
                check(index, first_row, reader.take(self._shard.row_group_bytes[index]), offset, footer)
                first_row += self._shard.row_group_rows[index]
            reader.skip_to(self._shard.num_bytes)
        return reader.sha256.hexdigest()

    def _check_group(
        self, index: int, first_row: int, data: bytes, offset: int, footer: pq.FileMetaData | None
    ) -> None:
        """Checks a row group and each of its rows; in a damaged one it only looks for the damaged image."""
        place = f", row group {index}"
        is_intact = xxhash.xxh3_64_hexdigest(data) == self._shard.row_group_xxh3[index]
        columns = self._scope.schema.names if is_intact else ["image", "image_xxh3"]
        before, table = self.num_problems, None
        try:
            if footer is not None:
                read = read_columns(Window(data, offset, self._shard.num_bytes), footer, index, columns)
                read.validate(full=True)
                table = read
        except (pa.ArrowException, OSError, ValueError) as error:
            if is_intact:
                self._problem(place, f"it cannot be read ({one_line(error)})")
        if table is not None:
            images = [memoryview(image.as_buffer()).cast("B") for chunk in table["image"].chunks for image in chunk]
            self._check_checksums(table, images, place)
            if is_intact:
                self._check_images(table, images, place)
                self._count(table, first_row, place)
        if not is_intact and self.num_problems == before:
            self._problem(place, "it differs from its checksum")

    def _check_adopted(
        self, index: int, first_row: int, data: bytes, offset: int, footer: pq.FileMetaData | None
    ) -> None:
        """Checks a row group that others have written, and its rows; nothing of a damaged one is parsed."""
        place, meaning = f", row group {index}", self._scope.meaning
        if xxhash.xxh3_64_hexdigest(data) != self._shard.row_group_xxh3[index]:
            self._problem(place, "it differs from its checksum")
            return
        if footer is None or meaning is None:
            return
        try:
            window = Window(data, offset, self._shard.num_bytes)
            table = read_columns(window, footer, index, adopted_columns(meaning.adopted))
            rows = adopted_rows(place, table, self._shard.path, meaning)
        except (pa.ArrowException, OSError, ValueError) as error:
            self._problem(place, f"it cannot be read ({one_line(error)})")
            return
        hashes = []
        for row in range(table.num_rows):
            image = rows.image(row)
            hashes.append(hashlib.sha256(image).hexdigest())
            try:
                pixels = decode_stored(image, meaning.spec)
            except ValueError as error:
                self._problem(f"{place}, row {row}", f"the image cannot be decoded ({error})", "an image")
                continue
            if self._task.split == "train":
                self.pixels += pixel_sums(pixels)
        keys = [f"{self._shard.path}/{first_row + row}" for row in range(table.num_rows)]
        columns = {"key": keys, "source_sha256": hashes, "label": rows.labels}
        self._count(pa.table(columns), first_row, place)

    def _check_checksums(self, table: pa.Table, images: list[memoryview], place: str) -> None:
        checksums = table["image_xxh3"].to_numpy().view(np.uint64)
        for row, (image, checksum) in enumerate(zip(images, checksums, strict=True)):
            if xxhash.xxh3_64_intdigest(image) != int(checksum):
                self._problem(f"{place}, row {row}", "the image differs from its checksum")

    def _check_images(self, table: pa.Table, images: list[memoryview], place: str) -> None:
        """Decodes every image, compares size and channels, and adds up the pixels of train."""
        spec = self._scope.spec
        sizes = zip(table["height"].to_pylist(), table["width"].to_pylist(), strict=True)
        for row, (image, (height, width)) in enumerate(zip(images, sizes, strict=True)):
            where = f"{place}, row {row}"
            try:
                pixels = decode_stored(image, spec)
                found = (*pixels.shape[:2], pixels.shape[2] if spec.codec == "raw" else num_jpeg_channels(image))
            except (*DECODE_ERRORS, IndexError) as error:
                self._problem(
                    where, f"the image cannot be decoded ({one_line(error)})", f"{spec.codec} as prepare wrote it"
                )
                continue
            if found != (height, width, spec.channels):
                stated = f"{(height, width, spec.channels)}, as the row and the manifest say"
                self._problem(where, f"height, width and channels of the image are {found}", stated)
                continue
            if not has_stored_size(height, width, spec):
                sides = "both sides" if spec.resize == "exact" else "the shorter side"
                sides = f"{sides} {'at most ' if spec.keep_original else ''}{spec.image_size}"
                self._problem(where, f"the image is {width} x {height} pixels", sides)
            if self._task.split == "train":
                self.pixels += pixel_sums(pixels)

    def _count(self, table: pa.Table, first_row: int, place: str) -> None:
        """Counts labels, and notes who the rows are."""
        num_rows, labels = table.num_rows, table["label"].to_pylist()
        for row, label in enumerate(labels):
            if 0 <= label < self._scope.num_classes:
                self.class_rows[label] += 1
            else:
                self._problem(f"{place}, row {row}", f"label {label}", f"0 to {self._scope.num_classes - 1}")
        split, number = self._task.split_number, self._task.number
        numbers = [[split] * num_rows, labels, [number] * num_rows, range(first_row, first_row + num_rows)]
        self.rows.append(pa.table([table["key"], table["source_sha256"], *numbers], schema=ROWS))


def one_line(error: BaseException) -> str:
    """Returns a short message of an error."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def describe(schema: pa.Schema) -> str:
    """Returns the columns of a schema in words."""
    return ", ".join(f"{field.name} {field.type}{' or null' if field.nullable else ''}" for field in schema)


def num_jpeg_channels(image: memoryview) -> int:
    """Returns how many channels a JPEG has, whatever it is decoded to."""
    return 1 if simplejpeg.decode_jpeg_header(image)[2].lower() == "gray" else 3


def pixel_sums(pixels: Pixels) -> PixelSums:
    """Sums the pixels of an image (H, W, C) and their squares, exactly, through the counts of the 256 values."""
    height, width, channels = pixels.shape
    counts = np.zeros((channels, 256), np.int64)
    for part in np.array_split(pixels, -(-height * width // COUNT_PIXELS)):
        for channel in range(channels):
            counts[channel] += cv2.calcHist([part], [channel], None, [256], [0, 256]).ravel().astype(np.int64)
    values = np.arange(256)
    return PixelSums(height * width, tuple((counts @ values).tolist()), tuple((counts @ values**2).tolist()))
