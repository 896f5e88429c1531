"""The local cache when its disk is full, when its writers are killed or frozen, and when several of them want the same room."""

from __future__ import annotations

import fcntl
import logging
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cvdist import cache
from cvdist.cache import LocalCache
from cvdist.fetch import Fetcher
from tests.faults.cache_writer import KIB, MIB, NUM_PARTS, check, part
from tests.unit.test_fetch import all_parts, made

ROOT = Path(__file__).resolve().parents[2]
KILLS = 40
READY_S = 60


class Writer:
    """A process that writes; what it says goes to a file."""

    def __init__(self, folder: Path, limit_bytes: int, seed: int, log_path: Path) -> None:
        """Starts it, a fresh one, for a fork of a large process may take longer than it is to live; returns when it writes."""
        self._log_path, ready_path = log_path, log_path.with_suffix(".ready")
        command = [sys.executable, "-m", "tests.faults.cache_writer", folder, limit_bytes, seed, ready_path]
        with log_path.open("w") as log:
            self._process = subprocess.Popen([*map(str, command)], cwd=ROOT, stdout=log, stderr=log)
        end_s = time.monotonic() + READY_S
        while not ready_path.exists():
            assert self._process.poll() is None, log_path.read_text()
            assert time.monotonic() < end_s, "it does not begin"
            time.sleep(0.005)

    def signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def is_writing(self, folder: Path) -> bool:
        """Says whether it has a file open that is not finished."""
        files = Path(f"/proc/{self._process.pid}/fd").iterdir()
        return any(os.readlink(file).startswith(str(folder / "unfinished")) for file in files)

    def end(self) -> None:
        """Kills it; it must not have ended by itself, nor found anything damaged."""
        self.signal(signal.SIGKILL)
        status, said = self._process.wait(), self._log_path.read_text()
        assert status == -signal.SIGKILL, said
        assert "damaged" not in said


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "cache").mkdir()
    LocalCache(str(tmp_path / "cache"), 1 << 30)
    return tmp_path / "cache"


@pytest.fixture
def start(folder: Path) -> Iterator[Callable[[int, int], Writer]]:
    """Starts writers: start(limit_bytes, seed)."""
    writers: list[Writer] = []

    def begin(limit_bytes: int, seed: int) -> Writer:
        writers.append(Writer(folder, limit_bytes, seed, folder.parent / f"log-{seed}"))
        return writers[-1]

    yield begin
    for writer in writers:
        writer.end()  # also where the test has ended it


def kept_bytes(folder: Path) -> int:
    """Returns the bytes of all parts, under the lock: nothing is evicted meanwhile, and what is written has room."""
    with (folder / "used-bytes").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return sum(path.stat().st_size for path in (folder / "parts").rglob("*") if path.is_file())


def kill_one(folder: Path, writers: list[Writer], rng: random.Random) -> bool:
    """Kills a writer, in half of the cases one that is just writing; says whether it left something unfinished."""
    end_s = time.monotonic() + rng.choice([0, 3])
    while True:
        for writer in writers:
            writer.signal(signal.SIGSTOP)
        time.sleep(0.001)
        victim = next((writer for writer in writers if writer.is_writing(folder)), None)
        if victim or time.monotonic() > end_s:
            break
        for writer in writers:
            writer.signal(signal.SIGCONT)
        time.sleep(rng.uniform(0, 0.003))
    before = os.listdir(folder / "unfinished")
    victim = victim or writers[0]
    writers.remove(victim)
    victim.end()
    LocalCache(str(folder), 1 << 30)
    left = os.listdir(folder / "unfinished")
    for writer in writers:
        writer.signal(signal.SIGCONT)
    return len(left) < len(before)


def test_after_kills_at_any_moment_it_serves_right_bytes_alone_and_cleans_up(
    folder: Path, start: Callable[[int, int], Writer]
) -> None:
    limit_bytes, rng, met = 20 * MIB, random.Random(0), 0
    writers: list[Writer] = []
    for kill in range(KILLS):
        writers.append(start(limit_bytes, kill))
        time.sleep(rng.uniform(0.1, 0.3))
        if len(writers) == 3:
            met += kill_one(folder, writers, rng)
            assert kept_bytes(folder) <= limit_bytes
    for writer in writers:
        writer.end()
    print(f"{met} of {KILLS - 2} kills met a write")
    assert met > KILLS // 4
    store = LocalCache(str(folder), limit_bytes)
    assert os.listdir(folder / "unfinished") == []
    assert sum(check(store, number, part(number)) for number in range(NUM_PARTS)) > 5
    assert int((folder / "used-bytes").read_text()) >= kept_bytes(folder), "never less than there is"


def test_the_limit_holds_for_all_processes_together(folder: Path, start: Callable[[int, int], Writer]) -> None:
    limit_bytes, sizes = 12 * MIB, []
    for seed in range(3):
        start(limit_bytes, seed)
    for _ in range(60):
        time.sleep(0.05)
        sizes.append(kept_bytes(folder))
    assert max(sizes) <= limit_bytes
    assert max(sizes) > limit_bytes * 0.7
    assert len(set(sizes)) > 5, "parts come and go"


def test_a_frozen_writer_holds_nobody_up(
    folder: Path, start: Callable[[int, int], Writer], monkeypatch: pytest.MonkeyPatch
) -> None:
    writers = [start(12 * MIB, seed) for seed in range(2)]
    monkeypatch.setattr(cache, "LOCK_WAIT_S", 0.3)
    for number in range(20):
        for writer in writers:
            writer.signal(signal.SIGSTOP)
        begun_s = time.monotonic()
        store = LocalCache(str(folder), 12 * MIB)
        for other in range(1000 + 5 * number, 1005 + 5 * number):
            store.put(str(other), part(other))
            check(store, other, part(other))
        assert time.monotonic() - begun_s < 3
        for writer in writers:
            writer.signal(signal.SIGCONT)
        time.sleep(0.05)


@pytest.fixture(params=["size=1m"])
def small_disk(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A disk with little room: `size` limits its bytes, `nr_inodes` its files."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", request.param, "tmpfs", str(folder)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount a small disk: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_warned_about_once_and_fetching_goes_on(
    small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cache, "PAUSE_S", 0.0)  # so that it is tried again and again
    shards = [made(f"{number}.parquet", group_bytes=40 * KIB) for number in range(20)]
    for data in shards:
        (tmp_path / data.shard.path).write_bytes(data.content)
    with caplog.at_level(logging.WARNING):
        fetcher = Fetcher(f"file://{tmp_path}", LocalCache(str(small_disk), 1 << 30))
        for data in shards:
            all_parts(fetcher, data)
    assert [record.message for record in caplog.records] == [
        f"{small_disk}: the local cache takes no more (No space left on device); going on without"
    ]
    assert os.listdir(small_disk / "unfinished") == []
    again = Fetcher(f"file://{tmp_path}", LocalCache(str(small_disk), 1 << 30))
    for data in shards:
        all_parts(again, data)
    assert 15 < again.counters.cache_hits < 60
    assert again.counters.cache_hits + again.counters.cache_misses == 100


def test_a_disk_that_is_full_from_the_start_stops_nothing(
    small_disk: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = made("a.parquet", group_bytes=40 * KIB)
    (tmp_path / "a.parquet").write_bytes(data.content)
    with (small_disk / "other").open("wb", buffering=0) as other, pytest.raises(OSError, match="No space left"):
        while True:
            other.write(bytes(4 * KIB))
    all_parts(Fetcher(f"file://{tmp_path}", LocalCache(str(small_disk), 1 << 30)), data)
    assert caplog.text.count("takes no more (No space left on device); going on without") == 1


@pytest.mark.parametrize("small_disk", ["nr_inodes=1", "nr_inodes=2", "nr_inodes=3", "nr_inodes=4"], indirect=True)
def test_a_disk_without_room_for_the_folders_of_the_cache_stops_nothing(
    small_disk: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = made("a.parquet")
    (tmp_path / "a.parquet").write_bytes(data.content)
    all_parts(Fetcher(f"file://{tmp_path}", LocalCache(str(small_disk), 1 << 30)), data)
    assert caplog.text.count("takes no more (No space left on device); going on without") == 1
