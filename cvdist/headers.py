"""What the first bytes of an image file say, and whether that is within the limits: judged before any pixel is decoded.

Images.py is the door to this module; others ask that one.
"""

from __future__ import annotations

import dataclasses
import io
import re
import struct
import zipfile
from tokenize import TokenError
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

MAX_BYTES = 64 << 20
MAX_PIXELS = 64_000_000
MAX_ASPECT = 50
BACKGROUND = (255, 255, 255)
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF")
NPY = "NPY"  # a NumPy .npy file, which Pillow does not know
NPY_MAGIC = b"\x93NUMPY"
NPY_HEADER_BYTES = 1024
ORIENTATION_TAG = 0x0112
# Segments, chunks or blocks beside the pixels. Cameras and editors write less than a hundred; each costs Pillow time and memory.
MAX_PARTS = 10_000
# Scans of a JPEG, each of which touches the whole image. Encoders write about ten. Source: the limit that libjpeg-turbo is fuzzed with.
MAX_SCANS = 500
TINY_CHUNK_BYTES = 64

# Markers of a JPEG. Source: ITU-T T.81, table B.1.
SOF_BASELINE, SOF_PROGRESSIVE, DHT, JPG, DAC, SOI, EOI, SOS, DRI = 0xC0, 0xC2, 0xC4, 0xC8, 0xCC, 0xD8, 0xD9, 0xDA, 0xDD
FRAME_MARKERS = frozenset(range(0xC0, 0xD0)) - {DHT, JPG, DAC}
STANDALONE_MARKERS = frozenset({0x01, *range(0xD0, 0xD8)})
# A marker is a byte behind FF that is neither 0 nor FF; decoders skip everything else.
MARKER = re.compile(rb"\xff[\x01-\xfe]")

Image.MAX_IMAGE_PIXELS = None  # `read_header` judges the size, with a message of its own


@dataclasses.dataclass(frozen=True)
class Rules:
    """What an input may be, and what shows where it is transparent.

    Attributes:
        max_bytes: Larger files are rejected, unread.
        max_pixels: Of one image, height times width.
        max_aspect: How many times the shorter side the longer one may be.
        background: Red, green, blue, 0 to 255.
    """

    max_bytes: int = MAX_BYTES
    max_pixels: int = MAX_PIXELS
    max_aspect: int = MAX_ASPECT
    background: tuple[int, int, int] = BACKGROUND


@dataclasses.dataclass(frozen=True)
class Rejected:
    """Why an input is not in the data set: a short reason code and a sentence."""

    reason: str
    detail: str


@dataclasses.dataclass(frozen=True)
class Header:
    """What an image file says of itself.

    Attributes:
        format: As Pillow calls it, or NPY.
        mode: As Pillow calls it.
        height: Pixels, as stored.
        width: Pixels, as stored.
        orientation: EXIF's, 1 to 8, of a JPEG; of other formats it is known only when they are decoded.
    """

    format: str
    mode: str
    height: int
    width: int
    orientation: int


@dataclasses.dataclass(frozen=True)
class Frame:
    """The headers of a JPEG up to its first scan.

    Attributes:
        marker: SOF_BASELINE or another marker of a frame.
        bits: Of one sample.
        height: Pixels.
        width: Pixels.
        factors: Horizontal and vertical sampling factor of each component.
        restart_interval: MCUs from one restart marker to the next; 0: there are none.
        scan_components: How many components the first scan has.
    """

    marker: int
    bits: int
    height: int
    width: int
    factors: tuple[tuple[int, int], ...]
    restart_interval: int
    scan_components: int

    @property
    def mcu_width(self) -> int:
        """The width in pixels of what a restart interval counts. Source: ITU-T T.81, section A.2."""
        return 8 if len(self.factors) == 1 else 8 * max(horizontal for horizontal, _ in self.factors)


def read_header(data: bytes, rules: Rules) -> Header | Rejected:
    """Reads format, size and orientation, and judges them.

    Raises:
        OSError, ValueError: The file is of a known format and damaged.
    """
    rejected = judge_bytes(data, rules) or judge_parts(data)
    if rejected:
        return rejected
    if data.startswith(NPY_MAGIC):
        return read_array_header(data, rules)
    if (size := webp_canvas(data)) and (rejected := judge_size(*size, rules)):
        return rejected  # Pillow has the canvas allocated when it opens the file
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if rejected := judge_size(image.height, image.width, rules):
                return rejected
            orientation = read_orientation(image) if image.format in ("JPEG", "MPO") else 1
            return Header(image.format or "", image.mode, image.height, image.width, orientation)
    except (UnidentifiedImageError, SyntaxError):
        return Rejected("not_an_image", f"starts with {data[:8]!r}; expected one of {', '.join((*FORMATS, NPY))}")


def judge_bytes(data: bytes, rules: Rules) -> Rejected | None:
    """Rejects an empty file and one that is too large."""
    if not data:
        return Rejected("empty", "the file holds no bytes; expected an image")
    if len(data) > rules.max_bytes:
        return Rejected("too_many_bytes", f"{len(data)} bytes; expected at most {rules.max_bytes}")
    return None


def judge_size(height: int, width: int, rules: Rules) -> Rejected | None:
    """Rejects images that are too large or too thin."""
    if height * width > rules.max_pixels:
        return Rejected("too_many_pixels", f"{width} x {height} pixels; expected at most {rules.max_pixels} in all")
    if max(height, width) > rules.max_aspect * min(height, width):
        return Rejected("extreme_aspect", f"{width} x {height} pixels; expected sides within 1:{rules.max_aspect}")
    return None


def judge_parts(data: bytes) -> Rejected | None:
    """Rejects files made of so many parts that to read them, or to decode them, takes minutes or gigabytes."""
    if data.startswith(b"\xff\xd8"):
        frame, num_parts = read_frame(data)
        is_multi_scan = frame and (frame.marker == SOF_PROGRESSIVE or frame.scan_components < len(frame.factors))
        if is_multi_scan and (num_scans := data.count(bytes([0xFF, SOS]))) > MAX_SCANS:
            return Rejected("too_many_parts", f"{num_scans} scans; expected at most {MAX_SCANS}")
    elif data.startswith(b"\x89PNG"):
        num_parts = count_chunks(data)
    elif data.startswith(b"GIF8"):
        num_parts = count_blocks(data)
    else:
        return None
    if num_parts > MAX_PARTS:
        return Rejected("too_many_parts", f"more than {MAX_PARTS} parts beside the pixels; expected an image")
    return None


def read_frame(data: bytes) -> tuple[Frame | None, int]:
    """Reads the segments of a JPEG up to its first scan; also returns how many segments and bytes between them there are.

    Source: ITU-T T.81, annex B; what lies between segments is skipped as libjpeg does.
    """
    frame, interval, place, num_parts = None, 0, 2, 0
    while num_parts <= MAX_PARTS and (found := MARKER.search(data, place)):
        marker, start = data[found.end() - 1], found.end()
        num_parts += 1 + found.start() - place
        place = start
        if marker in STANDALONE_MARKERS:
            continue
        content = data[start + 2 : start + int.from_bytes(data[start : start + 2], "big")]
        place += 2 + len(content)
        if marker in (SOI, EOI):
            break
        if marker == SOS:
            return (frame and dataclasses.replace(frame, scan_components=content[0] if content else 0)), num_parts
        if marker == DRI and len(content) == 2:
            interval = int.from_bytes(content, "big")
            frame = frame and dataclasses.replace(frame, restart_interval=interval)
        if marker in FRAME_MARKERS and len(content) >= 6:
            bits, height, width, _ = struct.unpack(">BHHB", content[:6])
            factors = tuple(divmod(pair, 16) for pair in content[7::3])
            frame = Frame(marker, bits, height, width, factors, interval, 0)
    return None, num_parts


def jpeg_head(image: bytes | memoryview) -> bytes | None:
    """Returns what stands before the first scan of a JPEG; None for other files, and where segments do not follow one on the other."""
    place = 2
    while bytes(image[:2]) == b"\xff\xd8" and place + 4 <= len(image) and image[place] == 0xFF:
        marker = image[place + 1]
        if marker == SOS:
            return bytes(image[:place])
        if marker == 0xFF or marker in STANDALONE_MARKERS:
            return None
        place += 2 + (image[place + 2] << 8 | image[place + 3])
    return None


def count_chunks(data: bytes) -> int:
    """Counts the chunks of a PNG but those that hold pixels. Source: PNG 1.2, section 3.2."""
    place, num_parts = 8, 0
    while place + 8 <= len(data) and num_parts <= MAX_PARTS:
        size, name = struct.unpack_from(">I4s", data, place)
        num_parts += name not in (b"IDAT", b"fdAT") or size < TINY_CHUNK_BYTES
        place += 12 + size
    return num_parts


def count_blocks(data: bytes) -> int:
    """Counts the blocks of a GIF before its first frame. Source: GIF89a, sections 15, 18 to 20."""
    place = 13 + (3 << (data[10] % 8 + 1) if len(data) > 10 and data[10] & 0x80 else 0)
    num_parts, in_extension = 0, False
    while place < len(data) and num_parts <= MAX_PARTS:
        byte = data[place]
        num_parts += 1
        if in_extension:
            place, in_extension = place + 1 + byte, byte > 0
        elif byte == 0x21:
            place, in_extension = place + 2, True
        elif byte == 0x2C:
            break
        else:
            place += 1
    return num_parts


def webp_canvas(data: bytes) -> tuple[int, int] | None:
    """Returns height and width of a WebP. Source: the WebP container specification; RFC 6386, 9.1; WebP lossless, section 3."""
    if len(data) < 30 or data[:4] != b"RIFF" or data[8:12] != b"WEBP":
        return None
    kind = data[12:16]
    if kind == b"VP8X":
        return int.from_bytes(data[27:30], "little") + 1, int.from_bytes(data[24:27], "little") + 1
    if kind == b"VP8L" and data[20] == 0x2F:
        bits = int.from_bytes(data[21:25], "little")
        return (bits >> 14 & 0x3FFF) + 1, (bits & 0x3FFF) + 1
    if kind == b"VP8 " and data[23:26] == b"\x9d\x01\x2a":
        return int.from_bytes(data[28:30], "little") & 0x3FFF, int.from_bytes(data[26:28], "little") & 0x3FFF
    return None


def read_array_header(data: bytes, rules: Rules) -> Header | Rejected:
    """Reads the header of a .npy file, and judges it. Source: NEP 1, A simple file format for NumPy arrays."""
    expected = "expected uint8 (H, W), (H, W, 1) or (H, W, 3); save the array so"
    stream = io.BytesIO(data[: NPY_HEADER_BYTES + 12])
    npy: Any = np.lib.format
    try:
        is_first = npy.read_magic(stream) == (1, 0)
        read = npy.read_array_header_1_0 if is_first else npy.read_array_header_2_0
        shape, _, dtype = read(stream, max_header_size=NPY_HEADER_BYTES)
    except (ValueError, SyntaxError, TypeError, TokenError, RecursionError, MemoryError):  # the last two: deeply nested
        return Rejected("bad_array", f"the .npy header cannot be read; {expected}")
    if dtype != np.uint8 or len(shape) not in (2, 3) or shape[2:] not in ((), (1,), (3,)) or min(shape) < 1:
        return Rejected("bad_array", f"a .npy file of {dtype} {shape}; {expected}")
    height, width = shape[:2]
    return judge_size(height, width, rules) or Header(NPY, "RGB" if shape[2:] == (3,) else "L", height, width, 1)


def read_orientation(image: Image.Image) -> int:
    """Returns the EXIF orientation, 1 to 8; 1, upright, where there is none or it cannot be read."""
    try:
        orientation = image.getexif().get(ORIENTATION_TAG)
    except (OSError, ValueError, SyntaxError, struct.error):
        return 1
    return orientation if isinstance(orientation, int) and 1 <= orientation <= 8 else 1


def may_be_turned(data: bytes, header: Header) -> bool:
    """Says whether a PNG or WebP may hold an orientation, which Pillow finds only when it decodes the image.

    Source: PNG 1.2 with the chunk eXIf, and the texts that Pillow reads; the WebP container specification, the flags of VP8X.
    """
    if header.format == "PNG":
        return any(name in data for name in (b"eXIf", b"Raw profile type", b"XML:com.adobe.xmp"))
    return header.format == "WEBP" and data[12:16] == b"VP8X" and bool(data[20] & 0x0C)


def unzipped(data: bytes) -> bytes:
    """Returns the one array in a .npz file, as Petastorm's CompressedNdarrayCodec writes it; other bytes as they are.

    Raises:
        ValueError: It holds more than one array, or one outside of the limits.
    """
    if not data.startswith(b"PK\x03\x04"):
        return data
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = archive.infolist()
        if len(members) != 1 or not members[0].filename.endswith(".npy") or members[0].file_size > MAX_BYTES:
            raise ValueError(f"a .npz file of {len(members)} members; expected one array of at most {MAX_BYTES} bytes")
        with archive.open(members[0]) as member:
            array = member.read(MAX_BYTES + 1)
    if len(array) != members[0].file_size:
        raise ValueError(f"the array in the .npz file has not the {members[0].file_size} bytes that it says")
    return array
