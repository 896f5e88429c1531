"""Spark job of the peer that tests/bench/prepare.py measures: photos to a Petastorm data set, as Petastorm's documentation does it.

spark-submit tests/bench/petastorm_job.py PHOTOS TARGET_URL IMAGE_SIZE QUALITY

PHOTOS is a folder of class folders. Petastorm has no resizing of its own: OpenCV reads a photo, and shrinks it to IMAGE_SIZE.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from petastorm.codecs import CompressedImageCodec, ScalarCodec
from petastorm.etl.dataset_metadata import materialize_dataset
from petastorm.unischema import Unischema, UnischemaField, dict_to_spark_row
from pyspark.sql import SparkSession
from pyspark.sql.types import IntegerType, StringType

ROW_GROUP_MB = 256  # of the example
NUM_PARTS = 4


def row(path: str, key: str, label: int, image_size: int) -> dict[str, Any]:
    """Returns the values of one row: key, label and uint8 (H, W, 3), 0-255 RGB, the shorter side image_size."""
    pixels = cv2.imread(path)
    height, width = pixels.shape[:2]
    scale = image_size / min(height, width)
    size = (max(round(width * scale), image_size), max(round(height * scale), image_size))
    pixels = cv2.cvtColor(cv2.resize(pixels, size, interpolation=cv2.INTER_AREA), cv2.COLOR_BGR2RGB)
    return {"key": key, "label": np.int32(label), "image": pixels}


def main(photos: str, target_url: str, image_size: int, quality: int) -> None:
    schema = Unischema(
        "PhotoSchema",
        [
            UnischemaField("key", np.str_, (), ScalarCodec(StringType()), False),
            UnischemaField("label", np.int32, (), ScalarCodec(IntegerType()), False),
            UnischemaField("image", np.uint8, (None, None, 3), CompressedImageCodec("jpeg", quality), False),
        ],
    )
    root = Path(photos)
    paths = sorted(root.glob("*/*.jpg"))
    classes = sorted({path.parent.name for path in paths})
    listing = [(str(path), str(path.relative_to(root)), classes.index(path.parent.name)) for path in paths]
    spark = SparkSession.builder.appName("petastorm").getOrCreate()
    with materialize_dataset(spark, target_url, schema, ROW_GROUP_MB):
        rows = (
            spark.sparkContext.parallelize(listing, NUM_PARTS)
            .map(lambda entry: row(*entry, image_size))
            .map(lambda values: dict_to_spark_row(schema, values))
        )
        spark.createDataFrame(rows, schema.as_spark_schema()).write.mode("overwrite").option(
            "compression", "none"
        ).parquet(target_url)
    spark.stop()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
