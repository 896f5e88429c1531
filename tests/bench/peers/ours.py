"""cvdist: a prepared data set, read by the loader as train.py does, or as a tf.data.Dataset."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from peers.common import BATCH, SCALE_MIN, SIZE, THREADS, Epochs, Work, read_about

SEED = 7


def write(work: Work) -> None:
    """Prepares the photos: the same coefficients with restart markers, or raw pixels."""
    from cvdist import prepare
    from cvdist.config import PrepareConfig

    about, codec = read_about(work.corpus), work.options.get("codec", "jpeg")
    config = PrepareConfig(
        source_url=f"file://{work.corpus}/images",
        target_url=f"file://{work.container}/set",
        image_size=min(about["width"], about["height"]),
        resize="short",
        codec=codec,
        keep_original=codec == "jpeg",
        split="train=1.0",
        max_bad_fraction=0,
    )
    manifest = prepare.run(config, lambda description, function, numbers: [function(number) for number in numbers])
    assert manifest is not None
    assert manifest.num_rows == about["num_images"]


def make_loader(url: str, split: str = "train", **settings: Any) -> Any:
    """Returns the loader of the benchmark."""
    from cvdist.comm import World
    from cvdist.config import AugmentConfig, LoaderConfig
    from cvdist.loader import Loader
    from cvdist.shards import read_manifest

    return Loader(
        url,
        read_manifest(url),
        split,
        world=World(0, 1, 0, 1),
        global_batch=BATCH,
        image_size=SIZE,
        config=LoaderConfig(threads=THREADS, **settings),
        seed=SEED,
        augmentation=AugmentConfig(flip=True, crop_scale_min=SCALE_MIN),
    )


def photo_numbers(container: Path) -> list[int]:
    """Returns the number of the photo behind each sample of the split."""
    import pyarrow.parquet as pq

    from cvdist.shards import read_manifest

    numbers = []
    for shard in read_manifest(f"file://{container}/set").splits["train"].shards:
        keys = pq.read_table(container / "set" / shard.path, columns=["key"])["key"].to_pylist()
        numbers += [int(Path(key).stem) for key in keys]
    return numbers


def open_epochs(work: Work) -> Epochs:
    return as_dataset(work) if work.options.get("api") == "dataset" else as_loader(work)


def as_loader(work: Work) -> Epochs:
    loader, epochs = make_loader(f"file://{work.container}/set"), iter(range(1 << 30))

    def epoch() -> Iterator[Any]:
        for batch in loader.batches(next(epochs)):
            yield batch.images, batch.samples

    return epoch


def as_dataset(work: Work) -> Epochs:
    import cvdist
    from cvdist.config import AugmentConfig, LoaderConfig

    dataset = cvdist.image_dataset_from_shards(
        f"file://{work.container}/set",
        split="train",
        image_size=SIZE,
        batch_size=BATCH,
        shuffle=True,
        seed=SEED,
        augment=AugmentConfig(flip=True, crop_scale_min=SCALE_MIN),
        config=LoaderConfig(threads=THREADS),
    )

    def epoch() -> Iterator[Any]:
        for images, _ in dataset:
            yield images, None

    return epoch


def reference_crops(work: Work, samples: Any) -> list[tuple[int, Any, bool]]:
    """Returns photo, box and flip of samples in the first epoch, drawn as the loader draws them."""
    import numpy as np

    from cvdist import augment
    from cvdist.config import AugmentConfig

    about, config = read_about(work.corpus), AugmentConfig(flip=True, crop_scale_min=SCALE_MIN)
    draws = augment.draw(config, seed=SEED, epoch=0, sample_ids=samples)
    size = np.full(len(samples), about["height"]), np.full(len(samples), about["width"])
    boxes, flips, numbers = (
        augment.crop_boxes(config, draws, *size),
        augment.flips(config, draws),
        photo_numbers(work.container),
    )
    return [(numbers[sample], box, bool(flip)) for sample, box, flip in zip(samples, boxes, flips, strict=True)]
