"""How far the tasks of a preparation are, told from the ledgers of finished shards, wherever they were written."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from types import TracebackType

from cvdist import ledger, storage
from cvdist.errors import NotFoundError, StorageError

log = logging.getLogger("cvdist.progress")

EVERY_S = 10.0


class Progress:
    """Says every EVERY_S, while in a `with` block, how many inputs are done, how many were quarantined, how fast, and until when."""

    def __init__(self, job_url: str, num_images: int, say: Callable[[str], None]) -> None:
        """Looks at the ledgers in the folder of a job; `num_images` are expected in all."""
        self._job_url, self._num_images, self._say = job_url, num_images, say
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="progress", daemon=True)
        self._results: dict[str, ledger.ShardResult] = {}

    def __enter__(self) -> Progress:
        """Starts to watch."""
        self._started_s = time.monotonic()
        self._look()
        self._num_before = sum(result.num_inputs for result in self._results.values())
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Ends watching."""
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(EVERY_S):
            try:
                if self._look():
                    self._say(self.line())
            except StorageError as error:  # the tasks will say so themselves
                log.debug("no progress to be seen: %s", error)

    def _look(self) -> bool:
        """Reads the ledgers that are new; says whether there are any."""
        folder, before = storage.join(self._job_url, ledger.FOLDER), len(self._results)
        try:
            entries = storage.list_dir(folder)
        except NotFoundError:
            return False
        for entry in entries:
            name = storage.name(entry.url)
            if name not in self._results and not name.startswith(".") and (result := ledger.read_result(entry.url)):
                self._results[name] = result
        return len(self._results) > before

    def line(self) -> str:
        """Returns what is known, in one line."""
        done = sum(result.num_inputs for result in self._results.values())
        quarantined = sum(result.num_quarantined for result in self._results.values())
        rate = (done - self._num_before) / max(1e-9, time.monotonic() - self._started_s)
        left = max(0, self._num_images - done)
        ends = f"about {duration(left / rate)} left" if rate else "no estimate yet"
        share = done / max(1, self._num_images)
        return f"  {done:,} of {self._num_images:,} images ({share:.0%}), {quarantined:,} quarantined, {rate:,.0f} images/s, {ends}"


def duration(seconds: float) -> str:
    """Returns a time span in words: 45 s, 12 min 5 s, 3 h 20 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
