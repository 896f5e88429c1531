"""Every image rule, through the real spark-submit: which inputs become which pixels, and which are quarantined for which reason."""

from __future__ import annotations

import io
import shutil
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cvdist.images import decode_stored
from tests.submit import prepared, reasons_of, rows_of

# Four fields of different colours, so that turning, mirroring and swapping channels show.
FIELDS = np.array([[[200, 40, 40], [40, 200, 40]], [[40, 40, 200], [220, 220, 60]]], np.uint8)
SIDE = 48
RED, GREEN, BLUE, YELLOW = FIELDS.reshape(4, 3)


def photo() -> Image.Image:
    """Red and green above blue and yellow."""
    return Image.fromarray(np.kron(FIELDS, np.ones((SIDE // 2, SIDE // 2, 1), np.uint8)))


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def exif(orientation: int) -> bytes:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags.tobytes()


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bomb() -> bytes:
    """A PNG of 30,000 x 30,000 pixels in a few kilobytes."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + png_chunk(b"IDAT", zlib.compress(bytes(1 << 20))) + png_chunk(b"IEND", b"")


def sixteen_bits() -> bytes:
    """A 16-bit grey PNG whose corners are as bright as the fields' means."""
    levels = FIELDS.mean(axis=2).astype(np.uint16) * 257
    return encoded(Image.fromarray(np.kron(levels, np.ones((SIDE // 2, SIDE // 2), np.uint16))), "PNG")


def transparent(mode: str = "RGBA") -> Image.Image:
    """The photo with its lower half transparent."""
    alpha = Image.fromarray(
        np.repeat([[255], [0]], [SIDE // 2, SIDE // 2], axis=0).astype(np.uint8).repeat(SIDE, axis=1)
    )
    image = photo()
    image.putalpha(alpha)
    return image.convert(mode)


WHITE, SKY = np.array([255, 255, 255]), np.array([10, 200, 250])
UPRIGHT = (RED, GREEN, BLUE, YELLOW)
ON_BACKGROUND = (RED, GREEN, SKY, SKY)
GREY = tuple(np.full(3, field.mean()) for field in FIELDS.reshape(4, 3))
LUMA = tuple(np.full(3, field @ [0.299, 0.587, 0.114]) for field in FIELDS.reshape(4, 3))

# Name: the file and the colours of its corners: upper left, upper right, lower left, lower right.
ACCEPTED: dict[str, tuple[bytes, tuple[Any, ...]]] = {
    "baseline.jpg": (encoded(photo(), "JPEG", quality=95), UPRIGHT),
    "progressive.jpg": (encoded(photo(), "JPEG", quality=95, progressive=True), UPRIGHT),
    "full-chroma.jpg": (encoded(photo(), "JPEG", quality=95, subsampling=0), UPRIGHT),
    "cmyk.jpg": (encoded(photo().convert("CMYK"), "JPEG", quality=95), UPRIGHT),
    "grey.jpg": (encoded(photo().convert("L"), "JPEG", quality=95), LUMA),
    "turned.jpg": (encoded(photo().transpose(Image.Transpose.ROTATE_90), "JPEG", quality=95, exif=exif(6)), UPRIGHT),
    "mirrored.jpg": (
        encoded(photo().transpose(Image.Transpose.FLIP_LEFT_RIGHT), "JPEG", quality=95, exif=exif(2)),
        UPRIGHT,
    ),
    "turned.png": (encoded(photo().transpose(Image.Transpose.ROTATE_180), "PNG", exif=exif(3)), UPRIGHT),
    "plain.png": (encoded(photo(), "PNG"), UPRIGHT),
    "alpha.png": (encoded(transparent(), "PNG"), ON_BACKGROUND),
    "palette.png": (encoded(photo().convert("P", palette=Image.Palette.ADAPTIVE), "PNG"), UPRIGHT),
    "sixteen.png": (sixteen_bits(), GREY),
    "lossless.webp": (encoded(photo(), "WEBP", lossless=True), UPRIGHT),
    "alpha.webp": (encoded(transparent(), "WEBP", lossless=True), ON_BACKGROUND),
    "plain.bmp": (encoded(photo(), "BMP"), UPRIGHT),
    "moving.gif": (
        encoded(photo(), "GIF", save_all=True, append_images=[Image.new("RGB", (SIDE, SIDE), "black")]),
        UPRIGHT,
    ),
    "wrong-suffix.png": (encoded(photo(), "JPEG", quality=95), UPRIGHT),
}
WHOLE = encoded(photo(), "JPEG", quality=95)
REJECTED: dict[str, tuple[bytes, str]] = {
    "text.jpg": (b"this is no photo", "not_an_image"),
    "empty.jpg": (b"", "empty"),
    "cut.jpg": (WHOLE[: len(WHOLE) * 6 // 10], "undecodable"),
    "last-two-bytes.jpg": (WHOLE[:-2], "undecodable"),
    "large-file.bmp": (encoded(Image.new("RGB", (300, 300)), "BMP"), "too_many_bytes"),
    "many-pixels.png": (encoded(Image.new("RGB", (400, 400)), "PNG"), "too_many_pixels"),
    "wide.png": (encoded(Image.new("RGB", (210, 10)), "PNG"), "extreme_aspect"),
    "bomb.png": (bomb(), "too_many_pixels"),
    "picture.tiff.jpg": (encoded(photo(), "TIFF"), "not_an_image"),
}
LIMITS = {"max_bytes": 200_000, "max_pixels": 100_000, "max_aspect": 20, "background": "10,200,250"}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rules") / "source"
    for name in ("train/odd", "train/plain", "test/plain"):
        (folder / name).mkdir(parents=True)
    for name, (data, _) in (ACCEPTED | REJECTED).items():
        (folder / "train/odd" / name).write_bytes(data)
    for split in ("train", "test"):
        (folder / split / "plain" / "a.jpg").write_bytes(WHOLE)
    (folder / "train/odd/notes.txt").write_text("no image by its name")
    return folder


def corners(pixels: Any) -> list[Any]:
    """Returns the colours in the middle of the four fields."""
    quarter = pixels.shape[0] // 4
    return [pixels[y, x].astype(float) for y in (quarter, -quarter) for x in (quarter, -quarter)]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("is_untrusted", [False, True])
def test_each_file_becomes_the_pixels_or_the_reason_that_the_rules_say(
    is_untrusted: bool, source: Path, tmp_path: Path
) -> None:
    url, target = f"file://{source}", f"file://{tmp_path}/set"
    settings = {"image_size": 32, "max_bad_fraction": 0.5, **LIMITS} | ({"untrusted": "true"} if is_untrusted else {})
    manifest = prepared(url, target, settings)
    assert reasons_of(target, manifest) == {f"train/odd/{name}": reason for name, (_, reason) in REJECTED.items()}
    rows = rows_of(target, manifest)
    assert rows.keys() == {"train/plain/a.jpg", "test/plain/a.jpg", *(f"train/odd/{name}" for name in ACCEPTED)}
    assert manifest.num_inputs == len(rows) + len(REJECTED) + 1
    assert manifest.num_skipped == 1
    for name, (_, colours) in ACCEPTED.items():
        found = corners(decode_stored(rows[f"train/odd/{name}"]["image"], manifest.image))
        for colour, expected in zip(found, colours, strict=True):
            assert np.abs(colour - expected).max() < 14, (name, found)
    assert manifest.repeat_files["leaks"] == 1  # the plain photo is in train and test, and in both classes


@pytest.mark.timeout(300)
@pytest.mark.skipif(shutil.which("jpegtran") is None, reason="jpegtran is not installed (Debian: libjpeg-turbo-progs)")
def test_small_baseline_originals_keep_their_pixels(source: Path, tmp_path: Path) -> None:
    url, target = f"file://{source}", f"file://{tmp_path}/set"
    settings = {"image_size": 64, "max_bad_fraction": 0.5, **LIMITS, "keep_original": "true"}
    manifest = prepared(url, target, settings)
    rows = rows_of(target, manifest)
    for name in ("baseline.jpg", "full-chroma.jpg", "wrong-suffix.png"):
        row = rows[f"train/odd/{name}"]
        original = np.asarray(Image.open(io.BytesIO(ACCEPTED[name][0])))
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(row["image"]))), original)
        assert (row["height"], row["width"]) == (SIDE, SIDE)
        assert b"\xff\xd0" in row["image"]  # a restart marker
    for name in ("progressive.jpg", "turned.jpg", "grey.jpg", "plain.png"):
        assert (rows[f"train/odd/{name}"]["height"], rows[f"train/odd/{name}"]["width"]) == (64, 64)
