"""Batches: every sample once with its own pixels and label on any number of ranks, nothing damaged delivered, nothing left behind."""

from __future__ import annotations

import dataclasses
import gc
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest
import simplejpeg

from cvdist import augment
from cvdist.comm import World
from cvdist.config import AugmentConfig, LoaderConfig
from cvdist.errors import DataError
from cvdist.images import Pixels, decode_stored
from cvdist.loader import Batch, Loader
from cvdist.reader import RowGroup, ShardReader
from cvdist.shards import Manifest, Row, ShardWriter, read_manifest, row_group_offsets
from tests.made_data import class_tree, data_set

CLASSES = {"ant": 101, "bee": 110, "cat": 90}
AUGMENT = AugmentConfig(flip=True, crop_scale_min=0.4, rotation_deg=10, brightness=0.2)


@dataclasses.dataclass(frozen=True)
class Data:
    """A data set on disk, and what its train split holds by sample index: pixels and labels."""

    url: str
    manifest: Manifest
    pixels: list[Pixels]
    fast: list[Pixels]  # as training decodes them
    labels: list[int]

    @property
    def path(self) -> Path:
        return Path(self.url.removeprefix("file://"))

    def loader(self, rank: int = 0, size: int = 1, batch: int = 24, split: str = "train", **options: Any) -> Loader:
        options = {"seed": 7, **options}
        return Loader(
            self.url, self.manifest, split, world=World(rank, size, rank, size), global_batch=batch, **options
        )


def decode_fast(image: bytes, channels: int) -> Pixels:
    """Decodes a whole JPEG in the fast ways of libjpeg."""
    pixels = simplejpeg.decode_jpeg(image, "RGB" if channels == 3 else "GRAY", fastdct=True, fastupsample=True)
    return np.asarray(pixels, np.uint8)


def made(folder: Path, images: Path, codec: str = "jpeg", channels: int = 3) -> Data:
    """Prepares images into shards of about three row groups of sixteen rows."""
    url = f"file://{folder}/{codec}-{channels}"
    small = {"image_size": 32, "row_group_bytes": 16384, "shard_bytes": 65536}
    manifest = data_set(images, url, codec=codec, channels=channels, **small)
    pixels, fast, labels = [], [], []
    for shard in manifest.splits["train"].shards:
        for row in pq.read_table(folder / f"{codec}-{channels}" / shard.path).to_pylist():
            pixels.append(decode_stored(row["image"], manifest.image))
            fast.append(decode_fast(row["image"], channels) if codec == "jpeg" else pixels[-1])
            labels.append(row["label"])
            assert row["key"].startswith(f"{manifest.classes[row['label']]}/")
    return Data(url, manifest, pixels, fast, labels)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return class_tree(tmp_path_factory.mktemp("images"), CLASSES, height=40, width=52)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, images: Path) -> Data:
    found = made(tmp_path_factory.mktemp("sets"), images)
    shards = found.manifest.splits["train"].shards
    assert len(shards) > 3
    assert sum(len(shard.row_group_rows) for shard in shards) > 12
    return found


@pytest.fixture
def copy(data: Data, tmp_path: Path) -> Data:
    """A copy that a test may damage."""
    shutil.copytree(data.path, tmp_path / "copy")
    return dataclasses.replace(data, url=f"file://{tmp_path}/copy")


def center(pixels: Pixels) -> Pixels:
    """Returns the middle square."""
    side = min(pixels.shape[:2])
    y, x = ((length - side) // 2 for length in pixels.shape[:2])
    return pixels[y : y + side, x : x + side]


def equal(one: Batch, other: Batch) -> bool:
    """Says whether two batches are equal in every number."""
    return all(
        np.array_equal(getattr(one, field.name), getattr(other, field.name)) for field in dataclasses.fields(Batch)
    )


def joined(parts: list[Batch]) -> Batch:
    """Returns the global batch of the parts of all ranks."""
    arrays = {
        field.name: np.concatenate([getattr(part, field.name) for part in parts])
        for field in dataclasses.fields(Batch)
        if isinstance(getattr(parts[0], field.name), np.ndarray)
    }
    assert len({(part.num_valid, part.epoch, part.step) for part in parts}) == 1
    return dataclasses.replace(parts[0], **arrays)


def threads() -> list[str]:
    """Returns the names of the loader's threads that are alive."""
    return [t.name for t in threading.enumerate() if t.name.startswith(("decode", "fetch"))]


def wait_until(condition: Callable[[], bool], timeout_s: float = 20) -> bool:
    """Waits for a condition and says whether it came."""
    end_s = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > end_s:
            return False
        time.sleep(0.01)
    return True


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("remainder", ["pad", "drop"])
def test_every_sample_is_read_once_per_epoch_with_its_pixels_and_label(
    data: Data, size: int, remainder: Literal["pad", "drop"]
) -> None:
    config = LoaderConfig(remainder=remainder)
    loaders = [data.loader(rank, size, config=config) for rank in range(size)]
    steps = [list(loader.batches(epoch=3)) for loader in loaders]
    plan = loaders[0].plan(3)
    assert {len(batches) for batches in steps} == {plan.num_steps}
    seen = []
    for batch in (batch for batches in steps for batch in batches):
        assert batch.images.shape == (24 // size, 32, 32, 3)
        assert [str(a.dtype) for a in (batch.images, batch.labels, batch.weights)] == ["uint8", "int32", "float32"]
        for image, label, weight, sample in zip(batch.images, batch.labels, batch.weights, batch.samples, strict=True):
            assert label == data.labels[sample]
            np.testing.assert_array_equal(image, center(data.fast[sample]))
            seen += [int(sample)] if weight else []
    assert len(set(seen)) == len(seen) == len(data.labels) - plan.num_dropped
    assert (plan.num_dropped > 0) == (remainder == "drop")


@pytest.mark.parametrize("codec, channels", [("raw", 3), ("raw", 1), ("jpeg", 1)])
def test_every_codec_and_number_of_channels_is_read_back(
    codec: str, channels: int, images: Path, tmp_path: Path
) -> None:
    data = made(tmp_path, images, codec, channels)
    for batch in data.loader(batch=48).batches():
        assert batch.images.shape == (48, 32, 32, channels)
        for image, label, sample in zip(batch.images, batch.labels, batch.samples, strict=True):
            assert label == data.labels[sample]
            np.testing.assert_array_equal(image, center(data.fast[sample]))


@pytest.mark.parametrize("split", ["val", "test"])
def test_other_splits_have_their_own_samples(data: Data, split: str) -> None:
    batches = list(data.loader(split=split, seed=None, batch=7).batches())
    samples = np.concatenate([batch.samples[batch.weights == 1] for batch in batches])
    rows = data.manifest.splits[split].num_rows
    assert sorted(samples.tolist()) == list(range(rows))
    labels = np.concatenate([batch.labels[batch.weights == 1] for batch in batches])
    assert np.bincount(labels, minlength=3).tolist() == list(data.manifest.splits[split].class_rows)


def test_images_are_resized_to_the_size_asked_for(data: Data) -> None:
    for size in (20, 48):
        batch = next(data.loader(image_size=size, seed=None).batches())
        assert batch.images.shape == (24, size, size, 3)
        way = cv2.INTER_AREA if size < 32 else cv2.INTER_LINEAR
        for image, sample in zip(batch.images, batch.samples, strict=True):
            expected = cv2.resize(center(data.pixels[sample]), (size, size), interpolation=way)
            np.testing.assert_array_equal(image, expected)


@pytest.mark.parametrize("augmentation", [None, AUGMENT])
def test_going_on_at_any_step_delivers_what_an_undisturbed_run_would(
    data: Data, augmentation: AugmentConfig | None
) -> None:
    whole = list(data.loader(augmentation=augmentation).batches(epoch=2))
    for start in (0, 1, len(whole) - 1, len(whole)):
        rest = list(data.loader(augmentation=augmentation).batches(epoch=2, start_step=start))
        assert len(rest) == len(whole) - start
        assert all(equal(one, other) for one, other in zip(rest, whole[start:], strict=True))


@pytest.mark.parametrize("size", [2, 3, 4])
def test_augmented_global_batches_are_identical_on_any_number_of_ranks(data: Data, size: int) -> None:
    whole = list(data.loader(augmentation=AUGMENT).batches(epoch=1))
    ranks = [list(data.loader(rank, size, augmentation=AUGMENT).batches(epoch=1)) for rank in range(size)]
    for index, batch in enumerate(whole):
        assert equal(joined([batches[index] for batches in ranks]), batch)
    assert whole[0].params.shape == (24, 11)


@pytest.mark.parametrize(
    "config",
    [
        LoaderConfig(threads=1),
        LoaderConfig(threads=5),
        LoaderConfig(prefetch_batches=1),
        LoaderConfig(readahead_bytes=0),
    ],
    ids=str,
)
def test_threads_and_read_ahead_change_no_pixel(data: Data, config: LoaderConfig) -> None:
    usual, other = (data.loader(augmentation=AUGMENT, config=how).batches() for how in (None, config))
    assert all(equal(*pair) for pair in zip(usual, other, strict=True))


def test_flips_happen_to_half_of_the_images(data: Data) -> None:
    loader = data.loader(augmentation=AugmentConfig(flip=True))
    flipped: dict[int, list[bool]] = {}
    for epoch in range(2):
        for batch in loader.batches(epoch):
            for image, sample, weight in zip(batch.images, batch.samples, batch.weights, strict=True):
                original = center(data.fast[sample])
                is_flipped = np.array_equal(image, original[:, ::-1])
                assert is_flipped or np.array_equal(image, original)
                if weight:
                    flipped.setdefault(int(sample), []).append(is_flipped)
    shares = np.array(list(flipped.values())).mean(axis=0)
    assert np.abs(shares - 0.5).max() < 0.15
    assert any(first != second for first, second in flipped.values())


def test_crops_are_those_that_were_drawn(data: Data) -> None:
    config = AugmentConfig(crop_scale_min=0.3)
    boxes_seen = set()
    for batch in data.loader(augmentation=config).batches(epoch=4):
        draws = augment.draw(config, seed=7, epoch=4, sample_ids=batch.samples)
        sizes = np.array([data.fast[sample].shape[:2] for sample in batch.samples])
        boxes = augment.crop_boxes(config, draws, sizes[:, 0], sizes[:, 1])
        for image, sample, (x, y, width, height) in zip(batch.images, batch.samples, boxes, strict=True):
            crop = data.fast[sample][y : y + height, x : x + width]
            np.testing.assert_array_equal(image, cv2.resize(crop, (32, 32), interpolation=cv2.INTER_LINEAR))
            boxes_seen.add((int(x), int(y), int(width), int(height)))
    assert len(boxes_seen) > 150


def test_epochs_show_other_crops_of_the_same_samples(data: Data) -> None:
    first, second = (
        {
            int(s): i
            for b in data.loader(augmentation=AUGMENT).batches(e)
            for s, i in zip(b.samples, b.images, strict=True)
        }
        for e in (0, 1)
    )
    assert first.keys() == second.keys()
    assert sum(np.array_equal(first[sample], second[sample]) for sample in first) < len(first) / 10


def flip(path: Path, place: int, bit: int = 0) -> None:
    """Flips one bit of a file."""
    content = bytearray(path.read_bytes())
    content[place] ^= 1 << bit
    path.write_bytes(content)


def refusal(data: Data, **options: Any) -> str:
    """Returns the message with which reading an epoch ends: what was found and where, what was expected, and the fix."""
    with pytest.raises(DataError) as caught:
        list(data.loader(**options).batches())
    message = str(caught.value)
    assert message.count("; ") >= 2
    assert "; expected " in message
    return message


def test_a_flipped_byte_of_an_image_is_named_by_shard_row_group_and_row(copy: Data) -> None:
    shard = copy.manifest.splits["train"].shards[1]
    path = copy.path / shard.path
    row = 5
    image = pq.ParquetFile(path).read_row_group(1)["image"][row].as_py()
    flip(path, path.read_bytes().index(image) + len(image) // 2)
    expected = f"{copy.url}/{shard.path}, row group 1, row {row}: the image differs from its checksum; expected"
    assert refusal(copy).startswith(expected)


def test_a_flipped_byte_of_a_label_is_detected(copy: Data) -> None:
    shard = copy.manifest.splits["train"].shards[0]
    path = copy.path / shard.path
    column = pq.read_metadata(path).row_group(1).column(1)
    assert column.path_in_schema == "label"
    flip(path, column.data_page_offset + column.total_compressed_size - 4)
    assert pq.read_table(path).num_rows == shard.num_rows, "Parquet itself should not notice"
    assert refusal(copy).startswith(f"{copy.url}/{shard.path}, row group 1 differs from its checksum; expected")


def test_every_flipped_byte_of_a_shard_is_detected_before_its_batch(copy: Data) -> None:
    (shard,) = copy.manifest.splits["test"].shards
    path, rng = copy.path / shard.path, np.random.default_rng(0)
    original = path.read_bytes()
    places = [*rng.integers(0, len(original), 120).tolist(), *range(5), *range(len(original) - 12, len(original))]
    footer = len(original) - row_group_offsets(shard)[-1] - shard.row_group_bytes[-1]
    places += (len(original) - rng.integers(1, footer, 40)).tolist()
    for place in places:
        content = bytearray(original)
        content[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(content)
        reader = ShardReader(copy.url, copy.manifest, "test")
        with pytest.raises(DataError, match=shard.path):
            for group in range(len(shard.row_group_rows)):
                reader.read(group)
    path.write_bytes(original)
    assert len(list(copy.loader(split="test").batches())) == 2


@pytest.mark.parametrize("change", ["truncated", "longer", "emptied", "missing", "swapped", "another format"])
def test_a_shard_that_is_not_the_one_named_is_refused(copy: Data, change: str) -> None:
    one, two = copy.manifest.splits["train"].shards[:2]
    path = copy.path / one.path
    content = path.read_bytes()
    changed = {
        "truncated": content[:-1],
        "longer": content + b"\0",
        "emptied": b"",
        "swapped": (copy.path / two.path).read_bytes(),
        "another format": b"x" * len(content),
    }
    if change == "missing":
        path.unlink()
    else:
        path.write_bytes(changed[change])
    message = refusal(copy)
    assert f"{copy.url}/{one.path}" in message
    if change == "missing":
        assert "does not exist; expected the shard that the manifest names" in message
    elif change == "another format":
        assert "the footer differs from its checksum" in message
    else:
        assert f"holds {len(changed[change])} bytes; expected {one.num_bytes}" in message


def test_a_foreign_shard_of_the_same_size_and_cut_is_refused(copy: Data) -> None:
    # Whole in itself, every image intact, every count right: only the manifest knows that it is not the one.
    shard = copy.manifest.splits["train"].shards[0]
    path = copy.path / shard.path
    rows = [Row(**{k: v for k, v in row.items() if k != "image_xxh3"}) for row in pq.read_table(path).to_pylist()]
    with path.open("wb") as stream:
        writer = ShardWriter(stream, 16384)
        for row in rows:
            writer.add(dataclasses.replace(row, label=(row.label + 1) % 3))
        foreign = writer.close(shard.path)
    assert (foreign.num_bytes, foreign.row_group_bytes) == (shard.num_bytes, shard.row_group_bytes)
    assert foreign.sha256 != shard.sha256
    assert f"{copy.url}/{shard.path}" in refusal(copy)


def test_batches_before_the_damage_are_delivered_and_the_error_ends_the_iterator(copy: Data) -> None:
    loader = copy.loader(config=LoaderConfig(num_lanes=1), batch=8)
    last = [loader.plan(0).step(index) for index in range(loader.plan(0).num_steps)][-1]
    group = int(last.groups[0])
    shard, index, offset = [
        (shard, index, offset)
        for shard in copy.manifest.splits["train"].shards
        for index, offset in enumerate(row_group_offsets(shard))
    ][group]
    flip(copy.path / shard.path, offset + shard.row_group_bytes[index] // 2)
    batches = loader.batches()
    delivered: list[Batch] = []
    with pytest.raises(DataError, match=f"{shard.path}, row group {index}"):
        delivered.extend(batches)
        pytest.fail("the damage was not noticed")
    assert next(batches, None) is None
    assert wait_until(lambda: not threads()), threads()


def test_leaving_an_epoch_early_leaves_no_thread(data: Data) -> None:
    assert wait_until(lambda: not threads()), threads()
    batches = data.loader(config=LoaderConfig(threads=3)).batches()
    next(batches)
    assert threads()
    batches.close()
    assert wait_until(lambda: not threads()), threads()
    forgotten = data.loader().batches()
    next(forgotten)
    del forgotten
    gc.collect()
    assert wait_until(lambda: not threads()), threads()


def test_nothing_is_opened_before_the_first_batch_is_asked_for(data: Data) -> None:
    loader = dataclasses.replace(data, url="file:///does/not/exist").loader()
    batches = loader.batches()
    assert not threads()
    with pytest.raises(DataError, match="does not exist"):
        next(batches)


def live(kind: type) -> list[Any]:
    """Returns the objects of a kind that are held in memory."""
    return [thing for thing in gc.get_objects() if type(thing) is kind]


@pytest.mark.parametrize("readahead_bytes", [0, 60_000])
def test_memory_is_bounded_by_lanes_and_read_ahead(data: Data, readahead_bytes: int) -> None:
    gc.collect()
    config = LoaderConfig(num_lanes=1, prefetch_batches=2, threads=1, readahead_bytes=readahead_bytes)
    sizes = [size for shard in data.manifest.splits["train"].shards for size in shard.row_group_bytes]
    # A step of 16 samples touches two row groups of 16 rows, two steps in work and the one delivered at most four. The step that
    # fills the budget may pass it by another two.
    limit = 4 * max(sizes) + (readahead_bytes + 2 * max(sizes) if readahead_bytes else 0)
    assert limit < sum(sizes) * 0.6
    for batch in data.loader(config=config, batch=16).batches():
        if batch.samples[0] % 4:
            continue  # looking through the memory takes long
        time.sleep(0.005)  # a slow consumer, so that everything that may be read ahead is
        held = sum(len(group.images) for group in live(RowGroup))
        assert held <= limit
        assert len(live(Batch)) <= 2 + 1
        del batch


@pytest.mark.parametrize("readahead_bytes", [0, 60_000, 1 << 30])
@pytest.mark.parametrize("lanes", [1, 4, 24])
def test_a_row_group_is_read_once_but_for_the_seams_of_lanes(
    data: Data, readahead_bytes: int, lanes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = []
    read = ShardReader.read

    def counted(reader: ShardReader, group: int) -> RowGroup:
        reads.append(group)
        return read(reader, group)

    monkeypatch.setattr(ShardReader, "read", counted)
    loader = data.loader(config=LoaderConfig(num_lanes=lanes, readahead_bytes=readahead_bytes, prefetch_batches=2))
    for _ in loader.batches():
        pass
    num_groups = sum(len(shard.row_group_rows) for shard in data.manifest.splits["train"].shards)
    assert set(reads) == set(range(num_groups))
    # A lane ends in the row group in which the next one has begun, and the padding is taken from the first ones.
    seams = 0 if readahead_bytes == 1 << 30 else lanes + 2
    assert len(reads) <= num_groups + seams


def test_read_ahead_goes_on_when_the_lanes_alone_exceed_it(data: Data) -> None:
    # With every lane in another row group, the row groups in use are more than the budget all the time.
    config = LoaderConfig(num_lanes=12, readahead_bytes=1, prefetch_batches=3, threads=2)
    batches = data.loader(config=config, batch=12).batches()
    next(batches)
    # The next batches are made while the consumer does something else.
    assert wait_until(lambda: len(live(Batch)) >= 2)
    batches.close()


def test_a_tf_dataset_has_the_same_batches_and_a_finite_length(data: Data) -> None:
    tf = pytest.importorskip("tensorflow", reason="TensorFlow is not installed")
    loader = data.loader(rank=1, size=2)
    for start in (0, 4):
        dataset = loader.dataset(epoch=1, start_step=start)
        batches = list(loader.batches(epoch=1, start_step=start))
        assert int(dataset.cardinality()) == len(batches) == loader.plan(1).num_steps - start
        assert dataset.element_spec == (
            tf.TensorSpec((12, 32, 32, 3), tf.uint8),
            tf.TensorSpec((12,), tf.int32),
            tf.TensorSpec((12,), tf.float32),
        )
        for (pixels, labels, weights), batch in zip(dataset.as_numpy_iterator(), batches, strict=True):
            np.testing.assert_array_equal(pixels, batch.images)
            np.testing.assert_array_equal(labels, batch.labels)
            np.testing.assert_array_equal(weights, batch.weights)


def test_a_tf_dataset_behind_the_last_step_is_empty(data: Data) -> None:
    pytest.importorskip("tensorflow", reason="TensorFlow is not installed")
    loader = data.loader()
    for start in (loader.plan(0).num_steps, loader.plan(0).num_steps + 1):
        dataset = loader.dataset(start_step=start)
        assert int(dataset.cardinality()) == 0
        assert list(dataset) == []


def test_leaving_a_tf_dataset_early_leaves_no_thread(data: Data) -> None:
    pytest.importorskip("tensorflow", reason="TensorFlow is not installed")
    iterator = iter(data.loader().dataset())
    next(iterator)
    del iterator
    gc.collect()
    assert wait_until(lambda: not threads()), threads()


def test_errors_reach_the_user_of_a_tf_dataset(copy: Data) -> None:
    tf = pytest.importorskip("tensorflow", reason="TensorFlow is not installed")
    shard = copy.manifest.splits["train"].shards[0]
    flip(copy.path / shard.path, shard.num_bytes // 2)
    with pytest.raises(tf.errors.UnknownError, match="differs from its checksum"):
        for _ in copy.loader().dataset():
            pass


def test_the_manifest_read_back_leads_to_the_same_batches(data: Data) -> None:
    again = dataclasses.replace(data, manifest=read_manifest(data.url))
    assert all(equal(one, other) for one, other in zip(data.loader().batches(), again.loader().batches(), strict=True))


@pytest.fixture(autouse=True)
def _no_thread_is_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every test ends with the loader's threads gone."""
    yield
    if threads():
        gc.collect()
    assert wait_until(lambda: not threads()), threads()
