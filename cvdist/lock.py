"""One preparation at a time: a lock file that its owner keeps renewing, and that the next run takes over from a dead one.

The file is made by exclusive creation, which HDFS and local disks offer, and is renewed by a thread. Whether its owner lives is asked
of the kernel on the same machine; elsewhere the age of the file tells, by the clock of the file system alone.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import pathlib
import socket
import threading
import uuid
from types import TracebackType

from cvdist import storage
from cvdist.errors import AlreadyExistsError, DataError, NotFoundError, StorageError

log = logging.getLogger("cvdist.lock")

RENEW_S = 10.0
STALE_S = 120.0


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
    """Holds the lock file at `url` while in a `with` block.

    Raises:
        DataError: On entry: another run that is alive, or may be, holds it. From `require`: another run has taken it over.
    """

    def __init__(self, url: str, what: str) -> None:
        """Describes the lock; `what` is what it guards, for messages."""
        self._url, self._what = url, what
        self._me = this_process()
        self._ended = threading.Event()
        self._renewer = threading.Thread(target=self._renew, name="renew lock", daemon=True)
        self._is_lost = False

    def __enter__(self) -> Lock:
        """Takes the lock, over from a dead owner if need be."""
        for _ in range(3):
            try:
                storage.write_bytes(self._url, self._content())
            except AlreadyExistsError:
                self._take_from_the_dead()
                continue
            self._renewer.start()
            return self
        raise self._is_busy("other runs keep taking it", "run again")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Gives the lock back, where it is still ours."""
        self._ended.set()
        self._renewer.join()
        try:
            if self._reads_mine():
                storage.delete(self._url)
        except StorageError as failure:  # the file grows stale by itself
            log.warning("%s: the lock may be left behind: %s", self._url, failure)

    def require(self) -> None:
        """Raises DataError where another run has taken the lock over, as after a long freeze of this one."""
        if self._is_lost or not self._reads_mine():
            raise self._is_busy("another run has taken it over while this one stood still", "let that one finish")

    def _content(self) -> bytes:
        return json.dumps(dataclasses.asdict(self._me)).encode()

    def _read(self) -> Owner | None:
        """Returns the present owner; None where there is none."""
        try:
            return Owner(**json.loads(storage.read_bytes(self._url)))
        except NotFoundError:
            return None
        except (ValueError, TypeError):
            raise self._is_busy("its lock file is damaged", f"delete {self._url} when no run is under way") from None

    def _reads_mine(self) -> bool:
        owner = self._read()
        return owner is not None and owner.token == self._me.token

    def _renew(self) -> None:
        """Writes the file anew every RENEW_S, as a sign of life, while it is ours."""
        while not self._ended.wait(RENEW_S):
            try:
                if not self._reads_mine():
                    self._is_lost = True
                    return
                storage.write_bytes(self._url, self._content(), overwrite=True)
            except (StorageError, DataError) as error:
                log.warning("%s: the lock could not be renewed: %s", self._url, error)

    def _take_from_the_dead(self) -> None:
        """Moves a dead owner's file away, in one step, so that one of several takers wins."""
        owner = self._read()
        if owner is None:
            return
        is_here = (owner.host, owner.boot) == (self._me.host, self._me.boot)
        is_gone = is_here and started_ticks(owner.pid) != owner.started
        age_s = 0.0 if is_gone else self._age_s()
        if not is_gone and age_s <= STALE_S:
            hint = f"wait for it; if it is dead, run again in {max(1, round(STALE_S - age_s))} s"
            raise self._is_busy(f"process {owner.pid} on {owner.host} is preparing it", hint)
        stale_url = f"{self._url}.{self._me.token}"
        try:
            storage.rename(self._url, stale_url)
            if json.loads(storage.read_bytes(stale_url))["token"] != owner.token:
                storage.rename(stale_url, self._url)  # of a run that was faster, and lives
                return
        except (NotFoundError, AlreadyExistsError):
            return  # another run was faster
        storage.delete(stale_url)
        log.warning("%s: taken over from process %d on %s, which is gone", self._what, owner.pid, owner.host)

    def _age_s(self) -> float:
        """Returns how long ago the file was renewed, by the file system's own clock."""
        probe_url = f"{self._url}.now.{self._me.token}"
        storage.write_bytes(probe_url, b"")
        try:
            return storage.stat(probe_url).modified_s - storage.stat(self._url).modified_s
        except NotFoundError:
            return 0.0
        finally:
            storage.delete(probe_url)

    def _is_busy(self, found: str, fix: str) -> DataError:
        return DataError(f"{self._what}: {found}; expected one run at a time; {fix}")
