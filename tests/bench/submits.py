"""What tests/bench/prepare.py measures under spark-submit: cvdist and Petastorm, on local[1]."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from resource import RUSAGE_CHILDREN, getrusage

import psutil

from tests.bench.arms import QUALITY, SIZE
from tests.bench.peaks import peak_bytes
from tests.bench.photos import Corpus

ROOT = Path(__file__).resolve().parents[2]
SPARK_LIMIT_S, ORPHANS_LIMIT_S = 1800.0, 60.0


class TaskWatch:
    """Looks at the Python processes that run Spark's tasks below this one, while in a `with` block.

    Spark's daemon, their parent, ignores their end, so that the kernel adds their CPU time to nobody's.

    Attributes:
        cpu_s: CPU-seconds of each process, by its id, as last seen: when it had nothing more to do.
        peak_bytes: The largest resident size of any.
    """

    def __enter__(self) -> TaskWatch:
        self.cpu_s: dict[int, float] = {}
        self.peak_bytes = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(0.1):
            for process in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.Error, OSError):
                    parent = process.parent()
                    if "pyspark.daemon" in process.cmdline() and parent and "pyspark.daemon" in parent.cmdline():
                        times = process.cpu_times()
                        self.cpu_s[process.pid] = times.user + times.system
                        self.peak_bytes = max(self.peak_bytes, peak_bytes(process.pid))


def spark_submit(log_path: Path, *words: str) -> tuple[float, int]:
    """Runs a job on local[1]; returns CPU-seconds of JVM, driver and Python of the tasks, and the peak memory of the latter.

    What ends without being waited for becomes this process's to wait for, so that the kernel's sum leaves out nothing but the tasks'.
    """
    environment = {**os.environ, "PYSPARK_PYTHON": sys.executable, "PYTHONPATH": str(ROOT)}
    command = [str(Path(sys.executable).parent / "spark-submit"), "--master", "local[1]", *words]
    others = {process.pid for process in psutil.Process().children()}
    before = getrusage(RUSAGE_CHILDREN)
    with TaskWatch() as watch, log_path.open("wb") as log:
        done = subprocess.run(
            command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, cwd=ROOT, env=environment, timeout=SPARK_LIMIT_S
        )
        orphans = wait_for_orphans(others)
    after = getrusage(RUSAGE_CHILDREN)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}: {log_path.read_text()[-2000:]}")
    tasks_s = sum(cpu_s for pid, cpu_s in watch.cpu_s.items() if pid not in orphans)
    return tasks_s + after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime, watch.peak_bytes


def wait_for_orphans(others: set[int]) -> set[int]:
    """Waits for all children but the `others`; returns which have ended."""
    ended: set[int] = set()
    end_s = time.monotonic() + ORPHANS_LIMIT_S
    while left := {process.pid for process in psutil.Process().children()} - others:
        for pid in left:
            if os.waitpid(pid, os.WNOHANG)[0]:
                ended.add(pid)
        if time.monotonic() > end_s:
            raise RuntimeError(f"processes {sorted(left)} outlive spark-submit by {ORPHANS_LIMIT_S:g} s")
        time.sleep(0.05)
    return ended


def spark_round(corpora: dict[str, Corpus], folder: Path) -> dict[tuple[str, str], tuple[float, int]]:
    """Runs both programs once on each corpus; returns CPU-seconds and peaks of memory."""
    found = {}
    for name, corpus in corpora.items():
        for program in ("cvdist", "Petastorm"):
            shutil.rmtree(folder / "set", ignore_errors=True)
            source, target = str(corpus.folder), f"file://{folder}/set"
            if program == "cvdist":
                words = ["jobs/prepare.py", f"file://{source}", target, f"--image_size={SIZE}", f"--quality={QUALITY}"]
            else:
                words = ["tests/bench/petastorm_job.py", source, target, str(SIZE), str(QUALITY)]
            found[program, name] = spark_submit(folder / "log.txt", *words)
    shutil.rmtree(folder / "set")
    return found
