"""The settings of a preparation."""

from __future__ import annotations

import dataclasses
from typing import Literal

from cvdist.config.common import MAX_SEED, MIB, require_range, split_shares
from cvdist.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class PrepareConfig:
    r"""How raw images become a data set.

    Attributes:
        source_url: The images: a folder, a table (.csv, .jsonl, .parquet), a tar file, or a folder of these.
        target_url: Where the data set is written; it must not hold another one.
        source: Layout of the source. auto looks; class_folders: CLASS/x.jpg, perhaps below train/val/test; flat_names: label_pattern
            finds the class in the file's name; table: rows of path and label; tar: class per tar, tar of tars, class folders or
            .jpg + .cls/.json in tars; parquet: a column of image bytes; petastorm: a Petastorm data set.
        label_pattern: For flat names: a regular expression whose first group is the class, as (cat|dog)\.\d+.
        image_column: For tables: the column of paths, or of image bytes; by default path, or the only one that fits.
        label_columns: For tables, Parquet, Petastorm, and .json in tars: comma-separated names; the first is the class, others are
            further targets. By default label, and in tables and Parquet every other column that is no path, split, weight or group.
        target_kinds: What further label columns are, as name=regression|binary|multiclass pairs; by default as their values say.
        group_column: Column of a table whose rows with the same value stay in one split; needs split_by group.
        classes: Comma-separated names of the only classes taken; by default all.
        limit_per_class: Most inputs taken of each class; of each class in each split where the source names splits.
        image_size: Pixels of the shorter side (resize=short) or of both sides (resize=exact). Smaller sources are enlarged.
        resize: short keeps the aspect ratio; exact makes squares.
        channels: 3 stores RGB, 1 stores grey.
        codec: jpeg (baseline 4:2:0 with restart markers) or raw uint8 pixels.
        quality: JPEG quality, 1 to 100.
        keep_original: Small upright baseline JPEGs keep their pixels and size; restart markers are added without loss.
        background: What shows through transparent pixels: red,green,blue, 0 to 255.
        max_bytes: Larger files are quarantined, unread.
        max_pixels: Images with more pixels are quarantined before they are decoded.
        max_aspect: Images whose longer side is more than so many times the shorter one are quarantined.
        untrusted: Decode in a process of its own, which is killed when it takes too long or too much memory.
        decode_timeout_s: For untrusted images: seconds for one image.
        decode_memory_bytes: For untrusted images: memory of the decoding process.
        split: Shares of a source without splits of its own, as name=share pairs that sum to 1.
        split_by: given: as the source says; ratio: shares of every class; content: by the sha256 of the file, so that copies stay
            together; group: by group_column. auto is given where the source names splits, ratio elsewhere.
        on_leak: The same file in two splits: keep lists them; drop quarantines the copy outside of test, then val; fail ends the job.
        shard_bytes: Size aimed at for one Parquet file.
        row_group_bytes: Size aimed at for one Parquet row group, the unit of reading.
        seed: Of the global shuffle and of the split.
        max_bad_fraction: More undecodable inputs than this share of all end the job without a data set.
        read_threads: Inputs that one task reads at once.
        append: Add the inputs that the data set at target_url does not hold yet, in new shards.
        dry_run: Say what would be done, and do nothing.
    """

    source_url: str
    target_url: str
    source: Literal["auto", "class_folders", "flat_names", "table", "tar", "parquet", "petastorm"] = "auto"
    label_pattern: str | None = None
    image_column: str | None = None
    label_columns: str | None = None
    target_kinds: str | None = None
    group_column: str | None = None
    classes: str | None = None
    limit_per_class: int | None = None
    image_size: int = 224
    resize: Literal["short", "exact"] = "short"
    channels: Literal[1, 3] = 3
    codec: Literal["jpeg", "raw"] = "jpeg"
    quality: int = 90
    keep_original: bool = False
    background: str = "255,255,255"
    max_bytes: int = 64 * MIB
    max_pixels: int = 64_000_000
    max_aspect: int = 50
    untrusted: bool = False
    decode_timeout_s: float = 20
    decode_memory_bytes: int = 2048 * MIB
    split: str = "train=0.8,val=0.1,test=0.1"
    split_by: Literal["auto", "given", "ratio", "content", "group"] = "auto"
    on_leak: Literal["keep", "drop", "fail"] = "keep"
    shard_bytes: int = 64 * MIB
    row_group_bytes: int = MIB
    seed: int = 0
    max_bad_fraction: float = 0.01
    read_threads: int = 8
    append: bool = False
    dry_run: bool = False

    def __post_init__(self) -> None:
        """Refuses values that no data set can be made with."""
        require_range("image_size", self.image_size, 8, 8192)
        require_range("quality", self.quality, 1, 100)
        require_range("shard_bytes", self.shard_bytes, 64 * 1024, 16 * 1024 * MIB)
        require_range("row_group_bytes", self.row_group_bytes, 16 * 1024, min(self.shard_bytes, 1024 * MIB))
        require_range("seed", self.seed, 0, MAX_SEED)
        require_range("max_bad_fraction", self.max_bad_fraction, 0.0, 1.0)
        require_range("max_bytes", self.max_bytes, 1, 1024 * MIB)
        require_range("max_pixels", self.max_pixels, 1, 1 << 30)
        require_range("max_aspect", self.max_aspect, 1, 1 << 16)
        require_range("decode_timeout_s", self.decode_timeout_s, 0.1, 3600)
        require_range("decode_memory_bytes", self.decode_memory_bytes, 256 * MIB, 1 << 40)
        require_range("limit_per_class", 1 if self.limit_per_class is None else self.limit_per_class, 1, 1 << 40)
        require_range("read_threads", self.read_threads, 1, 256)
        if self.keep_original and (self.resize, self.codec) != ("short", "jpeg"):
            raise ConfigError(
                f"keep_original: stores JPEGs as they are; expected resize short and codec jpeg, found {self.resize} and {self.codec};"
                " change these, or leave keep_original out"
            )
        if (self.group_column is not None) != (self.split_by == "group"):
            raise ConfigError(
                f"group_column: {self.group_column!r} with split_by {self.split_by}; expected both --group_column NAME and"
                " --split_by group, or neither; add what is missing"
            )
        self.background_rgb()
        self.split_shares()

    def background_rgb(self) -> tuple[int, int, int]:
        """Returns `background` as red, green, blue, 0 to 255.

        Raises:
            ConfigError: It is not three such numbers.
        """
        parts = self.background.split(",")
        if len(parts) != 3 or not all(part.strip().isdigit() and int(part) <= 255 for part in parts):
            raise ConfigError(
                f"background: {self.background!r} is no colour; expected red,green,blue, each 0 to 255; use for example 255,255,255"
            )
        red, green, blue = (int(part) for part in parts)
        return red, green, blue

    def split_shares(self) -> dict[str, float]:
        """Returns the shares of `split` by canonical split name.

        Raises:
            ConfigError: The text is not name=share pairs, or the shares do not sum to 1.
        """
        return split_shares(self.split)
