"""What a source lists, as plain values, for tests."""

from __future__ import annotations

import io
from typing import Any

import pytest

from cvdist import storage
from cvdist.config import PrepareConfig
from cvdist.errors import ConfigError, DataError
from cvdist.sources import ROWS, Source, open_source, pack


def opened(url: str, **settings: Any) -> Source:
    """Opens a source."""
    return open_source(PrepareConfig(source_url=url, target_url="file:///nowhere/set", **settings))


def listed(source: Source) -> list[dict[str, Any]]:
    """Returns all rows of a source without containers."""
    rows: list[dict[str, Any]] = []
    for table in source.batches():
        assert table.schema.names == [*ROWS.names, *source.extra.names]
        assert table.schema.types == [*ROWS.types, *source.extra.types]
        assert 0 < table.num_rows <= 65536
        rows += table.to_pylist()
    return rows


def packed(source: Source, url: str, **settings: Any) -> list[tuple[dict[str, Any], bytes]]:
    """Returns all rows of a source with containers, each with its bytes."""
    found = []
    for container in source.containers:
        stream = io.BytesIO()
        config = PrepareConfig(source_url=url, target_url="file:///nowhere/set", **settings)
        rows = [row for table in pack(config, container, stream) for row in table.to_pylist()]
        data = stream.getvalue()
        assert len(rows) == container.num_rows
        found += [(row, b"" if row["offset"] is None else data[row["offset"] :][: row["size_bytes"]]) for row in rows]
        assert sum(len(image) for _, image in found[-len(rows) :]) == len(data)
    return found


def images(source: Source, url: str, **settings: Any) -> list[tuple[dict[str, Any], bytes]]:
    """Returns all rows of any source, each with the bytes that its address leads to."""
    if source.containers:
        return packed(source, url, **settings)
    found = []
    for row in listed(source):
        where = row["url"] or storage.join(url, row["key"])
        if row["reason"]:
            data = b""
        elif row["offset"] is None:
            data = storage.read_bytes(where)
        else:
            data = storage.read_range(where, row["offset"], row["size_bytes"])
        found.append((row, data))
    return found


def refusal(url: str, kind: type[Exception] = DataError, **settings: Any) -> str:
    """Returns the message with which a source is refused: what was found and where, what was expected, and the fix."""
    with pytest.raises(kind) as caught:
        source = opened(url, **settings)
        if source.containers:
            packed(source, url, **settings)
        else:
            listed(source)
    message = str(caught.value)
    assert isinstance(caught.value, (DataError, ConfigError))
    assert "; expected " in message
    assert message.count("; ") >= 2
    assert "\n" not in message
    return message
