"""Runs jobs under the real spark-submit, for tests."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from cvdist import storage
from cvdist.shards import Manifest, read_manifest

BIN = Path(sys.executable).parent
ROOT = Path(__file__).resolve().parents[1]


def submit(job: str, *arguments: object, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Runs jobs/JOB.py on local[2,4]."""
    command = [
        BIN / "spark-submit",
        "--master",
        "local[2,4]",
        "--conf",
        "spark.ui.enabled=false",
        f"jobs/{job}.py",
        *arguments,
    ]
    variables = {**os.environ, "PYSPARK_PYTHON": sys.executable, "PYTHONPATH": str(ROOT), **(environment or {})}
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, cwd=ROOT, env=variables)


def prepared(source_url: str, target_url: str, settings: dict[str, object]) -> Manifest:
    """Prepares a data set under spark-submit; fails with the output where that fails."""
    options = [word for name, value in settings.items() for word in (f"--{name}", value)]
    done = submit("prepare", source_url, target_url, *options)
    assert done.returncode == 0, done.stdout + done.stderr
    return read_manifest(target_url)


def rows_of(url: str, manifest: Manifest) -> dict[str, dict[str, Any]]:
    """Returns every row by its key, with its split; a key that is there twice is an error."""
    found: dict[str, dict[str, Any]] = {}
    for name, split in manifest.splits.items():
        for shard in split.shards:
            with storage.open_read(storage.join(url, shard.path)) as stream:
                for row in pq.read_table(stream).to_pylist():
                    assert row["key"] not in found
                    found[row["key"]] = {**row, "split": name}
    return found


def reasons_of(url: str, manifest: Manifest) -> dict[str, str]:
    """Returns why each quarantined input is there, by its path."""
    found: dict[str, str] = {}
    for table in manifest.quarantine:
        with storage.open_read(storage.join(url, table.path)) as stream:
            found |= {row["path"]: row["reason"] for row in pq.read_table(stream).to_pylist()}
    return found
