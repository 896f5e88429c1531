"""Ten thousand damaged and hostile images: each is stored or rejected with a reason, and none is lost or ends a job."""

from __future__ import annotations

import collections
import functools
import io
import json
import os
import random
import struct
import subprocess
import sys
import time
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from cvdist.images import ImageSpec, Rejected, Rules, Sample, convert, decode_stored, has_stored_size

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
CLIPART = Path("/usr/share/openclipart/png")
NUM_FUZZED = 10_000
CLASSES = ("cat", "dog", "horse", "owl")
REASONS = {
    "empty",
    "too_many_pixels",
    "extreme_aspect",
    "not_an_image",
    "undecodable",
    "bad_array",
    "too_many_parts",
}
SPEC = ImageSpec(32, "short", 3, "jpeg", 90)
RULES = Rules(max_pixels=4_000_000)  # a header of any size passes or fails fast
# What a damaged header may claim.
SIZES = (0, 1, 2, 31, 255, 256, 1000, 4000, 32767, 32768, 65535, 65536, 2**24 - 1, 2**31 - 1, 2**31, 2**32 - 1)


def photo(height: int, width: int) -> Any:
    """Returns smooth colours with some noise: uint8 (H, W, 3)."""
    y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    noise = np.random.default_rng(height).normal(0, 6, (height, width, 3))
    return np.clip(np.stack([220 * x, 220 * y, 200 * (1 - x)], axis=-1) + 20 + noise, 0, 255).astype(np.uint8)


@functools.cache
def seeds() -> tuple[tuple[str, bytes], ...]:
    """Returns whole images, 24 to 64 pixels wide, of every format and mode, with their suffixes."""
    exif = Image.Exif()
    exif[0x0112] = 6
    rgb = Image.fromarray(photo(48, 64))
    small = Image.fromarray(photo(24, 30))
    alpha = rgb.copy()
    alpha.putalpha(Image.fromarray(photo(48, 64)[..., 0]))
    wide = Image.fromarray((photo(40, 40)[..., 0].astype(np.uint16) << 8) + 77)
    palette = rgb.convert("P", palette=Image.Palette.ADAPTIVE)
    whole: list[tuple[str, Image.Image, dict[str, Any]]] = [
        ("jpg", rgb, {}),
        ("jpg", rgb, {"progressive": True}),
        ("jpg", rgb, {"subsampling": 0, "quality": 95}),
        ("jpg", rgb, {"exif": exif.tobytes(), "comment": b"a comment", "icc_profile": bytes(300)}),
        ("jpg", rgb, {"restart_marker_blocks": 2}),
        ("jpg", rgb.convert("L"), {}),
        ("jpg", rgb.convert("CMYK"), {}),
        ("png", rgb, {"exif": exif.tobytes()}),
        ("png", alpha, {}),
        ("png", small.convert("1"), {}),
        ("png", small.convert("L"), {"transparency": 40}),
        ("png", alpha.convert("LA"), {}),
        ("png", palette, {"transparency": bytes(range(200))}),
        ("png", wide, {}),
        ("png", rgb, {"save_all": True, "append_images": [rgb.rotate(90)]}),
        ("webp", rgb, {"exif": exif.tobytes()}),
        ("webp", small, {"lossless": True}),
        ("webp", alpha, {}),
        ("webp", rgb, {"save_all": True, "append_images": [rgb.rotate(180)]}),
        ("gif", palette, {}),
        ("gif", palette, {"save_all": True, "append_images": [palette.rotate(90)], "transparency": 3}),
        ("gif", small.convert("1"), {"interlace": 1}),
        ("bmp", rgb, {}),
        ("bmp", palette, {}),
        ("bmp", small.convert("1"), {}),
        ("bmp", alpha, {}),
    ]
    files = []
    for suffix, image, options in whole:
        buffer = io.BytesIO()
        image.save(buffer, {"jpg": "JPEG"}.get(suffix, suffix), **options)
        files.append((suffix, buffer.getvalue()))
    for array in (photo(30, 40), photo(30, 40)[..., 0], np.asfortranarray(photo(24, 24))):
        buffer = io.BytesIO()
        np.save(buffer, array)
        files.append(("npy", buffer.getvalue()))
    return tuple(files)


def parts_of(data: bytes) -> list[tuple[int, int]]:
    """Returns where the segments of a JPEG or the chunks of a PNG or WebP begin and end."""
    parts, place = [], {b"\xff\xd8": 2, b"\x89P": 8, b"RI": 12}.get(data[:2], len(data))
    while place + 8 <= len(data):
        if data[:1] == b"\xff":
            size = 2 + int.from_bytes(data[place + 2 : place + 4], "big")
            if data[place + 1] == 0xDA:
                break
        elif data[:1] == b"\x89":
            size = 12 + int.from_bytes(data[place : place + 4], "big")
        else:
            size = 8 + int.from_bytes(data[place + 4 : place + 8], "little")
        parts.append((place, min(place + size, len(data))))
        place += size
    return parts


def flip(data: bytes, rng: random.Random) -> bytes:
    """Changes some bytes anywhere."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8, 40))):
        changed[rng.randrange(len(changed))] = rng.randrange(256)
    return bytes(changed)


def flip_header(data: bytes, rng: random.Random) -> bytes:
    """Changes single bits near the start."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        changed[rng.randrange(min(64, len(changed)))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def cut(data: bytes, rng: random.Random) -> bytes:
    """Ends a file early."""
    return data[: rng.randrange(len(data))]


def insert(data: bytes, rng: random.Random) -> bytes:
    """Puts bytes somewhere: random ones, equal ones, or a piece of the file once more."""
    place, size = rng.randrange(len(data) + 1), rng.randint(1, 300)
    start = rng.randrange(len(data))
    piece = rng.choice((rng.randbytes(size), bytes([rng.randrange(256)]) * size, data[start : start + size]))
    return data[:place] + piece + data[place:]


def remove(data: bytes, rng: random.Random) -> bytes:
    """Takes bytes out."""
    place = rng.randrange(len(data))
    return data[:place] + data[place + rng.randint(1, 60) :]


def swap(data: bytes, rng: random.Random) -> bytes:
    """Exchanges two segments or chunks, or doubles or drops one."""
    parts = parts_of(data)
    if len(parts) < 2:
        return flip_header(data, rng)
    (a, b), (c, d) = sorted(rng.sample(parts, 2))
    first, second = data[a:b], data[c:d]
    middle = rng.choice((second + data[b:c] + first, first + first + data[b:c] + second, data[b:c] + second))
    return data[:a] + middle + data[d:]


def resize(data: bytes, rng: random.Random) -> bytes:
    """Has the header claim another size, with a checksum that fits."""
    if len(data) < 150:
        return flip_header(data, rng)
    changed, size = bytearray(data), [rng.choice(SIZES), rng.choice(SIZES)]
    if data[:4] == b"\x89PNG":
        struct.pack_into(">II", changed, 16, *size)
        struct.pack_into(">I", changed, 29, zlib.crc32(changed[12:29]))
    elif data[:4] == b"GIF8":
        place = rng.choice((6, max(data.find(b",\0\0\0\0") + 5, 6)))
        struct.pack_into("<HH", changed, place, *(side & 0xFFFF for side in size))
    elif data[:2] == b"BM":
        struct.pack_into("<II", changed, 18, *size)
    elif data[:4] == b"RIFF":
        changed[24:30] = b"".join((side & 0xFFFFFF).to_bytes(3, "little") for side in size)
    elif data[:1] == b"\x93":
        old = bytes(changed[10:128])
        shape = f"({size[0]}, {size[1]}, 3), }}".encode()
        changed[10:128] = (old.split(b"(")[0] + shape).ljust(117)[:117] + b"\n"
    else:
        place = max(data.find(b"\xff\xc0"), data.find(b"\xff\xc2"))
        struct.pack_into(">HH", changed, place + 5, *(side & 0xFFFF for side in size))
    return bytes(changed)


def splice(data: bytes, rng: random.Random) -> bytes:
    """Goes on with another file."""
    other = rng.choice(seeds())[1]
    return data[: rng.randrange(len(data))] + other[rng.randrange(len(other)) :]


MUTATIONS = (flip, flip, flip_header, cut, insert, remove, swap, resize, splice)


def fuzzed(index: int) -> tuple[str, bytes]:
    """Returns the name and the bytes of fuzzed image `index`, always the same; one in a hundred is whole."""
    rng = random.Random(index)
    suffix, data = seeds()[index % len(seeds())]
    for _ in range(0 if index % 100 == 0 else rng.choice((1, 1, 1, 2, 3))):
        data = rng.choice(MUTATIONS)(data, rng) if data else data
    return f"{CLASSES[index % len(CLASSES)]}/{index:05d}.{suffix}", data


def test_fuzzed_images_are_the_same_each_time_and_damaged_in_every_format() -> None:
    whole = {data for _, data in seeds()}
    names = collections.Counter()
    for index in range(600):
        name, data = fuzzed(index)
        assert (name, data) == fuzzed(index)
        names[name.split(".")[1]] += data not in whole
    assert set(names) == {"jpg", "png", "webp", "gif", "bmp", "npy"}
    assert min(names.values()) > 40


@pytest.mark.filterwarnings("ignore")
def test_ten_thousand_fuzzed_images_are_stored_or_rejected_with_a_reason() -> None:
    fates: collections.Counter[str] = collections.Counter()
    for index in range(NUM_FUZZED):
        name, data = fuzzed(index)
        started_s = time.process_time()
        result = convert(data, SPEC, RULES)
        assert time.process_time() - started_s < 5, name
        if isinstance(result, Rejected):
            assert result.reason in REASONS, name
            assert result.detail, name
            assert "\n" not in result.detail, name
            fates[result.reason] += 1
            continue
        fates["stored"] += 1
        assert has_stored_size(result.height, result.width, SPEC), name
        assert decode_stored(result.image, SPEC).shape == (result.height, result.width, 3), name
    assert fates.total() == NUM_FUZZED
    # Else the fuzzing would try one thing only.
    assert all(
        fates[reason] >= 10 for reason in ("stored", "undecodable", "not_an_image", "too_many_pixels", "bad_array")
    ), fates


@pytest.mark.timeout(300)
@pytest.mark.parametrize("untrusted", ["false", "true"])
def test_ten_thousand_fuzzed_images_do_not_end_a_job_and_are_all_accounted_for(tmp_path: Path, untrusted: str) -> None:
    names = []
    for index in range(NUM_FUZZED):
        name, data = fuzzed(index)
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        names.append(name)
        if index % 100 == 0:
            path.with_suffix(".txt").write_text("a remark")
    command = [str(BIN / "spark-submit"), "--master", "local[2,4]", "jobs/prepare.py"]
    command += [f"file://{tmp_path}/photos", f"file://{tmp_path}/set", "--max_bad_fraction", "1"]
    command += ["--image_size", str(SPEC.image_size), "--max_pixels", str(RULES.max_pixels), "--untrusted", untrusted]
    environment = {**os.environ, "PYSPARK_PYTHON": sys.executable, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr + done.stdout
    manifest = json.loads((tmp_path / "set" / "manifest.json").read_text())
    tables = [pq.read_table(path).to_pydict() for path in (tmp_path / "set").glob("quarantine*.parquet")]
    rejected = dict(pair for table in tables for pair in zip(table["path"], table["reason"], strict=True))
    rows = [
        key
        for split in manifest["splits"].values()
        for shard in split["shards"]
        for key in pq.read_table(tmp_path / "set" / shard["path"], columns=["key"])["key"].to_pylist()
    ]
    assert sorted([*rows, *rejected]) == sorted(names)  # every input once, here or there
    assert manifest["num_skipped"] == NUM_FUZZED // 100
    assert manifest["num_quarantined"] == len(rejected)
    assert len(rows) + len(rejected) + manifest["num_skipped"] == manifest["num_inputs"]
    assert set(rejected.values()) <= REASONS
    for index in range(0, NUM_FUZZED, 7):  # and what the job did is what `convert` does
        name, data = fuzzed(index)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = convert(data, SPEC, RULES)
        assert rejected.get(name) == (result.reason if isinstance(result, Rejected) else None), name


def test_hostile_clipart_is_stored_or_rejected_within_memory_and_time() -> None:
    paths = sorted(path for path in CLIPART.rglob("*.png") if path.is_file())
    if not paths:
        pytest.skip("no clip art: apt-get install openclipart-png")
    by_pixels = sorted(paths, key=lambda path: struct.unpack(">II", path.read_bytes()[16:24]), reverse=True)
    fates: collections.Counter[str] = collections.Counter()
    for path in {*paths[::25], *by_pixels[:20], *sorted(paths, key=lambda path: path.stat().st_size)[-10:]}:
        result = convert(path.read_bytes(), SPEC)
        fates["stored" if isinstance(result, Sample) else result.reason] += 1
    assert fates["too_many_pixels"] >= 3
    assert set(fates) == {"stored", "too_many_pixels"}
