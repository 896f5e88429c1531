"""The same few photos in every layout that prepare reads, for tests."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import pickle
import tarfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cvdist import storage

SPLITS = ("train", "val", "test")


@dataclasses.dataclass(frozen=True)
class Photo:
    """A real JPEG; `number` is its place in its class and split, `age` a further label."""

    class_name: str
    split: str
    number: int
    age: float
    data: bytes

    @property
    def name(self) -> str:
        """A file name that says all of it."""
        return f"{self.class_name}.{self.split}.{self.number}.jpg"


@dataclasses.dataclass(frozen=True)
class Layout:
    """Photos in a folder.

    Attributes:
        source: The source, below the folder; empty where that is the source.
        kind: The layout's name.
        settings: What prepare has to be told.
        keys: The photo behind each key.
        has_splits: The layout says which photo is in which split.
        has_age: It holds the further label `age`.
        skipped: Files that are no images by their names.
    """

    source: str
    kind: str
    keys: dict[str, Photo]
    settings: dict[str, object] = dataclasses.field(default_factory=dict)
    has_splits: bool = True
    has_age: bool = False
    skipped: int = 0


def photos(classes: Sequence[str] = ("cat", "dog"), each: int = 3, *, size: int = 32, seed: int = 0) -> list[Photo]:
    """Makes `each` photos of every class in every split, all different."""
    rng = np.random.default_rng(seed)
    found = []
    for label, name in enumerate(classes):
        for split in SPLITS:
            for number in range(each):
                pixels = rng.integers(0, 60, (size, size + 8, 3), np.uint8)
                pixels[:, :: label + 2] += np.uint8(150)  # stripes as wide as the class says
                encoded, data = cv2.imencode(".jpg", pixels)
                assert encoded
                found.append(Photo(name, split, number, float(rng.integers(1, 90)) / 2, data.tobytes()))
    return found


def write(folder: Path, files: Iterable[tuple[str, bytes]]) -> None:
    """Writes files by their paths below a folder."""
    for path, data in files:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)


def tar_bytes(members: Iterable[tuple[str, bytes]]) -> bytes:
    """Makes a tar file of names and contents."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def upload(folder: Path, url: str) -> None:
    """Copies all files of a folder to a URL."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            storage.write_bytes(storage.join(url, path.relative_to(folder).as_posix()), path.read_bytes())


def class_folders(folder: Path, images: Sequence[Photo]) -> Layout:
    """CLASS/NAME."""
    keys = {f"{photo.class_name}/{photo.name}": photo for photo in images}
    write(folder, [(key, photo.data) for key, photo in keys.items()] + [("README.md", b"photos")])
    return Layout("", "class_folders", keys, has_splits=False, skipped=1)


def split_folders(folder: Path, images: Sequence[Photo]) -> Layout:
    """SPLIT/CLASS/NAME, val under the name validation."""
    names = {"train": "train", "val": "validation", "test": "test"}
    keys = {f"{names[photo.split]}/{photo.class_name}/{photo.name}": photo for photo in images}
    write(folder, [(key, photo.data) for key, photo in keys.items()] + [("train/cat/.DS_Store", b"x")])
    return Layout("", "class_folders", keys, skipped=1)


def flat_names(folder: Path, images: Sequence[Photo]) -> Layout:
    """NAME alone."""
    keys = {photo.name: photo for photo in images}
    write(folder, [(key, photo.data) for key, photo in keys.items()] + [("list.txt", b"x")])
    settings: dict[str, object] = {"label_pattern": rf"({'|'.join(sorted({p.class_name for p in images}))})\.\w+\.\d+"}
    return Layout("", "flat_names", keys, settings, has_splits=False, skipped=1)


def listed_photos(folder: Path, images: Sequence[Photo]) -> list[dict[str, str | float]]:
    """Writes photos to images/NAME; returns the rows of a table of them."""
    write(folder, [(f"images/{photo.name}", photo.data) for photo in images])
    return [
        {"path": f"images/{photo.name}", "label": photo.class_name, "split": photo.split, "age": photo.age}
        for photo in images
    ]


def csv_table(folder: Path, images: Sequence[Photo]) -> Layout:
    """list.csv: path,label,split,age, and the photos beside it."""
    rows = listed_photos(folder, images)
    with open(folder / "list.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return Layout("list.csv", "table", {f"images/{photo.name}": photo for photo in images}, has_age=True)


def jsonl_table(folder: Path, images: Sequence[Photo]) -> Layout:
    """list.jsonl: the same as objects."""
    rows = listed_photos(folder, images)
    (folder / "list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Layout("list.jsonl", "table", {f"images/{photo.name}": photo for photo in images}, has_age=True)


def parquet_table(folder: Path, images: Sequence[Photo]) -> Layout:
    """list.parquet: the same as columns."""
    pq.write_table(pa.Table.from_pylist(listed_photos(folder, images)), folder / "list.parquet", row_group_size=4)
    return Layout("list.parquet", "table", {f"images/{photo.name}": photo for photo in images}, has_age=True)


def by_class(images: Sequence[Photo]) -> dict[str, list[Photo]]:
    """Groups photos by class, in order."""
    return {name: [p for p in images if p.class_name == name] for name in dict.fromkeys(p.class_name for p in images)}


def tar_per_class(folder: Path, images: Sequence[Photo]) -> Layout:
    """SPLIT/CLASS.tar."""
    keys = {}
    for name, group in by_class(images).items():
        for split in SPLITS:
            part = [photo for photo in group if photo.split == split]
            keys |= {f"{split}/{name}.tar/{photo.name}": photo for photo in part}
            members = [(photo.name, photo.data) for photo in part]
            write(folder, [(f"{split}/{name}.tar", tar_bytes([*members, ("license.txt", b"free")]))])
    return Layout("", "tar", keys, skipped=3 * len(by_class(images)))


def tar_of_tars(folder: Path, images: Sequence[Photo]) -> Layout:
    """all.tar of CLASS.tar."""
    groups = by_class(images)
    inner = [(f"{name}.tar", tar_bytes((p.name, p.data) for p in group)) for name, group in groups.items()]
    write(folder, [("all.tar", tar_bytes(inner))])
    keys = {f"all.tar/{photo.class_name}.tar/{photo.name}": photo for photo in images}
    return Layout("all.tar", "tar", keys, has_splits=False)


def tar_of_folders(folder: Path, images: Sequence[Photo]) -> Layout:
    """photos.tar of photos/SPLIT/CLASS/NAME, as `tar cf photos.tar photos` makes it."""
    members = {f"photos/{photo.split}/{photo.class_name}/{photo.name}": photo for photo in images}
    write(folder, [("photos.tar", tar_bytes((name, photo.data) for name, photo in members.items()))])
    return Layout("photos.tar", "tar", {f"photos.tar/{name}": photo for name, photo in members.items()})


def webdataset_cls(folder: Path, images: Sequence[Photo]) -> Layout:
    """SPLIT-0000.tar and SPLIT-0001.tar of NNN.jpg and NNN.cls with the class's name."""
    return _webdataset(folder, images, lambda photo: ("cls", photo.class_name.encode()))


def webdataset_json(folder: Path, images: Sequence[Photo]) -> Layout:
    """The same with NNN.json, which holds the age as well."""
    layout = _webdataset(
        folder, images, lambda p: ("json", json.dumps({"label": p.class_name, "age": p.age, "note": "x"}).encode())
    )
    return dataclasses.replace(layout, settings={"label_columns": "label,age"}, has_age=True)


def _webdataset(folder: Path, images: Sequence[Photo], label: Callable[[Photo], tuple[str, bytes]]) -> Layout:
    keys = {}
    for split in SPLITS:
        part = [photo for photo in images if photo.split == split]
        for shard in range(2):
            members = []
            for number, photo in list(enumerate(part))[shard::2]:
                suffix, data = label(photo)
                members += [(f"{number:03d}.jpg", photo.data), (f"{number:03d}.{suffix}", data)]
                keys[f"{split}-{shard:04d}.tar/{number:03d}.jpg"] = photo
            write(folder, [(f"{split}-{shard:04d}.tar", tar_bytes(members))])
    return Layout("", "tar", keys)


def hugging_face(folder: Path, images: Sequence[Photo]) -> Layout:
    """SPLIT-00000-of-00001.parquet with a struct `image` and whole numbers whose names are in the metadata."""
    names = sorted({photo.class_name for photo in images})
    label = {"names": names, "_type": "ClassLabel"}
    features = {"image": {"_type": "Image"}, "label": label, "age": {"dtype": "float64", "_type": "Value"}}
    metadata = {b"huggingface": json.dumps({"info": {"features": features}}).encode()}
    keys = {}
    for split in SPLITS:
        part = [photo for photo in images if photo.split == split]
        file = f"{'validation' if split == 'val' else split}-00000-of-00001.parquet"
        table = pa.table(
            {
                "image": [{"bytes": photo.data, "path": photo.name} for photo in part],
                "label": pa.array([names.index(photo.class_name) for photo in part], pa.int64()),
                "age": [photo.age for photo in part],
            }
        )
        pq.write_table(table.replace_schema_metadata(metadata), folder / file, row_group_size=4)
        keys |= {f"{file}/{number}": photo for number, photo in enumerate(part)}
    return Layout("", "parquet", keys, has_age=True)


def petastorm(folder: Path, images: Sequence[Photo]) -> Layout:
    """A Petastorm data set with its pickled schema, written without Spark; needs Petastorm."""
    from petastorm.codecs import CompressedImageCodec
    from petastorm.unischema import Unischema, UnischemaField

    fields = [
        UnischemaField("image", np.uint8, (None, None, 3), CompressedImageCodec("jpeg"), False),
        UnischemaField("label", np.str_, (), None, False),
        UnischemaField("age", np.float64, (), None, False),
    ]
    rows = {
        "image": [photo.data for photo in images],
        "label": [photo.class_name for photo in images],
        "age": [photo.age for photo in images],
    }
    table = pa.table(rows)
    pq.write_table(table, folder / "part-00000.parquet", row_group_size=4)
    pickled = pickle.dumps(Unischema("Photos", fields), protocol=2)
    schema = table.schema.with_metadata({b"dataset-toolkit.unischema.v1": pickled})
    pq.write_metadata(schema, folder / "_common_metadata")
    keys = {f"part-00000.parquet/{number}": photo for number, photo in enumerate(images)}
    return Layout("", "petastorm", keys, {"label_columns": "label,age"}, has_splits=False, has_age=True)


LAYOUTS: dict[str, Callable[[Path, Sequence[Photo]], Layout]] = {
    function.__name__: function
    for function in (
        class_folders,
        split_folders,
        flat_names,
        csv_table,
        jsonl_table,
        parquet_table,
        tar_per_class,
        tar_of_tars,
        tar_of_folders,
        webdataset_cls,
        webdataset_json,
        hugging_face,
        petastorm,
    )
}
