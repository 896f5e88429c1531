"""Calls with a deadline: blocking functions run in daemon threads, so that a caller can stop waiting for them.

A frozen HDFS blocks a call inside native code, where Python's signal handlers do not run. Here the call blocks a thread of
ours instead, while the caller waits on a lock: signal handlers run, and the wait ends at the deadline. A thread that does not
come back is abandoned; one that does serves the next call.
"""

from __future__ import annotations

import atexit
import collections
import dataclasses
import functools
import logging
import os
import queue
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Generic, TypeVar

from cvdist.errors import ConfigError, CvdistError, StorageError

if TYPE_CHECKING:
    from tenacity import RetryCallState

T = TypeVar("T")
MIB = 1 << 20
log = logging.getLogger("cvdist.storage")

# Threads that wait for work are kept up to this many; a burst of more is served and ends.
MAX_IDLE_THREADS = 32
# How long the interpreter's exit waits for calls under way. A thread that returns from native code into an interpreter that is
# being torn down can abort the process, so calls that are about to end are given the time; frozen ones are left behind.
EXIT_WAIT_S = 1.0

_idle: collections.deque[queue.SimpleQueue[Call[object]]] = collections.deque()
_running: set[Call[object]] = set()


class UnavailableError(StorageError):
    """The file system did not answer or said that it cannot now; the same call may work in a moment."""


class TimedOutError(StorageError):
    """A call did not end within its deadline; it may still take effect later."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """How long and how often a call is tried.

    Attributes:
        deadline_s: Longest time of one call; CVDIST_STORAGE_DEADLINE_S sets it. Large files are moved by many calls.
        attempts: Most tries of a call that may be repeated; CVDIST_STORAGE_ATTEMPTS sets it.
        chunk_bytes: Most bytes moved by one call.
    """

    deadline_s: float = 30.0
    attempts: int = 3
    chunk_bytes: int = 8 * MIB

    @staticmethod
    def from_environment() -> Limits:
        """Returns the defaults, changed by the environment's variables.

        Raises:
            ConfigError: A variable is not a number in its range.
        """
        return _limits(os.environ.get("CVDIST_STORAGE_DEADLINE_S", ""), os.environ.get("CVDIST_STORAGE_ATTEMPTS", ""))


@functools.lru_cache(maxsize=16)
def _limits(deadline_s: str, attempts: str) -> Limits:
    """Reads the texts of the environment's variables; an empty one leaves the default."""
    return Limits(
        deadline_s=_number("CVDIST_STORAGE_DEADLINE_S", deadline_s or str(Limits.deadline_s), float, 0.1, 86400),
        attempts=int(_number("CVDIST_STORAGE_ATTEMPTS", attempts or str(Limits.attempts), int, 1, 1000)),
    )


def _number(name: str, text: str, kind: Callable[[str], float], low: float, high: float) -> float:
    """Reads one number within its range."""
    try:
        value = kind(text)
    except ValueError:
        value = -1.0
    if not low <= value <= high:
        raise ConfigError(
            f"{name}: {text!r} cannot be used; expected a number from {low:g} to {high:g}; unset or correct it"
        )
    return value


class Call(Generic[T]):
    """One call on its way."""

    def __init__(self, function: Callable[[], T]) -> None:
        """Takes the function, not yet running it."""
        self._function: Callable[[], T] | None = function
        self._value: T | None = None
        self._error: BaseException | None = None
        self._unfinished = threading.Lock()
        self._unfinished.acquire()

    def run(self) -> None:
        """Runs the function and keeps what it returns or raises, a Rust panic (which is no Exception) included."""
        try:
            self._value = self._function() if self._function else None
        except BaseException as error:  # noqa: BLE001 - the caller gets it, see result()
            self._error = error
        finally:
            self._function = None
            self._unfinished.release()

    def wait(self, timeout_s: float) -> bool:
        """Waits until the call has ended, at most `timeout_s`, and says whether it has."""
        if not self._unfinished.acquire(timeout=min(max(timeout_s, 0.0), threading.TIMEOUT_MAX)):
            return False
        self._unfinished.release()
        return True

    def outcome(self) -> tuple[T, BaseException | None]:
        """Returns what the call returned and what it raised, once it has ended."""
        return self._value, self._error  # type: ignore[return-value]


def start(function: Callable[[], T]) -> Call[T]:
    """Starts `function` in a thread of its own and returns at once."""
    call = Call(function)
    try:
        inbox = _idle.pop()
    except IndexError:
        inbox = queue.SimpleQueue()
        threading.Thread(target=_serve, args=(inbox,), name="cvdist-storage", daemon=True).start()
    inbox.put(call)  # type: ignore[arg-type]
    return call


def _serve(inbox: queue.SimpleQueue[Call[object]]) -> None:
    """Runs the calls of one thread, one after the other."""
    while True:
        call = inbox.get()
        _running.add(call)
        call.run()
        _running.discard(call)
        del call  # or an idle thread would keep the last result alive
        if len(_idle) >= MAX_IDLE_THREADS:
            return
        _idle.append(inbox)


@dataclasses.dataclass(frozen=True)
class Caller:
    """Makes the calls about one URL and words their errors.

    Attributes:
        url: What the calls are about.
        explain: Turns what a call raised into an error of ours.
    """

    url: str
    explain: Callable[[BaseException], StorageError]

    def finish(self, call: Call[T]) -> T:
        """Waits for a call and returns its value.

        Raises:
            TimedOutError: The deadline passed first.
            StorageError: The call failed.
        """
        deadline_s = Limits.from_environment().deadline_s
        if not call.wait(deadline_s):
            raise TimedOutError(
                f"{self.url}: no answer in {deadline_s:g} s; expected a file system that responds; check that it runs and is"
                " not overloaded, or raise CVDIST_STORAGE_DEADLINE_S"
            )
        value, error = call.outcome()
        if error is None:
            return value
        if isinstance(error, CvdistError):
            raise error
        raise self._explained(error) from error

    def _explained(self, error: BaseException) -> StorageError:
        """Words an error; that may ask the network why, so it has a deadline as well."""
        explaining = start(lambda: self.explain(error))
        if explaining.wait(Limits.from_environment().deadline_s):
            explained, failure = explaining.outcome()
            if failure is None:
                return explained
        return StorageError(f"{self.url}: {type(error).__name__}: {error}")

    def once(self, function: Callable[[], T]) -> T:
        """Runs `function` in another thread, until the deadline."""
        return self.finish(start(function))

    def again(
        self, function: Callable[[], T], retried: type[StorageError] = UnavailableError, first_pause_s: float = 0.1
    ) -> T:
        """Runs `function` in this thread; while it raises `retried`, waits a little (then longer) and repeats it."""
        try:
            return function()
        except retried as error:
            attempts = Limits.from_environment().attempts
            if attempts == 1:
                raise
            return self._repeat(function, attempts, error, first_pause_s)

    def _repeat(self, function: Callable[[], T], attempts: int, first: StorageError, first_pause_s: float) -> T:
        """Makes the tries after the first one, each after a longer pause of random length."""
        import tenacity  # here, because most programs never need it

        failed = [first]

        def attempt() -> T:
            if failed:
                raise failed.pop()
            return function()

        def report(state: RetryCallState) -> None:
            error = state.outcome.exception() if state.outcome else None
            log.warning("try %d of %d failed: %s", state.attempt_number, attempts, error)

        retrying = tenacity.Retrying(
            stop=tenacity.stop_after_attempt(attempts),
            wait=tenacity.wait_exponential(multiplier=first_pause_s) + tenacity.wait_random(0, first_pause_s),
            retry=tenacity.retry_if_exception_type(type(first)),
            before_sleep=report,
            reraise=True,
        )
        return retrying(attempt)

    def call(self, function: Callable[[], T]) -> T:
        """Runs a function that may be repeated in another thread, a bounded number of times."""
        return self.again(lambda: self.once(function))


def _forget_threads() -> None:
    """Drops the parent's threads in a forked child, where they do not exist."""
    _idle.clear()
    _running.clear()


def _wait_for_running_calls() -> None:
    """Gives calls under way a moment to end before the interpreter goes."""
    end_s = time.monotonic() + EXIT_WAIT_S
    for call in list(_running):
        call.wait(end_s - time.monotonic())


os.register_at_fork(after_in_child=_forget_threads)
atexit.register(_wait_for_running_calls)
