"""The format: Parquet shards of stored images and the manifest that makes them a data set.

A data set is the folder of a `manifest.json` that verifies; every shard is named in it with rows, bytes and sha256. The folder of
each split is a Petastorm data set as well. A data set that others have written, and that was adopted (adopt.py), has its manifest
under a name that other readers of the folder pass over.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import itertools
import json
from collections.abc import Sequence
from typing import Any, BinaryIO, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from cvdist import storage
from cvdist.errors import DataError, NotFoundError
from cvdist.hashing import HashingStream
from cvdist.images import ImageSpec

FORMAT = "cvdist"
VERSION = 2
MANIFEST_NAME = "manifest.json"
ADOPTED_NAME = "_manifest.json"  # Spark, Hive, pyarrow and Petastorm pass over names that begin so
MAGIC = b"PAR1"  # how a Parquet file begins; row groups follow
MIN_GROUP_ROWS = 16
MAX_GROUP_ROWS = 4096

SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("label", pa.int32(), nullable=False),
        pa.field("image", pa.binary(), nullable=False),
        pa.field("height", pa.int32(), nullable=False),
        pa.field("width", pa.int32(), nullable=False),
        pa.field("image_xxh3", pa.int64(), nullable=False),
        pa.field("source_sha256", pa.string(), nullable=False),
    ]
)
WEIGHT_COLUMN = "weight"
ZSTD_COLUMNS = ("key", "source_sha256")
TARGET_TYPES = {"multiclass": pa.int32(), "binary": pa.int32(), "regression": pa.float32()}


@dataclasses.dataclass(frozen=True)
class Target:
    """A further label of a multi-task data set: a column of the shards under its own name.

    Attributes:
        name: Of the column.
        kind: multiclass: int32, an index into `classes`, -1 where unknown. binary: int32, 0 or 1, -1 where unknown. regression:
            float32, NaN where unknown.
        classes: Names of a multiclass target's classes.
    """

    name: str
    kind: Literal["multiclass", "binary", "regression"]
    classes: tuple[str, ...] = ()


def shard_schema(targets: Sequence[Target] = (), *, is_weighted: bool = False) -> pa.Schema:
    """Returns the columns of a shard: those of every data set, then weight, then further targets."""
    fields = [pa.field(WEIGHT_COLUMN, pa.float32(), nullable=False)] if is_weighted else []
    fields += [pa.field(target.name, TARGET_TYPES[target.kind], nullable=False) for target in targets]
    return pa.schema([*SCHEMA, *fields])


@dataclasses.dataclass(frozen=True)
class Row:
    """One sample as it is stored; `others` are its values of the columns behind those of `SCHEMA`, in order."""

    key: str
    label: int
    image: bytes
    height: int
    width: int
    source_sha256: str
    others: tuple[float, ...] = ()


@dataclasses.dataclass(frozen=True)
class Shard:
    """One Parquet file below the data set, and how it is cut.

    Row groups lie behind each other, from the 4 bytes of the magic to the footer. A reader compares the checksum of each part that
    it reads, so that neither a flipped byte nor another file under this name is taken for data.

    Attributes:
        path: Relative to the data set.
        num_rows: Samples.
        num_bytes: Size of the file.
        sha256: Of the whole file.
        row_group_rows: Samples of each row group.
        row_group_bytes: Bytes of each row group.
        row_group_xxh3: xxHash3-64 of those bytes, in hex.
        footer_xxh3: xxHash3-64 of all that follows the last row group.
        row_group_starts: Of adopted files: where the bytes of each row group that are read begin.
        footer_start: Of adopted files: where the footer begins.
    """

    path: str
    num_rows: int
    num_bytes: int
    sha256: str
    row_group_rows: tuple[int, ...]
    row_group_bytes: tuple[int, ...]
    row_group_xxh3: tuple[str, ...]
    footer_xxh3: str
    row_group_starts: tuple[int, ...] = ()
    footer_start: int = 0


@dataclasses.dataclass(frozen=True)
class Adopted:
    """How files are read that others have written.

    Attributes:
        image: The column of the images; `image.bytes` is a field of a struct.
        label: The column of the labels; with `is_partition`, the name in the folders NAME=VALUE of the files.
        is_partition: The label is the folder's.
        is_by_name: A label is the class of this name; otherwise a number, and an index into the classes.
        formats: How many images there are of each format, for people.
    """

    image: str
    label: str
    is_partition: bool
    is_by_name: bool
    formats: dict[str, int]


@dataclasses.dataclass(frozen=True)
class Split:
    """A part of the data set: its shards in order and how many samples each class has."""

    shards: tuple[Shard, ...]
    class_rows: tuple[int, ...]

    @property
    def num_rows(self) -> int:
        """Samples in all shards."""
        return sum(shard.num_rows for shard in self.shards)


@dataclasses.dataclass(frozen=True)
class Table:
    """A Parquet file beside the manifest, with rows for people and audits: path below the data set, rows, sha256 of the file."""

    path: str
    num_rows: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The data set: nothing outside it belongs to it.

    Attributes:
        classes: Class names; a label is an index into them.
        image: How images are stored.
        splits: By name: train, val, test.
        num_inputs: Files listed; rows + quarantined + skipped.
        num_quarantined: Images that could not be stored; the tables in `quarantine` say why.
        num_skipped: Files that are no images by their names, and images that the settings leave out.
        digest: sha256 of the listing and the settings that the rows are a function of.
        settings: The settings of the preparation, for people.
        targets: Further labels of each sample.
        is_weighted: Every sample has a weight of its own.
        quarantine: Tables of rejected inputs; one for each generation that has any.
        repeats: Tables of files that are in the data set more than once.
        repeat_files: How many such files are duplicates within a class of a split, leaks between splits, conflicts between classes.
        generations: Digest of each preparation that added to the data set, oldest first.
        adopted: How it is read, if cvdist has not written it.
    """

    classes: tuple[str, ...]
    image: ImageSpec
    splits: dict[str, Split]
    num_inputs: int
    num_quarantined: int
    num_skipped: int
    digest: str
    settings: dict[str, Any]
    targets: tuple[Target, ...] = ()
    is_weighted: bool = False
    quarantine: tuple[Table, ...] = ()
    repeats: tuple[Table, ...] = ()
    repeat_files: dict[str, int] = dataclasses.field(default_factory=dict)
    generations: tuple[str, ...] = ()
    adopted: Adopted | None = None

    @property
    def name(self) -> str:
        """Of its file."""
        return MANIFEST_NAME if self.adopted is None else ADOPTED_NAME

    @property
    def schema(self) -> pa.Schema:
        """The columns of its shards."""
        return shard_schema(self.targets, is_weighted=self.is_weighted)

    @property
    def num_rows(self) -> int:
        """Samples in all splits."""
        return sum(split.num_rows for split in self.splits.values())


# Said only where there is something to say.
ADOPTED_KEYS = ("adopted", "row_group_starts", "footer_start", "shape")


def manifest_bytes(manifest: Manifest) -> bytes:
    """Returns the JSON of a manifest, its own sha256 included."""

    def said(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        return {key: value for key, value in pairs if value or key not in ADOPTED_KEYS}

    body = {"format": FORMAT, "version": VERSION, **dataclasses.asdict(manifest, dict_factory=said)}
    return json.dumps({**body, "sha256": body_sha256(body)}, indent=1).encode()


def body_sha256(body: dict[str, Any]) -> str:
    """Hashes a manifest's content, independent of white space."""
    return hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def write_manifest(url: str, manifest: Manifest, *, overwrite: bool = False) -> None:
    """Makes the folder `url` a data set. To be called last, when every shard is in place."""
    storage.write_bytes(storage.join(url, manifest.name), manifest_bytes(manifest), overwrite=overwrite)


def read_manifest(url: str) -> Manifest:
    """Reads and verifies the manifest of the data set at `url`.

    Raises:
        DataError: There is no manifest, or it is damaged or of another format.
        StorageError: The file system did not answer.
    """
    manifest_url, data = find_manifest(url)
    try:
        body = json.loads(data)
        found, version = body.pop("sha256"), body.pop("version")
        if body.pop("format") != FORMAT or version != VERSION:
            raise DataError(
                f"{manifest_url} is of format version {version}; expected {FORMAT} {VERSION}; prepare it again"
            )
        if found != body_sha256({"format": FORMAT, "version": version, **body}):
            raise ValueError("its sha256 does not match")
        return parse_manifest(body)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{manifest_url} is damaged ({error}); expected the file that prepare wrote; restore or prepare it again"
        ) from None


def find_manifest(url: str) -> tuple[str, bytes]:
    """Returns the URL and the bytes of the manifest of a data set that was prepared, or else of one that was adopted."""
    for name in (MANIFEST_NAME, ADOPTED_NAME):
        with contextlib.suppress(NotFoundError):
            return storage.join(url, name), storage.read_bytes(storage.join(url, name))
    raise DataError(
        f"{storage.join(url, MANIFEST_NAME)} does not exist; expected a prepared data set;"
        f" correct the URL, or run spark-submit jobs/prepare.py SOURCE {url}; for Parquet files of others run cvdist adopt {url}"
    )


def parse_manifest(body: dict[str, Any]) -> Manifest:
    """Builds a Manifest of its verified JSON."""
    splits = {}
    for name, split in body.pop("splits").items():
        shards: list[dict[str, Any]] = [
            {key: tuple(value) if isinstance(value, list) else value for key, value in shard.items()}
            for shard in split["shards"]
        ]
        splits[name] = Split(tuple(Shard(**shard) for shard in shards), tuple(split["class_rows"]))
    image, adopted = body.pop("image"), body.pop("adopted", None)
    return Manifest(
        classes=tuple(body.pop("classes")),
        image=ImageSpec(**{**image, "shape": tuple(image.get("shape", ()))}),
        splits=splits,
        targets=tuple(Target(t["name"], t["kind"], tuple(t["classes"])) for t in body.pop("targets")),
        quarantine=tuple(Table(**table) for table in body.pop("quarantine")),
        repeats=tuple(Table(**table) for table in body.pop("repeats")),
        generations=tuple(body.pop("generations")),
        adopted=Adopted(**adopted) if adopted else None,
        **body,
    )


class ShardWriter:
    """Writes rows as one Parquet file into a binary stream, cutting row groups by bytes; to be used in a `with` statement.

    Deterministic: the same rows give the same bytes with the same version of pyarrow.
    """

    def __init__(self, stream: BinaryIO | io.RawIOBase, row_group_bytes: int, schema: pa.Schema = SCHEMA) -> None:
        """Starts a file of the columns `shard_schema` on `stream`, which the caller opens and closes."""
        self._stream = HashingStream(stream)
        self._schema = schema
        self._writer = pq.ParquetWriter(
            pa.PythonFile(self._stream, mode="w"),
            schema,
            compression={name: "ZSTD" if name in ZSTD_COLUMNS else "NONE" for name in schema.names},
            use_dictionary=False,
            write_statistics=False,
            store_schema=False,
        )
        self._stream.cut()  # the magic
        self._row_group_bytes = row_group_bytes
        self._groups: list[tuple[int, int, str]] = []  # rows, bytes, checksum
        self._rows: list[Row] = []
        self._pending_bytes = 0

    def __enter__(self) -> ShardWriter:
        """Returns itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        """Leaves a file unfinished that an error has ended; pyarrow would try to finish it later, on a closed stream."""
        if kind is not None:
            self._writer.is_open = False

    def add(self, row: Row) -> None:
        """Adds one sample."""
        self._rows.append(row)
        self._pending_bytes += len(row.image)
        full = self._pending_bytes >= self._row_group_bytes and len(self._rows) >= MIN_GROUP_ROWS
        if full or len(self._rows) == MAX_GROUP_ROWS:
            self._flush()

    def _flush(self) -> None:
        rows = self._rows
        if not rows:
            return
        hashes = np.array([xxhash.xxh3_64_intdigest(row.image) for row in rows], dtype=np.uint64).view(np.int64)
        columns = [
            pa.array([row.key for row in rows], pa.string()),
            pa.array([row.label for row in rows], pa.int32()),
            pa.array([row.image for row in rows], pa.binary()),
            pa.array([row.height for row in rows], pa.int32()),
            pa.array([row.width for row in rows], pa.int32()),
            pa.array(hashes, pa.int64()),
            pa.array([row.source_sha256 for row in rows], pa.string()),
        ]
        for index, field in enumerate(list(self._schema)[len(columns) :]):
            columns.append(pa.array([row.others[index] for row in rows], field.type))
        self._writer.write_table(pa.table(columns, schema=self._schema), row_group_size=len(rows))
        self._groups.append((len(rows), *self._stream.cut()))
        self._rows, self._pending_bytes = [], 0

    def close(self, path: str) -> Shard:
        """Writes what is pending and the footer; returns the entry of the manifest."""
        self._flush()
        self._writer.close()
        _, footer_xxh3 = self._stream.cut()
        rows, num_bytes, checksums = zip(*self._groups, strict=True) if self._groups else ((), (), ())
        return Shard(
            path=path,
            num_rows=sum(rows),
            num_bytes=self._stream.num_bytes,
            sha256=self._stream.sha256.hexdigest(),
            row_group_rows=tuple(rows),
            row_group_bytes=tuple(num_bytes),
            row_group_xxh3=tuple(checksums),
            footer_xxh3=footer_xxh3,
        )


def row_group_offsets(shard: Shard) -> list[int]:
    """Returns where each row group of a shard begins: behind the magic, one after the other, unless the manifest says it."""
    return (
        list(shard.row_group_starts)
        or [len(MAGIC) + before for before in itertools.accumulate(shard.row_group_bytes, initial=0)][:-1]
    )


def footer_offset(shard: Shard) -> int:
    """Returns where the footer of a shard begins: behind the last row group, unless the manifest says it."""
    return shard.footer_start or len(MAGIC) + sum(shard.row_group_bytes)
