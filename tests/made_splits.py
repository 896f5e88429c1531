"""Splits and manifests that name shards nobody has written, for tests of what is computed of them alone."""

from __future__ import annotations

from collections.abc import Sequence

from cvdist.images import ImageSpec
from cvdist.shards import Manifest, Shard, Split


def made_split(*shards: Sequence[int], name: str = "train") -> Split:
    """Returns a split of shards with the given rows in their row groups; a row takes 100 bytes."""
    return Split(
        tuple(
            Shard(
                path=f"{name}/shard-{index:05d}.parquet",
                num_rows=sum(rows),
                num_bytes=100 * sum(rows) + 500,
                sha256="0" * 64,
                row_group_rows=tuple(rows),
                row_group_bytes=tuple(100 * count for count in rows),
                row_group_xxh3=("0" * 16,) * len(rows),
                footer_xxh3="0" * 16,
            )
            for index, rows in enumerate(shards)
        ),
        class_rows=(sum(map(sum, shards)),),
    )


def made_manifest(split_rows: dict[str, int], classes: Sequence[str] = ("cat", "dog")) -> Manifest:
    """Returns a manifest of splits with the given numbers of samples."""
    return Manifest(
        classes=tuple(classes),
        image=ImageSpec(image_size=32, resize="short", channels=3, codec="jpeg", quality=90),
        splits={name: made_split([rows], name=name) for name, rows in split_rows.items()},
        num_inputs=sum(split_rows.values()),
        num_quarantined=0,
        num_skipped=0,
        digest="d" * 64,
        settings={},
    )
