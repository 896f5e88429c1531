"""What storage.py promises, on local disk, on a real HDFS, and in memory where that can keep it."""

from __future__ import annotations

import concurrent.futures
import hashlib
import io
import os
import random
import socket
import subprocess
import sys
import tarfile
import threading
import uuid
from pathlib import Path

import hdfs_native
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.local_hdfs import LocalHdfs
from cvdist import storage
from cvdist.errors import AlreadyExistsError, ConfigError, NotFoundError, StorageError

MIB = 1 << 20
ROOT = Path(__file__).parents[2]


@pytest.fixture(params=["file", "hdfs", "memory"])
def url(request: pytest.FixtureRequest) -> str:
    """A fresh directory on each kind of file system."""
    if request.param == "file":
        return f"file://{request.getfixturevalue('tmp_path')}"
    if request.param == "hdfs":
        return request.getfixturevalue("hdfs_url")
    url = f"memory:///{uuid.uuid4().hex}"
    storage.make_dirs(url)
    return url


def names(url: str) -> list[str]:
    return [storage.name(entry.url) for entry in storage.list_dir(url)]


class TestEveryFileSystem:
    @pytest.mark.parametrize("size", [0, 1, 100_000, 9 * MIB + 1])
    def test_bytes_come_back_as_they_were_written(self, url: str, size: int) -> None:
        target, data = storage.join(url, "new", "folders", "a.bin"), random.Random(size).randbytes(size)
        storage.write_bytes(target, data)
        assert storage.read_bytes(target) == data
        info = storage.stat(target)
        assert (info.url, info.size_bytes, info.is_dir) == (target, size, False)
        assert names(storage.parent(target)) == ["a.bin"]

    def test_text_comes_back_as_it_was_written(self, url: str) -> None:
        storage.write_text(storage.join(url, "a.txt"), "grüße\n")
        assert storage.read_text(storage.join(url, "a.txt")) == "grüße\n"

    def test_binary_is_not_taken_for_text(self, url: str) -> None:
        storage.write_bytes(storage.join(url, "a.bin"), b"\xff")
        with pytest.raises(StorageError, match=r"a\.bin: not UTF-8 at byte 0"):
            storage.read_text(storage.join(url, "a.bin"))

    def test_a_file_of_20_mb_has_the_same_hash_after_many_small_writes(self, url: str) -> None:
        target, source, hashes = storage.join(url, "big.bin"), random.Random(1), [hashlib.sha256() for _ in range(2)]
        with storage.create(target) as file:
            while file.tell() < 20_000_000:
                piece = source.randbytes(source.randrange(1, 300_000))
                hashes[0].update(piece)
                assert file.write(piece) == len(piece)
        with storage.open_read(target) as file:
            while piece := file.read(123_457):
                hashes[1].update(piece)
        assert hashes[0].digest() == hashes[1].digest()

    def test_any_bytes_like_object_is_written_whole(self, url: str) -> None:
        array = np.arange(10, dtype=np.float64)
        inputs = [
            b"ab",
            bytearray(b"ab"),
            memoryview(b"abcd")[::2],
            array,
            array[::2],
            array.reshape(2, 5).T,
            np.array(3.0),
        ]
        for number, data in enumerate(inputs):
            target = storage.join(url, str(number))
            storage.write_bytes(target, data)
            assert storage.read_bytes(target) == memoryview(data).tobytes()

    def test_a_range_is_exactly_what_was_asked_for(self, url: str) -> None:
        target, data = storage.join(url, "a.bin"), random.Random(2).randbytes(17 * MIB)
        storage.write_bytes(target, data)
        for offset, length in [
            (0, 0),
            (0, 1),
            (5, 100),
            (len(data) - 1, 1),
            (len(data), 0),
            (3, 16 * MIB),
            (0, len(data)),
        ]:
            assert storage.read_range(target, offset, length) == data[offset : offset + length]

    @pytest.mark.parametrize("offset, length", [(0, 11), (10, 1), (11, 0), (-1, 2), (0, -1)])
    def test_a_range_outside_of_the_file_is_an_error(self, url: str, offset: int, length: int) -> None:
        storage.write_bytes(storage.join(url, "a.bin"), b"0123456789")
        with pytest.raises(StorageError, match="the file has 10; expected a range within it"):
            storage.read_range(storage.join(url, "a.bin"), offset, length)

    def test_threads_may_read_stretches_of_one_open_file(self, url: str) -> None:
        target, data = storage.join(url, "a.bin"), random.Random(6).randbytes(9 * MIB)
        storage.write_bytes(target, data)
        file = storage.open_ranges(target)
        assert file.size_bytes == len(data)
        places = [(random.Random(turn).randrange(len(data) - 1000), 1 + turn) for turn in range(200)] + [(0, len(data))]
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            for (offset, length), found in zip(places, pool.map(lambda place: file.read(*place), places), strict=True):
                assert found == data[offset : offset + length]
        for offset, length in [(-1, 2), (len(data), 1), (0, -1), (0, len(data) + 1)]:
            with pytest.raises(StorageError, match=f"the file has {len(data)}; expected a range within it"):
                file.read(offset, length)
        file.close()
        with pytest.raises(NotFoundError):
            storage.open_ranges(storage.join(url, "missing"))

    @pytest.mark.parametrize("readahead_bytes", [0, 100_000, 8 * MIB])
    def test_read_ahead_gives_the_same_bytes_as_a_plain_file(self, url: str, readahead_bytes: int) -> None:
        target, rng = storage.join(url, "a.bin"), random.Random(readahead_bytes)
        data = rng.randbytes(5 * MIB)
        storage.write_bytes(target, data)
        plain = io.BytesIO(data)
        with storage.open_read(target, readahead_bytes) as file:
            for _ in range(200):
                if rng.random() < 0.3:
                    position = rng.choice([0, len(data) - 10, len(data) + 5, rng.randrange(len(data))])
                    assert file.seek(position) == plain.seek(position)
                size = rng.choice([0, 1, 1000, 200_000, 2 * MIB])
                assert file.read(size) == plain.read(size)
                assert file.tell() == plain.tell()
            assert file.seek(-3, os.SEEK_END) == plain.seek(-3, os.SEEK_END)
            assert file.read() == plain.read()

    def test_several_threads_may_read_one_open_file(self, url: str) -> None:
        target, data = storage.join(url, "a.bin"), random.Random(3).randbytes(4 * MIB)
        storage.write_bytes(target, data)
        with storage.open_read(target) as file, concurrent.futures.ThreadPoolExecutor(4) as threads:
            pieces = list(threads.map(lambda _: file.read(MIB), range(4)))
        assert sorted(pieces) == sorted(data[start : start + MIB] for start in range(0, len(data), MIB))

    def test_pyarrow_and_tarfile_write_and_read_through_it(self, url: str) -> None:
        table = pa.table({"key": [f"k{number}" for number in range(5000)], "image": [os.urandom(200)] * 5000})
        with storage.create(storage.join(url, "a.parquet")) as file, pq.ParquetWriter(file, table.schema) as writer:
            writer.write_table(table, row_group_size=1000)
        with storage.open_read(storage.join(url, "a.parquet")) as file:
            parquet = pq.ParquetFile(file)
            assert parquet.num_row_groups == 5
            assert parquet.read_row_group(3).equals(table.slice(3000, 1000))
            assert parquet.read().equals(table)
        with storage.create(storage.join(url, "a.tar")) as file, tarfile.open(fileobj=file, mode="w") as tar:
            info = tarfile.TarInfo("inside.txt")
            info.size = 5
            tar.addfile(info, io.BytesIO(b"hello"))
        with storage.open_read(storage.join(url, "a.tar")) as file, tarfile.open(fileobj=file) as tar:
            assert tar.extractfile("inside.txt").read() == b"hello"

    def test_a_file_is_invisible_until_it_is_complete(self, url: str) -> None:
        target = storage.join(url, "a.bin")
        with storage.create(target) as file:
            file.write(b"x" * (9 * MIB))
            assert not storage.exists(target)
            assert all(name.startswith(".") for name in names(url))
        assert names(url) == ["a.bin"]

    def test_an_exception_leaves_nothing(self, url: str) -> None:
        with pytest.raises(ZeroDivisionError), storage.create(storage.join(url, "a.bin")) as file:
            file.write(b"x" * (9 * MIB))
            raise ZeroDivisionError
        assert names(url) == []
        with pytest.raises(ValueError, match="closed"):
            file.write(b"more")

    def test_a_failed_overwrite_leaves_the_old_file(self, url: str) -> None:
        target = storage.join(url, "a.bin")
        storage.write_bytes(target, b"old")
        with pytest.raises(KeyboardInterrupt), storage.create(target, overwrite=True) as file:
            file.write(b"new")
            raise KeyboardInterrupt
        assert storage.read_bytes(target) == b"old"
        storage.write_bytes(target, b"new", overwrite=True)
        assert storage.read_bytes(target) == b"new"
        assert names(url) == ["a.bin"]

    def test_an_existing_file_is_not_replaced_unasked(self, url: str) -> None:
        target = storage.join(url, "a.bin")
        storage.write_bytes(target, b"old")
        with pytest.raises(AlreadyExistsError, match=r"a\.bin: already exists; expected a free name"):
            storage.write_bytes(target, b"new")
        assert storage.read_bytes(target) == b"old"

    def test_a_file_that_appears_during_a_write_is_not_replaced(self, url: str) -> None:
        target = storage.join(url, "a.bin")
        with pytest.raises(AlreadyExistsError), storage.create(target) as file:
            file.write(b"slow")
            storage.write_bytes(target, b"quick")
        assert storage.read_bytes(target) == b"quick"
        assert names(url) == ["a.bin"]

    def test_a_directory_is_neither_written_nor_read_as_a_file(self, url: str) -> None:
        storage.make_dirs(storage.join(url, "folder"))
        with pytest.raises(StorageError, match="folder: is a directory; expected a file"):
            storage.write_bytes(storage.join(url, "folder"), b"x", overwrite=True)
        with pytest.raises(StorageError, match="folder: is a directory; expected a file"):
            storage.read_bytes(storage.join(url, "folder"))

    def test_a_missing_file_is_named(self, url: str) -> None:
        missing = storage.join(url, "no", "such.bin")

        def scan(url: str) -> None:
            next(storage.scan_dir(url), None)

        for function in (storage.read_bytes, storage.stat, storage.list_dir, storage.open_read, scan):
            with pytest.raises(NotFoundError, match=r"no/such\.bin: not found; expected an existing file"):
                function(missing)
        assert not storage.exists(missing)
        assert not storage.delete(missing)

    def test_a_listing_is_in_the_order_of_code_points(self, url: str) -> None:
        expected = ["B", "a", "a.b", "a0", "b", "é"]
        for name in reversed(expected):
            storage.write_bytes(storage.join(url, name), name.encode())
        storage.make_dirs(storage.join(url, "a-folder"))
        entries = storage.list_dir(url)
        assert [storage.name(entry.url) for entry in entries] == sorted([*expected, "a-folder"])
        assert [storage.name(entry.url) for entry in entries if entry.is_dir] == ["a-folder"]
        assert {storage.stat(entry.url) for entry in entries if not entry.is_dir} == {
            e for e in entries if not e.is_dir
        }

    def test_a_long_listing_is_complete(self, url: str) -> None:
        expected = [f"{number:03}" for number in range(250)]
        for name in expected:
            storage.make_dirs(storage.join(url, name))
        assert names(url) == expected
        assert sorted(storage.name(entry.url) for entry in storage.scan_dir(url)) == expected

    def test_a_scan_yields_what_a_listing_holds(self, url: str) -> None:
        storage.write_bytes(storage.join(url, "a"), b"1")
        storage.write_bytes(storage.join(url, ".b", "c"), b"12")
        assert sorted(storage.scan_dir(url), key=lambda entry: entry.url) == storage.list_dir(url)

    def test_a_file_is_not_listed_as_a_directory(self, url: str) -> None:
        storage.write_bytes(storage.join(url, "a"), b"1")
        with pytest.raises(StorageError, match="a: is not a directory"):
            storage.list_dir(storage.join(url, "a"))
        with pytest.raises(StorageError, match="a: is not a directory"):
            list(storage.scan_dir(storage.join(url, "a")))
        with pytest.raises(StorageError, match="is not a directory, or lies below a file"):
            storage.make_dirs(storage.join(url, "a", "b"))
        assert not storage.exists(storage.join(url, "a", "b"))

    def test_a_walk_yields_every_file_once(self, url: str) -> None:
        paths = ["a/1", "a/b/2", "a.txt", "c/3", "z"]
        for path in reversed(paths):
            storage.write_bytes(storage.join(url, path), b"")
        storage.make_dirs(storage.join(url, "empty"))
        assert sorted(storage.relative(entry.url, url) for entry in storage.walk_files(url)) == sorted(paths)

    def test_odd_names_are_taken_literally(self, url: str) -> None:
        odd = [
            "with space",
            "ünïcödé",
            "100%",
            "a%20b",
            "a#b",
            "a?b=c&d",
            "[x]",
            "{a,b}",
            "*",
            "back\\slash",
            "~",
            "é" * 100,
        ]
        for name in odd:
            storage.write_bytes(storage.join(url, name), name.encode())
        assert names(url) == sorted(odd)
        for name in odd:
            assert storage.read_bytes(storage.join(url, name)) == name.encode()
        storage.rename(storage.join(url, "a?b=c&d"), storage.join(url, "a?"))
        assert storage.delete(storage.join(url, "*"))
        assert storage.delete(storage.join(url, "a?"))
        assert names(url) == sorted(set(odd) - {"*", "a?b=c&d"})

    def test_a_colon_in_a_name_works_or_is_refused_with_the_reason(self, url: str) -> None:
        if url.startswith("hdfs"):
            with pytest.raises(ConfigError, match="holds a colon, which HDFS allows in no name"):
                storage.write_bytes(storage.join(url, "a:b"), b"1")
        else:
            storage.write_bytes(storage.join(url, "a:b"), b"1")
            assert names(url) == ["a:b"]

    def test_rename_moves_a_file_and_replaces_only_when_asked(self, url: str) -> None:
        first, second = storage.join(url, "first"), storage.join(url, "new", "second")
        storage.write_bytes(first, b"1")
        storage.rename(first, second)
        assert not storage.exists(first)
        storage.write_bytes(first, b"2")
        with pytest.raises(AlreadyExistsError, match="second: already exists"):
            storage.rename(first, second)
        storage.rename(first, second, overwrite=True)
        assert storage.read_bytes(second) == b"2"
        assert names(url) == ["new"]
        with pytest.raises(NotFoundError, match="first: not found"):
            storage.rename(first, second)

    def test_rename_moves_a_directory_but_never_onto_another(self, url: str) -> None:
        storage.write_bytes(storage.join(url, "a", "deep", "file"), b"1")
        storage.make_dirs(storage.join(url, "b"))
        for overwrite in (False, True):
            with pytest.raises(AlreadyExistsError, match="b: already exists"):
                storage.rename(storage.join(url, "a"), storage.join(url, "b"), overwrite)
        storage.rename(storage.join(url, "a"), storage.join(url, "c"))
        assert [storage.relative(entry.url, url) for entry in storage.walk_files(url)] == ["c/deep/file"]
        assert names(url) == ["b", "c"]

    def test_delete_takes_what_a_directory_holds_only_when_asked(self, url: str) -> None:
        storage.write_bytes(storage.join(url, "a", "b", "c"), b"1")
        with pytest.raises(StorageError, match="a: the directory is not empty"):
            storage.delete(storage.join(url, "a"))
        assert storage.delete(storage.join(url, "a"), recursive=True)
        assert not storage.delete(storage.join(url, "a"), recursive=True)
        storage.make_dirs(storage.join(url, "empty"))
        assert storage.delete(storage.join(url, "empty"))
        assert names(url) == []

    def test_a_root_is_never_deleted(self, url: str) -> None:
        root = url
        while storage.name(root):
            root = storage.parent(root)
        with pytest.raises(StorageError, match="is the root of a file system"):
            storage.delete(root, recursive=True)

    def test_making_a_directory_twice_is_fine(self, url: str) -> None:
        for _ in range(2):
            storage.make_dirs(storage.join(url, "a", "b"))
        assert storage.stat(storage.join(url, "a", "b")).is_dir


class TestExactlyOneWins:
    """Races on an exclusive name; fsspec's memory cannot decide them."""

    def test_of_many_threads(self, storage_url: str) -> None:
        target, together, results = storage.join(storage_url, "a"), threading.Barrier(8), []

        def write(number: int) -> None:
            with storage.create(storage.join(storage_url, f"warm-up-{number}")):
                pass
            try:
                with storage.create(target) as file:
                    file.write(str(number).encode())
                    together.wait()
                results.append(number)
            except AlreadyExistsError:
                pass

        threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(results) == 1
        assert storage.read_text(target) == str(results[0])
        assert [name for name in names(storage_url) if name.startswith(".")] == []

    def test_of_two_processes(self, storage_url: str) -> None:
        program = (
            "import sys, time\n"
            "from cvdist import storage\n"
            "from cvdist.errors import AlreadyExistsError\n"
            "url, who = sys.argv[1:]\n"
            "for number in range(20):\n"
            "    try:\n"
            "        with storage.create(storage.join(url, str(number))) as file:\n"
            "            file.write(who.encode())\n"
            "            storage.write_bytes(storage.join(url, 'ready', f'{who}-{number}'), b'')\n"
            "            while len(storage.list_dir(storage.join(url, 'ready'))) < 2 * (number + 1): pass\n"
            "        print(number)\n"
            "    except AlreadyExistsError:\n"
            "        pass\n"
        )
        command = [sys.executable, "-c", program, storage_url]
        racers = [subprocess.Popen([*command, who], stdout=subprocess.PIPE, text=True, cwd=ROOT) for who in "ab"]
        won = {who: racer.communicate()[0].split() for who, racer in zip("ab", racers, strict=True)}
        assert sorted(won["a"] + won["b"], key=int) == [str(number) for number in range(20)]
        for who, numbers in won.items():
            assert all(storage.read_text(storage.join(storage_url, number)) == who for number in numbers)


class TestLocalDisk:
    def test_links_are_followed_without_running_in_circles(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        (tmp_path / "real").mkdir()
        (tmp_path / "real" / "file").write_bytes(b"123")
        (tmp_path / "link").symlink_to("real/file")
        (tmp_path / "twin").symlink_to("real")
        (tmp_path / "real" / "up").symlink_to(tmp_path)
        (tmp_path / "nowhere").symlink_to("missing")
        url = f"file://{tmp_path}"
        found = sorted(storage.relative(entry.url, url) for entry in storage.walk_files(url))
        assert found == ["link", "nowhere", "real/file", "twin/file"]
        assert storage.stat(storage.join(url, "link")).size_bytes == 3
        assert "real/up leads back to a directory above it: skipped" in caplog.text

    def test_deleting_a_link_leaves_what_it_leads_to(self, tmp_path: Path) -> None:
        (tmp_path / "real").mkdir()
        (tmp_path / "real" / "file").touch()
        (tmp_path / "folder").mkdir()
        (tmp_path / "folder" / "link").symlink_to(tmp_path / "real")
        assert storage.delete(f"file://{tmp_path}/folder", recursive=True)
        assert (tmp_path / "real" / "file").exists()

    def test_a_file_that_shrinks_while_it_is_read_is_an_error(self, tmp_path: Path) -> None:
        (tmp_path / "a").write_bytes(bytes(4 * MIB))
        with storage.open_read(f"file://{tmp_path}/a", 0) as file:
            file.read(10)
            os.truncate(tmp_path / "a", MIB)
            with pytest.raises(StorageError, match="the file was cut while it was read"):
                file.read()

    def test_without_hard_links_a_free_name_is_still_taken_once(self, tmp_path: Path) -> None:
        from cvdist.stores.local import LocalStore

        for name in ("a", "b"):
            (tmp_path / name).write_text(name)
        LocalStore()._rename_reserved(str(tmp_path / "a"), str(tmp_path / "target"))
        with pytest.raises(FileExistsError):
            LocalStore()._rename_reserved(str(tmp_path / "b"), str(tmp_path / "target"))
        assert (tmp_path / "target").read_text() == "a"
        assert sorted(os.listdir(tmp_path)) == ["b", "target"]

    def test_access_denied_says_so(self, tmp_path: Path) -> None:
        (tmp_path / "a").mkdir(mode=0o500)
        child = os.fork()
        if child == 0:  # as nobody, for root may write everywhere
            code = 1
            try:
                if os.getuid() == 0:
                    os.setuid(65534)
                storage.write_bytes(f"file://{tmp_path}/a/b", b"")
            except StorageError as error:
                code = 0 if "access is denied; expected permission for this user" in str(error) else 2
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


class TestHdfs:
    def test_access_denied_says_so(self, hdfs_url: str) -> None:
        program = "import sys; from cvdist import storage; storage.write_bytes(sys.argv[1], b'')"
        command = [sys.executable, "-c", program, storage.join(hdfs_url, "a")]
        environment = {**os.environ, "HADOOP_USER_NAME": "stranger"}
        done = subprocess.run(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
        assert f"StorageError: {hdfs_url}/a: access is denied; expected permission for this user" in done.stderr

    def test_a_write_after_a_failure_has_all_its_replicas_in_the_end(self, hdfs: LocalHdfs, hdfs_url: str) -> None:
        url = storage.join(hdfs_url, "a")
        with storage.create(url, after_failure=True) as file:
            file.write(b"x" * 1000)
        status = hdfs_native.Client(hdfs.url).get_file_info(url.removeprefix(hdfs.url))
        assert (status.replication, status.length) == (2, 1000)

    def test_a_nameservice_of_the_hadoop_configuration_is_served_by_the_namenode_that_lives(
        self, hdfs: LocalHdfs, hdfs_url: str, tmp_path: Path
    ) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            dead = f"127.0.0.1:{free.getsockname()[1]}"
        settings = {
            "dfs.nameservices": "photos",
            "dfs.ha.namenodes.photos": "nn1,nn2",
            "dfs.namenode.rpc-address.photos.nn1": dead,
            "dfs.namenode.rpc-address.photos.nn2": hdfs.url.removeprefix("hdfs://"),
        }
        rows = "".join(
            f"<property><name>{key}</name><value>{value}</value></property>" for key, value in settings.items()
        )
        (tmp_path / "hdfs-site.xml").write_text(f"<configuration>{rows}</configuration>")
        (tmp_path / "core-site.xml").write_text("<configuration></configuration>")
        program = "import sys; from cvdist import storage; storage.write_text(sys.argv[1], 'there'); print(storage.stat(sys.argv[1]).url)"
        url = "hdfs://photos/" + storage.relative(hdfs_url, hdfs.url) + "/a"
        environment = {**os.environ, "HADOOP_CONF_DIR": str(tmp_path)}
        done = subprocess.run(
            [sys.executable, "-c", program, url], cwd=ROOT, env=environment, capture_output=True, text=True
        )
        assert done.stdout.strip() == url, done.stderr
        assert storage.read_text(storage.join(hdfs_url, "a")) == "there"

    def test_a_host_without_port_that_nothing_names_is_a_wrong_setting(self) -> None:
        with pytest.raises(ConfigError, match="hdfs://somewhere has no port and no Hadoop configuration names it"):
            storage.exists("hdfs://somewhere/a")


class TestUrls:
    @pytest.mark.parametrize(
        "url, message",
        [
            (
                "/data/x",
                "data: '/data/x' has no scheme; expected file:///path or hdfs://host:port/path; use file:///data/x",
            ),
            ("file:/data/x", "'file:/data/x' has no scheme; .* use file:///data/x"),
            ("data", "'data' has no scheme; .* use file:///.*/data"),
            ("", "'' has no scheme"),
            ("file://data/x", "names the host 'data'; expected file:///path; use file:///data/x"),
            ("hdfs:///data", "has no host; expected hdfs://host:port/path; use for example hdfs://namenode:8020/data"),
            ("hdfs://host:port/data", "has the port 'port'; .* use host:8020"),
            ("hdfs://host:0/data", "has the port '0'"),
            ("hdfs://host:99999/data", "has the port '99999'"),
            ("hdfs://user@host:1/data", "has the host 'user@host', which cannot be one"),
            ("hfds://host/data", "has the unknown scheme 'hfds'; expected file:///path or hdfs://host:port/path"),
            ("file:///a\0b", "holds a zero byte"),
        ],
    )
    def test_a_url_that_cannot_be_is_refused_on_one_line(self, url: str, message: str) -> None:
        with pytest.raises(ConfigError, match=message) as caught:
            storage.check_url(url, "data")
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize(
        "url, expected",
        [
            ("file:///", "file:///"),
            ("FILE:///a//b/./c/../d/", "file:///a/b/d"),
            ("file:////a", "file:///a"),
            ("hdfs://host:9000", "hdfs://host:9000/"),
            ("hdfs://nameservice/a/", "hdfs://nameservice/a"),
            ("hdfs://[::1]:9000/a", "hdfs://[::1]:9000/a"),
            ("memory://", "memory:///"),
        ],
    )
    def test_a_url_has_one_spelling(self, url: str, expected: str) -> None:
        assert storage.check_url(url) == expected

    @given(
        st.lists(
            st.text(st.characters(exclude_characters="/\0"), min_size=1).filter(lambda part: part not in (".", ".."))
        )
    )
    def test_join_and_relative_are_inverse(self, parts: list[str]) -> None:
        for base in ("file:///", "file:///a b", "memory:///x"):
            joined = storage.join(base, *parts)
            assert storage.relative(joined, base) == "/".join(parts)
            assert storage.name(joined) == (parts[-1] if parts else storage.name(base))
            assert storage.parent(joined) == (storage.join(base, *parts[:-1]) if parts else storage.parent(base))

    def test_join_stays_below(self) -> None:
        for part in ("/etc/passwd", "../a", "a/../../b", ".."):
            with pytest.raises(ConfigError, match="does not lie below 'file:///data'"):
                storage.join("file:///data", part)
        with pytest.raises(ConfigError, match="does not lie below"):
            storage.relative("file:///database", "file:///data")
        assert storage.parent("hdfs://host:1/") == "hdfs://host:1/"
        assert storage.parent("hdfs://host:1/a") == "hdfs://host:1/"

    def test_a_rename_stays_on_one_file_system(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="are on different file systems"):
            storage.rename(f"file://{tmp_path}/a", "memory:///a")


class TestLimits:
    def test_the_environment_sets_them(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert storage.Limits.from_environment() == storage.Limits(deadline_s=30.0, attempts=3)
        monkeypatch.setenv("CVDIST_STORAGE_DEADLINE_S", "2.5")
        monkeypatch.setenv("CVDIST_STORAGE_ATTEMPTS", "7")
        assert storage.Limits.from_environment() == storage.Limits(deadline_s=2.5, attempts=7)

    @pytest.mark.parametrize(
        "name, text", [("DEADLINE_S", "soon"), ("DEADLINE_S", "nan"), ("ATTEMPTS", "0"), ("ATTEMPTS", "1.5")]
    )
    def test_a_wrong_number_is_refused(self, monkeypatch: pytest.MonkeyPatch, name: str, text: str) -> None:
        monkeypatch.setenv(f"CVDIST_STORAGE_{name}", text)
        with pytest.raises(
            ConfigError, match=f"CVDIST_STORAGE_{name}: '{text}' cannot be used; expected a number from"
        ):
            storage.exists("file:///")


def test_many_small_files_are_read_at_once_and_others_are_left_to_a_read_of_their_own(storage_url: str) -> None:
    contents = {"a": b"one", "b": b"", "c": bytes(9 << 20), "d d%": b"four"}
    for name, data in contents.items():
        storage.write_bytes(storage.join(storage_url, name), data)
    found = storage.read_files([storage.join(storage_url, name) for name in contents])
    assert found == [b"one", b"", None, b"four"]
    assert storage.read_bytes(storage.join(storage_url, "c")) == contents["c"]
    with_absent = [storage.join(storage_url, name) for name in ("a", "absent", "d d%")]
    assert storage.read_files(with_absent) == [None, None, None]
