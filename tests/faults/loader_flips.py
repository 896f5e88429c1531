"""Flips random bits of shards above the checksums of the file system; each has to be detected before a batch with damaged samples.

    python tests/faults/loader_flips.py --flips 1000 --seed 1 [--hdfs]

A data set is prepared of made photos, on local disk or on a real HDFS. For each flip one shard is rewritten with one random bit
changed, anywhere in the file, so that the file system takes the damaged file for whole; then a new Loader reads an epoch in an order
drawn for this flip. It has to raise a DataError that names the shard, and no batch before that may hold a sample of what is damaged:
of the row group (the first one, where it is the magic), or of the whole shard, where it is the footer. In the end the data set is
whole again, and every sample is read.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import logging
import random
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # where it is run as a program

from cluster.local_hdfs import LocalHdfs
from cvdist import storage
from cvdist.comm import World
from cvdist.config import LoaderConfig
from cvdist.errors import DataError
from cvdist.loader import Loader
from cvdist.shards import Manifest, Shard, footer_offset, row_group_offsets
from tests.made_data import class_tree, data_set

SPLIT = "train"
BATCH = 8
SETTINGS = {"image_size": 32, "row_group_bytes": 16384, "shard_bytes": 65536}


@dataclasses.dataclass(frozen=True)
class Flip:
    """One bit of one shard, and the samples of the split that it damages."""

    shard: Shard
    place: int
    bit: int
    region: str
    samples: range


def draw(manifest: Manifest, rng: random.Random) -> Flip:
    """Draws a shard, and a byte of it: any one, or one in ten times one of the magic, the footer, or the last eight."""
    shards = manifest.splits[SPLIT].shards
    number = rng.randrange(len(shards))
    shard = shards[number]
    before = sum(other.num_rows for other in shards[:number])
    place = rng.choice(
        [rng.randrange(shard.num_bytes)] * 27
        + [
            rng.randrange(4),
            rng.randrange(footer_offset(shard), shard.num_bytes),
            shard.num_bytes - 1 - rng.randrange(8),
        ]
    )
    starts = row_group_offsets(shard)
    if place >= footer_offset(shard):
        region, samples = "footer", range(before, before + shard.num_rows)
    else:
        index = max(0, int(np.searchsorted(starts, place, side="right")) - 1)
        first = before + sum(shard.row_group_rows[:index])
        region, samples = "row group", range(first, first + shard.row_group_rows[index])
    return Flip(shard, place, rng.randrange(8), "magic" if place < starts[0] else region, samples)


def read_epoch(url: str, manifest: Manifest, seed: int, num_lanes: int, delivered: list[int]) -> None:
    """Reads an epoch and notes which samples were delivered, until it ends or fails."""
    config = LoaderConfig(num_lanes=num_lanes, threads=2)
    loader = Loader(url, manifest, SPLIT, world=World(0, 1, 0, 1), global_batch=BATCH, seed=seed, config=config)
    with contextlib.closing(loader.batches()) as batches:
        for batch in batches:
            delivered += batch.samples.tolist()


def verdict(url: str, manifest: Manifest, flip: Flip, seed: int, num_lanes: int) -> str:
    """Reads an epoch of a damaged data set; returns "detected" or what went wrong."""
    delivered: list[int] = []
    try:
        read_epoch(url, manifest, seed, num_lanes, delivered)
    except DataError as error:
        if storage.join(url, flip.shard.path) not in str(error):
            return f"the shard is not named: {error}"
        spoilt = set(delivered) & set(flip.samples)
        return f"{len(spoilt)} damaged samples were delivered" if spoilt else "detected"
    return "not detected"


def run(url: str, manifest: Manifest, flips: int, seed: int) -> collections.Counter[tuple[str, str]]:
    """Makes the flips one after the other; counts the verdicts by region."""
    rng, verdicts = random.Random(seed), collections.Counter[tuple[str, str]]()
    for number in range(flips):
        flip, lanes = draw(manifest, rng), rng.choice([1, 4, 64])
        target = storage.join(url, flip.shard.path)
        content = storage.read_bytes(target)
        changed = bytearray(content)
        changed[flip.place] ^= 1 << flip.bit
        storage.write_bytes(target, changed, overwrite=True)
        found = verdict(url, manifest, flip, seed=number, num_lanes=lanes)
        storage.write_bytes(target, content, overwrite=True)
        verdicts[flip.region, found] += 1
        if found != "detected":
            print(f"flip {number}: {flip.shard.path}, byte {flip.place}, bit {flip.bit}, {flip.region}: {found}")
    return verdicts


def main() -> int:
    """Prepares a data set, damages it again and again, and says what was detected."""
    parser = argparse.ArgumentParser(description="Random flips in shards, read by the Loader.")
    parser.add_argument("--flips", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--hdfs", action="store_true", help="on a real HDFS of this machine, not on local disk")
    args = parser.parse_args()
    logging.getLogger("cvdist.fetch").setLevel(logging.ERROR)  # of each second try
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        url = f"file://{folder}/set"
        if args.hdfs:
            hdfs = LocalHdfs(f"{folder}/hdfs", 2, die_with_parent=True).start()
            stack.callback(hdfs.stop, at_once=True)
            url = storage.join(hdfs.url, "set")
        images = class_tree(Path(folder) / "images", {"ant": 150, "bee": 150}, height=40, width=52)
        manifest = data_set(images, url, **SETTINGS)
        shards = manifest.splits[SPLIT].shards
        groups = sum(len(shard.row_group_rows) for shard in shards)
        print(
            f"{manifest.splits[SPLIT].num_rows} samples in {len(shards)} shards, {groups} row groups, at {url}",
            flush=True,
        )
        started_s = time.monotonic()
        verdicts = run(url, manifest, args.flips, args.seed)
        whole: list[int] = []
        read_epoch(url, manifest, args.seed, 64, whole)
    for (region, found), count in sorted(verdicts.items()):
        print(f"{count:5d}  {region}: {found}")
    detected = sum(count for (_, found), count in verdicts.items() if found == "detected")
    is_whole = set(whole) == set(range(manifest.splits[SPLIT].num_rows))
    print(f"whole again: {'every sample is read' if is_whole else 'NOT every sample is read'}")
    print(
        f"{detected} of {args.flips} flips detected before a damaged batch was delivered, {time.monotonic() - started_s:.0f} s"
    )
    return 0 if detected == args.flips and is_whole else 1


if __name__ == "__main__":
    sys.exit(main())
