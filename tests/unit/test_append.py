"""What is more than one preparation: images added later, the same photo in two places, and a run that only says what it would do."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from cvdist import prepare
from cvdist.config import PrepareConfig
from cvdist.errors import ConfigError, DataError
from cvdist.proof import audit_here
from cvdist.shards import Manifest, read_manifest
from tests.made_data import class_tree
from tests.submit import reasons_of, rows_of

SMALL = {"image_size": 32, "row_group_bytes": 16384, "shard_bytes": 65536}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return class_tree(tmp_path / "source", {"ant": 40, "bee": 50}, height=40, width=52)


def config(source: Path, target: Path, **settings: Any) -> PrepareConfig:
    return PrepareConfig(source_url=f"file://{source}", target_url=f"file://{target}", **{**SMALL, **settings})


def prepared(source: Path, target: Path, **settings: Any) -> Manifest:
    manifest = prepare.run(config(source, target, **settings))
    assert manifest is not None
    return manifest


def add_new(source: Path, *, count: int = 20) -> set[str]:
    """Adds photos; returns their keys."""
    fresh = class_tree(source.parent / "fresh", {"ant": count, "bee": count}, height=40, width=52, seed=9)
    for path in sorted(fresh.rglob("*.jpg")):
        shutil.move(path, source / path.parent.name / f"new-{path.name}")
    return {f"{name}/new-{index:03d}.jpg" for name in ("ant", "bee") for index in range(count)}


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_appending_adds_new_shards_and_leaves_the_old_ones_as_they_are(source: Path, tmp_path: Path) -> None:
    (source / "ant" / "bad.jpg").write_text("no photo")
    before = prepared(source, tmp_path / "set", max_bad_fraction=0.1)
    old = {path: data for path, data in files(tmp_path / "set").items() if "shard-" in path}
    new = add_new(source)
    (source / "bee" / "worse.jpg").write_text("no photo either")
    after = prepared(source, tmp_path / "set", max_bad_fraction=0.1, append=True)
    assert after == read_manifest(f"file://{tmp_path}/set")
    now = files(tmp_path / "set")
    assert {path: now[path] for path in old} == old
    assert len([path for path in now if "shard-" in path]) > len(old)
    rows = rows_of(f"file://{tmp_path}/set", after)
    assert set(rows) == {str(path.relative_to(source)) for path in source.rglob("*.jpg")} - {
        "ant/bad.jpg",
        "bee/worse.jpg",
    }
    assert {rows[key]["split"] for key in new} == {"train", "val", "test"}
    assert (after.num_inputs, after.num_rows, after.num_quarantined) == (132, 130, 2)
    assert reasons_of(f"file://{tmp_path}/set", after) == {
        "ant/bad.jpg": "not_an_image",
        "bee/worse.jpg": "not_an_image",
    }
    for name, split in before.splits.items():
        assert after.splits[name].shards[: len(split.shards)] == split.shards
    assert after.generations[0] == before.digest
    assert len(after.generations) == 2
    assert json.loads(now["manifests/0001.json"])["digest"] == before.digest
    assert not any(path.startswith("_prepare") for path in now)
    assert audit_here(f"file://{tmp_path}/set", after).num_problems == 0


def test_appending_what_is_there_already_changes_nothing(source: Path, tmp_path: Path) -> None:
    prepared(source, tmp_path / "set")
    add_new(source)
    after = prepared(source, tmp_path / "set", append=True)
    before = files(tmp_path / "set")
    assert prepared(source, tmp_path / "set", append=True) == after
    assert files(tmp_path / "set") == before


def test_appending_to_nothing_is_a_first_preparation(source: Path, tmp_path: Path) -> None:
    assert prepared(source, tmp_path / "set", append=True) == prepared(source, tmp_path / "plain")
    assert files(tmp_path / "set") == files(tmp_path / "plain")


def test_appending_with_other_settings_classes_or_limits_is_refused(source: Path, tmp_path: Path) -> None:
    prepared(source, tmp_path / "set")
    before = files(tmp_path / "set")
    add_new(source)
    with pytest.raises(DataError, match=r"quality 90 there, 50 here"):
        prepared(source, tmp_path / "set", append=True, quality=50)
    with pytest.raises(ConfigError, match=r"append: limit_per_class"):
        prepared(source, tmp_path / "set", append=True, limit_per_class=9)
    class_tree(source, {"cow": 3})
    with pytest.raises(DataError, match=r"holds classes that .* does not know: cow; expected"):
        prepared(source, tmp_path / "set", append=True)
    assert files(tmp_path / "set") == before


def test_an_interrupted_append_goes_on(source: Path, tmp_path: Path) -> None:
    for name in ("set", "undisturbed"):
        prepared(source, tmp_path / name)
    add_new(source, count=60)
    prepared(source, tmp_path / "undisturbed", append=True)

    def stop_after_one(_: str, function: Any, numbers: Any) -> list[Any]:
        function(numbers[0])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare.run(config(source, tmp_path / "set", append=True), stop_after_one)
    assert read_manifest(f"file://{tmp_path}/set").num_rows == 90  # the data set stays what it was
    lines: list[str] = []
    prepare.run(config(source, tmp_path / "set", append=True), say=lines.append)
    assert any("are finished already" in line for line in lines)
    assert files(tmp_path / "set") == files(tmp_path / "undisturbed")


def copies(source: Path) -> None:
    """Puts photos of train into test, another class, and beside themselves."""
    for split in ("train", "test"):
        class_tree(source / split, {"ant": 12, "bee": 12}, seed=len(split))
    shutil.copy(source / "train/ant/000.jpg", source / "test/ant/copy of 0.jpg")
    shutil.copy(source / "train/ant/001.jpg", source / "train/bee/copy of 1.jpg")
    shutil.copy(source / "train/ant/002.jpg", source / "train/ant/copy of 2.jpg")


def test_copies_are_kept_and_listed(tmp_path: Path) -> None:
    copies(tmp_path / "source")
    manifest = prepared(tmp_path / "source", tmp_path / "set")
    assert manifest.repeat_files == {"duplicates": 1, "leaks": 1, "conflicts": 1}
    found = {row["path"]: row for row in pq.read_table(tmp_path / "set" / "repeats.parquet").to_pylist()}
    kinds = {
        path: [kind for kind in ("duplicate", "leak", "conflict") if row[f"is_{kind}"]] for path, row in found.items()
    }
    assert kinds == {
        "train/ant/000.jpg": ["leak"], "test/ant/copy of 0.jpg": ["leak"],
        "train/ant/001.jpg": ["conflict"], "train/bee/copy of 1.jpg": ["conflict"],
        "train/ant/002.jpg": ["duplicate"], "train/ant/copy of 2.jpg": ["duplicate"],
    }  # fmt: skip
    assert "in more than one split | 1 |" in (tmp_path / "set" / "README.md").read_text()


def test_a_leak_is_dropped_from_train_and_is_no_bad_image(tmp_path: Path) -> None:
    copies(tmp_path / "source")
    manifest = prepared(tmp_path / "source", tmp_path / "set", on_leak="drop")  # 1 of 51 is more than max_bad_fraction
    assert reasons_of(f"file://{tmp_path}/set", manifest) == {"train/ant/000.jpg": "leak"}
    (row,) = pq.read_table(tmp_path / "set" / "quarantine.parquet").to_pylist()
    assert row["detail"] == "the same file as test/ant/copy of 0.jpg in test"
    assert manifest.repeat_files == {"duplicates": 1, "leaks": 0, "conflicts": 1}
    assert manifest.num_rows + manifest.num_quarantined == manifest.num_inputs == 51


def test_a_leak_fails_before_any_shard_is_written_and_the_target_stays_usable(tmp_path: Path) -> None:
    copies(tmp_path / "source")
    with pytest.raises(
        DataError, match=r"1 files are in more than one split: train/ant/000.jpg is the same file as test/ant/copy of 0"
    ):
        prepared(tmp_path / "source", tmp_path / "set", on_leak="fail")
    assert not (tmp_path / "set").exists()
    assert prepared(tmp_path / "source", tmp_path / "set", on_leak="drop").num_quarantined == 1


def test_a_leak_from_an_earlier_generation_is_dropped_from_the_new_one(tmp_path: Path) -> None:
    copies(tmp_path / "source")
    prepared(tmp_path / "source", tmp_path / "set", on_leak="drop")
    shutil.copy(tmp_path / "source/train/bee/003.jpg", tmp_path / "source/test/bee/new copy.jpg")
    shutil.copy(tmp_path / "source/train/bee/004.jpg", tmp_path / "source/train/bee/new twin.jpg")
    manifest = prepared(tmp_path / "source", tmp_path / "set", on_leak="drop", append=True)
    reasons = reasons_of(f"file://{tmp_path}/set", manifest)
    assert reasons == {"train/ant/000.jpg": "leak", "test/bee/new copy.jpg": "leak"}
    assert manifest.repeat_files["duplicates"] == 2


def test_copies_in_a_source_without_splits_stay_together_when_split_by_content(source: Path, tmp_path: Path) -> None:
    for index in range(40):
        shutil.copy(source / "ant" / f"{index:03d}.jpg", source / "ant" / f"copy of {index}.jpg")
    assert prepared(source, tmp_path / "ratio").repeat_files["leaks"] > 0
    manifest = prepared(source, tmp_path / "content", split_by="content")
    assert manifest.repeat_files["leaks"] == 0
    assert manifest.repeat_files["duplicates"] == 40


def test_a_dry_run_says_what_would_happen_and_writes_nothing(source: Path, tmp_path: Path) -> None:
    (source / "ant" / "notes.txt").write_text("skipped")
    before = files(tmp_path)
    lines: list[str] = []
    assert prepare.run(config(source, tmp_path / "set", dry_run=True), say=lines.append) is None
    assert files(tmp_path) == before
    assert not (tmp_path / "set").exists()
    text = "\n".join(lines)
    assert "91 inputs" in text
    assert "90 to be decoded, 0 rejected already, 1 skipped" in text
    estimated = {
        split: (int(rows), int(shards))
        for split, rows, shards in re.findall(r"(train|val|test) +(\d+) images, about (\d+) shards", text)
    }
    manifest = prepared(source, tmp_path / "set")
    assert estimated == {name: (split.num_rows, len(split.shards)) for name, split in manifest.splits.items()}


def test_progress_is_said_while_tasks_run(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cvdist import progress

    monkeypatch.setattr(progress, "EVERY_S", 0.01)
    lines: list[str] = []
    prepare.run(config(source, tmp_path / "set", max_bad_fraction=0.1), say=lines.append)
    found = [
        re.fullmatch(r"  (\d+) of 90 images \((\d+)%\), 0 quarantined, [\d,]+ images/s, (.*)", line) for line in lines
    ]
    done = [int(match.group(1)) for match in found if match]
    assert done == sorted(done)
    assert done, lines
    assert progress.duration(45) == "45 s"
    assert progress.duration(725) == "12 min 5 s"
    assert progress.duration(12000) == "3 h 20 min"
