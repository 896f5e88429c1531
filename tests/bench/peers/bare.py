"""The limits: decode a region of bytes in memory, resize, flip; one thread, nothing else. L2 and L3 are in loader_limits/limits.c."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from typing import Any

import cv2
import numpy as np
from peers.common import BATCH, SIZE, Epochs, Pixels, Work, read_about

BytePointer = ctypes.POINTER(ctypes.c_uint8)
Kernel = Callable[[bytes, list[int], Pixels, bool], None]


class Region:
    """A decoder of regions: L2 by the cropping region of libjpeg-turbo; L3 by cutting out tiles between restart markers before."""

    def __init__(self, library: str, width: int, height: int, splice: bool) -> None:
        self._library = ctypes.CDLL(library)
        self._library.start()
        self._library.splice.restype = ctypes.c_size_t
        self._pixels = np.empty((height + 16) * (width + 64) * 3, np.uint8)
        self._spliced = ctypes.create_string_buffer(1 << 22)
        self._splice = splice

    def __call__(self, data: bytes, x: int, y: int, w: int, h: int) -> Pixels:
        """Returns the pixels of a box, uint8 (h, w, 3)."""
        source: Any = data
        size = len(data)
        if self._splice:
            origin = (ctypes.c_int * 2)()
            size = self._library.splice(
                data, ctypes.c_size_t(size), (ctypes.c_int * 4)(x, y, w, h), self._spliced, origin
            )
            source, x, y = self._spliced, x - origin[0], y - origin[1]
        width = ctypes.c_int()
        out = self._pixels.ctypes.data_as(BytePointer)
        first = self._library.decode_region(source, ctypes.c_size_t(size), x, y, w, h, out, ctypes.byref(width))
        rows = self._pixels[: h * width.value * 3].reshape(h, width.value, 3)
        return rows[:, x - first : x - first + w]


def open_epochs(work: Work) -> Epochs:
    cv2.setNumThreads(0)
    limit, transform = work.options["limit"], work.transform
    boxes, flips = transform.boxes, transform.flips
    folder = work.corpus / ("images" if limit == "L2" else "restart")
    photos = [(int(path.stem), path.read_bytes()) for path in sorted(folder.glob("*/*.jpg"))]
    rng, crop = np.random.default_rng(7), our_kernel() if limit == "kernel" else region_kernel(work, limit == "L3")

    def epoch() -> Iterator[Any]:
        order = rng.permutation(len(photos))
        for start in range(0, len(photos) - BATCH + 1, BATCH):
            images, chosen = np.empty((BATCH, SIZE, SIZE, 3), np.uint8), order[start : start + BATCH]
            for out, at in zip(images, chosen, strict=True):
                index, data = photos[at]
                crop(data, boxes[index].tolist(), out, bool(flips[index]))
            yield images, np.array([photos[at][0] for at in chosen])

    return epoch


def region_kernel(work: Work, splice: bool) -> Kernel:
    """Returns L2 or L3."""
    about = read_about(work.corpus)
    decode = Region(work.options["library"], about["width"], about["height"], splice)
    resized = np.empty((SIZE, SIZE, 3), np.uint8)

    def crop(data: bytes, box: list[int], out: Pixels, flip: bool) -> None:
        cv2.resize(decode(data, *box), (SIZE, SIZE), resized if flip else out, interpolation=cv2.INTER_LINEAR)
        if flip:
            cv2.flip(resized, 1, out)

    return crop


def our_kernel() -> Kernel:
    """Returns the decoder of cvdist, alone."""
    from cvdist.crop import decode_crop

    return lambda data, box, out, flip: decode_crop(data, box, out, flip=flip)
