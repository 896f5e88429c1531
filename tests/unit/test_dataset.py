"""`cvdist.image_dataset_from_shards`: Keras's arguments, each sample once in every pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cvdist
from cvdist.comm import World
from cvdist.config import AugmentConfig, LoaderConfig
from cvdist.errors import ConfigError, DataError
from cvdist.loader import Loader
from cvdist.shards import read_manifest
from tests.made_data import class_tree, data_set

pytest.importorskip("tensorflow")

CLASSES = {"bird": 61, "cat": 50, "dog": 45}


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("sets")
    images = class_tree(tmp_path_factory.mktemp("images"), CLASSES, height=40, width=52)
    data_set(images, f"file://{folder}/data", image_size=32, row_group_bytes=16384, shard_bytes=65536)
    return f"file://{folder}/data"


@pytest.fixture(scope="module")
def two_classes(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("two")
    images = class_tree(folder / "images", {"cat": 40, "dog": 40})
    data_set(images, f"file://{folder}/data", image_size=32)
    return f"file://{folder}/data"


def stored(url: str, split: str = "train") -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Returns images and labels in stored order, as the loader gives them without shuffling."""
    manifest = read_manifest(url)
    loader = Loader(url, manifest, split, world=World.alone(), global_batch=8, config=LoaderConfig(num_lanes=1))
    batches = [(b.images.copy(), b.labels, b.weights, b.samples) for b in loader.batches()]
    images, labels, weights, samples = (np.concatenate(column) for column in zip(*batches, strict=True))
    assert samples[weights > 0].tolist() == list(range(manifest.splits[split].num_rows))
    return images[weights > 0], labels[weights > 0]


def test_without_shuffling_samples_come_as_they_are_stored_and_the_last_batch_is_shorter(url: str) -> None:
    images, labels = stored(url)
    dataset = cvdist.image_dataset_from_shards(url, shuffle=False, batch_size=32)
    found = list(dataset.as_numpy_iterator())
    assert [len(y) for _, y in found] == [32] * (len(labels) // 32) + [len(labels) % 32]
    assert len(dataset) == len(found)
    assert dataset.class_names == ["bird", "cat", "dog"]
    np.testing.assert_array_equal(np.concatenate([x for x, _ in found]), images)
    np.testing.assert_array_equal(np.concatenate([y for _, y in found]), labels)
    assert [str(part.dtype) for part in found[0]] == ["uint8", "int32"]


def test_every_pass_is_an_epoch_in_an_order_of_its_own_and_the_same_for_the_same_seed(url: str) -> None:
    one, again, other = (cvdist.image_dataset_from_shards(url, batch_size=16, seed=seed) for seed in (3, 3, 4))

    def passes(dataset: Any) -> list[list[int]]:
        return [
            [int(p) for x, _ in dataset.as_numpy_iterator() for p in x.sum((1, 2, 3), dtype=np.int64)] for _ in range(2)
        ]

    first, second = passes(one)
    assert sorted(first) == sorted(second)
    assert first != second
    assert passes(again) == [first, second]
    assert passes(other)[0] != first


@pytest.mark.parametrize("split", ["val", "validation", "test"])
def test_every_split_can_be_read(url: str, split: str) -> None:
    dataset = cvdist.image_dataset_from_shards(url, split=split, shuffle=False, label_mode=None)
    manifest = read_manifest(url)
    count = sum(len(images) for images in dataset.as_numpy_iterator())
    assert count == manifest.splits["val" if split == "validation" else split].num_rows


def test_labels_come_as_asked_for(url: str, two_classes: str) -> None:
    _, labels = stored(url)
    codes = [
        y for _, y in cvdist.image_dataset_from_shards(url, shuffle=False, label_mode="categorical").as_numpy_iterator()
    ]
    np.testing.assert_array_equal(np.concatenate(codes), np.eye(3, dtype=np.float32)[labels])
    _, labels = stored(two_classes)
    binary = [
        y
        for _, y in cvdist.image_dataset_from_shards(
            two_classes, shuffle=False, label_mode="binary"
        ).as_numpy_iterator()
    ]
    np.testing.assert_array_equal(np.concatenate(binary), labels[:, None].astype(np.float32))
    assert binary[0].dtype == np.float32


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_share_an_epoch_in_equal_steps_and_padding_has_weight_zero(url: str, size: int) -> None:
    _, labels = stored(url)
    parts = [
        list(
            cvdist.image_dataset_from_shards(
                url, batch_size=8, seed=1, world=World(r, size, r, size)
            ).as_numpy_iterator()
        )
        for r in range(size)
    ]
    assert len({len(part) for part in parts}) == 1
    weights = np.concatenate([w for part in parts for _, _, w in part])
    found = np.concatenate([y for part in parts for _, y, _ in part])
    assert len(weights) == len(found) == len(parts[0]) * 8 * size
    assert np.bincount(found[weights > 0]).tolist() == np.bincount(labels).tolist()
    assert (weights == 0).sum() == -len(labels) % (8 * size)


def test_ranks_without_padding_give_no_weights(url: str) -> None:
    num_rows = read_manifest(url).splits["train"].num_rows
    size = next(size for size in range(2, num_rows + 1) if num_rows % size == 0)
    dataset = cvdist.image_dataset_from_shards(url, batch_size=num_rows // size, world=World(0, size, 0, size))
    assert [len(element) for element in dataset.as_numpy_iterator()] == [2]


def test_the_launcher_says_which_rank_this_is(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": 1, "SIZE": 2, "LOCAL_RANK": 1, "LOCAL_SIZE": 2}.items():
        monkeypatch.setenv(f"HOROVOD_{name}", str(value))
    implied = cvdist.image_dataset_from_shards(url, batch_size=8)
    monkeypatch.undo()
    named = cvdist.image_dataset_from_shards(url, batch_size=8, world=World(1, 2, 1, 2))
    for one, other in zip(implied.as_numpy_iterator(), named.as_numpy_iterator(), strict=True):
        np.testing.assert_array_equal(one[0], other[0])


def test_crops_and_flips_are_made_while_images_are_decoded(url: str) -> None:
    plain, changed = (
        cvdist.image_dataset_from_shards(url, batch_size=16, augment=augment)
        for augment in (None, AugmentConfig(flip=True, crop_scale_min=0.3))
    )
    (one, y), (other, also_y) = next(plain.as_numpy_iterator()), next(changed.as_numpy_iterator())
    np.testing.assert_array_equal(y, also_y)
    assert one.shape == other.shape
    assert not np.array_equal(one, other)


def test_what_a_step_holds_stays_while_it_is_held(url: str) -> None:
    """The loader uses memory again; a batch that somebody keeps must not change under him."""
    dataset = cvdist.image_dataset_from_shards(url, batch_size=4, shuffle=False)
    tensors = [images for images, _ in dataset]
    found = np.concatenate([tensor.numpy() for tensor in tensors])
    np.testing.assert_array_equal(found, stored(url)[0])


def test_batches_that_are_kept_do_not_change(url: str) -> None:
    manifest = read_manifest(url)
    loader = Loader(
        url, manifest, "train", world=World.alone(), global_batch=4, config=LoaderConfig(num_lanes=1, threads=3)
    )
    kept = [batch.images[1:3] for batch in loader.batches()]
    copies = [batch.images[1:3].copy() for batch in loader.batches()]
    for one, other in zip(kept, copies, strict=True):
        np.testing.assert_array_equal(one, other)


def test_memory_is_used_again(url: str) -> None:
    manifest = read_manifest(url)
    loader = Loader(
        url, manifest, "train", world=World.alone(), global_batch=2, config=LoaderConfig(threads=2, prefetch_batches=2)
    )
    places = [batch.images.__array_interface__["data"][0] for batch in loader.batches()]
    assert len(places) > 40
    assert len(set(places)) <= 5
    assert all(place % 64 == 0 for place in places)


def test_a_keras_model_is_fitted(two_classes: str) -> None:
    import keras

    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((32, 32, 3)),
            keras.layers.Rescaling(1 / 255),
            keras.layers.Conv2D(4, 3, activation="relu"),
            keras.layers.GlobalAveragePooling2D(),
            keras.layers.Dense(2, activation="softmax"),
        ]
    )
    model.compile(keras.optimizers.Adam(0.01), "sparse_categorical_crossentropy", metrics=["accuracy"])
    train = cvdist.image_dataset_from_shards(two_classes, batch_size=16, seed=1)
    val = cvdist.image_dataset_from_shards(two_classes, split="val", shuffle=False)
    history = model.fit(train, validation_data=val, epochs=3, verbose=0).history
    assert len(history["loss"]) == len(history["val_loss"]) == 3
    assert history["loss"][-1] < history["loss"][0]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"split": "dev"}, "'dev' is not in the data set"),
        ({"image_size": (32, 48)}, "not square"),
        ({"batch_size": 0}, "expected 1 or more"),
        ({"label_mode": "sparse"}, "'sparse' is unknown"),
        ({"label_mode": "binary"}, "binary with 3 classes"),
        ({"augment": AugmentConfig(rotation_deg=10)}, "not made by the loader"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(url: str, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        cvdist.image_dataset_from_shards(url, **arguments)


def test_a_folder_without_a_manifest_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"manifest\.json does not exist"):
        cvdist.image_dataset_from_shards(f"file://{tmp_path}")


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="image_dataset_from_folders"):
        _ = cvdist.image_dataset_from_folders
