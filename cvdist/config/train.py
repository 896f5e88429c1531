"""The settings of a training run, and what they mean for one data set on so many ranks."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

from cvdist.config.common import GIB, MAX_SEED, MIB, canonical_split, require_range
from cvdist.errors import ConfigError

MYPY = False  # not typing.TYPE_CHECKING: jsonargparse runs such a block, and --help would wait for NumPy, pyarrow and OpenCV
if MYPY:
    from cvdist.shards import Manifest


@dataclasses.dataclass(frozen=True)
class LoaderConfig:
    """How shards are read.

    Attributes:
        threads: Decoding threads of each rank; by default the cores of the node over its ranks.
        prefetch_batches: Decoded batches held ready.
        readahead_bytes: Compressed bytes of row groups held ahead of decoding; by default 8 MiB for each thread.
        num_lanes: Upper limit of the strands that the global order is woven from; the order does not depend on ranks.
        shuffle_bytes: Most memory, on all ranks together, for the row groups that the lanes are in; fewer lanes where that is too
            little. By default 64 MiB, and 512 MiB for adopted data sets, whose rows may be sorted.
        remainder: pad gives the last batch of an epoch weightless samples; drop leaves its samples out, and says so.
        sampling: all is each sample once in an epoch. balanced is each class equally often; weighted is by the weights of the data set;
            bootstrap is as many as there are, drawn with replacement once for the run. An epoch has as many samples as the split.
        member: Which member of an ensemble this is, for bootstrap: each has samples of its own. Source: Breiman 1996.
        cache_path: Local folder that keeps what was read from HDFS, for all ranks of the node; none by default.
        cache_bytes: Most bytes kept there.
        trace_path: Local folder that receives, from each rank, which samples each of its batches held.
    """

    threads: int | None = None
    prefetch_batches: int = 4
    readahead_bytes: int | None = None
    num_lanes: int = 256
    shuffle_bytes: int | None = None
    remainder: Literal["pad", "drop"] = "pad"
    sampling: Literal["all", "balanced", "weighted", "bootstrap"] = "all"
    member: int = 0
    cache_path: str | None = None
    cache_bytes: int = 100 * GIB
    trace_path: str | None = None

    def __post_init__(self) -> None:
        """Refuses values that no loader can work with."""
        require_range("loader.threads", 1 if self.threads is None else self.threads, 1, 1024)
        require_range("loader.prefetch_batches", self.prefetch_batches, 1, 1024)
        require_range("loader.readahead_bytes", self.readahead_bytes or 0, 0, 1 << 40)
        require_range("loader.num_lanes", self.num_lanes, 1, 1 << 16)
        require_range("loader.shuffle_bytes", self.shuffle_bytes or 0, 0, 1 << 40)
        require_range("loader.member", self.member, 0, 1 << 20)
        require_range("loader.cache_bytes", self.cache_bytes, MIB, 1 << 50)


@dataclasses.dataclass(frozen=True)
class AugmentConfig:
    """Random changes of training images; everything is off unless asked for.

    Attributes:
        flip: Mirror half of the images horizontally.
        crop_scale_min: Smallest share of the image's area that a random crop keeps; 1 is off. Source: Szegedy 2015, section 6.
        crop_ratio_max: Widest aspect ratio of a random crop; its inverse is the narrowest.
        rotation_deg: Largest rotation to either side, degrees.
        shift: Largest shift, as a share of the side.
        shear: Largest shear, as horizontal displacement per height.
        zoom: Largest relative zoom; 0.2 draws from 0.8 to 1.2.
        brightness: Largest relative change of brightness.
        contrast: Largest relative change of contrast.
        saturation: Largest relative change of saturation.
    """

    flip: bool = False
    crop_scale_min: float = 1.0
    crop_ratio_max: float = 4 / 3
    rotation_deg: float = 0.0
    shift: float = 0.0
    shear: float = 0.0
    zoom: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0

    def __post_init__(self) -> None:
        """Refuses values outside their ranges."""
        require_range("augment.crop_scale_min", self.crop_scale_min, 0.01, 1.0)
        require_range("augment.crop_ratio_max", self.crop_ratio_max, 1.0, 10.0)
        require_range("augment.rotation_deg", self.rotation_deg, 0.0, 180.0)
        for name in ("shift", "shear", "zoom", "brightness", "contrast", "saturation"):
            require_range(f"augment.{name}", getattr(self, name), 0.0, 0.95)


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """Optimizer and learning rate.

    Attributes:
        name: Which optimizer.
        lr: Peak learning rate at this run's global batch. Give lr or base_lr, not both; without either, sgd takes
            base_lr 0.1 and the others lr 0.001.
        base_lr: Peak learning rate at a global batch of 256, scaled to this run's. Source: Goyal 2017, section 2.1.
        scaling: How base_lr grows with the global batch.
        schedule: Shape of the learning rate after the warm-up.
        warmup_epochs: Epochs of linear growth from zero; by default 5 % of all epochs. Source: Goyal 2017, section 2.2.
        momentum: Of sgd and rmsprop; by default 0.9 for sgd and 0 for rmsprop.
        weight_decay: Decoupled decay of kernels, applied to neither biases nor normalisations.
        clip_norm: Largest global norm of the gradient; 0 is off.
    """

    name: Literal["sgd", "adam", "adamw", "rmsprop"] = "sgd"
    lr: float | None = None
    base_lr: float | None = None
    scaling: Literal["linear", "sqrt", "none"] = "linear"
    schedule: Literal["cosine", "constant", "step"] = "cosine"
    warmup_epochs: float | None = None
    momentum: float | None = None
    weight_decay: float = 0.0
    clip_norm: float = 0.0

    def __post_init__(self) -> None:
        """Refuses values outside their ranges."""
        if self.lr is not None and self.base_lr is not None:
            raise ConfigError(
                f"optim: lr {self.lr} and base_lr {self.base_lr} are both set; expected one of them;"
                " drop base_lr to fix the rate at this global batch, or lr to scale it"
            )
        require_range("optim.lr", 1e-3 if self.lr is None else self.lr, 0.0, 100.0)
        require_range("optim.base_lr", 0.1 if self.base_lr is None else self.base_lr, 0.0, 100.0)
        require_range("optim.warmup_epochs", self.warmup_epochs or 0.0, 0.0, 1e6)
        require_range("optim.momentum", self.momentum or 0.0, 0.0, 1.0)
        require_range("optim.weight_decay", self.weight_decay, 0.0, 1.0)
        require_range("optim.clip_norm", self.clip_norm, 0.0, 1e9)


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """When and on what the model is evaluated while it trains.

    Attributes:
        split: Which split; by default val where the data set has one, else none.
        every_epochs: Evaluate after every so many epochs, and after the last one; 0 is never.
    """

    split: str | None = None
    every_epochs: int = 1

    def __post_init__(self) -> None:
        """Refuses what is no number of epochs."""
        require_range("evaluate.every_epochs", self.every_epochs, 0, 1 << 30)


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When checkpoints are written and how many stay.

    Attributes:
        every_epochs: Save after every so many epochs; the end of the run is always saved.
        every_steps: Save after every so many steps as well; 0 is never.
        keep: How many of the newest stay; never fewer than two.
    """

    every_epochs: int = 1
    every_steps: int = 0
    keep: int = 3

    def __post_init__(self) -> None:
        """Refuses to keep fewer than two."""
        require_range("checkpoint.keep", self.keep, 2, 1 << 20)
        require_range("checkpoint.every_epochs", self.every_epochs, 1, 1 << 30)
        require_range("checkpoint.every_steps", self.every_steps, 0, 1 << 30)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """A training run.

    Attributes:
        data: URL of a prepared data set (file:///path or hdfs://host:port/path).
        model: Name of the network; `cvdist models` lists them.
        epochs: Passes over the training split.
        global_batch: Samples of one optimizer step on all ranks together.
        run: URL of the folder that receives the configuration, metrics and checkpoints.
        image_size: Height and width of the model's input, pixels; by default the data set's.
        seed: Of the weights, the order and the augmentation.
        precision: float32, or bfloat16 computation with float32 weights.
        dropout: Share of inputs that the dense layers of the network's head do without, where it has such a setting; by default its own.
        resume: Go on from the newest good checkpoint of the run.
        train_split: Which split is trained on.
        max_steps: End the run after so many steps; 0 is no limit.
        log_every_steps: Steps between two lines of metrics.
        check_sync_every_steps: Steps between two comparisons of the weights of all ranks; 0 compares at step one only.
        loader: How shards are read.
        augment: Random changes of training images.
        optim: Optimizer and learning rate.
        evaluate: When and on what the model is evaluated.
        checkpoint: When checkpoints are written.
    """

    data: str
    model: str
    epochs: int
    global_batch: int
    run: str
    image_size: int | None = None
    seed: int = 0
    precision: Literal["float32", "bfloat16"] = "float32"
    dropout: float | None = None
    resume: bool = False
    train_split: str = "train"
    max_steps: int = 0
    log_every_steps: int = 10
    check_sync_every_steps: int = 100
    loader: LoaderConfig = dataclasses.field(default_factory=LoaderConfig)
    augment: AugmentConfig = dataclasses.field(default_factory=AugmentConfig)
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    evaluate: EvaluateConfig = dataclasses.field(default_factory=EvaluateConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)

    def __post_init__(self) -> None:
        """Refuses values that no run can be made with."""
        require_range("epochs", self.epochs, 1, 1 << 20)
        require_range("global_batch", self.global_batch, 1, 1 << 24)
        require_range("image_size", 224 if self.image_size is None else self.image_size, 8, 8192)
        require_range("seed", self.seed, 0, MAX_SEED)
        require_range("dropout", self.dropout or 0.0, 0.0, 0.95)
        require_range("max_steps", self.max_steps, 0, 1 << 62)
        require_range("log_every_steps", self.log_every_steps, 1, 1 << 30)
        require_range("check_sync_every_steps", self.check_sync_every_steps, 0, 1 << 30)


@dataclasses.dataclass(frozen=True)
class Resolved:
    """A configuration in steps and per-rank numbers, for one data set and one number of ranks."""

    image_size: int
    channels: int
    num_classes: int
    num_samples: int
    eval_split: str | None
    world_size: int
    per_rank_batch: int
    steps_per_epoch: int
    total_steps: int
    warmup_steps: int
    lr: float
    dropped_per_epoch: int
    padded_per_epoch: int


def resolve(config: TrainConfig, manifest: Manifest, world_size: int) -> Resolved:
    """Converts epochs and the global batch into steps and per-rank numbers, once.

    Raises:
        ConfigError: The global batch does not divide over the ranks, or the split cannot feed them.
    """
    batch = config.global_batch
    train_split = require_split("train_split", config.train_split, manifest, config.data)
    eval_split = "val" if "val" in manifest.splits else None
    if config.evaluate.split:
        eval_split = require_split("evaluate.split", config.evaluate.split, manifest, config.data)
    rows = manifest.splits[train_split].num_rows
    if rows < world_size:
        raise ConfigError(
            f"data: split {train_split!r} of {config.data} holds {rows} samples for {world_size} ranks;"
            f" expected at least one sample for each rank; use at most -np {rows}"
        )
    if batch % world_size:
        lower, upper = batch // world_size * world_size, -(-batch // world_size) * world_size
        raise ConfigError(
            f"global_batch: {batch} does not divide over {world_size} ranks; use {f'{lower} or ' if lower else ''}{upper}"
        )
    drop = config.loader.remainder == "drop"
    if drop and rows < batch:
        raise ConfigError(
            f"global_batch: {batch} is more than the {rows} samples of split {train_split!r} and loader.remainder is drop;"
            f" use a global_batch of at most {rows}, or loader.remainder pad"
        )
    steps_per_epoch = rows // batch if drop else -(-rows // batch)
    total_steps = steps_per_epoch * config.epochs
    warmup_epochs = 0.05 * config.epochs if config.optim.warmup_epochs is None else config.optim.warmup_epochs
    return Resolved(
        image_size=config.image_size or manifest.image.image_size,
        channels=manifest.image.channels,
        num_classes=len(manifest.classes),
        num_samples=rows,
        eval_split=eval_split if config.evaluate.every_epochs else None,
        world_size=world_size,
        per_rank_batch=batch // world_size,
        steps_per_epoch=steps_per_epoch,
        total_steps=total_steps,
        warmup_steps=min(round(warmup_epochs * steps_per_epoch), total_steps),
        lr=scaled_lr(config.optim, batch),
        dropped_per_epoch=rows - steps_per_epoch * batch if drop else 0,
        padded_per_epoch=0 if drop else steps_per_epoch * batch - rows,
    )


def scaled_lr(optim: OptimConfig, global_batch: int) -> float:
    """Returns the peak learning rate at `global_batch`. Source: Goyal 2017, section 2.1 (linear)."""
    if optim.lr is not None:
        return optim.lr
    if optim.base_lr is None and optim.name != "sgd":
        return 1e-3
    base_lr = 0.1 if optim.base_lr is None else optim.base_lr
    ratio = global_batch / 256
    return base_lr * {"linear": ratio, "sqrt": math.sqrt(ratio), "none": 1.0}[optim.scaling]


def require_split(name: str, split: str, manifest: Manifest, data_url: str) -> str:
    """Returns the one name of the split that the setting `name` asks for; raises ConfigError where the data set has none such."""
    split = canonical_split(split)
    if split not in manifest.splits:
        known = ", ".join(sorted(manifest.splits))
        raise ConfigError(
            f"{name}: {split!r} is not in the data set {data_url}; expected one of {known}; use one of them"
        )
    return split
