"""Plan to batches: row groups are read ahead of their use, images decoded by threads, one task for each batch.

Nothing unverified is decoded: the manifest has a checksum of every stretch of a shard that is read, and every image has its own.
"""

from __future__ import annotations

import collections
import dataclasses
import io
import os
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from cvdist import augment, storage
from cvdist.comm import World
from cvdist.config import AugmentConfig, LoaderConfig
from cvdist.errors import DataError, NotFoundError
from cvdist.images import Pixels, decode_stored
from cvdist.plan import EpochPlan, Step
from cvdist.shards import Manifest, Shard, footer_offset, row_group_offsets

if TYPE_CHECKING:
    import tensorflow as tf

COLUMNS = ("label", "image", "height", "width", "image_xxh3")
FETCH_THREADS = 4


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


@dataclasses.dataclass(frozen=True)
class RowGroup:
    """The columns of one row group in memory; `images` are its stored images behind each other, cut at `offsets`."""

    where: str
    images: memoryview
    offsets: npt.NDArray[np.int32]
    labels: npt.NDArray[np.int32]
    heights: npt.NDArray[np.int32]
    widths: npt.NDArray[np.int32]
    checksums: npt.NDArray[np.int64]

    def image(self, row: int) -> memoryview:
        """Returns the stored bytes of one image.

        Raises:
            DataError: They are not the bytes that were written.
        """
        data = self.images[self.offsets[row] : self.offsets[row + 1]]
        if xxhash.xxh3_64_intdigest(data) != int(self.checksums[row]) & 0xFFFFFFFFFFFFFFFF:
            raise DataError(
                f"{self.where}, row {row}: the image differs from its checksum; expected what prepare wrote; restore the shard"
            )
        return data


class ShardReader:
    """Reads row groups of the shards of a split, by their number counted through all shards."""

    def __init__(self, data_url: str, manifest: Manifest, split: str) -> None:
        """Takes the split's shards from the manifest; opens nothing yet."""
        self._url = data_url
        self._places = [
            (shard, index, offset)
            for shard in manifest.splits[split].shards
            for index, offset in enumerate(row_group_offsets(shard))
        ]
        self._footers: dict[str, bytes] = {}  # parsed when used: parsed ones take fifteen times the room

    def num_bytes(self, group: int) -> int:
        """Returns the stored bytes of a row group."""
        shard, index, _ = self._places[group]
        return shard.row_group_bytes[index]

    def read(self, group: int) -> RowGroup:
        """Reads one row group.

        Raises:
            DataError: The shard is missing, or not the one that the manifest names.
        """
        shard, index, offset = self._places[group]
        url = storage.join(self._url, shard.path)
        where = f"{url}, row group {index}"
        try:
            footer = pq.read_metadata(pa.BufferReader(self._footer(url, shard)))
            data = storage.read_range(url, offset, shard.row_group_bytes[index])
            is_intact = xxhash.xxh3_64_hexdigest(data) == shard.row_group_xxh3[index]
            table = read_columns(Window(data, offset, shard.num_bytes), footer, index, COLUMNS)
        except NotFoundError:
            raise DataError(
                f"{url} does not exist; expected the shard that the manifest names; restore it or prepare again"
            ) from None
        except (pa.ArrowException, OSError, ValueError) as error:
            raise DataError(
                f"{where} cannot be read ({error}); expected the shard that prepare wrote; restore it or prepare again"
            ) from None
        images = table["image"].combine_chunks()
        images = images.chunk(0) if isinstance(images, pa.ChunkedArray) else images
        _, offsets, values = images.buffers()
        columns = {name: table[name].to_numpy() for name in ("label", "height", "width", "image_xxh3")}
        rows = RowGroup(
            where=where,
            images=memoryview(values).cast("B"),
            offsets=np.frombuffer(offsets, np.int32)[images.offset : images.offset + len(images) + 1],
            labels=columns["label"],
            heights=columns["height"],
            widths=columns["width"],
            checksums=columns["image_xxh3"],
        )
        if not is_intact:
            for row in range(table.num_rows):
                rows.image(row)  # names the row, where it is an image that is damaged
            raise DataError(
                f"{where} differs from its checksum; expected what prepare wrote; restore the shard or prepare again"
            )
        return rows

    def _footer(self, url: str, shard: Shard) -> bytes:
        """Returns the footer of a shard, read once; threads may read it twice, to the same effect."""
        if shard.path not in self._footers:
            size = storage.stat(url).size_bytes
            if size != shard.num_bytes:
                raise DataError(
                    f"{url} holds {size} bytes; expected {shard.num_bytes}; restore the shard or prepare again"
                )
            start = footer_offset(shard)
            footer = storage.read_range(url, start, size - start)
            if xxhash.xxh3_64_hexdigest(footer) != shard.footer_xxh3:
                raise DataError(
                    f"{url}: the footer differs from its checksum; expected what prepare wrote; restore the shard or prepare again"
                )
            self._footers[shard.path] = footer
        return self._footers[shard.path]


class Window(io.RawIOBase):
    """A stretch of a file in memory that answers as the whole file; reading outside the stretch is an error."""

    def __init__(self, data: bytes, offset: int, size: int) -> None:
        """Holds `data`, which lies at `offset` of a file of `size` bytes."""
        self._data, self._offset, self._size, self._place = memoryview(data), offset, size, 0

    def readable(self) -> bool:
        """True: this is for reading only."""
        return True

    def seekable(self) -> bool:
        """True."""
        return True

    def tell(self) -> int:
        """Returns the place in the whole file."""
        return self._place

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Moves to a place in the whole file."""
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self._size}[whence]
        self._place = base + offset
        return self._place

    def read(self, size: int = -1) -> bytes:
        """Reads from the stretch."""
        end = self._size if size < 0 else min(self._place + size, self._size)
        start = self._place
        if start < self._offset or end > self._offset + len(self._data):
            raise ValueError(f"bytes {start} to {end} lie outside of the stretch at {self._offset} + {len(self._data)}")
        self._place = end
        return bytes(self._data[start - self._offset : end - self._offset])


def read_columns(window: Window, footer: pq.FileMetaData, index: int, columns: Sequence[str]) -> pa.Table:
    """Returns columns of row group `index`, whose bytes are in memory.

    Raises:
        pyarrow.ArrowException, OSError, ValueError: The bytes are no such row group.
    """
    file = pq.ParquetFile(pa.PythonFile(window), metadata=footer)
    return file.read_row_group(index, columns=list(columns), use_threads=False)


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


class GroupCache:
    """Row groups in memory: fetched by threads before their use, kept while a step needs them, and after that while there is room."""

    def __init__(self, reader: ShardReader, budget_bytes: int) -> None:
        """Holds what the fetched steps need; when that is less than `budget_bytes`, what earlier steps needed fills up the rest."""
        self._reader, self._budget_bytes = reader, budget_bytes
        self._futures: collections.OrderedDict[int, Future[RowGroup]] = collections.OrderedDict()
        self._uses: collections.Counter[int] = collections.Counter()
        self._num_bytes = 0
        self._pool = ThreadPoolExecutor(FETCH_THREADS, thread_name_prefix="fetch")

    def fetch(self, step: Step) -> int:
        """Starts reading what `step` needs and no step before it has needed; returns how many bytes that is."""
        before = self._num_bytes
        for group in {int(group): None for group in step.groups}:
            self._uses[group] += 1
            if group not in self._futures:
                self._futures[group] = self._pool.submit(self._reader.read, group)
                self._num_bytes += self._reader.num_bytes(group)
        return self._num_bytes - before

    def groups(self, step: Step) -> dict[int, Future[RowGroup]]:
        """Returns the row groups of a fetched step, some of them still being read."""
        return {group: self._futures[group] for group in {int(group) for group in step.groups}}

    def release(self, step: Step) -> None:
        """Ends the need of `step`; unneeded row groups go, the longest unused first, when the budget is exceeded."""
        for group in {int(group) for group in step.groups}:
            self._uses[group] -= 1
            if not self._uses[group]:
                del self._uses[group]
            self._futures.move_to_end(group)
        for group in [group for group in self._futures if group not in self._uses]:
            if self._num_bytes <= self._budget_bytes:
                return
            del self._futures[group]
            self._num_bytes -= self._reader.num_bytes(group)

    def close(self) -> None:
        """Stops reading."""
        self._pool.shutdown(wait=False, cancel_futures=True)
