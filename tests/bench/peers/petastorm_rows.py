"""Petastorm: make_batch_reader over plain Parquet, or make_reader over a Petastorm data set; a pool of two threads."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from peers.common import BATCH, SIZE, THREADS, Epochs, Work, one_thread_each, read_about

NUM_FILES = 8
MAY_LOSE_SAMPLES = True  # in its thread pool, without a word; what came is what counts


def write(work: Work) -> None:
    """Writes row groups of one batch each, which is the best for make_batch_reader: nothing has to be cut."""
    from cvdist.common_metadata import petastorm_metadata
    from cvdist.shards import Row, ShardWriter

    about, records, shards = read_about(work.corpus), list(work.records()), []
    (work.container / "set").mkdir()
    for file in range(NUM_FILES):
        name = f"part-{file:05d}.parquet"
        with (work.container / "set" / name).open("wb") as stream, ShardWriter(stream, 1 << 40) as writer:
            for count, (index, data) in enumerate(records[file::NUM_FILES], 1):
                sha256 = hashlib.sha256(data).hexdigest()
                writer.add(Row(str(index), index, data, about["height"], about["width"], sha256))
                if count % BATCH == 0:
                    writer._flush()
            shards.append(dataclasses.replace(writer.close(name)))
    if work.options["reader"] == "make_reader":
        metadata = petastorm_metadata(shards, "jpeg")
        assert metadata
        (work.container / "set" / "_common_metadata").write_bytes(metadata)


def open_epochs(work: Work) -> Epochs:
    one_thread_each()
    return by_rows(work) if work.options["reader"] == "make_reader" else by_batches(work)


def url(work: Work) -> str:
    return f"file://{work.container}/set"


def settings() -> dict[str, Any]:
    return {
        "reader_pool_type": "thread",
        "workers_count": THREADS,
        "shuffle_row_groups": True,
        "shuffle_rows": True,
        "seed": 7,
        "num_epochs": 1,
    }


def by_batches(work: Work) -> Epochs:
    from petastorm import TransformSpec, make_batch_reader

    transform = work.transform

    def decode(frame: Any) -> Any:
        frame["image"] = [
            transform(index, data).ravel() for index, data in zip(frame["label"], frame["image"], strict=True)
        ]
        return frame[["image", "label"]]

    fields = [("image", np.uint8, (SIZE * SIZE * 3,), False), ("label", np.int32, (), False)]
    spec = TransformSpec(decode, edit_fields=fields, selected_fields=["image", "label"])

    def epoch() -> Iterator[Any]:
        with make_batch_reader(
            url(work), **settings(), schema_fields=["image", "label"], transform_spec=spec
        ) as reader:
            for batch in reader:
                yield batch.image.reshape(-1, SIZE, SIZE, 3), batch.label

    return epoch


def by_rows(work: Work) -> Epochs:
    import cv2
    from petastorm import TransformSpec, make_reader

    transform = work.transform

    def crop(row: dict[str, Any]) -> dict[str, Any]:
        x, y, w, h = transform.boxes[row["label"]]
        pixels = cv2.resize(row["image"][y : y + h, x : x + w], (SIZE, SIZE), interpolation=cv2.INTER_LINEAR)
        row["image"] = cv2.flip(pixels, 1) if transform.flips[row["label"]] else pixels
        return row

    fields = [("image", np.uint8, (SIZE, SIZE, 3), False)]
    spec = TransformSpec(crop, edit_fields=fields, selected_fields=["image", "label"])

    def epoch() -> Iterator[Any]:
        images, labels = [], []
        with make_reader(url(work), **settings(), schema_fields=["image", "label"], transform_spec=spec) as reader:
            for row in reader:
                images.append(row.image)
                labels.append(row.label)
                if len(images) == BATCH:
                    yield np.stack(images), np.array(labels)
                    images, labels = [], []

    return epoch
