"""Shards for Keras: the arguments of keras.utils.image_dataset_from_directory, the samples of a prepared data set."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from cvdist import comm, storage
from cvdist.augment import num_params
from cvdist.comm import World
from cvdist.config import AugmentConfig, LoaderConfig, require_split
from cvdist.errors import ConfigError
from cvdist.loader import Batch, Loader
from cvdist.shards import read_manifest

if TYPE_CHECKING:
    import tensorflow as tf

LABEL_MODES = ("int", "categorical", "binary", None)


def image_dataset_from_shards(
    url: str,
    *,
    split: str = "train",
    image_size: int | tuple[int, int] | None = None,
    batch_size: int = 32,
    shuffle: bool = True,
    seed: int | None = None,
    label_mode: Literal["int", "categorical", "binary"] | None = "int",
    world: World | None = None,
    augment: AugmentConfig | None = None,
    config: LoaderConfig | None = None,
) -> tf.data.Dataset:
    """Returns a split as a finite tf.data.Dataset of batches, for `model.fit` and for loops.

    Every pass over the dataset is an epoch: each sample once, when shuffled in a new order for each pass, the same again for the same seed.

    Args:
        url: A prepared or adopted data set: file:///path or hdfs://host:port/path.
        split: train, val (or validation) or test.
        image_size: Height and width, equal, pixels; by default the data set's. Images are cut to their largest centred square.
        batch_size: Samples of a batch of this rank; the global batch is batch_size x world.size.
        shuffle: Whether samples come in random order; otherwise in the order in which they are stored.
        seed: Of that order and of `augment`; 0 by default, on all ranks the same.
        label_mode: int: int32 (N,). categorical: float32 (N, classes). binary: float32 (N, 1), for two classes. None: no labels.
        world: This rank among how many; by default what horovodrun says, or one process.
        augment: Random crops and flips, made while the images are decoded; what else it asks for is refused here.
        config: Threads, read-ahead, cache.

    Returns:
        A dataset of uint8 images (N, H, W, C), 0-255, or (images, labels), with `.class_names` and a length. The last batch of one
        process is as long as what is left; of several ranks it is filled up, and then every element is (images, labels, float32
        weights (N,)), where a weight of 0 marks what only fills. The dataset cannot be saved or sent to another process.

    Raises:
        ConfigError: There is no such split, or the arguments do not fit the data set.
        DataError: There is no data set, or it is damaged; while reading also: a shard is not what the manifest says.
    """
    url = storage.check_url(url, "url")
    manifest = read_manifest(url)
    split = require_split("split", split, manifest, url)
    world = world or comm.launched()
    config = config or LoaderConfig()
    num_classes = len(manifest.classes)
    _check(image_size, batch_size, label_mode, num_classes, augment)
    side = image_size[0] if isinstance(image_size, tuple) else image_size
    loader = Loader(
        url,
        manifest,
        split,
        world=world,
        global_batch=batch_size * world.size,
        image_size=side,
        config=config if shuffle else dataclasses.replace(config, num_lanes=1),  # a single lane is the stored order
        seed=(seed or 0) if shuffle else None,
        augmentation=augment,
    )
    is_padded = world.size > 1 and loader.plan(0).num_padded > 0
    epochs = itertools.count()

    def elements() -> Iterator[Any]:
        for batch in loader.batches(next(epochs)):
            yield _element(batch, label_mode, num_classes, keeps_padding=world.size > 1, is_padded=is_padded)

    return _dataset(elements, loader, label_mode, is_padded=is_padded)


def _check(
    image_size: int | tuple[int, int] | None,
    batch_size: int,
    label_mode: str | None,
    num_classes: int,
    augment: AugmentConfig | None,
) -> None:
    """Refuses arguments that no dataset can be made of."""
    if isinstance(image_size, tuple) and image_size[0] != image_size[1]:
        raise ConfigError(
            f"image_size: {image_size} is not square; expected equal height and width; resize in the model"
        )
    if batch_size < 1:
        raise ConfigError(f"batch_size: {batch_size} is out of range; expected 1 or more; change it")
    if label_mode not in LABEL_MODES:
        raise ConfigError(f"label_mode: {label_mode!r} is unknown; expected one of {LABEL_MODES}; use one of them")
    if label_mode == "binary" and num_classes != 2:
        raise ConfigError(f"label_mode: binary with {num_classes} classes; expected 2 classes; use int or categorical")
    if augment and num_params(augment):
        raise ConfigError(
            "augment: rotation, shift, shear, zoom and colours are not made by the loader; expected flip and crop_scale_min alone;"
            " use Keras's layers for the others"
        )


def _element(batch: Batch, label_mode: str | None, num_classes: int, *, keeps_padding: bool, is_padded: bool) -> Any:
    """Returns what the dataset gives for a batch."""
    length = len(batch.labels) if keeps_padding else batch.num_valid
    images, labels = batch.images[:length], batch.labels[:length]
    if label_mode == "categorical":
        encoded: Any = np.eye(num_classes, dtype=np.float32)[labels]
    elif label_mode == "binary":
        encoded = labels[:, None].astype(np.float32)
    else:
        encoded = labels
    parts = [images] if label_mode is None else [images, encoded]
    parts += [batch.weights] if is_padded else []
    return tuple(parts) if len(parts) > 1 else images


def _dataset(elements: Any, loader: Loader, label_mode: str | None, *, is_padded: bool) -> tf.data.Dataset:
    """Returns a dataset of what `elements` yields."""
    import tensorflow as tf

    size, classes = loader.image_size, loader.manifest.classes
    rows = loader.per_rank_batch if loader.world.size > 1 else None
    label_specs = {
        "int": tf.TensorSpec((rows,), tf.int32),
        "categorical": tf.TensorSpec((rows, len(classes)), tf.float32),
        "binary": tf.TensorSpec((rows, 1), tf.float32),
    }
    specs = [tf.TensorSpec((rows, size, size, loader.manifest.image.channels), tf.uint8)]
    specs += [label_specs[label_mode]] if label_mode else []
    specs += [tf.TensorSpec((rows,), tf.float32)] if is_padded else []
    signature = tuple(specs) if len(specs) > 1 else specs[0]
    dataset = tf.data.Dataset.from_generator(elements, output_signature=signature)
    dataset = dataset.apply(tf.data.experimental.assert_cardinality(loader.plan(0).num_steps))
    dataset.class_names = list(classes)
    return dataset
