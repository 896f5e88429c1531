"""What the source lists, dealt to splits and shards: a stream of tables through local disk, in the same memory for any number of inputs.

Inputs are ordered by a hash of seed and key, which is the global shuffle. The order depends on nothing else: neither on how the source
was listed nor on what else it holds.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from cvdist.buckets import Buckets
from cvdist.config import PrepareConfig
from cvdist.errors import ConfigError, DataError
from cvdist.shards import SCHEMA, TARGET_TYPES, WEIGHT_COLUMN, Target
from cvdist.sources import ROWS

SPLITS = ("train", "val", "test")
MAX_VALUES = 100_000  # different ones of a class or target column
ORDER = pa.field("order", pa.uint64())

# An input with its place in the data set; behind these come the values of further targets.
ASSIGNED = pa.schema(
    [
        pa.field("key", pa.string()),
        pa.field("url", pa.string()),
        pa.field("offset", pa.int64()),
        pa.field("size_bytes", pa.int64()),
        pa.field("sha256", pa.string()),
        pa.field("class", pa.string()),
        pa.field("label", pa.int32()),
        pa.field("split", pa.string()),
        pa.field("reason", pa.string()),
        pa.field("detail", pa.string()),
        pa.field(WEIGHT_COLUMN, pa.float32()),
    ]
)


class Spool:
    """The listing on local disk, in the order of a hash of seed and key.

    Attributes:
        counts: Inputs of each (class, split, whether the listing rejects them); None where the source says nothing.
        values: Different values of each further label column.
        num_rows: Inputs.
    """

    def __init__(self, folder: pathlib.Path, seed: int, extra: pa.Schema) -> None:
        """Makes `folder`; `extra` are the further label columns."""
        clash = sorted(set(extra.names) & {*SCHEMA.names, *ASSIGNED.names, *ROWS.names, ORDER.name})
        if clash:
            raise DataError(
                f"label_columns: {clash[0]!r} is a name of cvdist's own; expected another; rename the column, or"
                " choose others by --label_columns"
            )
        self.extra = extra
        self.counts: collections.Counter[tuple[str | None, str | None, bool]] = collections.Counter()
        self.values: dict[str, set[Any]] = {name: set() for name in extra.names}
        self.num_rows = 0
        self.num_weighted = 0
        self._seed = seed
        self._buckets = Buckets(folder, pa.schema([*ROWS, *extra, ORDER]))

    def add(self, rows: pa.Table) -> None:
        """Adds a table of the source."""
        hashes = np.array(
            [xxhash.xxh3_64_intdigest(key.encode(), self._seed) for key in rows["key"].to_pylist()], np.uint64
        )
        marked = rows.select(["class", "split"]).append_column("rejected", pc.is_valid(rows["reason"]))
        for group in marked.group_by(["class", "split", "rejected"]).aggregate([([], "count_all")]).to_pylist():
            self.counts[group["class"], group["split"], group["rejected"]] += group["count_all"]
        for name, values in self.values.items():
            if not pa.types.is_floating(self.extra.field(name).type) and len(values) <= MAX_VALUES:
                values.update(rows[name].unique().to_pylist())
        require_few("classes", len(self.counts))
        self.num_rows += rows.num_rows
        self.num_weighted += rows.num_rows - rows[WEIGHT_COLUMN].null_count
        self._buckets.add(rows.append_column(ORDER, pa.array(hashes)), hashes)

    def tables(self) -> Iterator[pa.Table]:
        """Yields all inputs in order; may be called more than once.

        Raises:
            DataError: A key is there twice.
        """
        for table in self._buckets.tables():
            rows = table.sort_by([(ORDER.name, "ascending"), ("key", "ascending")]).combine_chunks()
            twice = pc.equal(rows["key"].slice(1), rows["key"].slice(0, max(0, rows.num_rows - 1)))
            if pc.any(twice).as_py():
                key = rows["key"][pc.index(twice, True).as_py()].as_py()
                raise DataError(f"{key}: is listed twice; expected every input once; remove one of the two")
            yield rows.drop_columns([ORDER.name])

    def digest(self, digest: Any) -> None:
        """Feeds every input to a hashlib object."""
        for table in self.tables():
            for values in zip(*(column.to_pylist() for column in table.columns), strict=True):
                digest.update(repr(values).encode())


@dataclasses.dataclass(frozen=True)
class Selection:
    """Which inputs become samples of which split and class.

    Attributes:
        classes: Names in label order.
        targets: Further labels.
        is_weighted: The source has weights.
        by: given, ratio, content or group.
        sizes: Inputs of each label (by ratio) or of each label and split (given) that are selected.
    """

    classes: tuple[str, ...]
    targets: tuple[Target, ...]
    is_weighted: bool
    by: str
    sizes: npt.NDArray[np.int64]


def select(spool: Spool, config: PrepareConfig, known: Sequence[str] | None = None) -> Selection:
    """Decides on classes, targets and the way to split.

    Args:
        spool: The inputs.
        config: Settings.
        known: Class names of the data set that is appended to.

    Raises:
        ConfigError: The settings ask for what the source has not.
        DataError: There are too few classes, or ones that the data set does not know.
    """
    found = {name for name, _, is_rejected in spool.counts if name is not None and not is_rejected}
    classes = chosen_classes(config, found) if known is None else tuple(known)
    if known is not None and not found <= set(known):
        new = ", ".join(sorted(found - set(known)))
        raise DataError(
            f"{config.source_url} holds classes that {config.target_url} does not know: {new}; expected those of the data set;"
            " leave them out by --classes, or prepare all anew elsewhere"
        )
    counts: dict[tuple[str, str | None], int] = collections.defaultdict(int)
    for (name, split, is_rejected), count in spool.counts.items():
        if name in classes and not is_rejected:
            counts[name, split] += count
    named = {split for _, split in counts}
    by = config.split_by
    if by == "auto":
        by = "given" if named and None not in named else "ratio"
    if (by == "given" and None in named) or (config.split_by == "auto" and by == "ratio" and named - {None}):
        raise DataError(
            f"{config.source_url}: some inputs have no split and others do; expected all or none; complete the splits, or choose"
            " --split_by ratio"
        )
    limit = config.limit_per_class or max(1, spool.num_rows)
    if by == "given":
        sizes = np.array([min(limit, counts[name, split]) for name in classes for split in SPLITS], np.int64)
    else:
        sizes = np.array([min(limit, sum(counts[name, split] for split in named)) for name in classes], np.int64)
    targets = tuple(target_of(field, spool.values[field.name], config) for field in spool.extra)
    return Selection(classes, targets, spool.num_weighted > 0, by, sizes)


def chosen_classes(config: PrepareConfig, found: set[str]) -> tuple[str, ...]:
    """Returns the class names in label order: sorted as numbers where all are whole numbers, else as text."""
    chosen = found
    if config.classes is not None:
        chosen = {name.strip() for name in config.classes.split(",")}
        if not chosen <= found:
            known = ", ".join(sorted(found)[:20])
            raise ConfigError(
                f"classes: {', '.join(sorted(chosen - found))} not found in {config.source_url}; expected some of {known}; correct it"
            )
    if len(chosen) < 2:
        raise DataError(
            f"{config.source_url} holds {len(chosen)} class{'es' * (not chosen)} ({', '.join(chosen) or 'none'}); expected at least"
            " two; add another, or correct the URL or --classes"
        )
    are_numbers = all(name.isascii() and name.isdigit() for name in chosen)
    return tuple(sorted(chosen, key=(lambda name: (int(name), name)) if are_numbers else None))


def require_few(what: str, count: int) -> None:
    """Raises DataError for more names than a classifier has."""
    if count > MAX_VALUES:
        raise DataError(
            f"{what}: more than {MAX_VALUES} different ones; expected names of classes; choose the right column or pattern"
        )


def target_of(field: pa.Field, values: set[Any], config: PrepareConfig) -> Target:
    """Describes a further label column, by config.target_kinds or by its values."""
    kinds = dict(pair.partition("=")[::2] for pair in (config.target_kinds or "").split(",") if pair)
    present = values - {None}
    if pa.types.is_floating(field.type):
        kind = "regression"
    elif pa.types.is_boolean(field.type) or (present <= {0, 1} and not pa.types.is_string(field.type)):
        kind = "binary"
    else:
        kind = "multiclass"
    kind = kinds.get(field.name, kind)
    if kind not in TARGET_TYPES or (kind != "regression" and pa.types.is_floating(field.type)):
        raise ConfigError(
            f"target_kinds: {field.name}={kind} does not fit a column of {field.type}; expected {', '.join(TARGET_TYPES)}; correct it"
        )
    if kind == "binary" and not present <= {0, 1, "0", "1"}:
        raise ConfigError(
            f"target_kinds: {field.name} is binary and holds {sorted(map(str, present))[:5]}; expected 0 and 1; use multiclass"
        )
    if kind == "regression" and pa.types.is_string(field.type):
        raise ConfigError(
            f"target_kinds: {field.name} is regression and holds text; expected numbers; use multiclass, or convert the column"
        )
    if kind != "multiclass":
        return Target(field.name, "binary" if kind == "binary" else "regression")
    require_few(field.name, len(present))
    are_numbers = not pa.types.is_string(field.type)
    return Target(
        field.name, "multiclass", tuple(str(value) for value in sorted(present, key=int if are_numbers else str))
    )


class Assigner:
    """Gives every selected input its label and split; passes over the same spool give the same.

    Attributes:
        skipped: Inputs of each class that the last pass has left out.
    """

    def __init__(self, spool: Spool, selection: Selection, config: PrepareConfig) -> None:
        """Takes the decisions of `select`."""
        self._spool, self._selection, self._config = spool, selection, config
        self._shares = config.split_shares()
        self._leaks: dict[str, str] = {}
        self.skipped: collections.Counter[str] = collections.Counter()

    @property
    def schema(self) -> pa.Schema:
        """The columns of `tables`."""
        return pa.schema([*ASSIGNED, *((target.name, TARGET_TYPES[target.kind]) for target in self._selection.targets)])

    def reject_leaks(self, leaks: Mapping[str, str]) -> None:
        """Has later passes reject these keys; the values say why."""
        self._leaks = dict(leaks)

    def tables(self) -> Iterator[pa.Table]:
        """Yields the selected inputs in order, rejected ones too, as `schema`."""
        chosen, limit = self._selection, self._config.limit_per_class
        self.skipped.clear()
        seen = np.zeros(len(chosen.sizes), np.int64)
        class_names = pa.array(chosen.classes, pa.string())
        for rows in self._spool.tables():
            labels = pc.fill_null(pc.index_in(rows["class"], value_set=class_names), -1).to_numpy().astype(np.int64)
            is_rejected = pc.is_valid(rows["reason"]).to_numpy()
            is_chosen = (labels >= 0) & ~is_rejected
            groups = labels
            if chosen.by == "given":
                codes = pc.fill_null(pc.index_in(rows["split"], value_set=pa.array(SPLITS)), -1).to_numpy()
                groups = labels * len(SPLITS) + codes
            ranks = np.full(len(labels), -1, np.int64)
            ranks[is_chosen] = running_ranks(groups[is_chosen], seen)
            if limit is not None:
                is_chosen &= ranks < limit
            left_out = rows["class"].filter(pa.array(~is_chosen & ~is_rejected))
            self.skipped.update({pair["values"]: pair["counts"] for pair in left_out.value_counts().to_pylist()})
            splits = self._splits(rows, labels, ranks, is_chosen)
            yield self._table(rows, labels, splits).filter(pa.array(is_chosen | is_rejected))

    def _splits(
        self,
        rows: pa.Table,
        labels: npt.NDArray[np.int64],
        ranks: npt.NDArray[np.int64],
        is_chosen: npt.NDArray[np.bool_],
    ) -> pa.Array:
        """Returns the split of each row; what a rejected one says itself."""
        by, given = self._selection.by, rows["split"].combine_chunks()
        if by == "given":
            return given
        names, edges = list(self._shares), np.cumsum(list(self._shares.values()))[:-1]
        if by == "ratio":
            sizes = self._selection.sizes[np.maximum(labels, 0)]
            limits = np.floor(edges[:, None] * sizes + 0.5)
            codes = (ranks >= limits).sum(axis=0)
        else:
            codes = np.searchsorted(edges, self._fractions(rows, is_chosen), side="right")
        dealt = pa.array(names).take(pa.array(codes))
        return pc.if_else(pa.array(is_chosen), dealt, given)

    def _fractions(self, rows: pa.Table, is_chosen: npt.NDArray[np.bool_]) -> npt.NDArray[np.float64]:
        """Returns a number from 0 to 1 for each row, by the content of the file or by the group."""
        column, by_content = (
            rows["sha256" if self._selection.by == "content" else "group"],
            self._selection.by == "content",
        )
        if not by_content and pc.any(pa.array(is_chosen & column.is_null().to_numpy())).as_py():
            raise DataError(
                f"{self._config.source_url}: some rows have no {self._config.group_column!r}; expected a value in each; complete the"
                " column, or split by ratio"
            )
        values = column.to_pylist()
        hashes = [xxhash.xxh3_64_intdigest((value or "").encode(), self._config.seed) for value in values]
        return np.array(hashes, np.float64) / 2.0**64

    def _table(self, rows: pa.Table, labels: npt.NDArray[np.int64], splits: pa.Array) -> pa.Table:
        columns = {name: rows[name] for name in ASSIGNED.names if name not in ("label", "split")}
        columns["label"] = pa.array(labels, pa.int32(), mask=labels < 0)
        columns["split"] = splits
        if self._leaks:
            keys = rows["key"].to_pylist()
            details = pa.array([self._leaks.get(key) for key in keys], pa.string())
            is_leak = pc.and_(pc.is_valid(details), pc.is_null(rows["reason"]))
            columns["reason"] = pc.if_else(is_leak, "leak", rows["reason"])
            columns["detail"] = pc.if_else(is_leak, details, rows["detail"])
        for target in self._selection.targets:
            columns[target.name] = target_values(rows[target.name], target)
        schema = self.schema
        return pa.table([columns[name] for name in schema.names], schema=schema)


def target_values(column: pa.ChunkedArray, target: Target) -> pa.Array:
    """Returns a further label as it is stored; what is unknown is -1, or NaN."""
    if target.kind == "multiclass":
        return pc.fill_null(pc.index_in(column.cast(pa.string()), value_set=pa.array(target.classes, pa.string())), -1)
    if target.kind == "binary":
        return pc.fill_null(column.cast(pa.int32()), -1)
    return pc.fill_null(column.cast(pa.float32()), float("nan"))


def running_ranks(groups: npt.NDArray[np.int64], seen: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Returns how many of the same group came before each, `seen` included; adds them to `seen`."""
    order = np.argsort(groups, kind="stable")
    ordered = groups[order]
    starts = np.flatnonzero(np.diff(ordered, prepend=-1))
    counts = np.diff(np.append(starts, len(ordered)))
    ranks = np.empty(len(groups), np.int64)
    ranks[order] = np.arange(len(ordered)) - np.repeat(starts, counts) + seen[ordered]
    np.add.at(seen, groups, 1)
    return ranks


def cut(
    assigned: Iterable[pa.Table], split_rows: Mapping[str, int], num_shards: Mapping[str, int]
) -> Iterator[tuple[str, int, pa.Table]]:
    """Cuts each split of the stream into its number of shards of equal rows; yields (split, number of the shard, rows)."""
    edges = {
        split: np.diff(np.linspace(0, split_rows[split], num_shards[split] + 1).astype(np.int64)).tolist()
        for split in split_rows
    }
    done: collections.Counter[str] = collections.Counter()
    waiting: dict[str, list[pa.Table]] = {split: [] for split in split_rows}
    for table in assigned:
        usable = table.filter(pc.is_null(table["reason"]))
        for split, parts in waiting.items():
            parts.append(usable.filter(pc.equal(usable["split"], split)))
            while done[split] < num_shards[split] and sum(part.num_rows for part in parts) >= edges[split][done[split]]:
                size, rows = edges[split][done[split]], pa.concat_tables(parts).combine_chunks()
                yield split, done[split], rows.slice(0, size)
                done[split] += 1
                parts[:] = [rows.slice(size)]


def new_digest(*parts: str) -> Any:
    """Returns a hashlib object that has been fed some texts."""
    return hashlib.sha256("\0".join(parts).encode())
