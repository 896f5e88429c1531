"""Image bytes to a stored sample or a reason for rejection. Pure: no files, no URLs, no state.

The header is read and judged before any pixel is decoded; then decode, orient, resize, encode.
"""

from __future__ import annotations

import dataclasses
import io
import struct
from typing import Literal

import cv2
import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image

Pixels = npt.NDArray[np.uint8]

MAX_BYTES = 64 << 20
MAX_PIXELS = 64_000_000
MAX_ASPECT = 50
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF")
ORIENTATION_TAG = 0x0112
BACKGROUND = (255, 255, 255)

Image.MAX_IMAGE_PIXELS = None  # the gate below judges the size, with a message of its own


@dataclasses.dataclass(frozen=True)
class ImageSpec:
    """How the images of a data set are stored.

    Attributes:
        image_size: Pixels of the shorter side (resize=short) or of both (resize=exact).
        resize: short or exact.
        channels: 3 is RGB, 1 is grey.
        codec: jpeg, or raw: uint8 pixels behind a NumPy .npy header, as Petastorm's NdarrayCodec writes them.
        quality: JPEG quality, 1 to 100.
    """

    image_size: int
    resize: Literal["short", "exact"]
    channels: Literal[1, 3]
    codec: Literal["jpeg", "raw"]
    quality: int


@dataclasses.dataclass(frozen=True)
class Sample:
    """One stored image: bytes as `ImageSpec.codec` says, height and width in pixels."""

    image: bytes
    height: int
    width: int


@dataclasses.dataclass(frozen=True)
class Rejected:
    """Why an input is not in the data set: a short reason code and a sentence."""

    reason: str
    detail: str


@dataclasses.dataclass(frozen=True)
class Header:
    """What the first bytes of an image file say, before any pixel is decoded."""

    format: str
    mode: str
    height: int
    width: int
    orientation: int


def convert(data: bytes, spec: ImageSpec) -> Sample | Rejected:
    """Turns the bytes of an image file into a stored sample, or says why not.

    Raises:
        MemoryError: There is too little to decode it.
    """
    try:
        header = read_header(data)
        if isinstance(header, Rejected):
            return header
        pixels = resize(orient(decode(data, header, spec), header.orientation), spec)
        return Sample(encode(pixels, spec), *pixels.shape[:2])
    except MemoryError:  # this machine is too small, which says nothing about the image
        raise
    except Exception as error:  # one of the two broad catches of the design: any decoder error rejects this sample only
        return Rejected("undecodable", f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")


def read_header(data: bytes) -> Header | Rejected:
    """Reads format, size and orientation, and judges them against the limits of this module."""
    if not data:
        return Rejected("empty", "the file holds no bytes; expected an image")
    if len(data) > MAX_BYTES:
        return Rejected("too_many_bytes", f"{len(data)} bytes; expected at most {MAX_BYTES}")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            header = Header(image.format or "", image.mode, image.height, image.width, read_orientation(image))
    except (OSError, ValueError, SyntaxError):
        return Rejected("not_an_image", f"starts with {data[:8]!r}; expected one of {', '.join(FORMATS)}")
    height, width = header.height, header.width
    if height * width > MAX_PIXELS:
        return Rejected("too_many_pixels", f"{width} x {height} pixels; expected at most {MAX_PIXELS} in all")
    if max(height, width) > MAX_ASPECT * min(height, width):
        return Rejected("extreme_aspect", f"{width} x {height} pixels; expected sides within 1:{MAX_ASPECT}")
    return header


def read_orientation(image: Image.Image) -> int:
    """Returns the EXIF orientation of a JPEG, 1 to 8; 1, upright, where there is none or it cannot be read."""
    if image.format not in ("JPEG", "MPO"):
        return 1
    try:
        orientation = image.getexif().get(ORIENTATION_TAG)
    except (OSError, ValueError, SyntaxError, struct.error):
        return 1
    return orientation if isinstance(orientation, int) and 1 <= orientation <= 8 else 1


def decode(data: bytes, header: Header, spec: ImageSpec) -> Pixels:
    """Decodes to uint8 (H, W, C), 0-255 BGR or grey, perhaps scaled down by 2, 4 or 8 but never below the target size."""
    if header.format in ("JPEG", "MPO") and header.mode in ("RGB", "L"):
        factor = power_of_two_factor(header, spec.image_size)
        scaled = simplejpeg.decode_jpeg(
            data,
            colorspace="BGR" if spec.channels == 3 else "GRAY",
            min_height=-(-header.height // factor),
            min_width=-(-header.width // factor),
            min_factor=1,
            strict=True,
        )
        return np.asarray(scaled, dtype=np.uint8)
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        flat = flatten(image).convert("RGB" if spec.channels == 3 else "L")
    pixels = np.asarray(flat, dtype=np.uint8)
    return np.ascontiguousarray(pixels[..., ::-1]) if spec.channels == 3 else pixels[..., None]


def power_of_two_factor(header: Header, image_size: int) -> int:
    """Returns the largest of 8, 4, 2, 1 by which the image may shrink and still cover image_size on both sides.

    Other factors of libjpeg's scaled decoding are slower than a full decode.
    """
    short = min(header.height, header.width)
    return next((factor for factor in (8, 4, 2) if short // factor >= image_size), 1)


def flatten(image: Image.Image) -> Image.Image:
    """Puts the first frame on a white background and brings 16-bit grey to 8 bits."""
    if image.mode.startswith("I"):
        wide = np.asarray(image, dtype=np.float64)
        return Image.fromarray(np.clip(wide / 257, 0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, (*BACKGROUND, 255)), rgba)
    return image


def orient(pixels: Pixels, orientation: int) -> Pixels:
    """Applies an EXIF orientation (1 to 8) to (H, W, C) pixels. Source: EXIF 2.3, tag 274."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return np.ascontiguousarray(pixels)


def resize(pixels: Pixels, spec: ImageSpec) -> Pixels:
    """Resizes (H, W, C) so that the shorter side, or both sides, are spec.image_size."""
    height, width = pixels.shape[:2]
    scale = spec.image_size / min(height, width)
    short = (max(round(width * scale), spec.image_size), max(round(height * scale), spec.image_size))
    size = (spec.image_size, spec.image_size) if spec.resize == "exact" else short
    if size == (width, height):
        return pixels
    shrinks = size[0] * size[1] < width * height
    resized = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
    return np.asarray(resized, dtype=np.uint8).reshape(size[1], size[0], pixels.shape[2])


def encode(pixels: Pixels, spec: ImageSpec) -> bytes:
    """Encodes (H, W, C) BGR or grey pixels as spec.codec says."""
    if spec.codec == "raw":
        buffer = io.BytesIO()
        np.save(buffer, pixels[..., ::-1] if spec.channels == 3 else pixels, allow_pickle=False)
        return buffer.getvalue()
    options = [cv2.IMWRITE_JPEG_QUALITY, spec.quality, cv2.IMWRITE_JPEG_PROGRESSIVE, 0]
    options += [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_420]
    options += [cv2.IMWRITE_JPEG_RST_INTERVAL, restart_interval(pixels.shape[1], spec.channels)]
    done, encoded = cv2.imencode(".jpg", pixels, options)
    if not done:
        raise ValueError(f"OpenCV could not encode {pixels.shape} pixels as JPEG")
    return encoded.tobytes()


def restart_interval(width: int, channels: int) -> int:
    """Returns how many MCUs lie between two restart markers: one that divides a row, so that the image is a grid of tiles."""
    row_mcus = -(-width // (16 if channels == 3 else 8))
    return next((interval for interval in (2, 3) if row_mcus % interval == 0), 1)


def decode_stored(image: bytes | memoryview, spec: ImageSpec) -> Pixels:
    """Decodes a stored image to uint8 (H, W, C), 0-255 RGB or grey, as any standard decoder would.

    Raises:
        ValueError: The bytes are not what `encode` writes.
    """
    if spec.codec == "jpeg":
        pixels = simplejpeg.decode_jpeg(image, colorspace="RGB" if spec.channels == 3 else "GRAY", strict=True)
    else:
        pixels = np.load(io.BytesIO(image), allow_pickle=False)
    return np.asarray(pixels, dtype=np.uint8)
