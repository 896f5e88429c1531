"""Images as files in folders: a folder for each class, or the class in each file's name."""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Iterator

import pyarrow as pa

from cvdist import storage
from cvdist.config import PrepareConfig, canonical_split
from cvdist.errors import ConfigError, DataError
from cvdist.sources.rows import IMAGE_SUFFIXES, SPLIT_FOLDERS, Row, Source, is_image_path, require_text, tables

log = logging.getLogger("cvdist.sources")
NUM_EXAMPLES = 3


@dataclasses.dataclass(frozen=True)
class Folder:
    """What lies directly in a folder.

    Attributes:
        url: Where it is.
        folders: Visible folders in it, sorted; those that begin with `_`, as jobs name their own, are not among them.
        passed_over: Those that begin with `_`.
        num_files: Files in it.
    """

    url: str
    folders: tuple[str, ...]
    passed_over: tuple[str, ...]
    num_files: int


def look(url: str) -> Folder:
    """Lists what lies directly in a folder, not holding the names of its files."""
    names, num_files = [], 0
    for entry in storage.scan_dir(url):
        if entry.is_dir:
            names.append(storage.name(entry.url))
            require_text(names[-1])
        else:
            num_files += 1
    visible = sorted(name for name in names if not name.startswith("."))
    passed_over = tuple(name for name in visible if name.startswith("_"))
    for name in passed_over:
        log.warning(
            "%s: passed over, its files count as skipped; folders that begin with _ are no classes; rename it if it is one",
            storage.join(url, name),
        )
    return Folder(url, tuple(name for name in visible if name not in passed_over), passed_over, num_files)


def class_folders(config: PrepareConfig) -> Source:
    """Finds class folders, with or without split folders (train, validation or val, test) above them.

    Raises:
        DataError: There is no class folder, a single class, or a class that train lacks.
    """
    url = config.source_url
    top = look(url)
    split_folders = [name for name in top.folders if name in SPLIT_FOLDERS]
    if not split_folders:
        require_classes(url, top.folders)
        return Source("class_folders", lambda source: list_folders(source, url, [top], [None]))
    extra = sorted(set(top.folders) - set(split_folders))
    if extra or {"val", "validation"} <= set(split_folders):
        raise DataError(
            f"{url} holds the folders {', '.join(top.folders)}; expected class folders, or split folders train, val, test alone;"
            f" move {', '.join(extra) or 'val or validation'} away"
        )
    if "train" not in split_folders:
        raise DataError(
            f"{url} holds {', '.join(split_folders)} but no train; expected a folder train; rename or add it"
        )
    found = {name: look(storage.join(url, name)) for name in split_folders}
    require_classes(f"{url} (train)", found["train"].folders)
    for name, folder in found.items():
        unknown = sorted(set(folder.folders) - set(found["train"].folders))
        if unknown:
            raise DataError(
                f"{url}: {name} holds classes that train lacks: {', '.join(unknown)}; expected those of train; add or remove them"
            )
    parts = [dataclasses.replace(top, folders=()), *found.values()]
    splits = [None, *(canonical_split(name) for name in split_folders)]
    return Source("class_folders", lambda source: list_folders(source, url, parts, splits))


def require_classes(url: str, classes: tuple[str, ...]) -> None:
    """Raises DataError unless there are at least two classes."""
    if not classes:
        raise DataError(f"{url} holds no images in class folders; expected CLASS/IMAGE.jpg below it; correct the URL")
    if len(classes) == 1:
        raise DataError(
            f"{url} holds the single class {classes[0]!r}; expected at least two class folders; add another, or go one folder up"
        )


def list_folders(source: Source, url: str, parts: list[Folder], splits: list[str | None]) -> Iterator[pa.Table]:
    """Lists the images of the classes in each part, and counts all else."""

    def rows() -> Iterator[Row]:
        for part, split in zip(parts, splits, strict=True):
            source.num_skipped += part.num_files
            for name in part.passed_over:
                source.num_skipped += sum(1 for _ in storage.walk_files(storage.join(part.url, name)))
            for name in part.folders:
                num_images = 0
                for path, size_bytes in walk_images(source, url, storage.join(part.url, name)):
                    num_images += 1
                    yield Row(path, size_bytes=size_bytes, class_name=name, split=split)
                if not num_images:
                    raise DataError(
                        f"{storage.join(part.url, name)} holds no image; expected files named"
                        f" {' '.join('*' + s for s in IMAGE_SUFFIXES)}; add images or remove the folder"
                    )

    return tables(rows())


def walk_images(source: Source, source_url: str, url: str) -> Iterator[tuple[str, int]]:
    """Yields path below the source and size of every image below `url`, and counts the other files.

    Raises:
        DataError: A name is not valid Unicode.
    """
    for entry in storage.walk_files(url):
        path = storage.relative(entry.url, source_url)
        require_text(path)
        if is_image_path(path):
            yield path, entry.size_bytes
        else:
            source.num_skipped += 1


def flat_names(config: PrepareConfig) -> Source:
    r"""Finds the class in each file's name: `(cat|dog)\.\d+` in cat.0.jpg.

    The pattern is searched in the path below the source; its first group is the class, or all of the match where it has none.

    Raises:
        ConfigError: There is no pattern, or it is no regular expression.
    """
    if config.label_pattern is None:
        raise ConfigError(
            r"label_pattern: is missing; expected a regular expression for flat_names; use for example '(cat|dog)\.\d+'"
        )
    try:
        pattern = re.compile(config.label_pattern)
    except re.error as error:
        raise ConfigError(
            f"label_pattern: {config.label_pattern!r} is no regular expression ({error}); expected one whose first group is the class;"
            r" use for example '(cat|dog)\.\d+'"
        ) from None
    return Source("flat_names", lambda source: tables(flat_rows(source, config.source_url, pattern)))


def flat_rows(source: Source, url: str, pattern: re.Pattern[str]) -> Iterator[Row]:
    """Lists the images below `url` with what the pattern finds in their paths.

    Raises:
        DataError: It finds nothing in any of them, or there are none.
    """
    examples: list[str] = []
    num_found = 0
    for path, size_bytes in walk_images(source, url, url):
        first = path.split("/")[0]
        row = Row(path, size_bytes=size_bytes, split=canonical_split(first) if first in SPLIT_FOLDERS else None)
        match = pattern.search(path)
        name = match[min(1, pattern.groups)] if match else None
        if name:
            num_found += 1
            yield row._replace(class_name=name)
        else:
            examples = sorted({*examples, path})[:NUM_EXAMPLES]
            yield row.rejected("no_label", f"label_pattern {pattern.pattern!r} finds no class in the name")
    if not num_found:
        raise DataError(
            f"{url}: label_pattern {pattern.pattern!r} finds no class in any name ({', '.join(examples) or 'there is no image'});"
            " expected one that matches, its first group the class; correct it"
        )
