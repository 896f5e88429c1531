"""Files that are in more than one split, found before any shard is written."""

from __future__ import annotations

import pathlib
from collections.abc import Iterable
from typing import Literal

import pyarrow as pa
import pyarrow.compute as pc

from cvdist.buckets import Buckets, groups_of, sha256_hashes
from cvdist.errors import DataError
from cvdist.listing import SPLITS


def find_leaks(
    assigned: Iterable[pa.Table], held: Iterable[pa.Table], folder: pathlib.Path, on_leak: Literal["drop", "fail"]
) -> dict[str, str]:
    """Finds files that are in more than one split: which copies have to go, and why.

    What is in the data set already stays; of the others the copy in test stays rather than that in val, and that rather than one in
    train, so that what models are compared on stays the same.

    Args:
        assigned: New inputs, with sha256 and split.
        held: Rows that the data set holds already: key, sha256, split.
        folder: Local scratch space.
        on_leak: fail raises instead.

    Raises:
        DataError: There are leaks and on_leak is fail.
    """
    schema = pa.schema([("sha256", pa.string()), ("key", pa.string()), ("split", pa.string()), ("is_new", pa.bool_())])
    buckets = Buckets(folder, schema)
    for tables, is_new in ((held, False), (assigned, True)):
        for table in tables:
            rows = table.filter(pc.is_null(table["reason"])) if is_new else table
            rows = rows.select(["sha256", "key", "split"]).append_column(
                "is_new", pa.array([is_new] * rows.num_rows, pa.bool_())
            )
            buckets.add(rows, sha256_hashes(rows["sha256"]))
    leaks: dict[str, str] = {}
    for table in buckets.tables():
        for group in groups_of(table, "sha256"):
            best = max(group, key=lambda row: (not row["is_new"], SPLITS.index(row["split"]), row["key"]))
            gone = [row for row in group if row["split"] != best["split"] and row["is_new"]]
            leaks |= {row["key"]: f"the same file as {best['key']} in {best['split']}" for row in gone}
    if leaks and on_leak == "fail":
        named = "; ".join(f"{key} is {detail}" for key, detail in sorted(leaks.items())[:3])
        raise DataError(
            f"on_leak: {len(leaks)} files are in more than one split: {named}; expected each in one; remove copies, or choose"
            " --on_leak drop, keep, or --split_by content"
        )
    return leaks
