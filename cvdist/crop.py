"""A crop of a stored JPEG, resized: only the tiles under it are decoded. Pure but for buffers that each thread keeps.

JPEGs that prepare writes have restart markers that make them grids of tiles, two MCUs wide in most cases. `_tiles.c` cuts those under the
crop out, as a smaller JPEG for a stock decoder; what is no such grid is decoded whole. Both give the same pixels, because fast
upsampling, unlike the default, looks at no neighbour of a pixel.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.machinery
import logging
import pathlib
import threading
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
import simplejpeg

from cvdist.images import Pixels

COLOURS = {1: "GRAY", 3: "RGB"}

log = logging.getLogger("cvdist.crop")


class Scratch(threading.local):
    """Memory that a thread uses again for each image: fresh pages cost more than what is done in them."""

    def __init__(self) -> None:
        """Holds nothing yet."""
        self.buffers: dict[str, Pixels] = {}
        self.origin = np.zeros(2, np.int32)

    def take(self, name: str, num_bytes: int) -> Pixels:
        """Returns a buffer of at least so many bytes."""
        buffer = self.buffers.get(name)
        if buffer is None or len(buffer) < num_bytes:
            buffer = self.buffers[name] = np.empty(max(num_bytes, 1 << 16), np.uint8)
        return buffer


_scratch = Scratch()


@functools.cache
def tiles() -> Any:
    """Returns `crop` of _tiles.c; None, with a warning, where it has not been built."""
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        path = pathlib.Path(__file__).with_name(f"_tiles{suffix}")
        if path.exists():
            # PyDLL keeps the interpreter's lock: to give it up and win it back takes as long as these ten microseconds.
            function = ctypes.PyDLL(str(path)).crop
            function.restype = ctypes.c_int64
            function.argtypes = (ctypes.c_void_p, ctypes.c_int64, *[ctypes.c_int] * 4, ctypes.c_void_p, ctypes.c_void_p)
            return function
    log.warning(
        "cvdist._tiles is not built: crops decode whole images, which takes up to twice the time; install a C compiler and cvdist again"
    )
    return None


def decode_crop(data: bytes | memoryview, box: Sequence[int], out: Pixels, *, flip: bool = False) -> None:
    """Decodes what a crop keeps of a JPEG, and resizes (bilinear) and perhaps mirrors it.

    Args:
        data: A JPEG.
        box: x, y, width and height of the crop, pixels of the image.
        out: uint8 (H, W, C) with C of 1 or 3, contiguous; receives 0-255 grey or RGB.
        flip: Mirror it horizontally.

    Raises:
        ValueError: The bytes are no JPEG, are damaged, or the box does not lie within the image.
    """
    x, y, width, height = box
    pixels, left, top = decode_around(data, x, y, width, height, out.shape[2])
    resize_into(pixels[y - top : y - top + height, x - left : x - left + width], out, flip=flip)


def decode_around(
    data: bytes | memoryview, x: int, y: int, width: int, height: int, channels: int
) -> tuple[Pixels, int, int]:
    """Returns the pixels of a part of a JPEG that holds a box, and where in the image it lies; they stay until the thread's next call.

    Raises:
        ValueError: As for `decode_crop`.
    """
    left, top, cut = 0, 0, data
    if function := tiles():
        source, smaller = np.frombuffer(data, np.uint8), _scratch.take("jpeg", len(data) + 2)
        origin = _scratch.origin
        length = function(address(source), len(source), x, y, width, height, address(smaller), address(origin))
        if length > 0:
            left, top, cut = int(origin[0]), int(origin[1]), smaller[:length].data
    full_height, full_width, *_ = simplejpeg.decode_jpeg_header(cut)
    if x < 0 or y < 0 or width < 1 or height < 1 or x + width > left + full_width or y + height > top + full_height:
        raise ValueError(
            f"the box {x}, {y}, {width}, {height} lies outside of {left + full_width} x {top + full_height} pixels"
        )
    pixels = simplejpeg.decode_jpeg(
        cut,
        colorspace=COLOURS[channels],
        fastdct=True,
        fastupsample=True,
        buffer=_scratch.take("pixels", full_height * full_width * channels),
    )
    return pixels, left, top


def resize_into(pixels: Pixels, out: Pixels, *, flip: bool = False, interpolation: int = cv2.INTER_LINEAR) -> None:
    """Writes (h, w, C) pixels, resized and perhaps mirrored, into `out` (H, W, C), contiguous."""
    height, width, channels = out.shape
    flat = out if channels > 1 else out[..., 0]
    if pixels.shape[:2] == (height, width):
        np.copyto(out, pixels[:, ::-1] if flip else pixels)
    elif flip:
        resized = _scratch.take("resized", out.size)[: out.size].reshape(flat.shape)
        cv2.resize(pixels, (width, height), dst=resized, interpolation=interpolation)
        cv2.flip(resized, 1, dst=flat)
    else:
        cv2.resize(pixels, (width, height), dst=flat, interpolation=interpolation)


def address(array: np.ndarray[Any, Any]) -> int:
    """Returns where an array begins in memory."""
    return int(array.__array_interface__["data"][0])
