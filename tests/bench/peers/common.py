"""What every loader of the benchmark shares: the photos, the same random crops for all, and the decoders.

The programs of this folder run in environments of their own, so they import nothing of cvdist at the top.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

BATCH, SIZE, THREADS = 64, 224, 2
SCALE_MIN, RATIO_MAX, TRIES = 0.08, 4 / 3, 10

Pixels = npt.NDArray[np.uint8]
Epochs = Callable[[], Iterator[tuple[Any, Any]]]


class Work(NamedTuple):
    """What one measured process does.

    Attributes:
        corpus: Folder of the photos: corpus.json, images/CLASS/NUMBER.jpg, and restart/CLASS/NUMBER.jpg with restart markers.
        container: Where the loader keeps its own form of them.
        kernel: Who decodes: opencv, pillow, ours; or own, for loaders that bring a decoder.
        options: Further settings of one row of the table.
    """

    corpus: Path
    container: Path
    kernel: str
    options: dict[str, Any]

    @property
    def paths(self) -> list[Path]:
        """The photos in order; those with restart markers for our decoder."""
        return sorted((self.corpus / ("restart" if self.kernel == "ours" else "images")).glob("*/*.jpg"), key=number)

    @property
    def transform(self) -> Transform:
        """Decodes one photo as this work asks for."""
        return Transform(self.corpus, self.kernel)

    def records(self) -> Iterator[tuple[int, bytes]]:
        """Yields number and bytes of every photo."""
        for path in self.paths:
            yield number(path), path.read_bytes()


def number(path: Path) -> int:
    """Returns the number of a photo."""
    return int(path.stem)


def read_about(corpus: Path) -> dict[str, int]:
    """Returns num_images, width and height of a corpus."""
    about: dict[str, int] = json.loads((corpus / "corpus.json").read_text())
    return about


def crops(corpus: Path) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_]]:
    """Returns the seeded crop of every photo, int32 (N, 4) x, y, w, h, and which are mirrored, bool (N,).

    Source: torchvision, RandomResizedCrop.get_params.
    """
    about = read_about(corpus)
    rng, boxes = np.random.default_rng(7), np.empty((about["num_images"], 4), np.int32)
    for box in boxes:
        box[:] = random_box(rng, about["width"], about["height"])
    return boxes, rng.random(len(boxes)) < 0.5


def random_box(rng: np.random.Generator, width: int, height: int) -> tuple[int, int, int, int]:
    """Draws one crop."""
    for _ in range(TRIES):
        area = width * height * rng.uniform(SCALE_MIN, 1)
        ratio = math.exp(rng.uniform(-math.log(RATIO_MAX), math.log(RATIO_MAX)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1)), w, h
    w, h = min(width, round(height * RATIO_MAX)), min(height, round(width * RATIO_MAX))
    return (width - w) // 2, (height - h) // 2, w, h


class Transform:
    """Decodes, crops, resizes and flips photos, each by the crop of its number. Can be pickled."""

    def __init__(self, corpus: Path, kernel: str) -> None:
        """Takes the crops of a corpus."""
        self.boxes, self.flips = crops(corpus)
        self.kernel = kernel

    def __call__(self, index: int, data: bytes) -> Pixels:
        """Returns uint8 (224, 224, 3), RGB."""
        return KERNELS[self.kernel](data, self.boxes[index], bool(self.flips[index]))


def decode_opencv(data: bytes, box: Any, flip: bool) -> Pixels:
    """OpenCV, as one writes it."""
    import cv2

    x, y, w, h = box
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
    pixels = cv2.resize(pixels[y : y + h, x : x + w], (SIZE, SIZE), interpolation=cv2.INTER_LINEAR)
    return np.asarray(cv2.flip(pixels, 1) if flip else pixels, np.uint8)


def decode_pillow(data: bytes, box: Any, flip: bool) -> Pixels:
    """Pillow, as torchvision calls it."""
    import io

    from PIL import Image

    x, y, w, h = (int(value) for value in box)
    with Image.open(io.BytesIO(data)) as image:
        crop = image.convert("RGB").crop((x, y, x + w, y + h)).resize((SIZE, SIZE), Image.Resampling.BILINEAR)
    return np.asarray(crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else crop)


def decode_ours(data: bytes, box: Any, flip: bool) -> Pixels:
    """The decoder of cvdist, for bytes with restart markers."""
    from cvdist.crop import decode_crop

    out = np.empty((SIZE, SIZE, 3), np.uint8)
    decode_crop(data, box.tolist(), out, flip=flip)
    return out


KERNELS: dict[str, Callable[[bytes, Any, bool], Pixels]] = {
    "opencv": decode_opencv,
    "pillow": decode_pillow,
    "ours": decode_ours,
}


def one_thread_each() -> None:
    """Keeps OpenCV from using threads of its own beside those of the loader."""
    import cv2

    cv2.setNumThreads(0)


def in_process(_: int) -> None:
    """The same, in a process that a torch DataLoader has started."""
    one_thread_each()
