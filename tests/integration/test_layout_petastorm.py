"""Data sets that Petastorm itself has written with Spark, and those of cvdist, are read as sources: every image once, with its labels."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest

from cvdist import prepare, storage
from cvdist.config import PrepareConfig
from cvdist.shards import read_manifest
from tests.listed import opened, packed
from tests.made_data import class_tree, data_set

ROOT = Path(__file__).parents[2]

MATERIALIZE = """
import sys
import numpy as np
from petastorm.codecs import CompressedImageCodec, NdarrayCodec, ScalarCodec
from petastorm.etl.dataset_metadata import materialize_dataset
from petastorm.unischema import Unischema, UnischemaField, dict_to_spark_row
from pyspark.sql import SparkSession
from pyspark.sql.types import DoubleType, IntegerType, StringType

url, codec = sys.argv[1:]
image_codec = {"png": CompressedImageCodec("png"), "array": NdarrayCodec()}[codec]
schema = Unischema("Photos", [
    UnischemaField("id", np.int32, (), ScalarCodec(IntegerType()), False),
    UnischemaField("image", np.uint8, (None, None, 3), image_codec, False),
    UnischemaField("label", np.str_, (), ScalarCodec(StringType()), False),
    UnischemaField("age", np.float64, (), ScalarCodec(DoubleType()), True),
])
def row(number):
    pixels = np.full((8, 9, 3), number, np.uint8)
    return {"id": number, "image": pixels, "label": "cat" if number % 2 else "dog", "age": number / 2}
spark = SparkSession.builder.master("local[2]").config("spark.ui.enabled", "false").getOrCreate()
with materialize_dataset(spark, url, schema, 1):
    rows = spark.sparkContext.parallelize(range(20), 3).map(row).map(lambda r: dict_to_spark_row(schema, r))
    spark.createDataFrame(rows, schema.as_spark_schema()).write.mode("overwrite").parquet(url)
"""


@pytest.mark.parametrize("codec", ["png", "array"])
def test_what_petastorm_has_written_is_read_row_by_row(codec: str, tmp_path: Path) -> None:
    pytest.importorskip("petastorm", reason="Petastorm is not installed; run: make setup")
    url = f"file://{tmp_path}/set"
    environment = {**os.environ, "SPARK_LOCAL_IP": "127.0.0.1", "PYSPARK_PYTHON": sys.executable}
    command = [sys.executable, "-W", "ignore", "-c", MATERIALIZE, url, codec]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]

    source = opened(url, label_columns="label,age")
    assert source.kind == "petastorm"
    assert len(source.containers) == 3
    found = packed(source, url, label_columns="label,age")
    assert len({row["key"] for row, _ in found}) == 20
    numbers = set()
    for row, data in found:
        if codec == "png":
            pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
        else:
            pixels = np.load(io.BytesIO(data), allow_pickle=False)
        assert pixels.shape == (8, 9, 3)
        number = int(pixels[0, 0, 0])
        assert (pixels == number).all()
        assert (row["class"], row["age"], row["split"]) == ("cat" if number % 2 else "dog", number / 2, None)
        numbers.add(number)
    assert numbers == set(range(20))


@pytest.mark.parametrize("codec", ["jpeg", "raw"])
def test_a_data_set_of_ours_is_read_with_its_splits_and_class_names(codec: str, tmp_path: Path) -> None:
    photos = class_tree(tmp_path / "photos", {"ant": 20, "bee": 20}, height=40, width=52)
    url = f"file://{tmp_path}/set"
    manifest = data_set(photos, url, codec=codec, image_size=32)
    source = opened(url)
    assert (source.kind, source.extra.names, source.num_skipped) == ("petastorm", [], 0)
    found = packed(source, url)
    assert len({row["key"] for row, _ in found}) == manifest.num_rows == 40
    for name, split in manifest.splits.items():
        rows = [row for row, _ in found if row["split"] == name]
        classes = [sum(row["class"] == known for row in rows) for known in manifest.classes]
        assert classes == list(split.class_rows)
    for _, data in found:
        if codec == "jpeg":
            pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
        else:
            pixels = np.load(io.BytesIO(data), allow_pickle=False)
        assert min(pixels.shape[:2]) == 32


def test_a_split_of_ours_is_a_petastorm_data_set_of_its_own(tmp_path: Path) -> None:
    pytest.importorskip("petastorm", reason="Petastorm is not installed; run: make setup")
    photos = class_tree(tmp_path / "photos", {"ant": 20, "bee": 20}, height=40, width=52)
    data_set(photos, f"file://{tmp_path}/set", image_size=32)
    url = f"file://{tmp_path}/set/train"
    source = opened(url)
    assert source.kind == "petastorm"
    found = packed(source, url)
    assert len(found) == read_manifest(f"file://{tmp_path}/set").splits["train"].num_rows
    assert {row["class"] for row, _ in found} == {"0", "1"}


def test_a_data_set_of_ours_with_several_targets_prepared_again_keeps_all_of_them(
    storage_url: str, tmp_path: Path
) -> None:
    photos = class_tree(tmp_path / "photos", {"ant": 20, "bee": 20}, height=40, width=52)
    lines = ["path,label,age,wild,coat,weight"]
    for number in range(40):
        name = ("ant", "bee")[number % 2]
        lines.append(
            f"photos/{name}/{number // 2:03d}.jpg,{name},{number / 4},{number % 3 % 2 if number else ''},c{number % 3},0.5"
        )
    (tmp_path / "list.csv").write_text("\n".join(lines) + "\n")
    first, second = storage.join(storage_url, "first"), storage.join(storage_url, "second")
    for source, target in ((f"file://{tmp_path}/list.csv", first), (first, second)):
        prepare.run(PrepareConfig(source_url=source, target_url=target, image_size=32))
    manifests = read_manifest(first), read_manifest(second)
    assert manifests[0].targets == manifests[1].targets
    assert {target.name: target.kind for target in manifests[0].targets} == {
        "age": "regression",
        "wild": "binary",
        "coat": "multiclass",
    }
    assert manifests[0].classes == manifests[1].classes == ("ant", "bee")
    seen = []
    for url, manifest in zip((first, second), manifests, strict=True):
        rows = []
        for name, split in manifest.splits.items():
            for shard in split.shards:
                with storage.open_read(storage.join(url, shard.path)) as stream:
                    table = pq.read_table(stream, columns=["label", "age", "wild", "coat", "weight"])
                rows += [(name, *row.values()) for row in table.to_pylist()]
        seen.append(sorted(rows))
    assert seen[0] == seen[1]
    assert len(seen[0]) == 40
    assert -1 in {row[3] for row in seen[0]}
    assert photos.exists()
