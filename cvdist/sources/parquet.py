"""Images as bytes in columns of Parquet files: Hugging Face's, Petastorm's, and cvdist's own data sets."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cvdist import storage
from cvdist.config import PrepareConfig
from cvdist.errors import DataError
from cvdist.sources.columns import (
    choose,
    class_name,
    fit,
    group_value,
    known_names,
    listed,
    only_candidate,
    shown,
    split_name,
    stored_type,
    weight_value,
)
from cvdist.sources.rows import Container, Packing, Row, Source, relative_to_source, require_text, split_of, tables
from cvdist.sources.tables import convert, damaged, parquet_schema
from cvdist.sources.unischema import UNISCHEMA_KEY, Field, read_unischema

SUFFIX = ".parquet"
COMMON_METADATA = "_common_metadata"
MANIFEST_NAME = "manifest.json"
IMAGE_CODECS = ("CompressedImageCodec", "NdarrayCodec")
PACKED_ROWS = 64  # images held at once
THREADS = 8


def image_kind(kind: pa.DataType) -> str | None:
    """Says how a column holds image bytes: as such, or in a struct with the field `bytes`; None where it holds none."""
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        return "bytes"
    if pa.types.is_struct(kind):
        index = kind.get_field_index("bytes")
        if index >= 0 and image_kind(kind.field(index).type) == "bytes":
            return "struct"
    return None


def image_columns(schema: pa.Schema) -> list[str]:
    """Returns the columns that hold bytes."""
    return [field.name for field in schema if image_kind(field.type)]


def files_of(url: str) -> tuple[list[storage.FileInfo], int]:
    """Returns the Parquet files of a source, by URL, and the number of other files."""
    info = storage.stat(url)
    files, num_others = listed(url, (SUFFIX,)) if info.is_dir else ([info], 0)
    if not files:
        raise DataError(f"{url} holds no table; expected files named *{SUFFIX}; correct the URL")
    return files, num_others


def parquet(config: PrepareConfig) -> Source:
    """Finds Parquet files with a column of image bytes.

    Raises:
        DataError: There is none, a column is missing or of a type that does not fit, or the files are not alike.
    """
    files, num_others = files_of(config.source_url)
    first = parquet_schema(files[0].url)
    image = config.image_column or only_candidate(files[0].url, first.names, image_columns(first), "image bytes")
    packing = plan(files[0].url, first, image, first.names, {}, config)
    splits = {file.url: split_of(relative_to_source(file.url, config.source_url)) for file in files}
    if not storage.stat(config.source_url).is_dir:
        splits = {}
    return packed("parquet", config, [(file, splits.get(file.url)) for file in files], packing, num_others)


def plan(
    url: str,
    schema: pa.Schema,
    image: str,
    others: Sequence[str],
    names: dict[str, tuple[str, ...]],
    config: PrepareConfig,
) -> Packing:
    """Says which columns of a file are what.

    Raises:
        DataError: A column is missing, or of a type that does not fit.
    """
    kind = image_kind(schema.field(image).type) if image in schema.names else None
    if kind is None:
        found = f"column {image!r} of {schema.field(image).type}" if image in schema.names else f"no column {image!r}"
        raise DataError(
            f"{url} has {found}, and the columns {shown(schema.names)}; expected one of image bytes; name the right one by"
            " --image_column"
        )
    columns = choose(url, schema.names, image, others, config)
    names = {name: tuple(known) for name, known in known_names(schema.metadata).items()} | names
    types = {
        name: pa.string() if name in names and pa.types.is_integer(kind) else kind
        for name, kind in zip(schema.names, schema.types, strict=True)
    }
    columns, extra = fit(url, columns, types, config)
    return Packing(columns, kind == "struct", {name: names[name] for name in columns.names if name in names}, extra)


def packed(
    kind: str,
    config: PrepareConfig,
    files: Sequence[tuple[storage.FileInfo, str | None]],
    packing: Packing,
    num_skipped: int,
) -> Source:
    """Makes the source of files that are all like the first.

    Raises:
        DataError: One is damaged, or has other columns, types or class names.
    """

    def container(file: storage.FileInfo, split: str | None) -> Container:
        path = relative_to_source(file.url, config.source_url)
        require_text(path)
        with storage.open_read(file.url) as stream:
            try:
                opened = pq.ParquetFile(pa.PythonFile(stream, mode="r"))
            except (pa.ArrowException, OSError) as error:
                raise damaged(file.url, error) from None
            schema, num_rows = opened.schema_arrow, opened.metadata.num_rows
        require_alike(file.url, schema, files[0][0].url, packing)
        return Container(file.url, file.size_bytes, path, num_rows, split, packing)

    def read(source: Source) -> Iterator[pa.Table]:
        raise ValueError(f"{config.source_url}: a source with containers is to be packed")

    source = Source(kind, read, packing.extra)
    with concurrent.futures.ThreadPoolExecutor(THREADS, thread_name_prefix="footer") as pool:
        source.containers = tuple(pool.map(container, *zip(*files, strict=True)))
    source.num_skipped = num_skipped
    return source


def require_alike(url: str, schema: pa.Schema, first_url: str, packing: Packing) -> None:
    """Raises DataError unless a file has the columns, types and class names of the first."""
    names = known_names(schema.metadata)
    for name in packing.columns.names:
        kind = schema.field(name).type if name in schema.names else None
        if kind is None:
            found = "is missing"
        elif name in names and tuple(names[name]) != packing.names.get(name):
            found = f"has the class names {shown(names[name])[:200]}"
        elif name == packing.columns.image:
            found = "" if image_kind(kind) == ("struct" if packing.is_struct else "bytes") else f"holds {kind}"
        elif pa.types.is_null(kind) or name in packing.names or name not in packing.extra.names:
            found = "" if stored_type(kind) else f"holds {kind}"
        else:
            found = "" if stored_type(kind) == packing.extra.field(name).type else f"holds {kind}"
        if found:
            raise DataError(f"{url}: column {name!r} {found}; expected what it is in {first_url}; make the files alike")


def petastorm(config: PrepareConfig) -> Source:
    """Finds a data set of Petastorm's, by its own schema, or of cvdist's, by its manifest.

    Raises:
        DataError: There is none, its schema asks for what is no schema, or its images are stored in another way.
    """
    url = config.source_url
    manifest = read_manifest(url)
    if manifest is not None:
        return own(config, manifest)
    fields = read_fields(url)
    if fields is None:
        raise DataError(
            f"{url} is no data set of Petastorm's; expected a folder with {COMMON_METADATA} that holds its schema; correct the URL, or"
            " read its files by --source parquet"
        )
    candidates = [field.name for field in fields if field.codec in IMAGE_CODECS and field.num_dimensions in (2, 3)]
    image = config.image_column or only_candidate(url, [field.name for field in fields], candidates, "images")
    for field in fields:
        if field.name == image and (field.codec not in IMAGE_CODECS or field.dtype not in ("uint8", "u1")):
            raise DataError(
                f"{url}: field {image!r} is of {field.dtype} and stored by {field.codec}; expected uint8 by {' or '.join(IMAGE_CODECS)};"
                " name another by --image_column, or write it anew"
            )
    files, num_others = files_of(url)
    packing = plan(files[0].url, parquet_schema(files[0].url), image, (), {}, config)
    return packed("petastorm", config, [(file, None) for file in files], packing, num_others - 1)


def read_fields(url: str) -> list[Field] | None:
    """Returns Petastorm's schema of a folder; None where it has none."""
    metadata_url = storage.join(url, COMMON_METADATA)
    if not storage.exists(metadata_url):
        return None
    pickled = (parquet_schema(metadata_url).metadata or {}).get(UNISCHEMA_KEY)
    return None if pickled is None else read_unischema(pickled, metadata_url)


def read_manifest(url: str) -> dict[str, Any] | None:
    """Returns the manifest of a data set of cvdist's; None where the folder is none."""
    manifest_url = storage.join(url, MANIFEST_NAME)
    if not storage.exists(manifest_url):
        return None
    try:
        body = json.loads(storage.read_bytes(manifest_url))
    except ValueError:
        return None
    return body if isinstance(body, dict) and body.get("format") == "cvdist" else None


def own(config: PrepareConfig, manifest: dict[str, Any]) -> Source:
    """Makes the source of a data set of cvdist's: its shards, their splits, the names of its classes."""
    url = config.source_url
    try:
        shards = [(shard, split) for split, part in manifest["splits"].items() for shard in part["shards"]]
        files = [
            (
                storage.FileInfo(
                    storage.join(url, shard["path"]), int(shard["num_bytes"]), is_dir=False, modified_s=0.0
                ),
                split,
            )
            for shard, split in shards
        ]
        targets = {target["name"]: tuple(target["classes"]) for target in manifest.get("targets", ())}
        names = {"label": tuple(manifest["classes"])} | {name: classes for name, classes in targets.items() if classes}
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise DataError(
            f"{storage.join(url, MANIFEST_NAME)} is damaged ({error!r}); expected the file that prepare wrote; restore it"
        ) from None
    if not files:
        raise DataError(f"{url} holds no shards; expected a data set with images; correct the URL")
    first = files[0][0].url
    packing = plan(first, parquet_schema(first), config.image_column or "image", list(targets), names, config)
    # Numbers of classes beyond their names are null anyway; binary targets hold -1.
    packing = dataclasses.replace(packing, unknown={name: -1 for name, classes in targets.items() if not classes})
    return packed("petastorm", config, files, packing, 0)


def pack(config: PrepareConfig, container: Container, stream: BinaryIO) -> Iterator[pa.Table]:
    """Copies the image bytes of a file one behind the other; few images are held at once.

    Args:
        config: Settings.
        container: One of those of the source.
        stream: Takes the bytes; offsets count from the first of them.

    Yields:
        The inputs, in the order of the file, without the URL of `stream`.

    Raises:
        DataError: The file is damaged, or a value does not fit its column.
    """
    yield from tables(pack_rows(container, stream), container.packing.extra)


def pack_rows(container: Container, stream: BinaryIO) -> Iterator[Row]:
    """Copies the images and yields their rows."""
    columns, offset = container.packing.columns, 0
    for number, (image, record) in enumerate(records(container)):
        row = labelled(container, f"{container.path}/{number}", record)
        if not image:
            yield row.rejected(
                "no_image", f"column {columns.image!r} is empty" + container.packing.is_struct * ": no bytes in it"
            )
            continue
        row = row._replace(size_bytes=len(image), sha256=hashlib.sha256(image).hexdigest())
        if row.class_name is None:
            value = record[columns.label]
            yield row.rejected("no_label", f"{value!r} in column {columns.label!r} is no class")
            continue
        stream.write(image)
        yield row._replace(offset=offset)
        offset += len(image)


def records(container: Container) -> Iterator[tuple[bytes | None, dict[str, Any]]]:
    """Yields image bytes and the other columns of each row."""
    columns, is_struct = container.packing.columns, container.packing.is_struct
    others = [name for name in columns.names if name != columns.image]
    with storage.open_read(container.url) as stream:
        try:
            # With a buffer and without reading ahead (the default of newer pyarrow), so that a long column is not read as a whole.
            file = pq.ParquetFile(pa.PythonFile(stream, mode="r"), buffer_size=1 << 20, pre_buffer=False)
            for group in range(file.num_row_groups):
                wanted = [f"{columns.image}.bytes" if is_struct else columns.image, *others]
                for batch in file.iter_batches(PACKED_ROWS, row_groups=[group], columns=wanted, use_threads=False):
                    images = batch.column(columns.image)
                    images = pc.struct_field(images, "bytes") if is_struct else images
                    for image, record in zip(images, batch.select(others).to_pylist(), strict=True):
                        yield image.as_py(), record
        except (pa.ArrowException, OSError) as error:
            raise damaged(container.url, error) from None


def labelled(container: Container, key: str, record: dict[str, Any]) -> Row:
    """Returns a row with all but the image."""
    packing = container.packing
    columns, names = packing.columns, packing.names
    where = f"{container.url}: row {key.rpartition('/')[2]}"
    further = {name: record[name] if record[name] != packing.unknown.get(name) else None for name in columns.extra}
    further |= {name: class_name(record[name], names[name]) for name in columns.extra if name in names}
    return Row(
        key,
        class_name=class_name(record[columns.label], names.get(columns.label)),
        split=(split_name(record[columns.split], where) if columns.split else None) or container.split,
        weight=weight_value(record[columns.weight], where) if columns.weight else None,
        group=group_value(record[columns.group]) if columns.group else None,
        extra=tuple(convert(further[field.name], field.type, where) for field in packing.extra),
    )
