"""Spark job: raw images to Parquet shards, a quarantine and a manifest.

spark-submit jobs/prepare.py SOURCE_URL TARGET_URL [--image_size 224] [--resize short|exact] [--codec jpeg|raw] ...
"""

from __future__ import annotations

import functools
import importlib.util
import sys

from pyspark.sql import SparkSession

from cvdist import cli, prepare
from cvdist.arguments import parse
from cvdist.config import PrepareConfig
from cvdist.shards import Manifest


def run(argv: list[str]) -> None:
    """Parses, submits one task for each shard, and counts."""
    config = parse(PrepareConfig, argv, prog="prepare.py", positional=("source_url", "target_url"))
    job = prepare.start(config)
    if isinstance(job, Manifest):
        cli.say(f"{config.target_url} holds this data set already; nothing to do")
        cli.show_data_set(config.target_url, job)
        return
    spark = SparkSession.builder.appName(f"cvdist prepare {config.target_url}").getOrCreate()
    try:
        tasks = spark.sparkContext.parallelize(range(len(job.shards)), len(job.shards))
        results = tasks.map(functools.partial(prepare.write_shard, job)).collect()
    finally:
        spark.stop()
    cli.show_data_set(config.target_url, prepare.finish(job, results))
    if importlib.util.find_spec("petastorm") is None:
        cli.say("  Petastorm is not installed here: its make_batch_reader can open this data set, make_reader cannot")


if __name__ == "__main__":
    sys.exit(cli.guard(run, sys.argv[1:]))
