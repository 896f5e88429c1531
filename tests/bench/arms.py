"""What tests/bench/prepare.py measures in its own process: cvdist, the bare loop, and what one would write by hand."""

from __future__ import annotations

import functools
import gc
import io
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cv2
import simplejpeg
from PIL import Image

from cvdist import prepare
from cvdist.config import PrepareConfig
from tests.bench.photos import Corpus

SIZE, QUALITY = 224, 90


def short_size(height: int, width: int) -> tuple[int, int]:
    """Returns width and height of an image whose shorter side becomes SIZE."""
    scale = SIZE / min(height, width)
    return max(round(width * scale), SIZE), max(round(height * scale), SIZE)


def bare_loop(photos: Sequence[bytes]) -> int:
    """Makes the library calls that images.convert makes for an upright JPEG, and nothing else."""
    num_bytes = 0
    for data in photos:
        height, width = simplejpeg.decode_jpeg_header(data)[:2]
        factor = next((factor for factor in (8, 4, 2) if min(height, width) // factor >= SIZE), 1)
        smallest = {"min_height": -(-height // factor), "min_width": -(-width // factor), "min_factor": 1}
        pixels = simplejpeg.decode_jpeg(data, colorspace="BGR", strict=True, **smallest)
        pixels = cv2.resize(pixels, short_size(*pixels.shape[:2]), interpolation=cv2.INTER_AREA)
        row_mcus = -(-pixels.shape[1] // 16)
        interval = next((interval for interval in (2, 3) if row_mcus % interval == 0), 1)
        options = [cv2.IMWRITE_JPEG_QUALITY, QUALITY, cv2.IMWRITE_JPEG_PROGRESSIVE, 0]
        options += [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_420]
        options += [cv2.IMWRITE_JPEG_RST_INTERVAL, interval]
        num_bytes += len(cv2.imencode(".jpg", pixels, options)[1].tobytes())
    return num_bytes


def plain_opencv(paths: Sequence[Path]) -> int:
    """Reads whole photos, shrinks and encodes them, all by OpenCV."""
    num_bytes = 0
    for path in paths:
        pixels = cv2.imread(str(path))
        pixels = cv2.resize(pixels, short_size(*pixels.shape[:2]), interpolation=cv2.INTER_AREA)
        num_bytes += len(cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, QUALITY])[1].tobytes())
    return num_bytes


def pillow(paths: Sequence[Path], *, draft: bool) -> int:
    """Does the same by Pillow; with its draft mode the decoder may scale down by 2, 4 or 8."""
    num_bytes = 0
    for path in paths:
        with Image.open(path) as image:
            size = short_size(image.height, image.width)
            if draft:
                image.draft("RGB", size)
            buffer = io.BytesIO()
            image.convert("RGB").resize(size, Image.Resampling.BILINEAR).save(buffer, "JPEG", quality=QUALITY)
        num_bytes += len(buffer.getvalue())
    return num_bytes


def prepare_config(source: Path, target: Path, **settings: Any) -> PrepareConfig:
    """Returns the settings of the benchmark."""
    urls = {"source_url": f"file://{source}", "target_url": f"file://{target}"}
    return PrepareConfig(**urls, image_size=SIZE, resize="short", codec="jpeg", quality=QUALITY, **settings)


def run_prepare(corpus: Corpus, folder: Path) -> tuple[float, float, int]:
    """Prepares a data set; returns CPU-seconds of all, of write_shard alone, and the bytes of the shards."""
    shards_s = 0.0

    def run_tasks(description: str, function: Callable[[int], Any], numbers: Sequence[int]) -> list[Any]:
        nonlocal shards_s
        started_s = time.process_time()
        results = [function(number) for number in numbers]
        shards_s += time.process_time() - started_s
        return results

    target = folder / "set"
    started_s = time.process_time()
    manifest = prepare.run(prepare_config(corpus.folder, target), run_tasks)
    total_s = time.process_time() - started_s
    assert manifest is not None
    assert manifest.num_rows == len(corpus.paths)
    shutil.rmtree(target)
    return total_s, shards_s, sum(shard.num_bytes for split in manifest.splits.values() for shard in split.shards)


def cpu_seconds(function: Callable[[], int]) -> tuple[float, int]:
    """Returns the CPU-seconds of a call in one thread, and what it returned."""
    gc.collect()
    cv2.setNumThreads(1)
    try:
        started_s = time.process_time()
        num_bytes = function()
        return time.process_time() - started_s, num_bytes
    finally:
        cv2.setNumThreads(-1)


def in_process_round(corpus: Corpus, many: Corpus, folder: Path) -> dict[str, tuple[float, int, int]]:
    """Measures each arm that needs no other process once: CPU-seconds, bytes made, images.

    cvdist works on `many`, which may be copies of `corpus`, so that what it does once for a data set is shared by a fair number of photos.
    """
    photos = [path.read_bytes() for path in corpus.paths]
    gc.collect()
    total_s, shards_s, num_bytes = run_prepare(many, folder)
    found = {"cvdist, whole run": (total_s, num_bytes, len(many.paths))}
    found["cvdist, write_shard"] = (shards_s, num_bytes, len(many.paths))
    peers: dict[str, Callable[[], int]] = {
        "bare loop": functools.partial(bare_loop, photos),
        "OpenCV": functools.partial(plain_opencv, corpus.paths),
        "Pillow": functools.partial(pillow, corpus.paths, draft=False),
        "Pillow, draft": functools.partial(pillow, corpus.paths, draft=True),
    }
    for arm, function in peers.items():
        found[arm] = (*cpu_seconds(function), len(corpus.paths))
    return found
