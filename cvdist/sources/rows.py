"""What every layout is turned into: tables of inputs, some at a time."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import pyarrow as pa

from cvdist import storage
from cvdist.config import canonical_split
from cvdist.errors import DataError

Value = str | int | float | bool | None

# One input in a row. Its bytes are the whole file `key` below the source, or `url`, or `size_bytes` from `offset` in that.
ROWS = pa.schema(
    [
        pa.field("key", pa.string()),  # the input's name, unique in the source
        pa.field("url", pa.string()),
        pa.field("offset", pa.int64()),
        pa.field("size_bytes", pa.int64()),  # null: unknown
        pa.field("sha256", pa.string()),  # null: unknown
        pa.field("class", pa.string()),
        pa.field("split", pa.string()),  # train, val, test; null: the source does not say
        pa.field("weight", pa.float32()),
        pa.field("group", pa.string()),
        pa.field("reason", pa.string()),  # why the listing rejects this input; null: it does not
        pa.field("detail", pa.string()),
    ]
)
BATCH_ROWS = 8192
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".npy")
SPLIT_FOLDERS = ("train", "validation", "val", "test")


class Row(NamedTuple):
    """One input: the columns of ROWS, and the values of the further label columns."""

    key: str
    url: str | None = None
    offset: int | None = None
    size_bytes: int | None = None
    sha256: str | None = None
    class_name: str | None = None
    split: str | None = None
    weight: float | None = None
    group: str | None = None
    reason: str | None = None
    detail: str | None = None
    extra: tuple[Value, ...] = ()

    def rejected(self, reason: str, detail: str) -> Row:
        """Returns this input as one that the listing rejects."""
        return self._replace(reason=reason, detail=detail)


@dataclasses.dataclass(frozen=True)
class Columns:
    """Names of the columns that are read.

    Attributes:
        image: The paths, or the bytes of the images.
        label: The class.
        split: The split, where there is such a column.
        weight: The weight, where there is such a column.
        group: config.group_column.
        extra: Further labels.
    """

    image: str
    label: str
    split: str | None
    weight: str | None
    group: str | None
    extra: tuple[str, ...]

    @property
    def names(self) -> list[str]:
        """All of them, each once."""
        named = (self.image, self.label, self.split, self.weight, self.group, *self.extra)
        return list(dict.fromkeys(name for name in named if name is not None))


@dataclasses.dataclass(frozen=True)
class Packing:
    """How image bytes and labels lie in the columns of the source's files.

    Attributes:
        columns: Which column is what.
        is_struct: The image is a struct with a field `bytes`, as Hugging Face writes it.
        names: Names of the numbers in some columns.
        extra: Types of the further label columns.
        unknown: What some of those columns hold where nothing is known.
    """

    columns: Columns
    is_struct: bool
    names: dict[str, tuple[str, ...]]
    extra: pa.Schema
    unknown: dict[str, int] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Container:
    """A file that holds the bytes of many inputs without an address for each; `pack` copies them out.

    Attributes:
        url: The file.
        size_bytes: Its size.
        path: Below the source.
        num_rows: Inputs in it.
        split: What the source says about all of them.
        packing: How they lie in it.
    """

    url: str
    size_bytes: int
    path: str
    num_rows: int
    split: str | None
    packing: Packing


class Source:
    """A layout that has been found at a URL, and what it holds.

    Attributes:
        kind: Its name, one of those that PrepareConfig.source takes.
        extra: Further label columns: string, int64, float64 or bool.
        containers: Files to be packed; where there are any, `batches` is not to be used.
        num_skipped: Files that are no images by their names; complete when batches() has ended.
    """

    def __init__(
        self,
        kind: str,
        read: Callable[[Source], Iterator[pa.Table]],
        extra: pa.Schema | None = None,
    ) -> None:
        """Takes the function that lists the source, and counts what it passes over in the source it is given."""
        self.kind = kind
        self.extra: pa.Schema = pa.schema([]) if extra is None else extra
        self.containers: tuple[Container, ...] = ()
        self.num_skipped = 0
        self._read = read

    def batches(self) -> Iterator[pa.Table]:
        """Yields the inputs as tables of ROWS and `extra`, in the same memory for any number of them.

        Raises:
            DataError: The source is not what its layout asks for.
        """
        self.num_skipped = 0
        yield from self._read(self)


def tables(rows: Iterable[Row], extra: pa.Schema | None = None) -> Iterator[pa.Table]:
    """Gathers rows in tables of at most BATCH_ROWS."""
    schema = pa.schema([*ROWS, *(extra or ())])
    iterator = iter(rows)
    while chunk := list(itertools.islice(iterator, BATCH_ROWS)):
        *columns, values = zip(*chunk, strict=True)
        columns += zip(*values, strict=True) if extra else ()
        try:
            arrays = [pa.array(column, field.type) for column, field in zip(columns, schema, strict=True)]
        except UnicodeEncodeError as error:
            raise DataError(
                f"{chunk[0].key!a} and what follows: {error.object[:100]!a} is not valid Unicode; expected text that is; correct it"
            ) from None
        yield pa.table(arrays, schema=schema)


def is_image_path(path: str) -> bool:
    """Tells whether a file's name promises an image; hidden files, and those in hidden folders, do not."""
    return not is_hidden(path) and path.lower().endswith(IMAGE_SUFFIXES)


def is_hidden(path: str) -> bool:
    """Tells whether a file or a folder above it has a name that begins with a dot."""
    return path.startswith(".") or "/." in path


def is_text(name: str) -> bool:
    """Tells whether a name can be stored: it is valid Unicode."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def require_text(path: str) -> None:
    """Raises DataError where a name is not valid Unicode."""
    if not is_text(path):
        raise DataError(f"{path!a}: the name is not valid Unicode; expected one that is; rename the file")


def split_of(path: str) -> str | None:
    """Returns the split that a container's path below the source names: by a folder, or as in train-00000-of-00002.parquet."""
    *folders, name = path.split("/")
    for folder in folders:
        if folder in SPLIT_FOLDERS:
            return canonical_split(folder)
    match = re.match(r"(train|validation|val|test)(?=[-_.]?\d|\.)", name)
    return canonical_split(match[1]) if match else None


def relative_to_source(url: str, source_url: str) -> str:
    """Returns the path below the source; the name where the source is this file itself."""
    return storage.relative(url, source_url) or storage.name(url)
