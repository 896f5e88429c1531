"""Input layouts: a URL to a stream of inputs with their classes, splits and further labels.

    source = open_source(config)
    for table in source.batches():  # of the columns ROWS and source.extra
        ...

Nothing is read of the images themselves, except where Parquet holds them: such a source has containers, which `pack` copies out.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator

from cvdist import storage
from cvdist.config import PrepareConfig
from cvdist.errors import ConfigError, DataError, NotFoundError
from cvdist.sources import archives, folders, parquet, tables
from cvdist.sources.parquet import image_kind, pack
from cvdist.sources.rows import IMAGE_SUFFIXES, ROWS, SPLIT_FOLDERS, Container, Source, is_image_path

__all__ = ["IMAGE_SUFFIXES", "ROWS", "Container", "Source", "open_source", "pack"]

log = logging.getLogger("cvdist.sources")
LAYOUTS: dict[str, Callable[[PrepareConfig], Source]] = {
    "class_folders": folders.class_folders,
    "flat_names": folders.flat_names,
    "table": tables.table,
    "tar": archives.tar,
    "parquet": parquet.parquet,
    "petastorm": parquet.petastorm,
}
# Settings that mean something for some layouts alone.
MEANT_FOR = {
    "label_pattern": ("flat_names",),
    "image_column": ("table", "parquet", "petastorm"),
    "label_columns": ("table", "tar", "parquet", "petastorm"),
    "group_column": ("table", "tar", "parquet", "petastorm"),
}
TABLE_SUFFIXES = (".csv", ".jsonl", ".ndjson")
ARCHIVE_SUFFIXES = (".tar", *archives.COMPRESSED)


def open_source(config: PrepareConfig) -> Source:
    """Finds out how the source is laid out, where config.source does not say, and what it holds besides images.

    Raises:
        ConfigError: A setting is missing, or means nothing for this layout.
        DataError: There is no such source, or it is not laid out as it should be.
    """
    url = config.source_url
    try:
        is_dir = storage.stat(url).is_dir
    except NotFoundError:
        raise DataError(
            f"{url} does not exist; expected a folder of class folders, a table or tar files; correct the URL"
        ) from None
    kind = config.source if config.source != "auto" else detect(config, is_dir)
    for name, kinds in MEANT_FOR.items():
        value = getattr(config, name)
        if value is not None and kind not in kinds:
            raise ConfigError(
                f"{name}: {value!r} means nothing for {url}, which is read as {kind}; expected it with {', '.join(kinds)}; leave it"
                " out, or say by --source how to read it"
            )
    if not is_dir and kind in ("class_folders", "flat_names", "petastorm"):
        raise DataError(f"{url} is a file; expected a folder for {kind}; correct the URL, or --source")
    log.info("%s is read as %s", url, kind)
    return LAYOUTS[kind](config)


def detect(config: PrepareConfig, is_dir: bool) -> str:
    """Returns the layout of a source.

    Raises:
        DataError: It is a file that is no source, or holds tables and archives side by side.
    """
    url = config.source_url
    if not is_dir:
        return by_suffix(url, config)
    if config.label_pattern is not None:
        return "flat_names"
    if parquet.read_manifest(url) is not None or parquet.read_fields(url) is not None:
        return "petastorm"
    kinds: dict[str, str] = {}
    for name in data_files(url):
        kinds.setdefault(suffix_kind(name), name)
    if not kinds:
        return "class_folders"
    if len(kinds) > 1:
        raise DataError(
            f"{url} holds {' and '.join(sorted(kinds.values()))}; expected files of one kind; say by --source which of them to read"
        )
    (kind,) = kinds
    return parquet_kind(parquet.files_of(url)[0][0].url, config) if kind == "parquet" else kind


def data_files(url: str) -> Iterator[str]:
    """Yields the names of tables and archives in a folder, or in its split folders; none where there are images or other folders."""
    names: list[str] = []
    inner: list[str] = []
    for entry in storage.scan_dir(url):
        name = storage.name(entry.url)
        if name.startswith((".", "_")):
            continue
        if entry.is_dir:
            inner.append(name)
        elif suffix_kind(name):
            names.append(name)
        elif is_image_path(name):
            return
    if any(name not in SPLIT_FOLDERS for name in inner):
        return
    for folder in inner:
        for entry in storage.scan_dir(storage.join(url, folder)):
            name = storage.name(entry.url)
            if not name.startswith((".", "_")) and (entry.is_dir or is_image_path(name)):
                return
            if not name.startswith((".", "_")) and suffix_kind(name):
                names.append(f"{folder}/{name}")
    yield from sorted(names)


def suffix_kind(name: str) -> str:
    """Returns what a file's name promises: table, tar or parquet; nothing where it promises no source."""
    name = name.lower()
    if name.endswith(TABLE_SUFFIXES):
        return "table"
    if name.endswith(ARCHIVE_SUFFIXES):
        return "tar"
    return "parquet" if name.endswith(parquet.SUFFIX) else ""


def by_suffix(url: str, config: PrepareConfig) -> str:
    """Returns the layout of a file.

    Raises:
        DataError: It is none.
    """
    kind = suffix_kind(url)
    if not kind:
        raise DataError(
            f"{url} is a file of unknown kind; expected a folder, or a file named *.csv *.jsonl *.parquet *.tar; correct the URL, or"
            " convert it"
        )
    return parquet_kind(url, config) if kind == "parquet" else kind


def parquet_kind(url: str, config: PrepareConfig) -> str:
    """Tells whether Parquet files hold image bytes or paths."""
    schema = tables.parquet_schema(url)
    if config.image_column in schema.names:
        return "parquet" if image_kind(schema.field(config.image_column).type) else "table"
    return "parquet" if parquet.image_columns(schema) else "table"
