"""Raw images to a data set, in three steps that Spark or one process can drive: start, write_shard for each shard, finish.

`start` lists the source and fixes what every shard holds; `write_shard` is a function of that alone, so it may be repeated, killed or
run twice at once; `finish` counts and writes the manifest, last.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import io
import json
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cvdist import sources, storage
from cvdist.card import CARD_NAME, card
from cvdist.config import PrepareConfig, dump
from cvdist.errors import ConfigError, DataError
from cvdist.images import MAX_BYTES, ImageSpec, Rejected, convert
from cvdist.shards import (
    MANIFEST_NAME,
    VERSION,
    Manifest,
    Row,
    Shard,
    ShardWriter,
    Split,
    petastorm_metadata,
    read_manifest,
    write_manifest,
)

WORK_FOLDER = "_prepare"
LISTING_NAME = "listing.parquet"
JOB_NAME = "job.json"
QUARANTINE_NAME = "quarantine.parquet"
# What a killed or doubled task or run may have left: a shard, or a temporary file.
LEFTOVER = re.compile(
    r"shard-\d+\.parquet|\.(shard-\d+\.parquet|quarantine\.parquet|_common_metadata|README\.md|manifest\.json)\.[0-9a-f]{32}\.tmp"
)
SPLIT_ORDER = ("train", "val", "test")
READ_THREADS = 8
PROBE_IMAGES = 32
MIN_SHARD_ROWS = 512
MAX_SMALL_SHARDS = 16

QUARANTINE_SCHEMA = pa.schema(
    [
        pa.field("path", pa.string()),
        pa.field("split", pa.string()),
        pa.field("size_bytes", pa.int64()),
        pa.field("sha256", pa.string()),
        pa.field("reason", pa.string()),
        pa.field("detail", pa.string()),
    ]
)


@dataclasses.dataclass(frozen=True)
class Job:
    """What the executors need: small, because the listing stays in a file with one row group for each shard.

    Attributes:
        config: The settings.
        classes: Class names in label order.
        shards: Split name and number within the split of each shard.
        num_inputs: Files listed, passed over ones included.
        num_skipped: Files passed over by their names.
        digest: sha256 of all that the rows are a function of.
    """

    config: PrepareConfig
    classes: tuple[str, ...]
    shards: tuple[tuple[str, int], ...]
    num_inputs: int
    num_skipped: int
    digest: str


@dataclasses.dataclass(frozen=True)
class ShardResult:
    """What one task did: its shard (without rows when every input was rejected), samples of each class, and the rejected inputs."""

    split: str
    shard: Shard
    class_rows: dict[int, int]
    quarantined: tuple[dict[str, Any], ...]


def image_spec(config: PrepareConfig) -> ImageSpec:
    """Returns how this configuration stores images."""
    return ImageSpec(config.image_size, config.resize, config.channels, config.codec, config.quality)


def start(config: PrepareConfig) -> Job | Manifest:
    """Lists the source, checks the target, and fixes what each shard holds.

    Returns:
        The job; or the manifest, when the target already holds exactly this data set.

    Raises:
        ConfigError: A URL cannot be used.
        DataError: The source is no set of images, or the target holds something else.
        StorageError: A file system failed.
    """
    source = storage.check_url(config.source_url, "source_url").rstrip("/")
    target = storage.check_url(config.target_url, "target_url").rstrip("/")
    if target == source or target.startswith(source + "/") or source.startswith(target + "/"):
        raise ConfigError(
            f"target_url: {target} and the source {source} lie in each other; expected two folders; choose another target"
        )
    config = dataclasses.replace(config, source_url=source, target_url=target)
    if not storage.exists(source):
        raise DataError(f"{source} does not exist; expected a folder of class folders; correct the URL")
    found = sources.class_folders(source, config.split_shares(), config.seed)
    digest = job_digest(config, found)
    existing = check_target(config, digest)
    work = storage.join(target, WORK_FOLDER)
    if existing is not None:
        storage.delete(work, recursive=True)  # where the run that wrote the manifest was killed just behind it
        return existing
    order, shards = assign(found.table, config)
    job = Job(
        config, tuple(found.classes), tuple(shards), found.table.num_rows + found.num_skipped, found.num_skipped, digest
    )
    with (
        storage.create(storage.join(work, LISTING_NAME), overwrite=True) as stream,
        pq.ParquetWriter(pa.PythonFile(stream, mode="w"), sources.SCHEMA, compression="ZSTD") as writer,
    ):
        for part in order:
            writer.write_table(found.table.take(part), row_group_size=len(part))
    storage.write_bytes(
        storage.join(work, JOB_NAME),
        json.dumps({"digest": digest, "settings": settings(config)}).encode(),
        overwrite=True,
    )
    return job


def settings(config: PrepareConfig) -> dict[str, Any]:
    """Returns the settings that rows are a function of: all but the URLs and the limit of bad inputs."""
    return {
        key: value for key, value in dump(config).items() if key not in ("source_url", "target_url", "max_bad_fraction")
    }


def job_digest(config: PrepareConfig, found: sources.Listing) -> str:
    """Hashes all that the rows are a function of: format version, settings, classes and listing."""
    digest = hashlib.sha256(json.dumps([VERSION, settings(config), found.classes], sort_keys=True).encode())
    for batch in found.table.to_batches(max_chunksize=1 << 16):
        for values in zip(*(column.to_pylist() for column in batch.columns), strict=True):
            digest.update(repr(values).encode())
    return digest.hexdigest()


def check_target(config: PrepareConfig, digest: str) -> Manifest | None:
    """Returns the manifest when the target is already this data set; None when it is free or holds an unfinished try of it."""
    target = config.target_url
    names = {storage.name(entry.url) for entry in storage.list_dir(target)} if storage.exists(target) else set()
    if MANIFEST_NAME in names:
        manifest = read_manifest(target)
        if manifest.digest == digest:
            return manifest
        raise DataError(
            f"{target} holds another data set ({difference(manifest.settings, settings(config))}); {ANOTHER_TARGET}"
        )
    job_url = storage.join(target, WORK_FOLDER, JOB_NAME)
    if WORK_FOLDER in names and storage.exists(job_url):
        job = json.loads(storage.read_bytes(job_url))
        if job["digest"] != digest:
            found = difference(job["settings"], settings(config))
            raise DataError(f"{target} holds an unfinished other data set ({found}); {ANOTHER_TARGET}")
    elif names - {WORK_FOLDER}:
        raise DataError(
            f"{target} holds {len(names)} files or folders that are no data set ({min(names)}, ...); {ANOTHER_TARGET}"
        )
    return None


ANOTHER_TARGET = "expected an empty or absent folder; choose another target URL, or delete that folder first"


def difference(theirs: dict[str, Any], ours: dict[str, Any]) -> str:
    """Says in words which settings differ, or that the inputs do."""
    parts = [
        f"{key} {theirs.get(key)!r} there, {value!r} here" for key, value in ours.items() if theirs.get(key) != value
    ]
    return "; ".join(parts) or "same settings, other input files"


def assign(table: pa.Table, config: PrepareConfig) -> tuple[list[Any], list[tuple[str, int]]]:
    """Deals the listing to shards: each split shuffled as a whole, then cut evenly.

    Returns:
        For each shard the rows of the listing in order, and (split, number within the split).
    """
    labels = table["split"].to_numpy(zero_copy_only=False)
    order: list[Any] = []
    shards: list[tuple[str, int]] = []
    for stream, split in enumerate(SPLIT_ORDER):
        members = np.flatnonzero(labels == split)
        if not len(members):
            continue
        members = np.random.Generator(np.random.Philox(np.random.SeedSequence([config.seed, 2, stream]))).permutation(
            members
        )
        parts = np.array_split(members, num_shards(table.take(members[:PROBE_IMAGES]), len(members), config))
        order += parts
        shards += [(split, index) for index in range(len(parts))]
    return order, shards


def num_shards(probe: pa.Table, num_rows: int, config: PrepareConfig) -> int:
    """Returns into how many shards a split is cut, judged by the stored size of a few of its images.

    A small split is cut into several all the same, so that several tasks can write it.
    """
    spec = image_spec(config)
    inputs = [read_input(config.source_url, entry) for entry in probe.to_pylist()]
    samples = [convert(data, spec) for data in inputs if isinstance(data, bytes)]
    sizes = [len(sample.image) for sample in samples if not isinstance(sample, Rejected)] or [1]
    by_bytes = -(-int(np.mean(sizes) * num_rows) // config.shard_bytes)
    return max(1, min(by_bytes, num_rows), min(num_rows // MIN_SHARD_ROWS, MAX_SMALL_SHARDS))


def shard_path(split: str, number: int) -> str:
    """Returns where a shard lies below the data set."""
    return f"{split}/shard-{number:05d}.parquet"


def write_shard(job: Job, index: int) -> ShardResult:
    """Writes shard `index` of the job: the one function that does the work, in an executor or in this process.

    Raises:
        StorageError: An input cannot be read or the shard not be written; the task may be tried again.
    """
    config, spec = job.config, image_spec(job.config)
    split, path = job.shards[index][0], shard_path(*job.shards[index])
    listing_url = storage.join(config.target_url, WORK_FOLDER, LISTING_NAME)
    with storage.open_read(listing_url) as stream:
        inputs = pq.ParquetFile(pa.PythonFile(stream, mode="r")).read_row_group(index, use_threads=False).to_pylist()
    class_rows: collections.Counter[int] = collections.Counter()
    quarantined: list[dict[str, Any]] = []
    with (
        storage.create(storage.join(config.target_url, path), overwrite=True) as output,
        ShardWriter(output, config.row_group_bytes) as writer,
    ):
        for entry, data in read_ahead(config.source_url, inputs):
            sha256 = "" if isinstance(data, Rejected) else hashlib.sha256(data).hexdigest()
            sample = data if isinstance(data, Rejected) else convert(data, spec)
            if isinstance(sample, Rejected):
                found = {"path": entry["path"], "split": split, "size_bytes": entry["size_bytes"], "sha256": sha256}
                quarantined.append({**found, **dataclasses.asdict(sample)})
            else:
                writer.add(Row(entry["path"], entry["label"], sample.image, sample.height, sample.width, sha256))
                class_rows[entry["label"]] += 1
        shard = writer.close(path)
    return ShardResult(split, shard, dict(class_rows), tuple(quarantined))


def read_input(source_url: str, entry: dict[str, Any]) -> bytes | Rejected:
    """Returns the bytes of a listed file, or why it is not read."""
    if entry["size_bytes"] > MAX_BYTES:
        return Rejected("too_many_bytes", f"{entry['size_bytes']} bytes; expected at most {MAX_BYTES}")
    return storage.read_bytes(storage.join(source_url, entry["path"]))


def read_ahead(source_url: str, inputs: Sequence[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], bytes | Rejected]]:
    """Yields inputs with their bytes, in order, read by a few threads at once."""
    with ThreadPoolExecutor(READ_THREADS, thread_name_prefix="read") as pool:
        pending: collections.deque[Any] = collections.deque()
        for entry in inputs:
            pending.append((entry, pool.submit(read_input, source_url, entry)))
            if len(pending) == 2 * READ_THREADS:
                first, data = pending.popleft()
                yield first, data.result()
        while pending:
            first, data = pending.popleft()
            yield first, data.result()


def finish(job: Job, results: Sequence[ShardResult]) -> Manifest:
    """Counts what the shards hold, and writes quarantine, Petastorm metadata, card and, last, the manifest.

    Raises:
        DataError: Too many inputs were rejected, or a split or class lost all its images; the shards are removed.
    """
    config, target = job.config, job.config.target_url
    quarantined = [entry for result in results for entry in result.quarantined]
    manifest = Manifest(
        classes=job.classes,
        image=image_spec(config),
        splits={
            split: make_split(split, results, len(job.classes))
            for split in dict.fromkeys(split for split, _ in job.shards)
        },
        num_inputs=job.num_inputs,
        num_quarantined=len(quarantined),
        num_skipped=job.num_skipped,
        digest=job.digest,
        settings=settings(config),
    )
    counted = manifest.num_rows + manifest.num_quarantined + manifest.num_skipped
    paths = sorted(result.shard.path for result in results)
    if counted != job.num_inputs or paths != sorted(shard_path(*shard) for shard in job.shards):
        raise DataError(
            f"{target}: {counted} inputs in {len(paths)} shards are accounted for;"
            f" expected {job.num_inputs} in {len(job.shards)}, each shard once; run prepare again"
        )
    try:
        check_quarantine(job, manifest, quarantined)
    except DataError:
        for name in (*manifest.splits, QUARANTINE_NAME, CARD_NAME, WORK_FOLDER):
            storage.delete(storage.join(target, name), recursive=True)
        raise
    remove_leftovers(target, manifest)
    if quarantined:
        buffer = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(quarantined, schema=QUARANTINE_SCHEMA), buffer)
        storage.write_bytes(storage.join(target, QUARANTINE_NAME), buffer.getvalue(), overwrite=True)
    for name, split in manifest.splits.items():
        metadata = petastorm_metadata(split.shards, config.codec)
        if metadata is not None:
            storage.write_bytes(storage.join(target, name, "_common_metadata"), metadata, overwrite=True)
    storage.write_bytes(storage.join(target, CARD_NAME), card(manifest, quarantined).encode(), overwrite=True)
    write_manifest(target, manifest)
    storage.delete(storage.join(target, WORK_FOLDER), recursive=True)
    return manifest


def remove_leftovers(target: str, manifest: Manifest) -> None:
    """Deletes shards without rows, and what killed tasks have left behind."""
    kept = {shard.path for split in manifest.splits.values() for shard in split.shards}
    for folder in (target, *(storage.join(target, name) for name in manifest.splits)):
        for entry in storage.list_dir(folder):
            if LEFTOVER.fullmatch(storage.name(entry.url)) and storage.relative(entry.url, target) not in kept:
                storage.delete(entry.url)


def make_split(name: str, results: Sequence[ShardResult], num_classes: int) -> Split:
    """Gathers the shards of one split that hold rows, in order."""
    mine = [result for result in results if result.split == name]
    shards = sorted((result.shard for result in mine if result.shard.num_rows), key=lambda shard: shard.path)
    return Split(
        tuple(shards), tuple(sum(result.class_rows.get(label, 0) for result in mine) for label in range(num_classes))
    )


def check_quarantine(job: Job, manifest: Manifest, quarantined: Sequence[dict[str, Any]]) -> None:
    """Raises DataError when more inputs were rejected than allowed, or a split or a class in train has no image left."""
    limit = job.config.max_bad_fraction
    num_images = job.num_inputs - job.num_skipped
    if len(quarantined) > limit * num_images:
        first = quarantined[0]
        raise DataError(
            f"{job.config.source_url}: {len(quarantined)} of {num_images} images cannot be used, first {first['path']}"
            f" ({first['reason']}: {first['detail']}); expected at most {limit:.2%}; repair or remove them, or raise --max_bad_fraction"
        )
    for name, split in manifest.splits.items():
        if not split.num_rows:
            raise DataError(
                f"{job.config.source_url}: split {name!r} has no usable image; expected at least one; add images, or remove it"
            )
    for label, rows in enumerate(manifest.splits["train"].class_rows if "train" in manifest.splits else ()):
        if not rows:
            raise DataError(
                f"{job.config.source_url}: class {job.classes[label]!r} has no usable training image; expected at least one; add images"
            )
