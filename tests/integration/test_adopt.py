"""Data sets that Petastorm itself has written are adopted and trained on as they are: on disk, on HDFS, by the real commands."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from cvdist import cli, proof, storage
from cvdist.comm import World
from cvdist.images import Pixels
from cvdist.loader import Loader
from cvdist.shards import Manifest, read_manifest
from tests.made_data import class_tree, data_set
from tests.submit import submit

ROOT = Path(__file__).parents[2]
CODECS = ("jpeg", "png", "array", "compressed_array")
NUM_ROWS, SIDE = 60, 48

MATERIALIZE = """
import sys
import numpy as np
from petastorm.codecs import CompressedImageCodec, CompressedNdarrayCodec, NdarrayCodec, ScalarCodec
from petastorm.etl.dataset_metadata import materialize_dataset
from petastorm.unischema import Unischema, UnischemaField, dict_to_spark_row
from pyspark.sql import SparkSession
from pyspark.sql.types import IntegerType, StringType

folder, num_rows, side = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
codecs = {"jpeg": CompressedImageCodec("jpeg"), "png": CompressedImageCodec("png"), "array": NdarrayCodec(),
          "compressed_array": CompressedNdarrayCodec()}
spark = SparkSession.builder.master("local[2]").config("spark.ui.enabled", "false").getOrCreate()
for name, codec in codecs.items():
    schema = Unischema("Photos", [
        UnischemaField("id", np.int32, (), ScalarCodec(IntegerType()), False),
        UnischemaField("image", np.uint8, (None, None, 3), codec, False),
        UnischemaField("label", np.str_, (), ScalarCodec(StringType()), False),
    ])
    def row(number, schema=schema):
        rng = np.random.default_rng(number)
        pixels = np.repeat(np.repeat(rng.integers(0, 256, (6, 6, 3), np.uint8), side // 6, axis=0), side // 6, axis=1)
        return dict_to_spark_row(schema, {"id": number, "image": pixels, "label": ("cat", "dog", "eel")[number % 3]})
    with materialize_dataset(spark, f"file://{folder}/{name}", schema, 1):
        rows = spark.sparkContext.parallelize(range(num_rows), 3).map(row)
        frame = spark.createDataFrame(rows, schema.as_spark_schema())
        frame.write.mode("overwrite").option("parquet.block.size", 20000).parquet(f"file://{folder}/{name}")
"""


@pytest.fixture(scope="module")
def petastorms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One data set for each codec, by Petastorm's own writer."""
    pytest.importorskip("petastorm", reason="Petastorm is not installed; run: make setup")
    folder = tmp_path_factory.mktemp("petastorm")
    environment = {**os.environ, "SPARK_LOCAL_IP": "127.0.0.1", "PYSPARK_PYTHON": sys.executable}
    command = [sys.executable, "-W", "ignore", "-c", MATERIALIZE, str(folder), str(NUM_ROWS), str(SIDE)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def run(*words: object) -> subprocess.CompletedProcess[str]:
    """Runs `python -m ...`."""
    command = [sys.executable, "-m", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


def adopted(url: str, *options: object) -> Manifest:
    """Adopts a folder by the command."""
    done = run("cvdist.cli", "adopt", url, "--image", "image", "--label", "label", "--image_size", SIDE, *options)
    assert done.returncode == 0, done.stderr
    manifest = read_manifest(url)
    assert f"{url}: {manifest.num_rows} samples, {len(manifest.classes)} classes" in done.stdout
    assert f"adopted: {url}/_manifest.json" in done.stdout
    return manifest


def trained(url: str, run_url: str, *options: object) -> dict[str, Any]:
    """Trains the small network for two epochs by the command; returns the run's result."""
    words = ["--model", "mnist_convnet", "--epochs", 2, "--global_batch", 12, "--train_split", "train", *options]
    done = run("cvdist.train", "--data", url, "--run", run_url, *words)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in storage.read_text(storage.join(run_url, "metrics.jsonl")).splitlines()]
    return next(line for line in reversed(lines) if "loss" in line)


def by_the_loader(url: str, manifest: Manifest) -> dict[int, tuple[str, Pixels]]:
    """Returns class and pixels, exact ones, as evaluation sees them, by the column `id`; every row has to come once."""
    ids: list[int] = []
    for shard in manifest.splits["train"].shards:
        with storage.open_read(storage.join(url, shard.path)) as file:
            ids += pq.read_table(file, columns=["id"])["id"].to_pylist()
    rows: dict[int, tuple[str, Pixels]] = {}
    for batch in Loader(url, manifest, "train", world=World(0, 1, 0, 1), global_batch=10).batches():
        for image, label, sample, weight in zip(batch.images, batch.labels, batch.samples, batch.weights, strict=True):
            assert weight == 1
            assert ids[sample] not in rows
            rows[ids[sample]] = (manifest.classes[label], image.copy())
    assert sorted(rows) == sorted(ids)
    return rows


@pytest.mark.filterwarnings("ignore")  # Petastorm calls what pyarrow has deprecated
@pytest.mark.parametrize("codec", CODECS)
def test_a_data_set_of_petastorm_is_adopted_read_and_trained_on(codec: str, petastorms: Path, tmp_path: Path) -> None:
    import petastorm

    url = f"file://{petastorms}/{codec}"
    before = {path: path.read_bytes() for path in (petastorms / codec).iterdir()}
    manifest = adopted(url)
    assert manifest.num_rows == NUM_ROWS
    assert manifest.classes == ("cat", "dog", "eel")
    assert manifest.splits["train"].class_rows == (20, 20, 20)
    assert manifest.adopted is not None
    assert manifest.adopted.formats == {{"jpeg": "JPEG", "png": "PNG"}.get(codec, "NPY"): NUM_ROWS}
    assert len(manifest.splits["train"].shards) == 3

    rows = by_the_loader(url, manifest)
    # Petastorm opens the folder as before, and gives the same labels and pixels.
    with petastorm.make_reader(url, reader_pool_type="dummy", num_epochs=1, shuffle_row_groups=False) as reader:
        found = {int(row.id): (str(row.label), row.image) for row in reader}
    assert found.keys() == rows.keys()
    for number, (name, pixels) in found.items():
        assert rows[number][0] == name == ("cat", "dog", "eel")[number % 3]
        np.testing.assert_array_equal(rows[number][1], pixels)

    result = trained(url, f"file://{tmp_path}/run")
    assert result["step"] == 10
    assert np.isfinite(result["loss"])
    assert {path: path.read_bytes() for path in before} == before


def test_malicious_metadata_of_petastorm_is_executed_neither_by_adopt_nor_by_training(
    petastorms: Path, tmp_path: Path
) -> None:
    folder, trap = tmp_path / "set", tmp_path / "trap"
    shutil.copytree(petastorms / "jpeg", folder, ignore=shutil.ignore_patterns("_manifest.json", "*.crc", ".*"))

    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(trap),)

    schema = pq.read_schema(folder / "_common_metadata")
    key = b"dataset-toolkit.unischema.v1"
    assert key in schema.metadata
    bomb = pickle.dumps(Bomb())
    pq.write_metadata(schema.with_metadata({**schema.metadata, key: bomb}), folder / "_common_metadata")
    url = f"file://{folder}"
    assert adopted(url).num_rows == NUM_ROWS
    assert trained(url, f"file://{tmp_path}/run", "--max_steps", 3)["step"] == 3
    assert run("cvdist.cli", "inspect", url, "--verify").returncode == 0
    assert not trap.exists()
    pickle.loads(bomb)
    assert trap.exists()  # it would have been seen


def test_plain_parquet_is_adopted_proven_and_trained_on_where_it_lies(storage_url: str, tmp_path: Path) -> None:
    photos = class_tree(tmp_path / "photos", {"ant": 30, "bee": 30}, height=40, width=52)
    data_set(
        photos,
        f"file://{tmp_path}/made",
        split="train=0.8,val=0.2",
        image_size=32,
        shard_bytes=1 << 16,
        row_group_bytes=1 << 14,
    )
    made = read_manifest(f"file://{tmp_path}/made")
    for split in made.splits.values():
        for shard in split.shards:
            rows = pq.read_table(tmp_path / "made" / shard.path, columns=["image", "label"])
            pq.write_table(rows, tmp_path / "plain.parquet", compression="snappy", row_group_size=7)
            data = (tmp_path / "plain.parquet").read_bytes()
            storage.write_bytes(storage.join(storage_url, "set", shard.path), data)
    url = storage.join(storage_url, "set")
    manifest = adopted(url, "--classes", "ant,bee")
    assert {name: split.class_rows for name, split in manifest.splits.items()} == {
        name: split.class_rows for name, split in made.splits.items()
    }
    assert proof.audit_here(url, manifest).num_problems == 0

    batches = []
    for data_url, its in ((f"file://{tmp_path}/made", made), (url, manifest)):
        loader = Loader(data_url, its, "val", world=World(0, 1, 0, 1), global_batch=4, image_size=32)
        batches.append([(batch.images.copy(), batch.labels.copy()) for batch in loader.batches()])
    for mine, theirs in zip(*batches, strict=True):
        np.testing.assert_array_equal(mine[0], theirs[0])
        np.testing.assert_array_equal(mine[1], theirs[1])

    assert trained(url, storage.join(storage_url, "run"), "--max_steps", 4)["step"] == 4
    assert cli.main(["evaluate", storage.join(storage_url, "run"), "--split", "val"]) == 0


@pytest.mark.timeout(180)
def test_the_audit_job_proves_an_adopted_data_set_beside_its_files(petastorms: Path, tmp_path: Path) -> None:
    folder = tmp_path / "set"
    shutil.copytree(petastorms / "png", folder, ignore=shutil.ignore_patterns("_manifest.json", "*.crc", ".*"))
    url = f"file://{folder}"
    manifest = adopted(url)
    done = submit("audit", url)
    assert done.returncode == 0, done.stdout + done.stderr
    here = proof.audit_here(url, manifest)
    assert (folder / "_audit.json").read_bytes() == proof.audit_bytes(here)
    assert json.loads((folder / "_audit.json").read_bytes())["proven"] is True
    assert f"written to {url}/_audit.json" in done.stdout
    assert pq.read_table(folder).num_rows == NUM_ROWS
