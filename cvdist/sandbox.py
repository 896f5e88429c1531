"""Converts untrusted images in a process of its own, which has little to lose and is killed when it takes too long.

`Sandbox.convert` gives what `images.convert` gives, byte for byte, or a rejection where the decoder hangs, crashes or wants too much
memory. The child, `python -m cvdist.sandbox`, has none of the parent's environment, files or secrets; both speak in messages of
two lengths, a JSON object and bytes. What the child answers is checked before it is believed.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import fcntl
import json
import math
import os
import re
import resource
import select
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import cv2

from cvdist.errors import ConfigError
from cvdist.headers import NPY_MAGIC, SOF_BASELINE, Header, judge_bytes, read_array_header, read_frame
from cvdist.images import ImageSpec, Rejected, Rules, Sample, convert, has_stored_size

LENGTHS = struct.Struct("<IQ")  # of the JSON object and of the bytes
MAX_NOTE_BYTES = 1 << 16
PIECE_BYTES = 1 << 20
PIPE_BYTES = 256 << 10  # most images fit: one write, one read
START_TIMEOUT_S = 60
EXIT_TIMEOUT_S = 1
ATTEMPTS = 2
NUM_FILES = 64
PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS = 1, 38  # Source: linux/prctl.h
# All that the child needs of the environment: where programs and libraries are. Threads of OpenBLAS would reserve its memory.
VARIABLES = ("PATH", "LD_LIBRARY_PATH", "PYTHONHOME")
THREADS = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}


class ChildGoneError(Exception):
    """The child has closed its pipes."""


class Child:
    """One decoding process and the pipes to it."""

    def __init__(self, settings: dict[str, Any]) -> None:
        """Starts it.

        Raises:
            ConfigError: It does not start.
        """
        command = [sys.executable, "-P", "-m", "cvdist.sandbox", str(os.getpid())]
        paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
        environment = {name: os.environ[name] for name in VARIABLES if name in os.environ}
        self.process = subprocess.Popen(
            command,
            bufsize=0,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**environment, **THREADS, "PYTHONPATH": paths},
        )
        assert self.process.stdin
        assert self.process.stdout
        self._inward, self._outward = self.process.stdin.fileno(), self.process.stdout.fileno()
        for descriptor in (self._inward, self._outward):
            os.set_blocking(descriptor, False)
            with contextlib.suppress(OSError):  # the user may have many pipes already
                fcntl.fcntl(descriptor, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        try:
            self.exchange(settings, b"", time.monotonic() + START_TIMEOUT_S, 0)
        except (TimeoutError, ChildGoneError, ValueError) as error:
            raise ConfigError(
                f"untrusted: the decoding process does not start ({self.stop(want_words=True) or error}); expected it within"
                f" {START_TIMEOUT_S} s; mend that on this machine, or raise decode_memory_bytes"
            ) from None

    def exchange(self, note: dict[str, Any], data: bytes, deadline_s: float, max_bytes: int) -> tuple[Any, bytes]:
        """Sends a message and returns the answer, whose bytes are at most `max_bytes`.

        Raises:
            TimeoutError: `deadline_s` (time.monotonic) has passed.
            ChildGoneError: The child has ended.
            ValueError: The answer is none.
        """
        words = json.dumps(note).encode()
        self._send(LENGTHS.pack(len(words), len(data)) + words + data, deadline_s)
        answer = bytearray()
        self._receive(answer, LENGTHS.size, deadline_s)
        num_words, num_bytes = LENGTHS.unpack_from(answer)
        size = LENGTHS.size + num_words + num_bytes
        if num_words > MAX_NOTE_BYTES or num_bytes > max_bytes:
            raise ValueError(f"an answer of {num_words} + {num_bytes} bytes")
        self._receive(answer, size, deadline_s)
        if len(answer) > size:
            raise ValueError(f"an answer with {len(answer) - size} bytes too many")
        return json.loads(answer[LENGTHS.size : size - num_bytes]), bytes(memoryview(answer)[size - num_bytes :])

    def _send(self, data: bytes, deadline_s: float) -> None:
        view = memoryview(data)
        while view:
            wait_for(self._inward, select.POLLOUT, deadline_s)
            try:
                view = view[os.write(self._inward, view) :]
            except BlockingIOError:
                continue
            except BrokenPipeError:
                raise ChildGoneError from None

    def _receive(self, answer: bytearray, num_bytes: int, deadline_s: float) -> None:
        """Reads on until an answer has `num_bytes`."""
        while len(answer) < num_bytes:
            wait_for(self._outward, select.POLLIN, deadline_s)
            piece = os.read(self._outward, PIECE_BYTES)
            if not piece:
                raise ChildGoneError
            answer += piece

    def stop(self, *, want_words: bool = False) -> str:
        """Ends the process, at once unless it is ending by itself; returns how it ended, or its last words."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(0)
        self.process.kill()
        words = self.process.communicate()[1] if want_words else b""
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            if pipe:
                pipe.close()
        code = self.process.wait()
        how = f"signal {-code} ({signal.Signals(-code).name})" if code < 0 else f"exit code {code}"
        return " ".join(words.decode(errors="replace").split())[-300:] if words else how


def wait_for(descriptor: int, event: int, deadline_s: float) -> None:
    """Waits until a pipe is ready or closed.

    Raises:
        TimeoutError: It is not by `deadline_s` (time.monotonic).
    """
    poll = select.poll()
    poll.register(descriptor, event)
    if not poll.poll(max(0.0, deadline_s - time.monotonic()) * 1000):
        raise TimeoutError


class Sandbox:
    """Converts images in a child process. To be used by one thread, the one that made it, which lives on while it is used."""

    def __init__(self, spec: ImageSpec, rules: Rules, timeout_s: float, memory_bytes: int) -> None:
        """Starts nothing yet.

        Args:
            spec: How images are stored.
            rules: What they may be.
            timeout_s: For one image, in seconds of wall-clock time.
            memory_bytes: Address space for one image, beside what the program itself has.
        """
        self._spec, self._rules, self._timeout_s, self._memory_bytes = spec, rules, timeout_s, memory_bytes
        self._child: Child | None = None

    def __enter__(self) -> Sandbox:
        """Starts the child, so that it is known to work.

        Raises:
            ConfigError: It does not start.
        """
        self._start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Ends the child."""
        self.close()

    @property
    def pid(self) -> int | None:
        """Of the child, where there is one."""
        return self._child.process.pid if self._child else None

    def close(self) -> None:
        """Ends the child."""
        if self._child:
            self._child.stop()
            self._child = None

    def convert(self, data: bytes) -> Sample | Rejected:
        """Gives what `images.convert` gives; a rejection also where the child does not survive it, in two attempts.

        Raises:
            ConfigError: The child does not start, or lacks a program to keep originals with.
        """
        rejected = judge_bytes(data, self._rules)
        for _ in range(
            ATTEMPTS if not rejected else 0
        ):  # a child that somebody else froze or killed is not the image's fault
            result = self._attempt(data)
            if isinstance(result, Sample) or result.reason not in ("timeout", "crashed"):
                return result
            rejected = result
        assert rejected
        return rejected

    def _start(self) -> Child:
        if self._child and self._child.process.poll() is not None:
            self.close()
        if not self._child:
            settings = {"timeout_s": self._timeout_s, "memory_bytes": self._memory_bytes}
            self._child = Child(
                {**settings, "spec": dataclasses.asdict(self._spec), "rules": dataclasses.asdict(self._rules)}
            )
        return self._child

    def _attempt(self, data: bytes) -> Sample | Rejected:
        """Converts an image once; a child that did not do so in order is done with."""
        child = self._start()
        limit = f"expected an image that takes less than {self._timeout_s:g} s and {self._memory_bytes} bytes"
        try:
            deadline_s = time.monotonic() + self._timeout_s
            note, image = child.exchange({}, data, deadline_s, max_stored_bytes(self._spec, self._rules))
            if note == {"kind": "out_of_memory"}:
                self.close()
                return Rejected("out_of_memory", f"decoding needs more memory; {limit}")
            return checked(note, image, self._spec)
        except TimeoutError:
            self.close()
            return Rejected("timeout", f"the decoder did not end; {limit}")
        except ChildGoneError:
            self._child = None
            return Rejected("crashed", f"the decoder ended by {child.stop()}; {limit}")
        except (ValueError, RecursionError) as error:
            self.close()
            return Rejected(
                "crashed", f"the decoder answered with {' '.join(str(error).split())[:200]}; expected a sample"
            )
        except BaseException:
            self.close()  # an answer may still be on its way
            raise


def max_stored_bytes(spec: ImageSpec, rules: Rules) -> int:
    """Returns more than a stored image can have: the longest code of every coefficient of every channel, and headers.

    Source: ITU-T T.81, section F.1.2: 16 bits of code and at most 11 of value.
    """
    return 4 * spec.image_size * (spec.image_size * rules.max_aspect + 64) * spec.channels + MAX_NOTE_BYTES


def checked(note: Any, image: bytes, spec: ImageSpec) -> Sample | Rejected:
    """Returns what the child says, where it is possible.

    Raises:
        ConfigError: The child says that a program is missing.
        ValueError: It is not possible.
    """
    match note:
        case {"kind": "rejected", "reason": str(reason), "detail": str(detail)} if len(note) == 3:
            if re.fullmatch("[a-z_]{1,40}", reason) and len(detail) < 1000 and not image:
                return Rejected(reason, " ".join(detail.split()))
        case {"kind": "config_error", "detail": str(detail)}:
            raise ConfigError(" ".join(detail.split()))
        case {"kind": "sample", "height": int(height), "width": int(width)} if len(note) == 3:
            if has_stored_size(height, width, spec) and stored_shape(image, spec) == (height, width, spec.channels):
                return Sample(image, height, width)
    raise ValueError(repr(note)[:100])


def stored_shape(image: bytes, spec: ImageSpec) -> tuple[int, ...]:
    """Returns height, width and channels of a stored image; nothing where it is none."""
    if spec.codec == "raw":
        header = read_array_header(image, Rules(max_pixels=len(image), max_aspect=len(image)))
        if not image.startswith(NPY_MAGIC) or not isinstance(header, Header):
            return ()
        shape = header.height, header.width, 3 if header.mode == "RGB" else 1
        return shape if len(image) == 10 + int.from_bytes(image[8:10], "little") + math.prod(shape) else ()
    frame, _ = read_frame(image)
    if frame is None or frame.marker != SOF_BASELINE or not image.endswith(b"\xff\xd9"):
        return ()
    return frame.height, frame.width, len(frame.factors)


def read_message(stream: BinaryIO) -> tuple[Any, bytes] | None:
    """Reads one message of the parent; None when there will be no more.

    Raises:
        MemoryError: Its bytes, which are read and dropped, are too many.
    """
    lengths = stream.read(LENGTHS.size)
    if len(lengths) < LENGTHS.size:
        return None
    num_words, num_bytes = LENGTHS.unpack(lengths)
    note = json.loads(stream.read(num_words))
    try:
        data = stream.read(num_bytes) if num_bytes else b""
    except MemoryError:
        while num_bytes > 0:
            num_bytes -= len(stream.read(min(num_bytes, PIECE_BYTES))) or num_bytes
        raise
    return (note, data) if len(data) == num_bytes else None


def write_message(stream: BinaryIO, note: dict[str, Any], data: bytes = b"") -> None:
    """Answers the parent."""
    words = json.dumps(note).encode()
    stream.write(LENGTHS.pack(len(words), len(data)) + words + data)
    stream.flush()


def confine(settings: dict[str, Any]) -> None:
    """Takes from this process what decoding an image does not need."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    memory_bytes = pages * resource.getpagesize() + settings["memory_bytes"]
    limits = {
        resource.RLIMIT_AS: memory_bytes,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_NOFILE: NUM_FILES,
    }
    for kind, limit in limits.items():
        _, hard = resource.getrlimit(kind)
        limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(kind, (limit, limit))
    ctypes.CDLL(None).prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)


def limit_cpu(timeout_s: float) -> None:
    """Lets the kernel end this process should one image take much longer than the parent waits."""
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    seconds = math.ceil(time.process_time() + timeout_s) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (seconds if hard == resource.RLIM_INFINITY else min(seconds, hard), hard))


def answer(data: bytes, spec: ImageSpec, rules: Rules) -> tuple[dict[str, Any], bytes]:
    """Converts an image, and puts the result into a message."""
    try:
        result = convert(data, spec, rules)
    except MemoryError:
        return {"kind": "out_of_memory"}, b""
    except ConfigError as error:
        return {"kind": "config_error", "detail": str(error)}, b""
    if isinstance(result, Rejected):
        return {"kind": "rejected", "reason": result.reason, "detail": result.detail}, b""
    return {"kind": "sample", "height": result.height, "width": result.width}, result.image


def serve(parent: int) -> None:
    """Answers the parent until it ends: what the child process does."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it ended before this
        return
    inward, outward = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb", PIPE_BYTES)
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1):  # what libraries print is no answer
        os.dup2(null, descriptor)
    cv2.setNumThreads(1)
    first = read_message(inward)
    if first is None:
        return
    settings, _ = first
    spec = ImageSpec(**settings["spec"])
    rules = Rules(**{**settings["rules"], "background": tuple(settings["rules"]["background"])})
    confine(settings)
    os.dup2(null, 2)  # nobody reads it from now on
    write_message(outward, {"kind": "ready"})
    while True:
        limit_cpu(settings["timeout_s"])
        try:
            message = read_message(inward)
            if message is None:
                return
            note, image = answer(message[1], spec, rules)
        except MemoryError:
            note, image = {"kind": "out_of_memory"}, b""
        write_message(outward, note, image)


if __name__ == "__main__":
    serve(int(sys.argv[1]))
