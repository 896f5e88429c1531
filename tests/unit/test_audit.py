"""The audit: a data set is proven only if every byte, row, label, pixel and key is what the manifest says, and every fault is named."""

from __future__ import annotations

import collections
import dataclasses
import io
import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import simplejpeg
from PIL import Image

from cvdist import audit, cli, proof, repeats, shards
from cvdist.errors import ConfigError, DataError
from cvdist.images import ImageSpec, encode
from cvdist.proof import Audit
from cvdist.shards import Manifest, Row, ShardWriter, Split
from tests.made_data import class_tree, data_set

CLASSES = {"cat": 80, "dog": 60, "fox": 60}
FIRST = "train/shard-00000.parquet"
SPEC = ImageSpec(16, "exact", 3, "jpeg", 90)


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of 200 photos in several shards of several row groups; tests leave it as it is."""
    folder = tmp_path_factory.mktemp("clean")
    data_set(
        class_tree(folder / "photos", CLASSES),
        f"file://{folder}/set",
        image_size=40,
        shard_bytes=1 << 16,
        row_group_bytes=1 << 14,
    )
    return folder / "set"


@pytest.fixture
def copy(clean: Path, tmp_path: Path) -> Path:
    """A copy of that data set to break."""
    shutil.copytree(clean, tmp_path / "set")
    return tmp_path / "set"


def audited(folder: Path, manifest: Manifest | None = None) -> Audit:
    """Audits a data set in this process."""
    url = f"file://{folder}"
    return proof.audit_here(url, manifest or shards.read_manifest(url))


def found(result: Audit) -> list[str]:
    """Returns the problems in words."""
    assert result.num_problems == len(result.problems)
    return [f"{problem.where}: {problem.found}; expected {problem.expected}" for problem in result.problems]


def part_of(shard: shards.Shard, offset: int) -> str:
    """Returns the part of a shard that a byte belongs to, as messages name it."""
    if offset < 4:
        return f"{shard.path}, first bytes"
    for index, start in enumerate(shards.row_group_offsets(shard)):
        if start <= offset < start + shard.row_group_bytes[index]:
            return f"{shard.path}, row group {index}"
    return f"{shard.path}, footer"


def test_every_one_of_1000_flipped_bytes_is_detected_and_its_place_named(copy: Path) -> None:
    manifest = shards.read_manifest(f"file://{copy}")
    scope, tasks = proof.plan(f"file://{copy}", manifest)
    assert len(tasks) >= 4
    assert max(len(task.shard.row_group_rows) for task in tasks) >= 3
    rng = np.random.default_rng(3)
    ends = np.cumsum([task.shard.num_bytes for task in tasks])
    places = [int(place) for place in rng.choice(ends[-1], 1000, replace=False)]
    # Both magics of every file, whole, take the place of some.
    edges = [int(end) - task.shard.num_bytes + byte for end, task in zip(ends, tasks, strict=True) for byte in range(4)]
    edges += [int(end) - byte for end in ends for byte in range(1, 5)]
    places[: len(edges)] = edges
    detected = collections.Counter[str]()
    for place in places:
        task = tasks[int(np.searchsorted(ends, place, side="right"))]
        offset = place - (int(ends[task.number]) - task.shard.num_bytes)
        with (copy / task.shard.path).open("r+b") as file:
            file.seek(offset)
            (byte,) = file.read(1)
            file.seek(offset)
            file.write(bytes([byte ^ int(rng.integers(1, 256))]))
        result, _ = audit.audit_shard(scope, task)
        with (copy / task.shard.path).open("r+b") as file:
            file.seek(offset)
            file.write(bytes([byte]))
        assert result.num_problems, f"byte {offset} of {task.shard.path}"
        assert all(problem.where.startswith(part_of(task.shard, offset)) for problem in result.problems)
        detected[part_of(task.shard, offset).split(", ")[1].split(" ")[0]] += 1
    assert detected.total() == 1000
    assert set(detected) == {"first", "row", "footer"}
    assert audited(copy).num_problems == 0


def test_a_flipped_pixel_byte_names_its_row(copy: Path) -> None:
    manifest = shards.read_manifest(f"file://{copy}")
    shard = manifest.splits["train"].shards[1]
    rows = pq.ParquetFile(copy / shard.path).read_row_group(1, columns=["image"])["image"].to_pylist()
    data = (copy / shard.path).read_bytes()
    place = data.index(rows[5]) + len(rows[5]) // 2
    (copy / shard.path).write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
    assert found(audited(copy)) == [
        f"{shard.path}, row group 1, row 5: the image differs from its checksum; expected what prepare wrote"
    ]


@pytest.mark.parametrize(
    "settings",
    [{}, {"channels": 1}, {"codec": "raw"}, {"codec": "raw", "channels": 1, "resize": "exact"}, {"resize": "exact"}],
    ids=str,
)
def test_a_data_set_that_prepare_wrote_is_proven(settings: dict[str, object], tmp_path: Path) -> None:
    class_tree(tmp_path / "photos", {"cat": 20, "dog": 12}, height=90, width=50)
    (tmp_path / "photos" / "cat" / "bad.jpg").write_text("no photo")
    url = f"file://{tmp_path}/set"
    manifest = data_set(tmp_path / "photos", url, image_size=24, max_bad_fraction=0.1, **settings)
    result = audited(tmp_path / "set")
    assert found(result) == []
    assert result.unread_files == ()
    assert {kind: repeats.num_photos for kind, repeats in result.repeats.items()} == {
        "duplicates": 0,
        "leaks": 0,
        "conflicts": 0,
    }
    assert result.pixels.num_pixels == sum(
        row["height"] * row["width"]
        for shard in manifest.splits["train"].shards
        for row in pq.read_table(tmp_path / "set" / shard.path, columns=["height", "width"]).to_pylist()
    )
    proof.require_proven(url, result, strict=True)


def test_channel_mean_and_std_are_those_of_all_pixels_of_train(clean: Path) -> None:
    manifest = shards.read_manifest(f"file://{clean}")
    images = [
        simplejpeg.decode_jpeg(image).reshape(-1, 3)
        for shard in manifest.splits["train"].shards
        for image in pq.read_table(clean / shard.path, columns=["image"])["image"].to_pylist()
    ]
    pixels = np.concatenate(images) / 255
    result = audited(clean)
    np.testing.assert_allclose(result.pixels.mean(), pixels.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(result.pixels.std(), pixels.std(axis=0), rtol=1e-12)


def test_pixel_sums_are_exact_where_float32_counts_are_not() -> None:
    pixels = np.full((4111, 4099, 1), 255, np.uint8)
    assert pixels.size > 1 << 24
    pixels[0, :2] = 254
    n = pixels.size - 2
    assert int(np.float32(n)) != n
    assert audit.pixel_sums(pixels) == audit.PixelSums(n + 2, (255 * n + 2 * 254,), (255**2 * n + 2 * 254**2,))


@pytest.mark.parametrize("num_buckets", [1, 3, 50])
def test_the_result_depends_neither_on_the_order_of_tasks_nor_on_the_number_of_buckets(
    num_buckets: int, tmp_path: Path
) -> None:
    photos = class_tree(tmp_path / "photos", {"cat": 60, "dog": 60})
    for index in range(40):
        shutil.copy(photos / "cat" / f"{index:03d}.jpg", photos / ("cat" if index % 2 else "dog") / f"again{index}.jpg")
    url = f"file://{tmp_path}/set"
    manifest = data_set(photos, url, image_size=32, shard_bytes=1 << 16, row_group_bytes=1 << 14)
    expected = proof.audit_bytes(audited(tmp_path / "set"))
    assert json.loads(expected)["repeats"]["conflicts"]["num_photos"] == 20
    scope, tasks = proof.plan(url, manifest)
    scope = dataclasses.replace(scope, num_buckets=num_buckets)
    for seed in range(3):
        shuffle = random.Random(seed).shuffle
        shuffle(tasks)
        parts = [part for task in tasks for part in proof.shard_parts(scope, task)]
        shuffle(parts)
        grouped = collections.defaultdict(list)
        for number, part in parts:
            grouped[number].append(part)
        results = [result for item in grouped.items() for result in proof.join_parts(item)]
        shuffle(results)
        assert proof.audit_bytes(proof.conclude(url, manifest, results)) == expected


def test_an_audit_that_lacks_a_shard_is_no_audit(clean: Path) -> None:
    url = f"file://{clean}"
    manifest = shards.read_manifest(url)
    scope, tasks = proof.plan(url, manifest)
    results = [audit.audit_shard(scope, task)[0] for task in tasks]
    for wrong in (results[1:], [*results, results[0]]):
        with pytest.raises(DataError, match=f"{len(wrong)} shards were audited; expected {len(tasks)}, each once"):
            proof.conclude(url, manifest, wrong)


BREAKS: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (Path.unlink, "the file does not exist; expected the shard that the manifest names"),
    "cut": (lambda path: path.write_bytes(path.read_bytes()[:-9]), "bytes; expected "),
    "longer": (lambda path: path.write_bytes(path.read_bytes() + b"x"), "bytes; expected "),
    "empty": (lambda path: path.write_bytes(b""), "the file holds 0 bytes; expected "),
    "zeros": (lambda path: path.write_bytes(bytes(path.stat().st_size)), "differs from its checksum"),
}


@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_shard_is_named_and_the_others_are_audited_all_the_same(name: str, copy: Path) -> None:
    path = shards.read_manifest(f"file://{copy}").splits["train"].shards[1].path
    function, message = BREAKS[name]
    function(copy / path)
    result = audited(copy)
    assert result.num_problems
    assert {problem.where.split(",")[0] for problem in result.problems} == {path}
    assert any(message in line for line in proof.report_lines(result))
    with pytest.raises(DataError, match=rf"{path}.*; expected .*; restore it or prepare again \(problem 1 of"):
        proof.require_proven(f"file://{copy}", result, strict=False)
    assert not json.loads(proof.audit_bytes(result))["proven"]


def test_two_shards_that_changed_places_are_both_named(tmp_path: Path) -> None:
    rows = [Row(f"{index}", 0, picture(index), 16, 16, f"{index:064x}") for index in range(40)]
    manifest = written(tmp_path, {"train": [rows[:20], rows[20:]]})
    one, two = (tmp_path / shard.path for shard in manifest.splits["train"].shards)
    data = one.read_bytes(), two.read_bytes()
    one.write_bytes(data[1])
    two.write_bytes(data[0])
    named = {problem.where.split(",")[0] for problem in audited(tmp_path, manifest).problems}
    assert named == {"train/shard-00000.parquet", "train/shard-00001.parquet"}


def test_files_beside_the_shards_are_a_warning(copy: Path) -> None:
    (copy / "val" / "shard-09999.parquet").write_bytes(b"nobody reads this")
    (copy / "train" / ".shard-00000.parquet.tmp").write_bytes(b"")
    result = audited(copy)
    assert found(result) == []
    assert result.unread_files == ("train/.shard-00000.parquet.tmp", "val/shard-09999.parquet")
    assert any("val/shard-09999.parquet" in line for line in proof.report_lines(result))


def picture(seed: int, *, side: int = 16, channels: int = 3) -> bytes:
    """Returns a stored JPEG of its own."""
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, channels), dtype=np.uint8)
    return encode(pixels, dataclasses.replace(SPEC, channels=channels))  # type: ignore[arg-type]


def written(folder: Path, splits: dict[str, list[list[Row]]], num_classes: int = 2) -> Manifest:
    """Writes a data set of given rows, whatever they are, whose checksums all fit."""
    entries = {}
    for name, parts in splits.items():
        entries[name] = []
        for index, rows in enumerate(parts):
            stream = io.BytesIO()
            writer = ShardWriter(stream, 1 << 14)
            for row in rows:
                writer.add(row)
            entries[name].append(writer.close(f"{name}/shard-{index:05d}.parquet"))
            (folder / name).mkdir(parents=True, exist_ok=True)
            (folder / entries[name][-1].path).write_bytes(stream.getvalue())
    manifest = Manifest(
        classes=tuple(f"class{label}" for label in range(num_classes)),
        image=SPEC,
        splits={
            name: Split(
                tuple(entries[name]),
                tuple(sum(row.label == label for rows in parts for row in rows) for label in range(num_classes)),
            )
            for name, parts in splits.items()
        },
        num_inputs=sum(len(rows) for parts in splits.values() for rows in parts),
        num_quarantined=0,
        num_skipped=0,
        digest="",
        settings={},
    )
    shards.write_manifest(f"file://{folder}", manifest)
    return manifest


GOOD = Row("a", 0, picture(1000), 16, 16, "a" * 64)
WRONG_ROWS = {
    "no image": (dataclasses.replace(GOOD, image=b"no image"), "the image cannot be decoded (ValueError: "),
    "cut image": (dataclasses.replace(GOOD, image=GOOD.image[: len(GOOD.image) // 2]), "the image cannot be decoded ("),
    "height": (
        dataclasses.replace(GOOD, height=17),
        "height, width and channels of the image are (16, 16, 3); expected (17, 16, 3)",
    ),
    "grey": (
        dataclasses.replace(GOOD, image=picture(0, channels=1)),
        "height, width and channels of the image are (16, 16, 1); expected (16, 16, 3)",
    ),
    "size": (
        dataclasses.replace(GOOD, image=picture(0, side=24), height=24, width=24),
        "the image is 24 x 24 pixels; expected both sides 16",
    ),
    "label": (dataclasses.replace(GOOD, label=2), "label 2; expected 0 to 1"),
    "negative label": (dataclasses.replace(GOOD, label=-1), "label -1; expected 0 to 1"),
}


@pytest.mark.parametrize("name", WRONG_ROWS)
def test_a_wrong_row_is_named_even_if_all_checksums_fit(name: str, tmp_path: Path) -> None:
    wrong, message = WRONG_ROWS[name]
    rows = [Row(f"{index}", index % 2, picture(index), 16, 16, f"{index:064x}") for index in range(50)]
    manifest = written(tmp_path, {"train": [[*rows[:30], wrong, *rows[30:]]]})
    group = int(np.searchsorted(np.cumsum(manifest.splits["train"].shards[0].row_group_rows), 30, side="right"))
    assert group > 0
    split = dataclasses.replace(manifest.splits["train"], class_rows=(26, 25))
    problems = found(audited(tmp_path, dataclasses.replace(manifest, splits={"train": split})))
    assert len(problems) == 1
    first_row = sum(manifest.splits["train"].shards[0].row_group_rows[:group])
    assert problems[0].startswith(f"train/shard-00000.parquet, row group {group}, row {30 - first_row}: {message}")


def test_a_shard_of_other_columns_is_named_even_if_all_checksums_fit(tmp_path: Path) -> None:
    rows = [Row(f"{index}", 0, picture(index), 16, 16, f"{index:064x}") for index in range(20)]
    manifest = written(tmp_path, {"train": [rows]})
    stream = shards.HashingStream(io.BytesIO())
    table = pq.read_table(tmp_path / FIRST)
    label = table.schema.get_field_index("label")
    table = table.set_column(label, "label", table["label"].cast(pa.int64()))
    writer = pq.ParquetWriter(pa.PythonFile(stream, mode="w"), table.schema)
    stream.cut()
    writer.write_table(table)
    num_bytes, checksum = stream.cut()
    writer.close()
    footer_xxh3 = stream.cut()[1]
    (tmp_path / FIRST).write_bytes(stream._stream.getvalue())  # type: ignore[attr-defined]
    other = with_first_shard(
        manifest,
        num_bytes=stream.num_bytes,
        sha256=stream.sha256.hexdigest(),
        row_group_rows=(20,),
        row_group_bytes=(num_bytes,),
        row_group_xxh3=(checksum,),
        footer_xxh3=footer_xxh3,
    )
    (problem,) = found(audited(tmp_path, other))
    assert problem.startswith(f"{FIRST}, footer: the columns are key string, label int64 or null, image binary,")
    assert "expected key string, label int32, image binary" in problem


def test_a_key_in_two_splits_is_a_problem_that_names_both_rows(tmp_path: Path) -> None:
    rows = [Row(f"{index}", 0, picture(index), 16, 16, f"{index:064x}") for index in range(40)]
    again = dataclasses.replace(rows[25], source_sha256="f" * 64)
    manifest = written(tmp_path, {"train": [rows], "val": [[GOOD, again]]})
    ends = np.cumsum(manifest.splits["train"].shards[0].row_group_rows)
    group = int(np.searchsorted(ends, 25, side="right"))
    row = 25 - int(ends[group - 1])
    (problem,) = found(audited(tmp_path))
    assert problem == (
        f"train/shard-00000.parquet, row group {group}, row {row}: key '25', which"
        " val/shard-00000.parquet, row group 0, row 1 has too; expected every key once in the data set"
    )


def test_photos_that_repeat_are_counted_by_what_they_spoil(tmp_path: Path) -> None:
    for seed, split in enumerate(("train", "val", "test")):
        class_tree(tmp_path / "photos" / split, {"cat": 10, "dog": 10}, seed=seed)
    photos = tmp_path / "photos"
    for source, target in {
        "train/cat/000.jpg": "train/cat/same.jpg",
        "train/cat/001.jpg": "val/cat/leak.jpg",
        "val/dog/002.jpg": "test/dog/leak.jpg",
        "train/dog/003.jpg": "train/cat/conflict.jpg",
    }.items():
        shutil.copy(photos / source, photos / target)
    for target in ("val/dog/all.jpg", "train/cat/all.jpg", "train/cat/all2.jpg", "test/cat/all.jpg"):
        shutil.copy(photos / "train/dog/009.jpg", photos / target)
    url = f"file://{tmp_path}/set"
    data_set(photos, url, image_size=32)
    result = audited(tmp_path / "set")
    assert found(result) == []
    body = json.loads(proof.audit_bytes(result))["repeats"]
    assert {kind: (found["num_photos"], found["num_samples"]) for kind, found in body.items()} == {
        "duplicates": (2, 4),
        "leaks": (3, 9),
        "conflicts": (2, 7),
    }
    assert [[row["key"] for row in rows] for rows in body["duplicates"]["first"]] == [
        ["train/cat/000.jpg", "train/cat/same.jpg"],
        ["train/cat/all.jpg", "train/cat/all2.jpg"],
    ]
    assert [[row["key"] for row in rows] for rows in body["leaks"]["first"]] == [
        ["train/cat/001.jpg", "val/cat/leak.jpg"],
        ["train/cat/all.jpg", "val/dog/all.jpg", "test/cat/all.jpg"],
        ["val/dog/002.jpg", "test/dog/leak.jpg"],
    ]
    assert body["conflicts"]["first"][1] == [
        {"key": "train/cat/conflict.jpg", "split": "train", "class": "cat"},
        {"key": "train/dog/003.jpg", "split": "train", "class": "dog"},
    ]
    proof.require_proven(url, result, strict=False)
    with pytest.raises(
        DataError,
        match=r"3 photos are in more than one split and 2 in more than one class, first train/cat/001.jpg \(train",
    ):
        proof.require_proven(url, result, strict=True)


def test_repeats_are_those_of_a_plain_count_whatever_the_buckets() -> None:
    rng = np.random.default_rng(5)
    for num_buckets in (1, 4, 16):
        size = 400
        rows = pa.table(
            [
                [f"key{number}" for number in rng.integers(0, 300, size)],
                [f"source{number}" for number in rng.integers(0, 250, size)],
                rng.integers(0, 3, size),
                rng.integers(0, 4, size),
                np.zeros(size, int),
                np.arange(size),
            ],
            schema=repeats.ROWS,
        )
        keys, sources = collections.Counter(rows["key"].to_pylist()), collections.defaultdict(list)
        for row in rows.to_pylist():
            sources[row["source_sha256"]].append((row["split"], row["label"]))
        expected = {
            "keys": sum(count > 1 for count in keys.values()),
            "leaks": sum(len({split for split, _ in found}) > 1 for found in sources.values()),
            "conflicts": sum(len({label for _, label in found}) > 1 for found in sources.values()),
            "duplicates": sum(len(set(found)) < len(found) for found in sources.values()),
        }
        buckets = collections.defaultdict(list)
        for part in (rows[:150], rows[150:]):
            for number, data in repeats.deal(part, num_buckets):
                buckets[number].append(data)
        counted = collections.Counter[str]()
        for parts in buckets.values():
            for result in repeats.find_repeats(parts):
                counted[result.kind] += result.num_photos
        assert dict(counted) == expected
        assert min(expected.values()) > 10


MANIFESTS: dict[str, tuple[Callable[[Manifest], Manifest], str]] = {
    "inputs": (
        lambda manifest: dataclasses.replace(manifest, num_inputs=201),
        "manifest.json: rows + quarantined + skipped are 200; expected 201 inputs",
    ),
    "quarantine": (
        lambda manifest: dataclasses.replace(manifest, num_inputs=201, num_quarantined=1),
        "manifest.json: 1 inputs are quarantined; expected 0, as in the tables it names",
    ),
    "labels": (lambda manifest: with_classes(manifest, (63, 49, 48)), "train: 64 samples have label 0; expected 63"),
    "sum": (
        lambda manifest: with_classes(manifest, (65, 48, 48)),
        "manifest.json: the classes of train have 161 samples, 3 classes; expected 160 samples, 3 classes",
    ),
    "sha256": (
        lambda manifest: with_first_shard(manifest, sha256="0" * 64),
        f"{FIRST}: the file differs from its sha256; expected what prepare wrote",
    ),
    "row groups": (
        lambda manifest: with_first_shard(manifest, row_group_rows=(1,)),
        f"{FIRST}: its row groups do not add up in the manifest; expected the rows and bytes of the shard",
    ),
    "twice": (
        lambda manifest: with_first_shard(manifest, path="train/shard-00001.parquet"),
        "manifest.json: train/shard-00001.parquet is named 2 times; expected each shard once",
    ),
    "another folder": (
        lambda manifest: with_first_shard(manifest, path="val/shard-00000.parquet"),
        "manifest.json: val/shard-00000.parquet is a shard of train; expected shards in the folder train",
    ),
}


def with_first_shard(manifest: Manifest, **changes: object) -> Manifest:
    """Returns a manifest that says something else of the first shard of train."""
    train = manifest.splits["train"]
    first = dataclasses.replace(train.shards[0], **changes)  # type: ignore[arg-type]
    split = dataclasses.replace(train, shards=(first, *train.shards[1:]))
    return dataclasses.replace(manifest, splits={**manifest.splits, "train": split})


def with_classes(manifest: Manifest, class_rows: tuple[int, ...]) -> Manifest:
    """Returns a manifest that says something else of the classes of train."""
    train = dataclasses.replace(manifest.splits["train"], class_rows=class_rows)
    return dataclasses.replace(manifest, splits={**manifest.splits, "train": train})


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_manifest_that_says_something_else_is_refuted(name: str, clean: Path) -> None:
    change, message = MANIFESTS[name]
    assert message in found(audited(clean, change(shards.read_manifest(f"file://{clean}"))))


def test_a_damaged_quarantine_is_named(tmp_path: Path) -> None:
    photos = class_tree(tmp_path / "photos", {"cat": 12, "dog": 12})
    (photos / "cat" / "bad.jpg").write_text("no photo")
    data_set(photos, f"file://{tmp_path}/set", image_size=32, max_bad_fraction=0.1)
    assert found(audited(tmp_path / "set")) == []
    (tmp_path / "set" / "quarantine.parquet").write_bytes(b"PAR1 no more")
    (problem,) = found(audited(tmp_path / "set"))
    assert problem.startswith("quarantine.parquet: the file differs from its sha256")
    (tmp_path / "set" / "quarantine.parquet").unlink()
    (problem,) = found(audited(tmp_path / "set"))
    assert problem.startswith("quarantine.parquet: the file does not exist")


def test_inspect_shows_a_data_set_without_tensorflow_and_spark(clean: Path, tmp_path: Path) -> None:
    program = (
        "import sys; from cvdist import cli\n"
        f"code = cli.main(['inspect', 'file://{clean}', '--grid', '{tmp_path}/grid.png', '--verify'])\n"
        "assert not {'tensorflow', 'keras', 'pyspark', 'horovod'} & set(sys.modules); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert ["0", "cat", "64", "8", "8", "80", "40.0%"] in lines
    assert ["2", "fox", "48", "6", "6", "60", "30.0%"] in lines
    assert "48 to 64 images per class in train (largest to smallest 1.33 : 1)." in done.stdout
    assert "proven         every byte, row, label, pixel and key is what the manifest says" in done.stdout
    assert not (clean / "audit.json").exists()


def test_verifying_says_how_far_it_is(
    clean: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "PROGRESS_EVERY_S", 0.0)
    assert cli.main(["inspect", f"file://{clean}", "--verify"]) == 0
    lines = capsys.readouterr().err.splitlines()
    done = [int(line.split()[1]) for line in lines]
    assert len(done) >= 4
    assert done == sorted(done)
    assert lines[-1].startswith("re-read 200 of 200 samples  ")
    assert lines[-1].endswith("/s  0 s to go")


def test_inspect_verify_finds_what_is_wrong(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = shards.read_manifest(f"file://{copy}").splits["val"].shards[0].path
    data = bytearray((copy / path).read_bytes())
    data[-20] ^= 4
    (copy / path).write_bytes(data)
    assert cli.main(["inspect", f"file://{copy}"]) == 0
    assert cli.main(["inspect", f"file://{copy}", "--verify"]) == DataError.exit_code
    error = capsys.readouterr().err
    assert f"cvdist: DataError: file://{copy}/{path}, footer: it differs from its checksum; expected" in error


def colours(png: Path) -> Iterator[tuple[int, ...]]:
    """Yields the colours of a picture."""
    with Image.open(png) as image:
        assert image.format == "PNG"
        for _, colour in image.convert("RGB").getcolors(1 << 24) or []:
            yield colour


def test_the_grid_shows_samples_of_every_class_beside_its_name(tmp_path: Path) -> None:
    shades = {"black": 0, "grey": 99, "white": 200}
    for name, shade in shades.items():
        (tmp_path / "photos" / name).mkdir(parents=True)
        for index in range(12):
            pixels = np.full((30, 30, 3), shade + index, np.uint8)
            assert cv2.imwrite(str(tmp_path / "photos" / name / f"{index}.png"), pixels)
    url = f"file://{tmp_path}/set"
    data_set(tmp_path / "photos", url, image_size=16, codec="raw")
    for name, seed in (("one", 1), ("same", 1), ("other", 2)):
        options = ["--samples", "4", "--seed", str(seed), "--grid", f"{tmp_path}/{name}.png"]
        assert cli.main(["inspect", url, *options]) == 0
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "same.png").read_bytes()
    assert (tmp_path / "one.png").read_bytes() != (tmp_path / "other.png").read_bytes()
    with Image.open(tmp_path / "one.png") as image:
        pixels = np.asarray(image)
    # Each class has a band of its own, with four cells of its own shades and none of another's.
    bands = np.array_split(pixels[40:], 3)
    for band, shade in zip(bands, shades.values(), strict=True):
        values, counts = np.unique(band[..., 0], return_counts=True)
        cells = {int(value) for value, count in zip(values, counts, strict=True) if 100 * 112 <= count <= 112 * 112}
        assert len(cells) == 4
        assert all(shade <= value < shade + 12 for value in cells)


def test_the_grid_of_many_classes_shows_some_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class_tree(tmp_path / "photos", {f"kind {index:02d}": 4 for index in range(30)}, height=24, width=24)
    url = f"file://{tmp_path}/set"
    data_set(tmp_path / "photos", url, image_size=16, split="train=0.5,test=0.5")
    assert cli.main(["inspect", url, "--grid", f"{tmp_path}/grid.png", "--split", "test"]) == 0
    output = capsys.readouterr().out
    assert f"drawn to {tmp_path}/grid.png: test: 60 images, 20 of 30 classes" in output
    assert "... 10 more ..." in output
    assert len(list(colours(tmp_path / "grid.png"))) > 100


def test_a_damaged_image_is_not_drawn(copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for shard in shards.read_manifest(f"file://{copy}").splits["val"].shards:
        data = bytearray((copy / shard.path).read_bytes())
        for offset in shards.row_group_offsets(shard):
            data[offset + 40] ^= 1
        (copy / shard.path).write_bytes(data)
    code = cli.main(["inspect", f"file://{copy}", "--grid", f"{tmp_path}/grid.png", "--split", "val"])
    assert code == DataError.exit_code
    assert "differs from its checksum" in capsys.readouterr().err
    assert not (tmp_path / "grid.png").exists()


def test_inspecting_a_split_that_is_not_there_is_refused(clean: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = cli.main(["inspect", f"file://{clean}", "--grid", "grid.png", "--split", "dev"])
    assert code == ConfigError.exit_code
    assert "split: 'dev' is not in the data set" in capsys.readouterr().err
    assert not Path("grid.png").exists()
