"""WebDataset: tar files, a shuffle buffer, two processes that make whole batches."""

from __future__ import annotations

from typing import Any

from peers.common import BATCH, THREADS, Epochs, Work, in_process

NUM_SHARDS = 8


def write(work: Work) -> None:
    import webdataset as wds

    writers = [wds.TarWriter(str(work.container / f"{shard:03d}.tar")) for shard in range(NUM_SHARDS)]
    for index, data in work.records():
        writers[index % NUM_SHARDS].write({"__key__": f"{index:06d}", "jpg": data, "cls": index})
    for writer in writers:
        writer.close()


def open_epochs(work: Work) -> Epochs:
    import webdataset as wds

    transform = work.transform

    def decode(sample: dict[str, Any]) -> Any:
        index = int(sample["cls"])
        return transform(index, sample["jpg"]), index

    urls = [str(path) for path in sorted(work.container.glob("*.tar"))]
    dataset = wds.WebDataset(urls, shardshuffle=NUM_SHARDS, seed=7).shuffle(1000).map(decode).batched(BATCH)
    loader = wds.WebLoader(
        dataset, batch_size=None, num_workers=THREADS, worker_init_fn=in_process, persistent_workers=True
    )
    return lambda: iter(loader)
