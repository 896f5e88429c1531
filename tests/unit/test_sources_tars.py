"""Tar files: every member is an input, a reason or counted, at the bytes where it lies; what is damaged is refused with its place."""

from __future__ import annotations

import gzip
import io
import json
import subprocess
import tarfile
import threading
from pathlib import Path
from typing import Any

import pytest

from tests.listed import images, listed, opened, refusal
from tests.made_layouts import tar_bytes, write
from tests.unit.test_sources_tables import peak_kib

Row = dict[str, Any]
ODD_NAMES = [
    "a b",
    "ü",
    "u\u0308",
    "100%",
    "a:b",
    "#1",
    "日本" * 60,
    "x" * 180,
    "long/" * 60 + "x",
    "back\\slash",
    "line\nfeed",
]


def made(folder: Path, members: dict[str, bytes] | list[tuple[str, bytes]], name: str = "a.tar") -> str:
    """Writes a tar file."""
    write(folder, [(name, tar_bytes(members.items() if isinstance(members, dict) else members))])
    return f"file://{folder}/{name}"


def found(url: str, **settings: Any) -> list[tuple[str, str | None, str | None]]:
    """Returns (key, class, reason), sorted."""
    return sorted((row["key"], row["class"], row["reason"]) for row in listed(opened(url, **settings)))


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_names_of_every_kind_and_length_are_listed_as_they_are(form: int, tmp_path: Path) -> None:
    names = [name for name in ODD_NAMES if form != tarfile.USTAR_FORMAT or len(name.encode()) < 100]
    with tarfile.open(tmp_path / "a.tar", "w", format=form) as archive:
        for name in names:
            info = tarfile.TarInfo(f"./cat/{name}.jpg")
            info.size = len(name)
            archive.addfile(info, io.BytesIO(b"x" * len(name)))
    rows = images(opened(f"file://{tmp_path}/a.tar"), f"file://{tmp_path}/a.tar")
    assert [row["key"] for row, _ in rows] == [f"a.tar/cat/{name}.jpg" for name in names]
    assert [data for _, data in rows] == [b"x" * len(name) for name in names]


def test_members_larger_than_8_gib_and_those_behind_them_are_found(tmp_path: Path) -> None:
    size = 9 << 30
    with open(tmp_path / "a.tar", "wb") as file:
        for name, length in (("cat/1.bin", size), ("cat/2.jpg", 3)):
            info = tarfile.TarInfo(name)
            info.size = length
            file.write(info.tobuf(tarfile.GNU_FORMAT))
            file.seek(-(-length // 512) * 512, io.SEEK_CUR)  # a hole: no disk is used
        file.write(bytes(1024))
    source = opened(f"file://{tmp_path}/a.tar")
    assert [(row["key"], row["offset"]) for row in listed(source)] == [("a.tar/cat/2.jpg", size + 1024)]
    assert source.num_skipped == 1


def test_gnu_tar_and_python_agree_on_where_members_lie(tmp_path: Path) -> None:
    for number in range(30):
        write(
            tmp_path,
            [(f"photos/{'cat' if number % 2 else 'dog'}/{'n' * number}{number}.jpg", bytes([number]) * number * 37)],
        )
    for form in ("gnu", "pax", "ustar", "posix"):
        subprocess.run(["tar", f"--format={form}", "-cf", f"{form}.tar", "photos"], cwd=tmp_path, check=True)
        url = f"file://{tmp_path}/{form}.tar"
        for row, data in images(opened(url), url):
            assert data == (tmp_path / row["key"].partition("/")[2]).read_bytes()
            assert row["class"] == row["key"].split("/")[2]


@pytest.mark.parametrize(
    "name, reason",
    [("../x.jpg", "bad_name"), ("a/../../x.jpg", "bad_name"), ("/etc/x.jpg", "bad_name"), ("a/\udcff.jpg", "bad_name")],
)
def test_a_name_that_leads_elsewhere_is_rejected_under_a_key_that_can_be_stored(
    name: str, reason: str, tmp_path: Path
) -> None:
    rows = listed(opened(made(tmp_path, {"cat/1.jpg": b"1", name: b"2", "dog/1.jpg": b"3"})))
    assert [(row["reason"], row["class"]) for row in rows] == [(None, "cat"), (reason, None), (None, "dog")]
    assert rows[1]["key"] == f"a.tar/{name!a}"


def test_links_devices_and_sparse_files_are_rejected_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "holes.jpg").write_bytes(b"")
    with open(tmp_path / "holes.jpg", "wb") as file:
        file.seek(1 << 20)
        file.write(b"x")
    subprocess.run(["tar", "--format=gnu", "-S", "-cf", "a.tar", "holes.jpg"], cwd=tmp_path, check=True)
    with tarfile.open(tmp_path / "a.tar", "a") as archive:
        kinds = {
            "soft.jpg": tarfile.SYMTYPE,
            "hard.jpg": tarfile.LNKTYPE,
            "pipe.jpg": tarfile.FIFOTYPE,
            "dev.jpg": tarfile.CHRTYPE,
        }
        for name, kind in kinds.items():
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            archive.addfile(info)
        archive.addfile(tarfile.TarInfo("plain.jpg"))
    reasons = {key: reason for key, _, reason in found(f"file://{tmp_path}/a.tar")}
    assert reasons == {
        "a.tar/holes.jpg": "not_a_file",
        "a.tar/soft.jpg": "link",
        "a.tar/hard.jpg": "link",
        "a.tar/pipe.jpg": "not_a_file",
        "a.tar/dev.jpg": "not_a_file",
        "a.tar/plain.jpg": None,
    }


@pytest.mark.parametrize("options", [["--sparse-version=0.1"], ["--sparse-version=1.0"]])
def test_sparse_files_of_other_versions_are_rejected(options: list[str], tmp_path: Path) -> None:
    with open(tmp_path / "holes.jpg", "wb") as file:
        file.seek(1 << 20)
        file.write(b"x")
    (tmp_path / "plain.jpg").write_bytes(b"1")
    command = ["tar", "--format=posix", "-S", *options, "-cf", "a.tar", "holes.jpg", "plain.jpg"]
    subprocess.run(command, cwd=tmp_path, check=True)
    assert sorted(reason or "" for _, _, reason in found(f"file://{tmp_path}/a.tar")) == ["", "not_a_file"]


def test_what_is_no_image_is_counted(tmp_path: Path) -> None:
    members = {
        "cat/1.jpg": b"1",
        "cat/.hidden.jpg": b"2",
        "__MACOSX/._1.jpg": b"3",
        "dog/notes.txt": b"4",
        "dog/2.jpg": b"5",
    }
    source = opened(made(tmp_path, members))
    assert len(listed(source)) == 2
    assert source.num_skipped == 3


@pytest.mark.parametrize(
    "members, classes",
    [
        (["cat/1.jpg", "dog/deep/2.jpg"], ["cat", "dog"]),
        (["top/cat/1.jpg", "top/dog/deep/2.jpg"], ["cat", "dog"]),
        (["a/b/cat/1.jpg", "a/b/dog/2.jpg"], ["cat", "dog"]),
        (["top/cat/1.jpg", "top/cat/2.jpg"], ["cat", "cat"]),
        (["cat/x/1.jpg", "dog/x/2.jpg"], ["cat", "dog"]),
        (["train/cat/1.jpg", "test/dog/2.jpg"], ["cat", "dog"]),
        (["top/train/cat/1.jpg", "top/train/dog/2.jpg"], ["cat", "dog"]),
        (["cat/1.jpg", "2.jpg"], ["cat", None]),
    ],
)
def test_the_folder_below_what_all_share_is_the_class(
    members: list[str], classes: list[str | None], tmp_path: Path
) -> None:
    url = made(tmp_path, [(name, b"x") for name in members])
    assert [row["class"] for row in listed(opened(url))] == classes


def test_split_folders_in_an_archive_say_the_split(tmp_path: Path) -> None:
    url = made(tmp_path, {"p/train/cat/1.jpg": b"1", "p/validation/cat/1.jpg": b"2", "p/test/dog/1.jpg": b"3"})
    assert [row["split"] for row in listed(opened(url))] == ["train", "val", "test"]


def test_an_image_in_no_class_folder_is_rejected_with_the_reason(tmp_path: Path) -> None:
    assert found(made(tmp_path, {"cat/1.jpg": b"1", "2.jpg": b"2"}))[0] == ("a.tar/2.jpg", None, "no_label")


def test_archives_in_an_archive_are_read_where_they_lie(tmp_path: Path) -> None:
    inner = {name: tar_bytes([(f"{name}_{n}.JPEG", name.encode() * n) for n in range(5)]) for name in ("n01", "n02")}
    url = made(tmp_path, {f"{name}.tar": data for name, data in inner.items()} | {"license.txt": b""}, "all.tar")
    source = opened(url)
    rows = images(source, url)
    assert [(row["key"], row["class"]) for row, _ in rows] == [
        (f"all.tar/{name}.tar/{name}_{n}.JPEG", name) for name in ("n01", "n02") for n in range(5)
    ]
    assert [data for _, data in rows] == [name.encode() * n for name in ("n01", "n02") for n in range(5)]
    assert source.num_skipped == 1


def test_archives_three_deep_are_refused(tmp_path: Path) -> None:
    url = made(tmp_path, {"b.tar": tar_bytes([("c.tar", tar_bytes([("1.jpg", b"1")]))])})
    assert "'b.tar' holds the archive 'c.tar'; expected images in it" in refusal(url)


def test_an_archive_behind_images_is_refused(tmp_path: Path) -> None:
    members = [(f"cat/{n}.jpg", b"") for n in range(1001)] + [("more.tar", tar_bytes([]))]
    assert "holds 'more.tar' beside images" in refusal(made(tmp_path, members))


class TestSamples:
    def test_cls_holds_a_number_or_a_name(self, tmp_path: Path) -> None:
        members = {"1.jpg": b"1", "1.cls": b"7\n", "a/2.PNG": b"2", "a/2.cls": "häuser".encode()}
        source = opened(made(tmp_path, members))
        assert [(row["key"], row["class"]) for row in listed(source)] == [
            ("a.tar/1.jpg", "7"),
            ("a.tar/a/2.PNG", "häuser"),
        ]
        assert source.num_skipped == 0

    def test_labels_may_come_before_their_image(self, tmp_path: Path) -> None:
        members = [("1.cls", b"a"), ("1.jpg", b"1" * 200_000), ("2.cls", b"b"), ("2.jpg", b"2" * 200_000)]
        assert [row["class"] for row in listed(opened(made(tmp_path, members)))] == ["a", "b"]

    @pytest.mark.parametrize(
        "beside",
        [
            [],
            [("2.cls", b"")],
            [("2.cls", b"\xff")],
            [("2.cls", b"x" * 2000)],
            [("2.json", b"{")],
            [("2.json", b"[1]")],
        ],
    )
    def test_an_image_without_a_class_is_rejected_with_the_reason(
        self, beside: list[tuple[str, bytes]], tmp_path: Path
    ) -> None:
        url = made(
            tmp_path, [("1.jpg", b"1"), ("1.cls", b"a"), ("2.jpg", b"2"), *beside, ("3.jpg", b"3"), ("3.cls", b"c")]
        )
        assert found(url) == [("a.tar/1.jpg", "a", None), ("a.tar/2.jpg", None, "no_label"), ("a.tar/3.jpg", "c", None)]

    def test_masks_and_texts_beside_an_image_are_counted(self, tmp_path: Path) -> None:
        members = {"1.jpg": b"1", "1.seg.png": b"m", "1.txt": b"t", "1.cls": b"a", "2.cls": b"b"}
        source = opened(made(tmp_path, members))
        assert [row["key"] for row in listed(source)] == ["a.tar/1.jpg"]
        assert source.num_skipped == 3

    def test_several_images_of_a_sample_have_its_class_or_their_own(self, tmp_path: Path) -> None:
        members = {
            "1.left.jpg": b"1",
            "1.right.jpg": b"2",
            "1.cls": b"a",
            "2.x.jpg": b"3",
            "2.x.cls": b"b",
            "2.y.jpg": b"4",
        }
        rows = found(made(tmp_path, members))
        assert rows == [
            ("a.tar/1.left.jpg", "a", None),
            ("a.tar/1.right.jpg", "a", None),
            ("a.tar/2.x.jpg", "b", None),
            ("a.tar/2.y.jpg", None, "no_label"),
        ]

    def test_json_holds_the_class_and_further_labels(self, tmp_path: Path) -> None:
        records = [{"label": 3, "age": 2, "sex": "f", "who": 1}, {"label": "x", "age": 2.5, "who": None}]
        members = {}
        for number, record in enumerate(records):
            members |= {f"{number}.jpg": b"1", f"{number}.json": json.dumps(record).encode()}
        url = made(tmp_path, members)
        assert opened(url).extra.names == []
        source = opened(url, label_columns="label,age,sex", group_column="who", split_by="group")
        assert [str(kind) for kind in source.extra.types] == ["double", "string"]
        rows = [(row["class"], row["age"], row["sex"], row["group"]) for row in listed(source)]
        assert rows == [("3", 2.0, "f", "1"), ("x", 2.5, None, None)]

    @pytest.mark.parametrize("columns", [None, "label,age"])
    def test_a_class_that_is_a_fraction_is_refused(self, columns: str | None, tmp_path: Path) -> None:
        url = made(tmp_path, {"1.jpg": b"1", "1.json": b'{"label": 0.5, "age": 1}'})
        assert "'label'" in refusal(url, label_columns=columns)

    def test_a_further_label_that_is_an_array_is_refused(self, tmp_path: Path) -> None:
        url = made(tmp_path, {"1.jpg": b"1", "1.json": b'{"label": 1, "box": [1]}'})
        assert "'box' in .json is an array or object" in refusal(url, label_columns="label,box")

    def test_json_without_a_class_makes_no_samples(self, tmp_path: Path) -> None:
        url = made(tmp_path, {"cat/1.jpg": b"1", "cat/1.json": b'{"width": 3}'})
        assert found(url) == [("a.tar/cat/1.jpg", "cat", None)]


@pytest.mark.parametrize(
    "name, split",
    [
        ("train/a.tar", "train"),
        ("validation/a.tar", "val"),
        ("train-0000.tar", "train"),
        ("val_3.tar", "val"),
        ("test.tar", "test"),
        ("trains.tar", None),
        ("test-tubes.tar", None),
    ],
)
def test_an_archives_folder_or_name_says_the_split(name: str, split: str | None, tmp_path: Path) -> None:
    made(tmp_path, {"1.jpg": b"1"}, name)
    assert [row["split"] for row in listed(opened(f"file://{tmp_path}"))] == [split]


def test_many_archives_are_listed_in_the_order_of_their_names(tmp_path: Path) -> None:
    for number in range(40):
        made(tmp_path, [(f"{n:03d}.jpg", b"x") for n in range(number % 7 * 50)] + [("a", b"")], f"{number:02d}.tar")
    source = opened(f"file://{tmp_path}")
    keys = [row["key"] for row in listed(source)]
    assert keys == [f"{number:02d}.tar/{n:03d}.jpg" for number in range(40) for n in range(number % 7 * 50)]
    assert source.num_skipped == 40


def test_a_listing_that_is_left_early_leaves_no_thread_behind(tmp_path: Path) -> None:
    for number in range(12):
        made(tmp_path, [(f"{n}.jpg", b"x") for n in range(20)], f"{number:02d}.tar")
    before = threading.active_count()
    batches = opened(f"file://{tmp_path}").batches()
    next(batches)
    batches.close()  # type: ignore[attr-defined]
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("index")]
    assert threading.active_count() <= before + 4  # those of storage wait for work


MEMBERS = [(f"cat/{number}.jpg", bytes([number]) * 700) for number in range(5)]


class TestDamage:
    def cut(self, tmp_path: Path, data: bytes) -> str:
        write(tmp_path, [("a.tar", data)])
        return refusal(f"file://{tmp_path}/a.tar")

    @pytest.mark.parametrize("length", [0, 100, 512, 600, 1536, 2000, 5 * 1536, 5 * 1536 + 511])
    def test_an_archive_cut_anywhere_is_refused_with_the_byte(self, length: int, tmp_path: Path) -> None:
        message = self.cut(tmp_path, tar_bytes(MEMBERS)[:length])
        place = length // 1536 * 1536 if length % 1536 < 512 else length // 1536 * 1536 + 512
        assert f"/a.tar: byte {place}: " in message
        assert "expected a whole tar file" in message

    def test_one_block_of_zeros_is_end_enough(self, tmp_path: Path) -> None:
        write(tmp_path, [("a.tar", tar_bytes(MEMBERS)[: 5 * 1536 + 512])])
        assert len(found(f"file://{tmp_path}/a.tar")) == 5

    def test_a_damaged_header_is_refused_with_the_byte(self, tmp_path: Path) -> None:
        data = bytearray(tar_bytes(MEMBERS))
        data[1536 + 3] ^= 1
        assert "/a.tar: byte 1536: no header of a member (bad checksum)" in self.cut(tmp_path, bytes(data))

    def test_archives_behind_each_other_are_refused(self, tmp_path: Path) -> None:
        message = self.cut(tmp_path, tar_bytes(MEMBERS) * 2)
        assert "data behind the zeros that close the archive" in message

    def test_an_inner_archive_that_is_cut_is_named(self, tmp_path: Path) -> None:
        url = made(tmp_path, {"cat.tar": tar_bytes(MEMBERS)[:2200], "dog.tar": tar_bytes(MEMBERS)})
        assert "/a.tar/cat.tar: byte 2048: 'cat/1.jpg' has 700 bytes" in refusal(url)

    def test_an_inner_archive_does_not_reach_beyond_its_end(self, tmp_path: Path) -> None:
        info = tarfile.TarInfo("big.jpg")
        info.size = 4000
        url = made(tmp_path, {"cat.tar": info.tobuf(), "dog.tar": tar_bytes(MEMBERS)})
        assert "/a.tar/cat.tar: byte 512: 'big.jpg' has 4000 bytes and 0 are left" in refusal(url)

    def test_a_negative_size_is_refused(self, tmp_path: Path) -> None:
        info = tarfile.TarInfo("big.jpg")
        header = bytearray(info.tobuf())
        header[124:136] = b"\xff" * 11 + b"\x00"
        header[148:156] = b"%06o\0 " % (256 + sum(header[:148]) + sum(header[156:]))
        assert "byte 512: 'big.jpg' has -256 bytes" in self.cut(tmp_path, bytes(header) + bytes(1024))

    def test_a_hostile_extended_header_is_refused(self, tmp_path: Path) -> None:
        for record in (b"99 path=x\n", b"12 path=x\n12", b"9999999 a=b\n", b"18 size=-99999999\n", b"no record"):
            info = tarfile.TarInfo("header")
            info.type, info.size = tarfile.XHDTYPE, len(record)
            plain = tarfile.TarInfo("1.jpg")
            data = info.tobuf() + record.ljust(512, b"\0") + plain.tobuf() + bytes(1024)
            message = self.cut(tmp_path, data)
            assert "/a.tar: byte " in message

    def test_a_name_of_gigabytes_is_refused(self, tmp_path: Path) -> None:
        info = tarfile.TarInfo("././@LongLink")
        info.type, info.size = tarfile.GNUTYPE_LONGNAME, 1 << 30
        with open(tmp_path / "a.tar", "wb") as file:
            file.write(info.tobuf(tarfile.GNU_FORMAT))
            file.truncate(2 << 30)
        assert "a name of 1073741824 bytes" in refusal(f"file://{tmp_path}/a.tar")

    @pytest.mark.parametrize("name", ["a.tar.gz", "a.tgz", "a.tar.zst", "a.tar.bz2"])
    def test_a_compressed_archive_is_refused_with_the_way_out(self, name: str, tmp_path: Path) -> None:
        write(tmp_path, [(name, gzip.compress(tar_bytes(MEMBERS)))])
        for url in (f"file://{tmp_path}/{name}", f"file://{tmp_path}"):
            message = refusal(url)
            assert f"{name}: is compressed" in message
            assert "gunzip" in message

    def test_a_compressed_archive_under_another_name_is_refused_alike(self, tmp_path: Path) -> None:
        assert "/a.tar: is compressed" in self.cut(tmp_path, gzip.compress(tar_bytes(MEMBERS * 99), 0))

    def test_an_archive_without_images_is_refused(self, tmp_path: Path) -> None:
        assert "a.tar holds no image in 1 archive; expected members named" in refusal(made(tmp_path, {"a.txt": b""}))

    def test_a_folder_without_archives_is_refused(self, tmp_path: Path) -> None:
        write(tmp_path, [("a.txt", b"")])
        assert "holds no archive; expected files named *.tar" in refusal(f"file://{tmp_path}", source="tar")


def test_200_000_members_take_the_memory_of_2_000(tmp_path: Path) -> None:
    peaks = []
    for num_members in (2_000, 200_000):
        path = tmp_path / f"{num_members}.tar"
        with open(path, "wb") as file:
            header = bytearray(tarfile.TarInfo("cat/000000.jpg").tobuf())
            for number in range(num_members):
                header[4:10] = b"%06d" % number
                header[148:156] = b" " * 8
                header[148:156] = b"%06o\0 " % sum(header)
                file.write(header)
            file.write(bytes(1024))
        peaks.append(peak_kib(f"file://{path}", num_members))
    assert peaks[1] - peaks[0] < 30 * 1024, peaks


def test_headers_alone_are_read_of_large_members(tmp_path: Path) -> None:
    num_members, size = 50, 1 << 20
    with open(tmp_path / "a.tar", "wb") as file:
        for number in range(num_members):
            info = tarfile.TarInfo(f"cat/{number}.jpg")
            info.size = size
            file.write(info.tobuf())
            file.seek(size, io.SEEK_CUR)
        file.write(bytes(1024))
    source = opened(f"file://{tmp_path}/a.tar")
    counters = Path("/proc/self/io")
    before = int(counters.read_text().split()[1])
    assert len(listed(source)) == num_members
    assert int(counters.read_text().split()[1]) - before < num_members * size / 50
