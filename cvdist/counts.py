"""How often each sample of a split occurs in an epoch: labels and weights come from the shards, counts from sampling.py."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from cvdist import sampling, storage
from cvdist.config import LoaderConfig
from cvdist.errors import ConfigError, DataError
from cvdist.reader import adopted_labels, meaning_of
from cvdist.shards import WEIGHT_COLUMN, Manifest, Shard

READ_THREADS = 8


class Sampling:
    """Gives the counts of an epoch. Labels or weights are read once, when they are first needed: a few bytes of each sample."""

    def __init__(self, data_url: str, manifest: Manifest, split: str, config: LoaderConfig, seed: int) -> None:
        """Reads nothing yet.

        Raises:
            ConfigError: The data set has no weights, and the settings ask for them.
        """
        self._url, self._manifest, self._split, self._config, self._seed = data_url, manifest, split, config, seed
        self._column: npt.NDArray[Any] | None = None
        if config.sampling == "weighted" and not manifest.is_weighted:
            raise ConfigError(
                f"loader.sampling: weighted, but {data_url} has no weights; expected a data set prepared from a table with a column"
                f" {WEIGHT_COLUMN}; use all, balanced or bootstrap"
            )

    def counts(self, epoch: int) -> npt.NDArray[np.int64] | None:
        """Returns how often each sample occurs in an epoch, int64 (samples,), as many in all as there are; None where each does once.

        Raises:
            DataError: The labels are not those that the manifest counts, a class has no samples, or the weights cannot be drawn by.
            StorageError: The file system failed.
        """
        how, num_samples = self._config.sampling, self._manifest.splits[self._split].num_rows
        if how == "all":
            return None
        if how == "bootstrap":
            return sampling.bootstrap(num_samples, self._seed, self._config.member)
        if self._column is None:
            self._column = self._read_column(is_label=how == "balanced")
        if how == "balanced":
            classes = len(self._manifest.classes)
            return sampling.class_balanced(self._column, classes, num_samples, self._seed, epoch)
        return sampling.weighted(self._column, num_samples, self._seed, epoch)

    def _read_column(self, *, is_label: bool) -> npt.NDArray[Any]:
        """Reads the labels or the weights of the split, in the order of its samples."""
        split = self._manifest.splits[self._split]
        with ThreadPoolExecutor(READ_THREADS, thread_name_prefix="column") as pool:
            parts = list(pool.map(self._read_labels if is_label else self._read_weights, split.shards))
        column: npt.NDArray[Any] = np.concatenate(parts)
        if is_label:
            rows = tuple(np.bincount(column, minlength=len(self._manifest.classes)).tolist())
            if rows != split.class_rows:
                raise DataError(
                    f"{self._url}, split {self._split!r}: the labels count {rows} samples of the classes; expected {split.class_rows};"
                    " restore the shards or prepare again"
                )
        return column

    def _read_labels(self, shard: Shard) -> npt.NDArray[np.int32]:
        meaning = meaning_of(self._manifest)
        if meaning is None:
            return np.asarray(self._read(shard, ["label"])["label"].to_numpy(), np.int32)
        columns = [] if meaning.adopted.is_partition else [meaning.adopted.label]
        return adopted_labels(self._read(shard, columns), shard.path, meaning)

    def _read_weights(self, shard: Shard) -> npt.NDArray[np.float32]:
        return np.asarray(self._read(shard, [WEIGHT_COLUMN])[WEIGHT_COLUMN].to_numpy(), np.float32)

    def _read(self, shard: Shard, columns: list[str]) -> pa.Table:
        """Reads columns of a shard."""
        url = storage.join(self._url, shard.path)
        try:
            with storage.open_read(url, readahead_bytes=0) as file:
                table = pq.ParquetFile(file, pre_buffer=False).read(columns=columns, use_threads=False)
        except (pa.ArrowException, ValueError) as error:
            raise DataError(
                f"{url} cannot be read ({error}); expected the shard that the manifest names; restore it or prepare again"
            ) from None
        if table.num_rows != shard.num_rows:
            raise DataError(
                f"{url} holds {table.num_rows} rows; expected {shard.num_rows}; restore the shard or prepare again"
            )
        return table
