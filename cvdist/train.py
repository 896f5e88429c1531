"""The training loop, top to bottom: plan, read, augment, step, compare, evaluate, save. Alone and under horovodrun alike.

python -m cvdist.train --data URL --model NAME --epochs E --global_batch B --run URL
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import sys
from typing import TYPE_CHECKING, Any

from cvdist import storage
from cvdist.config import CONFIG_NAME, TrainConfig, canonical_split, dump, resolve
from cvdist.errors import CheckpointError, ConfigError, CvdistError, NonFiniteError

if TYPE_CHECKING:
    from cvdist.checkpoint import Checkpoint
    from cvdist.cli import Reporter
    from cvdist.comm import World
    from cvdist.shards import Manifest

# TensorFlow and what needs it are imported inside of functions: --help answers in 0.2 s.

METRICS_NAME = "metrics.jsonl"
RESULT_NAME = "result.json"


def train(config: TrainConfig, world: World, report: Reporter) -> dict[str, Any]:
    """Trains a model as `config` says and returns the last evaluation, or an empty dict when there was none.

    Raises:
        CvdistError: Anything a user can cause; the ranks of a run fail together where they can.
    """
    import keras
    import tensorflow as tf

    from cvdist import augment, checkpoint, comm, gradients, metrics, models, optim
    from cvdist.evaluate import Evaluator, summary
    from cvdist.loader import Loader
    from cvdist.shards import read_manifest

    # 1. Everything that can be wrong is checked on every rank, and all ranks fail together, before the first collective.
    failure: CvdistError | None = None
    try:
        config = dataclasses.replace(
            config, data=storage.check_url(config.data, "data"), run=storage.check_url(config.run, "run")
        )
        manifest = read_manifest(config.data)
        plan = resolve(config, manifest, world.size)
        shape = (plan.image_size, plan.image_size, plan.channels)
        model = models.create_model(
            config.model, input_shape=shape, num_classes=plan.num_classes, seed=config.seed, precision=config.precision,
            dropout=config.dropout,
        )  # fmt: skip
        optimizer = gradients.DistributedOptimizer(optim.make_optimizer(config.optim, plan.lr), world)
        optimizer.build(model.trainable_variables)
        done_steps = open_run(config, manifest, model, optimizer, report) if world.rank == 0 else 0
    except CvdistError as error:
        failure = error
    comm.all_ranks_ok(world, failure)
    done_steps = int(comm.allreduce_sum([done_steps], world)[0])
    variables = [*model.variables, *optimizer.variables]
    comm.broadcast(variables, world)
    report.show_run(config, plan, models.describe(model), done_steps)

    # 2. One step. The mean is over the samples of the whole global batch that count, so padding changes nothing.
    logits_model = models.logits_of(model)
    heads, head_weights = models.training_heads(model)
    seeds = [variable for variable in model.variables if variable.path.endswith("seed_generator_state")]
    moving = model.non_trainable_weights  # batch statistics; weights are variables without seeds
    loss_of = (
        keras.losses.BinaryCrossentropy(from_logits=True, reduction=None)
        if plan.num_classes == 2
        else keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction=None)
    )

    @tf.function(jit_compile=False)
    def train_step(images: Any, labels: Any, weights: Any, params: Any, divisor: Any) -> Any:
        with tf.GradientTape() as tape:
            outputs = heads(augment.apply(images, params), training=True)
            losses = (
                sum(weight * loss_of(labels[:, None], outputs[name]) for name, weight in head_weights.items()) * weights
            )
            loss = tf.reduce_sum(losses) / divisor
        optimizer.apply(tape.gradient(loss, model.trainable_variables), model.trainable_variables)
        return tf.reduce_sum(losses)

    @tf.function(jit_compile=False)
    def logits_of(images: Any) -> Any:
        return logits_model(images, training=False)

    loader = Loader(
        config.data,
        manifest,
        canonical_split(config.train_split),
        world=world,
        global_batch=config.global_batch,
        image_size=plan.image_size,
        config=config.loader,
        seed=config.seed,
        augmentation=config.augment,
    )
    evaluator = (
        Evaluator(config.data, manifest, plan.eval_split, plan.image_size, config.global_batch, config.loader, world)
        if plan.eval_split
        else None
    )
    history = History(config.run, done_steps, world)
    saver = (
        checkpoint.Checkpointer(config.run, keep=config.checkpoint.keep, report=report.say) if world.rank == 0 else None
    )
    if saver:
        saver.remove_unfinished()
    meter = metrics.Meter()
    last_step = min(plan.total_steps, config.max_steps or plan.total_steps)
    result: dict[str, Any] = {}
    # Loss sum of this rank and valid samples of all ranks, for each step since the last line of metrics.
    unreported: list[tuple[Any, int]] = []

    # 3. The loop. `step` counts finished steps since the start of the run.
    step = done_steps
    start = divmod(done_steps, plan.steps_per_epoch)
    with contextlib.closing(loader.batches(*start, num_epochs=config.epochs - start[0])) as batches:
        while step < last_step:
            with meter.waiting():
                batch = next(batches)
            lr = optim.lr_at(
                step,
                peak=plan.lr,
                warmup_steps=plan.warmup_steps,
                total_steps=plan.total_steps,
                schedule=config.optim.schedule,
                steps_per_epoch=plan.steps_per_epoch,
            )
            optimizer.learning_rate.assign(lr)
            for index, variable in enumerate(seeds):
                variable.assign([(config.seed * world.size + world.rank) % 2**32, step * len(seeds) + index])
            divisor = tf.constant(batch.num_valid / world.size, tf.float32)
            loss_sum = train_step(batch.images, batch.labels, batch.weights, batch.params, divisor)
            step += 1
            unreported.append((loss_sum, batch.num_valid))
            meter.update(batch.num_valid)

            ends, epoch_ends = step == last_step, step % plan.steps_per_epoch == 0
            epochs_done, epoch = step // plan.steps_per_epoch, (step - 1) // plan.steps_per_epoch
            saves = (
                ends
                or (epoch_ends and epochs_done % config.checkpoint.every_epochs == 0)
                or every(config.checkpoint.every_steps, step)
            )
            evaluates = plan.eval_split is not None and (
                ends or (epoch_ends and every(config.evaluate.every_epochs, epochs_done))
            )
            if saves or every(config.log_every_steps, step):
                loss_sums = comm.allreduce_sum([float(value) for value, _ in unreported], world)
                loss = float(loss_sums.sum() / sum(count for _, count in unreported))
                unreported = []
                require_finite(loss, step, lr)
                history.add(step=step, epoch=epoch, loss=loss, lr=lr)
                report.step(step, last_step, loss, meter)
            if epoch_ends:
                ledger = loader.ledger.with_sums(comm.allreduce_sum(loader.ledger.sums(), world))
                line = ledger.check(loader.plan(epoch), f"{config.data}, split {config.train_split!r}")
                history.add(step=step, epoch=epoch, ledger=line)
                report.ledger(line)
            if saves or every(config.check_sync_every_steps, step) or step == done_steps + 1:
                comm.check_in_sync([*model.trainable_variables, *optimizer.variables], world, step)
            if saves or evaluates:  # moving statistics are each rank's own until someone reads them
                comm.average(moving, world)
            if evaluates and evaluator:
                result = summary(evaluator.split, evaluator.run(logits_of))
                history.add(step=step, epoch=epoch, evaluation=result)
                report.evaluation(step, result)
                meter.restart()
            if saves and saver:
                history.write()
                saver.save(model, optimizer, run_state(config, manifest, step, epochs_done))

    # 4. The end: the last checkpoint is complete before the run says so.
    failure = None
    try:
        if saver:
            saver.close()
            checkpoint.export_weights(model, storage.join(config.run, "final.weights.h5"))
            if step > done_steps:
                storage.write_bytes(
                    storage.join(config.run, RESULT_NAME),
                    json.dumps({"steps": step, **result}).encode(),
                    overwrite=True,
                )
    except CvdistError as error:
        failure = error
    comm.all_ranks_ok(world, failure)
    report.end(config, step)
    return result


def every(interval: int, count: int) -> bool:
    """Tells whether `count` is a multiple of `interval`; 0 is never."""
    return interval > 0 and count % interval == 0


def require_finite(loss: float, step: int, lr: float) -> None:
    """Raises NonFiniteError for a loss that is no number; the checkpoints before it stay."""
    if not math.isfinite(loss):
        raise NonFiniteError(
            f"the loss is {loss} at step {step} (lr {lr:.3g}); expected a finite number;"
            " lower optim.lr, lengthen optim.warmup_epochs or set optim.clip_norm, and resume from the last checkpoint"
        )


def order_settings(config: TrainConfig) -> dict[str, Any]:
    """Returns the settings that decide which sample comes when: a resumed run must share them."""
    return {
        "train_split": config.train_split,
        "global_batch": config.global_batch,
        "seed": config.seed,
        "loader.num_lanes": config.loader.num_lanes,
        "loader.shuffle_bytes": config.loader.shuffle_bytes,
        "loader.sampling": config.loader.sampling,
        "loader.member": config.loader.member,
        "loader.remainder": config.loader.remainder,
    }


def run_state(config: TrainConfig, manifest: Manifest, step: int, epochs_done: int) -> Any:
    """Returns what a checkpoint says beside its variables."""
    from cvdist.checkpoint import State

    return State(
        model=config.model,
        epoch=epochs_done,
        step=step,
        seed=config.seed,
        global_batch=config.global_batch,
        config_digest=hashlib.sha256(json.dumps(dump(config), sort_keys=True).encode()).hexdigest(),
        data_digest=manifest.digest,
        extra=order_settings(config),
    )


def open_run(config: TrainConfig, manifest: Manifest, model: Any, optimizer: Any, report: Reporter) -> int:
    """Makes the folder of the run or goes on from its newest good checkpoint, on rank zero; returns the steps that are done.

    Raises:
        ConfigError: The folder holds a run and resume was not asked for.
        CheckpointError: The checkpoint is of another model, data set or order. Nothing has been written then.
    """
    from cvdist import checkpoint

    start = None
    if config.resume:
        start = checkpoint.latest(config.run, report.say)
        if start is None:
            report.say(f"{config.run} holds no checkpoint yet; starting from the beginning")
    elif storage.exists(storage.join(config.run, "checkpoints")):
        raise ConfigError(
            f"run: {config.run} holds a run already; expected a new folder; use --resume to go on, or another --run URL"
        )
    if start is not None:
        check_order(start, config, manifest)
        checkpoint.restore(start, model, optimizer, model_name=config.model)
    storage.write_text(storage.join(config.run, CONFIG_NAME), json.dumps(dump(config), indent=1), overwrite=True)
    return start.state.step if start is not None else 0


def check_order(start: Checkpoint, config: TrainConfig, manifest: Manifest) -> None:
    """Raises CheckpointError unless the run that saved `start` read the same samples in the same order."""
    if start.state.data_digest != manifest.digest:
        raise CheckpointError(
            f"{start.url} was trained on another data set than {config.data}; expected the same;"
            " correct --data, or use another --run URL"
        )
    for name, value in order_settings(config).items():
        found = start.state.extra.get(name)
        if found != value:
            raise CheckpointError(
                f"{start.url} was trained with {name} {found!r}; expected {value!r} as this run asks for;"
                f" use --{name} {found}, or another --run URL"
            )


class History:
    """The lines of metrics.jsonl, held in memory and written as a whole with each checkpoint; on rank zero only."""

    def __init__(self, run_url: str, done_steps: int, world: World) -> None:
        """Goes on behind the lines of the first `done_steps` steps that the run has."""
        self._url, self._active = storage.join(run_url, METRICS_NAME), world.rank == 0
        self._lines: list[dict[str, Any]] = []
        if self._active and done_steps and storage.exists(self._url):
            lines = [json.loads(line) for line in storage.read_text(self._url).splitlines()]
            self._lines = [line for line in lines if line["step"] <= done_steps]

    def add(self, **line: Any) -> None:
        """Adds one line."""
        if self._active:
            self._lines.append(line)

    def write(self) -> None:
        """Writes all lines."""
        if self._active:
            storage.write_text(self._url, "".join(json.dumps(line) + "\n" for line in self._lines), overwrite=True)


if __name__ == "__main__":
    from cvdist import cli

    sys.exit(cli.main(["train", *sys.argv[1:]]))
