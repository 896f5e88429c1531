"""Plan to batches: row groups are read ahead of their use, images decoded by threads, one task for each batch.

Nothing unverified is decoded: the manifest has a checksum of every stretch of a shard that is read, and every image has its own.
"""

from __future__ import annotations

import collections
import dataclasses
import os
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import numpy.typing as npt

from cvdist import augment
from cvdist.comm import World
from cvdist.config import AugmentConfig, LoaderConfig
from cvdist.errors import DataError
from cvdist.groups import GroupCache
from cvdist.images import Pixels, decode_stored
from cvdist.plan import EpochPlan, Step
from cvdist.reader import RowGroup, ShardReader
from cvdist.shards import Manifest

if TYPE_CHECKING:
    import tensorflow as tf


@dataclasses.dataclass(frozen=True)
class Batch:
    """One rank's part of a global batch.

    Attributes:
        images: uint8 (N, H, W, C), 0-255 RGB or grey.
        labels: int32 (N,), class indices.
        weights: float32 (N,), 1, or 0 for a sample that only fills the batch.
        samples: int64 (N,), index of each sample in its split.
        num_valid: Samples of weight 1 in the whole global batch.
        params: float32 (N, K), what `augment.apply` does to each image.
    """

    images: Pixels
    labels: npt.NDArray[np.int32]
    weights: npt.NDArray[np.float32]
    samples: npt.NDArray[np.int64]
    num_valid: int
    params: npt.NDArray[np.float32]


class Loader:
    """Batches of one split for one rank, epoch by epoch.

    The state is (epoch, step): `batches(epoch, step)` goes on exactly where a run that was stopped there would have.
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
        self._config = config or LoaderConfig()
        self._seed = seed
        self._augmentation = augmentation or AugmentConfig()
        self._reader = ShardReader(data_url, manifest, split)
        cores = len(os.sched_getaffinity(0))
        self._threads = self._config.threads or max(1, cores // world.local_size)

    def plan(self, epoch: int) -> EpochPlan:
        """Returns the order of an epoch."""
        lanes, remainder = self._config.num_lanes, self._config.remainder
        split = self.manifest.splits[self.split]
        return EpochPlan(split, self.global_batch, seed=self._seed, epoch=epoch, num_lanes=lanes, remainder=remainder)

    def batches(self, epoch: int = 0, start_step: int = 0) -> Generator[Batch, None, None]:
        """Yields this rank's batches of an epoch from `start_step` on; closing it, early or not, ends its threads.

        Raises:
            DataError: A shard or an image is not what the manifest says.
            StorageError: The file system failed.
        """
        plan = self.plan(epoch)
        num_in_work = max(self._config.prefetch_batches, self._threads)
        num_ahead = 4 * self._config.prefetch_batches
        cache = GroupCache(self._reader, self._config.readahead_bytes)
        steps = (plan.step(index, self.world.rank, self.world.size) for index in range(start_step, plan.num_steps))
        planned: collections.deque[tuple[Step, int]] = collections.deque()  # with the bytes that are read for it first
        ahead_bytes = 0
        pending: collections.deque[tuple[Step, Future[Batch]]] = collections.deque()
        decoders = ThreadPoolExecutor(self._threads, thread_name_prefix="decode")
        try:
            while True:
                while len(pending) < num_in_work:
                    if not planned and (step := next(steps, None)):
                        planned.append((step, 0))
                        cache.fetch(step)
                    if not planned:
                        break
                    step, num_bytes = planned.popleft()
                    ahead_bytes -= num_bytes
                    pending.append((step, decoders.submit(self._make, step, cache.groups(step), epoch)))
                while (
                    len(planned) < num_ahead
                    and ahead_bytes < self._config.readahead_bytes
                    and (step := next(steps, None))
                ):
                    planned.append((step, cache.fetch(step)))
                    ahead_bytes += planned[-1][1]
                if not pending:
                    return
                step, future = pending.popleft()
                batch = future.result()
                cache.release(step)
                yield batch
        finally:
            decoders.shutdown(wait=False, cancel_futures=True)
            cache.close()

    def _make(self, step: Step, groups: dict[int, Future[RowGroup]], epoch: int) -> Batch:
        """Decodes one batch."""
        size, channels = self.image_size, self.manifest.image.channels
        row_groups = {group: future.result() for group, future in groups.items()}
        picks = [(row_groups[int(group)], int(row)) for group, row in zip(step.groups, step.rows, strict=True)]
        heights = np.array([group.heights[row] for group, row in picks])
        widths = np.array([group.widths[row] for group, row in picks])
        draws = augment.draw(self._augmentation, seed=self._seed or 0, epoch=epoch, sample_ids=step.samples)
        boxes = augment.crop_boxes(self._augmentation, draws, heights, widths)
        images = np.empty((len(picks), size, size, channels), np.uint8)
        for index, ((group, row), box, flip) in enumerate(
            zip(picks, boxes, augment.flips(self._augmentation, draws), strict=True)
        ):
            self._decode(group, row, box, bool(flip), images[index])
        return Batch(
            images=images,
            labels=np.array([group.labels[row] for group, row in picks], np.int32),
            weights=step.weights,
            samples=step.samples,
            num_valid=step.num_valid,
            params=augment.params(self._augmentation, draws, size),
        )

    def _decode(self, group: RowGroup, row: int, box: Any, flip: bool, out: Pixels) -> None:
        """Decodes, crops, flips and resizes one image into `out`, uint8 (H, W, C)."""
        data = group.image(row)
        try:
            pixels = decode_stored(data, self.manifest.image)
        except ValueError as error:
            raise DataError(
                f"{group.where}, row {row}: the image cannot be decoded ({error}); prepare the data set again"
            ) from None
        x, y, width, height = (int(value) for value in box)
        crop = pixels[y : y + height, x : x + width]
        if crop.shape[:2] != out.shape[:2]:
            shrinks = height * width > out.shape[0] * out.shape[1]
            interpolation = cv2.INTER_AREA if shrinks and self._seed is None else cv2.INTER_LINEAR
            resized = cv2.resize(crop, (out.shape[1], out.shape[0]), interpolation=interpolation)
            crop = np.asarray(resized, np.uint8).reshape(out.shape)
        out[...] = crop[:, ::-1] if flip else crop

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
