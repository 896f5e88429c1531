"""Writes a loader's container, or measures one loader: a warm-up epoch, whose first batch is checked, then epochs that count.

    python -m peers.run '{"module": ..., "action": "write" | "measure", ...}'

Prints one line of JSON. CPU-seconds are those of this process and all below it, from the end of the warm-up epoch, when nothing is in
flight, to the end of the last one.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from peers.check import check_batch
from peers.common import BATCH, SIZE, THREADS, Work, read_about

MAX_EPOCHS = 8  # Petastorm loses whole epochs now and then
PR_SET_CHILD_SUBREAPER = 36  # Source: <linux/prctl.h>
TICK_S = 1 / os.sysconf("SC_CLK_TCK")


def tree_cpu_s() -> float:
    """Returns CPU-seconds, user and system, of this process, of those below it, and of those below it that have ended."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    total_s = time.process_time() + ended.ru_utime + ended.ru_stime
    parents, spent = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        # fields from the third on: state, ppid, ...; 14 to 17 are utime, stime, cutime, cstime
        parents[int(folder.name)], spent[int(folder.name)] = int(fields[1]), sum(map(int, fields[11:15])) * TICK_S
    for pid in parents:
        above = pid
        while above in parents and above != os.getpid():
            above = parents[above]
        if above == os.getpid() and pid != above:
            total_s += spent[pid]
    return total_s


def measure(module: Any, work: Work, min_images: int) -> dict[str, Any]:
    """Measures epochs until enough images have come; more than one only where samples are lost."""
    open_epochs = module.open_epochs(work)
    num_expected = read_about(work.corpus)["num_images"]
    found: dict[str, Any] = {}
    num_epochs = 0
    while not found and num_epochs < MAX_EPOCHS:
        num_epochs += 1
        for images, indices in open_epochs():
            found = found or check_batch(module, work, np.asarray(images), indices)
    num_images = num_lost = num_epochs = 0
    started_s, wall_s = tree_cpu_s(), time.perf_counter()
    while num_images < min_images and num_epochs < MAX_EPOCHS:
        num_epochs, before = num_epochs + 1, num_images
        for images, _ in open_epochs():
            if images.shape[1:] != (SIZE, SIZE, 3):
                raise ValueError(f"a batch of shape {tuple(images.shape)}; expected (N, {SIZE}, {SIZE}, 3)")
            num_images += len(images)
        num_lost += num_expected - (num_images - before)
    if (num_lost and not getattr(module, "MAY_LOSE_SAMPLES", False)) or num_images < min_images:
        raise ValueError(f"{num_images} images in {num_epochs} epochs; expected {num_expected} in each")
    found["cpu_s"], found["wall_s"] = tree_cpu_s() - started_s, time.perf_counter() - wall_s
    return {**found, "num_images": num_images, "num_lost": num_lost}


def main() -> None:
    task = json.loads(sys.argv[1])
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:THREADS])
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    module = importlib.import_module(f"peers.{task['module']}")
    work = Work(Path(task["corpus"]), Path(task["container"]), task["kernel"], task["options"])
    if task["action"] == "write":
        module.write(work)
        return
    found = measure(module, work, task["min_images"])
    print(json.dumps({**found, "batch": BATCH}), flush=True)
    os._exit(0)  # what a loader does when it ends is not measured, and must not fail the row


if __name__ == "__main__":
    main()
