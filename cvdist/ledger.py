"""The ledger of a shard: the fate of each of its inputs, and what the task that wrote it counted. It commits the shard.

A ledger is written once, when the file it names is whole and verified. A later attempt, or a later run, that finds it has nothing to do.
"""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cvdist import storage
from cvdist.errors import AlreadyExistsError, NotFoundError
from cvdist.shards import Manifest, Shard

FOLDER = "done"
RESULT_KEY = b"cvdist.result"
LEDGER = pa.schema(
    [
        pa.field("path", pa.string()),
        pa.field("class", pa.string()),
        pa.field("split", pa.string()),
        pa.field("size_bytes", pa.int64()),
        pa.field("sha256", pa.string()),
        pa.field("reason", pa.string()),
        pa.field("detail", pa.string()),
    ]
)

HELD = pa.schema([("key", pa.string()), ("sha256", pa.string()), ("split", pa.string()), ("class", pa.string())])


@dataclasses.dataclass(frozen=True)
class ShardResult:
    """What one task did.

    Attributes:
        split: Of the shard.
        attempt: Name of the file that holds it until the run ends.
        shard: Its entry for the manifest; without rows, and without a file, when every input was rejected.
        class_rows: Samples of each label that occurs.
        num_quarantined: Inputs that were rejected.
        num_bytes: Read from the source.
        seconds: It took.
    """

    split: str
    attempt: str
    shard: Shard
    class_rows: dict[int, int]
    num_quarantined: int
    num_bytes: int
    seconds: float

    @property
    def num_inputs(self) -> int:
        """Inputs that are accounted for."""
        return self.shard.num_rows + self.num_quarantined


def ledger_url(job_url: str, split: str, number: int) -> str:
    """Returns where the ledger of a shard lies in the folder of a job."""
    return storage.join(job_url, FOLDER, f"{split}-{number:05d}.parquet")


def write_ledger(url: str, entries: list[dict[str, Any]], result: ShardResult) -> bool:
    """Writes a ledger, unless a twin of this task was faster; says whether it did."""
    described = json.dumps(dataclasses.asdict(result)).encode()
    table = pa.Table.from_pylist(entries, LEDGER.with_metadata({RESULT_KEY: described}))
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="ZSTD")
    try:
        storage.write_bytes(url, buffer.getvalue())
    except AlreadyExistsError:
        return False
    return True


def read_result(url: str) -> ShardResult | None:
    """Returns what the task counted; None where there is no ledger."""
    try:
        with storage.open_read(url, readahead_bytes=0) as stream:
            metadata = pq.read_schema(pa.PythonFile(stream, mode="r")).metadata
    except NotFoundError:
        return None
    body = json.loads(metadata[RESULT_KEY])
    shard: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in body.pop("shard").items()
    }
    class_rows = {int(label): count for label, count in body.pop("class_rows").items()}
    return ShardResult(shard=Shard(**shard), class_rows=class_rows, **body)


def read_ledger(url: str) -> pa.Table:
    """Returns the fate of each input, as `LEDGER`."""
    # No threads, no reading ahead: a thread of pyarrow that still holds bytes of Python's when Python ends aborts the process.
    file = pq.ParquetFile(io.BytesIO(storage.read_bytes(url)), pre_buffer=False)
    return file.read(use_threads=False).cast(LEDGER)


def held_rows(target_url: str, manifest: Manifest) -> Iterator[pa.Table]:
    """Yields key, sha256, split and class of every input that a data set holds; quarantined ones have no split."""
    for name, split in manifest.splits.items():
        for shard in split.shards:
            for rows in read_columns(storage.join(target_url, shard.path), "key", "source_sha256", "label"):
                classes = pa.array(manifest.classes, pa.string()).take(rows["label"].combine_chunks())
                columns = [rows["key"], rows["source_sha256"], pa.array([name] * rows.num_rows, pa.string()), classes]
                yield pa.table(columns, schema=HELD)
    for table in manifest.quarantine:
        for rows in read_columns(storage.join(target_url, table.path), "path", "sha256", "class"):
            columns = [rows["path"], rows["sha256"], pa.nulls(rows.num_rows, pa.string()), rows["class"]]
            yield pa.table(columns, schema=HELD)


def read_columns(url: str, *columns: str) -> Iterator[pa.Table]:
    """Yields some columns of a Parquet file, a row group or less at a time."""
    with storage.open_read(url, readahead_bytes=0) as stream:
        file = pq.ParquetFile(pa.PythonFile(stream, mode="r"), pre_buffer=False)
        for batch in file.iter_batches(columns=list(columns), use_threads=False):
            yield pa.Table.from_batches([batch])
