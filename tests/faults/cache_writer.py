"""A process that fills a local cache until it is killed: python -m tests.faults.cache_writer FOLDER LIMIT_BYTES SEED READY_FILE."""

from __future__ import annotations

import os
import random
import sys
from pathlib import Path

import xxhash

from cvdist import cache
from cvdist.cache import LocalCache

KIB, MIB = 1 << 10, 1 << 20
NUM_PARTS = 60


def part(number: int) -> bytes:
    """Returns the bytes of a made part, up to 2 MiB."""
    rng = random.Random(number)
    return rng.randbytes(rng.randrange(64 * KIB, 2 * MIB))


def check(store: LocalCache, number: int, data: bytes) -> bool:
    """Gets a part, which has to be right or not there; says whether it is there."""
    found = store.get(str(number), len(data), xxhash.xxh3_64_hexdigest(data))
    assert found in (None, data)
    return found is not None


def main(path: str, limit_bytes: int, seed: int, ready_path: Path) -> None:
    """Gets and puts made parts until its parent ends; ends with an error when it gets wrong bytes."""
    rng, parts, parent = random.Random(seed), [part(number) for number in range(NUM_PARTS)], os.getppid()
    cache.PAUSE_S = 0.0
    ready_path.touch()
    while os.getppid() == parent:
        store = LocalCache(path, limit_bytes)
        for number in rng.sample(range(NUM_PARTS), 20):
            if not check(store, number, parts[number]):
                store.put(str(number), parts[number])


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
