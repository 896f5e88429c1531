"""LitData: chunks below a local folder, its own DataLoader with two processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peers.common import BATCH, THREADS, Epochs, Work, in_process, number


def record(path: str) -> dict[str, Any]:
    return {"image": Path(path).read_bytes(), "index": number(Path(path))}


def write(work: Work) -> None:
    import litdata

    paths = [str(path) for path in work.paths]
    litdata.optimize(record, paths, str(work.container / "chunks"), chunk_bytes="64MB", num_workers=1)


def open_epochs(work: Work) -> Epochs:
    import litdata

    class Photos(litdata.StreamingDataset):  # type: ignore[misc]
        def __getitem__(self, at: Any) -> Any:
            sample = super().__getitem__(at)
            return transform(sample["index"], sample["image"]), sample["index"]

    transform = work.transform
    dataset = Photos(str(work.container / "chunks"), shuffle=True)
    loader = litdata.StreamingDataLoader(
        dataset, batch_size=BATCH, num_workers=THREADS, worker_init_fn=in_process, persistent_workers=True
    )
    return lambda: iter(loader)
