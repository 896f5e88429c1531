"""Row groups read from their bytes alone, against pyarrow."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cvdist import pages, reader
from cvdist.shards import MAGIC, Row, ShardWriter, Target, shard_schema


def written(
    sizes: Sequence[int], row_group_bytes: int, targets: Sequence[Target] = (), is_weighted: bool = False
) -> bytes:
    """Returns a shard of images of so many bytes."""
    rng = np.random.default_rng(len(sizes))
    stream = io.BytesIO()
    others = (0.5,) * is_weighted + (1,) * len(targets)
    with ShardWriter(stream, row_group_bytes, shard_schema(targets, is_weighted=is_weighted)) as writer:
        for index, size in enumerate(sizes):
            writer.add(Row(f"key {index}", index % 7 - 1, rng.bytes(size), index + 1, 2 * index, "ab" * 32, others))
        writer.close("a.parquet")
    return stream.getvalue()


def row_groups(data: bytes) -> list[tuple[memoryview, pa.Table]]:
    """Returns the bytes of each row group, as the manifest names them, and what pyarrow reads."""
    file = pq.ParquetFile(io.BytesIO(data))
    found, start = [], len(MAGIC)
    for index in range(file.num_row_groups):
        last = index + 1 == file.num_row_groups
        group = file.metadata.row_group(index)
        end = len(data) if last else file.metadata.row_group(index + 1).column(0).data_page_offset
        assert group.num_columns == len(file.schema_arrow.names)
        found.append((memoryview(data)[start:end], file.read_row_group(index)))
        start = end
    return found


def assert_same(data: bytes) -> int:
    """Compares all row groups; returns how many there are."""
    groups = row_groups(data)
    for stretch, table in groups:
        rows = reader.plain_rows("here", stretch, table.num_rows)
        assert rows is not None
        assert [bytes(rows.image(row)) for row in range(table.num_rows)] == table["image"].to_pylist()
        for name, found in (
            ("label", rows.labels),
            ("height", rows.heights),
            ("width", rows.widths),
            ("image_xxh3", rows.checksums),
        ):
            assert found is not None
            assert found.tolist() == table[name].to_pylist()
        assert pa.array(rows.labels).type == pa.int32()
    return len(groups)


def test_row_groups_are_read_as_pyarrow_reads_them() -> None:
    assert assert_same(written([900 + 37 * k for k in range(200)], 32768)) > 3


def test_columns_behind_those_of_every_data_set_do_not_disturb() -> None:
    targets = [Target("age", "regression"), Target("kind", "multiclass", ("a", "b"))]
    assert assert_same(written([500] * 40, 8192, targets, is_weighted=True)) > 1


def test_columns_of_several_pages_are_read() -> None:
    table = pq.read_table(io.BytesIO(written([3000] * 60, 1 << 20)))
    stream = io.BytesIO()
    plain = {"use_dictionary": False, "compression": "NONE", "write_statistics": False, "store_schema": False}
    pq.write_table(table, stream, write_batch_size=5, data_page_size=64, **plain)
    assert len(list(pages.PAGE.finditer(stream.getvalue()))) > 3 * 7
    assert assert_same(stream.getvalue()) == 1


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 5000), min_size=1, max_size=80), st.sampled_from([1 << 12, 1 << 14, 1 << 20]))
def test_images_of_any_size_are_read(sizes: list[int], row_group_bytes: int) -> None:
    assert assert_same(written(sizes, row_group_bytes)) >= 1


@pytest.mark.parametrize(
    "how",
    [{"use_dictionary": True}, {"data_page_version": "2.0"}, {"compression": "SNAPPY"}],
    ids=["dictionary", "pages of version 2", "compressed"],
)
def test_what_prepare_does_not_write_is_left_to_pyarrow(how: dict[str, object]) -> None:
    table = pq.read_table(io.BytesIO(written([100] * 40, 1 << 20)))
    stream = io.BytesIO()
    pq.write_table(table, stream, **{"use_dictionary": False, "compression": "NONE", "write_statistics": False, **how})
    assert reader.plain_rows("here", memoryview(stream.getvalue())[4:], 40) is None


def test_changed_bytes_are_never_read_out_of_bounds_and_no_image_passes_its_checksum() -> None:
    (stretch, table), *_ = row_groups(written([40 + k for k in range(20)], 1 << 20))
    rng = np.random.default_rng(3)
    outcomes = {"left": 0, "read": 0}
    for _ in range(3000):
        damaged = bytearray(stretch)
        for _ in range(int(rng.integers(1, 4))):
            damaged[int(rng.integers(len(damaged)))] = int(rng.integers(256))
        damaged = damaged[: int(rng.integers(len(damaged)))] if rng.random() < 0.2 else damaged
        rows = reader.plain_rows("here", memoryview(damaged), table.num_rows)
        outcomes["left" if rows is None else "read"] += 1
        if rows is not None:
            assert len(rows.labels) == len(rows.starts) == len(rows.ends) == len(rows.heights) == table.num_rows
            assert rows.starts.min() >= 0
            assert rows.ends.max() <= len(damaged)
    assert min(outcomes.values()) > 100
