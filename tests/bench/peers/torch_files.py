"""torch DataLoader over files, two processes."""

from __future__ import annotations

from typing import Any

from peers.common import BATCH, THREADS, Epochs, Work, in_process, number


def open_epochs(work: Work) -> Epochs:
    from torch.utils.data import DataLoader, Dataset

    class Photos(Dataset[Any]):
        def __init__(self) -> None:
            self.paths, self.transform = work.paths, work.transform

        def __len__(self) -> int:
            return len(self.paths)

        def __getitem__(self, index: int) -> Any:
            return self.transform(number(self.paths[index]), self.paths[index].read_bytes()), index

    loader = DataLoader(
        Photos(), BATCH, shuffle=True, num_workers=THREADS, worker_init_fn=in_process, persistent_workers=True
    )
    return lambda: iter(loader)
