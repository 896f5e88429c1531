"""Sampling settings through the loader: classes, weights and bags as asked for, the same on any number of ranks."""

from __future__ import annotations

import collections
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from cvdist.comm import World
from cvdist.config import AugmentConfig, LoaderConfig
from cvdist.errors import ConfigError, DataError
from cvdist.loader import Batch, Loader
from cvdist.shards import Manifest, read_manifest
from tests.made_data import class_tree, data_set

CLASSES = {"rare": 12, "usual": 60, "many": 120}


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A data set whose weights are 1 for rare, 2 for usual and 0 for many."""
    folder = tmp_path_factory.mktemp("weighted")
    images = class_tree(folder / "images", CLASSES)
    weights = {"rare": 1.0, "usual": 2.0, "many": 0.0}
    rows = [
        {"path": str(path.relative_to(folder)), "label": path.parent.name, "weight": weights[path.parent.name]}
        for path in sorted(images.rglob("*.jpg"))
    ]
    (folder / "table.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data_set(folder / "table.jsonl", f"file://{folder}/data", image_size=32, split="train=1.0", row_group_bytes=16384)
    return f"file://{folder}/data"


def batches(url: str, size: int = 1, epoch: int = 0, **settings: Any) -> list[list[Batch]]:
    """Returns the batches of all ranks."""
    manifest, config = read_manifest(url), LoaderConfig(**settings)
    augmentation = AugmentConfig(flip=True, crop_scale_min=0.3)
    options: dict[str, Any] = {"global_batch": 24, "seed": 1, "config": config, "augmentation": augmentation}
    worlds = [World(rank, size, rank, size) for rank in range(size)]
    return [list(Loader(url, manifest, "train", world=world, **options).batches(epoch)) for world in worlds]


def seen(ranks: list[list[Batch]]) -> collections.Counter[int]:
    """Returns how often each label came."""
    return collections.Counter(
        int(label) for part in ranks for b in part for label, weight in zip(b.labels, b.weights, strict=True) if weight
    )


def names(url: str, labels: collections.Counter[int]) -> dict[str, int]:
    """Puts names of classes in the place of their numbers."""
    return {read_manifest(url).classes[label]: count for label, count in labels.items()}


@pytest.mark.parametrize("size", [1, 2, 3])
def test_balanced_sampling_shows_each_class_equally_often(url: str, size: int) -> None:
    assert names(url, seen(batches(url, size, sampling="balanced"))) == {"rare": 64, "usual": 64, "many": 64}


def test_weighted_sampling_follows_the_weights_of_the_data_set(url: str) -> None:
    found = names(url, seen(batches(url, sampling="weighted")))
    assert set(found) == {"rare", "usual"}
    assert sum(found.values()) == 192
    assert abs(found["rare"] - 192 * 12 / 132) <= 12


def test_bags_of_members_differ_and_stay_for_the_run(url: str) -> None:
    def bag(member: int, epoch: int) -> collections.Counter[int]:
        (rank,) = batches(url, epoch=epoch, sampling="bootstrap", member=member)
        return collections.Counter(int(s) for b in rank for s, w in zip(b.samples, b.weights, strict=True) if w)

    assert bag(0, 0) == bag(0, 1) != bag(1, 0)
    assert sum(bag(0, 0).values()) == 192
    assert 0.55 < len(bag(0, 0)) / 192 < 0.72  # 1 - 1/e of the samples


def test_a_repeated_sample_is_augmented_anew_each_time(url: str) -> None:
    (rank,) = batches(url, sampling="balanced")
    shown: dict[int, list[bytes]] = collections.defaultdict(list)
    for batch in rank:
        for sample, image, weight in zip(batch.samples, batch.images, batch.weights, strict=True):
            shown[int(sample)] += [image.tobytes()] if weight else []
    often = [images for images in shown.values() if len(images) > 3]
    assert len(often) == 12
    assert np.mean([len(set(images)) / len(images) for images in often]) > 0.9


def test_the_same_batches_come_on_any_number_of_ranks(url: str) -> None:
    whole, parts = batches(url, sampling="balanced")[0], batches(url, 3, sampling="balanced")
    for index, batch in enumerate(whole):
        np.testing.assert_array_equal(np.concatenate([part[index].samples for part in parts]), batch.samples)
        np.testing.assert_array_equal(np.concatenate([part[index].images for part in parts]), batch.images)


def test_weights_that_are_not_there_are_refused(tmp_path: Path) -> None:
    data_set(class_tree(tmp_path / "images", {"a": 20, "b": 20}), f"file://{tmp_path}/data", image_size=32)
    with pytest.raises(ConfigError, match=r"loader\.sampling: weighted, but .* has no weights"):
        batches(f"file://{tmp_path}/data", sampling="weighted")


def test_labels_that_the_manifest_does_not_count_stop_the_run(url: str, tmp_path: Path) -> None:
    folder = Path(url.removeprefix("file://"))
    manifest: Manifest = read_manifest(url)
    copy = tmp_path / "data"
    (copy / "train").mkdir(parents=True)
    (copy / "manifest.json").write_bytes((folder / "manifest.json").read_bytes())
    for shard in manifest.splits["train"].shards:
        table = pq.read_table(folder / shard.path)
        labels = table["label"].to_numpy().copy()
        labels[0] = (labels[0] + 1) % 3
        pq.write_table(table.set_column(1, table.schema.field("label"), [labels]), copy / shard.path)
    with pytest.raises(DataError, match="the labels count"):
        batches(f"file://{copy}", sampling="balanced")
