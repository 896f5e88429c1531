"""Spark job: raw images to Parquet shards, a quarantine and a manifest.

spark-submit jobs/prepare.py SOURCE_URL TARGET_URL [--image_size 224] [--resize short|exact] [--codec jpeg|raw] ...
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from typing import Any

from pyspark.sql import SparkSession

from cvdist import cli, prepare
from cvdist.arguments import parse
from cvdist.config import PrepareConfig


def run_on_spark(description: str, function: Callable[[int], Any], numbers: Sequence[int]) -> list[Any]:
    """Runs one task for each number; Spark starts when there is something to do."""
    if not numbers:
        return []
    cli.say(f"  {description}")
    context = SparkSession.builder.appName("cvdist prepare").getOrCreate().sparkContext
    context.setJobDescription(description)
    return context.parallelize(numbers, len(numbers)).map(function).collect()


def run(argv: list[str]) -> None:
    """Parses, has the tasks run, and says what there is now."""
    config = parse(PrepareConfig, argv, prog="prepare.py", positional=("source_url", "target_url"))
    try:
        manifest = prepare.run(config, run_on_spark, cli.say)
    finally:
        if (session := SparkSession.getActiveSession()) is not None:
            session.stop()
    if manifest is None:
        return
    cli.show_data_set(config.target_url.rstrip("/"), manifest)
    if importlib.util.find_spec("petastorm") is None:
        cli.say("  Petastorm is not installed here: its make_batch_reader can open this data set, make_reader cannot")


if __name__ == "__main__":
    sys.exit(cli.guard(run, sys.argv[1:]))
