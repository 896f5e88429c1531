"""Bytes to stored images: what is stored is what a standard decoder sees, and what cannot be stored is rejected with a reason."""

from __future__ import annotations

import io
import itertools
import struct
import time
import zlib
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from cvdist.images import MAX_ASPECT, MAX_BYTES, ImageSpec, Pixels, Rejected, Sample, convert, decode_stored, encode

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


def stored(data: bytes, how: ImageSpec) -> Pixels:
    """Converts what must be convertible, and decodes it again."""
    sample = convert(data, how)
    assert isinstance(sample, Sample), sample
    pixels = decode_stored(sample.image, how)
    assert pixels.shape == (sample.height, sample.width, how.channels)
    assert pixels.dtype == np.uint8
    return pixels


def rejection(data: bytes, how: ImageSpec | None = None) -> Rejected:
    """Converts what must not be convertible."""
    rejected = convert(data, how or spec())
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
        assert "expected one of JPEG, PNG, WEBP, BMP, GIF" in rejected.detail


def png(width: int, height: int, rows: bytes, bits: int = 8, colour_type: int = 2) -> bytes:
    """Returns a PNG of any claimed size."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, bits, colour_type, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


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
]


def assert_stored_or_rejected(data: bytes) -> None:
    """Checks that bytes end in one of the two ways there are."""
    how = spec(16, codec="jpeg")
    result = convert(data, how)
    if isinstance(result, Rejected):
        assert result.reason in {"empty", "too_many_pixels", "extreme_aspect", "not_an_image", "undecodable"}
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
