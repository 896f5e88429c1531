"""Parquet files that others have written: which there are, where their images and labels are, and to which split each belongs.

Only names and footers are looked at. What a file says about columns is data: nothing that a pickle or an extension type names is run.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import difflib
from collections.abc import Sequence

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from cvdist import storage
from cvdist.config import AdoptConfig
from cvdist.errors import DataError
from cvdist.reader import partition_value
from cvdist.shards import ADOPTED_NAME, MAGIC, MANIFEST_NAME
from cvdist.sources.columns import known_names, listed, shown
from cvdist.sources.rows import require_text, split_of

SUFFIX = ".parquet"
THREADS = 8
TAIL_BYTES = 1 << 16  # in which most footers lie as a whole
TEXTS = ("string", "large_string", "string_view")
PREPARE = "or prepare a data set of it by spark-submit jobs/prepare.py"


@dataclasses.dataclass(frozen=True)
class File:
    """A Parquet file, as its name and its footer describe it.

    Attributes:
        path: Below the data set.
        num_bytes: Its size.
        num_rows: Samples.
        split: What its path says.
        image: Column of the image bytes.
        is_partition: The label is in the path.
        is_number: The labels are whole numbers.
        class_names: Names of the numbers, which Hugging Face keeps in the file.
    """

    path: str
    num_bytes: int
    num_rows: int
    split: str | None
    image: str
    is_partition: bool
    is_number: bool
    class_names: tuple[str, ...]


def find_files(config: AdoptConfig) -> list[File]:
    """Returns the files to adopt, by path, each with its split.

    Raises:
        DataError: There are none, they are a data set of cvdist's already, or a column is missing or of a type that does not fit.
        StorageError: The file system failed.
    """
    url = config.url
    if not storage.stat(url).is_dir:
        raise DataError(f"{url} is a file; expected the folder of Parquet files; leave out the file's name")
    for name in (MANIFEST_NAME, ADOPTED_NAME):
        if not (config.replace and name == ADOPTED_NAME) and storage.exists(storage.join(url, name)):
            fix = "delete it, or add --replace" if name == ADOPTED_NAME else "use the data set as it is"
            raise DataError(f"{url} is a data set already: it holds {name}; expected Parquet files without one; {fix}")
    entries, _ = listed(url, (SUFFIX,))
    if not entries:
        raise DataError(f"{url} holds no files named *{SUFFIX}; expected the files of a data set; correct the URL")
    with concurrent.futures.ThreadPoolExecutor(THREADS, thread_name_prefix="footer") as pool:
        files = list(pool.map(lambda entry: describe(config, entry), entries))
    for file in files:
        if (file.image, file.is_partition, file.is_number) != (
            files[0].image, files[0].is_partition, files[0].is_number,
        ):  # fmt: skip
            raise DataError(
                f"{storage.join(url, file.path)} keeps its images or labels in another way than {files[0].path} (column, type,"
                f" or place of the label); expected files that are alike; adopt them apart, {PREPARE}"
            )
    return deal(config, files)


def describe(config: AdoptConfig, entry: storage.FileInfo) -> File:
    """Reads the footer of a file.

    Raises:
        DataError: It is damaged, or a column is missing or of a type that does not fit.
    """
    path = storage.relative(entry.url, config.url)
    require_text(path)
    _, footer = read_footer(entry.url, entry.size_bytes)
    try:
        metadata = pq.read_metadata(pa.BufferReader(footer))
        schema = metadata.schema.to_arrow_schema()
    except (pa.ArrowException, OSError) as error:
        raise damaged(entry.url, error) from None
    image = image_column(entry.url, schema, config.image)
    kind = leaf_type(schema, config.label)
    is_partition = kind is None and partition_value(path, config.label) is not None
    if not is_partition:
        require_labels(entry.url, schema, config.label)
    return File(
        path=path,
        num_bytes=entry.size_bytes,
        num_rows=metadata.num_rows,
        split=split_of(path),
        image=image,
        is_partition=is_partition,
        is_number=kind is not None and pa.types.is_integer(value_type(kind)),
        class_names=tuple(known_names(schema.metadata).get(config.label, ())),
    )


def damaged(url: str, error: object) -> DataError:
    """Words the error about a file that cannot be read."""
    text = "".join(char if char.isprintable() else "?" for char in " ".join(str(error).split()))[:300]
    return DataError(f"{url} cannot be read ({text}); expected a whole Parquet file; restore it, or remove it")


def read_footer(url: str, num_bytes: int) -> tuple[int, bytes]:
    """Returns where the footer of a Parquet file begins, and its bytes to the end of the file.

    Raises:
        DataError: There is none.

    Source: the Parquet file format: ... footer, its length in 4 bytes, PAR1.
    """
    start = max(0, num_bytes - TAIL_BYTES)
    tail = storage.read_range(url, start, num_bytes - start)
    size = int.from_bytes(tail[-8:-4], "little") + 8
    if tail[-4:] != MAGIC or size + len(MAGIC) > num_bytes:
        raise damaged(url, f"its last bytes are {tail[-4:]!r}, not a footer and {MAGIC!r}")
    if size > len(tail):
        tail = storage.read_range(url, num_bytes - size, size)
    return num_bytes - size, tail[-size:]


def value_type(kind: pa.DataType) -> pa.DataType:
    """Returns the type of the values of a column."""
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def leaf_type(schema: pa.Schema, name: str) -> pa.DataType | None:
    """Returns the type of a column, or of the field of a struct as in image.bytes; None where there is none."""
    if name in schema.names:
        return schema.field(schema.names.index(name)).type
    top, *fields = name.split(".")
    if not fields or top not in schema.names:
        return None
    kind = schema.field(schema.names.index(top)).type
    for field in fields:
        index = kind.get_field_index(field) if pa.types.is_struct(kind) else -1
        if index < 0:
            return None
        kind = kind.field(index).type
    return kind


def is_bytes(kind: pa.DataType) -> bool:
    """Says whether a column holds bytes."""
    kind = value_type(kind)
    return "binary" in str(kind) and not pa.types.is_nested(kind)


def image_column(url: str, schema: pa.Schema, name: str) -> str:
    """Returns the column of the image bytes: `name`, or its field `bytes`.

    Raises:
        DataError: There is none.
    """
    for candidate in (name, f"{name}.bytes"):
        kind = leaf_type(schema, candidate)
        if kind is not None and is_bytes(kind) and schema.names.count(candidate) < 2:
            return candidate
    fitting = [field.name for field in schema if is_bytes(field.type)]
    fitting += [f"{field.name}.bytes" for field in schema if leaf_type(schema, f"{field.name}.bytes") is not None]
    raise column_error(url, schema, "image", name, "a column of image bytes", fitting)


def require_labels(url: str, schema: pa.Schema, name: str) -> None:
    """Raises DataError unless there is a column of names, whole numbers or truth values."""

    def fits(kind: pa.DataType) -> bool:
        kind = value_type(kind)
        return pa.types.is_integer(kind) or pa.types.is_boolean(kind) or str(kind) in TEXTS

    kind = leaf_type(schema, name)
    if kind is None or not fits(kind) or schema.names.count(name) > 1:
        fitting = [field.name for field in schema if fits(field.type)]
        raise column_error(url, schema, "label", name, "a column of names or whole numbers, once", fitting)


def column_error(
    url: str, schema: pa.Schema, setting: str, name: str, expected: str, fitting: Sequence[str]
) -> DataError:
    """Words the error about a column that is missing or does not fit."""
    kind = leaf_type(schema, name)
    found = f"no column {name!r}" if kind is None else f"in column {name!r} {kind}"
    if schema.names.count(name) > 1:
        found = f"the column {name!r} {schema.names.count(name)} times"
    named = shown([f"{field.name} ({field.type})" for field in schema])
    close = difflib.get_close_matches(name, fitting, n=1, cutoff=0.5) or fitting[:1]
    fix = f"use for example --{setting} {close[0]}" if close else PREPARE.removeprefix("or ")
    return DataError(f"{url} has {found}, and the columns {named}; expected {expected}; {fix}")


def deal(config: AdoptConfig, files: list[File]) -> list[File]:
    """Gives every file its split.

    Raises:
        DataError: Some files say theirs and others do not, or there are too few for the shares.
    """
    shares = config.split_shares()
    if not shares:
        silent = [file.path for file in files if file.split is None]
        if silent and len(silent) < len(files):
            named = next(file.path for file in files if file.split)
            raise DataError(
                f"{config.url}: {silent[0]} says no split, but {named} does; expected all files in folders, or of names, that begin"
                f" with train, val, validation or test, or none; move {silent[0]}, or say by --split what all are"
            )
        return [dataclasses.replace(file, split=file.split or "train") for file in files]
    missing = {name: share * sum(file.num_rows for file in files) for name, share in shares.items()}
    dealt = []
    for file in sorted(files, key=lambda file: xxhash.xxh3_64_intdigest(file.path.encode())):
        split = max(missing, key=lambda name: missing[name])
        missing[split] -= file.num_rows
        dealt.append(dataclasses.replace(file, split=split))
    if absent := set(shares) - {file.split for file in dealt if file.num_rows}:
        raise DataError(
            f"{config.url}: {len(files)} files leave none for {min(absent)} in --split {config.split}; expected enough of them, because"
            f" whole files are dealt; name one split, {PREPARE}, which deals rows"
        )
    return sorted(dealt, key=lambda file: file.path)
