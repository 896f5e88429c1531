"""MosaicML Streaming: MDS shards below a local folder, a torch DataLoader of two processes."""

from __future__ import annotations

from typing import Any

from peers.common import BATCH, THREADS, Epochs, Work, in_process


def write(work: Work) -> None:
    from streaming import MDSWriter

    with MDSWriter(out=str(work.container / "mds"), columns={"image": "bytes", "index": "int"}) as writer:
        for index, data in work.records():
            writer.write({"image": data, "index": index})


def open_epochs(work: Work) -> Epochs:
    from streaming import StreamingDataset
    from torch.utils.data import DataLoader

    class Photos(StreamingDataset):  # type: ignore[misc]
        transform = work.transform

        def __getitem__(self, at: int) -> Any:
            sample = super().__getitem__(at)
            return self.transform(sample["index"], sample["image"]), sample["index"]

    dataset = Photos(local=str(work.container / "mds"), shuffle=True, batch_size=BATCH)
    loader = DataLoader(dataset, BATCH, num_workers=THREADS, worker_init_fn=in_process, persistent_workers=True)
    return lambda: iter(loader)
