"""What tests/bench/prepare.py measures under spark-submit: cvdist and Petastorm, on local[1]."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from resource import RUSAGE_CHILDREN, getrusage

import psutil

from tests.bench.arms import QUALITY, SIZE
from tests.bench.peaks import peak_bytes
from tests.bench.photos import Corpus

ROOT = Path(__file__).resolve().parents[2]
SPARK_LIMIT_S, ORPHANS_LIMIT_S = 1800.0, 60.0


class PeakWatch:
    """Looks at the peak memory of Spark's Python processes below this one, while in a `with` block."""

    def __enter__(self) -> PeakWatch:
        self.peak_bytes = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(0.5):
            for process in psutil.Process().children(recursive=True):
                try:
                    if "pyspark.daemon" in process.cmdline():
                        self.peak_bytes = max(self.peak_bytes, peak_bytes(process.pid))
                except (psutil.Error, OSError):
                    continue


def spark_submit(log_path: Path, *words: str) -> tuple[float, int]:
    """Runs a job on local[1]; returns CPU-seconds of JVM, driver and Python of the tasks, and the peak memory of the latter.

    All of them are this process's to wait for, those whose parents have ended as well, so the kernel's sum leaves nothing out.
    """
    environment = {**os.environ, "PYSPARK_PYTHON": sys.executable, "PYTHONPATH": str(ROOT)}
    command = [str(Path(sys.executable).parent / "spark-submit"), "--master", "local[1]", *words]
    others = set(psutil.Process().children())
    before = getrusage(RUSAGE_CHILDREN)
    with PeakWatch() as watch, log_path.open("wb") as log:
        done = subprocess.run(
            command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, cwd=ROOT, env=environment, timeout=SPARK_LIMIT_S
        )
        while left := set(psutil.Process().children()) - others:
            _, alive = psutil.wait_procs(left, timeout=ORPHANS_LIMIT_S)
            if alive:
                raise RuntimeError(f"{alive} outlive spark-submit by {ORPHANS_LIMIT_S:g} s; see {log_path}")
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}: {log_path.read_text()[-2000:]}")
    after = getrusage(RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime, watch.peak_bytes


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
