"""The lock: one run at a time, none for a dead owner, and a run that lost it finds out."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from cvdist import lock
from cvdist.errors import DataError
from cvdist.lock import STALE_S, Lock, Owner, started_ticks, this_process


def url(folder: Path) -> str:
    return f"file://{folder}"


def owned(folder: Path, owner: Owner, age_s: float = 0.0) -> None:
    """Leaves a lock file of another owner."""
    path = folder / "lock-0001.json"
    path.write_text(json.dumps(dataclasses.asdict(owner)))
    os.utime(path, (time.time() - age_s, time.time() - age_s))


def elsewhere() -> Owner:
    return Owner("another-node", "another boot", 17, 99, "token")


def test_a_second_run_leaves_at_once_and_names_the_first(tmp_path: Path) -> None:
    with Lock(url(tmp_path), "the set"):
        started_s = time.monotonic()
        with pytest.raises(
            DataError, match=rf"process {os.getpid()} on .* is preparing it; expected one run at a time; wait"
        ):
            Lock(url(tmp_path), "the set").__enter__()
        assert time.monotonic() - started_s < 2
    with Lock(url(tmp_path), "the set"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_the_lock_of_a_process_that_is_gone_is_taken_over_at_once(tmp_path: Path) -> None:
    program = (
        "import os, signal, sys\nfrom cvdist.lock import Lock\n"
        f"Lock({url(tmp_path)!r}, 'the set').__enter__()\nos.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", program]).returncode == -signal.SIGKILL
    with Lock(url(tmp_path), "the set") as mine:
        mine.require()
        assert {path.name for path in tmp_path.iterdir()} == {"lock-0001.json", "lock-0002.json"}


def test_a_process_id_that_was_given_to_another_process_is_no_owner(tmp_path: Path) -> None:
    me = this_process()
    owned(tmp_path, dataclasses.replace(me, started=me.started - 1, token="old"))
    with Lock(url(tmp_path), "the set") as mine:
        mine.require()


def test_an_owner_on_another_node_is_believed_until_its_lock_is_stale(tmp_path: Path) -> None:
    owned(tmp_path, elsewhere(), age_s=STALE_S - 30)
    with pytest.raises(DataError, match=r"process 17 on another-node is preparing it; .* run again in (29|30|31) s"):
        Lock(url(tmp_path), "the set").__enter__()
    owned(tmp_path, elsewhere(), age_s=STALE_S + 1)
    with Lock(url(tmp_path), "the set"):
        assert json.loads((tmp_path / "lock-0002.json").read_text())["pid"] == os.getpid()


def test_the_owner_s_sign_of_life_keeps_the_lock_fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "RENEW_S", 0.05)
    with Lock(url(tmp_path), "the set"):
        first_ns = (tmp_path / "lock-0001.json").stat().st_mtime_ns
        deadline = time.monotonic() + 10
        while (tmp_path / "lock-0001.json").stat().st_mtime_ns == first_ns:
            assert time.monotonic() < deadline
            time.sleep(0.02)


def test_a_run_that_was_taken_over_finds_out_and_leaves_the_other_alone(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="another run has taken it over"), Lock(url(tmp_path), "the set") as mine:
        (tmp_path / "lock-0002.json").write_text(json.dumps(dataclasses.asdict(elsewhere())))
        mine.require()
    assert [path.name for path in tmp_path.iterdir()] == ["lock-0002.json"]


class Crowd:
    """Threads that want the lock at once; the one that has it keeps it until all others were refused."""

    def __init__(self, folder: Path, size: int) -> None:
        self.holders, self.refused = 0, 0
        self._folder, self._size = folder, size
        self._start, self._others = threading.Barrier(size), threading.Semaphore(0)

    def attempt(self) -> None:
        self._start.wait()
        try:
            with Lock(url(self._folder), "the set") as mine:
                self.holders += 1
                for _ in range(self._size - 1):
                    self._others.acquire(timeout=20)
                mine.require()
        except DataError:
            self.refused += 1
            self._others.release()

    def run(self) -> None:
        threads = [threading.Thread(target=self.attempt) for _ in range(self._size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


@pytest.mark.parametrize("is_dead", [True, False])
def test_of_many_runs_at_once_one_wins(is_dead: bool, tmp_path: Path) -> None:
    for attempt in range(20):
        folder = tmp_path / str(attempt)
        folder.mkdir()
        if is_dead:
            owned(folder, elsewhere(), age_s=STALE_S + 1)
        crowd = Crowd(folder, 6)
        crowd.run()
        assert (crowd.holders, crowd.refused) == (1, 5)


def test_a_damaged_lock_file_is_named_with_the_fix(tmp_path: Path) -> None:
    (tmp_path / "lock-0001.json").write_text("{")
    with pytest.raises(DataError, match=r"its lock file is damaged; expected .*; delete file://"):
        Lock(url(tmp_path), "the set").__enter__()


def test_a_process_that_is_gone_has_no_start(tmp_path: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    child.wait()
    assert started_ticks(child.pid) is None
    assert started_ticks(os.getpid()) is not None
