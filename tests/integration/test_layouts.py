"""Every input layout, through the real spark-submit: the same photos give the same rows, labels, splits and reasons."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
from pathlib import Path

import pytest

from cvdist import storage
from cvdist.images import Sample, convert
from tests.made_layouts import LAYOUTS, photos, upload
from tests.submit import prepared, reasons_of, rows_of

ON_HDFS = ("split_folders", "csv_table", "tar_of_tars", "hugging_face")


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_gives_the_rows_labels_and_reasons_that_it_holds(
    name: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if name == "petastorm" and importlib.util.find_spec("petastorm") is None:
        pytest.skip("Petastorm is not installed")
    images = photos(each=6)
    images[1] = dataclasses.replace(images[1], data=b"this is no photo")
    images[-1] = dataclasses.replace(images[-1], data=images[-1].data[:200])
    folder = tmp_path / "source"
    folder.mkdir()
    layout = LAYOUTS[name](folder, images)
    url, target = f"file://{folder}", f"file://{tmp_path}/set"
    if name in ON_HDFS:
        base = request.getfixturevalue("hdfs_url")
        url, target = storage.join(base, "source"), storage.join(base, "set")
        upload(folder, url)
    source = storage.join(url, layout.source) if layout.source else url
    settings = {**layout.settings, "image_size": 24, "max_bad_fraction": 0.1}
    manifest = prepared(source, target, settings)

    assert manifest.classes == ("cat", "dog")
    assert (manifest.num_inputs, manifest.num_skipped) == (len(images) + layout.skipped, layout.skipped)
    assert [target.name for target in manifest.targets] == ["age"] * layout.has_age
    bad = {key: photo for key, photo in layout.keys.items() if photo in (images[1], images[-1])}
    expected_reasons = {key: "not_an_image" if photo == images[1] else "undecodable" for key, photo in bad.items()}
    assert reasons_of(target, manifest) == expected_reasons
    rows = rows_of(target, manifest)
    assert rows.keys() == layout.keys.keys() - bad.keys()
    for key, row in rows.items():
        photo = layout.keys[key]
        assert manifest.classes[row["label"]] == photo.class_name
        assert row["source_sha256"] == hashlib.sha256(photo.data).hexdigest()
        assert convert(photo.data, manifest.image) == Sample(row["image"], row["height"], row["width"])
        assert not layout.has_splits or row["split"] == photo.split
        assert not layout.has_age or row["age"] == photo.age
    assert {row["split"] for row in rows.values()} == {"train", "val", "test"}
