"""Grain over an ArrayRecord file: elements read and decoded by two threads."""

from __future__ import annotations

from typing import Any

import numpy as np
from peers.common import BATCH, THREADS, Epochs, Work, one_thread_each


def write(work: Work) -> None:
    from array_record.python.array_record_module import ArrayRecordWriter

    writer = ArrayRecordWriter(str(work.container / "photos.array_record"), "group_size:1,uncompressed")
    for index, data in work.records():
        writer.write(index.to_bytes(4, "little") + data)
    writer.close()


def open_epochs(work: Work) -> Epochs:
    import grain

    transform = work.transform

    def decode(record: bytes) -> Any:
        index = int.from_bytes(record[:4], "little")
        return transform(index, record[4:]), np.int32(index)

    one_thread_each()
    source = grain.sources.ArrayRecordDataSource([str(work.container / "photos.array_record")])
    dataset = grain.MapDataset.source(source).shuffle(seed=7).map(decode).batch(BATCH)
    loader = dataset.to_iter_dataset(grain.ReadOptions(num_threads=THREADS, prefetch_buffer_size=4))
    return lambda: iter(loader)
