"""Image bytes to a stored sample or a reason for rejection, and back to pixels. Pure: no files, no URLs, no state.

The header is read and judged before any pixel is decoded (headers.py); then decode, orient, resize, encode. Small originals may be
kept, with restart markers added (restart.py). Images of adopted data sets, which others have stored, go through the same gate each time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import re
from collections.abc import Iterator
from typing import Literal

import cv2
import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image

from cvdist.errors import ConfigError
from cvdist.headers import (
    BACKGROUND,
    FORMATS,
    MAX_ASPECT,
    MAX_BYTES,
    MAX_PIXELS,
    NPY,
    Header,
    Rejected,
    Rules,
    jpeg_head,
    may_be_turned,
    read_header,
    read_orientation,
    unzipped,
)
from cvdist.restart import require_keep_original, restart_interval, with_restarts

__all__ = [
    "BACKGROUND",
    "MAX_ASPECT",
    "MAX_BYTES",
    "MAX_PIXELS",
    "Header",
    "ImageSpec",
    "Pixels",
    "Rejected",
    "Rules",
    "Sample",
    "convert",
    "decode_stored",
    "encode",
    "has_stored_size",
    "is_plain",
    "read_known_header",
    "read_stored_header",
    "require_keep_original",
]

Pixels = npt.NDArray[np.uint8]
NPY_PIXELS = re.compile(
    rb"\x93NUMPY\x01\x00..\{'descr': '\|u1', 'fortran_order': False, 'shape': \((\d{1,5}), (\d{1,5}), ([13])\), \} *\n",
    re.DOTALL,
)

RULES = Rules()


@dataclasses.dataclass(frozen=True)
class ImageSpec:
    """How the images of a data set are stored.

    Attributes:
        image_size: Pixels of the shorter side (resize=short) or of both (resize=exact); of adopted images, what training makes of them.
        resize: short or exact; none of adopted images, each of which has its own size.
        channels: 3 is RGB, 1 is grey; to which adopted images are brought.
        codec: jpeg, or raw: uint8 pixels behind a NumPy .npy header, as Petastorm's NdarrayCodec writes them. Of adopted images, any:
            whatever the bytes of each say, with the formats of `convert` and .npz; or pixels: uint8 of `shape` and nothing else.
        quality: JPEG quality, 1 to 100; 0 of adopted images.
        keep_original: Upright baseline JPEGs of these channels whose shorter side is at most image_size keep their pixels and size.
        shape: Height, width, channels of the codec pixels.
    """

    image_size: int
    resize: Literal["short", "exact", "none"]
    channels: Literal[1, 3]
    codec: Literal["jpeg", "raw", "any", "pixels"]
    quality: int
    keep_original: bool = False
    shape: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Sample:
    """One stored image: bytes as `ImageSpec.codec` says, height and width in pixels."""

    image: bytes
    height: int
    width: int


def convert(data: bytes, spec: ImageSpec, rules: Rules = RULES) -> Sample | Rejected:
    """Turns the bytes of an image file into a stored sample, or says why not.

    Raises:
        ConfigError: Originals are to be kept, and the program for it is not installed.
        MemoryError: There is too little to decode it.
    """
    try:
        with decoder_errors():
            header = read_header(data, rules)
            if isinstance(header, Rejected):
                return header
            pixels = decode(data, header, spec, rules)
            if spec.keep_original and (kept := keep(data, header, spec, pixels)):
                return kept
            pixels = resize(pixels, spec)
            return Sample(encode(pixels, spec), *pixels.shape[:2])
    except ValueError as error:
        return Rejected("undecodable", str(error))


@contextlib.contextmanager
def decoder_errors() -> Iterator[None]:
    """Turns all that decoders raise for a damaged image into ValueError.

    Raises:
        ValueError: The image is damaged.
        ConfigError, MemoryError: This machine lacks a program, or is too small, which says nothing about the image.
    """
    try:
        yield
    except (MemoryError, ConfigError):
        raise
    except Exception as error:  # one of the two broad catches of the design: any decoder error rejects this sample only
        if is_out_of_memory(error):
            raise MemoryError(str(error)) from error
        raise ValueError(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}") from error


def is_out_of_memory(error: Exception) -> bool:
    """Says whether OpenCV or libjpeg got no memory, which they report in ways of their own."""
    if isinstance(error, cv2.error):
        return bool(error.code == cv2.Error.StsNoMem)
    return isinstance(error, ValueError) and "nsufficient memory" in str(error)


def is_plain(header: Header) -> bool:
    """Says whether an image is an upright JPEG that libjpeg brings to RGB or grey by itself."""
    return is_simple_jpeg(header) and header.orientation == 1


def is_simple_jpeg(header: Header) -> bool:
    """Says whether an image is a JPEG that libjpeg brings to RGB or grey by itself."""
    return header.format in ("JPEG", "MPO") and header.mode in ("RGB", "L")


def decode(
    data: bytes, header: Header, spec: ImageSpec, rules: Rules = RULES, order: Literal["BGR", "RGB"] = "BGR"
) -> Pixels:
    """Decodes to uint8 (H, W, C), 0-255 colours or grey, upright.

    It may be scaled down by 2, 4 or 8, but never below the target size, if there is one.
    """
    if is_simple_jpeg(header):
        height, width = simplejpeg.decode_jpeg_header(data)[:2]
        if (height, width) != (header.height, header.width):
            raise ValueError(f"{width} x {height} pixels in one header, {header.width} x {header.height} in another")
        factor = 1 if spec.resize == "none" else power_of_two_factor(header, spec.image_size)
        scaled = simplejpeg.decode_jpeg(
            data,
            colorspace=order if spec.channels == 3 else "GRAY",
            min_height=-(-header.height // factor),
            min_width=-(-header.width // factor),
            min_factor=1,
            strict=True,
        )
        return orient(np.asarray(scaled, dtype=np.uint8), header.orientation)
    if header.format == NPY:
        array = np.load(io.BytesIO(data), allow_pickle=False)
        flat, orientation = from_array(array), 1
    else:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            image.load()
            orientation = read_orientation(image) if image.format in ("JPEG", "MPO", "PNG", "WEBP") else 1
            flat = flatten(image, png_bits(data), rules.background)
    return orient(channels_of(flat, spec, order), orientation)


def from_array(array: Pixels) -> Image.Image:
    """Returns uint8 (H, W), (H, W, 1) or (H, W, 3) as an image."""
    return Image.fromarray(array if array.shape[2:] == (3,) else array.reshape(array.shape[:2]))


def channels_of(image: Image.Image, spec: ImageSpec, order: Literal["BGR", "RGB"]) -> Pixels:
    """Returns the pixels of an image, uint8 (H, W, C), with the channels of the data set."""
    if spec.channels == 1:
        return np.asarray(image.convert("L"), dtype=np.uint8)[..., None]
    pixels = np.asarray(image.convert("RGB"), dtype=np.uint8)
    return pixels if order == "RGB" else pixels[..., ::-1]


def keep(data: bytes, header: Header, spec: ImageSpec, pixels: Pixels) -> Sample | None:
    """Returns a small original with restart markers added, where every one of its pixels stays as it is."""
    is_small = spec.resize == "short" and spec.codec == "jpeg" and min(header.height, header.width) <= spec.image_size
    if not is_small or header.format not in ("JPEG", "MPO") or header.orientation != 1:
        return None
    if simplejpeg.decode_jpeg_header(data)[2] != ("YCbCr" if spec.channels == 3 else "Gray"):
        return None
    image = with_restarts(data, spec.channels)
    if image is None:
        return None
    stored = simplejpeg.decode_jpeg(image, colorspace="BGR" if spec.channels == 3 else "GRAY", strict=True)
    return Sample(image, header.height, header.width) if np.array_equal(stored, pixels) else None


def power_of_two_factor(header: Header, image_size: int) -> int:
    """Returns the largest of 8, 4, 2, 1 by which the image may shrink and still cover image_size on both sides.

    Other factors of libjpeg's scaled decoding are slower than a full decode.
    """
    short = min(header.height, header.width)
    return next((factor for factor in (8, 4, 2) if short // factor >= image_size), 1)


def png_bits(data: bytes) -> int:
    """Returns the bits of one sample of a PNG; 8 for other formats. Source: PNG 1.2, section 4.1.1."""
    return data[24] if data[12:16] == b"IHDR" else 8


def flatten(image: Image.Image, bits: int, background: tuple[int, int, int]) -> Image.Image:
    """Puts the first frame, decoded from `bits` a sample, on a background, and brings 16-bit grey to 8 bits."""
    transparent = image.info.get("transparency")
    if image.mode.startswith("I"):
        wide = np.asarray(image)
        image = Image.fromarray(np.clip(wide // 257, 0, 255).astype(np.uint8))
        if transparent is not None:
            image.putalpha(Image.fromarray(np.where(wide == transparent, 0, 255).astype(np.uint8)))
    elif (
        isinstance(transparent, tuple) and bits == 16
    ):  # Pillow keeps the upper byte of each colour, but of this one both
        image.info["transparency"] = tuple(level >> 8 for level in transparent)
    elif (
        isinstance(transparent, int) and image.mode == "L" and bits in (2, 4)
    ):  # Pillow spreads grey to 0-255, but not this one
        image.info["transparency"] = transparent * 255 // (2**bits - 1)
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, (*background, 255)), rgba)
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
    options += [cv2.IMWRITE_JPEG_RST_INTERVAL, restart_interval(pixels.shape[1], 16 if spec.channels == 3 else 8)]
    done, encoded = cv2.imencode(".jpg", pixels, options)
    if not done:
        raise ValueError(f"OpenCV could not encode {pixels.shape} pixels as JPEG")
    return encoded.tobytes()


def decode_stored(image: bytes | memoryview, spec: ImageSpec) -> Pixels:
    """Decodes a stored image to uint8 (H, W, C), 0-255 RGB or grey, as any standard decoder would.

    Raises:
        ValueError: The bytes are not what `encode` writes, or of adopted images: what `read_stored_header` takes.
    """
    if spec.codec == "jpeg":
        pixels = simplejpeg.decode_jpeg(image, colorspace="RGB" if spec.channels == 3 else "GRAY", strict=True)
    elif spec.codec == "raw":
        pixels = read_npy(image)
    else:
        pixels = decode_adopted(image, spec)
    return np.asarray(pixels, dtype=np.uint8)


def read_npy(image: bytes | memoryview) -> Pixels:
    """Returns the pixels of a .npy file; those that `encode` wrote share its memory, for np.load takes half a millisecond.

    Source: numpy.lib.format, version 1.0.

    Raises:
        ValueError: It is damaged, or holds objects.
    """
    found = NPY_PIXELS.match(image)
    if found:
        height, width, channels = (int(number) for number in found.groups())
        if found.end() + height * width * channels == len(image):
            return np.frombuffer(image, np.uint8, offset=found.end()).reshape(height, width, channels)
    return np.asarray(np.load(io.BytesIO(image), allow_pickle=False), np.uint8)


def decode_adopted(image: bytes | memoryview, spec: ImageSpec) -> Pixels:
    """Decodes an image that others have stored.

    Raises:
        ValueError: It is damaged, or outside of the limits.
    """
    header = read_stored_header(image, spec)
    if spec.codec == "pixels":
        return channels_of(from_array(np.frombuffer(image, np.uint8).reshape(spec.shape)), spec, "RGB")
    with decoder_errors():
        stored = dataclasses.replace(header, height=header.width, width=header.height) if is_turned(header) else header
        pixels = decode(unzipped(bytes(image)), stored, spec, order="RGB")
    if pixels.shape[:2] != (header.height, header.width):
        found = f"{pixels.shape[1]} x {pixels.shape[0]}"
        raise ValueError(f"{found} pixels; expected {header.width} x {header.height}, as its header says")
    return pixels


def read_stored_header(image: bytes | memoryview, spec: ImageSpec) -> Header:
    """Returns what an image of an adopted data set says of itself, with the height and width that it has when it is upright.

    Raises:
        ValueError: It is damaged, of another kind, or outside of the limits.
    """
    if spec.codec == "pixels":
        height, width, channels = spec.shape
        if len(image) != height * width * channels:
            raise ValueError(
                f"{len(image)} bytes; expected {height} x {width} x {channels} = {height * width * channels}"
            )
        return Header("pixels", "RGB" if channels == 3 else "L", height, width, 1)
    with decoder_errors():
        data = unzipped(bytes(image))
        header = read_header(data, RULES)
        if isinstance(header, Header) and may_be_turned(data, header):
            with Image.open(io.BytesIO(data), formats=FORMATS) as opened:
                opened.load()
                header = dataclasses.replace(header, orientation=read_orientation(opened))
    if isinstance(header, Rejected):
        raise ValueError(header.detail)
    return dataclasses.replace(header, height=header.width, width=header.height) if is_turned(header) else header


def read_known_header(image: bytes | memoryview, spec: ImageSpec) -> Header:
    """Does what `read_stored_header` does, in a fifth of its time, for a JPEG that went through it before and says no orientation.

    Raises:
        ValueError: It is damaged.
    """
    head = jpeg_head(image) if spec.codec == "any" else None
    if head and not (b"Exif" in head or b"tiff:Orientation" in head):
        height, width, colours, _ = simplejpeg.decode_jpeg_header(image)
        if colours in ("YCbCr", "Gray"):
            return Header("JPEG", "RGB" if colours == "YCbCr" else "L", height, width, 1)
    return read_stored_header(image, spec)


def is_turned(header: Header) -> bool:
    """Says whether an image lies on its side as it is stored."""
    return header.orientation in (5, 6, 7, 8)


def has_stored_size(height: int, width: int, spec: ImageSpec) -> bool:
    """Says whether an image of these pixels can be one that `convert` stored."""
    if spec.resize == "exact":
        return height == width == spec.image_size
    short = min(height, width)
    return short == spec.image_size or (spec.keep_original and 1 <= short <= spec.image_size)
