"""The photos that tests/bench/loader.py reads, made once of photos that are at hand, below the user's cache."""

from __future__ import annotations

import concurrent.futures
import functools
import json
import os
import shutil
from pathlib import Path

import cv2
import numpy as np

from cvdist.restart import require_keep_original, with_restarts
from tests.bench.photos import JPEG_OPTIONS

VERSION = 1  # to be raised when what is made changes
# Width, height, and the tiles it is laid out in: photos shrunk to 200 pixels give 59 kB at 500 x 375, what photos of ImageNet's size have.
SHAPES = {"500x375": (500, 375), "short-256": (341, 256)}
TILE, NUM_CLASSES = 200, 10


def make_corpus(name: str, photos: Path, folder: Path, num_images: int) -> Path:
    """Returns the folder of a corpus: corpus.json, images/CLASS/NUMBER.jpg and the same with restart markers below restart/."""
    corpus = folder / f"{name}-{num_images}-v{VERSION}"
    if (corpus / "corpus.json").is_file():
        return corpus
    sources = sorted(photos.glob("*/*/*.jpg"))
    if not sources:
        raise FileNotFoundError(f"{photos} holds no SPLIT/CLASS/*.jpg; name a folder of photos by --photos")
    require_keep_original()
    shutil.rmtree(corpus, ignore_errors=True)
    width, height = SHAPES[name]
    for part in ("images", "restart"):
        for label in range(NUM_CLASSES):
            (corpus / part / f"class{label}").mkdir(parents=True)
    with concurrent.futures.ProcessPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        sizes = list(
            pool.map(functools.partial(make_photo, sources, corpus, width, height), range(num_images), chunksize=64)
        )
    about = {"num_images": num_images, "width": width, "height": height}
    about |= {"num_bytes": sum(plain for plain, _ in sizes), "num_restart_bytes": sum(made for _, made in sizes)}
    (corpus / "corpus.json").write_text(json.dumps(about))
    return corpus


def make_photo(sources: list[Path], corpus: Path, width: int, height: int, index: int) -> tuple[int, int]:
    """Writes one photo in both forms; returns their sizes."""
    pixels = mosaic(sources, index)
    if pixels.shape[:2] != (height, width):
        pixels = cv2.resize(pixels, (width, height), interpolation=cv2.INTER_AREA)
    data = cv2.imencode(".jpg", pixels, JPEG_OPTIONS)[1].tobytes()
    restart = with_restarts(data, 3)
    assert restart
    place = f"class{index % NUM_CLASSES}/{index:06d}.jpg"
    (corpus / "images" / place).write_bytes(data)
    (corpus / "restart" / place).write_bytes(restart)
    return len(data), len(restart)


def mosaic(sources: list[Path], index: int) -> np.ndarray:
    """Lays photos, cut square and shrunk, out on 500 x 375 pixels."""
    width, height = SHAPES["500x375"]
    rng, canvas = np.random.default_rng(index), np.zeros((height, width, 3), np.uint8)
    for top in range(0, height, TILE):
        for left in range(0, width, TILE):
            photo = cv2.imread(str(sources[rng.integers(len(sources))]))
            side = min(photo.shape[:2])
            y, x = (photo.shape[0] - side) // 2, (photo.shape[1] - side) // 2
            tile = cv2.resize(photo[y : y + side, x : x + side], (TILE, TILE), interpolation=cv2.INTER_AREA)
            part = tile[: height - top, : width - left]
            canvas[top : top + part.shape[0], left : left + part.shape[1]] = part
    return canvas
