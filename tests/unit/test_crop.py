"""The restart-marker crop against a full decode of the same bytes by the same library."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
from pathlib import Path

import cv2
import numpy as np
import pytest
import simplejpeg

from cvdist import crop
from cvdist.images import ImageSpec, Pixels, Sample, convert
from cvdist.restart import with_restarts

SAMPLINGS = {
    "420": cv2.IMWRITE_JPEG_SAMPLING_FACTOR_420,
    "422": cv2.IMWRITE_JPEG_SAMPLING_FACTOR_422,
    "440": cv2.IMWRITE_JPEG_SAMPLING_FACTOR_440,
    "444": cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444,
    "411": cv2.IMWRITE_JPEG_SAMPLING_FACTOR_411,
}


def photo(height: int, width: int, channels: int = 3, seed: int = 0) -> Pixels:
    """Returns smooth colours with some noise, so that every tile is different."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (height // 9 + 2, width // 9 + 2, channels), np.uint8)
    pixels = cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC).reshape(height, width, channels)
    return np.clip(pixels.astype(np.int16) + rng.integers(-20, 21, pixels.shape), 0, 255).astype(np.uint8)


def jpeg(pixels: Pixels, *, interval: int = 0, sampling: str = "420", progressive: bool = False) -> bytes:
    """Encodes as asked."""
    options = [cv2.IMWRITE_JPEG_RST_INTERVAL, interval, cv2.IMWRITE_JPEG_PROGRESSIVE, int(progressive)]
    if pixels.shape[2] == 3:
        options += [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, SAMPLINGS[sampling]]
    return bytes(cv2.imencode(".jpg", pixels, options)[1].tobytes())


def whole(data: bytes, channels: int) -> Pixels:
    """Decodes all of it in the fast ways of libjpeg."""
    return np.asarray(simplejpeg.decode_jpeg(data, crop.COLOURS[channels], fastdct=True, fastupsample=True))


def boxes(height: int, width: int, num: int, seed: int = 0) -> list[tuple[int, int, int, int]]:
    """Returns random boxes and those at the borders."""
    rng = np.random.default_rng(seed)
    found = [
        (0, 0, width, height),
        (0, 0, 1, 1),
        (width - 1, height - 1, 1, 1),
        (width - 1, 0, 1, height),
        (0, height - 1, width, 1),
    ]
    for _ in range(num):
        w, h = int(rng.integers(1, width + 1)), int(rng.integers(1, height + 1))
        found.append((int(rng.integers(0, width - w + 1)), int(rng.integers(0, height - h + 1)), w, h))
    return found


def assert_same_pixels(data: bytes, channels: int, num: int = 40) -> int:
    """Compares crops with the full decode; returns how many of them were of fewer pixels than the image."""
    full = whole(data, channels)
    smaller = 0
    for x, y, width, height in boxes(*full.shape[:2], num):
        pixels, left, top = crop.decode_around(data, x, y, width, height, channels)
        found = pixels[y - top : y - top + height, x - left : x - left + width]
        np.testing.assert_array_equal(found, full[y : y + height, x : x + width], err_msg=f"{x, y, width, height}")
        smaller += pixels.size < full.size
    return smaller


def test_the_kernel_is_built() -> None:
    assert crop.tiles() is not None


@pytest.mark.parametrize(
    "size", [(375, 500), (256, 341), (224, 224), (33, 47), (16, 16), (17, 65), (1, 1), (480, 33)], ids=str
)
@pytest.mark.parametrize("channels", [1, 3])
def test_a_crop_has_the_pixels_of_a_full_decode_whatever_prepare_stored(size: tuple[int, int], channels: int) -> None:
    data = jpeg(photo(*size, channels))
    stored = convert(data, ImageSpec(min(size), "short", channels, "jpeg", 90))  # type: ignore[arg-type]
    assert isinstance(stored, Sample)
    smaller = assert_same_pixels(stored.image, channels)
    assert smaller > 20 or min(size) < 64


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("size", [(240, 320), (65, 97)], ids=str)
def test_kept_originals_of_every_sampling_are_cropped_exactly(sampling: str, size: tuple[int, int]) -> None:
    data = with_restarts(jpeg(photo(*size), sampling=sampling), 3)
    if data is None:
        pytest.skip("no jpegtran here")
    assert assert_same_pixels(data, 3) > 20


@pytest.mark.parametrize(
    "made",
    [
        pytest.param({}, id="no markers"),
        pytest.param({"progressive": True}, id="progressive"),
        pytest.param({"progressive": True, "interval": 2}, id="progressive with markers"),
        pytest.param({"interval": 7}, id="markers that divide no row"),
    ],
)
def test_what_is_no_grid_of_tiles_is_decoded_whole(made: dict[str, int]) -> None:
    assert assert_same_pixels(jpeg(photo(100, 160), **made), 3) == 0  # type: ignore[arg-type]


def test_fewer_bytes_are_decoded() -> None:
    data = jpeg(photo(384, 512), interval=2)
    out = np.empty(len(data) + 2, np.uint8)
    origin = np.zeros(2, np.int32)
    source = np.frombuffer(data, np.uint8)
    length = crop.tiles()(crop.address(source), len(data), 100, 100, 100, 100, crop.address(out), crop.address(origin))
    assert 0 < length < len(data) / 4
    assert origin.tolist() == [96, 96]
    assert simplejpeg.decode_jpeg_header(out[:length].data)[:2] == (112, 128)


@pytest.mark.parametrize(
    "box",
    [(-1, 0, 5, 5), (0, -1, 5, 5), (0, 0, 101, 5), (0, 0, 5, 81), (96, 0, 5, 5), (0, 0, 0, 5), (2**31 - 1, 0, 9, 9)],
)
@pytest.mark.parametrize("interval", [0, 1])
def test_a_box_outside_of_the_image_is_refused(box: tuple[int, int, int, int], interval: int) -> None:
    data = jpeg(photo(80, 100), interval=interval)
    with pytest.raises(ValueError, match="lies outside of"):
        crop.decode_around(data, *box, 3)


def test_cut_and_damaged_images_raise_or_decode_as_a_full_decode_would() -> None:
    """Whatever stands in the bytes: no crash, and never pixels that a full decode of undamaged headers would not give silently."""
    data = jpeg(photo(96, 128), interval=2)
    rng = np.random.default_rng(1)
    outcomes = {"raised": 0, "decoded": 0}
    for _ in range(4000):
        damaged = bytearray(data)
        for _ in range(int(rng.integers(1, 4))):
            damaged[int(rng.integers(len(data)))] = int(rng.integers(256))
        damaged = damaged[: int(rng.integers(2, len(data) + 1))] if rng.random() < 0.3 else damaged
        try:
            crop.decode_crop(bytes(damaged), (30, 20, 60, 50), np.empty((32, 32, 3), np.uint8))
            outcomes["decoded"] += 1
        except ValueError:
            outcomes["raised"] += 1
    assert outcomes["raised"] > 500
    assert outcomes["decoded"] > 500


def test_tiles_out_of_order_are_not_taken_for_others() -> None:
    data = jpeg(photo(64, 128), interval=2)
    first = data.index(b"\xff\xd0")
    swapped = data[:first] + b"\xff\xd3" + data[first + 2 :]
    source, out, origin = np.frombuffer(swapped, np.uint8), np.empty(len(data) + 2, np.uint8), np.zeros(2, np.int32)
    assert crop.tiles()(crop.address(source), len(data), 40, 20, 20, 20, crop.address(out), crop.address(origin)) == 0


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("box", [(10, 20, 64, 64), (10, 20, 90, 51)], ids=["as it is", "resized"])
def test_a_crop_is_resized_and_mirrored_into_the_batch(
    channels: int, flip: bool, box: tuple[int, int, int, int]
) -> None:
    data = jpeg(photo(128, 160, channels), interval=2)
    x, y, width, height = box
    expected = whole(data, channels)[y : y + height, x : x + width]
    if (height, width) != (64, 64):
        expected = cv2.resize(expected, (64, 64), interpolation=cv2.INTER_LINEAR).reshape(64, 64, channels)
    batch = np.zeros((3, 64, 64, channels), np.uint8)
    crop.decode_crop(data, box, batch[1], flip=flip)
    np.testing.assert_array_equal(batch[1], expected[:, ::-1] if flip else expected)
    assert not batch[0].any()
    assert not batch[2].any()


def test_threads_do_not_share_their_memory() -> None:
    images = [jpeg(photo(100 + 3 * k, 140, seed=k), interval=3) for k in range(8)]
    expected = [whole(data, 3)[5:85, 9:109] for data in images]
    wrong: list[int] = []

    def run(first: int) -> None:
        for turn in range(60):
            index = (first + turn) % len(images)
            out = np.empty((80, 100, 3), np.uint8)
            crop.decode_crop(images[index], (9, 5, 100, 80), out)
            wrong.extend([index] if not np.array_equal(out, expected[index]) else [])

    threads = [threading.Thread(target=run, args=(first,)) for first in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_without_the_kernel_whole_images_are_decoded_to_the_same_pixels_with_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    data = jpeg(photo(128, 160), interval=2)
    one, other = np.empty((2, 40, 40, 3), np.uint8)
    crop.decode_crop(data, (10, 20, 90, 51), one)
    crop.tiles.cache_clear()
    monkeypatch.setattr("importlib.machinery.EXTENSION_SUFFIXES", [])
    with caplog.at_level(logging.WARNING, "cvdist.crop"):
        crop.decode_crop(data, (10, 20, 90, 51), other)
        crop.decode_crop(data, (10, 20, 90, 51), other)
    crop.tiles.cache_clear()
    np.testing.assert_array_equal(one, other)
    assert [record.getMessage().split(":")[0] for record in caplog.records] == ["cvdist._tiles is not built"]


def test_the_kernel_holds_under_the_address_sanitizer(tmp_path: Path) -> None:
    """Ten thousand damaged images through _tiles.c alone, built with -fsanitize=address,undefined: no read or write out of bounds."""
    source = Path(crop.__file__).with_name("_tiles.c")
    library = tmp_path / "tiles.so"
    command = [
        "gcc",
        "-g",
        "-O1",
        "-shared",
        "-fPIC",
        "-fsanitize=address,undefined",
        "-fno-sanitize-recover=all",
        source,
        "-o",
        library,
    ]
    try:
        subprocess.run(command, check=True, capture_output=True)
        runtime = subprocess.run(
            ["gcc", "-print-file-name=libasan.so"], check=True, capture_output=True, text=True
        ).stdout.strip()
    except (FileNotFoundError, subprocess.CalledProcessError):
        pytest.skip("no gcc with the address sanitizer here")
    seed_image = tmp_path / "seed.jpg"
    seed_image.write_bytes(jpeg(photo(64, 96), interval=2))
    program = f"""
import ctypes, random
crop = ctypes.CDLL({str(library)!r}).crop
crop.restype = ctypes.c_int64
data = open({str(seed_image)!r}, "rb").read()
malloc, free = ctypes.CDLL(None).malloc, ctypes.CDLL(None).free
malloc.restype = ctypes.c_void_p
malloc.argtypes, free.argtypes = [ctypes.c_size_t], [ctypes.c_void_p]
rng, made = random.Random(2), 0
origin = (ctypes.c_int32 * 2)()
for _ in range(10000):
    damaged = bytearray(data)
    for _ in range(rng.randrange(4)):
        damaged[rng.randrange(len(data))] = rng.randrange(256)
    if rng.random() < 0.5:
        damaged[rng.randrange(2, 200)] = rng.randrange(256)
    if rng.random() < 0.4:
        damaged = damaged[: rng.randrange(len(data))]
    size = len(damaged)
    source, out = malloc(size or 1), malloc(size + 2)
    ctypes.memmove(source, bytes(damaged), size)
    box = [rng.randrange(-5, 100) for _ in range(4)]
    made += crop(ctypes.c_void_p(source), ctypes.c_int64(size), *box, ctypes.c_void_p(out), origin) > 0
    free(source), free(out)
print(made)
"""
    found = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True, text=True, timeout=120, check=False,
        env={"LD_PRELOAD": runtime, "ASAN_OPTIONS": "detect_leaks=0", "PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    assert found.returncode == 0, found.stderr[-3000:]
    assert int(found.stdout) > 300
