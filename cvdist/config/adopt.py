"""The settings of an adoption."""

from __future__ import annotations

import dataclasses
from typing import Literal

from cvdist.config.common import canonical_split, different_names, require_range, split_shares
from cvdist.errors import ConfigError

SPLIT_NAMES = ("train", "val", "test")


@dataclasses.dataclass(frozen=True)
class AdoptConfig:
    """Makes a data set of Parquet files that others have written, as they are.

    Attributes:
        url: Folder of the files; a manifest is written into it, and nothing else.
        image: Column of the images as bytes; image.bytes is a field of a struct.
        label: Column of the labels: names, or whole numbers from 0 on; or the NAME of folders NAME=VALUE.
        split: The split of all files: train, val or test; or name=share pairs that sum to 1, by which whole files are dealt. By
            default what folders or files named train, val, validation, test say; train where none is.
        classes: Comma-separated class names in the order of their numbers; by default what the files say.
        image_size: Height and width that training brings the images to, if its own image_size does not say otherwise.
        channels: 3 is RGB, 1 is grey, whatever is stored.
        shape: height,width,channels of images that are stored as bare uint8 pixels, the channels of a pixel side by side.
        replace: A manifest of an earlier adoption gives way.
    """

    url: str
    image: str
    label: str
    split: str | None = None
    classes: str | None = None
    image_size: int = 224
    channels: Literal[1, 3] = 3
    shape: str | None = None
    replace: bool = False

    def __post_init__(self) -> None:
        """Refuses values that mean nothing."""
        require_range("image_size", self.image_size, 8, 8192)
        self.split_shares()
        self.class_names()
        self.pixel_shape()

    def split_shares(self) -> dict[str, float]:
        """Returns the share of each split; none where the files say it.

        Raises:
            ConfigError: It is neither a split nor shares.
        """
        if self.split is None:
            return {}
        if "=" in self.split:
            return split_shares(self.split)
        if canonical_split(self.split) not in SPLIT_NAMES:
            raise ConfigError(
                f"split: {self.split!r} is no split; expected {', '.join(SPLIT_NAMES)}, or shares; use for example train=0.9,val=0.1"
            )
        return {canonical_split(self.split): 1.0}

    def class_names(self) -> tuple[str, ...]:
        """Returns the names of `classes`; none where the files say them.

        Raises:
            ConfigError: One is empty or there twice.
        """
        if self.classes is None:
            return ()
        return different_names("classes", self.classes, of="classes", example="cat,dog")

    def pixel_shape(self) -> tuple[int, ...]:
        """Returns height, width, channels of bare pixels; nothing where the images say it themselves.

        Raises:
            ConfigError: It is no shape.
        """
        if self.shape is None:
            return ()
        parts = [part.strip() for part in self.shape.split(",")]
        shape = tuple(int(part) for part in parts if part.isascii() and part.isdigit())
        if (
            len(shape) != len(parts)
            or len(shape) != 3
            or not all(1 <= side <= 1 << 16 for side in shape)
            or shape[2] not in (1, 3)
        ):
            raise ConfigError(
                f"shape: {self.shape!r} is no shape; expected height,width,channels with 1 or 3 channels; use for example 32,32,3"
            )
        return shape
