"""One preparation at a time: lock files that their owner keeps renewing, and that the next run takes over from a dead one.

The lock is the file with the highest number. Taking over is the exclusive creation of the next number, which HDFS and local disks
grant to one of several. Whether an owner lives is asked of the kernel on the same machine; elsewhere the age of its file tells, by the
clock of the file system alone.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import pathlib
import re
import socket
import threading
import uuid
from types import TracebackType

from cvdist import storage
from cvdist.errors import AlreadyExistsError, DataError, NotFoundError, StorageError

log = logging.getLogger("cvdist.lock")

RENEW_S = 10.0
STALE_S = 120.0
ATTEMPTS = 5
PREFIX = "lock-"
FILE_NAME = re.compile(rf"{PREFIX}(\d+)\.json")


@dataclasses.dataclass(frozen=True)
class Owner:
    """Who holds the lock: the machine, its boot, the process and when that started (in ticks since boot), and a random token."""

    host: str
    boot: str
    pid: int
    started: int
    token: str


def this_process() -> Owner:
    """Describes this process, with a new token."""
    return Owner(socket.gethostname(), boot_id(), os.getpid(), started_ticks(os.getpid()) or 0, uuid.uuid4().hex)


def boot_id() -> str:
    """Returns what differs where a process id means another process: from boot to boot, and between containers."""
    return f"{pathlib.Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"


def started_ticks(pid: int) -> int | None:
    """Returns when a process started, in clock ticks since boot; None where there is no such process, or only its remains.

    Source: proc(5), /proc/pid/stat, fields 3 (state) and 22 (starttime).
    """
    try:
        fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])


class Lock:
    """Holds the lock in `folder_url` while in a `with` block.

    Raises:
        DataError: On entry: another run that is alive, or may be, holds it. From `require`: another run has taken it over.
    """

    def __init__(self, folder_url: str, what: str) -> None:
        """Describes the lock; `what` is what it guards, for messages."""
        self._folder_url, self._what = folder_url, what
        self._me, self._number = this_process(), 0
        self._ended = threading.Event()
        self._renewer = threading.Thread(target=self._renew, name="renew lock", daemon=True)

    def __enter__(self) -> Lock:
        """Takes the lock, over from a dead owner if need be."""
        for _ in range(ATTEMPTS):
            before = self._highest()
            owner = self._read(before) if before else None
            if before and owner is None:
                continue  # given back just now
            if owner is not None:
                self._require_dead(before, owner)
            try:
                storage.write_bytes(self._url(before + 1), self._content())
            except AlreadyExistsError:
                continue
            still = self._read(before) if before else None
            if still == owner and self._highest() == before + 1:
                self._number = before + 1
                self._renewer.start()
                if owner is not None:
                    log.warning(
                        "%s: taken over from process %d on %s, which is gone", self._what, owner.pid, owner.host
                    )
                return self
            storage.delete(self._url(before + 1))  # the one that was judged has gone, and another may have come
        raise self._is_busy("other runs keep taking it", "run again")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Gives the lock back."""
        self._ended.set()
        self._renewer.join()
        try:
            storage.delete(self._url(self._number))
        except StorageError as failure:  # the file grows stale by itself
            log.warning("%s: the lock may be left behind: %s", self._url(self._number), failure)

    def require(self) -> None:
        """Raises DataError where another run has taken the lock over, as after a long freeze of this one."""
        if not self.is_mine():
            raise self._is_busy("another run has taken it over while this one stood still", "let that one finish")

    def _url(self, number: int) -> str:
        return storage.join(self._folder_url, f"{PREFIX}{number:04d}.json")

    def _content(self) -> bytes:
        return json.dumps(dataclasses.asdict(self._me)).encode()

    def _highest(self) -> int:
        """Returns the number of the newest lock file; 0 where there is none."""
        try:
            names = [storage.name(entry.url) for entry in storage.list_dir(self._folder_url)]
        except NotFoundError:
            return 0
        return max((int(found.group(1)) for name in names if (found := FILE_NAME.fullmatch(name))), default=0)

    def _read(self, number: int) -> Owner | None:
        """Returns an owner; None where there is no such lock file."""
        try:
            return Owner(**json.loads(storage.read_bytes(self._url(number))))
        except NotFoundError:
            return None
        except (ValueError, TypeError):
            fix = f"delete {self._url(number)} when no run is under way"
            raise self._is_busy("its lock file is damaged", fix) from None

    def is_mine(self) -> bool:
        """Says whether nobody has taken the lock over."""
        owner = self._read(self._number)
        return owner is not None and owner.token == self._me.token and self._highest() == self._number

    def _renew(self) -> None:
        """Writes the file anew every RENEW_S, as a sign of life, while it is ours."""
        while not self._ended.wait(RENEW_S):
            try:
                if not self.is_mine():
                    return
                storage.write_bytes(self._url(self._number), self._content(), overwrite=True)
            except (StorageError, DataError) as error:
                log.warning("%s: the lock could not be renewed: %s", self._url(self._number), error)

    def _require_dead(self, number: int, owner: Owner) -> None:
        """Raises DataError unless an owner is gone, or has given no sign of life for STALE_S."""
        is_here = (owner.host, owner.boot) == (self._me.host, self._me.boot)
        if is_here and started_ticks(owner.pid) != owner.started:
            return
        age_s = self._age_s(number)
        if age_s <= STALE_S:
            hint = f"wait for it; if it is dead, run again in {max(1, round(STALE_S - age_s))} s"
            raise self._is_busy(f"process {owner.pid} on {owner.host} is preparing it", hint)

    def _age_s(self, number: int) -> float:
        """Returns how long ago a lock file was renewed, by the file system's own clock."""
        probe_url = storage.join(self._folder_url, f"now-{self._me.token}")
        storage.write_bytes(probe_url, b"")
        try:
            return storage.stat(probe_url).modified_s - storage.stat(self._url(number)).modified_s
        except NotFoundError:
            return 0.0
        finally:
            storage.delete(probe_url)

    def _is_busy(self, found: str, fix: str) -> DataError:
        return DataError(f"{self._what}: {found}; expected one run at a time; {fix}")
