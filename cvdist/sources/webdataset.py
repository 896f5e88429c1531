"""WebDataset's samples in tar files: members beside each other whose names are alike up to the first dot.

Source: the WebDataset format, https://github.com/webdataset/webdataset, README, "WebDataset".
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator
from typing import Any

import pyarrow as pa

from cvdist.errors import DataError
from cvdist.sources.columns import class_name, group_value
from cvdist.sources.rows import IMAGE_SUFFIXES, Row, is_hidden, is_text
from cvdist.sources.tables import convert
from cvdist.sources.tars import HeaderFile, Member

LABEL_BYTES = {"cls": 1024, "json": 1 << 20}  # the longest that are read
MAX_SAMPLE_FILES = 256
EXTENSIONS = tuple(suffix[1:] for suffix in IMAGE_SUFFIXES)


@dataclasses.dataclass(frozen=True)
class Fields:
    """What is read of a sample's .json.

    Attributes:
        label: The class.
        further: Further labels.
        group: The group.
        prefers_json: The class is in .json, also beside a .cls.
        extra: Types of the further labels.
    """

    label: str = "label"
    further: tuple[str, ...] = ()
    group: str | None = None
    prefers_json: bool = False
    extra: pa.Schema = dataclasses.field(default_factory=lambda: pa.schema([]))


@dataclasses.dataclass(frozen=True)
class Sample:
    """An image and what lies beside it: the text of .cls and the object of .json, None where there is none that can be read."""

    image: Member
    cls: str | None
    json: dict[str, Any] | None

    def labelled(self, row: Row, fields: Fields) -> Row:
        """Adds the labels to the image's row.

        Raises:
            DataError: The class is no name or whole number, or a further label does not fit its type.
        """
        where, values = row.key, self.json or {}
        if not fields.extra.names and not fields.group and not fields.prefers_json and self.cls is not None:
            return row._replace(class_name=self.cls)
        value = values.get(fields.label)
        if isinstance(value, (float, list, dict)):
            raise DataError(
                f"{where}: {fields.label!r} in .json is {str(value)[:80]}; expected a name or a whole number for the class; name"
                " another one first in --label_columns"
            )
        name = class_name(value)
        if name is None and not fields.prefers_json:
            name = self.cls
        row = row._replace(
            class_name=name,
            group=group_value(values.get(fields.group)) if fields.group else None,
            extra=tuple(convert(values.get(field.name), field.type, where) for field in fields.extra),
        )
        if name is None or not is_text(name):
            beside = f"a .json with {fields.label!r}" + ("" if fields.prefers_json else ", or a .cls")
            return row._replace(class_name=None).rejected(
                "no_label", f"no class; expected {beside} beside the image, with its name up to the first dot"
            )
        return row


def samples(file: HeaderFile, found: Iterable[Member]) -> Iterator[Sample | Member]:
    """Yields the samples of an archive; members that belong to none as they are, of kind "beside" where they are files.

    Label files that an image has used are not among them.
    """
    last, group = "", Group()
    for member in found:
        name = member.name.removeprefix("./")
        if member.kind == "folder":
            continue
        if member.kind != "file" or is_hidden(name) or not is_text(name):
            yield member
            continue
        folder, slash, name = name.rpartition("/")
        first, _, extension = name.partition(".")
        key = folder + slash + first
        if key != last or extension in group.files or len(group.files) == MAX_SAMPLE_FILES:
            yield from group.samples()
            last, group = key, Group()
        group.files[extension] = member
        limit = LABEL_BYTES.get(extension.rpartition(".")[2], -1)
        if member.size_bytes <= limit:  # read now, while it is near
            group.labels[extension] = file.read_at(member.offset, member.size_bytes)
    yield from group.samples()


@dataclasses.dataclass
class Group:
    """Members whose names are alike up to the first dot, by the rest of their names, and what the label files hold."""

    files: dict[str, Member] = dataclasses.field(default_factory=dict)
    labels: dict[str, bytes] = dataclasses.field(default_factory=dict)

    def samples(self) -> Iterator[Sample | Member]:
        """Tells the images from what labels them.

        Of `a.left.jpg`, `a.left.cls` and `a.jpg`, `a.cls` each image has the label file that is named like it; one without takes
        the sample's own, unless the sample has an image of its own: then it is no image but a mask or the like.
        """
        has_plain = any(extension.lower() in EXTENSIONS for extension in self.files)
        used: set[str] = set()
        for extension, member in self.files.items():
            prefix, dot, suffix = extension.rpartition(".")
            if suffix.lower() not in EXTENSIONS:
                continue
            own = [f"{prefix}{dot}{kind}" for kind in LABEL_BYTES]
            if prefix and not any(name in self.files for name in own):
                if has_plain:
                    continue
                own = list(LABEL_BYTES)
            used.update((extension, *own))
            yield Sample(member, read_cls(self.labels.get(own[0])), read_json(self.labels.get(own[1])))
        for extension, member in self.files.items():
            if extension not in used:
                yield dataclasses.replace(member, kind="beside")


def read_cls(data: bytes | None) -> str | None:
    """Returns the text of a .cls file; None where there is none."""
    try:
        return (data or b"").decode().strip() or None
    except UnicodeDecodeError:
        return None


def read_json(data: bytes | None) -> dict[str, Any] | None:
    """Returns the object of a .json file; None where there is none."""
    try:
        found = json.loads(data or b"null")
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def label_files(file: HeaderFile, found: Iterable[Member], fields: Fields) -> bool:
    """Tells whether the first members are samples with labels: an image has a .cls, or a .json that names its class, beside it."""
    return any(
        isinstance(sample, Sample) and (sample.cls is not None or fields.label in (sample.json or {}))
        for sample in samples(file, found)
    )
