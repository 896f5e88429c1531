"""The real Petastorm reads our data sets in both ways, on disk and on HDFS, and sees the keys, labels and pixels that our loader sees."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest

from cvdist import storage
from cvdist.comm import World
from cvdist.errors import NotFoundError
from cvdist.images import Pixels
from cvdist.loader import Loader
from cvdist.shards import Manifest
from tests.made_data import class_tree, data_set

petastorm = pytest.importorskip("petastorm", reason="Petastorm is not installed; run: make setup")

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from pyarrow.filesystem import FileSystem

# Petastorm calls what pyarrow has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore")

# Its pool of threads loses row groups: it asks whether the readers are done before whether all work was handed out. The pool of
# processes hangs when one is killed. "dummy" reads in the thread that asks, and is the only one that can be relied on.
POOL = {"reader_pool_type": "dummy", "num_epochs": 1}
CLASSES = {"ant": 30, "bee": 40}
Rows = dict[str, tuple[int, Pixels]]


class StorageFileSystem(FileSystem):  # type: ignore[misc]
    """What Petastorm asks of a file system, answered by cvdist.storage: paths are those of URLs below `root`."""

    def __init__(self, root: str) -> None:
        self.root = root

    def _info(self, path: str) -> storage.FileInfo | None:
        try:
            return storage.stat(self.root + path)
        except NotFoundError:
            return None

    def exists(self, path: str) -> bool:
        return self._info(path) is not None

    def isdir(self, path: str) -> bool:
        info = self._info(path)
        return info is not None and info.is_dir

    def isfile(self, path: str) -> bool:
        info = self._info(path)
        return info is not None and not info.is_dir

    def ls(self, path: str) -> list[str]:
        return [entry.url.removeprefix(self.root) for entry in storage.list_dir(self.root + path)]

    def walk(self, path: str) -> Any:
        entries = storage.list_dir(self.root + path)
        folders, files = ([storage.name(e.url) for e in entries if e.is_dir == is_dir] for is_dir in (True, False))
        yield path, folders, files
        for folder in folders:
            yield from self.walk(f"{path}/{folder}")

    def open(self, path: str, mode: str = "rb") -> BinaryIO:
        assert mode == "rb"
        return storage.open_read(self.root + path)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return class_tree(tmp_path_factory.mktemp("photos"), CLASSES, height=40, width=52)


def prepared(photos: Path, url: str, codec: str, channels: int) -> Manifest:
    """Prepares squares, so that the loader's crop is the whole image."""
    settings = {"image_size": 32, "resize": "exact", "row_group_bytes": 16384, "shard_bytes": 65536}
    manifest = data_set(photos, url, codec=codec, channels=channels, **settings)
    groups = [rows for shard in manifest.splits["train"].shards for rows in shard.row_group_rows]
    assert len(groups) >= 3
    return manifest


def seen_by_the_loader(url: str, manifest: Manifest) -> Rows:
    """Returns the label and pixels of every key of the train split."""
    keys: list[str] = []
    for shard in manifest.splits["train"].shards:
        with storage.open_read(storage.join(url, shard.path)) as file:
            keys += pq.read_table(file, columns=["key"])["key"].to_pylist()
    rows: Rows = {}
    for batch in Loader(url, manifest, "train", world=World(0, 1, 0, 1), global_batch=10).batches():
        for image, label, sample, weight in zip(batch.images, batch.labels, batch.samples, batch.weights, strict=True):
            if weight:
                rows[keys[sample]] = (int(label), image)
    assert len(rows) == len(keys) == manifest.splits["train"].num_rows
    return rows


def assert_same(found: list[tuple[str, int, Pixels]], expected: Rows) -> None:
    """Checks keys, labels and every pixel."""
    assert sorted(key for key, _, _ in found) == sorted(expected)
    for key, label, pixels in found:
        assert label == expected[key][0]
        np.testing.assert_array_equal(pixels, expected[key][1], err_msg=key)


def opened(make: Callable[..., Any], url: str) -> Any:
    """Opens the train split with one of Petastorm's two functions."""
    root = url[: url.index("/", url.index("://") + 3)]
    return make(storage.join(url, "train"), filesystem=StorageFileSystem(root), **POOL)


@pytest.mark.parametrize("codec, channels", [("jpeg", 3), ("jpeg", 1), ("raw", 3), ("raw", 1)])
def test_petastorm_sees_the_rows_that_the_loader_sees(
    codec: str, channels: int, storage_url: str, photos: Path
) -> None:
    url = storage.join(storage_url, "set")
    manifest = prepared(photos, url, codec, channels)
    expected = seen_by_the_loader(url, manifest)

    with opened(petastorm.make_reader, url) as reader:
        rows = list(reader)
    # Its JPEG codec gives grey images without a channel.
    assert_same([(row.key, int(row.label), row.image.reshape(32, 32, channels)) for row in rows], expected)
    assert all((row.height, row.width) == (32, 32) for row in rows)
    assert {type(row.image_xxh3) for row in rows} == {np.int64}

    found = []
    with opened(petastorm.make_batch_reader, url) as reader:
        for batch in reader:
            for key, label, image in zip(batch.key, batch.label, batch.image, strict=True):
                if codec == "raw":
                    pixels = np.load(io.BytesIO(image), allow_pickle=False)
                else:
                    pixels = cv2.imdecode(np.frombuffer(image, np.uint8), cv2.IMREAD_UNCHANGED)
                    pixels = pixels[..., ::-1] if channels == 3 else pixels[..., None]
                found.append((key, int(label), pixels))
    assert_same(found, expected)


def test_petastorm_opens_a_data_set_on_disk_by_its_url_alone(photos: Path, tmp_path: Path) -> None:
    url = f"file://{tmp_path}/set"
    manifest = prepared(photos, url, "jpeg", 3)
    for split in manifest.splits:
        with petastorm.make_reader(f"{url}/{split}", **POOL) as reader:
            assert sum(1 for _ in reader) == manifest.splits[split].num_rows
