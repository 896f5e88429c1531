"""The card: what stands in a data set's README.md is true, and the same wherever the data set lies."""

from __future__ import annotations

import dataclasses
import re
import shlex
from pathlib import Path

import pytest

from cvdist import __version__, prepare
from cvdist.arguments import parse
from cvdist.card import card, class_table, escaped
from cvdist.config import PrepareConfig, TrainConfig
from cvdist.shards import Manifest
from tests.made_data import class_tree, data_set

SETTINGS: dict[str, object] = {"image_size": 32, "quality": 85, "split": "train=0.5,val=0.25,test=0.25", "seed": 7}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photos of three classes, one with a hostile name, and three files that are none."""
    folder = class_tree(tmp_path_factory.mktemp("card") / "photos", {"cat": 40, "dog": 20, "a|b `c` <i>*_": 12})
    (folder / "cat" / "z.jpg").write_text("no photo")
    (folder / "cat" / "b.jpg").write_text("no photo either")
    (folder / "dog" / "empty.jpg").write_bytes(b"")
    return folder


def made(source: Path, target: Path) -> tuple[Manifest, str]:
    """Prepares a data set; returns its manifest and its card."""
    manifest = data_set(source, f"file://{target}", max_bad_fraction=0.2, **SETTINGS)
    return manifest, (target / "README.md").read_text()


def cells(text: str) -> list[list[str]]:
    """Returns the rows of all tables of a card."""
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def test_the_card_counts_what_the_manifest_counts(source: Path, tmp_path: Path) -> None:
    manifest, text = made(source, tmp_path / "set")
    rows = cells(text)
    for name, split in manifest.splits.items():
        assert any(row[:2] == [name, f"{split.num_rows}"] for row in rows)
    for label, name in enumerate(manifest.classes):
        counts = [split.class_rows[label] for split in manifest.splits.values()]
        assert [str(label), escaped(name), *map(str, counts), str(sum(counts))] in [row[:-1] for row in rows]
    assert "75 inputs = 72 images + 3 quarantined + 0 skipped" in text
    assert ["empty", "1", "dog/empty.jpg"] in rows
    assert ["not\\_an\\_image", "2", "cat/b.jpg"] in rows
    assert f"cvdist {__version__}" in text
    assert manifest.digest in text
    examples = {row[0]: row[1] for row in rows if len(row) == 2 and row[1].endswith("jpg")}
    assert examples.keys() == {escaped(name) for name in manifest.classes}
    assert all(key.startswith(f"{name}/") for name, key in examples.items())


def test_the_card_is_the_same_wherever_the_data_set_lies(source: Path, tmp_path: Path) -> None:
    _, here = made(source, tmp_path / "here")
    _, there = made(source, tmp_path / "there")
    assert here == there
    assert str(tmp_path) not in here
    assert str(source) not in here


def test_the_command_in_the_card_makes_the_same_data_set(source: Path, tmp_path: Path) -> None:
    manifest, text = made(source, tmp_path / "set")
    (line,) = re.findall(r"^spark-submit jobs/prepare.py (.*)$", text, re.MULTILINE)
    argv = shlex.split(line.replace("SOURCE_URL", f"file://{source}").replace("DATA_URL", f"file://{tmp_path}/again"))
    config = parse(PrepareConfig, argv, prog="prepare.py", positional=("source_url", "target_url"))
    job = prepare.start(dataclasses.replace(config, max_bad_fraction=0.2))
    assert isinstance(job, prepare.Job)
    again = prepare.finish(job, [prepare.write_shard(job, index) for index in range(len(job.shards))])
    assert again == manifest


def test_the_training_commands_in_the_card_are_accepted(source: Path, tmp_path: Path) -> None:
    _, text = made(source, tmp_path / "set")
    found = re.findall(r"-m cvdist\.train ([^#\n]*)", text)
    assert len(found) == 2
    for line in found:
        config = parse(TrainConfig, shlex.split(line), prog="cvdist train")
        assert (config.data, config.run) == ("DATA_URL", "RUN_URL")


def test_hostile_names_stay_in_their_cell(source: Path, tmp_path: Path) -> None:
    _, text = made(source, tmp_path / "set")
    rows = [line for line in text.splitlines() if "a\\|b" in line]
    assert len(rows) == 2  # of classes, and of examples
    assert all("a\\|b \\`c\\` \\<i\\>\\*\\_" in row for row in rows)
    assert escaped("two\nlines\t[x](y) &amp; #1") == "two\\\\x0alines\\\\x09\\[x\\](y) \\&amp; \\#1"


def test_many_classes_make_a_short_table_of_the_largest_and_smallest(source: Path, tmp_path: Path) -> None:
    manifest, _ = made(source, tmp_path / "set")
    sizes = tuple(range(1, 3001))
    split = dataclasses.replace(manifest.splits["train"], class_rows=sizes)
    many = dataclasses.replace(manifest, classes=tuple(f"c{size}" for size in sizes), splits={"train": split})
    rows = class_table(many, 5)
    assert [row[1] for row in rows] == ["class", "c3000", "c2999", "c2998", "... 2,995 more ...", "c2", "c1"]
    assert len(card(many, {}, {}).splitlines()) < 1100
    assert "1 to 3,000 images per class in train (largest to smallest 3000.00 : 1)." in card(many, {}, {})
