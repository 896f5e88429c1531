"""Peaks of memory that tests/bench/prepare.py shows, each of a fresh process."""

from __future__ import annotations

import concurrent.futures
import functools
import hashlib
import multiprocessing
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cvdist import prepare, storage, tasks
from cvdist.config import PrepareConfig
from cvdist.ledger import LEDGER, ShardResult, ledger_url, write_ledger
from cvdist.shards import Shard
from tests.bench.arms import prepare_config
from tests.bench.photos import Corpus


def peak_bytes(pid: int | str = "self") -> int:
    """Returns the largest resident size that a process has had; 0 for one that has just ended."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    return 0


def in_fresh_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Returns what a function returns in a new interpreter."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *arguments).result()


def task_peak(corpus: Corpus, folder: Path) -> int:
    """Returns the peak memory of a process that writes the shards of a corpus."""
    job = in_fresh_process(prepare.start, prepare_config(corpus.folder, folder / "set", split="train=1.0"))
    peak: int = in_fresh_process(write_shards, job)
    shutil.rmtree(folder / "set")
    return peak


def write_shards(job: tasks.Job) -> int:
    """Writes all shards; returns the peak memory."""
    for index in range(len(job.shards)):
        assert tasks.write_shard(job, index).shard.num_rows
    return peak_bytes()


def driver_peak(photos: Corpus, folder: Path, num_inputs: int) -> tuple[int, float]:
    """Returns peak memory and CPU-seconds of a driver that prepares a generated table of so many photos.

    Ten links lead from the folder of photos to itself, so that a few files have as many names as one likes.
    """
    source = folder / "many"
    source.mkdir()
    for path in photos.paths[:64]:
        shutil.copyfile(path, source / path.name)
    for digit in range(10):
        (source / str(digit)).symlink_to(".")
    names = sorted(path.name for path in photos.paths[:64])
    with (source / "photos.csv").open("w") as table:
        table.write("path,label\n")
        for number in range(num_inputs):
            way = "/".join(f"{number // len(names):06d}")
            table.write(f"{way}/{names[number % len(names)]},class{number % 1000:04d}\n")
    found: tuple[int, float] = in_fresh_process(drive, prepare_config(source / "photos.csv", folder / "set"))
    shutil.rmtree(folder / "set")
    shutil.rmtree(source)
    return found


def drive(config: PrepareConfig) -> tuple[int, float]:
    """Runs the driver's part of a preparation; other processes leave ledgers as the tasks would, and a byte for each shard."""

    def run_elsewhere(description: str, function: Any, numbers: Sequence[int]) -> list[Any]:
        with concurrent.futures.ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            return list(pool.map(functools.partial(leave_ledger, function.args[0]), numbers))

    prepare.run(config, run_elsewhere)
    return peak_bytes(), time.process_time()


def leave_ledger(job: tasks.Job, index: int) -> ShardResult:
    """Writes the ledger of a shard as if every input had been stored."""
    split, number = job.shards[index]
    attempt = f"{split}-{number:05d}.parquet"
    rows = tasks.read_group(storage.join(job.url, tasks.LISTING_NAME), index).to_pylist()
    entries = [
        {**dict.fromkeys(LEDGER.names), "path": row["key"], "class": row["class"], "split": split, "size_bytes": 1}
        for row in rows
    ]
    for entry in entries:
        entry["sha256"] = hashlib.sha256(entry["path"].encode()).hexdigest()
    labels, counts = np.unique([row["label"] for row in rows], return_counts=True)
    class_rows = dict(zip(labels.tolist(), counts.tolist(), strict=True))
    shard = Shard(
        f"{split}/shard-{number:05d}.parquet", len(rows), 1, "0" * 64, (len(rows),), (1,), ("0" * 16,), "0" * 16
    )
    result = ShardResult(split, attempt, shard, class_rows, 0, len(rows), 1.0)
    storage.write_bytes(storage.join(job.url, "attempts", attempt), b"x")
    write_ledger(ledger_url(job.url, split, number), entries, result)
    return result
