"""Which columns of a table are what, and what their values mean; for tables of paths and for tables of image bytes."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
from collections.abc import Iterable, Sequence
from typing import Any

import pyarrow as pa

from cvdist import storage
from cvdist.config import PrepareConfig, canonical_split, different_names
from cvdist.errors import DataError
from cvdist.sources.rows import SPLIT_FOLDERS, Columns, Value

log = logging.getLogger("cvdist.sources")


def label_columns(config: PrepareConfig) -> tuple[str, ...]:
    """Returns the names that config.label_columns lists; none where it is not set.

    Raises:
        ConfigError: A name is empty or there twice.
    """
    if config.label_columns is None:
        return ()
    return different_names("label_columns", config.label_columns, of="columns", example="label,age")


def choose(url: str, names: Sequence[str], image: str, others: Sequence[str], config: PrepareConfig) -> Columns:
    """Says which of a table's columns are what.

    Args:
        url: The table, for messages.
        names: Its columns.
        image: The one of paths or image bytes.
        others: Without config.label_columns, those of these columns that nothing else is known about are further labels.
        config: Settings.

    Raises:
        DataError: A column is missing or there twice.
    """
    twice = sorted({name for name in names if list(names).count(name) > 1})
    if twice:
        raise DataError(f"{url}: the column {twice[0]!r} is there twice; expected each once; rename one of them")
    wanted = label_columns(config)
    label, further = wanted[0] if wanted else "label", wanted[1:]
    for name, setting in [(label, "label_columns"), *((name, "label_columns") for name in further)] + (
        [(config.group_column, "group_column")] if config.group_column else []
    ):
        if name not in names:
            raise DataError(
                f"{url} has no column {name!r}, but {shown(names)}; expected it; name the right one by --{setting}"
            )
    split, weight = (name if name in names and name not in wanted else None for name in ("split", "weight"))
    if not wanted:
        used = {image, label, split, weight, config.group_column}
        further = tuple(name for name in others if name not in used)
    return Columns(image, label, split, weight, config.group_column, further)


def shown(names: Iterable[str]) -> str:
    """Returns names for a message, on one line."""
    return ", ".join(name if name.isprintable() else ascii(name) for name in names)


def only_candidate(url: str, names: Sequence[str], candidates: Sequence[str], what: str) -> str:
    """Returns the one column that fits.

    Raises:
        DataError: There is none, or more than one.
    """
    if len(candidates) == 1:
        return candidates[0]
    found = f"several columns of {what} ({shown(candidates)})" if candidates else f"no column of {what}"
    raise DataError(
        f"{url} has {found} among {shown(names) or 'none'}; expected one; name the right one by --image_column"
    )


def stored_type(kind: pa.DataType) -> pa.DataType | None:
    """Returns the type in which a column's values are listed; None where they can be no label. A column without values is text."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if pa.types.is_boolean(kind):
        return pa.bool_()
    if pa.types.is_integer(kind):
        return pa.int64()
    if pa.types.is_floating(kind):
        return pa.float64()
    is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind)
    return pa.string() if is_text else None


def fit(url: str, columns: Columns, types: dict[str, pa.DataType], config: PrepareConfig) -> tuple[Columns, pa.Schema]:
    """Checks that the class and further labels are of types that labels can have.

    A further column that nobody asked for by name is left out, and said, where it cannot be one.

    Returns:
        The columns, and the types of those in `extra`.

    Raises:
        DataError: A column that was asked for cannot be a label.
    """
    require_names(url, columns.label, types[columns.label])
    known = {name: stored_type(types[name]) for name in columns.extra}
    for name, kind in known.items():
        if kind is None:
            if config.label_columns is not None:
                raise DataError(
                    f"{url}: column {name!r} holds {types[name]}; expected text, numbers or truth values; leave it out of"
                    " --label_columns, or convert it"
                )
            log.warning("%s: column %r holds %s, which is no label: left out", url, name, types[name])
    extra = {name: kind for name, kind in known.items() if kind is not None}
    return dataclasses.replace(columns, extra=tuple(extra)), pa.schema(list(extra.items()))


def require_names(url: str, name: str, kind: pa.DataType) -> None:
    """Raises DataError where a column cannot hold the class."""
    stored = stored_type(kind)
    if stored is None or pa.types.is_floating(stored):
        raise DataError(
            f"{url}: column {name!r} holds {kind}; expected names or whole numbers for the class; name another column first in"
            " --label_columns, or convert it"
        )


def class_name(value: Value, names: Sequence[str] | None = None) -> str | None:
    """Returns the class that a value stands for; None for no class.

    Args:
        value: Text, a whole number or a truth value.
        names: Names of the numbers.
    """
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int) and names is not None:
        return names[value] if 0 <= value < len(names) else None
    return None if value is None or value == "" else str(value)


def split_name(value: Value, where: str) -> str | None:
    """Returns the one name of a split.

    Raises:
        DataError: The value is none.
    """
    if value is None or value == "":
        return None
    if value not in SPLIT_FOLDERS:
        raise DataError(
            f"{where}: the split is {value!r}; expected train, val, validation or test; correct it, or leave the column out"
        )
    return canonical_split(str(value))


def weight_value(value: Value, where: str) -> float | None:
    """Returns a weight.

    Raises:
        DataError: The value is none.
    """
    if value is None or value == "":
        return None
    try:
        weight = float(value)
    except ValueError:
        weight = math.nan
    if not 0 <= weight < math.inf:
        raise DataError(f"{where}: the weight is {value!r}; expected a number from 0 on; correct it")
    return weight


def group_value(value: Value) -> str | None:
    """Returns the group that a value stands for; None for no group."""
    return None if value is None or value == "" else str(value)


def known_names(metadata: dict[bytes, bytes] | None) -> dict[str, list[str]]:
    """Returns the class names that Hugging Face's `datasets` keeps in a file's metadata, by column.

    Source: datasets 2.0 to 4, arrow_writer.py: the key huggingface holds JSON, {"info": {"features": {COLUMN: FEATURE}}}.
    """
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
        items: Iterable[tuple[str, Any]] = features.items()
        found = {
            column: list(feature["names"])
            for column, feature in items
            if isinstance(feature, dict) and feature.get("_type") == "ClassLabel"
        }
    except (KeyError, ValueError, TypeError, AttributeError):
        return {}
    return {column: names for column, names in found.items() if all(isinstance(name, str) for name in names)}


def listed(folder_url: str, suffixes: tuple[str, ...]) -> tuple[list[storage.FileInfo], int]:
    """Returns the visible files below a folder that end in one of `suffixes`, by URL, and the number of the others."""
    found, num_others = [], 0
    for entry in storage.walk_files(folder_url):
        path = storage.relative(entry.url, folder_url)
        if entry.url.lower().endswith(suffixes) and not any(part.startswith((".", "_")) for part in path.split("/")):
            found.append(entry)
        else:
            num_others += 1
    return sorted(found, key=lambda entry: entry.url), num_others
