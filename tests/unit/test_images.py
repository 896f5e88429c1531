"""Bytes to stored images: what is stored is what a standard decoder sees, and what cannot be stored is rejected with a reason."""

from __future__ import annotations

import io
import itertools
import re
import struct
import time
import tracemalloc
import zlib
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
import numpy.typing as npt
import pytest
import simplejpeg
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from cvdist.images import (
    MAX_ASPECT,
    MAX_BYTES,
    ImageSpec,
    Pixels,
    Rejected,
    Rules,
    Sample,
    convert,
    decode_stored,
    encode,
)

PHOTOS = Path(__file__).resolve().parents[3] / "shared" / "data" / "clothing"
FORMATS = ["JPEG", "PNG", "WEBP", "BMP", "GIF"]


def spec(
    image_size: int = 32,
    resize: Literal["short", "exact"] = "short",
    channels: Literal[1, 3] = 3,
    codec: Literal["jpeg", "raw"] = "raw",
    quality: int = 90,
) -> ImageSpec:
    """Returns how images are stored; raw by default, so that pixels can be compared."""
    return ImageSpec(image_size, resize, channels, codec, quality)


def photo(height: int = 48, width: int = 64, seed: int = 0) -> Pixels:
    """Returns smooth colours that differ in every corner, with some noise: uint8 (H, W, 3) RGB."""
    y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    noise = np.random.default_rng(seed).normal(0, 4, (height, width, 3))
    pixels: npt.NDArray[np.float64] = np.stack([220 * x, 220 * y, 200 * (1 - x) * (1 - y)], axis=-1) + 20 + noise
    return np.clip(pixels, 0, 255).astype(np.uint8)


def file_of(pixels: Any, kind: str = "JPEG", mode: str | None = None, **options: Any) -> bytes:
    """Returns an image file."""
    image = Image.fromarray(pixels)
    buffer = io.BytesIO()
    (image.convert(mode) if mode else image).save(buffer, kind, **options)
    return buffer.getvalue()


def stored(data: bytes, how: ImageSpec, rules: Rules | None = None) -> Pixels:
    """Converts what must be convertible, and decodes it again."""
    sample = convert(data, how, rules or Rules())
    assert isinstance(sample, Sample), sample
    pixels = decode_stored(sample.image, how)
    assert pixels.shape == (sample.height, sample.width, how.channels)
    assert pixels.dtype == np.uint8
    return pixels


def rejection(data: bytes, rules: Rules | None = None) -> Rejected:
    """Converts what must not be convertible."""
    rejected = convert(data, spec(), rules or Rules())
    assert isinstance(rejected, Rejected)
    assert rejected.detail
    return rejected


def as_pillow_sees(data: bytes, mode: str = "RGB") -> Pixels:
    """Returns upright pixels, as Pillow decodes them."""
    pixels = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert(mode))
    return pixels if mode == "RGB" else pixels[..., None]


def oriented(orientation: int, pixels: Pixels | None = None) -> bytes:
    """Returns a JPEG with an EXIF orientation."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return file_of(photo() if pixels is None else pixels, exif=exif.tobytes())


def test_every_exif_orientation_is_turned_upright() -> None:
    seen = []
    for orientation in range(1, 9):
        data = oriented(orientation)
        pixels = stored(data, spec(48))
        np.testing.assert_array_equal(pixels, as_pillow_sees(data))
        seen.append(pixels)
    for one, other in itertools.combinations(seen, 2):
        assert one.shape != other.shape or np.abs(one.astype(int) - other).mean() > 20, (
            "the photo does not tell turns apart"
        )


def test_orientation_survives_scaled_decoding() -> None:
    for orientation in (1, 3, 6, 8):
        data = oriented(orientation, photo(192, 256))
        pixels = stored(data, spec(24))
        reference = cv2.resize(as_pillow_sees(data), pixels.shape[1::-1], interpolation=cv2.INTER_AREA)
        assert np.abs(pixels.astype(int) - reference).mean() < 3


@pytest.mark.parametrize("orientation", [0, 9, 77, 65535])
def test_an_orientation_that_is_none_means_upright(orientation: int) -> None:
    np.testing.assert_array_equal(stored(oriented(orientation), spec(48)), stored(file_of(photo()), spec(48)))


ORIENTED_ABC = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x02\0\0\0\x04abc\0\0\0\0\0"  # a text in the place of a number


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data", "ignore:Truncated File Read")
@pytest.mark.parametrize("exif", [b"Exif\0\0nonsense", b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\x7f", ORIENTED_ABC])
def test_damaged_exif_does_not_lose_the_photo(exif: bytes) -> None:
    np.testing.assert_array_equal(stored(file_of(photo(), exif=exif), spec(48)), stored(file_of(photo()), spec(48)))


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_is_stored_as_pillow_sees_it(kind: str) -> None:
    data = file_of(photo(), kind)
    np.testing.assert_array_equal(stored(data, spec(48)), as_pillow_sees(data))


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("share", [0.0, 0.02, 0.3, 0.6, 0.9])
def test_a_truncated_file_is_rejected(kind: str, share: float) -> None:
    data = file_of(photo(), kind)
    cut = rejection(data[: int(share * len(data))])
    assert cut.reason == "empty" if share == 0 else cut.reason in ("not_an_image", "undecodable")


def test_a_jpeg_without_its_last_two_bytes_is_rejected() -> None:
    for progressive in (False, True):
        assert rejection(file_of(photo(), progressive=progressive)[:-2]).reason == "undecodable"


def test_what_is_no_image_is_rejected_with_its_first_bytes() -> None:
    for data in (
        b"this is text, named .jpg\n",
        np.random.default_rng(0).bytes(5000),
        b"\x00",
        b"%PDF-1.4",
        b"II*\0" + bytes(100),
    ):
        rejected = rejection(data)
        assert rejected.reason == "not_an_image"
        assert repr(data[:8]) in rejected.detail
        assert "expected one of JPEG, PNG, WEBP, BMP, GIF, NPY" in rejected.detail


def chunk(name: bytes, content: bytes) -> bytes:
    """Returns a chunk of a PNG."""
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png(
    width: int,
    height: int,
    rows: bytes,
    bits: int = 8,
    colour_type: int = 2,
    interlace: int = 0,
    before: bytes = b"",
    after: bytes = b"",
) -> bytes:
    """Returns a PNG of any claimed size, with chunks before and after its pixels."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour_type, 0, 0, interlace))
    pixels = chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + header + before + pixels + after + chunk(b"IEND", b"")


def test_a_decompression_bomb_is_rejected_by_its_header_alone() -> None:
    bombs = {
        "30000 x 30000": png(30000, 30000, bytes(100_000)),
        "8001 x 8000": png(8001, 8000, bytes(100_000)),
        "65535 x 65535": b"GIF89a"
        + struct.pack("<HHBBB", 65535, 65535, 0, 0, 0)
        + b",\0\0\0\0\xff\xff\xff\xff\0\x02\0;",
    }
    for size, bomb in bombs.items():
        started_s = time.process_time()
        rejected = rejection(bomb)
        assert time.process_time() - started_s < 0.1
        assert rejected.reason == "too_many_pixels"
        assert rejected.detail.startswith(size)


def test_a_first_frame_beyond_the_screen_of_a_gif_does_not_pass_the_limits() -> None:
    screen = b"GIF89a" + struct.pack("<HHBBB", 10, 10, 0, 0, 0)
    data = screen + b"," + struct.pack("<HHHHB", 0, 0, 60000, 60000, 0) + b"\x02\x02\x4c\x01\0;"
    rejected = rejection(data)
    assert (rejected.reason, rejected.detail[:13]) == ("too_many_pixels", "60000 x 60000")


def peak_kib() -> int:
    """Returns the most address space that this process has had."""
    return int(re.search(r"VmPeak:\s+(\d+)", Path("/proc/self/status").read_text())[1])  # type: ignore[index]


def test_the_canvas_of_a_webp_is_judged_before_it_is_allocated() -> None:
    frames = [Image.fromarray(photo(seed=seed)) for seed in range(2)]
    buffer = io.BytesIO()
    frames[0].save(buffer, "WEBP", save_all=True, append_images=frames[1:])
    moving = bytearray(buffer.getvalue())
    assert moving[12:16] == b"VP8X"
    moving[24:30] = b"\xff\x7f\0" * 2
    still = bytearray(file_of(photo(), "WEBP"))
    still[26:30] = b"\xff\x3f\xff\x3f"
    lossless = bytearray(file_of(photo(), "WEBP", lossless=True))
    lossless[21:25] = (0x3FFF | 0x3FFF << 14).to_bytes(4, "little")
    before_kib = peak_kib()
    for data, size in ((moving, "32768 x 32768"), (still, "16383 x 16383"), (lossless, "16384 x 16384")):
        rejected = rejection(bytes(data))
        assert rejected.reason == "too_many_pixels"
        assert rejected.detail.startswith(size)
    assert peak_kib() < before_kib + 500_000


def test_a_second_header_does_not_pass_the_limits() -> None:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 30000, 30000, 8, 2, 0, 0, 0))
    assert rejection(png(4, 4, bytes(52), before=header)).reason == "too_many_pixels"
    data = file_of(photo())
    start = data.index(b"\xff\xc0")
    frame = bytearray(data[start : start + 2 + int.from_bytes(data[start + 2 : start + 4], "big")])
    frame[5:9] = struct.pack(">HH", 60000, 60000)
    assert rejection(data[:start] + frame + data[start:]).reason == "undecodable"
    assert rejection(data[: start + len(frame)] + frame + data[start + len(frame) :]).reason == "too_many_pixels"


def floods() -> dict[str, bytes]:
    """Returns files of 40 MB and more that consist of nearly nothing but parts beside the pixels."""
    jpeg, gif = file_of(photo()), file_of(photo(), "GIF")
    progressive = file_of(photo(), progressive=True)
    last_scan = progressive[progressive.rindex(b"\xff\xda") : -2]
    frame = gif.index(b",\0\0\0\0")
    row = b"\0" + bytes(12)
    return {
        "segments": jpeg[:2] + b"\xff\xe1\0\2" * 12_000_000 + jpeg[2:],
        "markers": jpeg[:2] + b"\xff\x01" * 20_000_000 + jpeg[2:],
        "fill": jpeg[:20] + b"\xff" * 50_000_000 + jpeg[20:],
        "scans": progressive[:-2] + last_scan * 501 + progressive[-2:],
        "texts": png(4, 4, row * 4, before=chunk(b"tEXt", b"k\0v") * 3_000_000),
        "texts behind": png(4, 4, row * 4, after=chunk(b"tEXt", b"k\0v") * 3_000_000),
        "empty pixels": png(4, 4, row * 4, before=chunk(b"IDAT", b"") * 4_000_000),
        "comments": gif[:frame] + b"\x21\xfe\1a\0" * 10_000_000 + gif[frame:],
        "junk": gif[:frame] + bytes(50_000_000) + gif[frame:],
    }


def test_a_flood_of_parts_is_rejected_in_no_time() -> None:
    for name, data in floods().items():
        started_s = time.process_time()
        rejected = rejection(data)
        assert time.process_time() - started_s < 1, name
        assert rejected.reason == "too_many_parts", name
        assert re.search("[0-9]+ (scans|parts)", rejected.detail)


def test_as_many_parts_as_programs_write_are_no_flood() -> None:
    jpeg, gif, row = file_of(photo()), file_of(photo(), "GIF"), b"\0" + bytes(12)
    profile = b"\xff\xe2" + struct.pack(">H", 60_000) + bytes(59_998)
    frame = gif.index(b",\0\0\0\0")
    for data in (
        jpeg[:2] + profile * 255 + jpeg[2:],
        png(4, 4, row * 4, before=chunk(b"tEXt", b"k\0" + b"v" * 50_000) * 100),
        gif[:frame] + b"\x21\xfe" + (b"\xff" + bytes(255)) * 1000 + b"\0" + gif[frame:],
    ):
        assert isinstance(convert(data, spec()), Sample)


def test_compressed_texts_and_profiles_cannot_fill_the_memory() -> None:
    zeros = zlib.compress(bytes(200_000_000), 9)
    row = b"\0" + bytes(12)
    bombs = [
        chunk(b"zTXt", b"k\0\0" + zeros),
        chunk(b"iTXt", b"k\0\1\0\0\0" + zeros),
        chunk(b"iCCP", b"k\0\0" + zeros),
        chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(1_000_000), 9)) * 200,
    ]
    for bomb in bombs:
        for data in (png(4, 4, row * 4, before=bomb), png(4, 4, row * 4, after=bomb)):
            tracemalloc.start()
            started_s = time.process_time()
            result = convert(data, spec(4))
            seconds, (_, peak_bytes) = time.process_time() - started_s, tracemalloc.get_traced_memory()
            tracemalloc.stop()
            assert seconds < 1
            assert peak_bytes < 150_000_000
            assert isinstance(result, Rejected)
            assert result.reason == "undecodable"


def test_every_limit_is_the_one_that_was_asked_for() -> None:
    data = file_of(photo(40, 80), "PNG")
    rules = {"max_bytes": len(data), "max_pixels": 3200, "max_aspect": 2}
    assert isinstance(convert(data, spec(), Rules(**rules)), Sample)
    for name, reason in {
        "max_bytes": "many_bytes",
        "max_pixels": "many_pixels",
        "max_aspect": "extreme_aspect",
    }.items():
        limit = rules[name] - 1
        rejected = rejection(data, Rules(**{**rules, name: limit}))
        assert rejected.reason.endswith(reason)
        assert str(limit) in rejected.detail
    for other in (array_file(photo(40, 80)), file_of(photo(40, 80), "WEBP"), file_of(photo(40, 80))):
        assert rejection(other, Rules(max_pixels=3199)).reason == "too_many_pixels"


def test_too_many_bytes_are_rejected_before_they_are_looked_at() -> None:
    rejected = rejection(file_of(photo()) + bytes(MAX_BYTES))
    assert rejected.reason == "too_many_bytes"
    assert str(MAX_BYTES) in rejected.detail


def test_extreme_aspects_are_rejected_and_the_limit_itself_is_not() -> None:
    for height, width in ((1, MAX_ASPECT + 1), (MAX_ASPECT + 1, 1), (8, 401)):
        rejected = rejection(file_of(photo(height, width), "PNG"))
        assert rejected.reason == "extreme_aspect"
        assert f"{width} x {height}" in rejected.detail
    assert stored(file_of(photo(1, MAX_ASPECT), "PNG"), spec(32)).shape == (32, 32 * MAX_ASPECT, 3)


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
@pytest.mark.parametrize("resize", ["short", "exact"])
def test_a_single_pixel_fills_the_image(kind: str, resize: Literal["short", "exact"]) -> None:
    pixel = np.full((1, 1, 3), (200, 100, 50), np.uint8)
    pixels = stored(file_of(pixel, kind), spec(32, resize))
    assert pixels.shape == (32, 32, 3)
    assert np.ptp(pixels.reshape(-1, 3), axis=0).max() == 0
    assert np.abs(pixels[0, 0].astype(int) - (200, 100, 50)).max() <= 4


def test_a_palette_is_looked_up() -> None:
    data = file_of(photo(), "PNG", "P")
    np.testing.assert_array_equal(stored(data, spec(48)), as_pillow_sees(data))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
def test_alpha_is_put_on_white(mode: str) -> None:
    rgba = np.dstack(
        [
            np.full((40, 40, 3), 100, np.uint8),
            np.repeat(np.array([[0], [51], [255], [255]], np.uint8), 10, axis=0).repeat(40, 1),
        ]
    )
    image = Image.fromarray(rgba)
    if mode == "PA":
        image = image.convert("P")
        image.info["transparency"] = bytes([0] * 256)
    buffer = io.BytesIO()
    (image if mode == "PA" else image.convert(mode)).save(buffer, "PNG")
    rows = stored(buffer.getvalue(), spec(40))[:, 20]
    expected = [255, 255, 255, 255] if mode == "PA" else [255, 224, 100, 100]  # 100 * 0.2 + 255 * 0.8 = 224
    for found, level in zip(rows[5::10], expected, strict=True):
        assert np.abs(found.astype(int) - level).max() <= 1


def test_a_transparent_colour_is_put_on_white() -> None:
    pixels = np.zeros((40, 40, 3), np.uint8)
    pixels[:, 20:] = (10, 20, 30)
    found = stored(file_of(pixels, "PNG", transparency=(0, 0, 0)), spec(40))
    assert found[0, 0].tolist() == [255, 255, 255]
    assert found[0, 39].tolist() == [10, 20, 30]


def test_sixteen_bits_become_eight() -> None:
    ramp = np.linspace(0, 65535, 40 * 40).reshape(40, 40).astype(np.uint16)
    grey = stored(file_of(ramp, "PNG"), spec(40))
    assert np.abs(grey[..., 0].astype(int) - ramp / 257).max() <= 1
    np.testing.assert_array_equal(grey[..., 0], grey[..., 2])
    done, colour = cv2.imencode(".png", np.dstack([ramp, ramp[::-1], ramp.T])[..., ::-1])
    assert done
    found = stored(colour.tobytes(), spec(40))
    assert np.abs(found.astype(int) - np.dstack([ramp, ramp[::-1], ramp.T]) / 257).max() <= 1


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_one_transparent_grey_is_put_on_the_background_whatever_the_bits(bits: int) -> None:
    # Four rows of 16 pixels: black and white take turns; white is transparent.
    white = 2**bits - 1
    row = int("".join(format(level, f"0{bits}b") for level in [0, white] * 8), 2).to_bytes(2 * bits, "big")
    data = png(16, 4, (b"\0" + row) * 4, bits, colour_type=0, before=chunk(b"tRNS", struct.pack(">H", white)))
    found = stored(data, spec(4), Rules(background=(10, 20, 30)))
    assert found[0, 0].tolist() == [0, 0, 0]
    assert found[0, 1].tolist() == [10, 20, 30]


@pytest.mark.parametrize("bits", [8, 16])
def test_one_transparent_colour_is_put_on_the_background_whatever_the_bits(bits: int) -> None:
    kind = ">BBB" if bits == 8 else ">HHH"
    first, second = (0x12, 0x34, 0x56), (0x65, 0x43, 0x21)
    if bits == 16:
        first, second = (0x1256, 0x3478, 0x5690), (0x6512, 0x4312, 0x2112)
    row = b"\0" + (struct.pack(kind, *first) + struct.pack(kind, *second)) * 2
    data = png(4, 4, row * 4, bits, before=chunk(b"tRNS", struct.pack(">HHH", *first)))
    found = stored(data, spec(4), Rules(background=(1, 2, 3)))
    assert found[0, :2].tolist() == [[1, 2, 3], [0x65, 0x43, 0x21]]


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_alpha_is_put_on_the_background_that_was_asked_for(kind: str) -> None:
    rgba = np.dstack([np.full((32, 32, 3), 100, np.uint8), np.repeat([[0, 51, 255, 255]], 32, axis=0).repeat(8, 1)])
    found = stored(file_of(rgba.astype(np.uint8), kind, lossless=True), spec(32), Rules(background=(0, 200, 50)))
    expected = [(0, 200, 50), (20, 180, 60), (100, 100, 100), (100, 100, 100)]
    assert np.abs(found[5, 4::8].astype(int) - expected).max() <= 1


def test_a_palette_with_alpha_is_put_on_the_background() -> None:
    palette = chunk(b"PLTE", bytes([255, 0, 0, 0, 0, 255])) + chunk(b"tRNS", bytes([255, 51]))
    found = stored(png(4, 4, b"\0\0\1\0\1" * 4, colour_type=3, before=palette), spec(4), Rules(background=(100, 0, 5)))
    assert found[0, :2].tolist() == [[255, 0, 0], [80, 0, 55]]


def interlaced(pixels: Pixels) -> bytes:
    """Returns an interlaced PNG. Source: PNG 1.2, section 2.6."""
    passes = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)]
    rows = [row for y, x, by, bx in passes for row in pixels[y::by, x::bx] if row.size]
    return png(pixels.shape[1], pixels.shape[0], b"".join(b"\0" + row.tobytes() for row in rows), interlace=1)


@pytest.mark.parametrize("size", [(48, 64), (33, 41), (5, 3), (1, 1)])
def test_interlacing_changes_nothing(size: tuple[int, int]) -> None:
    pixels = photo(*size)
    np.testing.assert_array_equal(stored(interlaced(pixels), spec(min(size))), pixels)


def test_exif_turns_png_and_webp_too() -> None:
    exif = Image.Exif()
    for orientation in range(1, 9):
        exif[0x0112] = orientation
        turned = stored(file_of(photo(), "PNG", exif=exif), spec(48))
        np.testing.assert_array_equal(turned, as_pillow_sees(oriented_png := file_of(photo(), "PNG", exif=exif)))
        assert turned.shape == ((48, 64, 3) if orientation < 5 else (64, 48, 3))
        np.testing.assert_array_equal(stored(file_of(photo(), "WEBP", exif=exif, lossless=True), spec(48)), turned)
        # The chunk may come behind the pixels.
        start = oriented_png.index(b"eXIf") - 4
        size = 12 + int.from_bytes(oriented_png[start : start + 4], "big")
        without = oriented_png[:start] + oriented_png[start + size :]
        moved = without[:-12] + oriented_png[start : start + size] + without[-12:]
        np.testing.assert_array_equal(stored(moved, spec(48)), turned)


def test_a_broken_exif_means_upright() -> None:
    for exif in (b"", b"II", b"II*\0\xff\xff\xff\xff", b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03", bytes(40)):
        data = png(4, 2, b"\0" + bytes(range(12)) + b"\0" + bytes(12), before=chunk(b"eXIf", exif))
        assert stored(data, spec(2))[0].tolist() == np.arange(12).reshape(4, 3).tolist()


@pytest.mark.parametrize("options", [{"lossless": True}, {"quality": 90}, {"quality": 80, "method": 0}])
def test_webp_is_stored_as_pillow_sees_it(options: dict[str, Any]) -> None:
    data = file_of(photo(), "WEBP", **options)
    np.testing.assert_array_equal(stored(data, spec(48)), as_pillow_sees(data))
    assert np.abs(as_pillow_sees(data).astype(int) - photo()).mean() < 6


def test_a_ycck_jpeg_and_one_of_plain_rgb_have_the_colours_they_were_made_of() -> None:
    inks = np.dstack([photo(), np.full((48, 64), 255, np.uint8)])  # Adobe's inks are inverted: 255 is none
    ycck = simplejpeg.encode_jpeg(inks, 95, "CMYK", "444")
    assert simplejpeg.decode_jpeg_header(ycck)[2] == "YCCK"
    rgb = file_of(photo(), keep_rgb=True, quality=95)
    assert simplejpeg.decode_jpeg_header(rgb)[2] == "RGB"
    for data in (ycck, rgb):
        pixels = stored(data, spec(48))
        np.testing.assert_array_equal(pixels, as_pillow_sees(data))
        assert np.abs(pixels.astype(int) - photo()).mean() < 4


def array_file(array: npt.NDArray[Any], **options: Any) -> bytes:
    """Returns a .npy file."""
    buffer = io.BytesIO()
    np.save(buffer, array, **options)
    return buffer.getvalue()


def test_arrays_are_stored_as_they_are() -> None:
    for array in (photo(), np.asfortranarray(photo())):
        np.testing.assert_array_equal(stored(array_file(array), spec(48)), photo())
    grey = photo()[..., 0]
    for array in (grey, grey[..., None], np.asfortranarray(grey)):
        np.testing.assert_array_equal(stored(array_file(array), spec(48)), np.repeat(grey[..., None], 3, axis=2))
        np.testing.assert_array_equal(stored(array_file(array), spec(48, channels=1)), grey[..., None])
    reference = as_pillow_sees(file_of(photo(), "PNG"), "L")
    np.testing.assert_array_equal(stored(array_file(photo()), spec(48, channels=1)), reference)


def test_a_stored_raw_image_can_be_prepared_again() -> None:
    first = convert(file_of(photo()), spec(48))
    assert isinstance(first, Sample)
    assert convert(first.image, spec(48)) == first


@pytest.mark.parametrize(
    "array",
    [
        photo().astype(np.float32),
        photo().astype(np.int8),
        photo().astype(np.uint16),
        np.zeros((4, 4, 4), np.uint8),
        np.zeros((2, 4, 4, 3), np.uint8),
        np.zeros(16, np.uint8),
        np.zeros((0, 4, 3), np.uint8),
        np.uint8(3),
    ],
)
def test_other_arrays_are_rejected_with_their_kind(array: npt.NDArray[Any]) -> None:
    rejected = rejection(array_file(array))
    assert rejected.reason == "bad_array"
    assert str(array.dtype) in rejected.detail
    assert str(array.shape) in rejected.detail
    assert "expected uint8 (H, W), (H, W, 1) or (H, W, 3)" in rejected.detail


class Trap:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_a_pickle_in_an_array_is_not_run(tmp_path: Path) -> None:
    trap = tmp_path / "sprung"
    data = array_file(np.array([[Trap(trap)] * 3] * 3, dtype=object), allow_pickle=True)
    assert b"touch" in data
    assert rejection(data).reason == "bad_array"
    assert not trap.exists()


def array_header(text: str, pixels: bytes = b"") -> bytes:
    """Returns a .npy file with any header."""
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(text)) + text.encode() + pixels


def test_array_headers_that_lie_or_attack_are_rejected() -> None:
    shape = "{'descr': '|u1', 'fortran_order': False, 'shape': (%s), }"
    cases = {
        shape % "8001, 8000, 3": "too_many_pixels",
        shape % "1, 51": "extreme_aspect",
        shape % "4, 4": "undecodable",
        shape % "-4, 4": "bad_array",
        shape % ("-" * 900 + "4, 4"): "bad_array",
        shape % ("(" * 500): "bad_array",
        shape % "4, 4" + " " * 60_000: "bad_array",
        "{'descr': '|u1'": "bad_array",
        "__import__('os').abort()": "bad_array",
    }
    for header, reason in cases.items():
        assert rejection(array_header(header, b"123")).reason == reason, header[:80]


def test_black_and_white_stays_so() -> None:
    data = file_of(photo(), "PNG", "1")
    np.testing.assert_array_equal(stored(data, spec(48)), as_pillow_sees(data))


def test_a_grey_jpeg_has_three_equal_channels() -> None:
    data = file_of(photo(), "JPEG", "L")
    pixels = stored(data, spec(48))
    np.testing.assert_array_equal(pixels, as_pillow_sees(data))
    np.testing.assert_array_equal(pixels[..., 0], pixels[..., 1])


def test_a_cmyk_jpeg_is_stored_as_pillow_sees_it() -> None:
    data = file_of(photo(), "JPEG", "CMYK")
    pixels = stored(data, spec(48))
    np.testing.assert_array_equal(pixels, as_pillow_sees(data))
    assert np.abs(pixels.astype(int) - photo()).mean() < 10


def test_a_progressive_jpeg_has_the_pixels_of_a_baseline_one() -> None:
    progressive, baseline = file_of(photo(), progressive=True), file_of(photo())
    assert jpeg_frame(progressive)["marker"] == 0xC2
    np.testing.assert_array_equal(stored(progressive, spec(48)), stored(baseline, spec(48)))


@pytest.mark.parametrize("subsampling", [0, 1, 2])
def test_every_chroma_subsampling_is_stored_as_pillow_sees_it(subsampling: int) -> None:
    data = file_of(photo(), subsampling=subsampling)
    np.testing.assert_array_equal(stored(data, spec(48)), as_pillow_sees(data))


def test_the_first_frame_of_a_moving_image_is_stored() -> None:
    frames = [Image.fromarray(np.full((32, 32, 3), level, np.uint8)) for level in (10, 200)]
    for kind in ("GIF", "WEBP", "PNG", "MPO"):
        buffer = io.BytesIO()
        frames[0].save(buffer, kind, save_all=True, append_images=frames[1:])
        assert np.abs(stored(buffer.getvalue(), spec(32)).astype(int) - 10).max() <= 2


@pytest.mark.parametrize(
    "height, width, short",
    [
        (48, 64, (32, 43)),
        (64, 48, (43, 32)),
        (33, 32, (33, 32)),
        (20, 30, (32, 48)),
        (32, 32, (32, 32)),
        (100, 37, (86, 32)),
    ],
)
def test_the_shorter_side_or_both_get_the_size(height: int, width: int, short: tuple[int, int]) -> None:
    data = file_of(photo(height, width), "PNG")
    assert stored(data, spec(32)).shape[:2] == short
    assert stored(data, spec(32, "exact")).shape[:2] == (32, 32)


def test_shrinking_averages_and_enlarging_interpolates() -> None:
    # Single white pixels, one in sixteen: an average is evenly grey, picking pixels would be black and white.
    dots = np.zeros((128, 128, 3), np.uint8)
    dots[::4, ::4] = 255
    small = stored(file_of(dots, "PNG"), spec(32))
    assert np.abs(small.astype(int) - 16).max() <= 1
    steps = np.zeros((8, 8, 3), np.uint8)
    steps[:, 4:] = 200
    large = stored(file_of(steps, "PNG"), spec(32))
    assert len(np.unique(large)) > 2


@pytest.mark.parametrize("size, scaled_size", [(256, 32), (512, 64), (1000, 120)])
def test_scaled_decoding_looks_like_a_full_decode(size: int, scaled_size: int) -> None:
    data = file_of(photo(size, size * 4 // 3), quality=95)
    pixels = stored(data, spec(scaled_size))
    reference = cv2.resize(as_pillow_sees(data), pixels.shape[1::-1], interpolation=cv2.INTER_AREA)
    assert np.abs(pixels.astype(int) - reference).mean() < 1.5


def jpeg_frame(data: bytes) -> dict[str, Any]:
    """Reads the markers of a JPEG. Source: ITU-T T.81, annex B."""
    found: dict[str, Any] = {"interval": 0}
    place = 2
    while True:
        assert data[place] == 0xFF
        marker, length = data[place + 1], int.from_bytes(data[place + 2 : place + 4], "big")
        content = data[place + 4 : place + 2 + length]
        place += 2 + length
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            height, width, components = struct.unpack(">xHHB", content[:6])
            factors = [divmod(content[6 + 3 * index + 1], 16) for index in range(components)]
            found |= {"marker": marker, "height": height, "width": width, "factors": factors}
        elif marker == 0xDD:
            found["interval"] = int.from_bytes(content, "big")
        elif marker == 0xDA:
            scan = data[place:-2]
            found["restarts"] = [
                scan[i + 1] & 7 for i in range(len(scan) - 1) if scan[i] == 0xFF and 0xD0 <= scan[i + 1] <= 0xD7
            ]
            assert data[-2:] == b"\xff\xd9"
            return found


@pytest.mark.parametrize("channels", [3, 1])
@pytest.mark.parametrize("width", [32, 40, 48, 80, 96, 149, 224, 299, 304])
def test_stored_jpegs_are_baseline_420_with_restart_markers_on_a_grid(width: int, channels: Literal[1, 3]) -> None:
    how = spec(32, channels=channels, codec="jpeg")
    sample = convert(file_of(photo(32, width), "PNG"), how)
    assert isinstance(sample, Sample)
    frame = jpeg_frame(sample.image)
    assert (frame["marker"], frame["height"], frame["width"]) == (0xC0, 32, width)
    assert frame["factors"] == ([(2, 2), (1, 1), (1, 1)] if channels == 3 else [(1, 1)])
    mcu = 16 if channels == 3 else 8
    row_mcus, rows = -(-width // mcu), 32 // mcu
    assert 1 <= frame["interval"] <= 3
    assert row_mcus % frame["interval"] == 0
    assert frame["restarts"] == [index % 8 for index in range(row_mcus * rows // frame["interval"] - 1)]


def test_stored_jpegs_decode_to_the_same_pixels_everywhere() -> None:
    for channels, mode in ((3, "RGB"), (1, "L")):
        how = spec(48, channels=channels, codec="jpeg")  # type: ignore[arg-type]
        sample = convert(file_of(photo(), "PNG"), how)
        assert isinstance(sample, Sample)
        ours = decode_stored(sample.image, how)
        np.testing.assert_array_equal(ours, as_pillow_sees(sample.image, mode))
        theirs = cv2.imdecode(np.frombuffer(sample.image, np.uint8), cv2.IMREAD_UNCHANGED)
        np.testing.assert_array_equal(ours, theirs[..., ::-1] if channels == 3 else theirs[..., None])
        assert np.abs(ours.astype(int) - as_pillow_sees(file_of(photo(), "PNG"), mode)).mean() < 4


def test_the_quality_is_the_one_asked_for() -> None:
    data = file_of(photo(), "PNG")
    sizes, errors = [], []
    for quality in (30, 60, 95):
        how = spec(48, codec="jpeg", quality=quality)
        sample = convert(data, how)
        assert isinstance(sample, Sample)
        sizes.append(len(sample.image))
        errors.append(np.abs(decode_stored(sample.image, how).astype(int) - photo()).mean())
    assert sizes == sorted(sizes)
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_grey_storage_is_the_luma_of_the_colours(kind: str) -> None:
    data = file_of(photo(), kind)
    grey = stored(data, spec(48, channels=1))
    assert np.abs(grey.astype(int) - as_pillow_sees(data, "L")).max() <= 3
    assert stored(data, spec(32, "exact", channels=1, codec="jpeg")).shape == (32, 32, 1)
    assert stored(data, spec(96, channels=1)).shape == (96, 128, 1)


@settings(max_examples=50, deadline=None)
@given(st.integers(8, 40), st.integers(8, 40), st.sampled_from([1, 3]), st.integers(0, 2**32 - 1))
def test_raw_storage_is_bit_exact(height: int, width: int, channels: Literal[1, 3], seed: int) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, channels), np.uint8)
    how = spec(min(height, width), channels=channels)
    data = encode(pixels[..., ::-1] if channels == 3 else pixels, how)
    np.testing.assert_array_equal(decode_stored(data, how), pixels)
    np.testing.assert_array_equal(decode_stored(memoryview(data), how), pixels)
    # What is stored is what Petastorm's NdarrayCodec reads.
    np.testing.assert_array_equal(np.load(io.BytesIO(data), allow_pickle=False), pixels)


def test_conversion_is_deterministic() -> None:
    for data in (file_of(photo(300, 400)), file_of(photo(), "PNG"), oriented(6)):
        assert convert(data, spec(codec="jpeg")) == convert(data, spec(codec="jpeg"))


SEEDS = [
    file_of(photo(), quality=85),
    file_of(photo(), progressive=True),
    file_of(photo(), "JPEG", "CMYK"),
    file_of(photo(), "PNG", "P"),
    file_of(photo(), "WEBP"),
    file_of(photo(), "GIF"),
    file_of(photo(), "BMP"),
    oriented(6),
    array_file(photo()),
]


def assert_stored_or_rejected(data: bytes) -> None:
    """Checks that bytes end in one of the two ways there are."""
    how = spec(16, codec="jpeg")
    result = convert(data, how)
    if isinstance(result, Rejected):
        assert result.reason in {
            "empty",
            "too_many_pixels",
            "extreme_aspect",
            "not_an_image",
            "undecodable",
            "bad_array",
            "too_many_parts",
        }
        assert "\n" not in result.detail
    else:
        assert decode_stored(result.image, how).shape == (result.height, result.width, 3)
        assert min(result.height, result.width) == 16


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=300))
def test_arbitrary_bytes_never_raise(data: bytes) -> None:
    assert_stored_or_rejected(data)


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(SEEDS),
    st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=8),
    st.floats(0.1, 1),
    st.booleans(),
)
def test_damaged_images_never_raise(
    image: bytes, changes: list[tuple[float, int]], keep: float, in_header: bool
) -> None:
    data = bytearray(image)
    for place, value in changes:
        data[int(place * (min(200, len(data)) if in_header else len(data)))] = value
    assert_stored_or_rejected(bytes(data[: int(keep * len(data))] if keep < 0.5 else data))


def test_too_little_memory_is_not_the_photo_s_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise MemoryError

    monkeypatch.setattr(cv2, "resize", full)
    with pytest.raises(MemoryError):
        convert(file_of(photo()), spec())


def test_real_photos_keep_their_look() -> None:
    photos = sorted(PHOTOS.glob("test/*/*.jpg"))[::40]
    if not photos:
        pytest.skip(f"no photos in {PHOTOS.parent.name}/{PHOTOS.name}")
    for path in photos:
        how = spec(160, codec="jpeg")
        pixels = stored(path.read_bytes(), how)
        assert min(pixels.shape[:2]) == 160
        reference = cv2.resize(as_pillow_sees(path.read_bytes()), pixels.shape[1::-1], interpolation=cv2.INTER_AREA)
        assert np.abs(pixels.astype(int) - reference).mean() < 6
