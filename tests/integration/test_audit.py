"""jobs/audit.py under the real spark-submit: a whole data set is proven, a flipped byte is named, strictness is a choice."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cvdist import cli, prepare, proof, storage
from cvdist.config import PrepareConfig
from cvdist.errors import DataError
from cvdist.shards import read_manifest, row_group_offsets
from tests.made_data import class_tree, data_set

BIN = Path(sys.executable).parent
ROOT = Path(__file__).resolve().parents[2]


def submit(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs the job under the real spark-submit."""
    environment = {**os.environ, "PYSPARK_PYTHON": sys.executable, "PYTHONPATH": str(ROOT)}
    words = [str(BIN / "spark-submit"), "--master", "local[2,4]", "jobs/audit.py", *arguments]
    return subprocess.run(words, capture_output=True, text=True, cwd=ROOT, env=environment)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of several shards with one photo in two splits and two classes; tests leave its shards as they are."""
    folder = tmp_path_factory.mktemp("audit")
    photos = folder / "photos"
    for seed, (split, count) in enumerate({"train": 90, "val": 20, "test": 20}.items()):
        class_tree(photos / split, {"cat": count, "dog": count}, seed=seed)
    shutil.copy(photos / "train" / "cat" / "001.jpg", photos / "val" / "dog" / "leak.jpg")
    data_set(photos, f"file://{folder}/set", image_size=40, shard_bytes=1 << 16, row_group_bytes=1 << 14)
    return folder / "set"


@pytest.mark.timeout(180)
def test_a_whole_data_set_is_proven_and_its_leak_is_a_warning(data: Path) -> None:
    url = f"file://{data}"
    done = submit(url)
    assert done.returncode == 0, done.stderr
    manifest = read_manifest(url)
    assert sum(len(split.shards) for split in manifest.splits.values()) > 4
    here = proof.audit_here(url, manifest)
    assert (data / "audit.json").read_bytes() == proof.audit_bytes(here)
    for line in proof.report_lines(here):
        assert line in done.stdout.splitlines()
    assert "    train/cat/001.jpg (train, cat) = val/dog/leak.jpg (val, dog)" in done.stdout
    body = json.loads((data / "audit.json").read_bytes())
    assert body["proven"] is True
    assert body["repeats"]["leaks"]["num_photos"] == body["repeats"]["conflicts"]["num_photos"] == 1
    assert body["class_rows"]["val"] == {"cat": 20, "dog": 21}


@pytest.mark.timeout(180)
def test_strict_makes_the_leak_an_error(data: Path) -> None:
    done = submit(f"file://{data}", "--strict")
    assert done.returncode == DataError.exit_code, done.stderr
    (line,) = [line for line in (done.stdout + done.stderr).splitlines() if "cvdist:" in line]
    assert (
        "1 photos are in more than one split and 1 in more than one class, first train/cat/001.jpg (train, cat)" in line
    )
    assert "Traceback" not in done.stdout + done.stderr


@pytest.mark.timeout(180)
def test_one_flipped_byte_ends_the_job_with_its_place(data: Path, tmp_path: Path) -> None:
    shutil.copytree(data, tmp_path / "set")
    url = f"file://{tmp_path}/set"
    shard = read_manifest(url).splits["train"].shards[1]
    with (tmp_path / "set" / shard.path).open("r+b") as file:
        place = row_group_offsets(shard)[1] + shard.row_group_bytes[1] // 2
        file.seek(place)
        (byte,) = file.read(1)
        file.seek(place)
        file.write(bytes([byte ^ 1]))
    done = submit(url)
    assert done.returncode == DataError.exit_code, done.stderr
    (line,) = [line for line in (done.stdout + done.stderr).splitlines() if "cvdist:" in line]
    assert f"cvdist: DataError: {url}/{shard.path}, row group 1, row " in line
    assert "the image differs from its checksum; expected what prepare wrote; restore it or prepare again" in line
    assert "Traceback" not in done.stdout + done.stderr
    body = json.loads((tmp_path / "set" / "audit.json").read_bytes())
    assert (body["proven"], body["num_problems"]) == (False, 1)
    here = proof.audit_here(url, read_manifest(url))
    assert (tmp_path / "set" / "audit.json").read_bytes() == proof.audit_bytes(here)


@pytest.mark.timeout(300)
def test_a_thousand_flipped_bytes_in_as_many_row_groups_are_all_found(tmp_path: Path) -> None:
    photos = class_tree(tmp_path / "photos", {"cat": 8, "dog": 8}, height=24, width=24)
    images = [path.read_bytes() for path in sorted(photos.rglob("*.jpg"))]
    table = pa.table({"image": images * 1010, "label": (["cat"] * 8 + ["dog"] * 8) * 1010})
    pq.write_table(table, tmp_path / "photos.parquet", row_group_size=1000)
    url = f"file://{tmp_path}/set"
    settings = {"image_size": 24, "codec": "raw", "row_group_bytes": 1 << 14, "shard_bytes": 1 << 21}
    manifest = prepare.run(PrepareConfig(f"file://{tmp_path}/photos.parquet", url, **settings))  # type: ignore[arg-type]
    assert manifest is not None
    shards = [shard for split in manifest.splits.values() for shard in split.shards]
    places = [
        (shard, start, size)
        for shard in shards
        for start, size in zip(row_group_offsets(shard), shard.row_group_bytes, strict=True)
    ]
    rng = random.Random(1)
    for shard, start, size in rng.sample(places, 1000):
        place, bit = rng.randrange(start, start + size), 1 << rng.randrange(8)
        with (tmp_path / "set" / shard.path).open("r+b") as file:
            file.seek(place)
            (byte,) = file.read(1)
            file.seek(place)
            file.write(bytes([byte ^ bit]))
    done = submit(url)
    assert done.returncode == DataError.exit_code, done.stdout + done.stderr
    assert json.loads((tmp_path / "set" / "audit.json").read_bytes())["num_problems"] == 1000
    assert "(problem 1 of 1000)" in done.stdout + done.stderr


def test_a_data_set_on_hdfs_is_inspected_and_proven(
    data: Path, hdfs_url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in sorted(data.rglob("*")):
        if path.is_file():
            storage.write_bytes(storage.join(hdfs_url, str(path.relative_to(data))), path.read_bytes())
    assert cli.main(["inspect", hdfs_url, "--grid", f"{tmp_path}/grid.png", "--verify"]) == 0
    assert "proven  " in capsys.readouterr().out
    assert (tmp_path / "grid.png").read_bytes().startswith(b"\x89PNG")
    storage.delete(storage.join(hdfs_url, "test/shard-00000.parquet"))
    assert cli.main(["inspect", hdfs_url, "--verify"]) == DataError.exit_code
    assert "test/shard-00000.parquet: the file does not exist" in capsys.readouterr().err


def test_auditing_what_is_no_data_set_is_refused(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "jobs/audit.py", f"file://{tmp_path}"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
    )
    assert done.returncode == DataError.exit_code
    assert "manifest.json does not exist; expected a prepared data set" in done.stderr
