"""What the audits of all shards prove together: that the data set is what its manifest says, or where it is not.

Spark (jobs/audit.py) or this process (`audit_here`) run `shard_parts` for each shard, bring together what has the same number, and give
it to `join_parts`; `conclude` adds up. The result does not depend on who runs what, or in which order.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import hashlib
import json
import operator
import os
import posixpath
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from cvdist import storage
from cvdist.audit import PixelSums, Problem, Scope, ShardAudit, Task, audit_shard
from cvdist.errors import DataError, NotFoundError
from cvdist.foreign import SUFFIX
from cvdist.reader import meaning_of
from cvdist.repeats import BUCKET_ROWS, KINDS, Repeats, Sighting, deal, find_repeats
from cvdist.shards import Manifest, Shard, manifest_bytes
from cvdist.sources.columns import listed

AUDIT_NAME = "audit.json"
AUDIT_VERSION = 1
MAX_PROBLEMS = 20
MAX_FILES = 10


@dataclasses.dataclass(frozen=True)
class Audit:
    """The result: proven if there is no problem. Photos that repeat, and files that nobody reads, are warnings.

    Attributes:
        manifest: What was to be proven.
        num_bytes: Of all shards together.
        pixels: Of the images of train.
        num_problems: How many there are.
        problems: The first of them.
        repeats: By kind: duplicates, leaks, conflicts.
        unread_files: Files in the folders of splits that the manifest does not name.
    """

    manifest: Manifest
    num_bytes: int
    pixels: PixelSums
    num_problems: int
    problems: tuple[Problem, ...]
    repeats: dict[str, Repeats]
    unread_files: tuple[str, ...]


def plan(data_url: str, manifest: Manifest) -> tuple[Scope, list[Task]]:
    """Returns what all shards share, and one task for each."""
    splits = enumerate(manifest.splits.items())
    shards = [(name, index, shard) for index, (name, split) in splits for shard in split.shards]
    num_buckets = max(1, -(-manifest.num_rows // BUCKET_ROWS))
    schema, num_classes = manifest.schema, len(manifest.classes)
    scope = Scope(data_url, manifest.image, schema, num_classes, num_buckets, meaning_of(manifest))
    return scope, [Task(number, *rest) for number, rest in enumerate(shards)]


def shard_parts(scope: Scope, task: Task) -> Iterator[tuple[int, ShardAudit | bytes]]:
    """Yields what one shard adds to the audit: its rows under the numbers of their buckets, and, under one of its own, what it holds.

    Raises:
        StorageError: The file system failed.
    """
    audit, rows = audit_shard(scope, task)
    yield from deal(rows, scope.num_buckets)
    yield 2 * scope.num_buckets + task.number, audit


def join_parts(numbered: tuple[int, Iterable[ShardAudit | bytes]]) -> list[ShardAudit | Repeats]:
    """Looks at all parts with one number: finds the repeats of a bucket, or passes on what a shard holds."""
    parts = list(numbered[1])
    audits = [part for part in parts if isinstance(part, ShardAudit)]
    return [*audits, *find_repeats([part for part in parts if isinstance(part, bytes)])]


def audit_here(
    data_url: str, manifest: Manifest, *, threads: int | None = None, progress: Callable[[int], None] = lambda _: None
) -> Audit:
    """Audits a data set in this process; the buckets lie in temporary files.

    Args:
        data_url: The data set.
        manifest: Its manifest.
        threads: Shards read at once; by default one on each core.
        progress: Told the samples of each shard that is done.

    Raises:
        StorageError: The file system failed.
    """
    scope, tasks = plan(data_url, manifest)
    results: list[ShardAudit | Repeats] = []
    pool = ThreadPoolExecutor(threads or len(os.sched_getaffinity(0)), thread_name_prefix="audit")
    with tempfile.TemporaryDirectory(prefix="cvdist-audit-") as folder:
        try:
            for task, parts in zip(tasks, pool.map(lambda task: list(shard_parts(scope, task)), tasks), strict=True):
                for number, part in parts:
                    if isinstance(part, ShardAudit):
                        results.append(part)
                    else:
                        put_aside(Path(folder) / str(number), part)
                progress(task.shard.num_rows)
        finally:
            pool.shutdown(cancel_futures=True)
        for path in Path(folder).iterdir():
            results += join_parts((int(path.name), parts_of(path)))
    return conclude(data_url, manifest, results)


def put_aside(path: Path, part: bytes) -> None:
    """Adds a part to the file of its bucket."""
    with path.open("ab") as stream:
        stream.write(len(part).to_bytes(8, "little") + part)


def parts_of(path: Path) -> Iterator[bytes]:
    """Yields the parts of a bucket's file."""
    with path.open("rb") as stream:
        while size := stream.read(8):
            yield stream.read(int.from_bytes(size, "little"))


def conclude(data_url: str, manifest: Manifest, results: Iterable[ShardAudit | Repeats]) -> Audit:
    """Adds up what `join_parts` gave, in any order, and checks what lies beside the shards.

    Raises:
        DataError: A shard was not audited, or twice.
        StorageError: The file system failed.
    """
    shards: list[ShardAudit] = []
    repeats = {kind: Repeats(kind) for kind in KINDS}
    for result in results:
        if isinstance(result, Repeats):
            repeats[result.kind] += result
        else:
            shards.append(result)
    shards.sort(key=lambda audit: audit.number)
    _, tasks = plan(data_url, manifest)
    if [audit.number for audit in shards] != [task.number for task in tasks]:
        raise DataError(
            f"{data_url}: {len(shards)} shards were audited; expected {len(tasks)}, each once; audit it again"
        )
    beside = [*manifest_problems(manifest), *table_problems(data_url, manifest)]
    counts = count_problems(manifest, tasks, shards)
    keys = repeats.pop("keys")
    problems = [
        *beside,
        *(problem for audit in shards for problem in audit.problems),
        *counts,
        *(key_problem(tasks, example) for example in keys.examples),
    ]
    return Audit(
        manifest=manifest,
        num_bytes=sum(task.shard.num_bytes for task in tasks),
        pixels=functools.reduce(operator.add, (audit.pixels for audit in shards), PixelSums()),
        num_problems=len(beside) + sum(audit.num_problems for audit in shards) + len(counts) + keys.num_photos,
        problems=tuple(problems[:MAX_PROBLEMS]),
        repeats=repeats,
        unread_files=tuple(unread_files(data_url, manifest)),
    )


def manifest_problems(manifest: Manifest) -> Iterator[Problem]:
    """Looks for statements of the manifest that contradict each other."""
    counted = manifest.num_rows + manifest.num_quarantined + manifest.num_skipped
    if counted != manifest.num_inputs:
        yield Problem(manifest.name, f"rows + quarantined + skipped are {counted}", f"{manifest.num_inputs} inputs")
    paths = collections.Counter(shard.path for split in manifest.splits.values() for shard in split.shards)
    for path, times in paths.items():
        if times > 1:
            yield Problem(manifest.name, f"{path} is named {times} times", "each shard once")
    for name, split in manifest.splits.items():
        if sum(split.class_rows) != split.num_rows or len(split.class_rows) != len(manifest.classes):
            found = f"the classes of {name} have {sum(split.class_rows)} samples, {len(split.class_rows)} classes"
            yield Problem(manifest.name, found, f"{split.num_rows} samples, {len(manifest.classes)} classes")
        for shard in split.shards:
            if not manifest.adopted and posixpath.dirname(shard.path) != name:
                yield Problem(manifest.name, f"{shard.path} is a shard of {name}", f"shards in the folder {name}")


def table_problems(data_url: str, manifest: Manifest) -> Iterator[Problem]:
    """Compares the tables of quarantined inputs and of repeats with the manifest."""
    listed = sum(table.num_rows for table in manifest.quarantine)
    if listed != manifest.num_quarantined:
        yield Problem(
            manifest.name, f"{manifest.num_quarantined} inputs are quarantined", f"{listed}, as in the tables it names"
        )
    for table in (*manifest.quarantine, *manifest.repeats):
        try:
            data = storage.read_bytes(storage.join(data_url, table.path))
        except NotFoundError:
            yield Problem(table.path, "the file does not exist", "the table that the manifest names")
            continue
        if hashlib.sha256(data).hexdigest() != table.sha256:
            yield Problem(table.path, "the file differs from its sha256")


def count_problems(manifest: Manifest, tasks: Sequence[Task], shards: Sequence[ShardAudit]) -> list[Problem]:
    """Compares the samples of each class in each split, where every row of the split was read."""
    problems = []
    for name, split in manifest.splits.items():
        mine = [audit for task, audit in zip(tasks, shards, strict=True) if task.split == name]
        if not all(audit.is_counted for audit in mine):
            continue  # that the shard cannot be read is a problem already
        counted: collections.Counter[int] = collections.Counter()
        for audit in mine:
            counted.update(audit.class_rows)
        for label, rows in enumerate(split.class_rows):
            if counted[label] != rows:
                problems.append(Problem(name, f"{counted[label]} samples have label {label}", f"{rows}"))
    return problems


def key_problem(tasks: Sequence[Task], rows: Sequence[Sighting]) -> Problem:
    """Puts a repeated key into words."""
    first, second = (row_name(tasks[row.shard].shard, row.row) for row in rows)
    return Problem(first, f"key {rows[0].key!r}, which {second} has too", "every key once in the data set")


def row_name(shard: Shard, row: int) -> str:
    """Returns where a row, counted through its shard, is; as every message names it."""
    ends = np.cumsum(shard.row_group_rows)
    group = int(np.searchsorted(ends, row, side="right"))
    return f"{shard.path}, row group {group}, row {row - int(ends[group]) + shard.row_group_rows[group]}"


def unread_files(data_url: str, manifest: Manifest) -> Iterator[str]:
    """Yields what lies in the folders of splits beside the shards and Petastorm's metadata; beside adopted files: others of their kind."""
    known = {shard.path for split in manifest.splits.values() for shard in split.shards}
    if manifest.adopted:
        found, _ = listed(data_url, (SUFFIX,))
        yield from sorted({storage.relative(file.url, data_url) for file in found} - known)
        return
    for name in manifest.splits:
        try:
            entries = storage.list_dir(storage.join(data_url, name))
        except NotFoundError:
            continue  # that its shards are missing is a problem already
        paths = (f"{name}/{storage.name(entry.url)}" for entry in entries)
        yield from (path for path in paths if path not in known and path != f"{name}/_common_metadata")


def places(manifest: Manifest, rows: Sequence[Sighting]) -> list[dict[str, str]]:
    """Returns the rows of an example with the names of their splits and classes."""
    splits, classes = list(manifest.splits), manifest.classes
    return [
        {
            "key": row.key,
            "split": splits[row.split],
            "class": classes[row.label] if 0 <= row.label < len(classes) else "",
        }
        for row in rows
    ]


def audit_bytes(audit: Audit) -> bytes:
    """Returns the JSON of an audit: a function of the data set alone, wherever it lies."""
    manifest = audit.manifest
    repeats = {
        kind: {
            "num_photos": found.num_photos,
            "num_samples": found.num_samples,
            "first": [places(manifest, rows) for rows in found.examples],
        }
        for kind, found in audit.repeats.items()
    }
    body: dict[str, Any] = {
        "format": "cvdist audit",
        "version": AUDIT_VERSION,
        "proven": not audit.num_problems,
        "manifest_sha256": json.loads(manifest_bytes(manifest))["sha256"],
        "num_rows": manifest.num_rows,
        "num_bytes": audit.num_bytes,
        "class_rows": {
            name: dict(zip(manifest.classes, split.class_rows, strict=False)) for name, split in manifest.splits.items()
        },
        "train_channel_mean": audit.pixels.mean(),
        "train_channel_std": audit.pixels.std(),
        "num_problems": audit.num_problems,
        "problems": [dataclasses.asdict(problem) for problem in audit.problems],
        "repeats": repeats,
        "num_unread_files": len(audit.unread_files),
        "unread_files": audit.unread_files[:MAX_FILES],
    }
    return json.dumps(body, indent=1, ensure_ascii=False).encode() + b"\n"


def write_audit(data_url: str, audit: Audit) -> str:
    """Writes audit.json beside the manifest, and returns its URL; an older one gives way."""
    hidden = "_" if audit.manifest.adopted else ""  # from other readers of the folder
    url = storage.join(data_url, hidden + AUDIT_NAME)
    storage.write_bytes(url, audit_bytes(audit), overwrite=True)
    return url


def report_lines(audit: Audit) -> list[str]:
    """Returns an audit in words."""
    manifest = audit.manifest
    num_shards = sum(len(split.shards) for split in manifest.splits.values())
    lines = [f"audit: {manifest.num_rows:,} samples in {num_shards} shards, {audit.num_bytes / 1e6:,.1f} MB re-read"]
    if audit.pixels.num_pixels:
        mean, std = (
            " ".join(f"{value:.4f}" for value in values) for values in (audit.pixels.mean(), audit.pixels.std())
        )
        lines.append(
            f"  train pixels   mean {mean}  std {std}  (0 to 1, {'RGB' if manifest.image.channels == 3 else 'grey'})"
        )
    texts = {
        "duplicates": "photos are there more than once in a class of a split",
        "leaks": "photos are in more than one split",
        "conflicts": "photos are in more than one class",
    }
    for kind, text in texts.items():
        found = audit.repeats[kind]
        concerned = f"{found.num_photos:,} {text} ({found.num_samples:,} samples)" if found.num_photos else "none"
        lines.append(f"  {kind:<14} {concerned}")
        for rows in found.examples:
            named = [f"{place['key']} ({place['split']}, {place['class']})" for place in places(manifest, rows)]
            lines.append(f"    {' = '.join(named)}")
        if found.num_photos > len(found.examples):
            lines.append(f"    ... and {found.num_photos - len(found.examples):,} more")
    if audit.unread_files:
        count = len(audit.unread_files)
        what = "in the folders of splits that cvdist never reads, though Petastorm may"
        lines.append(f"  unread files   {count:,} {'that came after the adoption' if manifest.adopted else what}:")
        lines += [f"    {path}" for path in audit.unread_files[:MAX_FILES]]
    for problem in audit.problems:
        lines.append(f"  PROBLEM        {problem.where}: {problem.found}; expected {problem.expected}")
    if audit.num_problems > len(audit.problems):
        lines.append(f"  PROBLEM        ... and {audit.num_problems - len(audit.problems):,} more")
    if not audit.num_problems:
        lines.append("  proven         every byte, row, label, pixel and key is what the manifest says")
    return lines


def require_proven(data_url: str, audit: Audit, *, strict: bool) -> None:
    """Ends in an error unless the data set is proven.

    Args:
        data_url: The data set.
        audit: Its audit.
        strict: A photo in two splits or two classes is an error too.

    Raises:
        DataError: It is not.
    """
    if audit.num_problems:
        first, verb = audit.problems[0], "adopt" if audit.manifest.adopted else "prepare"
        raise DataError(
            f"{data_url}/{first.where}: {first.found}; expected {first.expected}; restore it or {verb} again"
            f" (problem 1 of {audit.num_problems})"
        )
    leaks, conflicts = audit.repeats["leaks"], audit.repeats["conflicts"]
    if strict and (leaks.num_photos or conflicts.num_photos):
        first_rows = places(audit.manifest, (leaks.examples or conflicts.examples)[0])
        named = " and ".join(f"{row['key']} ({row['split']}, {row['class']})" for row in first_rows)
        raise DataError(
            f"{data_url}: {leaks.num_photos} photos are in more than one split and {conflicts.num_photos} in more than one class,"
            f" first {named}; expected each in one; remove the copies and prepare again, or audit without --strict"
        )
