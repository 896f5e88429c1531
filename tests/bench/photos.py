"""The photos that the benchmarks work on, made of photos that are at hand."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import cv2
import numpy as np

LARGE_HEIGHT, LARGE_WIDTH = 3000, 4000
TILE = 400
JPEG_OPTIONS = [cv2.IMWRITE_JPEG_QUALITY, 90, cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_420]


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Photos in class folders."""

    name: str
    folder: Path
    paths: tuple[Path, ...]

    @property
    def num_bytes(self) -> int:
        return sum(path.stat().st_size for path in self.paths)


def copy_photos(photos: Path, folder: Path, num_images: int) -> Corpus:
    """Copies photos, evenly chosen from all below `photos`, into class folders."""
    found = sorted(path for path in photos.glob("*/*/*.jpg"))
    num_images = min(num_images, len(found))
    chosen = [found[index * len(found) // num_images] for index in range(num_images)]
    copies = tuple(folder / path.parent.name / f"{path.parent.parent.name}-{path.name}" for path in chosen)
    for path, copy in zip(chosen, copies, strict=True):
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
    return Corpus("A", folder, copies)


def make_mosaics(photos: Corpus, folder: Path, count: int, seed: int = 0) -> Corpus:
    """Makes 12-megapixel photos, tiled with photos in their native resolution, as 4:2:0 JPEGs of quality 90."""
    rng = np.random.default_rng(seed)
    paths = []
    for number in range(count):
        canvas = np.zeros((LARGE_HEIGHT, LARGE_WIDTH, 3), np.uint8)
        for top in range(0, LARGE_HEIGHT, TILE):
            for left in range(0, LARGE_WIDTH, TILE):
                pixels = cv2.imread(str(photos.paths[rng.integers(len(photos.paths))]))
                part = pixels[: min(TILE, LARGE_HEIGHT - top), :TILE]
                canvas[top : top + part.shape[0], left : left + part.shape[1]] = part
        paths.append(folder / f"class{number % 2}" / f"{number:03d}.jpg")
        paths[-1].parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(paths[-1]), canvas, JPEG_OPTIONS)
    return Corpus("B", folder, tuple(paths))


def repeat(corpus: Corpus, folder: Path, times: int) -> Corpus:
    """Copies every photo several times, with a comment that makes each file different. Source: ITU-T T.81, B.2.4.5."""
    paths = []
    for path in corpus.paths:
        data = path.read_bytes()
        for number in range(times):
            paths.append(folder / path.parent.name / f"{number}-{path.name}")
            paths[-1].parent.mkdir(parents=True, exist_ok=True)
            paths[-1].write_bytes(data[:2] + b"\xff\xfe\x00\x06" + f"{number:04d}".encode() + data[2:])
    return Corpus(corpus.name, folder, tuple(paths))


def enlarge(photos: Corpus, folder: Path, count: int) -> Corpus:
    """Makes 12-megapixel photos by enlarging some, which gives as many pixels and less detail."""
    paths = []
    for number, path in enumerate(photos.paths[:: len(photos.paths) // count][:count]):
        pixels = cv2.imread(str(path))
        size = (LARGE_WIDTH, LARGE_HEIGHT) if pixels.shape[1] > pixels.shape[0] else (LARGE_HEIGHT, LARGE_WIDTH)
        paths.append(folder / f"class{number % 2}" / f"{number:03d}.jpg")
        paths[-1].parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(paths[-1]), cv2.resize(pixels, size, interpolation=cv2.INTER_CUBIC), JPEG_OPTIONS)
    return Corpus("C", folder, tuple(paths))
