"""The two locked environments, old pyarrow and new, NumPy 1 and 2, OpenCV 4 and 5: one data set, whichever wrote or reads it."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from tests.made_data import class_tree

ROOT = Path(__file__).resolve().parents[2]
PYTHONS = {"full": ROOT / ".venv/bin/python", "modern": ROOT / ".venv-modern/bin/python"}
SETTINGS = {"jpeg": {"image_size": 48}, "raw": {"image_size": 48, "codec": "raw", "resize": "exact"}}
PREPARE = """
import json, sys
from cvdist import prepare
from cvdist.config import PrepareConfig
prepare.run(PrepareConfig(source_url=sys.argv[1], target_url=sys.argv[2], row_group_bytes=16384, **json.loads(sys.argv[3])))
"""
READ = """
import hashlib, json, sys
import pyarrow, pyarrow.parquet as pq
from cvdist.comm import World
from cvdist.config import AugmentConfig
from cvdist.loader import Loader
from cvdist.shards import read_manifest
url = sys.argv[1]
manifest = read_manifest(url)
rows, batches = [], []
for name, split in manifest.splits.items():
    for shard in split.shards:
        for row in pq.read_table(f"{url.removeprefix('file://')}/{shard.path}").to_pylist():
            rows.append([name, {**row, "image": hashlib.sha256(row["image"]).hexdigest()}])
for seed in (None, 7):
    augmentation = AugmentConfig(flip=True, crop_scale_min=0.5) if seed else None
    loader = Loader(
        url, manifest, "train", world=World(0, 1, 0, 1), global_batch=20, image_size=40, seed=seed, augmentation=augmentation
    )
    batches += [
        [batch.samples.tolist(), batch.labels.tolist(), hashlib.sha256(batch.images).hexdigest()]
        for batch in loader.batches(epoch=1)
    ]
print(json.dumps({"pyarrow": pyarrow.__version__, "digest": manifest.digest, "rows": rows, "batches": batches}))
"""


def run(environment: str, program: str, *arguments: str) -> str:
    """Runs a program in an environment; returns what it printed."""
    command = [str(PYTHONS[environment]), "-c", program, *arguments]
    variables = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=variables)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of every kind that is converted in its own way: JPEG, PNG with alpha, grey, 16 bits, larger and smaller than asked for."""
    missing = [name for name, python in PYTHONS.items() if not python.exists()]
    if missing:
        pytest.skip(f"this takes both environments, and {missing[0]} is not there; run: make setup setup-modern")
    folder = class_tree(tmp_path_factory.mktemp("images"), {"down": 40, "left": 40}, height=75, width=101)
    rng = np.random.default_rng(5)
    for index, (shape, kind) in enumerate(
        [((30, 31, 3), np.uint8), ((90, 60, 4), np.uint8), ((70, 95), np.uint8), ((64, 80, 3), np.uint16)] * 3
    ):
        pixels = rng.integers(0, np.iinfo(kind).max, shape).astype(kind)
        assert cv2.imwrite(str(folder / "down" / f"odd-{index}.png"), cv2.blur(pixels, (5, 5)))
    return folder


@pytest.mark.timeout(300)
@pytest.mark.parametrize("codec", SETTINGS)
def test_each_environment_prepares_the_same_rows_and_reads_those_of_the_other(
    codec: str, source: Path, tmp_path: Path
) -> None:
    readings: dict[tuple[str, str], dict[str, Any]] = {}
    for writer in PYTHONS:
        run(writer, PREPARE, f"file://{source}", f"file://{tmp_path}/{writer}", json.dumps(SETTINGS[codec]))
        for reader in PYTHONS:
            readings[writer, reader] = json.loads(run(reader, READ, f"file://{tmp_path}/{writer}"))
    first = readings["full", "full"]
    assert len(first["rows"]) == 92
    assert len(first["batches"]) >= 6
    assert {reading["pyarrow"] for reading in readings.values()} == {
        first["pyarrow"],
        readings["modern", "modern"]["pyarrow"],
    }
    assert first["pyarrow"] != readings["modern", "modern"]["pyarrow"]
    # The files differ, because each pyarrow has its own way to write them; what is in them does not, to the last byte and pixel.
    for reading in readings.values():
        for part in ("digest", "rows", "batches"):
            assert reading[part] == first[part]
