"""Exact evaluation: every sample of a split once, on any number of ranks; sums are reduced and divided once."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import tensorflow as tf

from cvdist import checkpoint, comm, metrics, storage
from cvdist.comm import World
from cvdist.config import CONFIG_NAME, LoaderConfig, TrainConfig, from_dict, require_split
from cvdist.errors import ConfigError, CvdistError, DataError, NotFoundError
from cvdist.loader import Loader
from cvdist.models import create_model, logits_of
from cvdist.shards import Manifest, read_manifest

EVALUATION_LANES = 64  # nothing is shuffled: more would only be in memory at once


@dataclasses.dataclass(frozen=True)
class Evaluator:
    """Evaluates a model on one split, as often as asked.

    Attributes:
        data_url: The data set.
        manifest: Its manifest.
        split: Which split.
        image_size: Height and width of the model's input, pixels.
        global_batch: Samples read at a time on all ranks.
        loader: How shards are read.
        world: This rank among how many.
    """

    data_url: str
    manifest: Manifest
    split: str
    image_size: int
    global_batch: int
    loader: LoaderConfig
    world: World

    def run(self, logits_of: Any) -> metrics.Sums:
        """Returns the sums over the whole split, equal on every rank.

        Args:
            logits_of: Maps uint8 images (N, H, W, C) to float32 logits (N, K), a tensor.

        Raises:
            DataError: The split could not be read, or fewer samples were counted than the manifest names.
        """
        loader = Loader(
            self.data_url,
            self.manifest,
            self.split,
            world=self.world,
            global_batch=self.global_batch,
            image_size=self.image_size,
            config=dataclasses.replace(
                self.loader, remainder="pad", num_lanes=EVALUATION_LANES, sampling="all", trace_path=None
            ),
        )
        sums = metrics.Sums.zeros(len(self.manifest.classes))
        for batch in loader.batches():
            sums += metrics.batch_sums(batch.labels, batch.weights, np.asarray(logits_of(batch.images)))
        total = metrics.Sums.from_vector(comm.allreduce_sum(sums.to_vector(), self.world))
        expected = self.manifest.splits[self.split].num_rows
        if total.samples != expected:
            raise DataError(
                f"{self.data_url}: {total.samples} samples of split {self.split!r} were counted; expected {expected}; run prepare again"
            )
        return total


def evaluate_run(
    run_url: str,
    *,
    split: str,
    world: World,
    report: Any,
    data_url: str | None = None,
    global_batch: int | None = None,
) -> dict[str, Any]:
    """Evaluates the newest good checkpoint of a run on a split, on all ranks.

    Args:
        run_url: The run.
        split: Which split of the data set.
        world: This rank among how many.
        report: Receives lines about damaged checkpoints that were passed over.
        data_url: Another data set with the same classes; by default the run's.
        global_batch: Samples read at a time on all ranks; by default the run's, made divisible.

    Returns:
        split, samples, top1, top5, loss.

    Raises:
        CheckpointError: The run has no good checkpoint.
        ConfigError: There is no such run or split.
    """
    failure = None
    try:
        config = read_config(storage.check_url(run_url, "run"))
        url = storage.check_url(data_url or config.data, "data")
        manifest = read_manifest(url)
        split = require_split("split", split, manifest, url)
        saved = checkpoint.require_latest(run_url, report) if world.rank == 0 else None
        image_size = config.image_size or manifest.image.image_size
        shape = (image_size, image_size, manifest.image.channels)
        model = create_model(
            config.model, input_shape=shape, num_classes=len(manifest.classes), precision=config.precision, dropout=config.dropout
        )  # fmt: skip
        if saved is not None:
            checkpoint.restore(saved, model, model_name=config.model)
    except CvdistError as error:
        failure = error
    comm.all_ranks_ok(world, failure)
    comm.broadcast(model.variables, world)
    logits_model = logits_of(model)
    per_rank_batch = max(1, (global_batch or config.global_batch) // world.size)
    evaluator = Evaluator(url, manifest, split, image_size, per_rank_batch * world.size, config.loader, world)
    sums = evaluator.run(tf.function(lambda images: logits_model(images, training=False), jit_compile=False))
    return summary(split, sums)


def summary(split: str, sums: metrics.Sums) -> dict[str, Any]:
    """Returns an evaluation as JSON can hold it: a loss that is not a number is null, and the samples that made it so are counted."""
    result: dict[str, Any] = {"split": split, **sums.result()}
    if sums.nonfinite:
        result |= {"loss": None, "nonfinite": sums.nonfinite}
    return result


def read_config(run_url: str) -> TrainConfig:
    """Reads the configuration of a run.

    Raises:
        ConfigError: There is no run at this URL.
    """
    url = storage.join(run_url, CONFIG_NAME)
    try:
        text = storage.read_text(url)
    except NotFoundError:
        raise ConfigError(
            f"run: {url} does not exist; expected the folder of a training run; correct the URL"
        ) from None
    return from_dict(TrainConfig, json.loads(text), url)
