"""Input layouts: a URL to a listing of images with their labels and splits.

A listing is an Arrow table: path (relative to the source, unique, sorted), size_bytes, label (class index), split.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict

import numpy as np
import pyarrow as pa

from cvdist import storage
from cvdist.config import canonical_split
from cvdist.errors import DataError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif")
SPLIT_FOLDERS = ("train", "validation", "val", "test")
SCHEMA = pa.schema([("path", pa.string()), ("size_bytes", pa.int64()), ("label", pa.int32()), ("split", pa.string())])


@dataclasses.dataclass(frozen=True)
class Listing:
    """What a source holds: the table above, the class names in label order, and how many files were passed over.

    Passed over are files without an image's suffix, hidden ones, and those beside the class folders.
    """

    table: pa.Table
    classes: list[str]
    num_skipped: int


def class_folders(url: str, shares: dict[str, float], seed: int) -> Listing:
    """Lists class folders, with or without split folders (train, validation or val, test) above them.

    Args:
        url: The source.
        shares: For a source without split folders: the share of each split; every class is split alike.
        seed: Of that split.

    Raises:
        DataError: There is no image, no class folder, a single class, an empty class, or a class that train lacks.
    """
    folders = subfolders(url)
    split_folders = [folder for folder in folders if folder in SPLIT_FOLDERS]
    if not split_folders:
        rows, classes, num_skipped = list_classes(url, "")
        require_classes(url, classes)
        splits = stratified_splits([row[2] for row in rows], shares, seed)
        return listing([(*row, split) for row, split in zip(rows, splits, strict=True)], classes, num_skipped)
    extra = sorted(set(folders) - set(split_folders))
    if extra or {"val", "validation"} <= set(split_folders):
        raise DataError(
            f"{url} holds the folders {', '.join(folders)}; expected class folders, or split folders train, val, test alone;"
            f" move {', '.join(extra) or 'val or validation'} away"
        )
    found: list[tuple[str, int, str, str]] = []
    num_skipped = 0
    by_split: dict[str, set[str]] = {}
    for folder in split_folders:
        rows, classes, skipped = list_classes(url, folder)
        found += [(*row, canonical_split(folder)) for row in rows]
        by_split[folder] = set(classes)
        num_skipped += skipped
    num_skipped += num_files(url)
    classes = sorted(by_split.get("train", set()))
    if "train" not in by_split:
        raise DataError(
            f"{url} holds {', '.join(split_folders)} but no train; expected a folder train; rename or add it"
        )
    require_classes(f"{url} (train)", classes)
    for folder, names in by_split.items():
        if not names <= set(classes):
            unknown = ", ".join(sorted(names - set(classes)))
            raise DataError(
                f"{url}: {folder} holds classes that train lacks: {unknown}; expected those of train; add or remove them"
            )
    return listing(found, classes, num_skipped)


def subfolders(url: str) -> list[str]:
    """Returns the names of the visible folders in `url`, sorted."""
    names = [storage.name(entry.url) for entry in storage.list_dir(url) if entry.is_dir]
    return sorted(name for name in names if not name.startswith((".", "_")))


def list_classes(url: str, split_folder: str) -> tuple[list[tuple[str, int, str]], list[str], int]:
    """Returns (path, bytes, class) of every image of one folder of classes, the classes, and the number of other files."""
    top = storage.join(url, split_folder) if split_folder else url
    classes = subfolders(top)
    rows: list[tuple[str, int, str]] = []
    num_skipped = num_files(top)
    for name in classes:
        before = len(rows)
        for entry in storage.walk_files(storage.join(top, name)):
            path = storage.relative(entry.url, url)
            if is_image_path(path):
                rows.append((path, entry.size_bytes, name))
            else:
                num_skipped += 1
        if len(rows) == before:
            raise DataError(
                f"{storage.join(top, name)} holds no image; expected files named {' '.join('*' + s for s in IMAGE_SUFFIXES)};"
                " add images or remove the folder"
            )
    return rows, classes, num_skipped


def num_files(url: str) -> int:
    """Returns how many files lie directly in a folder."""
    return sum(not entry.is_dir for entry in storage.list_dir(url))


def is_image_path(path: str) -> bool:
    """Tells whether a file's name promises an image; hidden files, and those in hidden folders, do not.

    Raises:
        DataError: The name is not valid Unicode.
    """
    try:
        path.encode()
    except UnicodeEncodeError:
        raise DataError(f"{path!a}: the name is not valid Unicode; expected one that is; rename the file") from None
    return not any(part.startswith(".") for part in path.split("/")) and path.lower().endswith(IMAGE_SUFFIXES)


def require_classes(url: str, classes: list[str]) -> None:
    """Raises DataError unless there are at least two classes."""
    if not classes:
        raise DataError(f"{url} holds no images in class folders; expected CLASS/IMAGE.jpg below it; correct the URL")
    if len(classes) == 1:
        raise DataError(
            f"{url} holds the single class {classes[0]!r}; expected at least two class folders; add another, or go one folder up"
        )


def stratified_splits(labels: list[str], shares: dict[str, float], seed: int) -> list[str]:
    """Deals the samples of every class to splits by `shares`, the same way for the same sorted input and seed."""
    members: dict[str, list[int]] = defaultdict(list)
    for index, label in enumerate(labels):
        members[label].append(index)
    names = list(shares)
    edges = np.cumsum([shares[name] for name in names])[:-1]
    splits = [""] * len(labels)
    rng = np.random.Generator(np.random.Philox(key=[seed, 1]))
    for label in sorted(members):
        order = rng.permutation(members[label])
        for name, part in zip(names, np.split(order, np.floor(edges * len(order) + 0.5).astype(int)), strict=True):
            for index in part:
                splits[index] = name
    return splits


def listing(rows: list[tuple[str, int, str, str]], classes: list[str], num_skipped: int) -> Listing:
    """Makes the table of (path, bytes, class, split) rows, sorted by path."""
    rows = sorted(rows)
    labels = {name: index for index, name in enumerate(classes)}
    columns = [
        [row[0] for row in rows],
        [row[1] for row in rows],
        [labels[row[2]] for row in rows],
        [row[3] for row in rows],
    ]
    return Listing(pa.table(columns, schema=SCHEMA), classes, num_skipped)
