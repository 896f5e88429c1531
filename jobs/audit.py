"""Spark job: re-reads a data set, proves its manifest or says where it is wrong, and writes audit.json beside it.

spark-submit jobs/audit.py DATA_URL [--strict]
"""

from __future__ import annotations

import dataclasses
import functools
import sys

from pyspark.sql import SparkSession

from cvdist import cli, proof, storage
from cvdist.arguments import parse
from cvdist.shards import read_manifest


@dataclasses.dataclass(frozen=True)
class AuditArguments:
    """Re-reads a data set and proves its manifest.

    Attributes:
        data_url: The data set.
        strict: A photo in two splits or in two classes is an error, not a warning.
    """

    data_url: str
    strict: bool = False


def run(argv: list[str]) -> None:
    """Parses, submits one task for each shard and one for each bucket of repeats, and reports."""
    arguments = parse(AuditArguments, argv, prog="audit.py", positional=("data_url",))
    url = storage.check_url(arguments.data_url, "data_url").rstrip("/")
    manifest = read_manifest(url)
    scope, tasks = proof.plan(url, manifest)
    spark = SparkSession.builder.appName(f"cvdist audit {url}").getOrCreate()
    try:
        spark.sparkContext.setJobDescription(f"re-read {len(tasks)} shards, then look for repeats")
        parts = spark.sparkContext.parallelize(tasks, len(tasks)).flatMap(functools.partial(proof.shard_parts, scope))
        results = parts.groupByKey(2 * scope.num_buckets).flatMap(proof.join_parts).collect()
    finally:
        spark.stop()
    audit = proof.conclude(url, manifest, results)
    cli.show_data_set(url, manifest)
    cli.show_audit(audit)
    cli.say(f"  written to {proof.write_audit(url, audit)}")
    proof.require_proven(url, audit, strict=arguments.strict)


if __name__ == "__main__":
    sys.exit(cli.guard(run, sys.argv[1:]))
