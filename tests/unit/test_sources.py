"""Listings of class folders: every image once, with its class and split; what is passed over is counted, what is wrong refused."""

from __future__ import annotations

import collections
import itertools
import os
from pathlib import Path

import pytest

from cvdist.errors import DataError
from cvdist.sources import Listing, class_folders, stratified_splits

SHARES = {"train": 0.8, "val": 0.1, "test": 0.1}
Rows = list[tuple[str, int, str, str]]


def tree(folder: Path, *paths: str) -> str:
    """Writes files of as many bytes as their names are long; a path that ends in / is an empty folder."""
    for path in paths:
        target = folder / path
        if path.endswith("/"):
            target.mkdir(parents=True)
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(b"x" * len(target.name))
    return f"file://{folder}"


def rows(listing: Listing) -> Rows:
    """Returns (path, bytes, class, split)."""
    return [(r["path"], r["size_bytes"], listing.classes[r["label"]], r["split"]) for r in listing.table.to_pylist()]


def refusal(url: str) -> str:
    """Returns the message with which a source is refused: what was found and where, what was expected, and the fix."""
    with pytest.raises(DataError) as caught:
        class_folders(url, SHARES, 0)
    message = str(caught.value)
    assert "; expected " in message
    assert message.count("; ") >= 2
    return message


def test_split_folders_say_which_image_is_in_which_split(tmp_path: Path) -> None:
    url = tree(
        tmp_path, "train/dog/1.jpg", "train/cat/b/22.png", "validation/cat/3.JPEG", "test/dog/4.webp", "test/cat/5.bmp"
    )
    listing = class_folders(url, SHARES, 0)
    assert listing.classes == ["cat", "dog"]
    assert rows(listing) == [
        ("test/cat/5.bmp", 5, "cat", "test"),
        ("test/dog/4.webp", 6, "dog", "test"),
        ("train/cat/b/22.png", 6, "cat", "train"),
        ("train/dog/1.jpg", 5, "dog", "train"),
        ("validation/cat/3.JPEG", 6, "cat", "val"),
    ]
    assert listing.num_skipped == 0


def test_val_is_another_name_of_validation(tmp_path: Path) -> None:
    images = ["cat/1.jpg", "dog/2.gif"]
    for name in ("val", "validation"):
        url = tree(tmp_path / name, *(f"{split}/{image}" for split in ("train", name) for image in images))
        assert {row[3] for row in rows(class_folders(url, SHARES, 0))} == {"train", "val"}


def test_class_folders_alone_are_split_by_shares(tmp_path: Path) -> None:
    url = tree(tmp_path, *(f"{name}/{index}.jpg" for name in ("cat", "dog") for index in range(30)))
    listing = class_folders(url, SHARES, 0)
    counts = collections.Counter((row[2], row[3]) for row in rows(listing))
    assert counts == {(c, s): n for c in ("cat", "dog") for s, n in (("train", 24), ("val", 3), ("test", 3))}
    assert class_folders(url, SHARES, 0).table.equals(listing.table)
    assert not class_folders(url, SHARES, 1).table.equals(listing.table)


@pytest.mark.parametrize("num_images", range(1, 25))
def test_every_class_is_split_alike_and_every_image_has_one_split(num_images: int) -> None:
    labels = ["cat"] * num_images + ["dog"] * num_images
    splits = stratified_splits(labels, SHARES, 3)
    cats, dogs = collections.Counter(splits[:num_images]), collections.Counter(splits[num_images:])
    assert cats == dogs
    assert set(splits) <= set(SHARES)
    for name, share in SHARES.items():
        assert abs(cats[name] - share * num_images) <= 1
    assert cats["train"] >= 1


def test_another_class_changes_no_split_of_the_classes_before_it() -> None:
    before = stratified_splits(["cat"] * 20 + ["dog"] * 20, SHARES, 0)
    assert stratified_splits(["cat"] * 20 + ["dog"] * 20 + ["emu"] * 7, SHARES, 0)[:40] == before


def test_a_share_of_nothing_gets_nothing() -> None:
    assert set(stratified_splits(["cat"] * 10, {"train": 1.0}, 0)) == {"train"}


def test_what_is_no_image_is_counted(tmp_path: Path) -> None:
    images = ["train/cat/1.jpg", "train/dog/2.jpg", "test/cat/_DSC3.jpg"]
    others = [
        "README.md",
        "train/list.txt",
        "train/stray.jpg",
        "train/cat/Thumbs.db",
        "train/cat/1.jpg.txt",
        "train/cat/.hidden.jpg",
        "train/cat/._1.jpg",
        "train/cat/.ipynb_checkpoints/1-checkpoint.jpg",
        "train/dog/deep/er/noise",
        "test/cat/jpg",
    ]
    listing = class_folders(tree(tmp_path, *images, *others), SHARES, 0)
    assert [row[0] for row in rows(listing)] == sorted(images)
    assert listing.num_skipped == len(others)


def test_what_is_no_image_is_counted_without_split_folders_too(tmp_path: Path) -> None:
    url = tree(tmp_path, "cat/1.jpg", "dog/2.jpg", "LICENSE", "cat/.DS_Store", "stray.png")
    listing = class_folders(url, SHARES, 0)
    assert len(rows(listing)) == 2
    assert listing.num_skipped == 3


def test_hidden_folders_are_no_classes(tmp_path: Path) -> None:
    url = tree(
        tmp_path, "train/cat/1.jpg", "train/dog/2.jpg", "train/.cache/3.jpg", ".git/cat/4.jpg", "_prepare/cat/5.jpg"
    )
    listing = class_folders(url, SHARES, 0)
    assert listing.classes == ["cat", "dog"]
    assert len(rows(listing)) == 2


def test_odd_names_are_listed_as_they_are(tmp_path: Path) -> None:
    names = [
        "a b.jpg",
        "ü.jpg",
        "u\u0308.jpg",
        "100%.jpg",
        "%20.jpg",
        "#1.jpg",
        "what?.jpg",
        "a:b.jpg",
        "日本.jpg",
        "'\".jpg",
        "a+b&c.jpg",
    ]
    url = tree(tmp_path, *(f"cat & co/{name}" for name in names), "c#/1.jpg")
    listing = class_folders(url, SHARES, 0)
    assert [row[0] for row in rows(listing)] == sorted([*(f"cat & co/{name}" for name in names), "c#/1.jpg"])
    assert listing.classes == ["c#", "cat & co"]


def test_a_name_that_is_no_unicode_is_named(tmp_path: Path) -> None:
    url = tree(tmp_path, "cat/1.jpg", "dog/2.jpg")
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/cat/\xff.jpg")).write_bytes(b"x")
    assert r"cat/\udcff.jpg" in refusal(url)


def test_the_listing_does_not_depend_on_the_order_of_creation(tmp_path: Path) -> None:
    images = ["cat/1.jpg", "cat/2.jpg", "dog/1.jpg", "dog/10.jpg", "dog/2.jpg"]
    tables = [
        class_folders(tree(tmp_path / str(number), *order), SHARES, 0).table
        for number, order in enumerate(itertools.islice(itertools.permutations(images), 0, 120, 40))
    ]
    assert all(table.equals(tables[0]) for table in tables)
    paths = tables[0]["path"].to_pylist()
    assert paths == sorted(set(paths))


@pytest.mark.parametrize(
    "paths",
    [["readme.txt"], [".hidden/1.jpg"], ["1.jpg", "2.jpg"], ["train/"], ["train/1.jpg"], ["train/", "test/cat/1.jpg"]],
)
def test_a_source_without_images_in_class_folders_is_refused(paths: list[str], tmp_path: Path) -> None:
    assert "holds no images in class folders" in refusal(tree(tmp_path, *paths))


@pytest.mark.parametrize("paths", [["cat/1.jpg"], ["train/cat/1.jpg"], ["train/cat/1.jpg", "test/cat/1.jpg"]])
def test_a_single_class_is_refused_and_named(paths: list[str], tmp_path: Path) -> None:
    assert "holds the single class 'cat'; expected at least two class folders" in refusal(tree(tmp_path, *paths))


@pytest.mark.parametrize(
    "paths, empty",
    [
        (["cat/1.jpg", "dog/"], "/dog"),
        (["cat/1.jpg", "dog/notes.txt"], "/dog"),
        (["train/cat/1.jpg", "train/dog/2.jpg", "test/dog/"], "/test/dog"),
        (["train/cat/1.jpg", "train/dog/.2.jpg"], "/train/dog"),
    ],
)
def test_an_empty_class_is_refused_and_named(paths: list[str], empty: str, tmp_path: Path) -> None:
    assert f"file://{tmp_path}{empty} holds no image; expected files named *.jpg" in refusal(tree(tmp_path, *paths))


def test_a_class_that_train_lacks_is_refused_and_named(tmp_path: Path) -> None:
    url = tree(tmp_path, "train/cat/1.jpg", "train/dog/1.jpg", "test/cat/1.jpg", "test/emu/1.jpg")
    assert "test holds classes that train lacks: emu; expected those of train" in refusal(url)


def test_a_class_may_be_missing_in_test(tmp_path: Path) -> None:
    url = tree(tmp_path, "train/cat/1.jpg", "train/dog/1.jpg", "test/cat/1.jpg")
    assert class_folders(url, SHARES, 0).classes == ["cat", "dog"]


def test_split_folders_without_train_are_refused(tmp_path: Path) -> None:
    assert "holds test, val but no train" in refusal(tree(tmp_path, "val/cat/1.jpg", "test/dog/1.jpg"))


@pytest.mark.parametrize("extra, named", [("cat", "move cat away"), ("validation", "move val or validation away")])
def test_folders_beside_the_splits_are_refused(extra: str, named: str, tmp_path: Path) -> None:
    url = tree(tmp_path, "train/cat/1.jpg", "train/dog/1.jpg", "val/cat/1.jpg", f"{extra}/cat/2.jpg")
    assert named in refusal(url)
