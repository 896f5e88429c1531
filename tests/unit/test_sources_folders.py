"""Listings of folders: every image once, with its class and split; what is passed over is counted, what is wrong refused."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest

from cvdist.errors import ConfigError
from tests.listed import listed, opened, refusal

Rows = list[tuple[str, int, str, str]]
ODD_NAMES = [
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
    "line\nfeed.jpg",
]


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


def rows(url: str, **settings: str) -> Rows:
    """Returns (key, bytes, class, split), sorted."""
    found = listed(opened(url, **settings))
    return sorted((r["key"], r["size_bytes"], r["class"], r["split"]) for r in found if r["reason"] is None)


class TestClassFolders:
    def test_split_folders_say_which_image_is_in_which_split(self, tmp_path: Path) -> None:
        url = tree(
            tmp_path,
            "train/dog/1.jpg",
            "train/cat/b/22.png",
            "validation/cat/3.JPEG",
            "test/dog/4.webp",
            "test/cat/5.bmp",
        )
        assert rows(url) == [
            ("test/cat/5.bmp", 5, "cat", "test"),
            ("test/dog/4.webp", 6, "dog", "test"),
            ("train/cat/b/22.png", 6, "cat", "train"),
            ("train/dog/1.jpg", 5, "dog", "train"),
            ("validation/cat/3.JPEG", 6, "cat", "val"),
        ]

    def test_val_is_another_name_of_validation(self, tmp_path: Path) -> None:
        images = ["cat/1.jpg", "dog/2.gif"]
        for name in ("val", "validation"):
            url = tree(tmp_path / name, *(f"{split}/{image}" for split in ("train", name) for image in images))
            assert {row[3] for row in rows(url)} == {"train", "val"}

    def test_class_folders_alone_name_no_split(self, tmp_path: Path) -> None:
        url = tree(tmp_path, "cat/1.jpg", "dog/2.jpg")
        assert [row[2:] for row in rows(url)] == [("cat", None), ("dog", None)]

    def test_what_is_no_image_is_counted(self, tmp_path: Path) -> None:
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
        source = opened(tree(tmp_path, *images, *others))
        assert sorted(row["key"] for row in listed(source)) == sorted(images)
        assert source.num_skipped == len(others)

    def test_what_is_no_image_is_counted_without_split_folders_too(self, tmp_path: Path) -> None:
        source = opened(tree(tmp_path, "cat/1.jpg", "dog/2.jpg", "LICENSE", "cat/.DS_Store", "stray.png"))
        assert len(listed(source)) == 2
        assert source.num_skipped == 3

    def test_hidden_folders_are_no_classes(self, tmp_path: Path) -> None:
        url = tree(tmp_path, "train/cat/1.jpg", "train/dog/2.jpg", "train/.cache/3.jpg", ".git/cat/4.jpg")
        assert [row[0] for row in rows(url)] == ["train/cat/1.jpg", "train/dog/2.jpg"]

    def test_a_folder_that_begins_with_an_underscore_is_named_and_its_files_are_counted(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        url = tree(tmp_path, "cat/1.jpg", "dog/2.jpg", "_noise_/3.jpg", "_noise_/deep/4.wav")
        with caplog.at_level(logging.WARNING):
            source = opened(url)
        assert f"{url}/_noise_: passed over" in caplog.text
        assert {row["class"] for row in listed(source)} == {"cat", "dog"}
        assert source.num_skipped == 2

    def test_odd_names_are_listed_as_they_are(self, tmp_path: Path) -> None:
        url = tree(tmp_path, *(f"cat & co/{name}" for name in ODD_NAMES), "c#/1.jpg")
        found = rows(url)
        assert [row[0] for row in found] == sorted([*(f"cat & co/{name}" for name in ODD_NAMES), "c#/1.jpg"])
        assert {row[2] for row in found} == {"c#", "cat & co"}

    @pytest.mark.parametrize("path", [b"/cat/\xff.jpg", b"/\xff/1.jpg"])
    def test_a_name_that_is_no_unicode_is_named(self, path: bytes, tmp_path: Path) -> None:
        url = tree(tmp_path, "cat/1.jpg", "dog/2.jpg")
        bad = Path(os.fsdecode(os.fsencode(tmp_path) + path))
        bad.parent.mkdir(exist_ok=True)
        bad.write_bytes(b"x")
        assert r"\udcff" in refusal(url)

    @pytest.mark.parametrize(
        "paths",
        [
            ["readme.txt"],
            [".hidden/1.jpg"],
            ["1.jpg", "2.jpg"],
            ["train/"],
            ["train/1.jpg"],
            ["train/", "test/cat/1.jpg"],
        ],
    )
    def test_a_source_without_images_in_class_folders_is_refused(self, paths: list[str], tmp_path: Path) -> None:
        url = tree(tmp_path, *paths)
        assert any(
            text in refusal(url) for text in ("holds no images in class folders", "test holds classes that train lacks")
        )

    @pytest.mark.parametrize("paths", [["cat/1.jpg"], ["train/cat/1.jpg"], ["train/cat/1.jpg", "test/cat/1.jpg"]])
    def test_a_single_class_is_refused_and_named(self, paths: list[str], tmp_path: Path) -> None:
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
    def test_an_empty_class_is_refused_and_named(self, paths: list[str], empty: str, tmp_path: Path) -> None:
        assert f"file://{tmp_path}{empty} holds no image; expected files named *.jpg" in refusal(tree(tmp_path, *paths))

    def test_a_class_that_train_lacks_is_refused_and_named(self, tmp_path: Path) -> None:
        url = tree(tmp_path, "train/cat/1.jpg", "train/dog/1.jpg", "test/cat/1.jpg", "test/emu/1.jpg")
        assert "test holds classes that train lacks: emu; expected those of train" in refusal(url)

    def test_a_class_may_be_missing_in_test(self, tmp_path: Path) -> None:
        url = tree(tmp_path, "train/cat/1.jpg", "train/dog/1.jpg", "test/cat/1.jpg")
        assert {row[2] for row in rows(url)} == {"cat", "dog"}

    def test_split_folders_without_train_are_refused(self, tmp_path: Path) -> None:
        assert "holds test, val but no train" in refusal(tree(tmp_path, "val/cat/1.jpg", "test/dog/1.jpg"))

    @pytest.mark.parametrize("extra, named", [("cat", "move cat away"), ("validation", "move val or validation away")])
    def test_folders_beside_the_splits_are_refused(self, extra: str, named: str, tmp_path: Path) -> None:
        url = tree(tmp_path, "train/cat/1.jpg", "train/dog/1.jpg", "val/cat/1.jpg", f"{extra}/cat/2.jpg")
        assert named in refusal(url)


class TestFlatNames:
    def test_the_first_group_of_the_pattern_is_the_class(self, tmp_path: Path) -> None:
        url = tree(tmp_path, "cat.0.jpg", "dog.10.jpg", "more/dog.2.png", "notes.txt")
        source = opened(url, label_pattern=r"(cat|dog)\.\d+")
        assert source.kind == "flat_names"
        assert rows(url, label_pattern=r"(cat|dog)\.\d+") == [
            ("cat.0.jpg", 9, "cat", None),
            ("dog.10.jpg", 10, "dog", None),
            ("more/dog.2.png", 9, "dog", None),
        ]
        list(source.batches())
        assert source.num_skipped == 1

    def test_a_pattern_without_a_group_is_the_class_as_a_whole(self, tmp_path: Path) -> None:
        url = tree(tmp_path, "n01-1.jpg", "n02-1.jpg")
        assert [row[2] for row in rows(url, label_pattern=r"n\d+")] == ["n01", "n02"]

    @pytest.mark.parametrize("pattern", [r"(cat)\.\d+", r"cat\.\d+", r"(cat)?\.\d+\.jpg"])
    def test_an_image_without_a_class_in_its_name_is_rejected_with_the_reason(
        self, pattern: str, tmp_path: Path
    ) -> None:
        found = listed(opened(tree(tmp_path, "cat.0.jpg", "emu.0.jpg"), label_pattern=pattern))
        rejected = {row["key"]: (row["class"], row["reason"]) for row in found if row["reason"]}
        assert rejected == {"emu.0.jpg": (None, "no_label")}

    def test_a_split_folder_says_the_split(self, tmp_path: Path) -> None:
        url = tree(tmp_path, "train/cat.0.jpg", "validation/dog.1.jpg")
        assert [row[3] for row in rows(url, label_pattern="(cat|dog)")] == ["train", "val"]

    def test_odd_names_are_listed_as_they_are(self, tmp_path: Path) -> None:
        url = tree(tmp_path, *ODD_NAMES)
        assert [row[0] for row in rows(url, label_pattern=r"\.jpg$")] == sorted(ODD_NAMES)

    def test_a_pattern_that_finds_nothing_is_refused_with_three_names(self, tmp_path: Path) -> None:
        url = tree(tmp_path, *(f"emu.{number}.jpg" for number in range(9)))
        message = refusal(url, label_pattern="(cat|dog)")
        assert "(emu.0.jpg, emu.1.jpg, emu.2.jpg)" in message

    def test_a_folder_without_images_is_refused(self, tmp_path: Path) -> None:
        assert "there is no image" in refusal(tree(tmp_path, "a.txt"), label_pattern="(cat|dog)")

    def test_what_is_no_regular_expression_is_refused(self, tmp_path: Path) -> None:
        message = refusal(tree(tmp_path, "cat.0.jpg"), ConfigError, label_pattern="(cat")
        assert message.startswith("label_pattern: '(cat' is no regular expression")

    def test_a_missing_pattern_is_refused(self, tmp_path: Path) -> None:
        assert refusal(tree(tmp_path, "cat.0.jpg"), ConfigError, source="flat_names").startswith(
            "label_pattern: is missing"
        )
