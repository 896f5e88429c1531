"""The listing: the same shuffle, splits and shards however the source was listed, in the same memory for any number of inputs."""

from __future__ import annotations

import collections
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cvdist.config import PrepareConfig
from cvdist.errors import ConfigError, CvdistError, DataError
from cvdist.leaks import find_leaks
from cvdist.listing import SPLITS, Assigner, Spool, cut, new_digest, running_ranks, select
from cvdist.sources import ROWS

NOTHING = pa.schema([])


def config(**settings: Any) -> PrepareConfig:
    return PrepareConfig(source_url="file:///source", target_url="file:///target", **settings)


def table(rows: Sequence[dict[str, Any]], extra: pa.Schema = NOTHING) -> pa.Table:
    return pa.Table.from_pylist(list(rows), schema=pa.schema([*ROWS, *extra]))


def photos(classes: dict[str, int], **columns: Any) -> list[dict[str, Any]]:
    return [
        {"key": f"{name}/{index}.jpg", "class": name, "size_bytes": 100, **columns}
        for name, count in classes.items()
        for index in range(count)
    ]


def spooled(folder: Path, rows: Sequence[dict[str, Any]], extra: pa.Schema = NOTHING, seed: int = 0) -> Spool:
    spool = Spool(folder, seed, extra)
    for start in range(0, len(rows), 1000):
        spool.add(table(rows[start : start + 1000], extra))
    return spool


def assigned(
    folder: Path, rows: Sequence[dict[str, Any]], extra: pa.Schema = NOTHING, **settings: Any
) -> list[dict[str, Any]]:
    spool, given_config = spooled(folder, rows, extra), config(**settings)
    assigner = Assigner(spool, select(spool, given_config), given_config)
    return [row for part in assigner.tables() for row in part.to_pylist()]


def refusal(kind: type[CvdistError], function: Any, *args: Any, **settings: Any) -> str:
    with pytest.raises(kind) as caught:
        function(*args, **settings)
    assert "; expected " in str(caught.value)
    return str(caught.value)


def split_counts(rows: list[dict[str, Any]]) -> dict[tuple[str, str], int]:
    return dict(collections.Counter((row["class"], row["split"]) for row in rows))


def test_the_order_does_not_depend_on_how_the_source_was_listed(tmp_path: Path) -> None:
    rows = photos({"ant": 3000, "bee": 2000})
    shuffled = [rows[index] for index in np.random.default_rng(0).permutation(len(rows))]
    orders, digests = [], []
    for name, given_rows in (("one", rows), ("two", shuffled)):
        spool = spooled(tmp_path / name, given_rows)
        orders.append([key for part in spool.tables() for key in part["key"].to_pylist()])
        digest = new_digest("settings")
        spool.digest(digest)
        digests.append(digest.hexdigest())
    assert orders[0] == orders[1]
    assert digests[0] == digests[1]
    assert sorted(orders[0]) == sorted(row["key"] for row in rows)
    assert orders[0] != sorted(orders[0])


def test_one_more_input_changes_the_digest_and_moves_no_other(tmp_path: Path) -> None:
    rows = photos({"ant": 300, "bee": 200})
    one, two = spooled(tmp_path / "one", rows[1:]), spooled(tmp_path / "two", rows)
    first, second = new_digest(), new_digest()
    one.digest(first)
    two.digest(second)
    assert first.hexdigest() != second.hexdigest()
    keys = [key for part in two.tables() for key in part["key"].to_pylist()]
    assert [key for key in keys if key != "ant/0.jpg"] == [
        key for part in one.tables() for key in part["key"].to_pylist()
    ]


def test_another_seed_is_another_order(tmp_path: Path) -> None:
    rows = photos({"ant": 30, "bee": 20})
    orders = [
        [key for part in spooled(tmp_path / str(seed), rows, seed=seed).tables() for key in part["key"].to_pylist()]
        for seed in (0, 1)
    ]
    assert orders[0] != orders[1]


def test_an_input_that_is_listed_twice_is_named(tmp_path: Path) -> None:
    spool = spooled(tmp_path / "spool", [*photos({"ant": 3000, "bee": 9}), {"key": "ant/7.jpg", "class": "bee"}])
    assert "ant/7.jpg: is listed twice" in refusal(DataError, list, spool.tables())


def test_every_class_is_split_alike(tmp_path: Path) -> None:
    rows = assigned(tmp_path / "spool", photos({"ant": 1000, "bee": 250, "cow": 7}), split="train=0.8,val=0.1,test=0.1")
    assert split_counts(rows) == {
        ("ant", "train"): 800, ("ant", "val"): 100, ("ant", "test"): 100,
        ("bee", "train"): 200, ("bee", "val"): 25, ("bee", "test"): 25,
        ("cow", "train"): 6, ("cow", "test"): 1,
    }  # fmt: skip
    assert {row["class"]: row["label"] for row in rows} == {"ant": 0, "bee": 1, "cow": 2}


def test_a_balanced_subset_is_split_like_the_courses_do(tmp_path: Path) -> None:
    rows = photos({"cat": 12500, "dog": 12500})
    chosen = assigned(tmp_path / "spool", rows, limit_per_class=2000, split="train=0.5,val=0.25,test=0.25")
    per_split = collections.Counter(row["split"] for row in chosen)
    assert per_split == {"train": 2000, "val": 1000, "test": 1000}
    assert set(split_counts(chosen).values()) == {1000, 500}


def test_given_splits_are_kept_and_limited_one_by_one(tmp_path: Path) -> None:
    rows = [
        {**row, "split": split, "key": f"{split}/{row['key']}"}
        for split in ("train", "test")
        for row in photos({"a": 30, "b": 5})
    ]
    assert split_counts(assigned(tmp_path / "all", rows)) == {
        ("a", "train"): 30, ("b", "train"): 5, ("a", "test"): 30, ("b", "test"): 5,
    }  # fmt: skip
    assert split_counts(assigned(tmp_path / "some", rows, limit_per_class=8)) == {
        ("a", "train"): 8, ("b", "train"): 5, ("a", "test"): 8, ("b", "test"): 5,
    }  # fmt: skip
    dealt = split_counts(assigned(tmp_path / "anew", rows, split_by="ratio", split="train=0.5,val=0.5"))
    assert dealt == {("a", "train"): 30, ("a", "val"): 30, ("b", "train"): 5, ("b", "val"): 5}


def test_a_source_that_names_some_splits_is_refused(tmp_path: Path) -> None:
    rows = photos({"a": 3, "b": 3})
    rows[0]["split"] = "test"
    assert "some inputs have no split" in refusal(DataError, assigned, tmp_path / "spool", rows)


def test_copies_stay_together_when_split_by_content(tmp_path: Path) -> None:
    rows = [{**row, "sha256": f"{index % 1000:064x}"} for index, row in enumerate(photos({"a": 1500, "b": 1500}))]
    chosen = assigned(tmp_path / "spool", rows, split_by="content", split="train=0.7,test=0.3")
    places = collections.defaultdict(set)
    for row in chosen:
        places[row["sha256"]].add(row["split"])
    assert {len(splits) for splits in places.values()} == {1}
    assert 0.25 < sum(row["split"] == "test" for row in chosen) / len(chosen) < 0.35


def test_a_group_stays_together_and_new_inputs_move_nobody(tmp_path: Path) -> None:
    rows = [{**row, "group": f"patient {index % 300}"} for index, row in enumerate(photos({"a": 900, "b": 900}))]
    settings = {"split_by": "group", "group_column": "patient", "split": "train=0.7,test=0.3"}
    splits = {}
    for name, given_rows in (("few", rows[::2]), ("all", rows)):
        for row, group in (
            (row, next(r["group"] for r in rows if r["key"] == row["key"]))
            for row in assigned(tmp_path / name, given_rows, **settings)[:200]
        ):
            assert splits.setdefault(group, row["split"]) == row["split"]
    assert set(splits.values()) == {"train", "test"}
    rows[3]["group"] = None
    assert "some rows have no 'patient'" in refusal(DataError, assigned, tmp_path / "none", rows, **settings)


def test_only_the_classes_asked_for_are_taken(tmp_path: Path) -> None:
    spool, given_config = (
        spooled(tmp_path / "spool", photos({"ant": 5, "bee": 4, "cow": 3})),
        config(classes="cow, ant"),
    )
    assigner = Assigner(spool, select(spool, given_config), given_config)
    assert {row["class"] for part in assigner.tables() for row in part.to_pylist()} == {"ant", "cow"}
    assert assigner.skipped == {"bee": 4}
    wrong = config(classes="ant,bear")
    assert "classes: bear not found" in refusal(ConfigError, select, spool, wrong)


def test_numbers_as_names_are_sorted_as_numbers(tmp_path: Path) -> None:
    spool = spooled(tmp_path / "spool", photos({str(label): 2 for label in range(12)}))
    assert select(spool, config()).classes == tuple(str(label) for label in range(12))


@pytest.mark.parametrize("classes", [{}, {"ant": 3}])
def test_fewer_than_two_classes_are_refused(classes: dict[str, int], tmp_path: Path) -> None:
    assert "expected at least two" in refusal(DataError, select, spooled(tmp_path / "spool", photos(classes)), config())


def test_rejected_inputs_stay_in_the_stream_and_take_no_place(tmp_path: Path) -> None:
    rows = photos({"a": 10, "b": 10})
    rows += [
        {"key": "x", "reason": "no_label", "detail": "nothing"},
        {"key": "y", "class": "z", "reason": "link", "detail": "a link"},
    ]
    chosen = assigned(tmp_path / "spool", rows, limit_per_class=10)
    assert len(chosen) == 22
    rejected = {row["key"]: (row["reason"], row["label"], row["split"]) for row in chosen if row["reason"]}
    assert rejected == {"x": ("no_label", None, None), "y": ("link", None, None)}


def test_further_labels_get_their_kind_from_their_values(tmp_path: Path) -> None:
    extra = pa.schema(
        [
            ("age", pa.float64()),
            ("smiles", pa.int64()),
            ("hair", pa.string()),
            ("stars", pa.int64()),
            ("is_new", pa.bool_()),
        ]
    )
    values = [
        {"age": 30.5, "smiles": 1, "hair": "red", "stars": 10, "is_new": True},
        {"age": None, "smiles": None, "hair": None, "stars": None, "is_new": None},
        {"age": 7.0, "smiles": 0, "hair": "black", "stars": 2, "is_new": False},
        {"age": 1.0, "smiles": 0, "hair": "red", "stars": 3, "is_new": False},
    ]
    rows = [{**row, **more} for row, more in zip(photos({"a": 2, "b": 2}), values, strict=True)]
    spool = spooled(tmp_path / "spool", rows, extra)
    selection = select(spool, config())
    assert {target.name: (target.kind, target.classes) for target in selection.targets} == {
        "age": ("regression", ()),
        "smiles": ("binary", ()),
        "hair": ("multiclass", ("black", "red")),
        "stars": ("multiclass", ("2", "3", "10")),
        "is_new": ("binary", ()),
    }
    found = {row["key"]: row for part in Assigner(spool, selection, config()).tables() for row in part.to_pylist()}
    assert [found[row["key"]]["smiles"] for row in rows] == [1, -1, 0, 0]
    assert [found[row["key"]]["hair"] for row in rows] == [1, -1, 0, 1]
    assert [found[row["key"]]["stars"] for row in rows] == [2, -1, 0, 1]
    assert [found[row["key"]]["is_new"] for row in rows] == [1, -1, 0, 0]
    assert np.isnan(found[rows[1]["key"]]["age"])
    assert select(spool, config(target_kinds="stars=regression")).targets[3].kind == "regression"
    assert "does not fit" in refusal(ConfigError, select, spool, config(target_kinds="age=multiclass"))
    assert "is binary and holds" in refusal(ConfigError, select, spool, config(target_kinds="stars=binary"))
    assert "holds text" in refusal(ConfigError, select, spool, config(target_kinds="hair=regression"))


@pytest.mark.parametrize("name", ["image", "label", "key", "url", "order"])
def test_a_label_column_with_a_name_of_ours_is_refused(name: str, tmp_path: Path) -> None:
    assert f"{name!r} is a name of cvdist's own" in refusal(
        DataError, Spool, tmp_path / "spool", 0, pa.schema([(name, pa.string())])
    )


def leaks(
    folder: Path, rows: Sequence[dict[str, Any]], held: Sequence[dict[str, Any]] = (), on_leak: Any = "drop"
) -> set[str]:
    names = ["sha256", "key", "split", "reason"]
    tables = [
        pa.table({name: pa.array([row.get(name) for row in part], pa.string()) for name in names})
        for part in (rows, held)
    ]
    return set(find_leaks([tables[0]], [tables[1]], folder, on_leak))


def test_of_a_file_in_several_splits_the_copy_in_test_stays(tmp_path: Path) -> None:
    rows = [
        {"sha256": "a" * 64, "key": "1", "split": "train"},
        {"sha256": "a" * 64, "key": "2", "split": "test"},
        {"sha256": "a" * 64, "key": "3", "split": "val"},
        {"sha256": "a" * 64, "key": "4", "split": "test"},
        {"sha256": "b" * 64, "key": "5", "split": "train"},
        {"sha256": "b" * 64, "key": "6", "split": "train"},
        {"sha256": "c" * 64, "key": "7", "split": "train"},
    ]
    assert leaks(tmp_path / "new", rows) == {"1", "3"}
    held = [{"sha256": "a" * 64, "key": "0", "split": "train"}]
    assert leaks(tmp_path / "held", rows, held) == {"2", "3", "4"}
    message = refusal(DataError, leaks, tmp_path / "fail", rows, on_leak="fail")
    assert "2 files are in more than one split: 1 is the same file as 4 in test; 3 is" in message


def test_shards_are_cut_evenly_and_hold_every_row_once(tmp_path: Path) -> None:
    rows = assigned(tmp_path / "spool", photos({"a": 700, "b": 333}), split="train=0.9,test=0.1")
    counts = collections.Counter(row["split"] for row in rows)
    tables = [pa.Table.from_pylist(rows[start : start + 97]) for start in range(0, len(rows), 97)]
    parts = list(cut(tables, counts, {"train": 7, "test": 3}))
    assert [(split, number) for split, number, _ in parts if split == "train"] == [
        ("train", number) for number in range(7)
    ]
    sizes = {split: [part.num_rows for name, _, part in parts if name == split] for split in counts}
    assert all(max(each) - min(each) <= 1 for each in sizes.values())
    for split in counts:
        keys = [key for name, _, part in parts if name == split for key in part["key"].to_pylist()]
        assert keys == [row["key"] for row in rows if row["split"] == split]


@given(st.lists(st.lists(st.integers(0, 4), max_size=30), max_size=6))
def test_ranks_count_what_came_before(batches: list[list[int]]) -> None:
    seen, counted = np.zeros(5, np.int64), collections.Counter[int]()
    for batch in batches:
        expected = []
        for group in batch:
            expected.append(counted[group])
            counted[group] += 1
        assert running_ranks(np.array(batch, np.int64), seen).tolist() == expected


MEMORY = r"""
import pathlib, re, sys
import pyarrow as pa
from cvdist.config import PrepareConfig
from cvdist.leaks import find_leaks
from cvdist.listing import Assigner, Spool, cut, new_digest, select
from cvdist.sources import ROWS

num_rows, folder = int(sys.argv[1]), pathlib.Path(sys.argv[2])
config = PrepareConfig(source_url="file:///source", target_url="file:///target")
spool = Spool(folder, 0, pa.schema([]))
for start in range(0, num_rows, 8192):
    numbers = range(start, min(start + 8192, num_rows))
    names = [f"class{number % 1000:04d}" for number in numbers]
    keys = [f"{name}/a_rather_long_name_of_a_photo_{number:09d}.jpg" for name, number in zip(names, numbers)]
    columns = {field.name: pa.nulls(len(names), field.type) for field in ROWS}
    spool.add(pa.table({**columns, "key": keys, "class": names}, schema=ROWS))
spool.digest(new_digest())
assigner = Assigner(spool, select(spool, config), config)
counts = {"train": num_rows * 8 // 10, "val": num_rows // 10, "test": num_rows // 10}
total = sum(part.num_rows for _, _, part in cut(assigner.tables(), counts, {"train": num_rows // 4000 + 1, "val": 2, "test": 2}))
assert total == num_rows, total
# Not ru_maxrss, which begins at what the parent had.
print(re.search(r"VmHWM:\s+(\d+) kB", pathlib.Path("/proc/self/status").read_text()).group(1))
"""


@pytest.mark.timeout(240)
def test_a_million_inputs_take_the_memory_of_ten_thousand(tmp_path: Path) -> None:
    peaks = []
    for num_rows in (10_000, 1_000_000):
        command = [sys.executable, "-c", MEMORY, str(num_rows), str(tmp_path / str(num_rows))]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        peaks.append(int(done.stdout) / 1024)
    assert peaks[1] - peaks[0] < 100, peaks
    assert peaks[1] < 350, peaks


def test_a_pass_may_be_repeated_to_the_same_effect(tmp_path: Path) -> None:
    spool, given_config = spooled(tmp_path / "spool", photos({"a": 100, "b": 50})), config(limit_per_class=40)
    assigner = Assigner(spool, select(spool, given_config), given_config)
    first = [part.to_pylist() for part in assigner.tables()]
    skipped = dict(assigner.skipped)
    assert [part.to_pylist() for part in assigner.tables()] == first
    assert dict(assigner.skipped) == skipped == {"a": 60, "b": 10}
    assert set(SPLITS) == {row["split"] for part in first for row in part}
