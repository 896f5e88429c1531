"""Plan to batches: row groups are read ahead of their use, images decoded by threads, one task for each batch.

Nothing unverified is decoded: the manifest has a checksum of every stretch of a shard that is read, and every image has its own.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import logging
import math
import os
import pathlib
import sys
import threading
import time
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import numpy.typing as npt

from cvdist import augment, urls
from cvdist.account import Ledger
from cvdist.cache import LocalCache
from cvdist.comm import World
from cvdist.config import MIB, AugmentConfig, LoaderConfig
from cvdist.counts import Sampling
from cvdist.crop import address, decode_crop, resize_into
from cvdist.errors import DataError
from cvdist.fetch import Counters
from cvdist.groups import GroupCache
from cvdist.images import Pixels, decode_stored
from cvdist.plan import EpochPlan, Step, lanes_within
from cvdist.reader import RowGroup, ShardReader
from cvdist.shards import Manifest

if TYPE_CHECKING:
    import tensorflow as tf

ALIGNMENT = 64
SHUFFLE_BYTES, ADOPTED_SHUFFLE_BYTES, THREAD_READAHEAD_BYTES = 64 * MIB, 512 * MIB, 8 * MIB

log = logging.getLogger("cvdist.loader")


@dataclasses.dataclass(frozen=True)
class Batch:
    """One rank's part of a global batch.

    The arrays stay as they are for as long as anything refers to them; after that their memory is used for another batch.

    Attributes:
        images: uint8 (N, H, W, C), 0-255 RGB or grey.
        labels: int32 (N,), class indices.
        weights: float32 (N,), 1, or 0 for a sample that only fills the batch.
        samples: int64 (N,), index of each sample in its split.
        num_valid: Samples of weight 1 in the whole global batch.
        params: float32 (N, K), what `augment.apply` does to each image.
        epoch: Whose batch this is, from 0.
        step: Which one of the epoch, from 0.
    """

    images: Pixels
    labels: npt.NDArray[np.int32]
    weights: npt.NDArray[np.float32]
    samples: npt.NDArray[np.int64]
    num_valid: int
    params: npt.NDArray[np.float32]
    epoch: int
    step: int


@dataclasses.dataclass(frozen=True)
class Task:
    """A batch to be made: its place in the run and what is in it."""

    epoch: int
    index: int
    step: Step


class Ring:
    """Arrays of one shape that are used again when nothing refers to them any more: fresh pages cost a tenth of a batch."""

    def __init__(self, shape: tuple[int, ...], limit: int) -> None:
        """Keeps up to `limit` arrays; when all are in use, further ones are made and not kept."""
        self._shape, self._limit = shape, limit
        self._arrays: list[Pixels] = []
        self._lock = threading.Lock()

    def take(self) -> Pixels:
        """Returns an array with any content."""
        with self._lock:
            for index in range(len(self._arrays)):
                # The list and the argument of getrefcount: views and tensors that share the memory would be more.
                if sys.getrefcount(self._arrays[index]) == 2:
                    return self._aligned(self._arrays[index])
            array = np.empty(math.prod(self._shape) + ALIGNMENT, np.uint8)
            if len(self._arrays) < self._limit:
                self._arrays.append(array)
            return self._aligned(array)

    def _aligned(self, array: Pixels) -> Pixels:
        """Returns the part of an array that begins at a multiple of 64 bytes: TensorFlow takes it as it is, and copies others."""
        start = -address(array) % ALIGNMENT
        return array[start : start + math.prod(self._shape)].reshape(self._shape)


class Loader:
    """Batches of one split for one rank, epoch by epoch.

    The state is (epoch, step): `batches(epoch, step)` goes on exactly where a run that was stopped there would have.

    Attributes:
        ledger: What was given out of the epoch of the last batch.
    """

    def __init__(
        self,
        data_url: str,
        manifest: Manifest,
        split: str,
        *,
        world: World,
        global_batch: int,
        image_size: int | None = None,
        config: LoaderConfig | None = None,
        seed: int | None = None,
        augmentation: AugmentConfig | None = None,
    ) -> None:
        """Prepares to read; opens nothing yet.

        Args:
            data_url: The data set.
            manifest: Its manifest.
            split: Which split.
            world: This rank among how many; the global batch divides over them.
            global_batch: Samples of one step on all ranks.
            image_size: Height and width of the images given, pixels; by default the data set's.
            config: Threads, read-ahead, lanes, remainder.
            seed: Of the order and the augmentation; None shuffles nothing.
            augmentation: Random changes, for training alone.
        """
        self.manifest, self.split, self.world, self.global_batch = manifest, split, world, global_batch
        self.image_size = image_size or manifest.image.image_size
        self.per_rank_batch = global_batch // world.size
        self.ledger, self._counted = Ledger(), Counters()
        self._config = config or LoaderConfig()
        self._seed = seed
        self._augmentation = augmentation or AugmentConfig()
        self._reader = ShardReader(data_url, manifest, split, cache=local_cache(data_url, self._config))
        self._sampling = Sampling(data_url, manifest, split, self._config, seed or 0)
        cores = len(os.sched_getaffinity(0))
        self._threads = self._config.threads or max(1, cores // world.local_size)
        readahead_bytes = self._config.readahead_bytes
        self._readahead_bytes = self._threads * THREAD_READAHEAD_BYTES if readahead_bytes is None else readahead_bytes
        self._num_lanes = lanes_of(manifest, split, self._config)
        # What the lanes of this rank have open stays in memory, whatever is read ahead.
        mean_bytes = self._reader.total_bytes // max(1, self._reader.num_groups)
        open_bytes = self._num_lanes * mean_bytes // world.size
        self._group_bytes = int(1.1 * open_bytes) + self._readahead_bytes
        self._num_in_work = self._config.prefetch_batches + self._threads
        shape = (self.per_rank_batch, self.image_size, self.image_size, manifest.image.channels)
        self._ring = Ring(shape, self._num_in_work + 2)

    def plan(self, epoch: int) -> EpochPlan:
        """Returns the order of an epoch."""
        return EpochPlan(
            self.manifest.splits[self.split],
            self.global_batch,
            seed=self._seed,
            epoch=epoch,
            num_lanes=self._num_lanes,
            remainder=self._config.remainder,
            counts=self._sampling.counts(epoch),
        )

    def batches(self, epoch: int = 0, start_step: int = 0, num_epochs: int = 1) -> Generator[Batch, None, None]:
        """Yields this rank's batches of some epochs, the first from `start_step` on; closing it, early or not, ends its threads.

        The work on an epoch begins while the batches of the one before are used.

        Raises:
            DataError: A shard or an image is not what the manifest says.
            StorageError: The file system failed.
        """
        cache = GroupCache(self._reader, self._group_bytes)
        tasks = self._tasks(epoch, start_step, num_epochs)
        planned: collections.deque[tuple[Task, int]] = collections.deque()  # with the bytes that are read for it first
        num_ahead, ahead_bytes = 4 * self._config.prefetch_batches, 0
        pending: collections.deque[tuple[Task, Future[Batch]]] = collections.deque()
        decoders = ThreadPoolExecutor(self._threads, thread_name_prefix="decode")
        trace = Trace(self._config.trace_path, self.world, epoch, start_step) if self._config.trace_path else None
        self.ledger, self._counted = Ledger(epoch, start_step), self._reader.fetcher.counters
        try:
            while True:
                while len(pending) < self._num_in_work:
                    if not planned and (task := next(tasks, None)):
                        planned.append((task, 0))
                        cache.fetch(task.step)
                    if not planned:
                        break
                    task, num_bytes = planned.popleft()
                    ahead_bytes -= num_bytes
                    pending.append((task, decoders.submit(self._make, task, cache.groups(task.step))))
                while len(planned) < num_ahead and ahead_bytes < self._readahead_bytes and (task := next(tasks, None)):
                    planned.append((task, cache.fetch(task.step)))
                    ahead_bytes += planned[-1][1]
                if not pending:
                    return
                yield self._give(pending, cache, trace)
        finally:
            decoders.shutdown(wait=False, cancel_futures=True)
            cache.close()
            if trace:
                trace.close()

    def _tasks(self, epoch: int, start_step: int, num_epochs: int) -> Iterator[Task]:
        """Yields all batches to be made."""
        for number in range(epoch, epoch + num_epochs):
            plan = self.plan(number)
            for index in range(start_step if number == epoch else 0, plan.num_steps):
                yield Task(number, index, plan.step(index, self.world.rank, self.world.size))

    def _give(
        self, pending: collections.deque[tuple[Task, Future[Batch]]], cache: GroupCache, trace: Trace | None
    ) -> Batch:
        """Returns the next batch, when it is ready, and counts it."""
        task, future = pending.popleft()
        begun_s = time.monotonic()
        batch = future.result()
        now_s = time.monotonic()
        cache.release(task.step)
        if task.epoch != self.ledger.epoch:
            self.ledger = Ledger(task.epoch)
        self.ledger.count(batch.samples, batch.weights)
        self.ledger.waited(begun_s, now_s)
        self._count_reads()
        if trace:
            trace.write(batch)
        return batch

    def _count_reads(self) -> None:
        """Adds what was read since the last batch."""
        now, before = self._reader.fetcher.counters, self._counted
        self._counted = now
        self.ledger.bytes_read += now.bytes_read - before.bytes_read
        self.ledger.cache_hits += now.cache_hits - before.cache_hits
        self.ledger.cache_misses += now.cache_misses - before.cache_misses
        self.ledger.retries += now.retries - before.retries

    def _make(self, task: Task, groups: dict[int, Future[RowGroup]]) -> Batch:
        """Decodes one batch."""
        step = task.step
        row_groups = {group: future.result() for group, future in groups.items()}
        picks = [(row_groups[group], row) for group, row in zip(step.groups.tolist(), step.rows.tolist(), strict=True)]
        heights = np.array([group.heights[row] for group, row in picks])
        widths = np.array([group.widths[row] for group, row in picks])
        draws = augment.draw(self._augmentation, seed=self._seed or 0, epoch=task.epoch, sample_ids=step.draws)
        boxes = augment.crop_boxes(self._augmentation, draws, heights, widths).tolist()
        flips = augment.flips(self._augmentation, draws).tolist()
        images = self._ring.take()
        for (group, row), box, flip, out in zip(picks, boxes, flips, images, strict=True):
            self._decode(group, row, box, flip, out)
        return Batch(
            images=images,
            labels=np.array([group.labels[row] for group, row in picks], np.int32),
            weights=step.weights,
            samples=step.samples,
            num_valid=step.num_valid,
            params=augment.params(self._augmentation, draws, self.image_size),
            epoch=task.epoch,
            step=task.index,
        )

    def _decode(self, group: RowGroup, row: int, box: list[int], flip: bool, out: Pixels) -> None:
        """Decodes, crops, flips and resizes one image into `out`, uint8 (H, W, C).

        Training takes the fast ways of libjpeg and bilinear resizing; evaluation the accurate ones, and the mean of areas.
        """
        data = group.image(row)
        try:
            if self._seed is not None and self._is_jpeg(group, row):
                decode_crop(data, box, out, flip=flip)
                return
            pixels = decode_stored(data, self.manifest.image)
        except ValueError as error:
            raise DataError(
                f"{group.where}, row {row}: the image cannot be decoded ({error}); prepare the data set again"
            ) from None
        x, y, width, height = box
        shrinks = self._seed is None and height * width > out.shape[0] * out.shape[1]
        interpolation = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
        resize_into(pixels[y : y + height, x : x + width], out, flip=flip, interpolation=interpolation)

    def _is_jpeg(self, group: RowGroup, row: int) -> bool:
        """Says whether an image is a JPEG without peculiarities."""
        return self.manifest.image.codec == "jpeg" if group.is_plain is None else bool(group.is_plain[row])

    def dataset(self, epoch: int = 0, start_step: int = 0) -> tf.data.Dataset:
        """Returns an epoch as a finite tf.data.Dataset of (uint8 images, int32 labels, float32 weights) batches."""
        import tensorflow as tf

        size, channels, rows = self.image_size, self.manifest.image.channels, self.per_rank_batch
        signature = (
            tf.TensorSpec((rows, size, size, channels), tf.uint8),
            tf.TensorSpec((rows,), tf.int32),
            tf.TensorSpec((rows,), tf.float32),
        )

        def batches() -> Iterator[tuple[Any, Any, Any]]:
            for batch in self.batches(epoch, start_step):
                yield batch.images, batch.labels, batch.weights

        dataset = tf.data.Dataset.from_generator(batches, output_signature=signature)
        return dataset.apply(tf.data.experimental.assert_cardinality(max(0, self.plan(epoch).num_steps - start_step)))


def lanes_of(manifest: Manifest, split: str, config: LoaderConfig) -> int:
    """Returns how many lanes there are, and warns where rows that may be sorted by class are mixed by few."""
    budget_bytes = config.shuffle_bytes
    if budget_bytes is None:
        budget_bytes = SHUFFLE_BYTES if manifest.adopted is None else ADOPTED_SHUFFLE_BYTES
    lanes = lanes_within(manifest.splits[split], config.num_lanes, budget_bytes)
    if manifest.adopted is not None and lanes < config.num_lanes:
        log.warning(
            "split %r is mixed from %d row groups at a time, because they are large; expected %d; if its rows are sorted by class, raise"
            " loader.shuffle_bytes from %d MiB, or prepare the data set", split, lanes, config.num_lanes, budget_bytes // MIB,
        )  # fmt: skip
    return lanes


def local_cache(data_url: str, config: LoaderConfig) -> LocalCache | None:
    """Returns the cache that the settings ask for; none for a data set that is on local disk itself."""
    if config.cache_path is None or urls.parse(data_url).scheme == "file":
        return None
    return LocalCache(config.cache_path, config.cache_bytes)


class Trace:
    """Writes which samples this rank was given, a line of JSON for each batch, each on disk before the batch is given."""

    def __init__(self, path: str, world: World, epoch: int, step: int) -> None:
        """Makes a file of its own in the folder `path`."""
        pathlib.Path(path).mkdir(parents=True, exist_ok=True)
        name = f"{world.rank}-of-{world.size}-{epoch}-{step}-{os.getpid()}.jsonl"
        self._file = (pathlib.Path(path) / name).open("a", buffering=1)

    def write(self, batch: Batch) -> None:
        """Adds a line."""
        line = {"epoch": batch.epoch, "step": batch.step, "samples": batch.samples.tolist()}
        self._file.write(json.dumps(line) + "\n")

    def close(self) -> None:
        """Ends the file."""
        self._file.close()
