"""The end of a preparation: count what the ledgers say, write quarantine, repeats, metadata and card, and the manifest, last."""

from __future__ import annotations

import collections
import dataclasses
import pathlib
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cvdist import ledger, storage
from cvdist.buckets import Buckets, groups_of, sha256_hashes
from cvdist.card import CARD_NAME, card
from cvdist.common_metadata import petastorm_metadata
from cvdist.errors import DataError, NotFoundError
from cvdist.hashing import HashingStream
from cvdist.ledger import HELD, LEDGER, ShardResult
from cvdist.listing import new_digest
from cvdist.outline import settings
from cvdist.shards import (
    MANIFEST_NAME,
    Manifest,
    Split,
    Table,
    manifest_bytes,
    read_manifest,
    write_manifest,
)
from cvdist.tasks import Job, file_sha256, image_spec, work_url

QUARANTINE_NAME = "quarantine.parquet"
REPEATS_NAME = "repeats.parquet"
OLD_MANIFESTS = "manifests"
# A temporary file of a driver that was killed.
LEFTOVER = re.compile(
    r"\.(quarantine(-\d+)?\.parquet|repeats(-\d+)?\.parquet|_common_metadata|README\.md|manifest\.json|\d+\.json)\.[0-9a-f]{32}\.tmp"
)
REPEATS = pa.schema(
    [
        pa.field("sha256", pa.string()),
        pa.field("path", pa.string()),
        pa.field("split", pa.string()),
        pa.field("class", pa.string()),
        pa.field("is_duplicate", pa.bool_()),
        pa.field("is_leak", pa.bool_()),
        pa.field("is_conflict", pa.bool_()),
    ]
)


@dataclasses.dataclass
class Tally:
    """What the ledgers say: inputs of each class with and without a row, and rejected ones by reason with the first path."""

    class_rows: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    class_quarantined: collections.Counter[str | None] = dataclasses.field(default_factory=collections.Counter)
    reasons: dict[str, tuple[int, str]] = dataclasses.field(default_factory=dict)
    examples: dict[str, str] = dataclasses.field(default_factory=dict)  # the first stored input of each class

    def add(self, entries: pa.Table) -> None:
        """Counts the inputs of a ledger."""
        for pair in entries.filter(pc.is_null(entries["reason"]))["class"].value_counts().to_pylist():
            self.class_rows[pair["values"]] += pair["counts"]
        stored = entries.filter(pc.is_null(entries["reason"]))
        self.add_examples(stored["class"], stored["path"])
        rejected = entries.filter(pc.is_valid(entries["reason"]))
        for pair in rejected["class"].value_counts().to_pylist():
            self.class_quarantined[pair["values"]] += pair["counts"]
        self.add_reasons(rejected)

    def add_examples(self, classes: pa.ChunkedArray, paths: pa.ChunkedArray) -> None:
        """Remembers one input of each class that has none yet."""
        for name in set(classes.unique().to_pylist()) - self.examples.keys():
            self.examples[name] = paths[pc.index(classes, name).as_py()].as_py()

    def add_reasons(self, rejected: pa.Table) -> None:
        """Counts why inputs were rejected."""
        for entry in rejected.select(["path", "reason"]).to_pylist():
            count, first = self.reasons.get(entry["reason"], (0, entry["path"]))
            self.reasons[entry["reason"]] = (count + 1, min(first, entry["path"]))


def finish(job: Job, results: Sequence[ShardResult], require_lock: Callable[[], None] = lambda: None) -> Manifest:
    """Counts what the shards hold, and writes quarantine, repeats, Petastorm metadata, card and, last, the manifest.

    Args:
        job: The job.
        results: Of each of its shards.
        require_lock: Raises where another run has taken over.

    Raises:
        DataError: Not every input is accounted for; too many were rejected; or a split or class lost all its images. The shards stay, so
            that another try with a higher limit has little to do.
    """
    config, target = job.config, job.config.target_url
    previous = read_manifest(target) if config.append and storage.exists(storage.join(target, MANIFEST_NAME)) else None
    require_lock()
    require_all_shards(job, results)
    quarantine_url = work_url(config, QUARANTINE_NAME)
    with tempfile.TemporaryDirectory(prefix="cvdist-prepare-") as folder:
        buckets, tally = Buckets(pathlib.Path(folder) / "files", HELD), Tally()
        quarantine = write_table(quarantine_url, LEDGER, rejected_entries(job, results, tally, buckets))
        check_conservation(job, tally)
        manifest = make_manifest(job, results, quarantine.num_rows)
        check_quarantine(job, manifest, tally, quarantine_url)
        for rows in ledger.held_rows(target, previous) if previous else ():
            stored = rows.filter(pc.is_valid(rows["split"]))
            tally.add_examples(stored["class"], stored["key"])
            add_stored(buckets, stored)
        counts: collections.Counter[str] = collections.Counter()
        repeats = write_table(work_url(config, REPEATS_NAME), REPEATS, repeated_rows(buckets, counts))
    manifest = dataclasses.replace(manifest, repeat_files=dict(counts))
    number = len(previous.generations) + 1 if previous else 1
    tables: list[tuple[Table, ...]] = []
    for table in (quarantine, repeats):
        path = table.path if number == 1 else table.path.replace(".", f"-{number:04d}.")
        tables.append((dataclasses.replace(table, path=path),) if table.num_rows else ())
        if table.num_rows:
            storage.rename(work_url(config, table.path), storage.join(target, path), overwrite=True)
    manifest = dataclasses.replace(manifest, quarantine=tables[0], repeats=tables[1])
    if previous:
        manifest = appended(previous, manifest)
        for old in previous.quarantine:
            tally.add_reasons(ledger.read_ledger(storage.join(target, old.path)))
    require_lock()
    place_shards(job, results)
    write_beside(target, manifest, tally)
    if previous:
        old_url = storage.join(target, OLD_MANIFESTS, f"{number - 1:04d}.json")
        storage.write_bytes(old_url, manifest_bytes(previous), overwrite=True)
    require_lock()
    write_manifest(target, manifest, overwrite=previous is not None)
    storage.delete(work_url(config), recursive=True)
    return manifest


def require_all_shards(job: Job, results: Sequence[ShardResult]) -> None:
    """Raises DataError unless there is one result for each shard."""
    found = sorted(result.shard.path for result in results)
    expected = sorted(f"{split}/shard-{number:05d}.parquet" for split, number in job.shards)
    if found != expected:
        raise DataError(
            f"{job.config.target_url}: {len(found)} shards were written; expected {len(expected)}, each once; run prepare again"
        )


def rejected_entries(job: Job, results: Sequence[ShardResult], tally: Tally, buckets: Buckets) -> Iterator[pa.Table]:
    """Yields the rejected inputs of all ledgers in order, counting all inputs and dealing the stored ones to buckets."""
    urls = [storage.join(job.url, "rejected.parquet")]
    urls += [ledger.ledger_url(job.url, split, number) for split, number in job.shards]
    by_path = {result.shard.path: result for result in results}
    for url, shard in zip(urls, (None, *job.shards), strict=True):
        entries = ledger.read_ledger(url)
        if shard is not None:
            result = by_path[f"{shard[0]}/shard-{shard[1]:05d}.parquet"]
            if entries.num_rows != result.num_inputs:
                raise DataError(f"{url}: {entries.num_rows} inputs; expected {result.num_inputs}; run prepare again")
        tally.add(entries)
        stored = entries.filter(pc.is_null(entries["reason"]))
        add_stored(buckets, stored.select(["path", "sha256", "split", "class"]).rename_columns(HELD.names))
        yield entries.filter(pc.is_valid(entries["reason"]))


def add_stored(buckets: Buckets, rows: pa.Table) -> None:
    """Deals stored rows to buckets by their files."""
    buckets.add(rows.cast(HELD), sha256_hashes(rows["sha256"]))


def write_table(url: str, schema: pa.Schema, tables: Iterator[pa.Table]) -> Table:
    """Writes tables as one Parquet file; returns its rows and sha256."""
    num_rows = 0
    with storage.create(url, overwrite=True) as stream:
        hashing = HashingStream(stream)
        with pq.ParquetWriter(pa.PythonFile(hashing, mode="w"), schema, compression="ZSTD") as writer:
            for table in tables:
                num_rows += table.num_rows
                if table.num_rows:
                    writer.write_table(table.cast(schema))
    return Table(storage.name(url), num_rows, hashing.sha256.hexdigest())


def repeated_rows(buckets: Buckets, counts: collections.Counter[str]) -> Iterator[pa.Table]:
    """Yields the rows of files that are stored more than once, as `REPEATS`; counts duplicates, leaks and conflicts."""
    for table in buckets.tables():
        found: list[dict[str, Any]] = []
        for group in groups_of(table, "sha256"):
            places = collections.Counter((row["split"], row["class"]) for row in group)
            is_leak = len({row["split"] for row in group}) > 1
            is_conflict = len({row["class"] for row in group}) > 1
            is_duplicate = max(places.values()) > 1
            counts.update(duplicates=is_duplicate, leaks=is_leak, conflicts=is_conflict)
            kinds = {"is_duplicate": is_duplicate, "is_leak": is_leak, "is_conflict": is_conflict}
            found += [{**row, "path": row["key"], **kinds} for row in group]
        yield pa.Table.from_pylist(found, schema=REPEATS)


def check_conservation(job: Job, tally: Tally) -> None:
    """Raises DataError unless, of each class, rows + quarantined + skipped are the inputs that were listed."""
    for name, expected in job.class_inputs.items():
        counts = (
            tally.class_rows[name] if name else 0,
            tally.class_quarantined[name],
            job.class_skipped.get(name or "", 0),
        )
        if sum(counts) != expected:
            rows, quarantined, skipped = counts
            raise DataError(
                f"{job.config.target_url}: class {name!r} has {rows} rows + {quarantined} quarantined + {skipped} skipped;"
                f" expected {expected} inputs, as listed; run prepare again, and report this"
            )


def make_manifest(job: Job, results: Sequence[ShardResult], num_quarantined: int) -> Manifest:
    """Returns the manifest of what this preparation has written."""
    config = job.config
    manifest = Manifest(
        classes=job.classes,
        image=image_spec(config),
        splits={
            split: make_split(split, results, len(job.classes))
            for split in dict.fromkeys(split for split, _ in job.shards)
        },
        num_inputs=job.num_inputs,
        num_quarantined=num_quarantined,
        num_skipped=job.num_skipped,
        digest=job.digest,
        settings=settings(config),
        targets=job.targets,
        is_weighted=job.is_weighted,
        generations=(job.digest,),
    )
    counted = manifest.num_rows + manifest.num_quarantined + manifest.num_skipped
    if counted != job.num_inputs:
        raise DataError(
            f"{config.target_url}: {counted} inputs are accounted for; expected {job.num_inputs}; run prepare again, and report this"
        )
    return manifest


def make_split(name: str, results: Sequence[ShardResult], num_classes: int) -> Split:
    """Gathers the shards of one split that hold rows, in order."""
    mine = [result for result in results if result.split == name]
    shards = sorted((result.shard for result in mine if result.shard.num_rows), key=lambda shard: shard.path)
    return Split(
        tuple(shards), tuple(sum(result.class_rows.get(label, 0) for result in mine) for label in range(num_classes))
    )


def check_quarantine(job: Job, manifest: Manifest, tally: Tally, quarantine_url: str) -> None:
    """Raises DataError when more inputs were rejected than allowed, or a split or a class in train has no image left."""
    source, limit = job.config.source_url, job.config.max_bad_fraction
    num_images = job.num_inputs - job.num_skipped
    num_bad = manifest.num_quarantined - tally.reasons.get("leak", (0, ""))[0]
    if num_bad > limit * num_images:
        reasons = "; ".join(
            f"{reason} {count} times, first {first}" for reason, (count, first) in sorted(tally.reasons.items())
        )
        raise DataError(
            f"{source}: {num_bad} of {num_images} images cannot be used ({reasons}); expected at most {limit:.2%};"
            f" see {quarantine_url}; repair or remove them, or raise --max_bad_fraction, which keeps the work done"
        )
    if job.config.append:
        return
    for name, split in manifest.splits.items():
        if not split.num_rows:
            raise DataError(
                f"{source}: split {name!r} has no usable image; expected at least one; add images, or remove it"
            )
    for label, rows in enumerate(manifest.splits["train"].class_rows if "train" in manifest.splits else ()):
        if not rows:
            raise DataError(
                f"{source}: class {job.classes[label]!r} has no usable training image; expected at least one; add images"
            )


def appended(old: Manifest, new: Manifest) -> Manifest:
    """Returns the manifest of a data set and what was added to it."""
    splits = dict(old.splits)
    for name, added in new.splits.items():
        before = splits.get(name, Split((), (0,) * len(old.classes)))
        rows = tuple(a + b for a, b in zip(before.class_rows, added.class_rows, strict=True))
        splits[name] = Split((*before.shards, *added.shards), rows)
    return dataclasses.replace(
        new,
        splits=splits,
        num_inputs=old.num_inputs + new.num_inputs,
        num_quarantined=old.num_quarantined + new.num_quarantined,
        num_skipped=old.num_skipped + new.num_skipped,
        digest=new_digest(old.digest, new.digest).hexdigest(),
        quarantine=(*old.quarantine, *new.quarantine),
        generations=(*old.generations, new.digest),
    )


def place_shards(job: Job, results: Sequence[ShardResult]) -> None:
    """Gives every shard its name in the data set. Nobody else does, and it holds the lock.

    Raises:
        DataError: A shard is not there, or not the one that its ledger tells of.
    """
    for result in results:
        if not result.shard.num_rows:
            continue
        url, attempt_url = (
            storage.join(job.config.target_url, result.shard.path),
            storage.join(job.url, "attempts", result.attempt),
        )
        try:
            storage.rename(attempt_url, url, overwrite=True)
            is_whole = storage.stat(url).size_bytes == result.shard.num_bytes
        except NotFoundError:  # placed by a run that was killed behind this
            is_whole = storage.exists(url) and file_sha256(url) == result.shard.sha256
        if not is_whole:
            raise DataError(
                f"{url} is not the shard that was written; expected it; delete {job.config.target_url}, prepare again"
            )


def write_beside(target: str, manifest: Manifest, tally: Tally) -> None:
    """Writes what belongs to a data set besides shards and manifest, and removes what killed drivers have left."""
    for folder in (target, *(storage.join(target, name) for name in manifest.splits)):
        for entry in storage.list_dir(folder):
            if LEFTOVER.fullmatch(storage.name(entry.url)):
                storage.delete(entry.url)
    for name, split in manifest.splits.items():
        metadata = petastorm_metadata(split.shards, manifest.image.codec, manifest.schema)
        if metadata is not None:
            storage.write_bytes(storage.join(target, name, "_common_metadata"), metadata, overwrite=True)
    storage.write_bytes(
        storage.join(target, CARD_NAME), card(manifest, tally.reasons, tally.examples).encode(), overwrite=True
    )
