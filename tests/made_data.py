"""Small trees of real JPEG files, and data sets prepared of them, for tests."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np

from cvdist import prepare
from cvdist.config import PrepareConfig
from cvdist.shards import Manifest


def class_tree(folder: Path, classes: dict[str, int], *, height: int = 64, width: int = 80, seed: int = 0) -> Path:
    """Writes CLASS/NNN.jpg: stripes whose direction and colour follow the class, so that a network can learn them, and noise."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    for label, (name, count) in enumerate(classes.items()):
        (folder / name).mkdir(parents=True, exist_ok=True)
        angle = np.pi * label / len(classes)
        for index in range(count):
            phase, period = rng.uniform(0, 2 * np.pi), rng.uniform(8, 12)
            wave = np.sin((x * np.cos(angle) + y * np.sin(angle)) * 2 * np.pi / period + phase)
            colour = rng.uniform(0.3, 1, 3)
            pixels = 127 + 90 * wave[..., None] * colour + rng.normal(0, 12, (height, width, 3))
            path = folder / name / f"{index:03d}.jpg"
            assert cv2.imwrite(str(path), np.clip(pixels, 0, 255).astype(np.uint8))
    return folder


def data_set(source: Path, target_url: str, **settings: object) -> Manifest:
    """Prepares a tree in this process."""
    config = PrepareConfig(source_url=f"file://{source}", target_url=target_url, **settings)  # type: ignore[arg-type]
    manifest = prepare.run(config)
    assert manifest is not None
    return manifest
