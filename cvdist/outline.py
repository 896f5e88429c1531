"""From the source to a listing that says what each shard holds: the part of a preparation before any shard is written."""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
import re
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from cvdist import ledger, sources, storage
from cvdist.config import PrepareConfig, dump
from cvdist.errors import DataError
from cvdist.images import Rejected
from cvdist.leaks import find_leaks
from cvdist.listing import SPLITS, Assigner, Selection, Spool, cut, new_digest, select
from cvdist.progress import duration
from cvdist.shards import VERSION, Manifest
from cvdist.tasks import (
    LISTING_NAME,
    UNHASHED_NAME,
    Job,
    converter,
    hash_part,
    job_url,
    pack_part,
    parquet_writer,
    read_input,
    read_parts,
)

T = TypeVar("T")

PROBE_IMAGES, MIN_PROBES, ROWS_A_PROBE = 32, 4, 64  # most, fewest, and one for so many rows
PART_ROWS = 4096
MIN_SHARD_ROWS = 512
MAX_SMALL_SHARDS = 16
# Settings that no row depends on.
NO_ROW_DEPENDS = ("source_url", "target_url", "max_bad_fraction", "read_threads", "append", "dry_run")


class RunTasks(Protocol):
    """Runs `function` for each number, anywhere and in any order, and returns all results."""

    def __call__(self, description: str, function: Callable[[int], T], numbers: Sequence[int]) -> list[T]:
        """Returns a result for each number; raises what a task raises in the end."""


def settings(config: PrepareConfig) -> dict[str, Any]:
    """Returns the settings that rows are a function of."""
    return {key: value for key, value in dump(config).items() if key not in NO_ROW_DEPENDS}


class Outline:
    """From the source to a listing that says what each shard holds.

    Attributes:
        digest: sha256 of format, settings and inputs.
        num_listed: Inputs that are new; before `read_contents` of a source that has to be unpacked, its containers.
        num_held: Inputs whose keys the data set that is appended to holds already.
        probe_seconds: For decoding and encoding one image.
        probe_bytes: Mean size of a stored image.
    """

    def __init__(self, config: PrepareConfig, folder: pathlib.Path, previous: Manifest | None) -> None:
        """Reads nothing yet; `folder` is scratch space, `previous` what is appended to."""
        self.config, self._folder = config, folder
        self._previous = previous if config.append else None
        self.digest, self.num_listed, self.num_held = "", 0, 0
        self.probe_seconds, self.probe_bytes = 0.0, 1.0

    def list_source(self) -> None:
        """Lists the source."""
        config = self.config
        self._source = sources.open_source(config)
        chain = [self._previous.digest] if self._previous else []
        digest = new_digest(json.dumps([VERSION, settings(config)], sort_keys=True), *chain)
        if self._source.containers:
            digest.update(repr([(box.path, box.size_bytes) for box in self._source.containers]).encode())
            self.num_listed = len(self._source.containers)
        else:
            self._spool = self._new_spool("listed", self._source.batches())
            self._spool.digest(digest)
            self.num_listed = self._spool.num_rows
        self.digest = digest.hexdigest()
        self._job_url = job_url(config, self.digest)

    def _new_spool(self, name: str, tables: Iterator[pa.Table]) -> Spool:
        """Spools tables, without those inputs that the data set holds already."""
        self.num_held = 0
        spool = Spool(self._folder / name, self.config.seed, self._source.extra)
        held = np.sort(np.concatenate([key_hashes(t["key"]) for t in self._held()] or [np.zeros(0, "S16")]))
        for table in tables:
            if len(held):
                hashes = key_hashes(table["key"])
                places = np.minimum(np.searchsorted(held, hashes), len(held) - 1)
                is_new = held[places] != hashes
                self.num_held += int((~is_new).sum())
                table = table.filter(pa.array(is_new))
            spool.add(table)
        return spool

    def _held(self) -> Iterator[pa.Table]:
        """Yields what the data set holds already."""
        return ledger.held_rows(self.config.target_url, self._previous) if self._previous else iter(())

    def read_contents(self, run_tasks: RunTasks) -> None:
        """Where the inputs' addresses or hashes are not known yet: has tasks find them."""
        config, boxes = self.config, self._source.containers
        if boxes:
            pack = functools.partial(pack_part, config, self._job_url, self._source.extra, boxes)
            run_tasks(f"unpack {len(boxes)} files of {config.source_url}", pack, range(len(boxes)))
            self._spool = self._new_spool("unpacked", read_parts(self._job_url, len(boxes)))
        elif config.on_leak != "keep" or config.split_by == "content":
            num_parts = self._write_unhashed()
            run_tasks(
                f"hash {self._spool.num_rows} inputs",
                functools.partial(hash_part, config, self._job_url),
                range(num_parts),
            )
            self._spool = self._new_spool("hashed", read_parts(self._job_url, num_parts))
        self.num_listed = self._spool.num_rows
        self._settle()

    def _write_unhashed(self) -> int:
        """Writes the inputs in row groups of PART_ROWS; returns how many."""
        num_parts, waiting = 0, pa.schema([*sources.ROWS, *self._source.extra]).empty_table()
        with parquet_writer(storage.join(self._job_url, UNHASHED_NAME), waiting.schema) as writer:
            for table in self._spool.tables():
                waiting = pa.concat_tables([waiting, table]).combine_chunks()
                while waiting.num_rows >= PART_ROWS:
                    writer.write_table(waiting.slice(0, PART_ROWS), row_group_size=PART_ROWS)
                    waiting, num_parts = waiting.slice(PART_ROWS), num_parts + 1
            if waiting.num_rows:
                writer.write_table(waiting, row_group_size=PART_ROWS)
                num_parts += 1
        return num_parts

    def _settle(self) -> None:
        """Decides on classes and splits; finds leaks; counts the rows of each split; picks some to probe."""
        config = self.config
        self.selection: Selection = select(self._spool, config, self._previous.classes if self._previous else None)
        self._assigner = Assigner(self._spool, self.selection, config)
        if config.on_leak != "keep":
            held = (table for table in self._held() if table["split"].null_count == 0)
            leaks = find_leaks(self._assigner.tables(), held, self._folder / "leaks", config.on_leak)
            self._assigner.reject_leaks(leaks)
        self.split_rows = dict.fromkeys(SPLITS, 0)
        self.num_rejected = 0
        self.num_bytes = 0
        self._probes: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS}
        for table in self._assigner.tables():
            usable = table.filter(pc.is_null(table["reason"]))
            self.num_rejected += table.num_rows - usable.num_rows
            self.num_bytes += pc.sum(usable["size_bytes"]).as_py() or 0
            for split in SPLITS:
                mine = usable.filter(pc.equal(usable["split"], split))
                self.split_rows[split] += mine.num_rows
                self._probes[split] += mine.slice(0, PROBE_IMAGES - len(self._probes[split])).to_pylist()
        self.split_rows = {split: rows for split, rows in self.split_rows.items() if rows}
        if not self.split_rows:
            raise DataError(
                f"{config.source_url} holds no usable image; expected at least one of each class; correct the URL"
            )

    def describe(self) -> Iterator[str]:
        """Yields lines about what a run would do, after `list_source`; runs no task."""
        config, boxes = self.config, self._source.containers
        if boxes:
            megabytes = sum(box.size_bytes for box in boxes) / 1e6
            yield f"{config.source_url}: {len(boxes)} files, {megabytes:,.1f} MB, that have to be unpacked before more can be said"
            yield f"  unpacked into {storage.join(self._job_url, 'packed')} meanwhile, which needs as much room"
            return
        self.config = dataclasses.replace(config, on_leak="keep", split_by=config.split_by.replace("content", "ratio"))  # type: ignore[arg-type]
        if self.config != config:
            yield "  the contents are not read now: leaks are not looked for, and splits by content are estimated"
        self._settle()
        num_shards = self.num_shards()
        num_rows = sum(self.split_rows.values())
        skipped = self._source.num_skipped + self._assigner.skipped.total()
        yield f"{config.source_url}: {self._spool.num_rows + self._source.num_skipped:,} inputs, {self.num_bytes / 1e6:,.1f} MB known"
        yield f"  {num_rows:,} to be decoded, {self.num_rejected:,} rejected already, {skipped:,} skipped"
        for split, rows in self.split_rows.items():
            megabytes = rows * self.probe_bytes / 1e6
            yield f"  {split:<8} {rows:>9,} images, about {num_shards[split]:,} shards, {megabytes:,.1f} MB"
        yield f"  classes  {len(self.selection.classes):,}: {', '.join(self.selection.classes[:10])}"
        for target in self.selection.targets:
            yield f"  target   {target.name}: {target.kind}{f' of {len(target.classes)} classes' if target.classes else ''}"
        takes = duration(num_rows * self.probe_seconds)
        yield f"  takes    about {takes} on one core, by the decoding of some images; nothing was written"

    def num_shards(self) -> dict[str, int]:
        """Returns into how many shards each split is cut, judged by the stored size of a few of its images.

        A small split is cut into several all the same, so that several tasks can write it.
        """
        found: dict[str, int] = {}
        with converter(self.config) as to_sample:
            for split, num_rows in self.split_rows.items():
                num_probes = max(MIN_PROBES, num_rows // ROWS_A_PROBE)
                inputs = [read_input(self.config, entry) for entry in self._probes[split][:num_probes]]
                started_s = time.process_time()
                samples = [to_sample(data) for data in inputs if isinstance(data, bytes)]
                self.probe_seconds = (time.process_time() - started_s) / max(1, len(samples))
                sizes = [len(sample.image) for sample in samples if not isinstance(sample, Rejected)] or [1]
                self.probe_bytes = float(np.mean(sizes))
                by_bytes = -(-int(self.probe_bytes * num_rows) // self.config.shard_bytes)
                found[split] = max(1, min(by_bytes, num_rows), min(num_rows // MIN_SHARD_ROWS, MAX_SMALL_SHARDS))
        return found

    def write_listing(self, num_shards: dict[str, int]) -> Job:
        """Writes one row group for each shard, and those inputs that are rejected already into a ledger of their own."""
        config, previous = self.config, self._previous
        first = {split: next_number(previous, split) for split in num_shards}
        shards: list[tuple[str, int]] = []
        with parquet_writer(storage.join(self._job_url, LISTING_NAME), self._assigner.schema) as writer:
            for split, number, rows in cut(self._assigner.tables(), self.split_rows, num_shards):
                writer.write_table(rows, row_group_size=max(1, rows.num_rows))
                shards.append((split, first[split] + number))
        skipped = dict(self._assigner.skipped)
        self._write_rejected()
        class_inputs: dict[str | None, int] = {}
        for (name, _, _), count in self._spool.counts.items():
            class_inputs[name] = class_inputs.get(name, 0) + count
        # Files passed over by their names were counted when the data set was made; which of them are new is not known.
        num_passed_over = 0 if previous else self._source.num_skipped
        return Job(
            config=config,
            classes=self.selection.classes,
            targets=self.selection.targets,
            is_weighted=self.selection.is_weighted,
            shards=tuple(shards),
            num_inputs=self._spool.num_rows + num_passed_over,
            num_skipped=num_passed_over + sum(skipped.values()),
            class_inputs=class_inputs,
            class_skipped=skipped,
            digest=self.digest,
        )

    def _write_rejected(self) -> None:
        """Writes the ledger of those inputs that no task needs to look at."""
        with parquet_writer(storage.join(self._job_url, "rejected.parquet"), ledger.LEDGER) as writer:
            for table in self._assigner.tables():
                named = table.rename_columns(["path" if name == "key" else name for name in table.schema.names])
                rows = named.select(ledger.LEDGER.names).filter(pc.is_valid(named["reason"]))
                if rows.num_rows:
                    writer.write_table(rows.cast(ledger.LEDGER))


def next_number(previous: Manifest | None, split: str) -> int:
    """Returns the first free number of a shard in a split."""
    if previous is None or split not in previous.splits:
        return 0
    return 1 + max(int(re.findall(r"\d+", shard.path)[-1]) for shard in previous.splits[split].shards)


def key_hashes(keys: pa.ChunkedArray) -> Any:
    """Returns 16 bytes of hash for each key, as a NumPy array of S16."""
    return np.array([xxhash.xxh3_128_digest(key.encode()) for key in keys.to_pylist()], "S16")
