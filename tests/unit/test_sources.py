"""Every layout is recognised, and lists each photo once with its class, split, further label and bytes."""

from __future__ import annotations

import hashlib
import pickle
import random
from pathlib import Path

import pyarrow as pa
import pytest

from cvdist.errors import ConfigError, CvdistError
from cvdist.sources import ROWS
from tests.listed import images, listed, opened, refusal
from tests.made_layouts import LAYOUTS, csv_table, photos, tar_bytes, write

PHOTOS = photos()


@pytest.fixture(params=LAYOUTS)
def layout_name(request: pytest.FixtureRequest) -> str:
    if request.param == "petastorm":
        pytest.importorskip("petastorm", reason="Petastorm is not installed; run: make setup")
    return str(request.param)


@pytest.mark.filterwarnings("ignore")
def test_every_layout_lists_every_photo_once_with_its_labels_and_bytes(layout_name: str, tmp_path: Path) -> None:
    layout = LAYOUTS[layout_name](tmp_path, PHOTOS)
    url = f"file://{tmp_path}/{layout.source}".rstrip("/")
    source = opened(url, **layout.settings)
    assert source.kind == layout.kind
    found = images(source, url, **layout.settings)
    assert sorted(row["key"] for row, _ in found) == sorted(layout.keys)
    assert source.num_skipped == layout.skipped
    assert source.extra == pa.schema([("age", pa.float64())] if layout.has_age else [])
    for row, data in found:
        photo = layout.keys[row["key"]]
        assert data == photo.data
        assert (row["class"], row["reason"]) == (photo.class_name, None)
        assert row["split"] == (photo.split if layout.has_splits else None)
        assert row["size_bytes"] in (None, len(data))
        assert row["sha256"] in (None, hashlib.sha256(data).hexdigest())
        assert row.get("age", photo.age) == photo.age


@pytest.mark.filterwarnings("ignore")
def test_a_layout_said_by_name_is_read_as_if_detected(layout_name: str, tmp_path: Path) -> None:
    layout = LAYOUTS[layout_name](tmp_path, photos(each=1))
    url = f"file://{tmp_path}/{layout.source}".rstrip("/")
    first, second = (images(opened(url, **layout.settings, **said), url) for said in ({}, {"source": layout.kind}))
    assert first == second


@pytest.mark.filterwarnings("ignore")
def test_containers_travel_to_other_processes(tmp_path: Path) -> None:
    LAYOUTS["hugging_face"](tmp_path, PHOTOS)
    source = opened(f"file://{tmp_path}")
    assert pickle.loads(pickle.dumps(source.containers)) == source.containers


def test_a_listing_can_be_read_twice(tmp_path: Path) -> None:
    LAYOUTS["tar_per_class"](tmp_path, PHOTOS)
    source = opened(f"file://{tmp_path}")
    first, skipped = listed(source), source.num_skipped
    assert listed(source) == first
    assert source.num_skipped == skipped > 0


def test_the_columns_of_a_listing_are_the_ones_agreed_on() -> None:
    assert ROWS.names == [
        "key", "url", "offset", "size_bytes", "sha256", "class", "split", "weight", "group", "reason", "detail",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "files, kind",
    [
        (["cat/1.jpg", "dog/2.jpg"], "class_folders"),
        (["cat/1.jpg", "dog/2.jpg", "list.csv"], "class_folders"),
        (["cat/1.jpg", "dog/2.jpg", "more.tar"], "class_folders"),
        (["train/cat/1.jpg", "train/dog/1.jpg", "list.csv"], "class_folders"),
        (["a.csv", "README.md"], "table"),
        (["train.csv", "val.csv", "_SUCCESS"], "table"),
    ],
)
def test_a_folder_is_read_as_what_it_holds(files: list[str], kind: str, tmp_path: Path) -> None:
    write(tmp_path, [(name, b"path,label\n" if name.endswith("csv") else b"x") for name in files])
    assert opened(f"file://{tmp_path}").kind == kind


def test_tables_and_archives_side_by_side_are_refused(tmp_path: Path) -> None:
    write(tmp_path, [("a.csv", b"path,label\n"), ("b.tar", tar_bytes([]))])
    assert "a.csv and b.tar; expected files of one kind" in refusal(f"file://{tmp_path}")


def test_a_file_of_unknown_kind_is_refused(tmp_path: Path) -> None:
    write(tmp_path, [("photos.zip", b"x")])
    assert "photos.zip is a file of unknown kind" in refusal(f"file://{tmp_path}/photos.zip")


def test_a_missing_source_is_refused(tmp_path: Path) -> None:
    assert "/photos does not exist; expected a folder of class folders" in refusal(f"file://{tmp_path}/photos")


@pytest.mark.parametrize("kind", ["class_folders", "flat_names", "petastorm"])
def test_a_file_is_refused_where_a_folder_is_needed(kind: str, tmp_path: Path) -> None:
    csv_table(tmp_path, PHOTOS[:1])
    settings = {"label_pattern": "x"} if kind == "flat_names" else {}
    assert f"expected a folder for {kind}" in refusal(f"file://{tmp_path}/list.csv", source=kind, **settings)


@pytest.mark.parametrize(
    "setting", [{"label_pattern": "x"}, {"image_column": "x"}, {"label_columns": "x"}, {"group_column": "x"}]
)
def test_a_setting_that_means_nothing_for_the_layout_is_refused(setting: dict[str, str], tmp_path: Path) -> None:
    write(tmp_path, [("cat/1.jpg", b"x"), ("dog/1.jpg", b"x")])
    split_by = {"split_by": "group"} if "group_column" in setting else {}
    message = refusal(f"file://{tmp_path}", ConfigError, source="class_folders", **setting, **split_by)
    assert message.startswith(f"{next(iter(setting))}: 'x' means nothing")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seed", range(12))
def test_a_damaged_source_is_read_or_refused_in_one_line(layout_name: str, seed: int, tmp_path: Path) -> None:
    layout = LAYOUTS[layout_name](tmp_path, photos(each=1, size=16))
    rng = random.Random(seed)
    files = sorted(path for path in tmp_path.rglob("*") if path.suffix in (".csv", ".jsonl", ".parquet", ".tar", ""))
    path = rng.choice([path for path in files if path.is_file()] or [tmp_path / next(iter(layout.keys))])
    data = bytearray(path.read_bytes())
    place = rng.randrange(len(data))
    # Bytes that are wrong in the middle of Parquet can crash pyarrow 14 itself.
    if seed % 3 and path.suffix not in (".parquet", ""):
        data[place : place + 16] = rng.randbytes(16)
    else:
        del data[place:]
    path.write_bytes(data)
    url = f"file://{tmp_path}/{layout.source}".rstrip("/")
    try:
        images(opened(url, **layout.settings), url, **layout.settings)
    except CvdistError as error:
        assert "\n" not in str(error)
        assert str(error).isprintable()
