"""storage.py when file systems die, freeze, fill up, and when the process itself does."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cluster.hadoop import HOST
from cluster.local_hdfs import LocalHdfs
from cvdist import storage
from cvdist.errors import StorageError
from tests.faults.mending import mend

MIB = 1 << 20
ROOT = Path(__file__).parents[2]


def run(program: str, *args: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a program in a process of its own."""
    return subprocess.run(
        [sys.executable, "-c", program, *args],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.fixture(scope="module")
def breakable(private_hdfs: Callable[..., LocalHdfs]) -> LocalHdfs:
    return private_hdfs(datanodes=2)


@pytest.fixture
def fragile(breakable: LocalHdfs) -> Iterator[LocalHdfs]:
    """An HDFS that a test may break; it is whole again for the next one."""
    yield breakable
    mend(breakable)


@pytest.fixture
def fragile_url(fragile: LocalHdfs, request: pytest.FixtureRequest) -> str:
    url = storage.join(fragile.url, request.node.name.replace("[", "-").replace("]", ""))
    storage.make_dirs(url)
    return url


class TestNameNode:
    @pytest.mark.parametrize(
        "call", [storage.exists, storage.list_dir, storage.read_bytes, lambda url: storage.write_bytes(url, b"")]
    )
    def test_one_that_is_not_there_is_named_within_ten_seconds(self, call: Callable[[str], object]) -> None:
        with socket.socket() as free:
            free.bind((HOST, 0))
            address = f"{HOST}:{free.getsockname()[1]}"
        started_s = time.monotonic()
        with pytest.raises(StorageError) as caught:
            call(f"hdfs://{address}/data")
        assert time.monotonic() - started_s < 10
        assert str(caught.value) == (
            f"hdfs://{address} does not answer (connection refused); expected a running NameNode at {address};"
            " start it or correct the URL"
        )

    def test_one_that_drops_connections_is_named_within_ten_seconds(self) -> None:
        with socket.socket() as full, socket.socket() as first, socket.socket() as second:
            full.bind((HOST, 0))
            full.listen(0)
            for client in (first, second):  # these fill its queue: the kernel answers no further connection
                client.setblocking(False)
                client.connect_ex(full.getsockname())
            address = f"{HOST}:{full.getsockname()[1]}"
            started_s = time.monotonic()
            with pytest.raises(
                StorageError, match=rf"hdfs://{address} does not answer \(timed out\); expected a running NameNode"
            ):
                storage.exists(f"hdfs://{address}/data")
            assert time.monotonic() - started_s < 10

    def test_a_host_that_does_not_exist_is_named_within_ten_seconds(self) -> None:
        started_s = time.monotonic()
        with pytest.raises(
            StorageError, match=r"hdfs://no-such-host\.invalid:9000 does not answer \(.*(name|resol).*\)"
        ):
            storage.exists("hdfs://no-such-host.invalid:9000/data")
        assert time.monotonic() - started_s < 10

    def test_one_that_dies_is_named_within_ten_seconds_and_open_files_stay_readable(
        self, fragile: LocalHdfs, fragile_url: str
    ) -> None:
        data = random.Random(0).randbytes(12 * MIB)
        storage.write_bytes(storage.join(fragile_url, "a"), data)
        with storage.open_read(storage.join(fragile_url, "a")) as file:
            assert file.read(10) == data[:10]
            fragile.kill("namenode")
            started_s = time.monotonic()
            with pytest.raises(StorageError, match=rf"{fragile.url} does not answer \(connection refused\)"):
                storage.exists(fragile_url)
            assert time.monotonic() - started_s < 10
            assert file.read() == data[10:]
        fragile.restart("namenode")
        assert storage.read_bytes(storage.join(fragile_url, "a")) == data

    def test_a_frozen_one_is_given_up_at_the_deadline_while_signal_handlers_run(
        self, fragile: LocalHdfs, fragile_url: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("CVDIST_STORAGE_DEADLINE_S", "1")
        ticks: list[float] = []
        previous = signal.signal(signal.SIGALRM, lambda *_: ticks.append(time.monotonic()))
        fragile.freeze("namenode")
        try:
            for call in (
                storage.exists,
                storage.list_dir,
                lambda url: storage.write_bytes(storage.join(url, "a"), b""),
            ):
                started_s = time.monotonic()
                signal.setitimer(signal.ITIMER_REAL, 0.3)
                with pytest.raises(
                    StorageError, match=rf"{fragile.url}.*: no answer in 1 s; expected a file system that responds"
                ):
                    call(fragile_url)
                assert 0.9 < time.monotonic() - started_s < 2
                assert 0.2 < ticks[-1] - started_s < 0.9
            assert len(ticks) == 3
        finally:
            signal.signal(signal.SIGALRM, previous)
            fragile.thaw("namenode")
        assert storage.list_dir(fragile_url) == []

    def test_freezing_during_a_write_leaves_no_target(
        self, fragile: LocalHdfs, fragile_url: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        storage.write_bytes(storage.join(fragile_url, "a"), b"old")
        monkeypatch.setenv("CVDIST_STORAGE_DEADLINE_S", "1")
        for name in ("a", "b"):
            with (
                pytest.raises(StorageError, match="no answer in 1 s"),
                storage.create(storage.join(fragile_url, name), True) as file,
            ):
                file.write(b"x" * (9 * MIB))
                fragile.freeze("namenode")
            fragile.thaw("namenode")
        monkeypatch.delenv("CVDIST_STORAGE_DEADLINE_S")
        assert storage.read_bytes(storage.join(fragile_url, "a")) == b"old"
        assert not storage.exists(storage.join(fragile_url, "b"))

    def test_a_program_ends_although_a_call_is_frozen(self, fragile: LocalHdfs, fragile_url: str) -> None:
        program = (
            "import sys\n"
            "from cvdist import storage\n"
            "storage.exists(sys.argv[1]); print('warm', flush=True); sys.stdin.readline()\n"
            "try: storage.exists(sys.argv[1])\n"
            "except storage.TimedOutError: print('timed out')\n"
        )
        with subprocess.Popen(
            [sys.executable, "-c", program, fragile_url],
            cwd=ROOT,
            env={**os.environ, "CVDIST_STORAGE_DEADLINE_S": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as child:
            assert child.stdout.readline() == "warm\n"
            fragile.freeze("namenode")
            started_s = time.monotonic()
            assert child.communicate("\n", timeout=30)[0] == "timed out\n"
            assert time.monotonic() - started_s < 5
        assert child.returncode == 0


class TestDataNodes:
    @pytest.mark.parametrize("victim", ["datanode1", "datanode2"])
    def test_killing_one_during_a_read_gives_the_right_data(
        self, fragile: LocalHdfs, fragile_url: str, victim: str
    ) -> None:
        data = random.Random(1).randbytes(40 * MIB)
        storage.write_bytes(storage.join(fragile_url, "a"), data)
        with storage.open_read(storage.join(fragile_url, "a")) as file:
            start = file.read(MIB)
            fragile.kill(victim)
            assert start + file.read() == data
        assert storage.read_range(storage.join(fragile_url, "a"), 20 * MIB, 10 * MIB) == data[20 * MIB : 30 * MIB]

    @pytest.mark.parametrize("victim", ["datanode1", "datanode2"])
    def test_a_frozen_one_is_passed_over_within_the_deadline(
        self, fragile: LocalHdfs, fragile_url: str, victim: str
    ) -> None:
        data = random.Random(2).randbytes(4 * MIB)
        storage.write_bytes(storage.join(fragile_url, "a"), data)
        fragile.freeze(victim)
        program = "import hashlib, sys; from cvdist import storage; print(hashlib.md5(storage.read_bytes(sys.argv[1])).hexdigest())"
        done = run(program, storage.join(fragile_url, "a"), CVDIST_STORAGE_DEADLINE_S="8")
        assert done.stdout.strip() == hashlib.md5(data).hexdigest(), done.stderr

    @pytest.mark.parametrize("after_s", [0.05, 0.2, 0.4])
    def test_killing_one_during_a_write_never_leaves_a_cut_file(
        self, fragile: LocalHdfs, fragile_url: str, after_s: float, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("CVDIST_STORAGE_DEADLINE_S", "8")
        data, target = random.Random(3).randbytes(64 * MIB), storage.join(fragile_url, "a")
        killer = threading.Timer(after_s, fragile.kill, ["datanode1"])
        killer.start()
        try:
            storage.write_bytes(target, data)
            landed = True
        except StorageError as error:
            print(error)
            landed = False
        killer.join()
        assert storage.exists(target) == landed
        if landed:
            assert storage.read_bytes(target) == data

    def test_a_dead_one_that_hdfs_still_counts_does_not_fail_a_write(
        self, fragile: LocalHdfs, fragile_url: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("CVDIST_STORAGE_DEADLINE_S", "8")
        data, target = random.Random(5).randbytes(MIB), storage.join(fragile_url, "a")
        fragile.kill("datanode1")
        storage.write_bytes(target, data)
        assert storage.read_bytes(target) == data
        assert [storage.name(entry.url) for entry in storage.list_dir(fragile_url)] == ["a"]


class TestFullDisk:
    @pytest.fixture
    def small_disk(self, tmp_path: Path) -> Iterator[str]:
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)], capture_output=True, text=True
        )
        if mounted.returncode:
            pytest.skip(f"cannot mount a small disk: {mounted.stderr.strip()}")
        yield f"file://{tmp_path}"
        subprocess.run(["umount", str(tmp_path)], check=True)

    def test_it_is_named_with_its_room_and_nothing_is_left(self, small_disk: str) -> None:
        storage.write_bytes(storage.join(small_disk, "old"), b"o" * 300_000)
        for name, overwrite in (("new", False), ("old", True)):
            with pytest.raises(
                StorageError, match=rf"{small_disk}/{name}: the disk is full \(\d+ bytes free there\); expected room"
            ):
                storage.write_bytes(storage.join(small_disk, name), bytes(2 * MIB), overwrite)
            assert [storage.name(entry.url) for entry in storage.list_dir(small_disk)] == ["old"]
        assert storage.read_bytes(storage.join(small_disk, "old")) == b"o" * 300_000


class TestOwnProcess:
    def test_a_forked_child_can_use_storage(self, storage_url: str) -> None:
        target, data = storage.join(storage_url, "a"), random.Random(4).randbytes(20 * MIB)
        storage.write_bytes(target, data)
        with storage.open_read(target) as file:  # a piece is under way while the process forks
            file.read(1)
            child = os.fork()
            if child == 0:
                code = 1
                try:
                    with pytest.raises(StorageError, match="was opened before a fork"):
                        file.read()
                    storage.write_bytes(storage.join(storage_url, "b"), storage.read_bytes(target))
                    code = 0
                finally:
                    os._exit(code)
            assert file.read() == data[1:]
        deadline_s = time.monotonic() + 30
        while not (ended := os.waitpid(child, os.WNOHANG))[0]:
            if time.monotonic() > deadline_s:
                os.kill(child, signal.SIGKILL)
            time.sleep(0.05)
        assert os.waitstatus_to_exitcode(ended[1]) == 0
        assert storage.read_bytes(storage.join(storage_url, "b")) == data

    def test_a_forked_child_that_leaves_the_block_of_a_write_spoils_nothing(self, storage_url: str) -> None:
        with storage.create(storage.join(storage_url, "a")) as file:
            file.write(b"x" * (9 * MIB))
            child = os.fork()
            if child == 0:
                try:
                    with storage.create(storage.join(storage_url, "b")):
                        pass
                    sys.exit()  # unwinds through the parent's block
                finally:
                    os._exit(0)
            assert os.waitpid(child, 0) == (child, 0)
            file.write(b"y")
        assert storage.read_bytes(storage.join(storage_url, "a")) == b"x" * (9 * MIB) + b"y"

    def test_kill_9_of_a_writer_leaves_no_target(self, storage_url: str) -> None:
        program = (
            "import sys, time\n"
            "from cvdist import storage\n"
            "with storage.create(sys.argv[1]) as file:\n"
            "    file.write(b'x' * (20 << 20)); print('written', flush=True); time.sleep(60)\n"
        )
        target = storage.join(storage_url, "a")
        command = [sys.executable, "-c", program, target]
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as writer:
            assert writer.stdout.readline() == "written\n"
            writer.kill()
        assert not storage.exists(target)
        assert all(storage.name(entry.url).startswith(".a.") for entry in storage.list_dir(storage_url))
        storage.write_bytes(target, b"next")
        assert storage.read_bytes(target) == b"next"

    def test_a_program_may_end_while_pieces_are_read_ahead(self, storage_url: str) -> None:
        target = storage.join(storage_url, "a")
        storage.write_bytes(target, bytes(20 * MIB))
        program = "import sys; from cvdist import storage; file = storage.open_read(sys.argv[1]); file.read(1)"
        for _ in range(5):
            done = run(program, target)
            assert (done.returncode, done.stderr) == (0, "")

    def test_keyboard_interrupt_ends_a_wait(self, storage_url: str) -> None:
        target = storage.join(storage_url, "a")
        previous = signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        try:
            with pytest.raises(KeyboardInterrupt), storage.create(target) as file:
                signal.setitimer(signal.ITIMER_REAL, 0.1)
                while file.tell() < 1 << 34:
                    file.write(bytes(4 * MIB))
        finally:
            signal.signal(signal.SIGALRM, previous)
        assert storage.list_dir(storage_url) == []
