"""Verified fetching: right bytes or a refusal, one more try, few open files, and the local cache in between."""

from __future__ import annotations

import dataclasses
import logging
import os
import random
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import xxhash

from cvdist import fetch, storage
from cvdist.cache import LocalCache
from cvdist.errors import DataError, StorageError
from cvdist.fetch import Counters, Fetcher
from cvdist.shards import MAGIC, Shard, footer_offset, row_group_offsets

NUM_GROUPS = 4


@dataclasses.dataclass(frozen=True)
class Made:
    """A shard of random bytes: what the manifest says of it and what its parts hold."""

    shard: Shard
    groups: list[bytes]
    footer: bytes
    content: bytes


def made(path: str, seed: int = 0, group_bytes: int = 1000) -> Made:
    """Makes a shard. Fetching does not look into its parts, so these need not be Parquet."""
    rng = random.Random(f"{path} {seed}")
    groups = [rng.randbytes(group_bytes + index) for index in range(NUM_GROUPS)]
    footer = rng.randbytes(100)
    content = MAGIC + b"".join(groups) + footer
    shard = Shard(
        path=path,
        num_rows=NUM_GROUPS,
        num_bytes=len(content),
        sha256=f"{rng.getrandbits(256):064x}",
        row_group_rows=(1,) * NUM_GROUPS,
        row_group_bytes=tuple(map(len, groups)),
        row_group_xxh3=tuple(map(xxhash.xxh3_64_hexdigest, groups)),
        footer_xxh3=xxhash.xxh3_64_hexdigest(footer),
    )
    return Made(shard, groups, footer, content)


def flipped(content: bytes, place: int) -> bytes:
    """Returns content with one bit flipped."""
    changed = bytearray(content)
    changed[place] ^= 16
    return bytes(changed)


@pytest.fixture
def one(tmp_path: Path) -> Made:
    """One shard below tmp_path."""
    data = made("train/a.parquet")
    (tmp_path / "train").mkdir()
    (tmp_path / "train/a.parquet").write_bytes(data.content)
    return data


@pytest.fixture
def store(tmp_path: Path) -> LocalCache:
    (tmp_path / "cache").mkdir()
    return LocalCache(str(tmp_path / "cache"), 1 << 30)


def all_parts(fetcher: Fetcher, data: Made) -> None:
    """Fetches a whole shard and compares it."""
    for index, group in enumerate(data.groups):
        assert fetcher.row_group(data.shard, index) == (group, True)
    assert fetcher.footer(data.shard) == data.footer


def test_every_part_is_what_was_written(storage_url: str) -> None:
    shards = [made(f"train/{name}.parquet") for name in "abc"]
    for data in shards:
        storage.write_bytes(storage.join(storage_url, data.shard.path), data.content)
    fetcher = Fetcher(storage_url)
    for data in shards:
        all_parts(fetcher, data)
    num_bytes = sum(len(data.content) for data in shards)
    assert fetcher.counters == Counters(bytes_read=num_bytes)
    for data in shards:
        fetcher.footer(data.shard)
    assert fetcher.counters == Counters(bytes_read=num_bytes), "footers stay in memory"


def test_row_groups_larger_than_one_call_reads_are_whole(storage_url: str) -> None:
    data = made("a.parquet", group_bytes=storage.Limits.chunk_bytes + 5)
    storage.write_bytes(storage.join(storage_url, "a.parquet"), data.content)
    all_parts(Fetcher(storage_url), data)


def test_a_damaged_row_group_is_read_twice_warned_about_and_reported(
    one: Made, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    content = flipped(one.content, row_group_offsets(one.shard)[2] + 500)
    (tmp_path / one.shard.path).write_bytes(content)
    fetcher = Fetcher(f"file://{tmp_path}")
    with caplog.at_level(logging.WARNING, "cvdist.fetch"):
        assert fetcher.row_group(one.shard, 2) == (flipped(one.groups[2], 500), False)
    url = f"file://{tmp_path}/{one.shard.path}"
    assert caplog.messages == [f"{url}, row group 2: not what was written; it is read once more"]
    assert fetcher.counters == Counters(bytes_read=2 * len(one.groups[2]), retries=1)
    assert fetcher.row_group(one.shard, 1) == (one.groups[1], True)


@pytest.mark.parametrize("place", [*range(4), -1, -50, -100])
def test_a_damaged_footer_or_magic_is_refused(one: Made, tmp_path: Path, place: int) -> None:
    content = flipped(one.content, place % len(one.content))
    (tmp_path / one.shard.path).write_bytes(content)
    fetcher = Fetcher(f"file://{tmp_path}")
    message = rf"begins with {content[:4]!r}; expected {MAGIC!r}" if 0 <= place < 4 else "the footer differs from its"
    with pytest.raises(
        DataError, match=f"file://{tmp_path}/{one.shard.path}:? {message}.*; restore the shard or prepare"
    ):
        all_parts(fetcher, one)
    assert fetcher.counters.retries == 1
    if place < 0:
        for _ in range(2):
            with pytest.raises(DataError, match="the footer differs from its checksum"):
                fetcher.check_footer(one.shard)


class Repair(logging.Handler):
    """Does something when the first warning comes: between the two reads."""

    def __init__(self, act: Callable[[], object]) -> None:
        super().__init__()
        self._act = act

    def emit(self, record: logging.LogRecord) -> None:
        self._act()


@pytest.fixture
def repaired(one: Made, tmp_path: Path) -> Iterator[None]:
    """The shard is damaged and is replaced by a whole one as soon as that is noticed."""
    target, whole = tmp_path / one.shard.path, tmp_path / "whole"
    whole.write_bytes(one.content)
    content = bytearray(one.content)
    for place in (0, footer_offset(one.shard), *row_group_offsets(one.shard)):
        content[place] ^= 1
    target.write_bytes(content)
    handler = Repair(lambda: os.replace(shutil.copy(whole, tmp_path / "copy"), target))
    logging.getLogger("cvdist.fetch").addHandler(handler)
    yield
    logging.getLogger("cvdist.fetch").removeHandler(handler)


@pytest.mark.parametrize("index", [0, 2])
def test_damage_that_is_gone_when_the_file_is_opened_anew_is_only_counted(
    one: Made, repaired: None, tmp_path: Path, index: int
) -> None:
    fetcher = Fetcher(f"file://{tmp_path}")
    assert fetcher.row_group(one.shard, index) == (one.groups[index], True)
    all_parts(fetcher, one)
    assert fetcher.counters.retries == 1


def test_a_footer_that_is_right_when_the_file_is_opened_anew_is_only_counted(
    one: Made, repaired: None, tmp_path: Path
) -> None:
    fetcher = Fetcher(f"file://{tmp_path}")
    assert fetcher.footer(one.shard) == one.footer
    assert fetcher.counters.retries == 1


def test_a_shard_that_is_missing_or_of_another_size_is_refused(one: Made, tmp_path: Path) -> None:
    path = tmp_path / one.shard.path
    for content in (one.content[:-1], one.content + b"x", b""):
        path.write_bytes(content)
        for what in (lambda f: f.footer(one.shard), lambda f: f.row_group(one.shard, 1)):
            with pytest.raises(
                DataError, match=rf"{path} holds {len(content)} bytes; expected {len(one.content)}; restore"
            ):
                what(Fetcher(f"file://{tmp_path}"))
    path.unlink()
    with pytest.raises(
        DataError, match=f"{path} does not exist; expected the shard that the manifest names; restore it"
    ):
        Fetcher(f"file://{tmp_path}").row_group(one.shard, 1)


def test_a_shard_that_is_cut_while_it_is_open_is_named(one: Made, tmp_path: Path) -> None:
    fetcher = Fetcher(f"file://{tmp_path}")
    fetcher.row_group(one.shard, 0)
    os.truncate(tmp_path / one.shard.path, 2000)
    with pytest.raises(StorageError, match=f"{one.shard.path}: .* the file was cut while it was read"):
        fetcher.row_group(one.shard, 3)


def open_files(folder: Path) -> int:
    """Counts the files of this process below a folder."""
    links = []
    for descriptor in os.listdir("/proc/self/fd"):
        try:
            links.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        except OSError:  # the one of the listing itself
            continue
    return sum(link.startswith(f"{folder}/") for link in links)


def test_many_shards_are_read_by_many_threads_through_few_open_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "MAX_OPEN_FILES", 5)
    shards = [made(f"{number}.parquet") for number in range(40)]
    for data in shards:
        (tmp_path / data.shard.path).write_bytes(data.content)
    fetcher, most, lock = Fetcher(f"file://{tmp_path}"), 0, threading.Lock()

    def read(turn: int) -> None:
        nonlocal most
        data = shards[random.Random(turn).randrange(len(shards))]
        index = turn % NUM_GROUPS
        assert fetcher.row_group(data.shard, index) == (data.groups[index], True)
        with lock:
            most = max(most, open_files(tmp_path))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(read, range(2000)))
    assert 5 <= most <= 5 + 8
    assert fetcher.counters.retries == 0


def test_footers_in_memory_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "MAX_FOOTER_BYTES", 1000)
    shards = [made(f"{number}.parquet") for number in range(20)]
    for data in shards:
        (tmp_path / data.shard.path).write_bytes(data.content)
    fetcher = Fetcher(f"file://{tmp_path}")
    for data in [*shards, *shards[::-1]]:
        assert fetcher.footer(data.shard) == data.footer
    assert fetcher.counters.bytes_read == (20 + 10) * 100, "ten were still there"
    for data in shards:
        fetcher.check_footer(data.shard)
    before = fetcher.counters.bytes_read
    for data in shards:
        fetcher.check_footer(data.shard)
    assert fetcher.counters.bytes_read == before, "each is compared once"


def test_a_warm_cache_needs_no_data_set(one: Made, tmp_path: Path, store: LocalCache) -> None:
    cold = Fetcher(f"file://{tmp_path}", store)
    all_parts(cold, one)
    parts = NUM_GROUPS + 1
    assert cold.counters == Counters(bytes_read=len(one.content), cache_misses=parts)
    shutil.rmtree(tmp_path / "train")
    warm = Fetcher(f"file://{tmp_path}", store)
    all_parts(warm, one)
    assert warm.counters == Counters(cache_hits=parts, cache_bytes=len(one.content) - len(MAGIC))


def test_damage_in_the_cache_is_fetched_anew_and_damage_of_the_shard_is_never_cached(
    one: Made, tmp_path: Path, store: LocalCache
) -> None:
    all_parts(Fetcher(f"file://{tmp_path}", store), one)
    cached = [path for path in (tmp_path / "cache/parts").rglob("*") if path.is_file()]
    for path in cached:
        path.write_bytes(flipped(path.read_bytes(), 50))
    again = Fetcher(f"file://{tmp_path}", store)
    all_parts(again, one)
    assert (again.counters.cache_hits, again.counters.cache_misses) == (0, NUM_GROUPS + 1)
    (tmp_path / one.shard.path).write_bytes(flipped(one.content, row_group_offsets(one.shard)[1]))
    for path in cached:
        path.unlink()
    for _ in range(2):
        assert Fetcher(f"file://{tmp_path}", store).row_group(one.shard, 1)[1] is False
    assert not any(path.is_file() for path in (tmp_path / "cache/parts").rglob("*"))


def test_data_sets_with_shards_of_one_name_share_a_cache_without_mixing(tmp_path: Path, store: LocalCache) -> None:
    sets = [made("a.parquet", seed) for seed in range(3)]
    for seed, data in enumerate(sets):
        (tmp_path / str(seed)).mkdir()
        (tmp_path / str(seed) / "a.parquet").write_bytes(data.content)
    for _ in range(2):
        for seed, data in enumerate(sets):
            all_parts(Fetcher(f"file://{tmp_path}/{seed}", store), data)


def test_a_forked_child_goes_on_with_the_fetcher_of_its_parent(storage_url: str) -> None:
    data = made("a.parquet")
    storage.write_bytes(storage.join(storage_url, "a.parquet"), data.content)
    fetcher = Fetcher(storage_url)
    all_parts(fetcher, data)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            all_parts(fetcher, data)
            code = 0
        finally:
            os._exit(code)
    all_parts(fetcher, data)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
