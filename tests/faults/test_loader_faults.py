"""The loader on an HDFS that dies, freezes or rots, on shards that are not those of the manifest, and across forks.

This file is also the program that reads while HDFS is broken: `python -m tests.faults.test_loader_faults DATA_URL HOLD_AT` reads an epoch,
prints a line for each batch, and waits for a line on stdin when it has printed HOLD_AT.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import logging
import multiprocessing
import os
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from cluster.local_hdfs import LocalHdfs
from cvdist import storage
from cvdist.comm import World
from cvdist.config import AugmentConfig, LoaderConfig
from cvdist.errors import CvdistError, DataError, StorageError
from cvdist.loader import Batch, Loader
from cvdist.shards import Manifest, Shard, read_manifest
from tests.faults import loader_flips
from tests.faults.mending import mend
from tests.made_data import class_tree, data_set

ROOT = Path(__file__).resolve().parents[2]
BATCH = 16
HOLD_AT = 3
# Row groups are read when their batch is made, one after the other: what breaks in mid-epoch meets most of them unread.
SLOW = LoaderConfig(threads=1, prefetch_batches=1, readahead_bytes=0, num_lanes=1)
AUGMENT = AugmentConfig(flip=True, crop_scale_min=0.4)


def make_loader(url: str, config: LoaderConfig | None = None) -> Loader:
    world = World(0, 1, 0, 1)
    manifest = read_manifest(url)
    return Loader(
        url, manifest, "train", world=world, global_batch=BATCH, seed=3, augmentation=AUGMENT, config=config or SLOW
    )


def digest(batch: Batch) -> str:
    """Returns a line that differs when anything of a batch does."""
    data = b"".join(
        np.ascontiguousarray(a).tobytes() for a in (batch.images, batch.labels, batch.weights, batch.params)
    )
    return f"{batch.samples.tolist()} {hashlib.sha256(data).hexdigest()}"


def read_epoch(url: str, config: LoaderConfig | None = None) -> list[str]:
    """Reads an epoch."""
    return [digest(batch) for batch in make_loader(url, config).batches(epoch=1)]


def main(url: str, hold_at: int) -> int:
    """Is the program."""
    try:
        for number, batch in enumerate(make_loader(url).batches(epoch=1), 1):
            print(digest(batch), flush=True)
            if number == hold_at:
                sys.stdin.readline()
    except CvdistError as error:
        print(f"error: {error}", flush=True)
        return error.exit_code
    return 0


def read_while(act: Callable[[], object], url: str, deadline_s: int) -> tuple[list[str], int, float]:
    """Runs the program and does something in mid-epoch; returns its lines, its exit code and how long it took from then on."""
    command = [sys.executable, "-m", "tests.faults.test_loader_faults", url, str(HOLD_AT)]
    environment = {**os.environ, "CVDIST_STORAGE_DEADLINE_S": str(deadline_s)}
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        try:
            lines = [child.stdout.readline() for _ in range(HOLD_AT)]
            act()
            begun_s = time.monotonic()
            rest = child.communicate("\n", timeout=120)[0]
        finally:
            child.kill()
    return "".join(lines).splitlines() + rest.splitlines(), child.returncode, time.monotonic() - begun_s


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return class_tree(tmp_path_factory.mktemp("images"), {"ant": 170, "bee": 160}, height=40, width=52)


@pytest.fixture(scope="module")
def breakable(private_hdfs: Callable[..., LocalHdfs]) -> LocalHdfs:
    return private_hdfs(datanodes=2)


def prepared(images: Path, url: str) -> str:
    """Prepares a data set of some shards of three or four row groups."""
    manifest = data_set(images, url, image_size=32, row_group_bytes=16384, shard_bytes=65536)
    assert len(manifest.splits["train"].shards) > 4
    return url


@pytest.fixture(scope="module")
def data_url(images: Path, breakable: LocalHdfs) -> str:
    return prepared(images, storage.join(breakable.url, "set"))


@pytest.fixture(scope="module")
def undisturbed(data_url: str) -> list[str]:
    lines = read_epoch(data_url)
    assert len(lines) > 12
    return lines


@pytest.fixture
def fragile(breakable: LocalHdfs, data_url: str, undisturbed: list[str]) -> Iterator[LocalHdfs]:
    """An HDFS that a test may break; it is whole again for the next one."""
    yield breakable
    mend(breakable)


class TestHdfs:
    @pytest.mark.parametrize("victim", ["datanode1", "datanode2"])
    def test_killing_a_datanode_changes_no_batch(
        self, fragile: LocalHdfs, data_url: str, undisturbed: list[str], victim: str
    ) -> None:
        lines, code, _ = read_while(lambda: fragile.kill(victim), data_url, deadline_s=10)
        assert (lines, code) == (undisturbed, 0)

    @pytest.mark.parametrize("victim", ["datanode1", "datanode2"])
    def test_a_frozen_datanode_is_passed_over(
        self, fragile: LocalHdfs, data_url: str, undisturbed: list[str], victim: str
    ) -> None:
        lines, code, took_s = read_while(lambda: fragile.freeze(victim), data_url, deadline_s=10)
        print(f"{took_s:.1f} s")
        assert (lines, code) == (undisturbed, 0)

    def test_a_frozen_namenode_is_named_within_the_deadline(self, fragile: LocalHdfs, data_url: str) -> None:
        lines, code, took_s = read_while(lambda: fragile.freeze("namenode"), data_url, deadline_s=3)
        assert lines[-1].startswith(f"error: {data_url}/train/")
        assert lines[-1].endswith(
            "no answer in 3 s; expected a file system that responds; check that it runs and is not overloaded, or raise"
            " CVDIST_STORAGE_DEADLINE_S"
        )
        assert code == StorageError.exit_code
        assert 2.9 < took_s < 3 + 5

    def test_batches_go_on_when_a_frozen_namenode_is_thawed(
        self, fragile: LocalHdfs, data_url: str, undisturbed: list[str]
    ) -> None:
        def freeze_for_a_while() -> None:
            fragile.freeze("namenode")
            subprocess.Popen(["sh", "-c", f"sleep 3; kill -CONT {fragile._processes['namenode']['pid']}"])

        lines, code, took_s = read_while(freeze_for_a_while, data_url, deadline_s=20)
        assert (lines, code) == (undisturbed, 0)
        assert took_s > 2.5, "nothing needed the NameNode"

    def test_a_dead_namenode_is_named_within_ten_seconds(self, fragile: LocalHdfs, data_url: str) -> None:
        lines, code, took_s = read_while(lambda: fragile.kill("namenode"), data_url, deadline_s=30)
        assert lines[-1].startswith(
            f"error: {fragile.url} does not answer (connection refused); expected a running NameNode"
        )
        assert code == StorageError.exit_code
        assert took_s < 10

    def test_an_epoch_from_a_warm_cache_needs_no_hdfs(
        self, fragile: LocalHdfs, data_url: str, undisturbed: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        config = dataclasses.replace(SLOW, cache_path=str(tmp_path))
        assert read_epoch(data_url, config) == undisturbed
        loader = make_loader(data_url, config)
        for name in fragile.names:
            fragile.freeze(name)
        monkeypatch.setenv("CVDIST_STORAGE_DEADLINE_S", "1")
        assert [digest(batch) for batch in loader.batches(epoch=1)] == undisturbed
        for path in (tmp_path / "parts").rglob("*"):
            if path.is_file():
                content = path.read_bytes()
                path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        monkeypatch.delenv("CVDIST_STORAGE_DEADLINE_S")
        for name in fragile.names:
            fragile.thaw(name)
        assert [digest(batch) for batch in loader.batches(epoch=1)] == undisturbed


def blocks(hdfs: LocalHdfs, name: str, contents: set[bytes]) -> list[Path]:
    """Returns the block files of a DataNode that hold some of the given contents."""
    found = (hdfs.directory / name).rglob("blk_*")
    return [path for path in found if path.suffix != ".meta" and path.read_bytes() in contents]


class TestRot:
    """Bits that flip below HDFS, in the files of a DataNode, and above it, in what HDFS takes for the file."""

    @pytest.fixture
    def own_url(self, fragile: LocalHdfs, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[str]:
        """A data set whose blocks hold what no other file does, or did, and may rot."""
        seed = zlib.crc32(request.node.name.encode())
        photos = class_tree(tmp_path, {"ant": 120, "bee": 120}, height=40, width=52, seed=seed)
        url = storage.join(fragile.url, "rotting")
        data_set(photos, url, image_size=32, row_group_bytes=16384, shard_bytes=65536)
        yield url
        storage.delete(url, recursive=True)

    def rot(self, hdfs: LocalHdfs, url: str, names: list[str]) -> None:
        """Flips a bit in the middle of every shard's block on some DataNodes."""
        shards = read_manifest(url).splits["train"].shards
        contents = {storage.read_bytes(storage.join(url, shard.path)) for shard in shards}
        for name in names:
            paths = blocks(hdfs, name, contents)
            assert len(paths) == len(shards)
            for path in paths:
                content = bytearray(path.read_bytes())
                content[len(content) // 2] ^= 4
                path.write_bytes(content)

    def test_one_rotten_replica_of_every_shard_is_not_noticed(self, fragile: LocalHdfs, own_url: str) -> None:
        whole = read_epoch(own_url)
        self.rot(fragile, own_url, ["datanode1"])
        assert read_epoch(own_url) == whole

    def test_when_all_replicas_rot_nothing_wrong_is_delivered_and_the_shard_is_named(
        self, fragile: LocalHdfs, own_url: str
    ) -> None:
        whole = read_epoch(own_url)
        self.rot(fragile, own_url, ["datanode1", "datanode2"])
        lines, code, _ = read_while(lambda: None, own_url, deadline_s=5)
        assert lines[-1].startswith(f"error: {own_url}/train/shard-")
        assert code == StorageError.exit_code
        assert lines[:-1] == whole[: len(lines) - 1]

    def test_every_flip_above_the_checksums_of_the_file_system_is_detected(
        self, images: Path, storage_url: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.ERROR, "cvdist.fetch")
        url = prepared(images, storage.join(storage_url, "set"))
        verdicts = loader_flips.run(url, read_manifest(url), 100 if url.startswith("file") else 25, seed=5)
        assert {found for _, found in verdicts} == {"detected"}
        assert {region for region, _ in verdicts} == {"magic", "row group", "footer"}


class TestShards:
    """Shards that are not those of the manifest, on HDFS."""

    @pytest.fixture
    def own(self, hdfs_url: str, images: Path) -> tuple[str, Manifest]:
        url = prepared(images, storage.join(hdfs_url, "set"))
        return url, read_manifest(url)

    def refusal(self, url: str, shards: list[Shard], manifest: Manifest) -> str:
        """Reads an epoch that has to be refused, and nothing of `shards` given before that; returns the message."""
        first = np.cumsum([0, *(shard.num_rows for shard in manifest.splits["train"].shards)])
        spoilt = set()
        for number, shard in enumerate(manifest.splits["train"].shards):
            spoilt |= set(range(first[number], first[number + 1])) if shard in shards else set()
        delivered: set[int] = set()
        with pytest.raises(DataError) as caught:
            for batch in make_loader(url).batches():
                delivered |= set(batch.samples.tolist())
        assert not delivered & spoilt
        return str(caught.value)

    def test_a_missing_one_is_named(self, own: tuple[str, Manifest]) -> None:
        url, manifest = own
        shard = manifest.splits["train"].shards[2]
        storage.delete(storage.join(url, shard.path))
        message = self.refusal(url, [shard], manifest)
        assert message.startswith(
            f"{url}/{shard.path} does not exist; expected the shard that the manifest names; restore"
        )

    @pytest.mark.parametrize("left_bytes", [0, 1000, -1])
    def test_a_truncated_one_is_named(self, own: tuple[str, Manifest], left_bytes: int) -> None:
        url, manifest = own
        shard = manifest.splits["train"].shards[2]
        target = storage.join(url, shard.path)
        content = storage.read_bytes(target)[:left_bytes]
        storage.write_bytes(target, content, overwrite=True)
        message = self.refusal(url, [shard], manifest)
        assert message.startswith(f"{target} holds {len(content)} bytes; expected {shard.num_bytes}; restore the shard")

    def test_two_that_are_swapped_are_refused(self, own: tuple[str, Manifest]) -> None:
        url, manifest = own
        one, two = manifest.splits["train"].shards[1:3]
        places = [storage.join(url, shard.path) for shard in (one, two)]
        contents = [storage.read_bytes(place) for place in places]
        for place, content in zip(places, contents[::-1], strict=True):
            storage.write_bytes(place, content, overwrite=True)
        assert self.refusal(url, [one, two], manifest).startswith(tuple(places))

    def test_one_of_another_data_set_is_refused(self, own: tuple[str, Manifest], tmp_path: Path) -> None:
        # The same number of images of the same classes, of other photos: a data set like this one.
        url, manifest = own
        others = class_tree(tmp_path / "images", {"ant": 170, "bee": 160}, height=40, width=52, seed=1)
        other_url = prepared(others, f"file://{tmp_path}/other")
        shard = manifest.splits["train"].shards[0]
        foreign = storage.read_bytes(storage.join(other_url, shard.path))
        # Were it of another size, that alone would give it away.
        foreign = foreign[: shard.num_bytes].ljust(shard.num_bytes, b"\0")
        storage.write_bytes(storage.join(url, shard.path), foreign, overwrite=True)
        assert self.refusal(url, [shard], manifest).startswith(f"{url}/{shard.path}")


def in_a_child(url: str, answer: multiprocessing.Queue[list[str]]) -> None:
    """Is what a child process does: it makes its own loader and reads an epoch."""
    answer.put(read_epoch(url))


class TestProcesses:
    @pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
    def test_children_read_their_own_epoch_while_the_parent_reads_on(
        self, images: Path, storage_url: str, method: str
    ) -> None:
        url = prepared(images, storage.join(storage_url, "set"))
        expected = read_epoch(url)
        context = multiprocessing.get_context(method)
        answers: multiprocessing.Queue[list[str]] = context.Queue()  # type: ignore[assignment]
        with contextlib.closing(make_loader(url).batches(epoch=1)) as batches:
            mine = [digest(next(batches)) for _ in range(HOLD_AT)]
            children = [context.Process(target=in_a_child, args=(url, answers)) for _ in range(2)]
            for child in children:
                child.start()
            mine += [digest(batch) for batch in batches]
        assert mine == expected
        for _ in children:
            assert answers.get(timeout=60) == expected
        for child in children:
            child.join(30)
            assert child.exitcode == 0

    def test_a_loader_that_is_inherited_by_a_fork_reads_the_same(self, images: Path, storage_url: str) -> None:
        url = prepared(images, storage.join(storage_url, "set"))
        loader = make_loader(url)
        expected = [digest(batch) for batch in loader.batches(epoch=1)]
        context = multiprocessing.get_context("fork")
        answers = context.Queue()
        child = context.Process(target=lambda: answers.put([digest(batch) for batch in loader.batches(epoch=1)]))
        child.start()
        assert answers.get(timeout=60) == expected
        child.join(30)
        assert child.exitcode == 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2])))
