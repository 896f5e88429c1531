"""Small originals: the same pixels as the source, a grid of restart markers, no metadata; everything else takes the normal path."""

from __future__ import annotations

import dataclasses
import io
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import simplejpeg
from PIL import Image

from cvdist.comm import World
from cvdist.config import AugmentConfig
from cvdist.errors import ConfigError
from cvdist.headers import read_frame
from cvdist.images import ImageSpec, Pixels, Sample, convert, decode_stored, has_stored_size, require_keep_original
from cvdist.loader import Loader
from cvdist.proof import audit_here
from cvdist.restart import restart_interval
from tests.made_data import class_tree, data_set

PHOTOS = Path(__file__).resolve().parents[3] / "shared" / "data" / "clothing"
SPEC = ImageSpec(256, "short", 3, "jpeg", 90, keep_original=True)
NORMAL = dataclasses.replace(SPEC, keep_original=False)
GREY = dataclasses.replace(SPEC, channels=1)

has_program = pytest.mark.skipif(
    not shutil.which("jpegtran"), reason="no jpegtran: apt-get install libjpeg-turbo-progs"
)


def photo(height: int = 120, width: int = 200) -> Pixels:
    """Returns smooth colours with some noise: uint8 (H, W, 3) RGB."""
    y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    noise = np.random.default_rng(0).normal(0, 6, (height, width, 3))
    pixels: npt.NDArray[np.float64] = np.stack([220 * x, 220 * y, 200 * (1 - x) * (1 - y)], axis=-1) + 20 + noise
    return np.clip(pixels, 0, 255).astype(np.uint8)


def jpeg(pixels: Pixels | None = None, mode: str = "RGB", **options: Any) -> bytes:
    """Returns a JPEG."""
    buffer = io.BytesIO()
    Image.fromarray(photo() if pixels is None else pixels).convert(mode).save(buffer, "JPEG", **options)
    return buffer.getvalue()


def kept(data: bytes, spec: ImageSpec = SPEC) -> bytes:
    """Converts what must be kept as it is, and returns what is stored."""
    sample = convert(data, spec)
    assert isinstance(sample, Sample)
    colours = "RGB" if spec.channels == 3 else "GRAY"
    source = simplejpeg.decode_jpeg(data, colorspace=colours)
    assert (sample.height, sample.width) == source.shape[:2]
    np.testing.assert_array_equal(decode_stored(sample.image, spec), source)
    assert has_stored_size(sample.height, sample.width, spec)
    return sample.image


def markers(image: bytes) -> list[int]:
    """Returns the markers of a JPEG. Source: ITU-T T.81, annex B."""
    found, place = [], 2
    while image[place + 1] != 0xDA:
        found.append(image[place + 1])
        place += 2 + int.from_bytes(image[place + 2 : place + 4], "big")
    return found


def restarts(image: bytes) -> list[int]:
    """Returns the numbers of the restart markers of a JPEG in their order."""
    scan = image[image.index(b"\xff\xda") :]
    return [scan[i + 1] & 7 for i in range(len(scan) - 1) if scan[i] == 0xFF and 0xD0 <= scan[i + 1] <= 0xD7]


@has_program
@pytest.mark.parametrize("width", [1, 8, 16, 17, 32, 48, 149, 200, 224, 299, 304])
@pytest.mark.parametrize("subsampling", ["444", "422", "420", "440", "411"])
def test_pixels_stay_and_restart_markers_form_a_grid(width: int, subsampling: str) -> None:
    mcu = {"444": (8, 8), "422": (16, 8), "420": (16, 16), "440": (8, 16), "411": (32, 8)}[subsampling]
    height = max(30, width // 40)
    data = simplejpeg.encode_jpeg(photo(height, width), 90, "RGB", subsampling)
    image = kept(data)
    frame, _ = read_frame(image)
    assert frame
    assert frame.factors == read_frame(data)[0].factors  # type: ignore[union-attr]
    row_mcus, rows = -(-width // mcu[0]), -(-height // mcu[1])
    assert 1 <= frame.restart_interval <= 3
    assert row_mcus % frame.restart_interval == 0
    assert restarts(image) == [index % 8 for index in range(row_mcus * rows // frame.restart_interval - 1)]


@has_program
@pytest.mark.parametrize("width", [40, 200, 299])
def test_grey_stays_grey(width: int) -> None:
    image = kept(jpeg(photo(100, width), "L"), GREY)
    frame, _ = read_frame(image)
    assert frame
    assert len(frame.factors) == 1
    assert frame.restart_interval == restart_interval(width, 8)
    assert len(restarts(image)) == -(-width // 8) * 13 // frame.restart_interval - 1


@has_program
def test_metadata_goes_and_upright_exif_is_no_obstacle() -> None:
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 1, "somebody's name"
    image = kept(jpeg(exif=exif, icc_profile=b"profile" * 50, comment=b"somebody's comment"))
    assert b"somebody" not in image
    assert b"profile" not in image
    assert set(markers(image)) <= {0xE0, 0xDB, 0xC0, 0xC4, 0xDD}


@has_program
def test_markers_cost_few_bytes_and_quality_is_not_lost_again() -> None:
    data = jpeg(quality=95)
    assert len(kept(data)) < 1.05 * len(data)
    normal = convert(data, dataclasses.replace(NORMAL, image_size=120, quality=50))
    assert isinstance(normal, Sample)
    assert len(normal.image) < len(kept(data))


@has_program
def test_to_keep_is_deterministic() -> None:
    assert kept(jpeg()) == kept(jpeg())


def turned() -> bytes:
    """Returns a JPEG that EXIF says lies on its side."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return jpeg(exif=exif)


def in_format(kind: str, mode: str = "RGB") -> bytes:
    """Returns an image that is no JPEG."""
    buffer = io.BytesIO()
    Image.fromarray(photo()).convert(mode).save(buffer, kind)
    return buffer.getvalue()


OTHERS: dict[str, Callable[[], bytes]] = {
    "progressive": lambda: jpeg(progressive=True),
    "turned": turned,
    "grey": lambda: jpeg(mode="L"),
    "cmyk": lambda: jpeg(mode="CMYK"),
    "plain rgb": lambda: jpeg(keep_rgb=True),
    "large": lambda: jpeg(photo(257, 300)),
    "png": lambda: in_format("PNG"),
    "webp": lambda: in_format("WEBP"),
}


@has_program
@pytest.mark.parametrize("name", OTHERS)
def test_what_is_no_small_upright_baseline_jpeg_takes_the_normal_path(name: str) -> None:
    data = OTHERS[name]()
    sample = convert(data, SPEC)
    assert isinstance(sample, Sample)
    assert sample == convert(data, NORMAL)
    assert min(sample.height, sample.width) == 256


@has_program
def test_the_short_side_decides_and_the_limit_itself_is_small() -> None:
    kept(jpeg(photo(256, 400)))
    kept(jpeg(photo(400, 256)))
    sample = convert(jpeg(photo(400, 257)), SPEC)
    assert isinstance(sample, Sample)
    assert (sample.height, sample.width) == (398, 256)


@has_program
def test_colours_are_not_kept_where_grey_is_stored() -> None:
    sample = convert(jpeg(), GREY)
    assert isinstance(sample, Sample)
    assert sample == convert(jpeg(), dataclasses.replace(NORMAL, channels=1))


@has_program
def test_damaged_originals_are_rejected_as_without_keeping() -> None:
    for data in (jpeg()[:-300], jpeg()[:300], jpeg()[:-2]):
        assert convert(data, SPEC) == convert(data, NORMAL)
        assert not isinstance(convert(data, SPEC), Sample)


@has_program
def test_what_lies_behind_an_image_goes() -> None:
    assert kept(jpeg() + b"trailing" * 100) == kept(jpeg())


@has_program
def test_clothing_photos_keep_every_pixel() -> None:
    photos = sorted(PHOTOS.glob("test/*/*.jpg"))[::20]
    if not photos:
        pytest.skip(f"no photos in {PHOTOS.parent.name}/{PHOTOS.name}")
    spec = dataclasses.replace(SPEC, image_size=500)
    ratios = [len(kept(data, spec)) / len(data) for data in (path.read_bytes() for path in photos)]
    assert np.mean(ratios) < 1.1


PROGRAMS = {
    "fails": "exit 1",
    "dies": "kill -SEGV $$",
    "says nothing": "cat > /dev/null",
    "says something else": "cat > /dev/null; echo hello",
    "adds no markers": "cat",
    "changes pixels": 'exec REAL -flip horizontal "$@"',
    "turns": 'exec REAL -rotate 90 "$@"',
    "loses colour": 'exec REAL -grayscale "$@"',
}


@has_program
@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_that_does_not_do_it_is_not_believed(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "jpegtran"
    program.write_text("#!/bin/bash\n" + PROGRAMS[name].replace("REAL", str(shutil.which("jpegtran"))) + "\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    sample = convert(jpeg(), SPEC)
    assert sample == convert(jpeg(), NORMAL)
    assert isinstance(sample, Sample)


def test_without_the_program_the_fix_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    require_keep_original.cache_clear()
    for attempt in (require_keep_original, lambda: convert(jpeg(), SPEC)):
        with pytest.raises(ConfigError, match=r"keep_original: no jpegtran .*expected.*apt-get install libjpeg-turbo"):
            attempt()
    assert isinstance(convert(jpeg(), NORMAL), Sample)
    assert isinstance(convert(in_format("PNG"), SPEC), Sample)


@has_program
def test_with_the_program_nothing_is_said() -> None:
    script = "from cvdist.images import require_keep_original; require_keep_original()"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_sizes_of_kept_originals_are_sizes_of_the_data_set() -> None:
    for height, width in ((256, 256), (10, 300), (300, 1), (255, 255)):
        assert has_stored_size(height, width, SPEC)
        assert has_stored_size(height, width, NORMAL) == (min(height, width) == 256)
    for spec in (SPEC, NORMAL):
        assert not has_stored_size(257, 257, spec)
        assert not has_stored_size(0, 10, spec)
    exact = dataclasses.replace(NORMAL, resize="exact")
    assert has_stored_size(256, 256, exact)
    assert not has_stored_size(256, 300, exact)


@has_program
def test_a_data_set_of_kept_originals_passes_its_audit_and_is_loaded(tmp_path: Path) -> None:
    sources = class_tree(tmp_path / "photos", {"cat": 12, "dog": 12}, height=64, width=80)
    (sources / "cat" / "large.png").write_bytes(in_format("PNG"))
    url = f"file://{tmp_path}/set"
    manifest = data_set(sources, url, image_size=100, keep_original=True)
    audit = audit_here(url, manifest)
    assert audit.num_problems == 0, audit.problems
    assert manifest.image.keep_original
    loader = Loader(
        url, manifest, "train", world=World(0, 1, 0, 1), global_batch=4, augmentation=AugmentConfig(crop_scale_min=0.1)
    )
    batches = list(loader.batches())
    assert sum(batch.num_valid for batch in batches) == manifest.splits["train"].num_rows
    assert {batch.images.shape for batch in batches} == {(4, 100, 100, 3)}
    assert min(batch.images.std() for batch in batches) > 10


@has_program
def test_an_image_larger_than_kept_ones_can_be_fails_the_audit(tmp_path: Path) -> None:
    sources = class_tree(tmp_path / "photos", {"cat": 12, "dog": 12}, height=64, width=80)
    url = f"file://{tmp_path}/set"
    manifest = data_set(sources, url, image_size=64, keep_original=True)
    for keep_original, found in ((True, 63), (False, 63)):
        image = dataclasses.replace(manifest.image, image_size=found, keep_original=keep_original)
        problems = audit_here(url, dataclasses.replace(manifest, image=image)).problems
        assert problems
        assert problems[0].found == "the image is 80 x 64 pixels"
        assert problems[0].expected == f"the shorter side {'at most ' if keep_original else ''}{found}"
