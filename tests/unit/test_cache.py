"""The local cache: what it returns is what was put, it stays within its limit, and a spoilt folder costs speed alone."""

from __future__ import annotations

import fcntl
import logging
import os
import random
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import xxhash

from cvdist import cache
from cvdist.cache import LocalCache
from cvdist.errors import ConfigError

KIB = 1 << 10


def part(number: int, num_bytes: int = KIB) -> bytes:
    """Returns the bytes of a made part."""
    return random.Random(number).randbytes(num_bytes)


def put(store: LocalCache, *numbers: int) -> None:
    """Puts made parts under their numbers."""
    for number in numbers:
        store.put(str(number), part(number))


def get(store: LocalCache, number: int, num_bytes: int = KIB) -> bytes | None:
    """Gets a made part, which is right or None."""
    data = part(number, num_bytes)
    found = store.get(str(number), num_bytes, xxhash.xxh3_64_hexdigest(data))
    assert found in (None, data)
    return found


def kept(store: LocalCache, numbers: range) -> list[int]:
    """Returns which parts are there."""
    return [number for number in numbers if get(store, number) is not None]


def files(folder: Path) -> list[Path]:
    """Returns the files of the parts."""
    return [path for path in (folder / "parts").rglob("*") if path.is_file()]


def age(folder: Path, seconds: float) -> None:
    """Makes everything look as if it was last used some time ago."""
    for path in files(folder):
        used_s = path.stat().st_mtime - seconds
        os.utime(path, (used_s, used_s))


def test_what_was_put_is_returned_and_nothing_else(tmp_path: Path) -> None:
    store = LocalCache(str(tmp_path), 1 << 30)
    assert get(store, 1) is None
    put(store, 1, 2)
    store.put("3", memoryview(part(3, 5 * KIB)))
    assert kept(store, range(1, 3)) == [1, 2]
    assert get(store, 3, 5 * KIB) == part(3, 5 * KIB)
    assert store.get("1", KIB, xxhash.xxh3_64_hexdigest(part(2))) is None, "another data set's part under this name"


def test_another_process_finds_it(tmp_path: Path) -> None:
    put(LocalCache(str(tmp_path), 1 << 30), 1)
    assert get(LocalCache(str(tmp_path), 1 << 30), 1)


@pytest.mark.parametrize("damage", ["flipped", "cut", "longer", "emptied", "a folder"])
def test_a_damaged_part_is_removed_and_warned_about_and_can_be_put_again(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    store = LocalCache(str(tmp_path), 1 << 30)
    put(store, 1)
    [path] = files(tmp_path)
    content = path.read_bytes()
    flipped = bytearray(content)
    flipped[KIB // 2] ^= 1
    changed = {"flipped": bytes(flipped), "cut": content[:-1], "longer": content + b"x", "emptied": b""}
    path.unlink()
    if damage == "a folder":
        path.mkdir()
    else:
        path.write_bytes(changed[damage])
    with caplog.at_level(logging.WARNING, "cvdist.cache"):
        assert get(store, 1) is None
    assert f"{path}: damaged in the local cache" in caplog.text
    if damage != "a folder":
        assert not path.exists()
        put(store, 1)
        assert get(store, 1)


def test_every_flipped_bit_of_a_part_is_noticed(tmp_path: Path) -> None:
    store, data = LocalCache(str(tmp_path), 1 << 30), part(1, 64)
    for bit in range(8 * len(data)):
        store.put("1", data)
        [path] = files(tmp_path)
        content = bytearray(path.read_bytes())
        content[bit // 8] ^= 1 << bit % 8
        path.write_bytes(content)
        assert store.get("1", 64, xxhash.xxh3_64_hexdigest(data)) is None


def test_the_longest_unused_parts_are_evicted_first(tmp_path: Path) -> None:
    before = LocalCache(str(tmp_path), 100 * KIB)
    put(before, *range(100))
    age(tmp_path, 100)
    used = random.Random(0).sample(range(100), 50)
    for number in used:
        assert get(before, number)
    age(tmp_path, 100)
    now = LocalCache(str(tmp_path), 100 * KIB)
    put(now, *range(100, 140))
    left = kept(now, range(140))
    assert set(range(100, 140)) <= set(left)
    assert set(used) <= set(left), "these were used later"
    assert sum(path.stat().st_size for path in files(tmp_path)) <= 100 * KIB


def test_what_this_run_has_used_is_never_evicted_for_what_it_uses_later(tmp_path: Path) -> None:
    store = LocalCache(str(tmp_path), 50 * KIB)
    for epoch in range(5):
        order = random.Random(epoch).sample(range(100), 100)
        hits = 0
        for number in order:
            hits += get(store, number) is not None
            put(store, number)
        assert hits == (50 if epoch else 0), "half of the data fits, and half of the reads are hits"


def test_the_limit_is_kept_at_every_moment(tmp_path: Path) -> None:
    rng = random.Random(0)
    for opened in range(10):
        store = LocalCache(str(tmp_path), 40 * KIB)
        for number in range(opened * 30, opened * 30 + 30):
            store.put(str(number), part(number, rng.randrange(1, 6 * KIB)))
            assert sum(path.stat().st_size for path in files(tmp_path)) <= 40 * KIB
        age(tmp_path, 10)
    assert sum(path.stat().st_size for path in files(tmp_path)) > 30 * KIB


def test_a_smaller_limit_than_before_is_respected(tmp_path: Path) -> None:
    put(LocalCache(str(tmp_path), 1 << 30), *range(100))
    age(tmp_path, 10)
    put(LocalCache(str(tmp_path), 10 * KIB), 100)
    assert sum(path.stat().st_size for path in files(tmp_path)) <= 10 * KIB


def test_a_part_larger_than_the_limit_is_not_kept(tmp_path: Path) -> None:
    store = LocalCache(str(tmp_path), 4 * KIB)
    store.put("1", part(1, 5 * KIB))
    assert files(tmp_path) == []


def test_a_full_cache_takes_parts_again_when_there_is_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "PAUSE_S", 0.2)
    store = LocalCache(str(tmp_path), 2 * KIB)
    put(store, 1, 2, 3)
    assert kept(store, range(1, 4)) == [1, 2]
    for path in files(tmp_path):
        path.unlink()
    put(store, 3)
    assert kept(store, range(1, 4)) == []
    time.sleep(0.25)
    put(store, 3)
    assert kept(store, range(1, 4)) == [3]


@pytest.mark.parametrize("noted", [b"", b"x" * 40, b"-5\n", b"99999999999999999999\n", b"\0" * 21])
def test_a_spoilt_count_of_bytes_is_made_again(tmp_path: Path, noted: bytes) -> None:
    put(LocalCache(str(tmp_path), 3 * KIB), 1, 2)
    (tmp_path / "used-bytes").write_bytes(noted)
    store = LocalCache(str(tmp_path), 3 * KIB)
    put(store, 3)
    assert kept(store, range(1, 4)) == [1, 2, 3]
    assert int((tmp_path / "used-bytes").read_bytes()[:21]) == 3 * KIB


def test_names_of_a_hostile_manifest_stay_in_the_folder(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    folder.mkdir()
    store = LocalCache(str(folder), 1 << 30)
    names = ["../../evil", "/etc/evil", "a/b", ".", "", "x" * 5000, "nul\0", "é☃"]
    for name in names:
        store.put(name, name.encode() + b"!")
        assert store.get(name, len(name.encode()) + 1, xxhash.xxh3_64_hexdigest(name.encode() + b"!"))
    assert len(files(folder)) == len(names)
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize("what", ["missing", "a file"])
def test_a_folder_that_is_not_there_is_a_config_error(tmp_path: Path, what: str) -> None:
    path = tmp_path / "cache"
    if what == "a file":
        path.write_bytes(b"")
    with pytest.raises(
        ConfigError, match=rf"loader\.cache_path: {path} is no folder; expected an existing one; make or"
    ):
        LocalCache(str(path), 1 << 30)


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    """A folder that cannot be written, not by root either."""
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(tmp_path)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount a read-only disk: {mounted.stderr.strip()}")
    yield tmp_path
    subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_read_only_folder_is_a_config_error(read_only: Path) -> None:
    with pytest.raises(
        ConfigError, match=rf"loader\.cache_path: {read_only} cannot be written \(Read-only file system\)"
    ):
        LocalCache(str(read_only), 1 << 30)


def test_opening_deletes_what_dead_writers_left_and_nothing_of_the_living(tmp_path: Path) -> None:
    LocalCache(str(tmp_path), 1 << 30)
    dead, living = tmp_path / "unfinished" / "dead", tmp_path / "unfinished" / "living"
    dead.write_bytes(bytes(KIB))
    with living.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.truncate(2 * KIB)
        store = LocalCache(str(tmp_path), 3 * KIB)
        assert os.listdir(tmp_path / "unfinished") == ["living"]
        put(store, 1, 2)
        assert kept(store, range(1, 3)) == [1], "what is being written counts"
    LocalCache(str(tmp_path), 1 << 30)
    assert os.listdir(tmp_path / "unfinished") == []


def test_a_lock_that_is_never_free_costs_one_short_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cache, "LOCK_WAIT_S", 0.2)
    put(LocalCache(str(tmp_path), 1 << 30), 1)
    with (tmp_path / "used-bytes").open() as file, caplog.at_level(logging.WARNING, "cvdist.cache"):
        fcntl.flock(file, fcntl.LOCK_EX)
        started_s = time.monotonic()
        store = LocalCache(str(tmp_path), 1 << 30)
        put(store, *range(2, 50))
        assert kept(store, range(1, 50)) == [1]
        assert time.monotonic() - started_s < 2
    assert caplog.text.count("takes no more (its lock was not free for 0.2 s); going on without") == 1


def test_a_forked_child_goes_on_with_the_cache_of_its_parent(tmp_path: Path) -> None:
    store = LocalCache(str(tmp_path), 1 << 30)
    put(store, 1)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            put(store, 2)
            code = 0 if kept(store, range(1, 3)) == [1, 2] else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert kept(store, range(1, 3)) == [1, 2]
