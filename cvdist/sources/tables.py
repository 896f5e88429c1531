"""Tables of paths and labels: CSV with a header, JSON lines, Parquet. The images they name are not looked at here."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import re
from collections.abc import Callable, Iterator, Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from cvdist import storage
from cvdist.config import PrepareConfig
from cvdist.errors import ConfigError, DataError
from cvdist.sources.columns import (
    choose,
    class_name,
    fit,
    group_value,
    listed,
    only_candidate,
    shown,
    split_name,
    stored_type,
    weight_value,
)
from cvdist.sources.rows import Columns, Row, Source, Value, is_text, relative_to_source, split_of, tables

SUFFIXES = (".csv", ".jsonl", ".ndjson", ".parquet")
PATH_NAMES = ("file_name", "filename", "file", "image", "image_path", "url")  # instead of path
MAX_LINE_BYTES = 16 << 20
MAX_INT = (1 << 63) - 1
SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
PLAIN_PATH = re.compile(r"[^/.\0:][^\0:]*[^/\0:]", re.DOTALL)
WHOLE_NUMBER = re.compile(r"-?(0|[1-9]\d{0,17})", re.ASCII)
DIGITS = re.compile(r"\+?\d+", re.ASCII)  # 007 and +7 are names
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?|[+-]?(nan|inf|infinity)", re.IGNORECASE | re.ASCII)
# JSON arrays and objects, as the type of a column that can be no label.
NESTED = pa.struct([])

Record = dict[str, Value]


@dataclasses.dataclass(frozen=True)
class Table:
    """A table that has been read once.

    Attributes:
        url: The file.
        split: What its name or folder says.
        types: Of each column.
        records: Reads it: where each row is, and its values.
    """

    url: str
    split: str | None
    types: dict[str, pa.DataType]
    records: Callable[[list[str]], Iterator[tuple[str, Record]]]


def table(config: PrepareConfig) -> Source:
    """Finds a table, or a folder of tables with the same columns, of which it learns columns and types.

    Raises:
        DataError: There is none, it cannot be read, or a column is missing or of a type that does not fit.
    """
    url = config.source_url
    num_others = 0
    urls = [url]
    if storage.stat(url).is_dir:
        files, num_others = listed(url, SUFFIXES)
        urls = [file.url for file in files]
    if not urls:
        raise DataError(
            f"{url} holds no table; expected files named {' '.join('*' + s for s in SUFFIXES)}; correct the URL"
        )
    found = [open_table(name, split_of(relative_to_source(name, url)) if name != url else None) for name in urls]
    first = found[0]
    types = dict(first.types)
    for other in found[1:]:
        if set(other.types) != set(types):
            raise DataError(
                f"{other.url} has the columns {shown(other.types)}; expected {shown(types)} as in {first.url};"
                " make them alike, or prepare one of them"
            )
        types = {name: unify(kind, other.types[name]) for name, kind in types.items()}
    names = list(types)
    image = config.image_column or ("path" if "path" in types else "")
    if not image:
        image = only_candidate(first.url, names, [name for name in PATH_NAMES if name in types], "paths")
    if image not in types:
        raise DataError(
            f"{first.url} has no column {image!r}, but {shown(names)}; expected it; name the right one by --image_column"
        )
    columns = choose(first.url, names, image, names, config)
    columns, extra = fit(first.url, columns, types, config)

    def read(source: Source) -> Iterator[pa.Table]:
        source.num_skipped += num_others
        for part in found:
            yield from tables(table_rows(part, columns, extra), extra)

    return Source("table", read, extra)


def unify(one: pa.DataType, other: pa.DataType) -> pa.DataType:
    """Returns the type that holds the values of two columns."""
    if one.equals(other):
        return one
    first, second = stored_type(one), stored_type(other)
    if first is None or second is None:
        return one if first is None else other
    if first.equals(second):
        return first
    return pa.string() if {pa.string(), pa.bool_()} & {first, second} else pa.float64()


def table_rows(part: Table, columns: Columns, extra: pa.Schema) -> Iterator[Row]:
    """Turns the records of a table into inputs."""
    root, folder = root_of(part.url), storage.parent(part.url).removesuffix("/")
    kinds = list(zip(extra.names, extra.types, strict=True))
    for where, record in part.records(columns.names):
        name = class_name(record.get(columns.label))
        path = record.get(columns.image)
        key, url, reason, detail = where, None, None, None
        if path is None or path == "":
            reason, detail = "no_path", f"column {columns.image!r} is empty"
        elif not isinstance(path, str):
            raise DataError(
                f"{where}: the path is {path!r}; expected text; correct it, or name the column of paths by --image_column"
            )
        elif not is_text(path):
            key, reason, detail = f"{where}: {path!a}", "bad_name", "the path is not valid Unicode"
        else:
            key = path
            try:
                url = url_of(path, root, folder)
            except ConfigError as error:
                reason, detail = "bad_path", str(error)
        if name is None and reason is None:
            reason, detail = "no_label", f"column {columns.label!r} is empty"
        yield Row(
            key,
            url,
            class_name=name,
            split=split_name(record.get(columns.split), where) if columns.split else part.split,
            weight=weight_value(record.get(columns.weight), where) if columns.weight else None,
            group=group_value(record.get(columns.group)) if columns.group else None,
            reason=reason,
            detail=detail,
            extra=tuple([convert(record.get(name), kind, where) for name, kind in kinds]),
        )


def url_of(path: str, root: str, folder: str) -> str:
    """Returns the URL of a path: one with a scheme as it is, an absolute one on the table's file system, others beside the table.

    Raises:
        ConfigError: There can be no such URL.
    """
    if PLAIN_PATH.fullmatch(path) and "//" not in path and "/." not in path:
        return f"{folder}/{path}"  # the most, and nothing to check
    if SCHEME.match(path):
        return storage.check_url(path)
    return storage.check_url(root + path if path.startswith("/") else f"{folder}/{path}")


def root_of(url: str) -> str:
    """Returns scheme and host of a URL."""
    return url[: url.index("/", url.index("://") + 3)]


def convert(value: Value, kind: pa.DataType, where: str) -> Value:
    """Returns a further label as its column stores it; empty text is no value."""
    if value is None or value == "":
        return None
    if pa.types.is_string(kind):
        return class_name(value)
    if pa.types.is_boolean(kind):
        return value if isinstance(value, bool) else str(value).lower() == "true"
    if pa.types.is_floating(kind):
        return float(value)
    if not -MAX_INT <= int(value) <= MAX_INT:
        raise DataError(f"{where}: {value} is too large; expected a whole number of 64 bits; correct it")
    return int(value)


def open_table(url: str, split: str | None) -> Table:
    """Opens a table by its suffix; CSV and JSON lines are read once to learn their types.

    Raises:
        DataError: It cannot be read.
    """
    suffix = url.lower().rpartition(".")[2]
    if suffix == "csv":
        return Table(
            url, split, learn_types(csv_records(url), csv_names(url), text_kind), lambda names: csv_records(url)
        )
    if suffix in ("jsonl", "ndjson"):
        return Table(url, split, learn_types(json_records(url), [], json_kind), lambda names: json_records(url))
    if suffix != "parquet":
        raise DataError(f"{url}: is no table; expected a file named {' '.join('*' + s for s in SUFFIXES)}; convert it")
    schema = parquet_schema(url)
    types = dict(zip(schema.names, schema.types, strict=True))
    return Table(url, split, types, lambda names: parquet_records(url, names))


def csv_names(url: str) -> list[str]:
    """Returns the header of a CSV file.

    Raises:
        DataError: There is none, or a name is empty or there twice.
    """
    with storage.open_read(url) as stream, io.TextIOWrapper(stream, "utf-8-sig", newline="") as text:
        try:
            names = next(csv.reader(text, strict=True), [])
        except (csv.Error, UnicodeDecodeError) as error:
            raise unreadable(url, 0, error) from None
    if not names or not all(names) or len(set(names)) < len(names):
        raise DataError(
            f"{url}: the header is {','.join(names)[:200]!r}; expected different names with commas between them, as path,label;"
            " add a first line that names the columns"
        )
    return names


def csv_records(url: str) -> Iterator[tuple[str, Record]]:
    """Yields the rows of a CSV file; all values are text. Empty lines are no rows."""
    with storage.open_read(url) as stream, io.TextIOWrapper(stream, "utf-8-sig", newline="") as text:
        reader = csv.reader(text, strict=True)
        try:
            names = next(reader, [])
            for values in reader:
                if len(values) == len(names):
                    yield f"{url}: line {reader.line_num}", dict(zip(names, values, strict=True))
                elif values:
                    raise DataError(
                        f"{url}: line {reader.line_num} has {len(values)} values; expected {len(names)} as in the header; correct it,"
                        ' and write values that hold commas in ""'
                    )
        except (csv.Error, UnicodeDecodeError) as error:
            raise unreadable(url, reader.line_num, error) from None


def unreadable(url: str, line: int, error: Exception) -> DataError:
    """Words the error about text that cannot be read."""
    reason = f"no UTF-8: {error.reason}" if isinstance(error, UnicodeDecodeError) else str(error)
    return DataError(f"{url}: behind line {line}: {reason}; expected CSV in UTF-8; correct or convert it")


def json_records(url: str) -> Iterator[tuple[str, Record]]:
    """Yields the objects of a file of JSON lines. Empty lines are none."""
    with storage.open_read(url) as stream:
        number = 0
        while line := stream.readline(MAX_LINE_BYTES):
            number += 1
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(
                    f"{url}: line {number} is no JSON ({error}); expected an object such as"
                    ' {"path": "a.jpg", "label": "cat"}; correct it'
                ) from None
            if not isinstance(record, dict):
                raise DataError(
                    f'{url}: line {number} is no object; expected {{"path": ..., "label": ...}}; correct it'
                )
            yield f"{url}: line {number}", record


def parquet_schema(url: str) -> pa.Schema:
    """Returns the schema of a Parquet file.

    Raises:
        DataError: It is none.
    """
    with storage.open_read(url) as stream:
        try:
            return pq.read_schema(pa.PythonFile(stream, mode="r"))
        except (pa.ArrowException, OSError) as error:
            raise damaged(url, error) from None


def damaged(url: str, error: Exception) -> DataError:
    """Words the error about a Parquet file that cannot be read."""
    text = "".join(char if char.isprintable() else "?" for char in " ".join(str(error).split())) or type(error).__name__
    return DataError(f"{url}: cannot be read ({text}); expected a whole Parquet file; restore it")


def parquet_records(url: str, names: list[str]) -> Iterator[tuple[str, Record]]:
    """Yields the rows of some columns of a Parquet file."""
    with storage.open_read(url) as stream:
        number = 0
        try:
            file = pq.ParquetFile(pa.PythonFile(stream, mode="r"), buffer_size=1 << 20, pre_buffer=False)
            for batch in file.iter_batches(8192, columns=names, use_threads=False):
                for record in batch.to_pylist():
                    number += 1
                    yield f"{url}: row {number}", record
        except (pa.ArrowException, OSError) as error:
            raise damaged(url, error) from None


def text_kind(value: object) -> str:
    """Returns what a text of a CSV file stands for."""
    text = str(value)
    if WHOLE_NUMBER.fullmatch(text):
        return "int"
    if NUMBER.fullmatch(text):
        return "string" if DIGITS.fullmatch(text) else "float"
    return "bool" if text.lower() in ("true", "false") else "string"


def json_kind(value: object) -> str:
    """Returns what a value of JSON is."""
    return {bool: "bool", int: "int", float: "float", str: "string"}.get(type(value), "nested")


def learn_types(
    records: Iterator[tuple[str, Record]], names: Sequence[str], kind_of: Callable[[object], str]
) -> dict[str, pa.DataType]:
    """Reads all records once; returns the type that holds all values of each column."""
    kinds: dict[str, set[str]] = {name: set() for name in names}
    for _, record in records:
        for name, value in record.items():
            seen = kinds.setdefault(name, set())
            if value is not None and value != "" and not (kind_of is text_kind and "string" in seen):
                seen.add(kind_of(value))
    return {name: column_type(seen) for name, seen in kinds.items()}


def column_type(kinds: set[str]) -> pa.DataType:
    """Returns the type for values of these kinds; text where nothing else fits, and where there are none."""
    if "nested" in kinds:
        return NESTED
    if kinds == {"bool"}:
        return pa.bool_()
    if kinds and kinds <= {"int", "float"}:
        return pa.float64() if "float" in kinds else pa.int64()
    return pa.string()
