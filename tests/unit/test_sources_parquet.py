"""Image bytes in Parquet: every row is copied out or rejected with a reason; names, types and files that do not fit are refused."""

from __future__ import annotations

import io
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cvdist.errors import DataError
from cvdist.sources.unischema import Field, read_unischema
from tests.listed import opened, packed, refusal

ROOT = Path(__file__).parents[2]
KEY = b"dataset-toolkit.unischema.v1"


def names(*known: str) -> dict[bytes, bytes]:
    """The metadata with which Hugging Face names classes."""
    return {
        b"huggingface": json.dumps({"info": {"features": {"label": {"names": known, "_type": "ClassLabel"}}}}).encode()
    }


def file(path: Path, columns: dict[str, Any], metadata: dict[bytes, bytes] | None = None, rows: int = 3) -> str:
    """Writes a Parquet file with several row groups."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns).replace_schema_metadata(metadata), path, row_group_size=rows)
    return f"file://{path}"


def rows(url: str, **settings: Any) -> list[tuple[dict[str, Any], bytes]]:
    return packed(opened(url, **settings), url, **settings)


def test_images_of_all_row_groups_are_copied_out_in_order(tmp_path: Path) -> None:
    images = [bytes([number]) * (number + 1) for number in range(200)]
    url = file(tmp_path / "a.parquet", {"img": images, "label": [f"c{n % 3}" for n in range(200)]}, rows=90)
    source = opened(url)
    assert source.kind == "parquet"
    assert [container.num_rows for container in source.containers] == [200]
    found = packed(source, url)
    assert [data for _, data in found] == images
    assert [row["key"] for row, _ in found] == [f"a.parquet/{number}" for number in range(200)]
    assert [row["class"] for row, _ in found] == [f"c{n % 3}" for n in range(200)]


@pytest.mark.parametrize(
    "kind", [pa.binary(), pa.large_binary(), pa.struct([("bytes", pa.binary()), ("path", pa.string())])]
)
def test_a_row_without_bytes_or_class_is_rejected_with_the_reason(kind: pa.DataType, tmp_path: Path) -> None:
    values: list[Any] = [b"1", None, b"", b"4", b"5"]
    if pa.types.is_struct(kind):
        values = [None if value is None else {"bytes": value or None, "path": "x"} for value in values]
    columns = {"image": pa.array(values, kind), "label": ["a", "b", "c", None, "e"]}
    found = rows(file(tmp_path / "a.parquet", columns))
    assert [(row["reason"], data) for row, data in found] == [
        (None, b"1"),
        ("no_image", b""),
        ("no_image", b""),
        ("no_label", b""),
        (None, b"5"),
    ]
    assert [row["sha256"] is None for row, _ in found] == [False, True, True, False, False]


def test_numbers_that_hugging_face_names_become_names(tmp_path: Path) -> None:
    columns = {"image": [b"1"] * 4, "label": [1, 0, -1, 2]}
    found = rows(file(tmp_path / "a.parquet", columns, names("cat", "dog")))
    assert [(row["class"], row["reason"]) for row, _ in found] == [
        ("dog", None),
        ("cat", None),
        (None, "no_label"),
        (None, "no_label"),
    ]


@pytest.mark.parametrize(
    "metadata", [b"{", b"[]", b'{"info": 1}', b'{"info": {"features": {"label": {"_type": "ClassLabel"}}}}']
)
def test_numbers_without_names_are_names_themselves(metadata: bytes, tmp_path: Path) -> None:
    url = file(tmp_path / "a.parquet", {"image": [b"1"], "label": [7]}, {b"huggingface": metadata})
    assert [row["class"] for row, _ in rows(url)] == ["7"]


def test_further_columns_are_labels_and_those_that_cannot_be_are_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    columns = {
        "image": [b"1", b"2"],
        "label": pa.array(["a", "b"]).dictionary_encode(),
        "age": pa.array([1.5, None], pa.float32()),
        "box": [[1], [2]],
        "weight": [0.5, 2],
        "split": ["train", "validation"],
        "who": [1, 2],
    }
    url = file(tmp_path / "a.parquet", columns)
    source = opened(url, group_column="who", split_by="group")
    assert source.extra == pa.schema([("age", pa.float64())])
    assert "column 'box' holds list<" in caplog.text
    found = [row for row, _ in packed(source, url)]
    assert [(r["class"], r["age"], r["weight"], r["split"], r["group"]) for r in found] == [
        ("a", 1.5, 0.5, "train", "1"),
        ("b", None, 2.0, "val", "2"),
    ]


@pytest.mark.parametrize(
    "name, split",
    [
        ("train-00000-of-00001", "train"),
        ("validation-0", "val"),
        ("test/0000", "test"),
        ("val", "val"),
        ("training-0", None),
    ],
)
def test_a_files_folder_or_name_says_the_split(name: str, split: str | None, tmp_path: Path) -> None:
    file(tmp_path / f"{name}.parquet", {"image": [b"1"], "label": ["a"]})
    assert [row["split"] for row, _ in rows(f"file://{tmp_path}")] == [split]


@pytest.mark.parametrize(
    "columns, settings, named",
    [
        ({"image": [b"1"], "kind": ["a"]}, {}, "has no column 'label', but image, kind"),
        ({"one": [b"1"], "two": [b"2"], "label": ["a"]}, {}, "several columns of image bytes (one, two)"),
        ({"image": [b"1"], "label": [0.5]}, {}, "column 'label' holds double; expected names"),
        ({"image": [b"1"], "label": [[1]]}, {}, "column 'label' holds list<"),
        (
            {"image": [b"1"], "label": ["a"]},
            {"image_column": "label", "source": "parquet"},
            "has column 'label' of string",
        ),
        ({"path": ["x"], "label": ["a"]}, {"source": "parquet"}, "has no column of image bytes among path, label"),
        ({"image": [b"1"], "label": ["a"], "split": ["dev"]}, {}, "row 0: the split is 'dev'"),
        (
            {"image": [b"1"], "label": ["a"], "n": pa.array([1 << 63], pa.uint64())},
            {},
            "row 0: 9223372036854775808 is too large",
        ),
    ],
)
def test_what_does_not_fit_is_named(
    columns: dict[str, Any], settings: dict[str, str], named: str, tmp_path: Path
) -> None:
    assert named in refusal(file(tmp_path / "a.parquet", columns), **settings)


@pytest.mark.parametrize(
    "columns, metadata, named",
    [
        ({"image": [b"1"], "n": [1]}, names("a"), "column 'label' is missing"),
        ({"image": [b"1"], "label": [0], "n": ["x"]}, names("a"), "column 'n' holds string"),
        ({"image": ["1"], "label": [0], "n": [1]}, names("a"), "column 'image' holds string"),
        ({"image": [b"1"], "label": [0], "n": [1]}, names("b"), "column 'label' has the class names b"),
    ],
)
def test_files_that_are_not_alike_are_refused_before_the_work(
    columns: dict[str, Any], metadata: dict[bytes, bytes], named: str, tmp_path: Path
) -> None:
    file(tmp_path / "0.parquet", {"image": [b"1"], "label": [0], "n": [1]}, names("a"))
    file(tmp_path / "1.parquet", columns, metadata)
    with pytest.raises(DataError, match="make the files alike") as caught:
        opened(f"file://{tmp_path}")
    assert named in str(caught.value)


def test_files_beside_the_images_are_counted(tmp_path: Path) -> None:
    file(tmp_path / "0.parquet", {"image": [b"1"], "label": [0]})
    (tmp_path / "README.md").write_text("x")
    assert opened(f"file://{tmp_path}").num_skipped == 1


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    file(tmp_path / "0.parquet", {"image": [b"1" * 1000], "label": [0]})
    data = (tmp_path / "0.parquet").read_bytes()
    (tmp_path / "1.parquet").write_bytes(data[:-30])
    assert "1.parquet: cannot be read" in refusal(f"file://{tmp_path}")


PEAK = """
import io, sys
from cvdist.config import PrepareConfig
from cvdist.sources import open_source, pack
class Null(io.RawIOBase):
    def write(self, data): return len(data)
config = PrepareConfig(source_url=sys.argv[1], target_url="file:///nowhere/set")
rows = sum(table.num_rows for container in open_source(config).containers for table in pack(config, container, Null()))
print(rows, *(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def test_a_row_group_of_300_mb_is_not_held_as_a_whole(tmp_path: Path) -> None:
    peaks = []
    for count in (10, 1500):
        images = [np.random.default_rng(number).bytes(200_000) for number in range(count)]
        path = tmp_path / f"{count}.parquet"
        table = pa.table({"image": images, "label": [number % 2 for number in range(count)]})
        # Pages of a few images: a page is the least that pyarrow reads, and by default it writes 1,024 values to one.
        pq.write_table(table, path, row_group_size=count, use_dictionary=False, write_batch_size=4)
        command = [sys.executable, "-c", PEAK, f"file://{path}"]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
        assert int(done.stdout.split()[0]) == count
        peaks.append(int(done.stdout.split()[1]))
    assert peaks[1] - peaks[0] < 100 * 1024, peaks


class Run:
    """Asks a pickle's reader to call something."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.call


class TestUnischema:
    @pytest.mark.filterwarnings("ignore")
    @pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
    def test_what_petastorm_pickles_is_read_without_petastorm(self, protocol: int) -> None:
        pytest.importorskip("petastorm", reason="Petastorm is not installed; run: make setup")
        from decimal import Decimal

        from petastorm.codecs import CompressedImageCodec, NdarrayCodec, ScalarCodec
        from petastorm.unischema import Unischema, UnischemaField
        from pyspark.sql.types import DecimalType, IntegerType

        fields = [
            UnischemaField("image", np.uint8, (None, None, 3), CompressedImageCodec("png"), False),
            UnischemaField("grid", np.dtype("uint8"), (4, 4), NdarrayCodec(), True),
            UnischemaField("label", np.int32, (), ScalarCodec(IntegerType()), False),
            UnischemaField("price", Decimal, (), ScalarCodec(DecimalType(10, 2)), False),
            UnischemaField("name", np.str_, (), None, True),
        ]
        data = pickle.dumps(Unischema("S", fields), protocol=protocol)
        assert read_unischema(data, "x") == [
            Field("image", "CompressedImageCodec", "uint8", 3),
            Field("grid", "NdarrayCodec", "u1", 2),
            Field("label", "ScalarCodec", "int32", 0),
            Field("price", "ScalarCodec", "Decimal", 0),
            Field("name", None, "str_", 0),
        ]

    def test_it_needs_neither_petastorm_nor_spark(self) -> None:
        code = "import sys, cvdist.sources.unischema; print({'pickle', 'petastorm', 'pyspark'} & set(sys.modules) - {'pickle'})"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
        assert done.stdout.strip() == "set()"

    @pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
    @pytest.mark.parametrize(
        "value, named",
        [
            (Run(__import__("os").system, "touch HACKED"), "system"),
            (Run(eval, "open('HACKED', 'w')"), "eval"),
            (Run(getattr, "x", "upper"), "getattr"),
            (Run(subprocess.Popen, "touch HACKED"), "Popen"),
            (Run(np.load, "HACKED"), "numpy"),
        ],
    )
    def test_a_hostile_schema_is_refused_by_name_and_never_run(
        self, value: Run, named: str, protocol: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        with pytest.raises(DataError, match="asks for") as caught:
            read_unischema(pickle.dumps(value, protocol), "hdfs://nn/set/_common_metadata")
        assert named in str(caught.value)
        assert str(caught.value).startswith("hdfs://nn/set/_common_metadata: ")
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize(
        "data",
        [
            b"",
            b"not a pickle",
            b"\x80\x02}.",
            b"\x80\x02K\x01.",
            b"\x80\x02h\x05.",
            b"\x80\x02" + b"(" * 1000 + b".",
            pickle.dumps({"_fields": {}}),
            b"\x80\x02r\xff\xff\xff\x7f.",  # a place in the memo that would take gigabytes
            b"\x80\x05\x96\xff\xff\xff\xff\xff\x00\x00\x00.",  # terabytes of bytes that are not there
            b"\x80\x02" + b")" + b"\x85" * 100_000 + b".",  # tuples in tuples
            b"\x80\x02}(" + b"K\x01" + b"2\x86" * 60 + b"K\x01u.",  # a key that takes for ever to hash
            b"\x80\x02cpetastorm.unischema\nUnischema\n)\x81}X\x07\x00\x00\x00_fieldsK\x05sb.",
        ],
    )
    def test_what_is_no_schema_is_refused_at_once(self, data: bytes) -> None:
        with pytest.raises(DataError, match="its pickled schema"):
            read_unischema(data, "x")


def set_of(folder: Path, codec: Any, dtype: Any = np.uint8, shape: tuple[int | None, ...] = (None, None, 3)) -> str:
    """Writes a Petastorm data set of one image field, stored by `codec`."""
    from petastorm.unischema import Unischema, UnischemaField

    fields = [UnischemaField("photo", dtype, shape, codec, False), UnischemaField("label", np.int32, (), None, False)]
    images = []
    for number in range(3):
        buffer = io.BytesIO()
        np.save(buffer, np.full((4, 5, 3), number, np.uint8))
        images.append(buffer.getvalue())
    table = pa.table({"photo": images, "label": [0, 1, 1], "thumb": [b"x"] * 3})
    file(folder / "part-0.parquet", dict(zip(table.column_names, table.columns, strict=True)))
    metadata = {KEY: pickle.dumps(Unischema("S", fields), protocol=2)}
    pq.write_metadata(table.schema.with_metadata(metadata), folder / "_common_metadata")
    return f"file://{folder}"


@pytest.mark.filterwarnings("ignore")
class TestPetastorm:
    @pytest.fixture(autouse=True)
    def _needs_petastorm(self) -> None:
        pytest.importorskip("petastorm", reason="Petastorm is not installed; run: make setup")

    def test_arrays_are_copied_as_npy_files(self, tmp_path: Path) -> None:
        from petastorm.codecs import NdarrayCodec

        url = set_of(tmp_path, NdarrayCodec())
        assert opened(url).kind == "petastorm"
        found = rows(url)
        assert [row["class"] for row, _ in found] == ["0", "1", "1"]
        for number, (_, data) in enumerate(found):
            np.testing.assert_array_equal(np.load(io.BytesIO(data)), np.full((4, 5, 3), number, np.uint8))

    def test_the_schema_tells_the_image_among_other_bytes(self, tmp_path: Path) -> None:
        from petastorm.codecs import CompressedImageCodec

        assert opened(set_of(tmp_path, CompressedImageCodec("png"))).containers[0].packing.columns.image == "photo"

    def test_images_stored_in_another_way_are_refused(self, tmp_path: Path) -> None:
        from petastorm.codecs import CompressedNdarrayCodec, NdarrayCodec

        url = set_of(tmp_path / "a", CompressedNdarrayCodec())
        assert "no column of images among photo, label" in refusal(url)
        assert "stored by CompressedNdarrayCodec" in refusal(url, image_column="photo")
        assert "field 'photo' is of float32" in refusal(set_of(tmp_path / "b", NdarrayCodec(), np.float32))

    def test_a_hostile_data_set_is_refused(self, tmp_path: Path) -> None:
        from petastorm.codecs import NdarrayCodec

        url = set_of(tmp_path, NdarrayCodec())
        schema = pa.schema([("photo", pa.binary())], {KEY: pickle.dumps(Run(eval, "1"))})
        pq.write_metadata(schema, tmp_path / "_common_metadata")
        assert f"{url}/_common_metadata: its pickled schema asks for 'builtins.eval'" in refusal(url)

    def test_a_folder_without_a_schema_is_refused(self, tmp_path: Path) -> None:
        file(tmp_path / "a.parquet", {"image": [b"1"], "label": [0]})
        assert "is no data set of Petastorm's" in refusal(f"file://{tmp_path}", source="petastorm")


def test_a_damaged_manifest_is_refused(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"format": "cvdist", "splits": {"train": {}}}')
    assert "manifest.json is damaged" in refusal(f"file://{tmp_path}")
