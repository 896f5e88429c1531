"""prepare when disks fill up, files vanish, and the process itself is killed or frozen: nothing is lost, and the next run goes on.

This file is also the program that is killed or frozen. `python test_prepare_faults.py run SOURCE_URL TARGET_URL HOW` prepares, where HOW
is `wait` (write the shards, say "held", wait for a line on stdin, go on) or `MODULE.FUNCTION before|after COUNT` (SIGKILL itself at that
call). `python test_prepare_faults.py task JOB MODULE.FUNCTION` writes the first shard of a pickled job, and freezes before that call.
"""

from __future__ import annotations

import collections
import contextlib
import importlib
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest

from cvdist import lock, prepare, storage
from cvdist.config import PrepareConfig
from cvdist.errors import DataError, StorageError
from cvdist.shards import Manifest, read_manifest
from tests.made_data import class_tree

BIN = Path(sys.executable).parent
ROOT = Path(__file__).resolve().parents[2]
CLASSES = {"ant": 60, "bee": 60}
SETTINGS = {"image_size": 32, "codec": "raw", "shard_bytes": 65536, "row_group_bytes": 16384, "max_bad_fraction": 0.1}
DATA, STORAGE = 81, 82
# So that a test need not wait for minutes until a lock is stale.
RENEW_S, STALE_S = 0.3, 3.0


def config(source_url: str, target_url: str, **settings: Any) -> PrepareConfig:
    return PrepareConfig(source_url=source_url, target_url=target_url, **{**SETTINGS, **settings})


def held(function: Callable[[int], Any], numbers: Sequence[int]) -> list[Any]:
    """Runs tasks, then waits for a line on stdin."""
    results = [function(number) for number in numbers]
    print("held", flush=True)
    sys.stdin.readline()
    return results


def struck_at(place: str, when: str, count: int, number: signal.Signals) -> None:
    """Has this process killed or frozen before or after the `count`-th call of a function."""
    module_name, _, name = place.rpartition(".")
    module = importlib.import_module(module_name)
    function, calls = getattr(module, name), 0

    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        is_it = calls == count
        if is_it and when == "before":
            os.kill(os.getpid(), number)
        result = function(*args, **kwargs)
        if is_it and when == "after":
            os.kill(os.getpid(), number)
        return result

    setattr(module, name, call)


def victim(kind: str, *arguments: str) -> None:
    """What this file does as a program."""
    if kind == "task":
        job_path, place = arguments
        struck_at(place, "before", 1, signal.SIGSTOP)
        prepare.write_shard(pickle.loads(Path(job_path).read_bytes()), 0)
        return
    lock.RENEW_S, lock.STALE_S = RENEW_S, STALE_S
    source_url, target_url, how, *more = arguments
    if how == "wait":
        prepare.run(config(source_url, target_url), lambda description, function, numbers: held(function, numbers))
    else:
        struck_at(how, more[0], int(more[1]), signal.SIGKILL)
        prepare.run(config(source_url, target_url))


def start_victim(*arguments: str) -> subprocess.Popen[str]:
    """Starts this file as a program."""
    return subprocess.Popen(
        [sys.executable, __file__, *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@contextlib.contextmanager
def holding(source_url: str, target_url: str) -> Iterator[subprocess.Popen[str]]:
    """A run that has written all shards and stands before the manifest."""
    with start_victim("run", source_url, target_url, "wait") as process:
        try:
            line = process.stdout.readline()
            assert line == "held\n", process.stderr.read()
            yield process
        finally:
            process.kill()


def job(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Runs jobs/prepare.py as Spark's driver does, without a JVM: a run that is refused never starts Spark."""
    settings = [f"--{name}={value}" for name, value in SETTINGS.items()]
    command = [sys.executable, "jobs/prepare.py", *map(str, arguments), *settings]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


@pytest.fixture(autouse=True)
def _scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keeps what killed processes leave in the folder for temporary files among the test's own."""
    (tmp_path / "scratch").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "scratch"))


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photos that no test changes, two bad ones among them."""
    folder = class_tree(tmp_path_factory.mktemp("photos"), CLASSES)
    (folder / "ant" / "notes.jpg").write_text("this is no photo")
    (folder / "bee" / "empty.jpg").touch()
    return folder


@pytest.fixture
def source(photos: Path, tmp_path: Path) -> Path:
    """Photos that a test may delete or change."""
    shutil.copytree(photos, tmp_path / "source")
    return tmp_path / "source"


def content(url: str) -> dict[str, bytes]:
    """Returns every file below a folder, hidden ones too."""
    return {storage.relative(entry.url, url): storage.read_bytes(entry.url) for entry in storage.walk_files(url)}


@pytest.fixture(scope="module")
def undisturbed(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What an undisturbed run makes of the photos."""
    url = f"file://{tmp_path_factory.mktemp('undisturbed')}/set"
    prepare.run(config(f"file://{photos}", url))
    found = content(url)
    assert {"manifest.json", "README.md", "quarantine.parquet"} <= set(found)
    return found


def finish(source_url: str, target_url: str) -> list[int]:
    """Runs prepare to its end; returns the shards that were still to be written."""
    pending: list[int] = []

    def run_tasks(description: str, function: Callable[[int], Any], numbers: Sequence[int]) -> list[Any]:
        pending.extend(numbers)
        return prepare.run_here(description, function, numbers)

    prepare.run(config(source_url, target_url), run_tasks)
    return pending


def num_shards(found: dict[str, bytes]) -> int:
    return len([path for path in found if "/shard-" in path])


class TestFullDisk:
    @pytest.fixture
    def small_disk(self, tmp_path: Path) -> Iterator[Path]:
        path = tmp_path / "small disk"
        path.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(path)]
        mounted = subprocess.run(command, capture_output=True, text=True)
        if mounted.returncode:
            pytest.skip(f"cannot mount a small disk: {mounted.stderr.strip()}")
        yield path
        subprocess.run(["umount", str(path)], check=True)

    def test_it_is_named_and_the_same_call_ends_well_when_there_is_room(
        self, photos: Path, small_disk: Path, undisturbed: dict[str, bytes]
    ) -> None:
        assert 500_000 < sum(map(len, undisturbed.values())) < 900_000
        (small_disk / "ballast").write_bytes(bytes(1_700_000))
        target_url = f"file://{small_disk}/set"
        with pytest.raises(StorageError, match=r"the disk is full \(\d+ bytes free there\); expected room"):
            finish(f"file://{photos}", target_url)
        found = content(target_url)
        assert "manifest.json" not in found
        num_done = sum("/done/" in path for path in found)
        assert 0 < num_done < num_shards(undisturbed), "it broke in the middle"
        (small_disk / "ballast").unlink()
        pending = finish(f"file://{photos}", target_url)
        assert 0 < len(pending) < num_shards(undisturbed), "finished shards are not written again"
        assert content(target_url) == undisturbed

    @pytest.mark.timeout(180)
    def test_the_job_ends_with_one_line_and_its_code(
        self, photos: Path, small_disk: Path, undisturbed: dict[str, bytes]
    ) -> None:
        pytest.importorskip("pyspark")
        (small_disk / "ballast").write_bytes(bytes(1_700_000))
        target_url = f"file://{small_disk}/set"
        settings = [f"--{name}={value}" for name, value in SETTINGS.items()]
        command = [
            str(BIN / "spark-submit"),
            "--master",
            "local[2,2]",
            "jobs/prepare.py",
            f"file://{photos}",
            target_url,
        ]
        environment = {**os.environ, "PYSPARK_PYTHON": sys.executable, "SPARK_LOCAL_IP": "127.0.0.1"}
        run = lambda: subprocess.run([*command, *settings], cwd=ROOT, env=environment, capture_output=True, text=True)  # noqa: E731
        done = run()
        lines = [line for line in (done.stderr + done.stdout).splitlines() if line.startswith("cvdist:")]
        assert done.returncode == STORAGE, done.stderr
        assert len(lines) == 1
        assert "the disk is full (" in lines[0]
        assert f"file://{small_disk}/set/" in lines[0]
        (small_disk / "ballast").unlink()
        done = run()
        assert done.returncode == 0, done.stderr
        assert content(target_url) == undisturbed


class TestChangingSource:
    """Files that are not as they were listed when a task comes to read them."""

    def disturbed(self, source: Path, target_url: str, disturb: Callable[[], None], **settings: Any) -> Manifest:
        """Prepares; the source changes between the listing and the last stage of tasks."""

        def run_tasks(description: str, function: Callable[[int], Any], numbers: Sequence[int]) -> list[Any]:
            if description.startswith("write"):
                disturb()
            return prepare.run_here(description, function, numbers)

        manifest = prepare.run(config(f"file://{source}", target_url, **settings), run_tasks)
        assert manifest == read_manifest(target_url)
        return manifest

    def conserved(self, manifest: Manifest, target_url: str, inputs: set[str]) -> dict[str, str]:
        """Asserts that every input is a row or in quarantine, once; returns the reasons of quarantined ones."""
        quarantine = pq.read_table(storage.parse(storage.join(target_url, "quarantine.parquet")).path).to_pylist()
        keys = collections.Counter(row["path"] for row in quarantine)
        for split in manifest.splits.values():
            for shard in split.shards:
                keys.update(pq.read_table(storage.parse(storage.join(target_url, shard.path)).path)["key"].to_pylist())
        assert keys == dict.fromkeys(inputs, 1)
        assert manifest.num_rows + manifest.num_quarantined + manifest.num_skipped == manifest.num_inputs == len(inputs)
        return {row["path"]: row["reason"] for row in quarantine}

    @pytest.mark.parametrize("split_by", ["ratio", "content"])
    def test_files_that_vanish_shrink_or_grow_are_quarantined(
        self, source: Path, tmp_path: Path, split_by: str
    ) -> None:
        inputs = {str(path.relative_to(source)) for path in source.rglob("*.jpg")}

        def disturb() -> None:
            (source / "ant" / "003.jpg").unlink()
            whole = (source / "ant" / "004.jpg").read_bytes()
            (source / "ant" / "004.jpg").write_bytes(whole[:-100])
            (source / "bee" / "005.jpg").write_bytes((source / "bee" / "005.jpg").read_bytes() + b"more")
            (source / "bee" / "006.jpg").unlink()
            (source / "bee" / "006.jpg").symlink_to(source / "nowhere")

        target_url = f"file://{tmp_path}/set"
        manifest = self.disturbed(source, target_url, disturb, split_by=split_by)
        assert self.conserved(manifest, target_url, inputs) == {
            "ant/notes.jpg": "not_an_image",
            "bee/empty.jpg": "empty",
            "ant/003.jpg": "not_found",
            "ant/004.jpg": "changed",
            "bee/005.jpg": "changed",
            "bee/006.jpg": "not_found",
        }

    def test_another_file_of_the_same_size_is_noticed_where_the_content_is_known(
        self, source: Path, tmp_path: Path
    ) -> None:
        inputs = {str(path.relative_to(source)) for path in source.rglob("*.jpg")}

        def disturb() -> None:
            path = source / "ant" / "003.jpg"
            path.write_bytes(path.read_bytes()[:-3] + b"\0\xff\xd9")

        target_url = f"file://{tmp_path}/set"
        manifest = self.disturbed(source, target_url, disturb, split_by="content")
        assert self.conserved(manifest, target_url, inputs)["ant/003.jpg"] == "changed"

    def test_a_folder_that_vanishes_ends_the_run_without_a_manifest(self, source: Path, tmp_path: Path) -> None:
        target_url = f"file://{tmp_path}/set"
        with pytest.raises(DataError, match="not_found"):
            self.disturbed(source, target_url, lambda: shutil.rmtree(source / "ant"))
        assert not storage.exists(storage.join(target_url, "manifest.json"))

    def test_inputs_that_changed_since_a_killed_run_are_taken_as_they_are_now(
        self, source: Path, tmp_path: Path
    ) -> None:
        target_url, source_url = f"file://{tmp_path}/set", f"file://{source}"
        with start_victim("run", source_url, target_url, "cvdist.finish.write_manifest", "before", "1") as process:
            process.communicate(timeout=60)
        assert process.returncode == -signal.SIGKILL
        shutil.copy(source / "ant" / "001.jpg", source / "bee" / "another.jpg")
        (source / "ant" / "002.jpg").unlink()
        prepare.run(config(source_url, target_url))
        fresh_url = f"file://{tmp_path}/fresh"
        prepare.run(config(source_url, fresh_url))
        assert content(target_url) == content(fresh_url)


class TestKilled:
    @pytest.mark.parametrize(
        "place, when, count",
        [
            ("cvdist.tasks.require_same", "before", 3),
            ("cvdist.tasks.require_same", "after", 3),
            ("cvdist.tasks.write_ledger", "after", 3),
            ("cvdist.finish.place_shards", "after", 1),
            ("cvdist.finish.write_manifest", "before", 1),
            ("cvdist.finish.write_manifest", "after", 1),
        ],
    )
    def test_at_any_point_the_next_run_goes_on_and_ends_with_the_same_bytes(
        self, photos: Path, storage_url: str, undisturbed: dict[str, bytes], place: str, when: str, count: int
    ) -> None:
        source_url, target_url = f"file://{photos}", storage.join(storage_url, "set")
        with start_victim("run", source_url, target_url, place, when, str(count)) as process:
            _, errors = process.communicate(timeout=60)
        assert process.returncode == -signal.SIGKILL, errors
        is_whole = (place, when) == ("cvdist.finish.write_manifest", "after")
        assert storage.exists(storage.join(target_url, "manifest.json")) == is_whole
        total = num_shards(undisturbed)
        num_done = total if "finish" in place else count - (place == "cvdist.tasks.require_same")
        assert len(finish(source_url, target_url)) == total - num_done
        assert content(target_url) == undisturbed
        names = {storage.name(entry.url) for entry in storage.list_dir(target_url)}
        assert names == {path.split("/")[0] for path in undisturbed}
        assert finish(source_url, target_url) == []


class TestTwoRuns:
    @pytest.mark.timeout(120)
    def test_the_second_leaves_at_once_and_names_the_first(
        self, photos: Path, storage_url: str, undisturbed: dict[str, bytes]
    ) -> None:
        source_url, target_url = f"file://{photos}", storage.join(storage_url, "set")
        with holding(source_url, target_url) as first:
            started_s = time.monotonic()
            second = job(source_url, target_url)
            assert time.monotonic() - started_s < 10
            assert second.returncode == DATA
            (line,) = second.stderr.splitlines()
            assert f"process {first.pid} on {socket.gethostname()} is preparing it" in line
            assert "expected one run at a time" in line
            _, errors = first.communicate("go on\n", timeout=60)
            assert first.returncode == 0, errors
        assert content(target_url) == undisturbed

    def test_a_dead_one_is_taken_over_from_at_once(
        self, photos: Path, storage_url: str, undisturbed: dict[str, bytes]
    ) -> None:
        source_url, target_url = f"file://{photos}", storage.join(storage_url, "set")
        with holding(source_url, target_url) as first:
            first.kill()
            first.wait()
            started_s = time.monotonic()
            assert finish(source_url, target_url) == [], "the last shard was written before the kill"
            assert time.monotonic() - started_s < 20
        assert content(target_url) == undisturbed

    @pytest.mark.timeout(120)
    def test_a_frozen_one_is_taken_over_from_only_when_its_lock_is_stale(
        self, photos: Path, storage_url: str, undisturbed: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(lock, "STALE_S", STALE_S)
        source_url, target_url = f"file://{photos}", storage.join(storage_url, "set")
        with holding(source_url, target_url) as first:
            time.sleep(STALE_S + 1)
            with pytest.raises(DataError, match=f"process {first.pid} on .* is preparing it"):
                finish(source_url, target_url)  # it lives, and renews its lock
            first.send_signal(signal.SIGSTOP)
            frozen_s = time.monotonic()
            with pytest.raises(DataError, match=r"if it is dead, run again in \d s"):
                finish(source_url, target_url)
            pending = None
            while pending is None:
                with contextlib.suppress(DataError):
                    pending = finish(source_url, target_url)
                assert time.monotonic() - frozen_s < 30
            assert time.monotonic() - frozen_s > STALE_S - 2 * RENEW_S - 1
            assert pending == []
            assert content(target_url) == undisturbed
            first.send_signal(signal.SIGCONT)
            _, errors = first.communicate("go on\n", timeout=60)
            assert first.returncode != 0
            assert "another run has taken it over" in errors
        assert content(target_url) == undisturbed
        names = {storage.name(entry.url) for entry in storage.list_dir(target_url)}
        assert names == {path.split("/")[0] for path in undisturbed}

    def test_a_frozen_one_that_wakes_spoils_nothing_while_the_next_is_at_work(
        self, photos: Path, tmp_path: Path, undisturbed: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(lock, "STALE_S", STALE_S)
        source_url, target_url = f"file://{photos}", f"file://{tmp_path}/set"
        with holding(source_url, target_url) as first:
            first.send_signal(signal.SIGSTOP)
            time.sleep(STALE_S + 1.5)

            def wake_first(description: str, function: Callable[[int], Any], numbers: Sequence[int]) -> list[Any]:
                first.send_signal(signal.SIGCONT)
                _, errors = first.communicate("go on\n", timeout=60)
                assert "another run has taken it over" in errors
                return prepare.run_here(description, function, numbers)

            prepare.run(config(source_url, target_url), wake_first)
        assert content(target_url) == undisturbed


class TestTaskThatOutlivesItsRun:
    """A task that froze, with its executor, and goes on when everybody else is done."""

    PLACES = (
        "cvdist.tasks.write_attempt",
        "cvdist.storage.create",
        "cvdist.tasks.require_same",
        "cvdist.tasks.write_ledger",
    )

    @contextlib.contextmanager
    def frozen(self, function: Any, folder: Path, place: str) -> Iterator[subprocess.Popen[str]]:
        """Starts a task of a run in a process of its own; it stands still at a place."""
        (job,) = function.args
        (folder / "job.pickle").write_bytes(pickle.dumps(job))
        with start_victim("task", str(folder / "job.pickle"), place) as process:
            try:
                while (state := psutil.Process(process.pid).status()) != psutil.STATUS_STOPPED:
                    assert state != psutil.STATUS_ZOMBIE, process.stderr.read()
                    time.sleep(0.02)
                yield process
            finally:
                process.kill()

    def wake(self, process: subprocess.Popen[str]) -> None:
        """Lets the task go on to its end; whether it succeeds is nobody's business any more."""
        process.send_signal(signal.SIGCONT)
        process.communicate(timeout=60)

    @pytest.mark.parametrize("place", PLACES)
    def test_it_leaves_the_data_set_as_it_is_and_nothing_beside_it(
        self, photos: Path, storage_url: str, tmp_path: Path, undisturbed: dict[str, bytes], place: str
    ) -> None:
        source_url, target_url = f"file://{photos}", storage.join(storage_url, "set")
        with contextlib.ExitStack() as stack:
            late: list[subprocess.Popen[str]] = []

            def run_tasks(description: str, function: Callable[[int], Any], numbers: Sequence[int]) -> list[Any]:
                late.append(stack.enter_context(self.frozen(function, tmp_path, place)))
                return prepare.run_here(description, function, numbers)

            prepare.run(config(source_url, target_url), run_tasks)
            assert content(target_url) == undisturbed
            self.wake(late[0])
        assert content(target_url) == undisturbed
        names = {storage.name(entry.url) for entry in storage.list_dir(target_url)}
        assert names == {path.split("/")[0] for path in undisturbed}

    @pytest.mark.parametrize("wakes", ["before", "after"])
    @pytest.mark.parametrize("place", PLACES)
    def test_it_does_not_pass_off_its_shard_as_one_of_a_run_on_other_inputs(
        self, source: Path, tmp_path: Path, place: str, wakes: str
    ) -> None:
        source_url, target_url = f"file://{source}", f"file://{tmp_path}/set"
        with contextlib.ExitStack() as stack:
            late: list[subprocess.Popen[str]] = []

            def freeze(description: str, function: Callable[[int], Any], numbers: Sequence[int]) -> list[Any]:
                late.append(stack.enter_context(self.frozen(function, tmp_path, place)))
                raise StorageError("the first run breaks off here")

            def wake(description: str, function: Callable[[int], Any], numbers: Sequence[int]) -> list[Any]:
                if wakes == "before":
                    self.wake(late[0])
                results = prepare.run_here(description, function, numbers)
                if wakes == "after":
                    self.wake(late[0])
                return results

            with pytest.raises(StorageError, match="breaks off"):
                prepare.run(config(source_url, target_url), freeze)
            class_tree(source, {"bee": 90}, seed=1)  # other photos under the old names, and more of them
            prepare.run(config(source_url, target_url), wake)
        fresh_url = f"file://{tmp_path}/fresh"
        prepare.run(config(source_url, fresh_url))
        assert content(target_url) == content(fresh_url)


if __name__ == "__main__":
    victim(*sys.argv[1:])
