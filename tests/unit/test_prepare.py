"""Preparation in one process: nothing lost, nothing doubled, the same bytes whatever was killed, and no foreign data touched."""

from __future__ import annotations

import collections
import dataclasses
import gc
import hashlib
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from cvdist import prepare
from cvdist.config import PrepareConfig, dump, from_dict
from cvdist.errors import ConfigError, CvdistError, DataError
from cvdist.images import MAX_BYTES, Sample, convert
from cvdist.shards import Manifest, read_manifest
from tests.made_data import class_tree

CLASSES = {"ant": 40, "bee": 50}
SMALL = {"image_size": 32, "row_group_bytes": 16384, "shard_bytes": 65536}
BAD = {
    "ant/text.jpg": (b"this is no photo", "not_an_image"),
    "ant/empty.png": (b"", "empty"),
    "bee/wide.gif": (b"GIF89a\xff\x00\x01\x00\x00\x00\x00,\0\0\0\0\xff\x00\x01\0\0\x02\0;", "extreme_aspect"),
}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photos that no test changes."""
    return class_tree(tmp_path_factory.mktemp("photos"), CLASSES, height=40, width=52)


@pytest.fixture
def source(photos: Path, tmp_path: Path) -> Path:
    """Photos that a test may add to or break."""
    shutil.copytree(photos, tmp_path / "source")
    return tmp_path / "source"


def config(source: Path, target: Path, **settings: Any) -> PrepareConfig:
    return PrepareConfig(source_url=f"file://{source}", target_url=f"file://{target}", **{**SMALL, **settings})


def started(source: Path, target: Path, **settings: Any) -> prepare.Job:
    job = prepare.start(config(source, target, **settings))
    assert isinstance(job, prepare.Job)
    return job


def prepared(source: Path, target: Path, **settings: Any) -> Manifest:
    """Prepares a data set."""
    manifest = prepare.run(config(source, target, **settings))
    assert manifest is not None
    return manifest


def content(folder: Path) -> dict[str, bytes]:
    """Returns every file below a folder, hidden ones too."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def refusal(kind: type[CvdistError], function: Any, *args: Any, **settings: Any) -> str:
    """Returns the message of a refusal: what was found and where, what was expected, and the fix."""
    with pytest.raises(kind) as caught:
        function(*args, **settings)
    message = str(caught.value)
    assert "; expected " in message
    assert message.count("; ") >= 2
    return message


def add_bad(source: Path) -> None:
    for path, (data, _) in BAD.items():
        (source / path).write_bytes(data)
    (source / "ant" / "notes.txt").write_text("passed over")
    (source / "README").write_text("passed over")


def test_every_input_is_a_row_or_quarantined_or_skipped_and_counted(source: Path, tmp_path: Path) -> None:
    add_bad(source)
    manifest = prepared(source, tmp_path / "set", max_bad_fraction=0.1)
    assert manifest == read_manifest(f"file://{tmp_path}/set")
    assert (manifest.num_rows, manifest.num_quarantined, manifest.num_skipped, manifest.num_inputs) == (90, 3, 2, 95)
    assert manifest.classes == ("ant", "bee")
    keys = []
    for name, split in manifest.splits.items():
        counts: collections.Counter[int] = collections.Counter()
        for shard in split.shards:
            data = (tmp_path / "set" / shard.path).read_bytes()
            assert (len(data), hashlib.sha256(data).hexdigest()) == (shard.num_bytes, shard.sha256)
            assert shard.path.startswith(f"{name}/")
            for row in pq.read_table(tmp_path / "set" / shard.path).to_pylist():
                original = (source / row["key"]).read_bytes()
                sample = convert(original, manifest.image)
                assert sample == Sample(row["image"], row["height"], row["width"])
                assert row["source_sha256"] == hashlib.sha256(original).hexdigest()
                assert manifest.classes[row["label"]] == row["key"].split("/")[0]
                counts[row["label"]] += 1
                keys.append(row["key"])
        assert split.class_rows == tuple(counts[label] for label in range(2))
    inputs = {str(path.relative_to(source)) for path in source.rglob("*.jpg")} - set(BAD)
    assert sorted(keys) == sorted(inputs)
    per_split = collections.Counter({name: split.num_rows for name, split in manifest.splits.items()})
    per_split.update(pq.read_table(tmp_path / "set" / "quarantine.parquet")["split"].to_pylist())
    assert per_split == {"train": 34 + 41, "val": 4 + 5, "test": 4 + 5}


def test_the_quarantine_says_what_was_rejected_and_why(source: Path, tmp_path: Path) -> None:
    add_bad(source)
    prepared(source, tmp_path / "set", max_bad_fraction=0.1)
    rows = {row["path"]: row for row in pq.read_table(tmp_path / "set" / "quarantine.parquet").to_pylist()}
    assert rows.keys() == BAD.keys()
    for path, (data, reason) in BAD.items():
        assert rows[path]["reason"] == reason
        assert rows[path]["detail"]
        assert rows[path]["size_bytes"] == len(data)
        assert rows[path]["sha256"] == hashlib.sha256(data).hexdigest()
        assert rows[path]["split"] in ("train", "val", "test")


def test_nothing_but_the_data_set_is_left_in_the_target(source: Path, tmp_path: Path) -> None:
    manifest = prepared(source, tmp_path / "set")
    shards = {shard.path for split in manifest.splits.values() for shard in split.shards}
    others = set(content(tmp_path / "set")) - shards
    assert "manifest.json" in others
    assert others - {"README.md", "manifest.json"} <= {f"{name}/_common_metadata" for name in manifest.splits}
    assert {path.name for path in (tmp_path / "set").iterdir()} == {*manifest.splits, "README.md", "manifest.json"}


def test_a_file_too_large_to_be_an_image_is_quarantined_without_being_read(source: Path, tmp_path: Path) -> None:
    with (source / "bee" / "huge.jpg").open("wb") as file:
        file.truncate(2 * MAX_BYTES)  # a hole that takes no room
    prepared(source, tmp_path / "set", max_bad_fraction=0.1)
    (row,) = pq.read_table(tmp_path / "set" / "quarantine.parquet").to_pylist()
    assert (row["path"], row["reason"], row["size_bytes"]) == ("bee/huge.jpg", "too_many_bytes", 2 * MAX_BYTES)
    assert row["sha256"] == ""
    assert str(MAX_BYTES) in row["detail"]


def test_rows_are_shuffled_over_all_shards_of_a_split(source: Path, tmp_path: Path) -> None:
    manifest = prepared(source, tmp_path / "set", shard_bytes=65536)
    shards = manifest.splits["train"].shards
    assert len(shards) > 1
    sizes = [shard.num_rows for shard in shards]
    assert max(sizes) - min(sizes) <= 1
    keys = [key for shard in shards for key in pq.read_table(tmp_path / "set" / shard.path)["key"].to_pylist()]
    assert keys != sorted(keys)
    labels = [key.split("/")[0] for key in keys]
    changes = sum(one != other for one, other in itertools.pairwise(labels))
    assert changes > len(labels) / 4
    again = prepared(source, tmp_path / "other seed", seed=1)
    assert again.splits["train"].shards[0].sha256 != shards[0].sha256


def test_the_same_inputs_give_the_same_bytes(source: Path, tmp_path: Path) -> None:
    add_bad(source)
    for name in ("one", "two"):
        prepared(source, tmp_path / name, max_bad_fraction=0.1)
    assert content(tmp_path / "one") == content(tmp_path / "two")


def test_tasks_may_run_in_any_order_and_more_than_once(source: Path, tmp_path: Path) -> None:
    prepared(source, tmp_path / "plain", shard_bytes=65536)
    job = started(source, tmp_path / "mixed", shard_bytes=65536)
    indices = list(range(len(job.shards))) * 3
    random.Random(0).shuffle(indices)
    results = {index: prepare.write_shard(job, index) for index in indices}
    prepare.finish(job, [results[index] for index in reversed(range(len(job.shards)))])
    assert content(tmp_path / "mixed") == content(tmp_path / "plain")


def test_a_finished_data_set_is_left_as_it_is(source: Path, tmp_path: Path) -> None:
    manifest = prepared(source, tmp_path / "set")
    before = content(tmp_path / "set")
    assert prepare.start(config(source, tmp_path / "set")) == manifest
    # How many bad inputs are allowed is no property of the rows.
    assert prepare.start(config(source, tmp_path / "set", max_bad_fraction=0.5)) == manifest
    assert content(tmp_path / "set") == before


@pytest.mark.parametrize(
    "settings, difference",
    [
        ({"quality": 50}, "quality 90 there, 50 here"),
        ({"codec": "raw", "seed": 3}, "codec 'jpeg' there, 'raw' here; seed 0 there, 3 here"),
        ({"split": "train=1"}, "split 'train=0.8,val=0.1,test=0.1' there, 'train=1' here"),
    ],
)
@pytest.mark.parametrize("is_finished", [True, False])
def test_a_target_with_other_settings_is_refused_with_the_difference(
    settings: dict[str, Any], difference: str, is_finished: bool, source: Path, tmp_path: Path
) -> None:
    if is_finished:
        prepared(source, tmp_path / "set")
    else:
        prepare.write_shard(started(source, tmp_path / "set"), 0)
    before = content(tmp_path / "set")
    message = refusal(DataError, prepare.run, config(source, tmp_path / "set", **settings))
    kind = "another data set" if is_finished else "an unfinished other data set"
    assert message.startswith(
        f"file://{tmp_path}/set holds {kind} ({difference}); expected an empty or absent folder; choose"
    )
    assert content(tmp_path / "set") == before


def test_a_data_set_of_other_inputs_is_refused(source: Path, tmp_path: Path) -> None:
    prepared(source, tmp_path / "set")
    before = content(tmp_path / "set")
    (source / "ant" / "000.jpg").unlink()
    message = refusal(DataError, prepare.run, config(source, tmp_path / "set"))
    assert "same settings, other input files" in message
    assert "--append" in message
    # The refusal notes nothing down that could stand in the way of a later run.
    assert content(tmp_path / "set") == before


@pytest.mark.parametrize("changed", ["inputs", "settings before the first shard"])
def test_an_interrupted_run_of_something_else_is_started_over(changed: str, source: Path, tmp_path: Path) -> None:
    job = started(source, tmp_path / "set")
    settings = {"quality": 50}
    if changed == "inputs":
        for index in range(len(job.shards)):
            prepare.write_shard(job, index)
        (source / "ant" / "000.jpg").unlink()
        settings = {}
    lines: list[str] = []
    manifest = prepare.run(config(source, tmp_path / "set", **settings), say=lines.append)
    assert any("starting over" in line for line in lines)
    assert manifest == prepared(source, tmp_path / "fresh", **settings)
    assert content(tmp_path / "set") == content(tmp_path / "fresh")


def test_finished_shards_are_not_written_again(source: Path, tmp_path: Path) -> None:
    settings = {"shard_bytes": 65536}
    prepared(source, tmp_path / "plain", **settings)
    job = started(source, tmp_path / "set", **settings)
    prepare.write_shard(job, 1)
    (attempt,) = (tmp_path / "set").rglob("attempts/*.parquet")
    inode = attempt.stat().st_ino
    done: list[int] = []

    def run_tasks(_: str, function: Any, numbers: Any) -> list[Any]:
        done.extend(numbers)
        return [function(number) for number in numbers]

    prepare.run(config(source, tmp_path / "set", **settings), run_tasks)
    assert done == [index for index in range(len(job.shards)) if index != 1]
    assert inode in {path.stat().st_ino for path in (tmp_path / "set").rglob("shard-*.parquet")}
    assert content(tmp_path / "set") == content(tmp_path / "plain")


def test_a_target_with_foreign_files_is_refused_and_left_as_it_is(source: Path, tmp_path: Path) -> None:
    for foreign in ("thesis.tex", "train/shard-00000.parquet", ".hidden"):
        target = tmp_path / foreign.replace("/", "-")
        (target / foreign).parent.mkdir(parents=True)
        (target / foreign).write_text("precious")
        message = refusal(DataError, prepare.run, config(source, target))
        assert "1 files or folders that are no data set" in message
        assert foreign.split("/")[0] in message
        assert content(target) == {foreign: b"precious"}


def test_foreign_files_in_an_unfinished_target_stay(source: Path, tmp_path: Path) -> None:
    job = started(source, tmp_path / "set")
    (tmp_path / "set" / "train").mkdir()
    for name in ("train/notes.txt", "train/.shard-00000.parquet.swp", "thesis.tex"):
        (tmp_path / "set" / name).write_text("precious")
    prepare.finish(job, [prepare.write_shard(job, index) for index in range(len(job.shards))])
    after = content(tmp_path / "set")
    assert [after[name] for name in ("train/notes.txt", "train/.shard-00000.parquet.swp", "thesis.tex")] == [
        b"precious"
    ] * 3


def test_a_damaged_manifest_in_the_target_is_refused(source: Path, tmp_path: Path) -> None:
    prepared(source, tmp_path / "set")
    path = tmp_path / "set" / "manifest.json"
    path.write_text(path.read_text().replace('"num_inputs": 90', '"num_inputs": 91'))
    assert "manifest.json is damaged" in refusal(DataError, prepare.run, config(source, tmp_path / "set"))


def test_a_file_in_the_place_of_the_target_is_refused(source: Path, tmp_path: Path) -> None:
    (tmp_path / "set").write_text("precious")
    with pytest.raises(CvdistError, match="expected a directory"):
        prepare.run(config(source, tmp_path / "set"))
    assert (tmp_path / "set").read_text() == "precious"


def test_too_many_bad_inputs_end_without_a_data_set_and_keep_the_work(source: Path, tmp_path: Path) -> None:
    add_bad(source)
    message = refusal(DataError, prepared, source, tmp_path / "set", max_bad_fraction=0.03)
    assert message.startswith(f"file://{source}: 3 of 93 images cannot be used (")
    assert "expected at most 3.00%; see " in message
    assert "repair or remove them, or raise --max_bad_fraction" in message
    assert all(f"{reason} 1 times, first {path}" in message for path, (_, reason) in BAD.items())
    assert not (tmp_path / "set" / "manifest.json").exists()
    (named,) = re.findall(r"see file://([^;]*);", message)
    assert sorted(pq.read_table(named)["path"].to_pylist()) == sorted(BAD)
    # Just enough is enough; no shard is written again.
    shards = {path.stat().st_ino for path in (tmp_path / "set").rglob("attempts/*.parquet")}
    assert prepared(source, tmp_path / "set", max_bad_fraction=3 / 93).num_quarantined == 3
    assert {path.stat().st_ino for path in (tmp_path / "set").rglob("shard-*.parquet")} == shards


def test_a_class_without_a_usable_training_image_is_no_data_set(source: Path, tmp_path: Path) -> None:
    for path in (source / "ant").iterdir():
        path.write_bytes(b"rotten")
    message = refusal(DataError, prepared, source, tmp_path / "set", max_bad_fraction=1.0)
    assert "class 'ant' has no usable training image" in message
    assert not (tmp_path / "set" / "manifest.json").exists()


def test_a_split_without_a_usable_image_is_no_data_set(photos: Path, tmp_path: Path) -> None:
    shutil.copytree(photos, tmp_path / "source" / "train")
    (tmp_path / "source" / "test" / "ant").mkdir(parents=True)
    (tmp_path / "source" / "test" / "ant" / "1.jpg").write_bytes(b"rotten")
    message = refusal(DataError, prepared, tmp_path / "source", tmp_path / "set", max_bad_fraction=1.0)
    assert "split 'test' has no usable image" in message
    assert not (tmp_path / "set" / "manifest.json").exists()


def test_a_shard_that_lost_all_its_inputs_is_left_out(source: Path, tmp_path: Path) -> None:
    job = started(source, tmp_path / "set", max_bad_fraction=1.0)
    table = pq.ParquetFile(Path(job.url.removeprefix("file://")) / "listing.parquet").read_row_group(0)
    for path, size in zip(table["key"].to_pylist(), table["size_bytes"].to_pylist(), strict=True):
        (source / path).write_bytes(b"rotten".ljust(size))
    manifest = prepare.finish(job, [prepare.write_shard(job, index) for index in range(len(job.shards))])
    assert "train/shard-00000.parquet" not in {shard.path for shard in manifest.splits["train"].shards}
    assert not (tmp_path / "set" / "train" / "shard-00000.parquet").exists()
    assert manifest.num_quarantined == table.num_rows
    assert manifest.num_rows + table.num_rows == 90


def test_lost_or_doubled_results_are_noticed_and_no_manifest_is_written(source: Path, tmp_path: Path) -> None:
    job = started(source, tmp_path / "set")
    results = [prepare.write_shard(job, index) for index in range(len(job.shards))]
    renamed = dataclasses.replace(
        results[0], shard=dataclasses.replace(results[0].shard, path="train/shard-09999.parquet")
    )
    for wrong in (results[1:], [*results, results[0]], [renamed, *results[1:]], []):
        assert "shards were written; expected" in refusal(DataError, prepare.finish, job, wrong)
        assert not (tmp_path / "set" / "manifest.json").exists()
    assert prepare.finish(job, results).num_rows == 90


def test_a_photo_that_vanishes_or_changes_after_it_was_listed_is_quarantined(source: Path, tmp_path: Path) -> None:
    def run_tasks(_: str, function: Any, numbers: Any) -> list[Any]:
        (source / "ant" / "007.jpg").unlink(missing_ok=True)
        (source / "bee" / "008.jpg").write_bytes(b"another size")
        return [function(number) for number in numbers]

    manifest = prepare.run(config(source, tmp_path / "set", max_bad_fraction=0.1), run_tasks)
    assert manifest is not None
    rows = pq.read_table(tmp_path / "set" / "quarantine.parquet").to_pylist()
    assert sorted((row["path"], row["reason"]) for row in rows) == [
        ("ant/007.jpg", "not_found"),
        ("bee/008.jpg", "changed"),
    ]
    assert manifest.num_rows == 88


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_a_photo_that_cannot_be_read_stops_the_job_and_is_named(source: Path, tmp_path: Path) -> None:
    job = started(source, tmp_path / "set")
    (source / "ant" / "007.jpg").unlink()
    (source / "ant" / "007.jpg").mkdir()  # for root, permissions are none
    with pytest.raises(CvdistError, match=r"ant/007\.jpg"):
        for index in range(len(job.shards)):
            prepare.write_shard(job, index)
    gc.collect()  # an unfinished writer must not complain when it is collected
    assert not (tmp_path / "set" / "manifest.json").exists()
    # What stays are the shards before it; of the failed one, nothing.
    assert len(list((tmp_path / "set").rglob("attempts/*"))) == len(list((tmp_path / "set").rglob("done/*")))


@pytest.mark.parametrize("large", [True, False])
def test_shards_are_neither_empty_nor_more_than_rows(large: bool, source: Path, tmp_path: Path) -> None:
    # Raw images of 200 kB into shards of 64 kB: one row each; tiny ones all into one.
    settings = (
        {"image_size": 256, "codec": "raw", "split": "train=1"} if large else {"image_size": 8, "split": "train=1"}
    )
    for path in sorted(source.rglob("*.jpg"))[::4]:
        path.unlink()
    manifest = prepared(source, tmp_path / "set", **settings)
    rows = [shard.num_rows for shard in manifest.splits["train"].shards]
    assert rows == ([1] * 67 if large else [67])


@pytest.mark.parametrize("inside", ["source/target", "source", "."])
def test_source_and_target_may_not_lie_in_each_other(inside: str, source: Path, tmp_path: Path) -> None:
    before = content(tmp_path)
    message = refusal(ConfigError, prepare.run, config(source, tmp_path / inside))
    assert message.startswith("target_url: ")
    assert content(tmp_path) == before
    # A name that only begins like the source's is another folder.
    assert prepared(source, tmp_path / "source-set").num_rows == 90


def test_urls_are_taken_in_any_spelling(source: Path, tmp_path: Path) -> None:
    plain = prepared(source, tmp_path / "set")
    spelled = PrepareConfig(source_url=f"file://{source}//./", target_url=f"file://{tmp_path}/x/../set/", **SMALL)  # type: ignore[arg-type]
    assert prepare.start(spelled) == plain


def test_a_url_without_scheme_is_refused(source: Path, tmp_path: Path) -> None:
    given = config(source, tmp_path / "set")
    for field in ("source_url", "target_url"):
        wrong = from_dict(PrepareConfig, {**dump(given), field: "photos/train"}, "test")
        message = refusal(ConfigError, prepare.run, wrong)
        assert message.startswith(
            f"{field}: 'photos/train' has no scheme; expected file:///path or hdfs://host:port/path"
        )


def test_a_source_that_is_not_there_is_named(tmp_path: Path) -> None:
    message = refusal(DataError, prepare.run, config(tmp_path / "absent", tmp_path / "set"))
    assert message.startswith(f"file://{tmp_path}/absent does not exist")
    assert not (tmp_path / "set").exists()


def test_odd_file_names_are_kept_to_the_letter(tmp_path: Path) -> None:
    class_tree(tmp_path / "photos", {"b": 9}, height=32, width=32)
    names = ["a b.jpg", "ü.jpg", "u\u0308.jpg", "100%.jpg", "%41.jpg", "#1?.jpg", "a:b.jpg", "日本.jpg", "'\"&.jpg"]
    photos = sorted((tmp_path / "photos" / "b").iterdir())
    for folder in ("ca ts: #1%", "dögs"):
        (tmp_path / "source" / folder).mkdir(parents=True)
        for name, photo in zip(names, photos, strict=True):
            shutil.copy(photo, tmp_path / "source" / folder / name)
    manifest = prepared(tmp_path / "source", tmp_path / "set with % and #")
    assert manifest.classes == ("ca ts: #1%", "dögs")
    keys = []
    for shard in (shard for split in manifest.splits.values() for shard in split.shards):
        for row in pq.read_table(tmp_path / "set with % and #" / shard.path).to_pylist():
            keys.append(row["key"])
            assert row["source_sha256"] == hashlib.sha256((tmp_path / "source" / row["key"]).read_bytes()).hexdigest()
    assert sorted(keys) == sorted(f"{folder}/{name}" for folder in manifest.classes for name in names)


KILLED = """
import os, signal, sys
from cvdist import finish, outline, prepare, shards, storage, tasks
from cvdist.config import PrepareConfig, from_dict
import json

def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)

point, settings = sys.argv[1], json.loads(sys.argv[2])
if point == "with the lock alone":
    prepare.start = die
if point == "before the job is written":
    prepare.write_state = die
if point == "between the listing and its note":
    real_state, states = prepare.write_state, []
    prepare.write_state = lambda *args: (states.append(0), die() if len(states) == 2 else real_state(*args))
if point == "in the middle of a shard":
    add, rows = shards.ShardWriter.add, []
    def add_some(writer, row):
        rows.append(row)
        if len(rows) == 20:
            writer._stream._stream._send()  # what has been written is on the disk, under a temporary name
            die()
        add(writer, row)
    shards.ShardWriter.add = add_some
if point == "between a shard and its ledger":
    tasks.write_ledger = die
if point == "in the middle of the placing":
    real_rename, renames = storage.rename, []
    def rename(*args, **more):
        real_rename(*args, **more)
        renames.append(0)
        if len(renames) == 2:
            die()
    real_place = finish.place_shards
    finish.place_shards = lambda *args: (setattr(storage, "rename", rename), real_place(*args))
if point == "before the manifest":
    finish.write_manifest = die
real = finish.write_manifest
if point == "in the middle of the manifest":
    finish.write_manifest = lambda *args, **more: (setattr(storage, "_move", die), real(*args, **more))
if point == "behind the manifest":
    finish.write_manifest = lambda *args, **more: (real(*args, **more), die())

def run_tasks(_, function, numbers):
    results = []
    for number in numbers:
        results.append(function(number))
        if point == "between two shards":
            die()
    return results

prepare.run(from_dict(PrepareConfig, settings, "test"), run_tasks)
"""


@pytest.mark.parametrize(
    "point",
    [
        "with the lock alone",
        "before the job is written",
        "between the listing and its note",
        "between two shards",
        "in the middle of a shard",
        "between a shard and its ledger",
        "in the middle of the placing",
        "before the manifest",
        "in the middle of the manifest",
        "behind the manifest",
    ],
)
def test_a_run_killed_at_any_point_ends_after_a_rerun_with_the_same_bytes(
    point: str, source: Path, tmp_path: Path
) -> None:
    add_bad(source)
    settings = {"max_bad_fraction": 0.1, "shard_bytes": 65536}
    prepared(source, tmp_path / "undisturbed", **settings)
    given = dataclasses.asdict(config(source, tmp_path / "killed", **settings))
    environment = {**os.environ, "PYTHONPATH": str(Path(prepare.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", KILLED, point, json.dumps(given)], capture_output=True, env=environment
    )
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    left = content(tmp_path / "killed")
    assert ("manifest.json" in left) == (point == "behind the manifest")
    for place, name in (("a shard", "/attempts/.train-00000."), ("the manifest", ".manifest.json.")):
        if point == f"in the middle of {place}":
            assert any(name in found and found.endswith(".tmp") for found in left)

    prepared(source, tmp_path / "killed", **settings)
    assert content(tmp_path / "killed") == content(tmp_path / "undisturbed")
    assert not (tmp_path / "killed" / "_prepare").exists()
