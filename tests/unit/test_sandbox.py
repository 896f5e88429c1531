"""The decoding process: it gives what `convert` gives, and whatever happens to it costs one image at most."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cvdist import sandbox
from cvdist.errors import ConfigError
from cvdist.images import ImageSpec, Rejected, Rules, Sample, convert
from cvdist.sandbox import Sandbox, checked, max_stored_bytes

MIB = 1 << 20
ROOT = Path(__file__).resolve().parents[2]
PHOTOS = ROOT.parent / "shared" / "data" / "clothing"
SPEC = ImageSpec(64, "short", 3, "jpeg", 90)
FREE = Rules(max_pixels=1 << 40)


def file_of(kind: str = "JPEG", size: tuple[int, int] = (96, 80), seed: int = 0, **options: Any) -> bytes:
    """Returns an image file."""
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


def bomb(side: int) -> bytes:
    """Returns a small, whole PNG of side x side white pixels."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    packer = zlib.compressobj(1)
    rows = b"".join([packer.compress(b"\0" + b"\xff" * (3 * side)) for _ in range(side)] + [packer.flush()])
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@pytest.fixture
def box() -> Iterator[Sandbox]:
    """A running sandbox with much time and memory."""
    with Sandbox(SPEC, Rules(), 30, 512 * MIB) as running:
        yield running


def pid_of(box: Sandbox) -> int:
    """Returns the child of a sandbox that has one."""
    assert box.pid
    return box.pid


def state_of(pid: int) -> str:
    """Returns R, S, T, Z..., or nothing where there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return ""


def until(is_so: Callable[[], bool], timeout_s: float = 10) -> None:
    """Waits for something."""
    deadline_s = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


@pytest.mark.parametrize(
    "spec",
    [
        SPEC,
        dataclasses.replace(SPEC, codec="raw", resize="exact"),
        dataclasses.replace(SPEC, codec="raw", channels=1),
        dataclasses.replace(SPEC, channels=1, quality=100),
        pytest.param(
            dataclasses.replace(SPEC, image_size=128, keep_original=True),
            marks=pytest.mark.skipif(
                not shutil.which("jpegtran"), reason="no jpegtran: apt-get install libjpeg-turbo-progs"
            ),
        ),
    ],
)
def test_results_are_those_of_convert_to_the_byte(spec: ImageSpec) -> None:
    rules = Rules(max_bytes=100_000, max_pixels=50_000, max_aspect=3, background=(1, 2, 3))
    inputs = [file_of(kind) for kind in ("JPEG", "PNG", "WEBP", "BMP", "GIF")]
    inputs += [
        file_of()[:900],
        b"",
        b"no image",
        file_of("WEBP", (300, 200)),
        file_of("PNG", (300, 200)),
        file_of("PNG", (2, 7)),
    ]
    inputs += [file_of("PNG", (1, 1)), Path(__file__).read_bytes(), file_of(progressive=True)]
    with Sandbox(spec, rules, 30, 512 * MIB) as box:
        first = pid_of(box)
        results = [box.convert(data) for data in inputs]
        assert results == [convert(data, spec, rules) for data in inputs]
        assert pid_of(box) == first
    assert {result.reason for result in results if isinstance(result, Rejected)} >= {
        "empty",
        "undecodable",
        "not_an_image",
        "too_many_bytes",
        "too_many_pixels",
        "extreme_aspect",
    }


def test_real_photos_come_out_the_same(box: Sandbox) -> None:
    photos = sorted(PHOTOS.glob("test/*/*.jpg"))[::20]
    if not photos:
        pytest.skip(f"no photos in {PHOTOS.parent.name}/{PHOTOS.name}")
    for path in photos:
        assert box.convert(path.read_bytes()) == convert(path.read_bytes(), SPEC)


def test_images_larger_than_a_pipe_go_through_both_ways() -> None:
    spec = dataclasses.replace(SPEC, image_size=1500, codec="raw")
    data = file_of("BMP", (1500, 2000))
    with Sandbox(spec, Rules(), 30, 512 * MIB) as box:
        assert box.convert(data) == convert(data, spec)


def test_a_frozen_child_is_killed_and_the_image_tried_again(box: Sandbox) -> None:
    box._timeout_s = 1.5
    frozen = pid_of(box)
    os.kill(frozen, signal.SIGSTOP)
    started_s = time.monotonic()
    assert box.convert(file_of()) == convert(file_of(), SPEC)
    assert 1.5 <= time.monotonic() - started_s < 10
    assert not state_of(frozen)
    assert pid_of(box) != frozen


def test_a_child_frozen_while_it_is_sent_an_image_is_killed_too(box: Sandbox) -> None:
    box._timeout_s = 1.5
    frozen = pid_of(box)
    os.kill(frozen, signal.SIGSTOP)
    data = file_of("BMP", (2000, 2000))  # fills the pipe
    assert box.convert(data) == convert(data, SPEC)
    assert not state_of(frozen)


def test_what_takes_too_long_is_rejected_in_bounded_time() -> None:
    data = bomb(7900)
    with Sandbox(SPEC, Rules(), 0.2, 2048 * MIB) as box:
        first, started_s = pid_of(box), time.monotonic()
        result = box.convert(data)
        assert time.monotonic() - started_s < 10
        assert isinstance(result, Rejected)
        assert result.reason == "timeout"
        assert "expected an image that takes less than 0.2 s" in result.detail
        assert not state_of(first)
        box._timeout_s = 30
        assert box.convert(file_of()) == convert(file_of(), SPEC)


def test_a_killed_child_costs_no_image(box: Sandbox) -> None:
    for _ in range(2):
        killed = pid_of(box)
        os.kill(killed, signal.SIGKILL)
        assert box.convert(file_of()) == convert(file_of(), SPEC)
        assert pid_of(box) != killed


def is_at_work(pid: int) -> bool:
    """Says whether a child has started: only then is its time limited."""
    limits = Path(f"/proc/{pid}/limits").read_text().splitlines()
    return not any(line.split()[:4] == ["Max", "cpu", "time", "unlimited"] for line in limits)


def test_an_image_that_kills_every_child_is_rejected_with_the_signal(box: Sandbox) -> None:
    data, ended = file_of("PNG", (3000, 3000)), threading.Event()
    killed: set[int] = set()

    def kill_whoever_decodes() -> None:
        while not ended.is_set():
            pid = box.pid
            if pid and pid not in killed and state_of(pid) == "R" and is_at_work(pid):
                os.kill(pid, signal.SIGSEGV)
                killed.add(pid)
            time.sleep(0.001)

    killer = threading.Thread(target=kill_whoever_decodes)
    killer.start()
    try:
        result = box.convert(data)
    finally:
        ended.set()
        killer.join()
    assert len(killed) == 2
    assert isinstance(result, Rejected)
    assert result.reason == "crashed"
    assert "signal 11 (SIGSEGV)" in result.detail
    assert box.convert(data) == convert(data, SPEC)


def test_a_memory_bomb_is_rejected_and_the_next_image_is_not() -> None:
    data = bomb(30_000)
    assert len(data) < 16 * MIB
    with Sandbox(SPEC, FREE, 60, 512 * MIB) as box:
        first = pid_of(box)
        result = box.convert(data)
        assert isinstance(result, Rejected)
        assert result.reason == "out_of_memory"
        assert str(512 * MIB) in result.detail
        assert not state_of(first)
        assert box.convert(file_of()) == convert(file_of(), SPEC, FREE)


def test_a_file_larger_than_the_memory_is_rejected() -> None:
    with Sandbox(SPEC, Rules(max_bytes=1 << 30), 60, 64 * MIB) as box:
        result = box.convert(bytes(200 * MIB))
        assert isinstance(result, Rejected)
        assert result.reason == "out_of_memory"
        assert box.convert(file_of()) == convert(file_of(), SPEC)


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "PNG", "BMP", "GIF"])
def test_every_decoder_says_that_memory_is_short_or_rejects(kind: str) -> None:
    options = {"progressive": True} if kind == "JPEG" else {"quality": 10, "method": 0} if kind == "WEBP" else {}
    buffer = io.BytesIO()
    Image.new("RGB", (6000, 6000), (10, 200, 30)).save(buffer, kind, **options)
    with Sandbox(SPEC, Rules(max_bytes=1 << 30), 60, 24 * MIB) as box:
        result = box.convert(buffer.getvalue())
        assert isinstance(result, Rejected)
        assert result.reason == ("undecodable" if kind == "WEBP" else "out_of_memory")  # libwebp does not say why


def test_the_child_has_no_environment_no_files_and_strict_limits(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hidden")
    with (tmp_path / "open").open("w") as stream, Sandbox(SPEC, Rules(), 7, 300 * MIB) as box:
        os.set_inheritable(stream.fileno(), True)
        box.convert(file_of())
        place = Path("/proc") / str(pid_of(box))
        names = {entry.split(b"=")[0].decode() for entry in (place / "environ").read_bytes().split(b"\0") if entry}
        assert names <= {"PATH", "LD_LIBRARY_PATH", "PYTHONHOME", "PYTHONPATH", *sandbox.THREADS}
        files = {os.readlink(entry) for entry in (place / "fd").iterdir()}
        assert all(name.startswith("pipe:") or name == os.devnull for name in files), files
        text = (place / "limits").read_text()
        limits = {line[:26].strip(): line[26:].split()[0] for line in text.splitlines()[1:]}
        assert limits["Max core file size"] == limits["Max file size"] == "0"
        assert limits["Max open files"] == "64"
        assert 300 * MIB < int(limits["Max address space"]) < 1200 * MIB
        assert 7 < int(limits["Max cpu time"]) < 60
        status = dict(line.split(":\t", 1) for line in (place / "status").read_text().splitlines())
        assert status["NoNewPrivs"] == "1"
        assert status["Threads"] == "1"


def test_many_images_do_not_use_up_the_cpu_limit_of_one() -> None:
    data = file_of("PNG", (1000, 1000))
    with Sandbox(SPEC, Rules(), 1.5, 512 * MIB) as box:
        first = pid_of(box)
        while cpu_s(first) < 4.5:
            assert isinstance(box.convert(data), Sample)
        assert pid_of(box) == first


def cpu_s(pid: int) -> float:
    """Returns how long a process has computed."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_the_child_ends_with_its_parent_even_frozen() -> None:
    script = (
        "import time; from cvdist.images import *; from cvdist.sandbox import Sandbox\n"
        "with Sandbox(ImageSpec(64, 'short', 3, 'jpeg', 90), Rules(), 30, 1 << 29) as box:\n"
        "    print(box.pid, flush=True); time.sleep(100)"
    )
    for is_frozen in (False, True):
        parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, cwd=ROOT)
        assert parent.stdout
        child = int(parent.stdout.readline())
        until(lambda child=child: state_of(child) == "S")  # type: ignore[misc]
        if is_frozen:
            os.kill(child, signal.SIGSTOP)
            until(lambda child=child: state_of(child) == "T")  # type: ignore[misc]
        parent.kill()
        parent.wait()
        parent.stdout.close()
        until(lambda child=child: state_of(child) in ("", "Z"))  # type: ignore[misc]


def test_closing_ends_and_reaps_the_child() -> None:
    with Sandbox(SPEC, Rules(), 30, 512 * MIB) as box:
        pid = pid_of(box)
    assert not state_of(pid)
    assert box.pid is None
    with pytest.raises(KeyError), Sandbox(SPEC, Rules(), 30, 512 * MIB) as box:
        pid = pid_of(box)
        raise KeyError
    assert not state_of(pid)


def test_no_file_descriptor_is_left_over() -> None:
    before = len(os.listdir("/proc/self/fd"))
    with Sandbox(SPEC, Rules(), 30, 512 * MIB) as box:
        for _ in range(3):
            os.kill(pid_of(box), signal.SIGKILL)
            box.convert(file_of())
    assert len(os.listdir("/proc/self/fd")) == before


def test_an_interrupt_does_not_leave_an_answer_for_the_next_image(box: Sandbox) -> None:
    slow = bomb(6000)  # little to send, much to decode: it is the answer that is waited for

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        with pytest.raises(KeyboardInterrupt):
            box.convert(slow)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert box.convert(file_of()) == convert(file_of(), SPEC)


def test_a_child_that_cannot_start_is_an_error_with_its_words(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "simplejpeg.py").write_text("raise ImportError('no such library here')")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    box = Sandbox(SPEC, Rules(), 30, 512 * MIB)
    with pytest.raises(
        ConfigError, match=r"untrusted: the decoding process does not start .*no such library here.*expected"
    ):
        box.__enter__()
    with pytest.raises(ConfigError):
        box.convert(file_of())
    assert box.pid is None


def test_a_child_without_jpegtran_is_an_error_that_names_the_fix(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    spec = dataclasses.replace(SPEC, image_size=128, keep_original=True)
    with (
        Sandbox(spec, Rules(), 30, 512 * MIB) as box,
        pytest.raises(ConfigError, match=r"keep_original: no jpegtran.*apt-get install"),
    ):
        box.convert(file_of())


def impostor(tmp_path: Path, answers: list[bytes]) -> str:
    """Returns a Python that says it is ready, and then answers each image with the next of `answers`."""
    (tmp_path / "answers.json").write_text(json.dumps([list(answer) for answer in answers]))
    script = tmp_path / "python"
    script.write_text(
        f"#!{sys.executable}\n"
        "import json, os, struct, sys\n"
        "def read():\n"
        "    a, b = struct.unpack('<IQ', sys.stdin.buffer.read(12))\n"
        "    sys.stdin.buffer.read(a + b)\n"
        "read()\n"
        "ready = b'{}'\n"
        "os.write(1, struct.pack('<IQ', len(ready), 0) + ready)\n"
        f"for answer in json.load(open({str(tmp_path / 'answers.json')!r})):\n"
        "    read()\n"
        "    sys.stdout.buffer.write(bytes(answer)); sys.stdout.buffer.flush()\n"
        "read()\n"
    )
    script.chmod(0o755)
    return str(script)


def message(note: object, image: bytes = b"") -> bytes:
    """Returns an answer."""
    words = json.dumps(note).encode()
    return struct.pack("<IQ", len(words), len(image)) + words + image


def lies() -> dict[str, bytes]:
    """Returns answers that a broken or hostile child may give."""
    good = convert(file_of(), SPEC)
    assert isinstance(good, Sample)
    note = {"kind": "sample", "height": good.height, "width": good.width}
    return {
        "no sample": message({"kind": "sample"}, good.image),
        "another height": message({**note, "height": 65}, good.image),
        "another width": message({**note, "width": 65}, good.image),
        "a wild width": message({**note, "width": 10**9}, good.image),
        "a name for a height": message({**note, "height": "64"}, good.image),
        "more than asked": message({**note, "label": 3}, good.image),
        "no image": message(note, b""),
        "a cut image": message(note, good.image[:-100]),
        "a progressive image": message(note, file_of(size=(64, 77), progressive=True)),
        "another size": message({**note, "height": 96, "width": 80}, file_of()),
        "a long image": struct.pack("<IQ", 2, 1 << 60) + b"{}",
        "a long note": struct.pack("<IQ", 1 << 31, 0),
        "no note": struct.pack("<IQ", 4, 0) + b"{{{{",
        "a nested note": struct.pack("<IQ", 60_000, 0) + b"[" * 60_000,
        "half a character": struct.pack("<IQ", 4, 0) + b'"\xff"a',
        "two answers": message({"kind": "out_of_memory"}) * 2,
        "a list": message([1, 2, 3]),
        "a strange reason": message({"kind": "rejected", "reason": "Ünsinn; drop", "detail": "x"}),
        "a long detail": message({"kind": "rejected", "reason": "bad", "detail": "x" * 5000}),
        "an image that is rejected": message({"kind": "rejected", "reason": "bad", "detail": "x"}, good.image),
    }


@pytest.mark.parametrize("name", lies())
def test_an_answer_that_cannot_be_is_not_believed(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", impostor(tmp_path, [lies()[name]]))
    with Sandbox(SPEC, Rules(), 10, 512 * MIB) as box:
        first = pid_of(box)
        result = box.convert(file_of())
        assert isinstance(result, Rejected)
        assert result.reason == "crashed"
        assert not state_of(first)


def test_an_honest_answer_is_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = convert(file_of(), SPEC)
    assert isinstance(good, Sample)
    answers = [
        message({"kind": "sample", "height": good.height, "width": good.width}, good.image),
        message({"kind": "rejected", "reason": "bad", "detail": "two\nlines"}),
    ]
    monkeypatch.setattr(sys, "executable", impostor(tmp_path, answers))
    with Sandbox(SPEC, Rules(), 10, 512 * MIB) as box:
        assert box.convert(file_of()) == good
        assert box.convert(file_of()) == Rejected("bad", "two lines")


def test_raw_answers_are_checked_too() -> None:
    spec = dataclasses.replace(SPEC, codec="raw")
    good = convert(file_of(), spec)
    assert isinstance(good, Sample)
    note = {"kind": "sample", "height": good.height, "width": good.width}
    assert checked(note, good.image, spec) == good
    grey = convert(file_of(), dataclasses.replace(spec, channels=1))
    assert isinstance(grey, Sample)
    for image in (good.image[:-1], good.image + b"x", good.image[10:], b"", grey.image):
        with pytest.raises(ValueError, match="sample"):
            checked(note, image, spec)


@pytest.mark.parametrize("codec", ["jpeg", "raw"])
@pytest.mark.parametrize("size", [(1, 50), (50, 1), (8, 8), (400, 900)])
def test_no_stored_image_is_larger_than_the_bound(codec: str, size: tuple[int, int]) -> None:
    for image_size in (16, 100):
        spec = ImageSpec(image_size, "short", 3, codec, 100)  # type: ignore[arg-type]
        sample = convert(file_of("PNG", size), spec)
        assert isinstance(sample, Sample)
        assert len(sample.image) < max_stored_bytes(spec, Rules())
