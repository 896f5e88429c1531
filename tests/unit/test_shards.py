"""The format: what a shard and a manifest say is what is there, and nothing damaged is taken for data."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xxhash

from cvdist.common_metadata import petastorm_metadata
from cvdist.errors import DataError
from cvdist.images import ImageSpec
from cvdist.shards import (
    MAX_GROUP_ROWS,
    MIN_GROUP_ROWS,
    SCHEMA,
    Manifest,
    Row,
    Shard,
    ShardWriter,
    Split,
    manifest_bytes,
    read_manifest,
    row_group_offsets,
    write_manifest,
)


def made_rows(count: int, image_bytes: int = 1000, seed: int = 0) -> list[Row]:
    """Returns samples whose images are random bytes of about the given size."""
    rng = np.random.default_rng(seed)
    return [
        Row(
            key=f"cat/{index:05d} ü.jpg",
            label=int(rng.integers(10)),
            image=rng.bytes(int(rng.integers(image_bytes // 2, image_bytes * 3 // 2 + 1))),
            height=int(rng.integers(1, 500)),
            width=int(rng.integers(1, 500)),
            source_sha256=rng.bytes(32).hex(),
        )
        for index in range(count)
    ]


def written(
    rows: list[Row], row_group_bytes: int = 20_000, path: str = "train/shard-00000.parquet"
) -> tuple[bytes, Shard]:
    """Returns the bytes of a shard and its entry."""
    stream = io.BytesIO()
    writer = ShardWriter(stream, row_group_bytes)
    for row in rows:
        writer.add(row)
    shard = writer.close(path)
    return stream.getvalue(), shard


def made_manifest() -> Manifest:
    """Returns a manifest with two splits, odd names and every kind of value."""
    _, one = written(made_rows(70))
    _, two = written(made_rows(20), path="test/shard-00000.parquet")
    return Manifest(
        classes=("cat", "日本", 'do"g\\'),
        image=ImageSpec(224, "short", 3, "jpeg", 90),
        splits={"train": Split((one,), (30, 40, 0)), "test": Split((two,), (10, 0, 10))},
        num_inputs=95,
        num_quarantined=3,
        num_skipped=2,
        digest="ab" * 32,
        settings={"seed": 1, "split": "train=0.8,test=0.2", "max": 0.25, "none": None, "on": True},
    )


def test_a_shard_holds_the_rows_that_were_added_in_order() -> None:
    rows = made_rows(100)
    data, shard = written(rows)
    table = pq.read_table(io.BytesIO(data))
    assert table.schema.equals(SCHEMA)
    found = table.to_pylist()
    assert [Row(**{key: value for key, value in row.items() if key != "image_xxh3"}) for row in found] == rows
    for row in found:
        assert row["image_xxh3"] & 0xFFFFFFFFFFFFFFFF == xxhash.xxh3_64_intdigest(row["image"])
    assert shard.num_rows == 100


def test_the_entry_of_a_shard_describes_its_bytes() -> None:
    data, shard = written(made_rows(100))
    assert shard.num_bytes == len(data)
    assert shard.sha256 == hashlib.sha256(data).hexdigest()
    assert len(shard.row_group_rows) == len(shard.row_group_bytes) == len(shard.row_group_xxh3) > 3
    assert sum(shard.row_group_rows) == shard.num_rows
    offsets = row_group_offsets(shard)
    for offset, num_bytes, checksum in zip(offsets, shard.row_group_bytes, shard.row_group_xxh3, strict=True):
        assert xxhash.xxh3_64_hexdigest(data[offset : offset + num_bytes]) == checksum
    footer = data[offsets[-1] + shard.row_group_bytes[-1] :]
    assert xxhash.xxh3_64_hexdigest(footer) == shard.footer_xxh3
    assert len(footer) == int.from_bytes(data[-8:-4], "little") + 8


@pytest.mark.parametrize(
    "count, row_group_bytes", [(1, 20_000), (16, 1), (17, 1), (100, 20_000), (300, 1), (50, 10**9)]
)
def test_offsets_point_at_the_row_groups(count: int, row_group_bytes: int) -> None:
    data, shard = written(made_rows(count), row_group_bytes)
    metadata = pq.read_metadata(io.BytesIO(data))
    assert metadata.num_row_groups == len(shard.row_group_rows)
    for index, offset in enumerate(row_group_offsets(shard)):
        group = metadata.row_group(index)
        columns = [group.column(number) for number in range(group.num_columns)]
        assert group.num_rows == shard.row_group_rows[index]
        assert not any(column.has_dictionary_page for column in columns)
        assert columns[0].data_page_offset == offset
        ends = [column.data_page_offset + column.total_compressed_size for column in columns]
        starts = [*(column.data_page_offset for column in columns[1:]), offset + shard.row_group_bytes[index]]
        # Arrow puts a copy of a column's metadata, of less than 100 bytes, behind it.
        assert all(0 <= start - end < 100 for start, end in zip(starts, ends, strict=True))


def test_an_empty_shard_has_no_row_groups_and_can_be_read() -> None:
    data, shard = written([])
    assert (shard.num_rows, shard.row_group_rows, shard.row_group_bytes, shard.num_bytes) == (0, (), (), len(data))
    assert pq.read_table(io.BytesIO(data)).num_rows == 0


def test_row_groups_are_cut_by_bytes_but_never_below_sixteen_rows() -> None:
    _, shard = written(made_rows(100, image_bytes=1000), row_group_bytes=30_000)
    assert all(20 <= rows <= 45 for rows in shard.row_group_rows[:-1])
    for num_bytes in shard.row_group_bytes[:-1]:
        assert 30_000 <= num_bytes < 35_000
    _, large = written(made_rows(40, image_bytes=10_000), row_group_bytes=20_000)
    assert large.row_group_rows == (MIN_GROUP_ROWS, MIN_GROUP_ROWS, 8)


def test_row_groups_of_tiny_images_are_cut_by_rows() -> None:
    _, shard = written(made_rows(MAX_GROUP_ROWS + 3, image_bytes=2), row_group_bytes=1 << 30)
    assert shard.row_group_rows == (MAX_GROUP_ROWS, 3)


def test_images_are_stored_as_they_are() -> None:
    # Uncompressed and without dictionary: the stored bytes can be found in the file.
    rows = made_rows(20)
    data, _ = written(rows)
    assert all(row.image in data for row in rows)


def test_the_same_rows_give_the_same_bytes() -> None:
    assert written(made_rows(100)) == written(made_rows(100))
    assert written(made_rows(100))[1].sha256 != written(made_rows(100, seed=1))[1].sha256


def test_a_manifest_comes_back_equal(tmp_path: Path) -> None:
    url, manifest = f"file://{tmp_path}/set", made_manifest()
    write_manifest(url, manifest)
    found = read_manifest(url)
    assert found == manifest
    assert hash(found.splits["train"]) == hash(manifest.splits["train"])
    assert (found.num_rows, found.splits["test"].num_rows) == (90, 20)


def test_a_manifest_is_never_replaced(tmp_path: Path) -> None:
    url = f"file://{tmp_path}/set"
    write_manifest(url, made_manifest())
    with pytest.raises(Exception, match="already exists"):
        write_manifest(url, dataclasses.replace(made_manifest(), num_inputs=1))
    assert read_manifest(url) == made_manifest()


def test_a_missing_manifest_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        read_manifest(f"file://{tmp_path}/set")
    url = f"file://{tmp_path}/set"
    assert str(caught.value) == (
        f"{url}/manifest.json does not exist; expected a prepared data set;"
        f" correct the URL, or run spark-submit jobs/prepare.py SOURCE {url}; for Parquet files of others run cvdist adopt {url}"
    )


def read_back(folder: Path, data: bytes) -> Manifest:
    """Reads a manifest of these bytes."""
    (folder / "manifest.json").write_bytes(data)
    return read_manifest(f"file://{folder}")


def test_every_flipped_byte_of_a_manifest_is_detected(tmp_path: Path) -> None:
    data, rng = manifest_bytes(made_manifest()), np.random.default_rng(0)
    places = set(rng.integers(0, len(data), 300).tolist()) | set(range(60)) | set(range(len(data) - 120, len(data)))
    num_detected = 0
    for place in places:
        flipped = bytearray(data)
        flipped[place] ^= 1 << int(rng.integers(8))
        try:
            # What is not detected has changed nothing: white space between values.
            assert read_back(tmp_path, bytes(flipped)) == made_manifest()
            assert data[place : place + 1].isspace()
        except DataError as error:
            num_detected += 1
            assert "manifest.json" in str(error)
            assert "; expected " in str(error)
    assert num_detected > 300


def edited(*path: Any, value: Any) -> Callable[[Any], Any]:
    """Returns what changes one value deep in a manifest."""

    def edit(body: Any) -> None:
        for key in path[:-1]:
            body = body[key]
        assert body[path[-1]] != value
        body[path[-1]] = value

    return edit


EDITS: dict[str, Callable[[Any], Any]] = {
    "a class renamed": edited("classes", 0, value="dog"),
    "a split renamed": lambda body: body["splits"].update(val=body["splits"].pop("test")),
    "a shard left out": lambda body: body["splits"]["train"]["shards"].pop(),
    "rows of a shard": edited("splits", "train", "shards", 0, "num_rows", value=71),
    "bytes of a row group": edited("splits", "train", "shards", 0, "row_group_bytes", 0, value=1),
    "hash of a shard": edited("splits", "train", "shards", 0, "sha256", value="0" * 64),
    "checksum of a row group": edited("splits", "train", "shards", 0, "row_group_xxh3", 0, value="0" * 16),
    "image size": edited("image", "image_size", value=225),
    "num_inputs": edited("num_inputs", value=96),
    "a setting": edited("settings", "seed", value=2),
    "digest": edited("digest", value="cd" * 32),
    "a field more": lambda body: body.update(extra=1),
    "a field less": lambda body: body.pop("num_skipped"),
}


@pytest.mark.parametrize("name", EDITS)
def test_an_edited_manifest_is_refused(name: str, tmp_path: Path) -> None:
    body = json.loads(manifest_bytes(made_manifest()))
    EDITS[name](body)
    with pytest.raises(
        DataError, match=r"manifest.json is damaged \(its sha256 does not match\); expected the file that"
    ):
        read_back(tmp_path, json.dumps(body).encode())


@pytest.mark.parametrize(
    "data", [b"", b"null", b"[]", b'"text"', b"{}", b"\xff\xfe", b"{", b'{"sha256": 1, "version": 1, "format": 3}']
)
def test_what_is_no_manifest_is_refused(data: bytes, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"manifest.json is (damaged|of format version)"):
        read_back(tmp_path, data)


def test_a_manifest_of_another_version_says_so(tmp_path: Path) -> None:
    body = json.loads(manifest_bytes(made_manifest()))
    body["version"] = 99
    with pytest.raises(DataError, match=r"is of format version 99; expected cvdist 2; prepare it again"):
        read_back(tmp_path, json.dumps(body).encode())


@pytest.mark.parametrize("codec", ["jpeg", "raw"])
def test_petastorm_metadata_names_the_row_groups_of_every_shard(codec: str) -> None:
    pytest.importorskip("petastorm", reason="Petastorm is not installed")
    _, one = written(made_rows(70))
    _, two = written(made_rows(20), path="train/shard-00001.parquet")
    data = petastorm_metadata([one, two], codec)
    assert data is not None
    schema = pq.read_schema(pa.BufferReader(data))
    assert schema.remove_metadata().equals(SCHEMA)
    groups = json.loads(schema.metadata[b"dataset-toolkit.num_row_groups_per_file.v1"])
    assert groups == {"shard-00000.parquet": len(one.row_group_rows), "shard-00001.parquet": len(two.row_group_rows)}
    unischema = pickle.loads(schema.metadata[b"dataset-toolkit.unischema.v1"])
    assert set(unischema.fields) == set(SCHEMA.names)
    assert unischema.fields["label"].numpy_dtype is np.int32
    assert petastorm_metadata([one, two], codec) == data
