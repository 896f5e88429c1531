"""What is listed does not depend on where it lies: every layout, on local disk and on a real HDFS."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import pytest

from cvdist import storage
from tests.listed import images, listed, opened, refusal
from tests.made_layouts import LAYOUTS, photos, tar_bytes, upload

NAMES = ["a b", "100%", "%20", "#1", "what?", "[x]", "日本", "e\u0301", "\u00e9", "'\"", "x" * 200]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_is_listed_alike_everywhere(
    name: str, storage_url: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    if name == "petastorm":
        pytest.importorskip("petastorm", reason="Petastorm is not installed; run: make setup")
    local = tmp_path_factory.mktemp("layout")
    layout = LAYOUTS[name](local, photos())
    base = storage.join(storage_url, "source")
    upload(local, base)
    url = storage.join(base, layout.source) if layout.source else base
    source = opened(url, **layout.settings)
    found = images(source, url, **layout.settings)
    assert {row["key"]: data for row, data in found} == {key: photo.data for key, photo in layout.keys.items()}
    assert {row["key"]: row["class"] for row, _ in found} == {k: p.class_name for k, p in layout.keys.items()}
    assert len(found) == len(layout.keys)
    assert (source.kind, source.num_skipped) == (layout.kind, layout.skipped)


def test_odd_names_lead_to_their_own_bytes(storage_url: str) -> None:
    assert unicodedata.normalize("NFC", NAMES[7]) == NAMES[8]
    for class_name in ("a#b %41", "c d"):
        for name in NAMES:
            storage.write_bytes(
                storage.join(storage_url, "source", class_name, f"{name}.jpg"), f"{class_name}/{name}".encode()
            )
    url = storage.join(storage_url, "source")
    found = images(opened(url), url)
    assert {row["key"]: data for row, data in found} == {
        f"{class_name}/{name}.jpg": f"{class_name}/{name}".encode()
        for class_name in ("a#b %41", "c d")
        for name in NAMES
    }
    table = "path,label\n" + "".join(f'"source/c d/{name}.jpg",x\n' for name in NAMES if '"' not in name)
    storage.write_text(storage.join(storage_url, "list.csv"), table)
    found = images(opened(storage.join(storage_url, "list.csv")), storage_url)
    assert [data.decode() for _, data in found] == [f"c d/{name}" for name in NAMES if '"' not in name]


def test_more_files_than_a_page_of_the_listing_are_all_found(storage_url: str) -> None:
    url = storage.join(storage_url, "source")
    for number in range(120):
        storage.write_bytes(storage.join(url, f"{'cat' if number % 2 else 'dog'}.{number}.jpg"), b"x")
    rows = listed(opened(url, label_pattern=r"(cat|dog)\.\d+"))
    assert len({row["key"] for row in rows}) == len(rows) == 120


def test_a_damaged_archive_is_named_by_its_url(storage_url: str, tmp_path: Path) -> None:
    url = storage.join(storage_url, "a.tar")
    storage.write_bytes(url, tar_bytes([("cat/1.jpg", b"x" * 5000)])[:3000])
    assert refusal(url).startswith(f"{url}: byte 512: 'cat/1.jpg' has 5000 bytes and 2488 are left")
