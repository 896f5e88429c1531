"""Tables of paths: every row is an input or a reason; paths, types, splits, weights and groups mean what is written."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cvdist.errors import ConfigError
from tests.listed import listed, opened, refusal
from tests.made_layouts import write

KINDS = ["csv", "jsonl", "parquet"]
ROOT = Path(__file__).parents[2]
Columns = dict[str, list[Any]]


def table(folder: Path, kind: str, columns: Columns, name: str = "list") -> str:
    """Writes a table; CSV has nothing for None."""
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    path = folder / f"{name}.{kind}"
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "csv":
        lines = [",".join("" if v is None else str(v) for v in row.values()) for row in rows]
        path.write_text("\n".join([",".join(columns), *lines]) + "\n")
    elif kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        pq.write_table(pa.table(columns), path)
    return f"file://{path}"


@pytest.mark.parametrize("kind", KINDS)
class TestEveryKind:
    def test_a_path_is_a_url_or_absolute_or_relative_to_the_table(self, kind: str, tmp_path: Path) -> None:
        paths = [
            "a b.jpg",
            "deep/100%.jpg",
            "../up/#1.jpg",
            "/abs/ü.jpg",
            "hdfs://nn:8020/x/1.jpg",
            "c:d.jpg",
            "u\u0308.jpg",
        ]
        rows = listed(opened(table(tmp_path / "lists", kind, {"path": paths, "label": ["x"] * 7})))
        folder = f"file://{tmp_path}"
        assert [row["key"] for row in rows] == paths
        assert [row["url"] for row in rows] == [
            f"{folder}/lists/a b.jpg",
            f"{folder}/lists/deep/100%.jpg",
            f"{folder}/up/#1.jpg",
            "file:///abs/ü.jpg",
            "hdfs://nn:8020/x/1.jpg",
            f"{folder}/lists/c:d.jpg",
            f"{folder}/lists/u\u0308.jpg",
        ]
        assert {(row["reason"], row["size_bytes"], row["offset"]) for row in rows} == {(None, None, None)}

    def test_a_row_that_names_no_image_or_no_class_is_rejected_with_the_reason(self, kind: str, tmp_path: Path) -> None:
        columns: Columns = {
            "path": ["a", None, "b", "nosuch://x/1.jpg", "hdfs://h:1/a:b"],
            "label": ["x", "x", None, "x", "x"],
        }
        rows = listed(opened(table(tmp_path, kind, columns)))
        assert [row["reason"] for row in rows] == [None, "no_path", "no_label", "bad_path", "bad_path"]
        assert [bool(row["detail"]) for row in rows] == [False, True, True, True, True]
        assert len({row["key"] for row in rows}) == 5
        assert rows[1]["key"].endswith({"csv": ": line 3", "jsonl": ": line 2", "parquet": ": row 2"}[kind])

    def test_whole_numbers_are_names_of_classes(self, kind: str, tmp_path: Path) -> None:
        rows = listed(opened(table(tmp_path, kind, {"path": ["a", "b"], "label": [3, 12]})))
        assert [row["class"] for row in rows] == ["3", "12"]

    def test_fractions_are_no_classes(self, kind: str, tmp_path: Path) -> None:
        message = refusal(
            table(tmp_path, kind, {"path": ["a", "b"], "label": [1, 2.5] if kind != "parquet" else [1.0, 2.5]})
        )
        assert "column 'label' holds double; expected names or whole numbers" in message

    def test_other_columns_are_further_labels_of_their_own_types(self, kind: str, tmp_path: Path) -> None:
        columns: Columns = {
            "path": ["a", "b", "c"],
            "age": [1.5, None, 3.0],
            "label": ["x", "y", "x"],
            "legs": [4, 2, None],
            "wild": [True, False, None],
            "coat": ["red", "007", None],
            "weight": [1, 0.5, None],
        }
        source = opened(table(tmp_path, kind, columns))
        kinds = {"age": pa.float64(), "legs": pa.int64(), "wild": pa.bool_(), "coat": pa.string()}
        assert source.extra == pa.schema(list(kinds.items()))
        rows = listed(source)
        for name in kinds:
            assert [row[name] for row in rows] == columns[name]
        assert [row["weight"] for row in rows] == [1, 0.5, None]

    def test_label_columns_choose_the_class_and_the_further_labels(self, kind: str, tmp_path: Path) -> None:
        columns: Columns = {"file": ["a"], "breed": ["pug"], "label": ["dog"], "age": [3], "color": ["red"]}
        source = opened(table(tmp_path, kind, columns), label_columns="breed, age", image_column="file")
        assert source.extra == pa.schema([("age", pa.int64())])
        assert [(row["key"], row["class"], row["age"]) for row in listed(source)] == [("a", "pug", 3)]

    def test_the_split_column_says_the_split(self, kind: str, tmp_path: Path) -> None:
        columns: Columns = {
            "path": list("abcde"),
            "label": ["x"] * 5,
            "split": ["train", "val", "validation", "test", None],
        }
        rows = listed(opened(table(tmp_path, kind, columns)))
        assert [row["split"] for row in rows] == ["train", "val", "val", "test", None]

    @pytest.mark.parametrize("name, value", [("split", "dev"), ("weight", -1), ("weight", "heavy")])
    def test_a_value_that_cannot_be_is_named_with_its_line(
        self, kind: str, name: str, value: object, tmp_path: Path
    ) -> None:
        columns: Columns = {"path": ["a"] * 3, "label": ["x"] * 3, name: [None, None, value]}
        message = refusal(table(tmp_path, kind, columns))
        where = {"csv": "line 4", "jsonl": "line 3", "parquet": "row 3"}[kind]
        assert message.startswith(f"file://{tmp_path}/list.{kind}: {where}: the {name} is ")

    def test_the_group_column_is_read_and_is_no_label(self, kind: str, tmp_path: Path) -> None:
        columns: Columns = {"path": ["a", "b"], "label": ["x", "y"], "patient": [7, None]}
        source = opened(table(tmp_path, kind, columns), group_column="patient", split_by="group")
        assert source.extra.names == []
        assert [row["group"] for row in listed(source)] == ["7", None]

    @pytest.mark.parametrize(
        "columns, settings, missing",
        [
            ({"path": ["a"], "class": ["x"]}, {}, "has no column 'label', but path, class"),
            ({"where": ["a"], "label": ["x"]}, {}, "has no column of paths among where, label"),
            ({"file": ["a"], "image": ["b"], "label": ["x"]}, {}, "several columns of paths (file, image)"),
            ({"path": ["a"], "label": ["x"]}, {"image_column": "url"}, "has no column 'url', but path, label"),
            ({"path": ["a"], "label": ["x"]}, {"label_columns": "label,age"}, "has no column 'age', but path, label"),
            (
                {"path": ["a"], "label": ["x"]},
                {"group_column": "g", "split_by": "group"},
                "has no column 'g', but path",
            ),
        ],
    )
    def test_a_missing_column_is_named(
        self, kind: str, columns: Columns, settings: dict[str, str], missing: str, tmp_path: Path
    ) -> None:
        assert missing in refusal(table(tmp_path, kind, columns), **settings)

    def test_tables_in_a_folder_are_read_as_one_and_their_names_say_the_split(self, kind: str, tmp_path: Path) -> None:
        table(tmp_path, kind, {"path": ["a", "b"], "label": [1, 2], "n": [1, 2]}, "train")
        table(tmp_path, kind, {"path": ["c"], "label": [1], "n": [0.5]}, "val")
        source = opened(f"file://{tmp_path}")
        assert source.extra.field("n").type == pa.float64()
        rows = [(row["key"], row["class"], row["split"], row["n"]) for row in listed(source)]
        assert rows == [("a", "1", "train", 1.0), ("b", "2", "train", 2.0), ("c", "1", "val", 0.5)]

    def test_tables_of_different_columns_are_refused(self, kind: str, tmp_path: Path) -> None:
        table(tmp_path, kind, {"path": ["a"], "label": [1]}, "train")
        table(tmp_path, kind, {"path": ["c"], "label": [1], "n": [5]}, "val")
        assert "has the columns path, label, n; expected path, label as in" in refusal(f"file://{tmp_path}")


@pytest.mark.parametrize("text", ["a,a", "a,,b", "", "\n"])
def test_a_csv_without_a_header_is_refused(text: str, tmp_path: Path) -> None:
    write(tmp_path, [("list.csv", text.encode())])
    assert "list.csv: the header is" in refusal(f"file://{tmp_path}/list.csv")


@pytest.mark.parametrize(
    "data, named",
    [
        (b"path,label\na,x\nb\n", "line 3 has 1 values; expected 2"),
        (b"path,label\na,b,x\n", "line 2 has 3 values; expected 2"),
        (b'path,label\n"a,x\nb,x\n', "unexpected end of data"),
        (b"path,label\n\xff.jpg,x\n", "no UTF-8"),
    ],
)
def test_a_broken_csv_is_refused_with_the_place(data: bytes, named: str, tmp_path: Path) -> None:
    write(tmp_path, [("list.csv", data)])
    assert named in refusal(f"file://{tmp_path}/list.csv")


def test_csv_may_have_quotes_commas_line_feeds_and_a_byte_order_mark(tmp_path: Path) -> None:
    write(tmp_path, [("list.csv", '\ufeffpath,label\r\n"a,1.jpg","the ""cat"""\r\n\r\n"b\n2.jpg",NA\r\n'.encode())])
    rows = listed(opened(f"file://{tmp_path}/list.csv"))
    assert [(row["key"], row["class"]) for row in rows] == [("a,1.jpg", 'the "cat"'), ("b\n2.jpg", "NA")]


def test_numbers_with_leading_zeros_are_names_in_csv(tmp_path: Path) -> None:
    write(tmp_path, [("list.csv", b"path,label,zip\na,007,00501\nb,12,99\n")])
    source = opened(f"file://{tmp_path}/list.csv")
    assert [(row["class"], row["zip"]) for row in listed(source)] == [("007", "00501"), ("12", "99")]


@pytest.mark.parametrize(
    "line, named",
    [
        ("{'path': 1}", "line 2 is no JSON"),
        ("[1]", "line 2 is no object"),
        ('{"path": 5, "label": "x"}', "line 2: the path is 5; expected text"),
        ("[" * 100_000, "line 2 is no JSON"),
        ('{"path": "a", "label": ["x"]}', "column 'label' holds struct<>; expected names"),
        ('{"path": "a", "label": "x", "n": 9223372036854775808}', "line 2: 9223372036854775808 is too large"),
        ('{"path": "a", "label": "\\ud800"}', "is not valid Unicode"),
    ],
)
def test_a_broken_line_of_json_is_refused_with_the_place(line: str, named: str, tmp_path: Path) -> None:
    write(tmp_path, [("list.jsonl", f'{{"path": "b", "label": "x"}}\n{line}\n'.encode())])
    assert named in refusal(f"file://{tmp_path}/list.jsonl")


def test_a_path_that_is_no_unicode_is_rejected_with_a_key_of_its_own(tmp_path: Path) -> None:
    write(tmp_path, [("list.jsonl", b'{"path": "\\ud800", "label": "x"}\n')])
    (row,) = listed(opened(f"file://{tmp_path}/list.jsonl"))
    assert (row["reason"], row["key"]) == ("bad_name", rf"file://{tmp_path}/list.jsonl: line 1: '\ud800'")


def test_columns_that_can_be_no_label_are_left_out_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lines = [{"path": "a", "label": "x", "box": [1, 2]}, {"path": "b", "label": "y"}]
    write(tmp_path, [("list.jsonl", "".join(json.dumps(line) + "\n" for line in lines).encode())])
    assert opened(f"file://{tmp_path}/list.jsonl").extra.names == []
    assert "column 'box' holds struct<>, which is no label: left out" in caplog.text
    assert "'box' holds struct<>; expected text" in refusal(f"file://{tmp_path}/list.jsonl", label_columns="label,box")


def test_a_damaged_parquet_table_is_refused(tmp_path: Path) -> None:
    table(tmp_path, "parquet", {"path": ["a"] * 100, "label": ["x"] * 100})
    data = (tmp_path / "list.parquet").read_bytes()
    for damaged in (data[:-20], data[:4] + b"\xff" * 60 + data[64:], b"PAR1"):
        write(tmp_path, [("list.parquet", damaged)])
        assert "list.parquet: cannot be read" in refusal(f"file://{tmp_path}/list.parquet")


@pytest.mark.parametrize("names", ["", "label,", "label,label"])
def test_what_is_no_list_of_columns_is_refused(names: str, tmp_path: Path) -> None:
    url = table(tmp_path, "csv", {"path": ["a"], "label": ["x"]})
    assert refusal(url, ConfigError, label_columns=names).startswith(f"label_columns: {names!r} is no list of columns")


PEAK = """
import sys
from cvdist.config import PrepareConfig
from cvdist.sources import open_source
source = open_source(PrepareConfig(source_url=sys.argv[1], target_url="file:///nowhere/set"))
rows = sum(table.num_rows for table in source.batches())
print(rows, *(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def peak_kib(url: str, num_rows: int) -> int:
    """Lists a source in a process of its own; returns the most memory it had. (ru_maxrss would be that of the tests' process.)"""
    done = subprocess.run([sys.executable, "-c", PEAK, url], capture_output=True, text=True, cwd=ROOT, check=True)
    rows, kib = done.stdout.split()
    assert int(rows) == num_rows
    return int(kib)


@pytest.mark.parametrize("kind, most", [("csv", 1_000_000), ("jsonl", 300_000)])
def test_a_million_rows_take_the_memory_of_ten_thousand(kind: str, most: int, tmp_path: Path) -> None:
    peaks = []
    for num_rows in (10_000, most):
        with open(tmp_path / f"{num_rows}.{kind}", "w") as file:
            if kind == "csv":
                file.write("path,label,age\n")
            for number in range(num_rows):
                path, label, age = f"images/{number:09d}.jpg", f"class {number % 100}", number % 90
                row = (
                    f'{{"path":"{path}","label":"{label}","age":{age}}}' if kind == "jsonl" else f"{path},{label},{age}"
                )
                file.write(row + "\n")
        peaks.append(peak_kib(f"file://{tmp_path}/{num_rows}.{kind}", num_rows))
    assert peaks[1] - peaks[0] < 60 * 1024, peaks
