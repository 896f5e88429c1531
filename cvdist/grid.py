"""A picture of random samples of each class."""

from __future__ import annotations

import dataclasses
import io

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from cvdist.images import Pixels, decode_stored
from cvdist.reader import ShardReader
from cvdist.shards import Manifest

MAX_CLASSES = 20
MAX_GROUPS = 512  # row groups read in search of rare classes
CELL_PX, GAP_PX, MARGIN_PX, TEXT_PX, MAX_NAME_PX = 112, 4, 12, 15, 240
PAPER, INK, FAINT, EMPTY = (255, 255, 255), (20, 20, 20), (110, 110, 110), (238, 238, 238)


@dataclasses.dataclass(frozen=True)
class Picture:
    """A PNG, and one line on what it shows."""

    png: bytes
    caption: str


def draw(data_url: str, manifest: Manifest, split: str, *, per_class: int, seed: int) -> Picture:
    """Draws a row for each class, of at most MAX_CLASSES chosen at random: its name, its size, and random samples.

    Raises:
        DataError: A shard is not what the manifest says.
        StorageError: The file system failed.
    """
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, 3])))
    num_classes, class_rows = len(manifest.classes), manifest.splits[split].class_rows
    shown = sorted(int(label) for label in rng.permutation(num_classes)[:MAX_CLASSES])
    wanted = {label: min(per_class, class_rows[label]) for label in shown}
    images = collect(ShardReader(data_url, manifest, split), manifest, split, wanted, rng)
    missing = sum(wanted.values()) - sum(len(found) for found in images.values())
    caption = f"{split}: {manifest.splits[split].num_rows:,} images, "
    caption += f"{len(shown)} of {num_classes:,} classes" if num_classes > MAX_CLASSES else f"{num_classes} classes"
    caption += f"; {missing} samples of rare classes were not found in {MAX_GROUPS} row groups" if missing else ""
    names = {label: (manifest.classes[label], f"{class_rows[label]:,} (label {label})") for label in shown}
    return Picture(layout(caption, names, images, per_class), caption)


def collect(
    reader: ShardReader, manifest: Manifest, split: str, wanted: dict[int, int], rng: np.random.Generator
) -> dict[int, list[Pixels]]:
    """Reads row groups at random until every class has the samples wanted; rows of a split are shuffled, so the first will do."""
    images: dict[int, list[Pixels]] = {label: [] for label in wanted}
    missing = sum(wanted.values())
    num_groups = sum(len(shard.row_group_rows) for shard in manifest.splits[split].shards)
    for group in rng.permutation(num_groups)[:MAX_GROUPS]:
        if not missing:
            break
        rows = reader.read(int(group))
        for row in rng.permutation(len(rows.labels)):
            label = int(rows.labels[row])
            if label in images and len(images[label]) < wanted[label]:
                images[label].append(decode_stored(rows.image(int(row)), manifest.image))
                missing -= 1
    return images


def layout(title: str, names: dict[int, tuple[str, str]], images: dict[int, list[Pixels]], per_class: int) -> bytes:
    """Lays out the PNG."""
    bold, plain = ImageFont.load_default(TEXT_PX), ImageFont.load_default(TEXT_PX - 2)
    widths = [max(bold.getlength(name), plain.getlength(count)) for name, count in names.values()]
    name_px = min(MAX_NAME_PX, int(max(widths)) + 1)
    left, top = MARGIN_PX + name_px + MARGIN_PX, MARGIN_PX + TEXT_PX + MARGIN_PX
    width = max(left + per_class * (CELL_PX + GAP_PX), MARGIN_PX + int(bold.getlength(title))) - GAP_PX + MARGIN_PX
    sheet = Image.new("RGB", (width, top + len(names) * (CELL_PX + GAP_PX) - GAP_PX + MARGIN_PX), PAPER)
    pen = ImageDraw.Draw(sheet)
    pen.text((MARGIN_PX, MARGIN_PX), title, INK, bold)
    for row, (label, (name, count)) in enumerate(names.items()):
        y = top + row * (CELL_PX + GAP_PX)
        middle = y + CELL_PX // 2
        pen.text((MARGIN_PX, middle - TEXT_PX - 2), shortened(name, bold, name_px), INK, bold)
        pen.text((MARGIN_PX, middle + 2), count, FAINT, plain)
        for column in range(per_class):
            x = left + column * (CELL_PX + GAP_PX)
            pen.rectangle((x, y, x + CELL_PX - 1, y + CELL_PX - 1), EMPTY)
            if column < len(images[label]):
                tile = Image.fromarray(fitted(images[label][column]))
                sheet.paste(tile, (x + (CELL_PX - tile.width) // 2, y + (CELL_PX - tile.height) // 2))
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def shortened(name: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, max_px: int) -> str:
    """Cuts a name to a width."""
    if font.getlength(name) <= max_px:
        return name
    while name and font.getlength(name + "...") > max_px:
        name = name[:-1]
    return name + "..."


def fitted(pixels: Pixels) -> Pixels:
    """Returns an image as RGB, scaled as a whole into a cell; small ones are enlarged as squares, so that a user sees their pixels."""
    height, width = pixels.shape[:2]
    scale = CELL_PX / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    how = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR if scale < 2 else cv2.INTER_NEAREST
    resized = np.asarray(cv2.resize(pixels, size, interpolation=how), dtype=np.uint8).reshape(size[1], size[0], -1)
    return np.ascontiguousarray(np.broadcast_to(resized, (*resized.shape[:2], 3)))
