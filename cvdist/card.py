"""The card of a data set: README.md beside the manifest, and the table of its classes. Pure: a manifest in, text out.

Plain strings: a template engine would be one more package on every node that prepares, for forty lines. The same data set has the same
card wherever and whenever it was made, so neither URLs nor dates are in it.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from cvdist import __version__
from cvdist.config import PrepareConfig
from cvdist.shards import Manifest

CARD_NAME = "README.md"
MAX_CLASSES = 1000
# What the bytes of stored images depend on.
PACKAGES = ("pyarrow", "opencv-python-headless", "simplejpeg", "pillow")


def card(manifest: Manifest, reasons: Mapping[str, tuple[int, str]], examples: Mapping[str, str]) -> str:
    """Returns the Markdown of README.md.

    Args:
        manifest: The data set.
        reasons: Of its rejected inputs: how many for each reason, and the first path.
        examples: The key of one sample of each class.
    """
    spec = manifest.image
    num_bytes = sum(shard.num_bytes for split in manifest.splits.values() for shard in split.shards)
    kinds = {3: "RGB", 1: "grey"}
    sides = "both sides" if spec.resize == "exact" else "shorter side"
    stored = f"JPEG of quality {spec.quality}" if spec.codec == "jpeg" else "raw pixels"
    contents = f"{manifest.num_rows:,} images in {len(manifest.classes):,} classes, {num_bytes / 1e6:,.1f} MB."
    rejected = f"{manifest.num_quarantined:,} quarantined + {manifest.num_skipped:,} skipped (no images by their names, or left out)"
    sections = [
        "# An image classification data set of cvdist",
        f"{contents} Each is {kinds[spec.channels]}, {sides} {spec.image_size} px, stored as {stored}.",
        "## Splits",
        markdown_table(split_table(manifest)),
        f"{manifest.num_inputs:,} inputs = {manifest.num_rows:,} images + {rejected}.",
        "## Classes",
        imbalance(manifest),
        markdown_table(class_table(manifest, MAX_CLASSES)),
        *target_section(manifest),
        "## Examples",
        markdown_table(
            [["class", "key"], *([name, examples[name]] for name in manifest.classes[:20] if name in examples)]
        ),
        "## Quarantine",
        quarantine_text(manifest, reasons),
        "## Repeats",
        repeats_text(manifest),
        "## Use",
        USE,
        "## How it was made",
        f"```bash\n{command(manifest)}\n```",
        markdown_table(
            [["setting", "value"], *([f"`{name}`", as_value(v)] for name, v in sorted(manifest.settings.items()))]
        ),
        f"With {', '.join(versions())}. Listing and settings have the sha256 `{manifest.digest}`.",
        "`manifest.json` is the data set: it names every shard, with rows, bytes and checksums. What it does not name is not read.",
    ]
    return "\n\n".join(sections) + "\n"


KIND_WORDS = {
    "duplicates": "more than once in a class of a split",
    "leaks": "in more than one split",
    "conflicts": "in more than one class",
}
USE = """DATA_URL is the folder of this file.

```bash
python -m cvdist.train --data DATA_URL --model resnet50 --epochs 90 --global_batch 256 --run RUN_URL   # one process
horovodrun -np 8 python -m cvdist.train --data DATA_URL --model resnet50 --epochs 90 --global_batch 2048 --run RUN_URL
cvdist inspect DATA_URL --grid samples.png                                                             # look at some
spark-submit jobs/audit.py DATA_URL                                                                    # prove all
```

Each split's folder is a Petastorm data set as well: `make_reader("DATA_URL/train")`."""


def command(manifest: Manifest) -> str:
    """Returns the command that makes this data set: every setting that differs from its default."""
    defaults = {field.name: field.default for field in dataclasses.fields(PrepareConfig)}
    changed = [(name, value) for name, value in manifest.settings.items() if value != defaults.get(name)]
    options = [f"--{name} {shlex.quote(as_value(value))}" for name, value in changed]
    return " ".join(["spark-submit jobs/prepare.py SOURCE_URL DATA_URL", *options])


def as_value(value: Any) -> str:
    """Returns a setting as the command line takes it."""
    return value if isinstance(value, str) else json.dumps(value)


def versions() -> list[str]:
    """Returns the versions of cvdist and of the packages that stored bytes depend on."""
    found = [f"cvdist {__version__}"]
    for name in PACKAGES:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:  # it came under another name, such as opencv-python
            found.append(f"{name} of unknown version")
    return found


def split_table(manifest: Manifest) -> list[list[str]]:
    """Returns a table with a header and one row for each split."""
    rows = [["split", "images", "share", "shards", "MB"]]
    for name, split in manifest.splits.items():
        num_bytes = sum(shard.num_bytes for shard in split.shards)
        share = f"{split.num_rows / max(1, manifest.num_rows):.1%}"
        rows.append([name, f"{split.num_rows:,}", share, f"{len(split.shards):,}", f"{num_bytes / 1e6:,.1f}"])
    return rows


def class_table(manifest: Manifest, max_classes: int) -> list[list[str]]:
    """Returns a table with a header and one row for each class, in label order: its samples in each split.

    Where there are more than `max_classes`, the largest and the smallest stand for all, by size.
    """
    splits = list(manifest.splits.values())
    totals = [sum(split.class_rows[label] for split in splits) for label in range(len(manifest.classes))]
    labels = list(range(len(totals)))
    num_hidden = len(labels) - max_classes
    if num_hidden > 0:
        by_size = sorted(labels, key=lambda label: (-totals[label], label))
        labels = [*by_size[: (max_classes + 1) // 2], -1, *by_size[len(by_size) - max_classes // 2 :]]
    rows = [["label", "class", *manifest.splits, "all", "share"]]
    for label in labels:
        if label < 0:
            rows.append(["", f"... {num_hidden:,} more ...", *[""] * (len(splits) + 2)])
            continue
        counts = [f"{split.class_rows[label]:,}" for split in splits]
        share = f"{totals[label] / max(1, manifest.num_rows):.1%}"
        rows.append([str(label), manifest.classes[label], *counts, f"{totals[label]:,}", share])
    return rows


def imbalance(manifest: Manifest) -> str:
    """Says how even the classes of train, or else of the first split, are."""
    name = "train" if "train" in manifest.splits else next(iter(manifest.splits))
    rows = manifest.splits[name].class_rows
    ratio = f"{max(rows) / min(rows):.2f} : 1" if min(rows) else "some class has none"
    return f"{min(rows):,} to {max(rows):,} images per class in {name} (largest to smallest {ratio})."


def quarantine_text(manifest: Manifest, reasons: Mapping[str, tuple[int, str]]) -> str:
    """Says how many inputs were rejected for which reasons, each with the first path."""
    if not reasons:
        return "No input was rejected."
    rows = [[reason, f"{count:,}", first] for reason, (count, first) in sorted(reasons.items())]
    files = ", ".join(f"`{table.path}`" for table in manifest.quarantine)
    return f"All of them are in {files}.\n\n{markdown_table([['reason', 'inputs', 'first'], *rows])}"


def repeats_text(manifest: Manifest) -> str:
    """Says how many files are in the data set more than once."""
    if not any(manifest.repeat_files.values()):
        return "Every file is in the data set once."
    rows = [[KIND_WORDS[kind], f"{manifest.repeat_files.get(kind, 0):,}"] for kind in KIND_WORDS]
    files = ", ".join(f"`{table.path}`" for table in manifest.repeats)
    return f"All of them are in {files}.\n\n{markdown_table([['files that are stored', 'files'], *rows])}"


def target_section(manifest: Manifest) -> list[str]:
    """Describes further labels, where there are any."""
    if not manifest.targets:
        return []
    rows = [[target.name, target.kind, ", ".join(target.classes[:20])] for target in manifest.targets]
    return ["## Further labels", markdown_table([["column", "kind", "classes"], *rows])]


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """Returns a Markdown table; numbers are aligned right."""
    body = rows[1:]
    is_number = [
        bool(body) and all(re.fullmatch(r"[\d,.%]*", row[column]) for row in body) for column in range(len(rows[0]))
    ]
    lines = [[escaped(cell) for cell in row] for row in rows]
    lines.insert(1, ["---:" if right else "---" for right in is_number])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def escaped(text: str) -> str:
    """Returns text, such as the name of a folder, so that Markdown shows it as it is; what stands in backquotes is code."""
    if re.fullmatch(r"`\w+`", text):
        return text
    visible = "".join(char if char.isprintable() else f"\\x{ord(char):02x}" for char in text)
    return re.sub(r"([\\`*_{}\[\]<>#|~&!$])", r"\\\1", visible)
