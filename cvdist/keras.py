"""cvdist for `model.fit`: the optimizer, the data set, and callbacks in place of Horovod's, which Keras 3 has broken.

    from cvdist.keras import DistributedOptimizer, default_callbacks, image_dataset_from_shards, init

    init()
    model.compile(DistributedOptimizer(keras.optimizers.SGD(0.1)), loss, metrics=["accuracy"], jit_compile=False)
    model.fit(image_dataset_from_shards(url), epochs=5, callbacks=default_callbacks())

Alone and under `horovodrun -np N python program.py` alike.
"""

from __future__ import annotations

import math
from typing import Any

import keras
import numpy as np

from cvdist import comm
from cvdist.batch_norm import SyncBatchNormalization, synchronize
from cvdist.comm import World
from cvdist.dataset import image_dataset_from_shards
from cvdist.errors import ConfigError
from cvdist.gradients import DistributedOptimizer, shared_variables
from cvdist.variables import is_seed

__all__ = [
    "BroadcastCallback",
    "DistributedOptimizer",
    "LearningRateWarmupCallback",
    "MetricAverageCallback",
    "SyncBatchNormalization",
    "SyncCheckCallback",
    "World",
    "default_callbacks",
    "image_dataset_from_shards",
    "init",
    "synchronize",
]


def init() -> World:
    """Joins the ranks of `horovodrun` and gives this one its GPU, or its cores; call it before TensorFlow has run anything.

    Returns:
        This rank among how many; a world of one without a launcher.

    Raises:
        ConfigError: The launcher's variables make no sense, or there are fewer GPUs than ranks on this node.
        SyncError: The ranks did not find each other.
    """
    world = comm.init()
    comm.configure_devices(world)
    return world


def default_callbacks(*, check_every_steps: int = 100, world: World | None = None) -> list[keras.callbacks.Callback]:
    """Returns the callbacks that every `fit` on several ranks needs; put them before all others.

    Callbacks behind them see the metrics of all ranks, so that early stopping and the like decide alike on every rank.
    """
    world = world or comm.init()
    return [
        BroadcastCallback(world=world),
        SyncCheckCallback(check_every_steps, world=world),
        MetricAverageCallback(world=world),
    ]


class BroadcastCallback(keras.callbacks.Callback):  # type: ignore[misc]
    """Gives all ranks the variables of rank zero before the first step, those of the optimizer included.

    Random generators (dropout, augmentation layers) get rank zero's seed too, with the rank mixed in, so that each rank draws
    masks of its own.
    """

    def __init__(self, *, world: World | None = None) -> None:
        super().__init__()
        self._world = world or comm.init()

    def on_train_begin(self, logs: Any = None) -> None:
        """Broadcasts.

        Raises:
            ConfigError: The model is compiled by XLA, under which Horovod fails, or has no weights yet.
            SyncError: The ranks hold different models, or would take different numbers of steps.
        """
        if self._world.size == 1:
            return
        model = self.model
        error = ConfigError(
            "the model is compiled with jit_compile=True, or on a GPU with the default auto; expected False, because Horovod's"
            " operations cannot be compiled by XLA; use model.compile(..., jit_compile=False)"
        )
        comm.all_ranks_ok(self._world, error if model.jit_compile else None)
        error = ConfigError(
            "the model has no weights yet, because it has not been told the shape of its input; expected some to broadcast; begin it with"
            " keras.Input((H, W, C)), or call model.build((None, H, W, C)) before fit"
        )
        comm.all_ranks_ok(self._world, None if model.built else error)
        steps = [int(text) for text in comm.gather_bytes(str(self.params.get("steps") or 0).encode(), self._world)]
        if len(set(steps)) > 1:
            raise ConfigError(
                f"the ranks would take {', '.join(map(str, steps))} steps in an epoch (0: unknown); expected the same on all, or"
                " those with more wait for ever; use image_dataset_from_shards, or set steps_per_epoch"
            )
        if not model.optimizer.built:
            model.optimizer.build(model.trainable_variables)
        variables = [*model.variables, *model.optimizer.variables]
        comm.broadcast(variables, self._world)
        for seed in filter(is_seed, variables):
            first, *others = seed.value.numpy().tolist()
            seed.assign([(first * self._world.size + self._world.rank) % 2**32, *others])


class SyncCheckCallback(keras.callbacks.Callback):  # type: ignore[misc]
    """Compares weights and optimizer of all ranks, bit for bit, after the first step, every N steps and at the end."""

    def __init__(self, every_steps: int = 100, *, world: World | None = None) -> None:
        super().__init__()
        if every_steps < 1:
            raise ConfigError(f"every_steps: {every_steps} is out of range; expected 1 or more; change it")
        self._every_steps, self._world, self._num_calls = every_steps, world or comm.init(), 0

    def on_train_begin(self, logs: Any = None) -> None:
        """Starts to count."""
        self._num_calls = 0

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Meets the other ranks: one that has stopped, or is at another epoch, is told, instead of waited for."""
        comm.barrier(self._world, f"epoch {epoch}")

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Compares at the first batch and every N.

        Raises:
            SyncError: Some ranks differ.
        """
        self._num_calls += 1
        if self._num_calls == 1 or self._num_calls % self._every_steps == 0:
            self._check()

    def on_train_end(self, logs: Any = None) -> None:
        """Compares.

        Raises:
            SyncError: Some ranks differ, or only some have ended.
        """
        self._check()

    def _check(self) -> None:
        model = self.model
        held = [*model.trainable_variables, *shared_variables(model.optimizer)]
        comm.check_in_sync(held, self._world, steps_of(model.optimizer))


class MetricAverageCallback(keras.callbacks.Callback):  # type: ignore[misc]
    """Puts the metrics over the samples of all ranks into the logs of each epoch, and averages moving statistics.

    Exact, whatever share of the samples a rank has: what is added up are the sums and counts inside of Keras's metrics, not
    their results. Validation is over what the ranks read together. Logs that are no metrics of the model stay as they are.
    Where image_dataset_from_shards fills the last batch up, Keras counts what only fills in `loss` and in `metrics=`;
    `weighted_metrics=` leave it out.
    """

    def __init__(self, *, world: World | None = None) -> None:
        super().__init__()
        self._world = world or comm.init()
        self._is_training = False
        self._of_training: dict[str, float] | None = None

    def on_train_begin(self, logs: Any = None) -> None:
        """Starts."""
        self._is_training = True

    def on_train_end(self, logs: Any = None) -> None:
        """Ends."""
        self._is_training = False

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Forgets the last epoch."""
        self._of_training = None

    def on_test_begin(self, logs: Any = None) -> None:
        """Takes the training's sums before validation resets them."""
        if self._is_training and self._world.size > 1 and self._of_training is None:
            self._of_training = self._results()
            self._average_moving()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Replaces the logs.

        Raises:
            ConfigError: A metric cannot be added up.
        """
        if self._world.size == 1 or logs is None:
            return
        if self._of_training is None:
            found = self._results()
            self._average_moving()
        else:
            found = {**self._of_training, **{f"val_{name}": value for name, value in self._results().items()}}
        logs.update({name: value for name, value in found.items() if name in logs})

    def _average_moving(self) -> None:
        """Gives all ranks the mean of their batch statistics, so that they validate, and save, one model."""
        held = [v for v in self.model.non_trainable_weights if not is_seed(v) and "float" in str(v.dtype)]
        comm.average(held, self._world)

    def _results(self) -> dict[str, float]:
        """Returns the metrics of the model over all ranks; their variables stay this rank's."""
        for metric in _metrics_of(self.model):
            _require_sums(metric)
        variables = self.model.metrics_variables
        own = [np.asarray(variable.value.numpy()) for variable in variables]
        sums = comm.allreduce_sum(np.concatenate([value.astype(np.float64).reshape(-1) for value in own]), self._world)
        parts = np.split(sums, np.cumsum([value.size for value in own])[:-1])
        for variable, value, part in zip(variables, own, parts, strict=True):
            variable.assign(part.reshape(value.shape).astype(value.dtype))
        results = {name: float(np.asarray(value)) for name, value in self.model.get_metrics_result().items()}
        for variable, value in zip(variables, own, strict=True):
            variable.assign(value)
        return results


class LearningRateWarmupCallback(keras.callbacks.Callback):  # type: ignore[misc]
    """Raises the learning rate over the first steps from a share of it to all of it, linearly.

    Counted in steps of the optimizer, so a run that goes on from a checkpoint goes on with its warm-up.
    Source: Goyal 2017, section 2.2.
    """

    def __init__(
        self, learning_rate: float, warmup_steps: int, *, start: float | None = None, world: World | None = None
    ) -> None:
        """Makes the callback.

        Args:
            learning_rate: At the end of the warm-up, for the global batch.
            warmup_steps: Steps of the optimizer; the last of them has the whole rate.
            start: Share of the rate from which it rises; by default 1 / ranks, the rate of one rank's batch.
            world: The ranks; by default those of horovodrun.
        """
        super().__init__()
        if warmup_steps < 1:
            raise ConfigError(f"warmup_steps: {warmup_steps} is out of range; expected 1 or more; change it")
        if not (math.isfinite(learning_rate) and learning_rate > 0):
            raise ConfigError(f"learning_rate: {learning_rate} is out of range; expected more than 0; change it")
        self._peak, self._warmup_steps = learning_rate, warmup_steps
        self._start = 1 / (world or comm.init()).size if start is None else start
        self._is_done = False

    def on_train_begin(self, logs: Any = None) -> None:
        """Looks at the optimizer.

        Raises:
            ConfigError: The rate is a schedule, which no callback can set.
        """
        self._is_done = False
        stepping = getattr(self.model.optimizer, "inner_optimizer", self.model.optimizer)
        if not isinstance(stepping._learning_rate, keras.Variable):
            raise ConfigError(
                f"the learning rate is a {type(stepping._learning_rate).__name__}; expected a number, which a callback can set;"
                " put the warm-up into the schedule"
            )

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        """Sets the rate of the next step."""
        if self._is_done:
            return
        done = steps_of(self.model.optimizer)
        self._is_done = done >= self._warmup_steps
        share = 1.0 if self._is_done else self._start + (1 - self._start) * (done + 1) / self._warmup_steps
        self.model.optimizer.learning_rate = self._peak * share


def steps_of(optimizer: Any) -> int:
    """Returns how many updates a Keras optimizer has made; micro-batches that only accumulate do not count."""
    return int(keras.ops.convert_to_numpy(optimizer.iterations))


def _metrics_of(model: Any) -> list[Any]:
    """Returns the metrics of a compiled model, one by one."""
    return [inner for metric in model.metrics for inner in (getattr(metric, "metrics", None) or [metric])]


def _require_sums(metric: Any) -> None:
    """Refuses a metric whose variables may be something else than sums over samples."""
    bases = [base for base in type(metric).__mro__ if base.__module__.startswith("keras.") and base is not keras.Metric]
    known = [base for base in bases if issubclass(base, keras.Metric)]
    if not known and not getattr(metric, "adds_up", False):
        raise ConfigError(
            f"metric {metric.name}: {type(metric).__name__} keeps variables of its own; expected sums over samples, to be added"
            " over ranks; derive it from keras.metrics.Mean or Sum, or set `adds_up = True` in the class if they are sums"
        )
