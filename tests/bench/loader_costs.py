"""What tests/bench/loader.py measures of our loader alone: memory, first batch, number of shards, HDFS, an accelerator kept busy.

Each value is of a fresh process: this file, run as a program with the name of a probe and its arguments.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
MIB = 1 << 20
GROUP_ROWS, TINY = 16, (96, 72)
LOAD_SHARE = 0.9  # of our rate, what the emulated accelerator takes
PROBE_TIMEOUT_S = 300
Line = dict[str, Any]


# ------------------------------------------------------------------------------------------------ probes, each in a fresh process


def probe_memory(url: str) -> float:
    """Returns the peak of two epochs, MiB; fails where TensorFlow has been imported."""
    from peers.ours import make_loader

    loader = make_loader(url)
    for epoch in range(2):
        for _ in loader.batches(epoch):
            pass
    if "tensorflow" in sys.modules:
        raise RuntimeError("TensorFlow was imported by the loader")
    peaks = [line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(peaks[0]) / 1024


def probe_first_batch(url: str) -> float:
    """Returns seconds from the end of the imports to the first batch, reading the manifest included."""
    from peers.ours import make_loader

    for module in ("comm", "config", "loader", "shards"):
        importlib.import_module(f"cvdist.{module}")
    started_s = time.perf_counter()
    next(make_loader(url).batches(0))
    return time.perf_counter() - started_s


def probe_cpu(url: str) -> float:
    """Returns CPU-seconds of an image in an epoch, after one that warms up."""
    from peers.ours import make_loader

    loader, num_images = make_loader(url), 0
    for _ in loader.batches(0):
        pass
    started_s = time.process_time()
    for batch in loader.batches(1):
        num_images += len(batch.images)
    return (time.process_time() - started_s) / num_images


def probe_busy(url: str) -> float:
    """Returns how much of its time a consumer works that takes LOAD_SHARE of our rate, after its first batch, over epochs as a stream."""
    from peers.ours import make_loader

    loader = make_loader(url)
    for _ in loader.batches(0):
        pass
    started_s, num_batches = time.perf_counter(), 0
    for _ in loader.batches(1, num_epochs=2):
        num_batches += 1
    step_s = (time.perf_counter() - started_s) / num_batches / LOAD_SHARE
    batches, busy_s = loader.batches(3, num_epochs=4), 0.0
    next(batches)
    started_s = time.perf_counter()
    for _ in batches:
        begin_s = time.perf_counter()
        time.sleep(step_s)
        busy_s += time.perf_counter() - begin_s
    return busy_s / (time.perf_counter() - started_s)


def probe_fetch(url: str) -> dict[str, float]:
    """Returns MB/s of our way to the bytes of row groups, verified, and of bare loops of hdfs-native over the same files."""
    from cvdist.fetch import Fetcher
    from cvdist.groups import FETCH_THREADS
    from cvdist.shards import read_manifest, row_group_offsets

    shards = read_manifest(url).splits["train"].shards
    groups = [(shard, index) for shard in shards for index in range(len(shard.row_group_bytes))]
    ranges = [
        (f"{url}/{shard.path}", row_group_offsets(shard)[index], shard.row_group_bytes[index])
        for shard, index in groups
    ]
    fetcher = Fetcher(url)

    def ours() -> int:
        with ThreadPoolExecutor(FETCH_THREADS) as pool:
            return sum(
                len(data) for data, is_intact in pool.map(lambda at: fetcher.row_group(*at), groups) if is_intact
            )

    loops = {"cvdist": ours, **bare_loops(url, ranges)}
    found: dict[str, float] = {}
    for name in [*loops, *reversed(loops)]:  # the first half warms up
        started_s = time.perf_counter()
        num_bytes = loops[name]()
        assert num_bytes == sum(length for _, _, length in ranges), name
        found[name] = num_bytes / (time.perf_counter() - started_s) / 1e6
    return found


def bare_loops(url: str, ranges: list[tuple[str, int, int]]) -> dict[str, Callable[[], int]]:
    """Returns loops over the same bytes that do nothing else: by streams and by ranges, in one thread and in four."""
    from urllib.parse import urlsplit

    import hdfs_native

    place = urlsplit(url)
    client = hdfs_native.Client(f"hdfs://{place.netloc}")
    files: dict[str, Any] = {name: client.read(urlsplit(name).path) for name, _, _ in ranges}
    whole: dict[
        str, tuple[int, int]
    ] = {}  # start and length of the row groups of each file, which lie behind each other
    for name, start, length in ranges:
        first, before = whole.get(name, (start, 0))
        whole[name] = (first, before + length)

    def streams(name: str) -> int:
        start, length = whole[name]
        return sum(len(part) for part in files[name].read_range_stream(start, length))

    def one_range(at: tuple[str, int, int]) -> int:
        return len(files[at[0]].read_range(at[1], at[2]))

    def in_threads(function: Callable[[Any], int], over: Any) -> int:
        with ThreadPoolExecutor(4) as pool:
            return sum(pool.map(function, over))

    return {
        "streams, 1 thread": lambda: sum(map(streams, whole)),
        "streams, 4 threads": lambda: in_threads(streams, whole),
        "ranges, 1 thread": lambda: sum(map(one_range, ranges)),
        "ranges, 4 threads": lambda: in_threads(one_range, ranges),
    }


# ------------------------------------------------------------------------------------------------------------- what is measured


def probe(name: str, url: str) -> Any:
    """Returns what a probe finds in a fresh process, on two cores."""
    paths = os.pathsep.join([str(ROOT / "tests" / "bench"), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-P", __file__, name, url],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=PROBE_TIMEOUT_S,
    )
    if done.returncode:
        raise RuntimeError(f"probe {name} of {url} failed: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def line(what: str, found: float, target: str, is_met: bool, form: str = "{:.2f}") -> Line:
    """Returns a line of the table."""
    print(f"  {what}: {form.format(found)} ({target})", file=sys.stderr, flush=True)
    return {"what": what, "found": form.format(found), "target": target, "verdict": "ok" if is_met else "MISSED"}


def median(name: str, url: str, times: int = 5) -> float:
    """Returns the median of a probe in several processes."""
    return float(statistics.median(probe(name, url) for _ in range(times)))


def ours_url(corpus: Path) -> str:
    """Returns the prepared data set of a corpus."""
    return f"file://{corpus}/containers/ours/set"


def memory(corpus: Path) -> list[Line]:
    """Peak memory of an epoch."""
    peak = median("memory", ours_url(corpus), 3)
    return [line("peak memory, 2 threads, batch 64, MiB", peak, "<= 286 (300 MB)", peak * MIB <= 300e6, "{:.0f}")]


def first_batch(corpus: Path) -> list[Line]:
    """Time to the first batch, from local disk and from HDFS, and what many shards add to it."""
    few, many = (tiny_set(corpus, num_shards) for num_shards in (8, 8192))
    local = median("first_batch", ours_url(corpus))
    lines = [line("first batch, local, s", local, "<= 0.3", local <= 0.3)]
    times = [(probe("first_batch", few), probe("first_batch", many)) for _ in range(5)]
    ratio = statistics.median(late / early for early, late in times)
    words = f"first batch, 8,192 shards / 8 shards ({statistics.median(late for _, late in times):.2f} s)"
    lines.append(line(words, ratio, "<= 2", ratio <= 2))
    with hdfs_copy(ours_url(corpus)) as url:
        remote = median("first_batch", url)
    lines.append(line("first batch, HDFS, s", remote, "<= 1", remote <= 1))
    return lines


def shards(corpus: Path) -> list[Line]:
    """CPU of an image when the same samples lie in 512 shards in place of 8."""
    few, many = (photo_set(corpus, num_shards, 512 // num_shards) for num_shards in (8, 512))
    ratios = []
    for number in range(4):
        pair = (few, many) if number % 2 == 0 else (many, few)
        found = {url: probe("cpu", url) for url in pair}
        ratios.append(found[many] / found[few])
    ratio = statistics.median(ratios)
    return [line("CPU of an image, 512 shards / 8 shards", ratio, "<= 1.05", ratio <= 1.05, "{:.3f}")]


def hdfs(corpus: Path) -> list[Line]:
    """Bytes per second from HDFS beside the best bare loop."""
    with hdfs_copy(ours_url(corpus)) as url:
        found = [probe("fetch", url) for _ in range(5)]
    bare = {name: statistics.median(one[name] for one in found) for name in found[0] if name != "cvdist"}
    best = max(bare, key=lambda name: bare[name])
    ratio = statistics.median(one["cvdist"] / one[best] for one in found)
    rate = statistics.median(one["cvdist"] for one in found)
    words = f"HDFS streaming, verified ({rate:,.0f} MB/s) / best bare loop ({best}: {bare[best]:,.0f} MB/s)"
    return [line(words, ratio, ">= 0.90", ratio >= 0.9)]


def busy(corpus: Path) -> list[Line]:
    """How busy an accelerator is that takes 0.9 of our rate."""
    share = median("busy", ours_url(corpus), 3)
    return [line(f"accelerator at {LOAD_SHARE} of our rate is busy", share, ">= 0.95", share >= 0.95, "{:.3f}")]


MEASURES: dict[str, Callable[[Path], list[Line]]] = {
    "memory": memory,
    "first_batch": first_batch,
    "shards": shards,
    "hdfs": hdfs,
    "busy": busy,
}


# -------------------------------------------------------------------------------------------------------------------- data sets


def tiny_set(corpus: Path, num_shards: int) -> str:
    """Returns the URL of a data set of shards of one row group of tiny photos."""
    return made_set(corpus, f"tiny-{num_shards}", num_shards, 1, TINY)


def photo_set(corpus: Path, num_shards: int, num_groups: int) -> str:
    """Returns the URL of a data set of so many shards of row groups of the corpus's photos, repeated."""
    return made_set(corpus, f"photos-{num_shards}", num_shards, num_groups, None)


def made_set(corpus: Path, name: str, num_shards: int, num_groups: int, size: tuple[int, int] | None) -> str:
    """Writes a data set by ShardWriter, where it is not there yet."""
    import cv2

    from cvdist import storage
    from cvdist.images import ImageSpec
    from cvdist.shards import Manifest, Row, ShardWriter, Split, write_manifest
    from tests.bench.photos import JPEG_OPTIONS

    folder = corpus / "containers" / name
    if (folder / "manifest.json").exists():
        return f"file://{folder}"
    photos = [path.read_bytes() for path in sorted((corpus / "restart").glob("*/*.jpg"))]
    height, width = cv2.imread(str(next((corpus / "restart").glob("*/*.jpg")))).shape[:2]
    if size:
        width, height = size
        options = [*JPEG_OPTIONS, cv2.IMWRITE_JPEG_RST_INTERVAL, 2]
        small = [cv2.resize(decoded(photo), size, interpolation=cv2.INTER_AREA) for photo in photos[:256]]
        photos = [cv2.imencode(".jpg", pixels, options)[1].tobytes() for pixels in small]
    (folder / "train").mkdir(parents=True, exist_ok=True)
    shards, number = [], 0
    for shard in range(num_shards):
        path = f"train/shard-{shard:05d}.parquet"
        with (
            (folder / path).open("wb") as stream,
            ShardWriter(stream, 0) as writer,
        ):  # cuts at the least rows of a group
            for _ in range(num_groups * GROUP_ROWS):
                writer.add(Row(str(number), number % 10, photos[number % len(photos)], height, width, "0" * 64))
                number += 1
            shards.append(writer.close(path))
    split = Split(tuple(shards), tuple((number + 9 - label) // 10 for label in range(10)))
    spec = ImageSpec(min(width, height), "short", 3, "jpeg", 90, True)
    classes = tuple(f"class{label}" for label in range(10))
    storage.delete(f"file://{folder}/manifest.json")
    write_manifest(f"file://{folder}", Manifest(classes, spec, {"train": split}, number, 0, 0, "0" * 64, {}))
    return f"file://{folder}"


def decoded(photo: bytes) -> Any:
    """Decodes a JPEG, BGR."""
    import cv2
    import numpy as np

    return cv2.imdecode(np.frombuffer(photo, np.uint8), cv2.IMREAD_COLOR)


@contextlib.contextmanager
def hdfs_copy(url: str) -> Iterator[str]:
    """Starts an HDFS on this machine with a copy of a data set; yields its URL."""
    from cluster.local_hdfs import LocalHdfs
    from cvdist import storage
    from cvdist.shards import MANIFEST_NAME, read_manifest

    with tempfile.TemporaryDirectory(prefix="cvdist-bench-") as folder:
        cluster = LocalHdfs(folder, 1, die_with_parent=True).start()
        try:
            target = storage.join(cluster.url, "set")
            paths = [shard.path for split in read_manifest(url).splits.values() for shard in split.shards]
            for path in [*paths, MANIFEST_NAME]:
                storage.write_bytes(storage.join(target, path), storage.read_bytes(storage.join(url, path)))
            yield target
        finally:
            cluster.stop(at_once=True)


def main() -> None:
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
    probes: dict[str, Callable[[str], Any]] = {
        "memory": probe_memory,
        "first_batch": probe_first_batch,
        "cpu": probe_cpu,
        "busy": probe_busy,
        "fetch": probe_fetch,
    }
    print(json.dumps(probes[sys.argv[1]](sys.argv[2])), flush=True)


if __name__ == "__main__":
    main()
