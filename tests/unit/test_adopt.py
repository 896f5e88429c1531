"""Parquet files of others, adopted as they are: every row is read right, whatever changes is found, nothing is executed."""

from __future__ import annotations

import base64
import io
import json
import os
import pickle
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest
from PIL import Image

from cvdist import adopt, cli, foreign, images
from cvdist.comm import World
from cvdist.config import AdoptConfig
from cvdist.errors import ConfigError, CvdistError, DataError
from cvdist.headers import Rules, read_header
from cvdist.images import ImageSpec, Pixels, decode_stored
from cvdist.loader import Loader
from cvdist.reader import ShardReader
from cvdist.shards import Manifest, read_manifest
from tests.made_data import class_tree, data_set

HEIGHT, WIDTH = 12, 18
ANY = ImageSpec(32, "none", 3, "any", 0)


def picture(number: int, *, height: int = HEIGHT, width: int = WIDTH) -> Pixels:
    """Pixels (H, W, 3), RGB, that no other number has."""
    rng = np.random.default_rng(number)
    return cv2.resize(rng.integers(0, 256, (3, 4, 3), np.uint8), (width, height)).astype(np.uint8)


def encoded(pixels: Pixels, suffix: str = ".png", *options: int) -> bytes:
    """The file of RGB or grey pixels."""
    done, data = cv2.imencode(suffix, pixels[..., ::-1] if pixels.ndim == 3 else pixels, options)
    assert done
    return bytes(data)


def npy(array: np.ndarray, save: Callable[..., None] = np.save) -> bytes:
    """The .npy, or by another function .npz, file of an array."""
    stream = io.BytesIO()
    save(stream, array)
    return stream.getvalue()


def table(numbers: range, **columns: Any) -> pa.Table:
    """Rows of PNGs with the label cat or dog, and further columns."""
    return pa.table(
        {
            "image": pa.array([encoded(picture(number)) for number in numbers], pa.binary()),
            "label": pa.array(["cat" if number % 2 else "dog" for number in numbers], pa.string()),
            **columns,
        }
    )


def put(path: Path, rows: pa.Table, **options: Any) -> None:
    """Writes a file, making its folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(rows, path, **options)


def adopted(folder: Path, **settings: Any) -> Manifest:
    """Adopts a folder."""
    config = AdoptConfig(
        **{"url": f"file://{folder}", "image": "image", "label": "label", "image_size": 32, **settings}
    )
    manifest = adopt.adopt(config, foreign.find_files(config))
    assert read_manifest(config.url) == manifest
    return manifest


def refusal(folder: Path, **settings: Any) -> str:
    """Returns the message of an adoption that fails, which leaves no manifest."""
    with pytest.raises(CvdistError) as caught:
        adopted(folder, **settings)
    assert not (folder / "_manifest.json").exists()
    return str(caught.value)


def seen(folder: Path, split: str = "train") -> list[tuple[str, Pixels]]:
    """Returns the class and pixels of every row of a split, in order, as the loader's reader gives them."""
    manifest = read_manifest(f"file://{folder}")
    reader, rows = ShardReader(f"file://{folder}", manifest, split), []
    for group in range(sum(len(shard.row_group_rows) for shard in manifest.splits[split].shards)):
        found = reader.read(group)
        for row in range(len(found.labels)):
            pixels = decode_stored(found.image(row), manifest.image)
            assert pixels.shape[:2] == (found.heights[row], found.widths[row])
            rows.append((manifest.classes[found.labels[row]], pixels))
    assert len(rows) == manifest.splits[split].num_rows
    return rows


def assert_all_seen(folder: Path, numbers: range, split: str = "train") -> None:
    """Checks that the rows of `table(numbers)` are seen, each once and in order."""
    rows = seen(folder, split)
    assert [name for name, _ in rows] == ["cat" if number % 2 else "dog" for number in numbers]
    for number, (_, pixels) in zip(numbers, rows, strict=True):
        np.testing.assert_array_equal(pixels, picture(number))


def binary(kind: pa.DataType, column: str = "image") -> Callable[[pa.Table], pa.Table]:
    """Changes the type of a column."""
    return lambda rows: rows.set_column(rows.column_names.index(column), column, rows[column].cast(kind))


def as_dictionary(rows: pa.Table) -> pa.Table:
    """Both columns as codes and values."""
    for index, name in enumerate(rows.column_names):
        rows = rows.set_column(index, name, rows[name].dictionary_encode())
    return rows


@pytest.mark.parametrize(
    "change, options",
    [
        (None, {}),
        (None, {"compression": "none"}),
        (None, {"compression": "gzip"}),
        (None, {"compression": "zstd", "use_dictionary": False}),
        (None, {"row_group_size": 7}),
        (None, {"data_page_size": 600, "write_batch_size": 2, "use_dictionary": False}),
        (None, {"data_page_version": "2.0", "version": "2.6", "row_group_size": 11}),
        (None, {"store_schema": False, "write_statistics": False}),
        (binary(pa.large_binary()), {"row_group_size": 7}),
        (binary(pa.large_string(), "label"), {}),
        (as_dictionary, {"row_group_size": 7}),
    ],
)
def test_every_row_is_read_with_its_label_and_pixels(change: Any, options: dict[str, Any], tmp_path: Path) -> None:
    for number in range(3):
        rows = table(range(20 * number, 20 * number + 20), junk=[os.urandom(50)] * 20)
        put(tmp_path / f"part-{number}.parquet", change(rows) if change else rows, **options)
    manifest = adopted(tmp_path)
    assert manifest.classes == ("cat", "dog")
    assert manifest.num_rows == manifest.num_inputs == 60
    assert manifest.splits["train"].class_rows == (30, 30)
    assert manifest.adopted is not None
    assert manifest.adopted.formats == {"PNG": 60}
    assert_all_seen(tmp_path, range(60))


def test_what_pandas_has_written_is_read(tmp_path: Path) -> None:
    for number, part in enumerate((range(10), range(10, 25))):
        table(part).to_pandas().set_index(np.arange(len(part)) * 7).to_parquet(tmp_path / f"{number}.parquet")
    adopted(tmp_path)
    assert_all_seen(tmp_path, range(25))


def test_the_loader_gives_every_sample_once_on_any_number_of_ranks(tmp_path: Path) -> None:
    put(tmp_path / "a.parquet", table(range(40)), row_group_size=9)
    manifest = adopted(tmp_path, image_size=16)
    for size in (1, 2, 3):
        samples: list[tuple[int, int]] = []
        for rank in range(size):
            loader = Loader(
                f"file://{tmp_path}", manifest, "train", world=World(rank, size, rank, size), global_batch=12, seed=5
            )
            for batch in loader.batches():
                assert batch.images.shape == (12 // size, 16, 16, 3)
                samples += [
                    (int(s), int(n)) for s, n, w in zip(batch.samples, batch.labels, batch.weights, strict=True) if w
                ]
        assert len(set(samples)) == len(samples) >= 36
        assert all(label == 1 - sample % 2 for sample, label in samples)


def rotated(suffix: str, orientation: int) -> bytes:
    """A file with an EXIF orientation."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    stream = io.BytesIO()
    Image.fromarray(picture(1)).save(stream, suffix, exif=exif, **({"lossless": True} if suffix == "WEBP" else {}))
    return stream.getvalue()


def pillow(mode: str, suffix: str, **options: Any) -> bytes:
    """A file that Pillow writes, of pixels in another mode."""
    stream = io.BytesIO()
    Image.fromarray(picture(2)).convert(mode).save(stream, suffix, **options)
    return stream.getvalue()


FILES: dict[str, bytes] = {
    "jpeg": encoded(picture(0), ".jpg"),
    "progressive": encoded(picture(0), ".jpg", cv2.IMWRITE_JPEG_PROGRESSIVE, 1),
    "grey jpeg": encoded(picture(0)[..., 0], ".jpg"),
    "cmyk": pillow("CMYK", "JPEG"),
    "grey png": encoded(picture(0)[..., 0]),
    "16-bit png": encoded(picture(0)[..., 0].astype(np.uint16) * 257),  # type: ignore[arg-type]
    "transparent": pillow("RGBA", "PNG"),
    "palette": pillow("P", "PNG"),
    "webp": pillow("RGB", "WEBP", lossless=True),
    "gif": pillow("P", "GIF"),
    "bmp": pillow("RGB", "BMP"),
    "array": npy(picture(0)),
    "array of grey": npy(picture(0)[..., 0]),
    "array with one channel": npy(picture(0)[..., :1]),
    "array in columns": npy(np.asfortranarray(picture(0))),
    **{f"{suffix} {turn}": rotated(suffix, turn) for suffix in ("JPEG", "PNG", "WEBP") for turn in range(2, 9)},
}


@pytest.mark.parametrize("channels", [3, 1])
def test_images_of_every_format_have_the_pixels_that_prepare_gives_them(channels: Any, tmp_path: Path) -> None:
    put(tmp_path / "a.parquet", pa.table({"image": list(FILES.values()), "label": list(FILES)}))
    manifest = adopted(tmp_path, channels=channels)
    # Squares as large as the image or larger are stored by prepare without scaling.
    spec = ImageSpec(8, "short", channels, "raw", 90)
    for name, pixels in seen(tmp_path):
        header = read_header(FILES[name], Rules())
        assert isinstance(header, images.Header)
        expected = images.decode(FILES[name], header, spec)
        np.testing.assert_array_equal(pixels, expected[..., ::-1] if channels == 3 else expected, err_msg=name)
        assert pixels.shape[2] == channels
    assert manifest.num_rows == len(FILES)


@pytest.mark.parametrize("suffix", ["JPEG", "PNG", "WEBP"])
def test_a_photo_on_its_side_is_turned_upright(suffix: str) -> None:
    pixels = decode_stored(rotated(suffix, 6), ANY)
    assert pixels.shape == (WIDTH, HEIGHT, 3)
    np.testing.assert_allclose(pixels.astype(int), np.rot90(picture(1), -1), atol=0 if suffix != "JPEG" else 60)
    header = images.read_stored_header(rotated(suffix, 6), ANY)
    assert (header.height, header.width, header.orientation) == (WIDTH, HEIGHT, 6)
    assert not images.is_plain(header)


def with_xmp(orientation: int) -> bytes:
    """A JPEG whose orientation is said by XMP alone."""
    packet = b"http://ns.adobe.com/xap/1.0/\0" + f'<x tiff:Orientation="{orientation}"/>'.encode()
    data = FILES["jpeg"]
    return data[:2] + b"\xff\xe1" + struct.pack(">H", len(packet) + 2) + packet + data[2:]


def test_the_quick_look_at_a_header_sees_what_the_thorough_one_sees() -> None:
    more = {"xmp": with_xmp(8), "fill bytes": FILES["jpeg"][:2] + b"\xff\xff" + FILES["jpeg"][2:]}
    for name, data in {**FILES, **more}.items():
        for image in (data, memoryview(data)):
            assert images.read_known_header(image, ANY) == images.read_stored_header(data, ANY), name
    header = images.read_known_header(more["xmp"], ANY)
    assert (header.orientation, header.height, header.width) == (8, WIDTH, HEIGHT)
    assert decode_stored(more["xmp"], ANY).shape == (WIDTH, HEIGHT, 3)


@pytest.mark.parametrize("seed", [None, 3])
def test_every_jpeg_has_its_pixels_in_training_and_in_evaluation(seed: int | None, tmp_path: Path) -> None:
    sampling = {"4:4:4": 0x111111, "4:2:2": 0x211111, "4:2:0": 0x221111, "4:4:0": 0x121111}
    options = [[cv2.IMWRITE_JPEG_SAMPLING_FACTOR, factors] for factors in sampling.values()]
    options += [
        [cv2.IMWRITE_JPEG_RST_INTERVAL, 1],
        [cv2.IMWRITE_JPEG_RST_INTERVAL, 5],
        [cv2.IMWRITE_JPEG_PROGRESSIVE, 1],
    ]
    flat = [cv2.GaussianBlur(picture(number, height=64, width=64), (0, 0), 9) for number in range(len(options))]
    rows = [encoded(pixels, ".jpg", *option) for pixels, option in zip(flat, options, strict=True)]
    put(tmp_path / "a.parquet", pa.table({"image": rows, "label": list(range(len(rows)))}))
    manifest = adopted(tmp_path, image_size=64)
    loader = Loader(f"file://{tmp_path}", manifest, "train", world=World(0, 1, 0, 1), global_batch=len(rows), seed=seed)
    (batch,) = loader.batches()
    for image, label in zip(batch.images, batch.labels, strict=True):
        np.testing.assert_allclose(image.astype(int), flat[label], atol=12)


def test_compressed_arrays_of_petastorm_are_read(tmp_path: Path) -> None:
    rows = [npy(picture(number), np.savez_compressed) for number in range(4)]
    put(tmp_path / "a.parquet", pa.table({"image": rows, "label": ["dog", "cat"] * 2}))
    adopted(tmp_path)
    assert_all_seen(tmp_path, range(4))


@pytest.mark.parametrize("channels", [3, 1])
@pytest.mark.parametrize("is_fixed", [True, False])
def test_bare_pixels_are_read_by_their_shape(is_fixed: bool, channels: Any, tmp_path: Path) -> None:
    size = HEIGHT * WIDTH * 3
    kind = pa.binary(size) if is_fixed else pa.binary()
    rows = pa.array([picture(number).tobytes() for number in range(10)], kind)
    put(tmp_path / "a.parquet", pa.table({"image": rows, "label": list(range(10))}), row_group_size=4)
    adopted(tmp_path, shape=f"{HEIGHT},{WIDTH},3", channels=channels)
    for number, (name, pixels) in enumerate(seen(tmp_path)):
        expected = picture(number)
        if channels == 1:
            expected = np.asarray(Image.fromarray(expected).convert("L"))[..., None]
        assert name == str(number)
        np.testing.assert_array_equal(pixels, expected)


def test_hugging_faces_images_are_read_with_their_class_names(tmp_path: Path) -> None:
    rows = pa.table(
        {
            "image": [{"bytes": encoded(picture(number)), "path": None} for number in range(8)],
            "label": pa.array([1 - number % 2 for number in range(8)], pa.int64()),
        }
    )
    features = {"label": {"names": ["cat", "dog", "eel"], "_type": "ClassLabel"}}
    rows = rows.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    put(tmp_path / "data" / "train-00000-of-00001.parquet", rows, row_group_size=3)
    put(tmp_path / "data" / "validation-00000-of-00001.parquet", rows.slice(0, 4))
    manifest = adopted(tmp_path)
    assert manifest.adopted is not None
    assert manifest.adopted.image == "image.bytes"
    assert manifest.classes == ("cat", "dog", "eel")
    assert {name: split.class_rows for name, split in manifest.splits.items()} == {"train": (4, 4, 0), "val": (2, 2, 0)}
    assert_all_seen(tmp_path, range(8))
    assert_all_seen(tmp_path, range(4), "val")


@pytest.mark.parametrize(
    "labels, settings, classes, numbers",
    [
        ([0, 1, 3], {}, ("0", "1", "2", "3"), [0, 1, 3]),
        ([0, 1, 2], {"classes": "ant,bee,cat,dog"}, ("ant", "bee", "cat", "dog"), [0, 1, 2]),
        ([5000, 12, 700], {}, ("12", "700", "5000"), [2, 0, 1]),
        ([True, False, True], {}, ("false", "true"), [1, 0, 1]),
        (["b", "a", "ü"], {}, ("a", "b", "ü"), [1, 0, 2]),
        (["b", "a", "b"], {"classes": "c,b,a"}, ("c", "b", "a"), [1, 2, 1]),
        (np.array([2, 0, 1], np.uint8), {}, ("0", "1", "2"), [2, 0, 1]),
        (np.array([2, 0, 1], np.int16), {}, ("0", "1", "2"), [2, 0, 1]),
    ],
)
def test_labels_are_numbers_of_classes(
    labels: Any, settings: dict[str, str], classes: tuple[str, ...], numbers: list[int], tmp_path: Path
) -> None:
    put(tmp_path / "a.parquet", table(range(3)).set_column(1, "label", pa.array(labels)))
    manifest = adopted(tmp_path, **settings)
    assert manifest.classes == classes
    assert ShardReader(f"file://{tmp_path}", manifest, "train").read(0).labels.tolist() == numbers
    assert sum(manifest.splits["train"].class_rows) == 3


def test_folders_of_partitions_are_labels(tmp_path: Path) -> None:
    for number, name in enumerate(("cat%20fish", "dog", "1")):
        rows = table(range(10 * number, 10 * number + 10)).select(["image"])
        put(tmp_path / f"year=2020/label={name}" / "part-0.parquet", rows)
    manifest = adopted(tmp_path)
    assert manifest.classes == ("1", "cat fish", "dog")
    assert [name for name, _ in seen(tmp_path)] == ["1"] * 10 + ["cat fish"] * 10 + ["dog"] * 10
    assert "no column 'label'" in refusal_with_null_partition(tmp_path / "other")


def refusal_with_null_partition(folder: Path) -> str:
    put(folder / "label=__HIVE_DEFAULT_PARTITION__" / "part-0.parquet", table(range(3)).select(["image"]))
    return refusal(folder)


def test_partitions_that_are_numbers_are_numbers_of_classes(tmp_path: Path) -> None:
    for number in range(11):
        put(tmp_path / f"label={number}" / "part-0.parquet", table(range(2)).select(["image"]))
    assert adopted(tmp_path).classes == tuple(str(number) for number in range(11))
    assert [name for name, _ in seen(tmp_path)] == [str(number) for number in (0, 1, 10, *range(2, 10)) for _ in "ab"]


def test_folders_name_the_splits(tmp_path: Path) -> None:
    for name, rows in (("train", range(20)), ("validation", range(20, 26)), ("test", range(26, 30))):
        put(tmp_path / name / "a.parquet", table(rows))
    manifest = adopted(tmp_path)
    assert {name: split.num_rows for name, split in manifest.splits.items()} == {"train": 20, "val": 6, "test": 4}
    assert_all_seen(tmp_path, range(20, 26), "val")


def test_whole_files_are_dealt_by_shares(tmp_path: Path) -> None:
    for number in range(20):
        put(tmp_path / "set" / f"{number:02d}.parquet", table(range(5 * number, 5 * number + 5)))
    manifest = adopted(tmp_path / "set", split="train=0.8,val=0.15,test=0.05")
    assert {name: split.num_rows for name, split in manifest.splits.items()} == {"train": 80, "val": 15, "test": 5}
    paths = [shard.path for split in manifest.splits.values() for shard in split.shards]
    assert len(set(paths)) == len(paths) == 20
    assert adopted(tmp_path / "set", split="train=0.8,val=0.15,test=0.05", replace=True) == manifest
    assert "whole files are dealt" in refusal_of_shares(tmp_path / "few")
    assert {
        name: split.num_rows
        for name, split in adopted(tmp_path / "set", split="validation", replace=True).splits.items()
    } == {"val": 100}


def refusal_of_shares(folder: Path) -> str:
    put(folder / "a.parquet", table(range(30)))
    return refusal(folder, split="train=0.8,val=0.2")


def test_empty_files_and_row_groups_hold_nothing_and_do_no_harm(tmp_path: Path) -> None:
    put(tmp_path / "a.parquet", table(range(0)))
    with pq.ParquetWriter(tmp_path / "b.parquet", table(range(0)).schema) as writer:
        for rows in (range(4), range(0), range(4, 9)):
            writer.write_table(table(rows))
    manifest = adopted(tmp_path)
    assert manifest.num_rows == 9
    assert_all_seen(tmp_path, range(9))


def test_only_the_columns_that_are_needed_are_read_by_the_loader(tmp_path: Path) -> None:
    rows = table(range(10), tail=[os.urandom(20_000) for _ in range(10)])
    put(tmp_path / "a.parquet", rows.select(["tail", "image", "label"]).append_column("more", rows["tail"]))
    (shard,) = adopted(tmp_path).splits["train"].shards
    assert shard.num_bytes > 400_000
    assert sum(shard.row_group_bytes) < sum(len(value.as_py()) for value in rows["image"]) + 4000
    assert shard.num_bytes - shard.footer_start < 5000


def test_other_readers_still_open_the_folder_and_no_file_was_changed(tmp_path: Path) -> None:
    put(tmp_path / "a.parquet", table(range(10)))
    put(tmp_path / "b.parquet", table(range(10, 20)))
    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in tmp_path.iterdir()}
    adopted(tmp_path)
    assert cli.main(["inspect", f"file://{tmp_path}", "--verify"]) == 0
    after = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in tmp_path.iterdir()}
    after.pop("_manifest.json")
    assert after == before
    assert pq.read_table(tmp_path).num_rows == 20
    assert pyarrow.dataset.dataset(tmp_path, format="parquet").count_rows() == 20
    assert len(pd.read_parquet(tmp_path)) == 20


def test_prepare_takes_an_adopted_folder_as_a_source(tmp_path: Path) -> None:
    put(tmp_path / "set" / "a.parquet", table(range(20)))
    adopted(tmp_path / "set")
    manifest = data_set(tmp_path / "set", f"file://{tmp_path}/prepared", image_size=32)
    assert (manifest.num_rows, manifest.classes, manifest.adopted) == (20, ("cat", "dog"), None)


def test_manifests_of_prepared_data_sets_say_nothing_of_adoption(tmp_path: Path) -> None:
    data_set(
        class_tree(tmp_path / "photos", {"ant": 8, "bee": 8}), f"file://{tmp_path}/set", image_size=32, split="train=1"
    )
    text = (tmp_path / "set" / "manifest.json").read_text()
    assert not [word for word in ("adopted", "row_group_starts", "footer_start", "shape") if f'"{word}"' in text]


# What may happen to files after their adoption.


@pytest.fixture
def set_of_two(tmp_path: Path) -> Path:
    """An adopted folder of two files with two row groups each."""
    for number in range(2):
        put(tmp_path / f"{number}.parquet", table(range(10 * number, 10 * number + 10)), row_group_size=5)
    adopted(tmp_path)
    return tmp_path


def flip(path: Path, place: int) -> None:
    """Flips a bit."""
    data = bytearray(path.read_bytes())
    data[place] ^= 4
    path.write_bytes(data)


def test_every_flipped_byte_that_is_read_is_found_before_anything_is_delivered(set_of_two: Path) -> None:
    path = set_of_two / "1.parquet"
    shard = read_manifest(f"file://{set_of_two}").splits["train"].shards[1]
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    ranges = [
        *zip(shard.row_group_starts, shard.row_group_bytes, strict=True),
        (shard.footer_start, shard.num_bytes - shard.footer_start),
    ]
    for start, num_bytes in ranges:
        for place in rng.integers(start, start + num_bytes, 40):
            flip(path, int(place))
            with pytest.raises(DataError, match=r"1\.parquet.*differs from its checksum"):
                seen(set_of_two)
            path.write_bytes(whole)
    assert_all_seen(set_of_two, range(20))


@pytest.mark.parametrize(
    "harm, message",
    [
        (lambda path: path.unlink(), "does not exist"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "holds .* bytes; expected"),
        (
            lambda path: path.write_bytes((path.parent / "0.parquet").read_bytes()),
            r"holds .* bytes|differs from its checksum",
        ),
        (lambda path: put(path, table(range(100, 110)), row_group_size=5), r"holds .* bytes|differs from its checksum"),
    ],
)
def test_a_file_that_is_gone_or_another_is_named(harm: Callable[[Path], None], message: str, set_of_two: Path) -> None:
    harm(set_of_two / "1.parquet")
    with pytest.raises(DataError, match=rf"1\.parquet.*({message})"):
        seen(set_of_two)


def test_inspect_proves_an_adopted_data_set_and_finds_what_the_loader_never_reads(
    set_of_two: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = table(range(10), other=[os.urandom(500) for _ in range(10)]).select(["other", "image", "label"])
    put(set_of_two / "2.parquet", rows, compression="none", use_dictionary=False)
    url = f"file://{set_of_two}"
    assert cli.main(["inspect", url, "--verify"]) == 0
    out = capsys.readouterr().out
    assert "proven" in out
    assert "1 that came after the adoption" in out
    adopted(set_of_two, replace=True)
    assert cli.main(["inspect", url, "--verify", "--grid", str(set_of_two.parent / "grid.png")]) == 0
    out = capsys.readouterr().out
    assert "30 samples in 3 shards" in out
    assert "10 photos are there more than once in a class of a split" in out

    flip(set_of_two / "2.parquet", 1000)  # in a column that training does not read
    assert len(seen(set_of_two)) == 30
    assert cli.main(["inspect", url, "--verify"]) == DataError.exit_code
    assert "2.parquet: the file differs from its sha256; expected what was adopted" in capsys.readouterr().err
    flip(set_of_two / "2.parquet", 1000)
    shard = read_manifest(url).splits["train"].shards[1]
    flip(set_of_two / shard.path, shard.row_group_starts[1] + 9)
    assert cli.main(["inspect", url, "--verify"]) == DataError.exit_code
    assert (
        "1.parquet, row group 1: it differs from its checksum; expected what was adopted; restore it or adopt"
        in capsys.readouterr().err
    )


def test_an_image_that_only_looks_whole_is_found_by_inspect_and_named_by_the_loader(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [encoded(picture(number), ".jpg") for number in range(5)]
    rows[3] = rows[3][:-20]
    put(tmp_path / "a.parquet", pa.table({"image": rows, "label": list("abcde")}))
    manifest = adopted(tmp_path)
    assert cli.main(["inspect", f"file://{tmp_path}", "--verify"]) == DataError.exit_code
    assert "a.parquet, row group 0, row 3: the image cannot be decoded" in capsys.readouterr().err
    for seed in (None, 4):
        loader = Loader(f"file://{tmp_path}", manifest, "train", world=World(0, 1, 0, 1), global_batch=5, seed=seed)
        with pytest.raises(DataError, match=r"a\.parquet, row group 0, row 3"):
            list(loader.batches())


# What is no data set to adopt.


def replaced(column: str, values: Any) -> pa.Table:
    """A table with other values in a column."""
    rows = table(range(4))
    return rows.set_column(rows.column_names.index(column), column, pa.array(values))


PNG = encoded(picture(0))
BAD: dict[str, tuple[pa.Table, dict[str, Any], tuple[str, ...]]] = {
    "no image column": (
        table(range(4)),
        {"image": "imgae"},
        ("no column 'imgae'", "image (binary), label (string)", "--image image"),
    ),
    "no label column": (table(range(4)), {"label": "klass"}, ("no column 'klass'", "--label label")),
    "image is text": (
        table(range(4)),
        {"image": "label"},
        ("in column 'label' string", "expected a column of image bytes"),
    ),
    "image is a list": (
        replaced("image", [[1, 2]] * 4),
        {},
        ("in column 'image' list", "expected a column of image bytes"),
    ),
    "label is a list": (replaced("label", [[1]] * 4), {}, ("in column 'label' list", "names or whole numbers")),
    "label is a fraction": (replaced("label", [0.5] * 4), {}, ("in column 'label' double",)),
    "label is bytes": (replaced("label", [b"a"] * 4), {}, ("in column 'label' binary",)),
    "null labels": (
        replaced("label", ["a", None, "", "b"]),
        {},
        ("2 of 4 rows", "row group 0, row 1: the label is None", "row 2: the label is ''"),
    ),
    "null images": (
        replaced("image", [PNG, PNG, None, PNG]),
        {},
        ("1 of 4 rows", "a.parquet, row group 0, row 2: no image"),
    ),
    "negative labels": (replaced("label", [0, 1, -1, 1]), {}, ("row 2: the label is -1",)),
    "empty image": (replaced("image", [PNG, b"", PNG, PNG]), {}, ("row 1: the file holds no bytes",)),
    "not an image": (
        replaced("image", [PNG, PNG, b"GET / HTTP/1.1", PNG]),
        {},
        ("row 2: starts with b'GET / HT'", "jobs/prepare.py"),
    ),
    "an array of floats": (
        replaced("image", [npy(np.zeros((4, 4, 3), np.float32))] * 4),
        {},
        ("4 of 4 rows", "a .npy file of float32 (4, 4, 3)"),
    ),
    "an array of five dimensions": (
        replaced("image", [npy(np.zeros((1, 4, 4, 3), np.uint8))] * 4),
        {},
        ("uint8 (1, 4, 4, 3)",),
    ),
    "pixels of another size": (
        replaced("image", [bytes(12), bytes(12), bytes(13), bytes(12)]),
        {"shape": "2,2,3"},
        ("row 2: 13 bytes; expected 2 x 2 x 3 = 12",),
    ),
    "label above the classes": (replaced("label", [0, 1, 2, 3]), {"classes": "a,b"}, ("label 3 is none of 2 classes",)),
    "name of no class": (table(range(4)), {"classes": "cat,cow"}, ("the label 'dog' is none of the classes cat, cow",)),
    "no rows": (table(range(0)), {}, ("holds no rows",)),
    "no types": (replaced("image", [None] * 4), {}, ("in column 'image' null",)),
    "a column twice": (
        pa.Table.from_arrays([table(range(4))["image"]] * 2 + [table(range(4))["label"]], ["image", "image", "label"]),
        {},
        ("the column 'image' 2 times",),
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_adopted_is_refused_with_the_reason(case: str, tmp_path: Path) -> None:
    rows, settings, texts = BAD[case]
    put(tmp_path / "a.parquet", rows)
    message = refusal(tmp_path, **settings)
    assert "; expected " in message
    assert [text for text in texts if text not in message] == [], message


def test_at_most_ten_bad_rows_are_named_and_all_are_counted(tmp_path: Path) -> None:
    for name in "ab":
        put(tmp_path / f"{name}.parquet", pa.table({"image": [b"junk"] * 30, "label": [0] * 30}), row_group_size=4)
    message = refusal(tmp_path)
    assert "60 of 60 rows cannot be used" in message
    assert message.count("starts with") == 10
    assert message.count("; ...; expected") == 1


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"PAR1",
        b"x" * 1000,
        b"PAR1" + b"\0" * 100 + b"\xff\xff\xff\x7fPAR1",
        b"PAR1" + b"\x17" * 92 + b"\x40\0\0\0PAR1",
    ],
)
def test_files_that_are_no_parquet_are_named(data: bytes, tmp_path: Path) -> None:
    put(tmp_path / "a.parquet", table(range(4)))
    (tmp_path / "b.parquet").write_bytes(data)
    message = refusal(tmp_path)
    assert message.startswith(f"file://{tmp_path}/b.parquet cannot be read")
    assert "expected a whole Parquet file" in message


def test_a_file_damaged_inside_is_named(tmp_path: Path) -> None:
    put(tmp_path / "a.parquet", table(range(40)), compression="snappy")
    data = bytearray((tmp_path / "a.parquet").read_bytes())
    data[4:200] = bytes(196)
    (tmp_path / "a.parquet").write_bytes(data)
    assert refusal(tmp_path).startswith(f"file://{tmp_path}/a.parquet")


def test_files_that_are_not_alike_are_refused(tmp_path: Path) -> None:
    put(tmp_path / "a.parquet", table(range(4)))
    put(tmp_path / "b.parquet", replaced("label", [0, 1, 0, 1]))
    assert "b.parquet keeps its images or labels in another way than a.parquet" in refusal(tmp_path)
    put(tmp_path / "b.parquet", table(range(4)).drop_columns(["label"]))
    assert "b.parquet has no column 'label'" in refusal(tmp_path)


def test_folders_that_cannot_be_adopted_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    with pytest.raises(CvdistError, match=r"set: not found"):
        adopted(folder)
    folder.mkdir()
    (folder / "_SUCCESS").touch()
    (folder / ".hidden.parquet").write_bytes(b"x")
    assert "holds no files named *.parquet" in refusal(folder)
    put(folder / "train" / "a.parquet", table(range(4)))
    assert "is a file; expected the folder" in refusal_of_a_file(folder / "train" / "a.parquet")
    put(folder / "b.parquet", table(range(4)))
    assert "b.parquet says no split, but train/a.parquet does" in refusal(folder)
    adopted(folder, split="train")
    with pytest.raises(DataError, match=r"is a data set already: it holds _manifest\.json"):
        adopted(folder, split="train")
    (folder / "_manifest.json").rename(folder / "manifest.json")
    with pytest.raises(DataError, match=r"is a data set already: it holds manifest\.json"):
        adopted(folder, split="train", replace=True)


def refusal_of_a_file(path: Path) -> str:
    with pytest.raises(DataError) as caught:
        adopted(path)
    return str(caught.value)


@pytest.mark.parametrize(
    "settings, text",
    [
        ({"split": "dev"}, "split: 'dev' is no split"),
        ({"split": "train=0.5"}, "split: 'train=0.5' is not a list of shares"),
        ({"classes": "a,,b"}, "classes: 'a,,b' is no list"),
        ({"classes": "a,a"}, "classes: 'a,a' is no list"),
        ({"shape": "32,32"}, "shape: '32,32' is no shape"),
        ({"shape": "32,32,4"}, "shape: '32,32,4' is no shape"),
        ({"shape": "0,32,3"}, "shape: '0,32,3' is no shape"),
        ({"image_size": 4}, "image_size: 4 is out of range"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        AdoptConfig(url="file:///x", image="image", label="label", **settings)
    assert text in str(caught.value)


# What is not executed.


class Bomb:
    """An object whose pickle makes a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_a_malicious_schema_of_petastorm_is_not_executed(tmp_path: Path) -> None:
    folder, trap = tmp_path / "set", tmp_path / "trap"
    put(folder / "a.parquet", table(range(12)))
    pickled = pickle.dumps(Bomb(trap))
    schema = table(range(1)).schema.with_metadata({b"dataset-toolkit.unischema.v1": pickled})
    pq.write_metadata(schema, folder / "_common_metadata")
    # The same in the metadata of a file, and as a type that pyarrow once unpickled (CVE-2023-47248).
    put(folder / "b.parquet", table(range(12, 24)).replace_schema_metadata(schema.metadata))
    adopted(folder)
    assert_all_seen(folder, range(24))
    assert cli.main(["inspect", f"file://{folder}", "--verify"]) == 0
    assert not trap.exists()
    pickle.loads(pickled)
    assert trap.exists()  # the trap works


def test_a_malicious_type_of_a_column_is_not_executed(tmp_path: Path) -> None:
    folder, trap = tmp_path / "set", tmp_path / "trap"
    field = pa.field(
        "extra", pa.int64(), metadata={
            "ARROW:extension:name": "arrow.py_extension_type",
            "ARROW:extension:metadata": pickle.dumps(Bomb(trap)),
        },
    )  # fmt: skip
    rows = table(range(12), extra=list(range(12)))
    put(folder / "a.parquet", rows.cast(rows.schema.set(2, field)))
    stored = pq.read_metadata(folder / "a.parquet").metadata[b"ARROW:schema"]
    assert b"arrow.py_extension_type" in base64.b64decode(stored)
    adopted(folder)
    assert_all_seen(folder, range(12))
    assert not trap.exists()


def test_an_array_of_objects_is_not_executed(tmp_path: Path) -> None:
    folder, trap = tmp_path / "set", tmp_path / "trap"
    array = np.empty((4, 4, 3), object)
    array[:] = Bomb(trap)
    rows = [npy(array, lambda stream, value: np.save(stream, value, allow_pickle=True)), npy(array, np.savez)]
    put(folder / "a.parquet", pa.table({"image": rows, "label": [0, 1]}))
    message = refusal(folder)
    assert "2 of 2 rows" in message
    assert "a .npy file of object (4, 4, 3)" in message
    for data in rows:
        with pytest.raises(ValueError, match="object"):
            decode_stored(data, ANY)
    assert not trap.exists()


def png_of(height: int, width: int) -> bytes:
    """A PNG whose header, with the right checksum, says another size than its pixels have."""
    header = b"IHDR" + struct.pack(">II", width, height) + PNG[24:29]
    return PNG[:12] + header + struct.pack(">I", zlib.crc32(header)) + PNG[33:]


def test_bombs_are_refused_before_they_are_decoded(tmp_path: Path) -> None:
    zeros = npy(np.zeros((9000, 9000), np.uint8), np.savez_compressed)
    assert len(zeros) < 200_000
    rows = [png_of(30_000, 30_000), zeros, npy(np.zeros((1, 60), np.uint8))]
    put(tmp_path / "a.parquet", pa.table({"image": rows, "label": [0, 1, 2]}))
    message = refusal(tmp_path)
    assert "3 of 3 rows" in message
    assert "30000 x 30000 pixels; expected at most" in message
    assert "a .npz file of 1 members; expected one array of at most" in message
    assert "expected sides within" in message
    for data in rows:
        with pytest.raises(ValueError, match="expected"):
            decode_stored(data, ANY)


def test_cut_and_flipped_images_of_every_format_end_as_valueerror_or_as_pixels() -> None:
    rng = np.random.default_rng(3)
    refused = 0
    for data in (*FILES.values(), npy(picture(0), np.savez_compressed)):
        for _ in range(12):
            broken = bytearray(data[: rng.integers(1, len(data) + 1)])
            for place in rng.integers(0, len(broken), 2):
                broken[place] ^= 1 << rng.integers(0, 8)
            try:
                assert decode_stored(bytes(broken), ANY).shape[2] == 3
            except ValueError:
                refused += 1
    assert refused > 100
