"""What runs in executors, or in this process: hash or pack a part of the source, write a shard.

Each function is given the job and a number, leaves its result in a file that is written once, and may be killed, repeated or run twice
at the same time.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import hashlib
import json
import logging
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, BinaryIO, cast

import cv2
import pyarrow as pa
import pyarrow.parquet as pq

from cvdist import sources, storage
from cvdist.config import PrepareConfig
from cvdist.errors import AlreadyExistsError, DataError, NotFoundError, StorageError
from cvdist.images import ImageSpec, Rejected, Rules, Sample, convert, require_keep_original
from cvdist.ledger import FOLDER, ShardResult, ledger_url, read_result, write_ledger
from cvdist.sandbox import Sandbox
from cvdist.shards import Row, Shard, ShardWriter, Target, shard_schema

log = logging.getLogger("cvdist.tasks")

WORK_FOLDER = "_prepare"
LISTING_NAME = "listing.parquet"
UNHASHED_NAME = "unhashed.parquet"
JOB_NAME = "job.json"
PIECE_BYTES = 1 << 20
READ_TOGETHER = 8
SMALL_BYTES = 256 << 10


@dataclasses.dataclass(frozen=True)
class Job:
    """What the executors need: small, because the listing stays in a file with one row group for each shard.

    Attributes:
        config: The settings.
        classes: Class names in label order.
        targets: Further labels.
        is_weighted: Samples have weights.
        shards: Split name and number within the split of each shard, in the order of the listing's row groups.
        num_inputs: Inputs listed, those left out included.
        num_skipped: Inputs left out: by their names, or by the settings.
        class_inputs: Inputs listed of each class.
        class_skipped: Those of them that the settings leave out.
        digest: sha256 of all that the rows are a function of.
    """

    config: PrepareConfig
    classes: tuple[str, ...]
    targets: tuple[Target, ...]
    is_weighted: bool
    shards: tuple[tuple[str, int], ...]
    num_inputs: int
    num_skipped: int
    class_inputs: dict[str | None, int]
    class_skipped: dict[str, int]
    digest: str

    @property
    def url(self) -> str:
        """Where what this job alone reads and writes lies."""
        return job_url(self.config, self.digest)


class JobOverError(DataError):
    """The job of a task is over: the task comes too late, and leaves nothing behind."""


def work_url(config: PrepareConfig, *names: str) -> str:
    """Returns a place in the folder of an unfinished preparation."""
    return storage.join(config.target_url, WORK_FOLDER, *names)


def job_url(config: PrepareConfig, digest: str) -> str:
    """Returns the folder of a job. What outlives its job, and writes there still, is seen by no other."""
    return work_url(config, digest[:16])


def image_spec(config: PrepareConfig) -> ImageSpec:
    """Returns how this configuration stores images."""
    return ImageSpec(
        config.image_size, config.resize, config.channels, config.codec, config.quality, config.keep_original
    )


@contextlib.contextmanager
def converter(config: PrepareConfig) -> Iterator[Callable[[bytes], Sample | Rejected]]:
    """Gives what turns the bytes of an image into a sample: in this process, or for untrusted images in one that may be killed."""
    cv2.setNumThreads(1)  # a task has one core; others run beside it
    spec = image_spec(config)
    rules = Rules(config.max_bytes, config.max_pixels, config.max_aspect, config.background_rgb())
    if config.keep_original:
        require_keep_original()
    if not config.untrusted:
        yield functools.partial(convert, spec=spec, rules=rules)
        return
    with Sandbox(spec, rules, config.decode_timeout_s, config.decode_memory_bytes) as sandbox:
        yield sandbox.convert


def input_url(config: PrepareConfig, entry: dict[str, Any]) -> str:
    """Returns the file that holds a listed input."""
    return entry["url"] or storage.join(config.source_url, entry["key"])


def read_input(config: PrepareConfig, entry: dict[str, Any]) -> bytes | Rejected:
    """Returns the bytes of a listed input, or why it is not read.

    Raises:
        StorageError: The file system failed, which says nothing about the input.
    """
    url, offset, size = input_url(config, entry), entry["offset"], entry["size_bytes"]
    try:
        if offset is not None:
            return too_large(config, size) or storage.read_range(url, offset, size)
        found = size if size is not None else storage.stat(url).size_bytes
        if rejected := too_large(config, found):
            return rejected
        data = storage.read_bytes(url)
    except NotFoundError:
        return Rejected("not_found", f"{url} does not exist; expected the file that was listed")
    if size is not None and len(data) != size:
        return Rejected("changed", f"{len(data)} bytes; expected the {size} that were listed")
    return data


def too_large(config: PrepareConfig, size: int) -> Rejected | None:
    """Returns why a file of this size is not read, if so."""
    if size <= config.max_bytes:
        return None
    return Rejected("too_many_bytes", f"{size} bytes; expected at most {config.max_bytes}")


def read_inputs(config: PrepareConfig, entries: Sequence[dict[str, Any]]) -> list[bytes | Rejected]:
    """Returns the bytes of one input, or of some small files at once."""
    if len(entries) == 1:
        return [read_input(config, entries[0])]
    found = storage.read_files([input_url(config, entry) for entry in entries])
    return [
        data if data is not None and len(data) == entry["size_bytes"] else read_input(config, entry)
        for entry, data in zip(entries, found, strict=True)
    ]


def together(entries: Sequence[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """Yields inputs in order, small files some at a time."""
    waiting: list[dict[str, Any]] = []
    for entry in entries:
        is_small = entry["offset"] is None and (entry["size_bytes"] or SMALL_BYTES) < SMALL_BYTES
        if waiting and (not is_small or len(waiting) == READ_TOGETHER):
            yield waiting
            waiting = []
        waiting.append(entry)
        if not is_small:
            yield waiting
            waiting = []
    if waiting:
        yield waiting


def read_ahead(
    config: PrepareConfig, inputs: Sequence[dict[str, Any]]
) -> Iterator[tuple[dict[str, Any], bytes | Rejected]]:
    """Yields inputs with their bytes, in order, read by a few threads at once."""
    with ThreadPoolExecutor(config.read_threads, thread_name_prefix="read") as pool:
        pending: collections.deque[tuple[list[dict[str, Any]], Future[list[bytes | Rejected]]]] = collections.deque()
        parts = together(inputs)
        while True:
            while len(pending) < 2 * config.read_threads and (part := next(parts, None)):
                pending.append((part, pool.submit(read_inputs, config, part)))
            if not pending:
                return
            entries, future = pending.popleft()
            yield from zip(entries, future.result(), strict=True)


def read_group(url: str, index: int) -> pa.Table:
    """Returns a row group of a table in storage."""
    with storage.open_read(url) as stream:
        file = pq.ParquetFile(pa.PythonFile(stream, mode="r"), pre_buffer=False)
        return file.read_row_group(index, use_threads=False)


def require_current(job: Job) -> None:
    """Raises JobOverError where the job is over."""
    url = work_url(job.config, JOB_NAME)
    try:
        digest = json.loads(storage.read_bytes(url))["digest"]
    except NotFoundError:
        digest = None
    if digest != job.digest:
        raise JobOverError(f"{url} is not of this task; expected the job that started it; nothing to fix: it is over")


def write_shard(job: Job, index: int) -> ShardResult:
    """Writes shard `index` of the job, then its ledger; where the ledger is there already, returns what it says.

    The file has a name of this attempt, which the ledger tells. Only the driver gives it the shard's name, in the end.

    Raises:
        JobOverError: The job is over.
        StorageError: An input cannot be read or the shard not be written; the task may be tried again.
    """
    split, number = job.shards[index]
    url = ledger_url(job.url, split, number)
    if (done := read_result(url)) is not None:
        return done
    attempt = f"{split}-{number:05d}.{uuid.uuid4().hex}.parquet"
    attempt_url = storage.join(job.url, "attempts", attempt)
    entries: list[dict[str, Any]] = []
    is_committed = False
    try:
        require_current(job)
        result = write_attempt(job, index, attempt, entries)
        require_same(attempt_url, result.shard)
        require_current(job)
        is_committed = write_ledger(url, entries, result)
        require_current(job)
    except JobOverError:
        storage.delete(attempt_url)
        if is_committed:
            storage.delete(url)
        remove_empty_folders(job)
        raise
    finally:
        if not is_committed:
            storage.delete(attempt_url)
    return read_result(url) or result


def remove_empty_folders(job: Job) -> None:
    """Removes the folders that a late task has made anew, where nobody else has anything in them."""
    inner = [storage.join(job.url, name) for name in ("attempts", FOLDER)]
    for folder in (*inner, job.url, work_url(job.config)):
        with contextlib.suppress(StorageError):  # it is not empty: another job has begun
            storage.delete(folder)


def write_attempt(job: Job, index: int, attempt: str, entries: list[dict[str, Any]]) -> ShardResult:
    """Writes the rows of a shard to a name of this attempt alone; adds the fate of each input to `entries`."""
    config, started_s = job.config, time.monotonic()
    split, number = job.shards[index]
    inputs = read_group(storage.join(job.url, LISTING_NAME), index).to_pylist()
    class_rows: collections.Counter[int] = collections.Counter()
    num_bytes = 0
    schema = shard_schema(job.targets, is_weighted=job.is_weighted)
    with (
        storage.create(storage.join(job.url, "attempts", attempt)) as output,
        ShardWriter(output, config.row_group_bytes, schema) as writer,
        converter(config) as to_sample,
    ):
        for entry, data in read_ahead(config, inputs):
            sha256 = "" if isinstance(data, Rejected) else hashlib.sha256(data).hexdigest()
            sample = data if isinstance(data, Rejected) else to_sample(data)
            num_bytes += 0 if isinstance(data, Rejected) else len(data)
            if entry["sha256"] is not None and not isinstance(data, Rejected) and sha256 != entry["sha256"]:
                sample = Rejected("changed", f"sha256 {sha256}; expected {entry['sha256']}, as it was listed")
            size = len(data) if isinstance(data, bytes) else entry["size_bytes"]
            fate = {"path": entry["key"], "class": entry["class"], "split": split, "size_bytes": size, "sha256": sha256}
            if isinstance(sample, Rejected):
                entries.append({**fate, **dataclasses.asdict(sample)})
                continue
            entries.append(fate)
            weight = (1.0 if entry["weight"] is None else entry["weight"],) if job.is_weighted else ()
            others = (*weight, *(entry[target.name] for target in job.targets))
            writer.add(Row(entry["key"], entry["label"], sample.image, sample.height, sample.width, sha256, others))
            class_rows[entry["label"]] += 1
        shard = writer.close(f"{split}/shard-{number:05d}.parquet")
    num_rejected = len(entries) - shard.num_rows
    return ShardResult(split, attempt, shard, dict(class_rows), num_rejected, num_bytes, time.monotonic() - started_s)


def file_sha256(url: str) -> str:
    """Returns the sha256 of a file."""
    digest = hashlib.sha256()
    with storage.open_read(url) as stream:
        while piece := stream.read(PIECE_BYTES):
            digest.update(piece)
    return digest.hexdigest()


def require_same(url: str, shard: Shard) -> None:
    """Raises DataError unless the file that was written reads back as it was written."""
    found = file_sha256(url)
    if found != shard.sha256:
        raise DataError(
            f"{url} reads back with sha256 {found}; expected {shard.sha256}; check the disks, then run prepare again"
        )


def hash_part(config: PrepareConfig, job_url: str, part: int) -> int:
    """Adds the sha256 of each input to row group `part` of the listing; returns how many inputs it has.

    An input that cannot be read is marked as rejected.
    """
    url = part_url(job_url, part)
    rows = read_group(storage.join(job_url, UNHASHED_NAME), part)
    if storage.exists(url):
        return int(rows.num_rows)
    entries = rows.to_pylist()
    wanted = [entry for entry in entries if entry["reason"] is None]
    for entry, data in read_ahead(config, wanted):
        if isinstance(data, Rejected):
            entry["reason"], entry["detail"] = data.reason, data.detail
        else:
            entry["sha256"], entry["size_bytes"] = hashlib.sha256(data).hexdigest(), len(data)
    write_part(url, iter([pa.Table.from_pylist(entries, rows.schema)]), rows.schema)
    return int(rows.num_rows)


def pack_part(
    config: PrepareConfig, job_url: str, extra: pa.Schema, containers: Sequence[sources.Container], part: int
) -> int:
    """Copies the images of one container behind each other into a file of their own, so that each can be read by itself.

    Returns:
        How many inputs the container has.
    """
    url, packed_url = part_url(job_url, part), storage.join(job_url, "packed", f"{part:05d}.bin")
    if storage.exists(url):
        with storage.open_read(url) as stream:
            return int(pq.read_metadata(pa.PythonFile(stream, mode="r")).num_rows)
    schema = pa.schema([*sources.ROWS, *extra])
    attempt_url = storage.join(job_url, "attempts", f"{part:05d}.{uuid.uuid4().hex}.bin")
    num_rows = 0
    attempt_rows: list[pa.Table] = []
    with storage.create(attempt_url) as output:
        for table in sources.pack(config, containers[part], cast(BinaryIO, output)):
            position = table.schema.get_field_index("url")
            urls = pa.array([packed_url] * table.num_rows, pa.string())
            attempt_rows.append(table.set_column(position, sources.ROWS.field("url"), urls).select(schema.names))
            num_rows += table.num_rows
    storage.rename(attempt_url, packed_url, overwrite=True)  # a twin's holds the same bytes
    write_part(url, iter(attempt_rows), schema)
    return num_rows


def part_url(job_url: str, part: int) -> str:
    """Returns where the listing of a hashed or packed part lies in the folder of a job."""
    return storage.join(job_url, "parts", f"{part:05d}.parquet")


@contextlib.contextmanager
def parquet_writer(url: str, schema: pa.Schema, *, overwrite: bool = True) -> Iterator[Any]:
    """Writes a table to storage, which is there when the block ends; gives pyarrow's writer."""
    with storage.create(url, overwrite) as stream:
        writer = pq.ParquetWriter(pa.PythonFile(stream, mode="w"), schema, compression="ZSTD")
        try:
            yield writer
        except BaseException:
            writer.is_open = False  # else pyarrow would try to finish the file later, on a closed stream
            raise
        writer.close()


def write_part(url: str, tables: Iterator[pa.Table], schema: pa.Schema) -> None:
    """Writes a part of the listing, unless a twin was faster."""
    with contextlib.suppress(AlreadyExistsError), parquet_writer(url, schema, overwrite=False) as writer:
        for table in tables:
            writer.write_table(table.cast(schema))


def read_parts(job_url: str, num_parts: int) -> Iterator[pa.Table]:
    """Yields the listing of all hashed or packed parts."""
    for part in range(num_parts):
        with storage.open_read(part_url(job_url, part)) as stream:
            file = pq.ParquetFile(pa.PythonFile(stream, mode="r"), pre_buffer=False)
            for batch in file.iter_batches(use_threads=False):
                yield pa.Table.from_batches([batch])
