"""What test_keras.py asks of every world: each rank trains through cvdist.keras and writes what it got to FOLDER/rank-N.json."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cvdist.keras as ours

WORLD = ours.init()

import keras  # noqa: E402 - the world is joined first
import numpy as np  # noqa: E402
import tensorflow as tf  # noqa: E402

from cvdist import comm, gradients, tensors  # noqa: E402

RANK, SIZE = WORLD.rank, WORLD.size
FOLDER = Path(sys.argv[1])
STEPS, GLOBAL_BATCH = 20, 16


def message_of(call: Callable[[], object]) -> str:
    """What a call raises."""
    try:
        call()
    except Exception as error:  # noqa: BLE001 - the test looks at it
        return f"{type(error).__name__}: {error}"
    return ""


def bits_of(model: Any) -> str:
    """Fingerprint of weights and optimizer, less the gradients that a rank has accumulated since the last update."""
    return comm.fingerprint([*model.trainable_variables, *gradients.shared_variables(model.optimizer)]).hex()


def a_model(*, norm: bool = False, seed: int = 1) -> Any:
    """A small network."""
    keras.utils.set_random_seed(seed)
    norms = [ours.SyncBatchNormalization()] if norm else []
    return keras.Sequential(
        [keras.Input((6,)), keras.layers.Dense(16, activation="tanh"), *norms, keras.layers.Dense(3)]
    )


def data_of(rank: int, num: int) -> tuple[Any, Any]:
    """Samples of one rank."""
    draw = np.random.default_rng(rank)
    return draw.normal(size=(num, 6)).astype(np.float32), draw.integers(0, 3, num).astype(np.int32)


LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def fitted(wrap: Callable[[Any], Any], **settings: Any) -> dict[str, Any]:
    """A user's fit with dropout, weights that differ at first, and data that differ always."""
    keras.utils.set_random_seed(1 + RANK)
    layers = [keras.layers.Dense(16, activation="relu"), keras.layers.Dropout(0.2), keras.layers.Dense(3)]
    model = keras.Sequential([keras.Input((6,)), *layers])
    optimizer = wrap(keras.optimizers.Adam(1e-2, **settings.pop("optimizer", {})))
    model.compile(optimizer, LOSS, metrics=["accuracy"], jit_compile=False, **settings)
    start = comm.fingerprint(model.trainable_variables).hex()
    callbacks = ours.default_callbacks(check_every_steps=3, world=WORLD)
    error = message_of(
        lambda: model.fit(*data_of(RANK, 64), batch_size=16, epochs=3, verbose=0, callbacks=callbacks, shuffle=True)
    )
    seeds = [variable.value.numpy().tolist() for variable in model.variables if "seed_generator" in variable.path]
    return {"start": start, "error": error, "end": bits_of(model), "seed": seeds[0][0], "steps": ours_steps(model)}


def ours_steps(model: Any) -> int:
    """Updates made."""
    return int(keras.ops.convert_to_numpy(model.optimizer.iterations))


def drifted(wrap: Callable[[Any], Any]) -> dict[str, str]:
    """The same fit without callbacks, from equal weights, on data that differ between ranks; the weights at the end."""
    model = a_model()
    model.compile(wrap(keras.optimizers.SGD(0.1)), LOSS, jit_compile=False)
    start = comm.fingerprint(model.trainable_variables).hex()
    error = message_of(lambda: model.fit(*data_of(RANK, 64), batch_size=16, epochs=2, verbose=0))
    return {"start": start, "error": error, "end": comm.fingerprint(model.trainable_variables).hex()}


def horovods_own(optimizer: Any) -> Any:
    """What Horovod's users write."""
    import horovod.tensorflow.keras as hvd

    return hvd.DistributedOptimizer(optimizer)


def trained(micro_batches: int, *, norm: bool = False) -> dict[str, Any]:
    """20 updates with the same global batches, whatever the ranks and the micro-batches; losses are of the global batch."""
    model = a_model(norm=norm)
    steps = {"gradient_accumulation_steps": micro_batches} if micro_batches > 1 else {}
    optimizer = ours.DistributedOptimizer(keras.optimizers.SGD(0.05, momentum=0.9, weight_decay=1e-3, **steps), WORLD)
    optimizer.build(model.trainable_variables)
    comm.broadcast([*model.variables, *optimizer.variables], WORLD)

    @tf.function(jit_compile=False)
    def step(images: Any, labels: Any) -> Any:
        with tf.GradientTape() as tape:
            loss = LOSS(labels, model(images, training=True))
        optimizer.apply_gradients(
            zip(tape.gradient(loss, model.trainable_variables), model.trainable_variables, strict=True)
        )
        return loss

    images, labels = data_of(99, GLOBAL_BATCH * STEPS)
    micro = GLOBAL_BATCH // SIZE // micro_batches
    losses = []
    for number in range(STEPS):
        own = []
        for part in range(micro_batches):
            first = number * GLOBAL_BATCH + (RANK * micro_batches + part) * micro
            own.append(float(step(images[first : first + micro], labels[first : first + micro])))
        losses.append(float(comm.allreduce_sum(np.float64(np.mean(own)), WORLD) / SIZE))
    weights = np.concatenate([variable.numpy().reshape(-1) for variable in model.weights])
    return {"losses": losses, "weights": weights.tolist(), "bits": comm.fingerprint(model.weights).hex()}


def one_rank_ahead() -> list[str]:
    """Rank 0 takes a step that only accumulates before the others have begun, which none does that reduces."""
    variable = keras.Variable(np.zeros(2, np.float32))
    optimizer = ours.DistributedOptimizer(keras.optimizers.SGD(1.0, gradient_accumulation_steps=3), WORLD)
    optimizer.build([variable])
    step = tf.function(lambda grad: optimizer.apply([grad], [variable]), jit_compile=False)
    for _ in range(3):
        step(tf.zeros(2))  # traced, together
    done = FOLDER / "rank-0-is-ahead"
    if RANK == 0:
        step(tf.constant([3.0, 0.0]))
        step(tf.constant([3.0, 0.0]))
        done.touch()
    else:
        started_s = time.monotonic()
        while not done.exists() and time.monotonic() < started_s + 60:
            time.sleep(0.05)
        step(tf.constant([0.0, 3.0]))
        step(tf.constant([0.0, 3.0]))
    ahead = done.exists()
    before = variable.numpy().tolist()
    step(tf.constant([3.0, 0.0]) if RANK == 0 else tf.constant([0.0, 3.0]))
    return [str(ahead), str(before), str(variable.numpy().tolist())]


def overflows(micro_batches: int) -> dict[str, Any]:
    """float16 with dynamic loss scaling through fit's own train step; the last rank overflows in the third batch."""
    keras.config.set_dtype_policy("mixed_float16")
    model = a_model()
    keras.config.set_dtype_policy("float32")
    steps = {"gradient_accumulation_steps": micro_batches} if micro_batches > 1 else {}
    inner = keras.optimizers.SGD(0.05, momentum=0.9, **steps)
    optimizer = ours.DistributedOptimizer(keras.optimizers.LossScaleOptimizer(inner, initial_scale=1024.0), WORLD)
    model.compile(optimizer, LOSS, jit_compile=False)
    images, labels = data_of(RANK, 12 * 4)
    if RANK == SIZE - 1:
        images[2 * 4] = 6e4  # beyond float16 after the first layer's product
        images[2 * 4, 0] = np.inf
    scales = []

    class Scales(keras.callbacks.Callback):
        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            scales.append(float(optimizer.dynamic_scale.numpy()))

    callbacks = [*ours.default_callbacks(check_every_steps=1, world=WORLD), Scales()]
    error = message_of(
        lambda: model.fit(images, labels, batch_size=4, epochs=1, shuffle=False, verbose=0, callbacks=callbacks)
    )
    finite = bool(np.all([np.isfinite(variable.numpy()).all() for variable in model.weights]))
    return {"error": error, "scales": scales, "end": bits_of(model), "steps": ours_steps(model), "finite": finite}


def compressed() -> dict[str, Any]:
    """Gradients in 16 bits, of sizes that do not divide over the ranks."""
    draw = np.random.default_rng(RANK)
    grads = [draw.normal(size=shape).astype(np.float32) for shape in ((5, 7), (), (11,), (3, 2, 2))]
    found = {}
    for name in ("fp16", "bf16"):
        for op in ("average", "sum"):
            call = lambda: tensors.reduce_tensors(grads, WORLD, op=op, compression=name)  # noqa: B023, E731
            for mode, function in (("eager", call), ("graph", tf.function(call))):
                found[f"{name} {op} {mode}"] = [tensor.numpy().tolist() for tensor in function()]
    values = tf.constant([1e30 if RANK == SIZE - 1 else 1.0, 1.0])
    (huge,) = tensors.reduce_tensors([values], WORLD, op="sum", compression="fp16")
    return {"sums": found, "huge": [str(value) for value in huge.numpy()], "table": table_of_rows()}


def table_of_rows() -> list[float]:
    """A table of five rows of which each rank uses two, in a graph that does not know how many there are."""
    table = keras.layers.Embedding(5, 1, embeddings_initializer="zeros")
    table.build((None,))
    optimizer = ours.DistributedOptimizer(keras.optimizers.SGD(float(SIZE)), WORLD, compression="bf16")

    @tf.function(jit_compile=False)
    def step(rows: Any) -> None:
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(table(rows))
        optimizer.apply(tape.gradient(loss, table.trainable_variables), table.trainable_variables)

    step(tf.constant([RANK, RANK + 1]))
    return [float(value) for value in table.embeddings.numpy()[:, 0]]


def batch_norm(*, masked: bool) -> dict[str, Any]:
    """The layer on this rank's share beside Keras's own on the whole batch, made on every rank."""
    shares = [3 + 2 * rank for rank in range(SIZE)]
    draw = np.random.default_rng(7)
    num = sum(shares)
    inputs = (draw.normal(size=(num, 4, 5)) * 3 + 10).astype(np.float32)
    factors = draw.normal(size=inputs.shape).astype(np.float32)
    mask = draw.random((num, 4)) < 0.7 if masked else None
    mine = slice(sum(shares[:RANK]), sum(shares[: RANK + 1]))

    def run(layer: Any, rows: slice) -> dict[str, Any]:
        layer.build((None, 4, 5))
        layer.gamma.assign([1.0, 2.0, 3.0, 0.5, 1.0])
        own_mask = None if mask is None else tf.constant(mask[rows])

        @tf.function(jit_compile=False)
        def step(own: Any, own_factors: Any) -> Any:
            with tf.GradientTape() as tape:
                tape.watch(own)
                outputs = layer(own, training=True, mask=own_mask)
                loss = tf.reduce_sum(tf.sin(outputs) * own_factors)
            return outputs, tape.gradient(loss, [own, layer.gamma.value, layer.beta.value])

        for _ in range(3):
            outputs, (of_inputs, *of_weights) = step(tf.constant(inputs[rows]), tf.constant(factors[rows]))
        statistics = [layer.moving_mean.numpy(), layer.moving_variance.numpy()]
        return {"outputs": outputs, "of_inputs": of_inputs, "of_weights": of_weights, "statistics": statistics}

    whole, shared = run(keras.layers.BatchNormalization(), slice(0, num)), run(ours.SyncBatchNormalization(), mine)
    if SIZE > 1:
        shared["of_weights"] = tensors.reduce_tensors(shared["of_weights"], WORLD, op="sum", compression=None)

    def distance(found: Any, expected: Any) -> float:
        return float(np.max(np.abs(np.asarray(found) - np.asarray(expected)) / (1 + np.abs(np.asarray(expected)))))

    return {
        "outputs": distance(shared["outputs"], whole["outputs"][mine]),
        "of_inputs": distance(shared["of_inputs"], whole["of_inputs"][mine]),
        "of_weights": distance(shared["of_weights"], whole["of_weights"]),
        "statistics": distance(shared["statistics"], whole["statistics"]),
        "bits": [value.tobytes().hex() for value in shared["statistics"]],
    }


def metrics_of_all() -> dict[str, Any]:
    """Metrics at rate zero on shares of different sizes, beside those of one evaluation of all shares."""
    model = a_model()
    metrics = [keras.metrics.SparseTopKCategoricalAccuracy(k=2, name="top2"), "accuracy"]
    model.compile(ours.DistributedOptimizer(keras.optimizers.SGD(0.0), WORLD), LOSS, metrics=metrics, jit_compile=False)
    sizes = [(40 - 3 * rank, 9 + 10 * rank) for rank in range(SIZE)]  # training: three batches of 16 at most
    train = [data_of(10 + rank, size) for rank, (size, _) in enumerate(sizes)]
    val = [data_of(20 + rank, size) for rank, (_, size) in enumerate(sizes)]
    callbacks = ours.default_callbacks(world=WORLD)
    history = model.fit(
        *train[RANK], batch_size=16, epochs=2, verbose=0, validation_data=val[RANK], callbacks=callbacks
    ).history
    plain = model.fit(*train[RANK], batch_size=16, epochs=1, verbose=0, callbacks=callbacks).history

    def whole(parts: list[Any]) -> dict[str, float]:
        images, labels = (np.concatenate(part) for part in zip(*parts, strict=True))
        return {
            name: float(value) for name, value in model.evaluate(images, labels, verbose=0, return_dict=True).items()
        }

    expected = {**whole(train), **{f"val_{name}": value for name, value in whole(val).items()}}
    found = {name: values[-1] for name, values in history.items()}
    return {"found": found, "expected": expected, "plain": {name: values[-1] for name, values in plain.items()}}


def warmed_up() -> list[float]:
    """Learning rates of eight steps, five of them warm-up."""
    model = a_model()
    model.compile(ours.DistributedOptimizer(keras.optimizers.SGD(1.0), WORLD), LOSS, jit_compile=False)
    rates = []

    class Rates(keras.callbacks.Callback):
        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            rates.append(float(self.model.optimizer.learning_rate.numpy()))

    warmup = ours.LearningRateWarmupCallback(0.5, 5, world=WORLD)
    callbacks = [*ours.default_callbacks(world=WORLD), warmup, Rates()]
    model.fit(*data_of(RANK, 4 * 8), batch_size=4, verbose=0, callbacks=callbacks)
    return rates


class Largest(keras.metrics.Metric):
    """A metric that cannot be added up."""

    def __init__(self) -> None:
        super().__init__(name="largest")
        self.value = self.add_weight(shape=(), name="value", initializer="zeros")

    def update_state(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> None:
        self.value.assign(keras.ops.maximum(self.value, keras.ops.max(y_pred)))

    def result(self) -> Any:
        return self.value


def refusals() -> dict[str, str]:
    """What several ranks are told before they would drift apart or wait for ever."""

    def fit(num: int = 32, callbacks: Any = (), seed: int = 1, **settings: Any) -> None:
        model = a_model(seed=seed)
        settings = {"jit_compile": False, **settings}
        optimizer = ours.DistributedOptimizer(keras.optimizers.SGD(0.1), WORLD)
        model.compile(optimizer, LOSS, **settings)
        model.fit(*data_of(RANK, num), batch_size=4, verbose=0, callbacks=[*callbacks])

    def scheduled() -> None:
        model = a_model()
        schedule = keras.optimizers.schedules.CosineDecay(0.1, 10)
        model.compile(ours.DistributedOptimizer(keras.optimizers.SGD(schedule), WORLD), LOSS, jit_compile=False)
        callbacks = [ours.LearningRateWarmupCallback(0.1, 5, world=WORLD)]
        model.fit(*data_of(RANK, 8), batch_size=4, verbose=0, callbacks=callbacks)

    callbacks = ours.default_callbacks(world=WORLD)
    optimizer = ours.DistributedOptimizer(keras.optimizers.SGD(0.1), WORLD)
    return {
        "not_broadcast": message_of(lambda: fit(seed=1 + RANK)),
        "twice": message_of(lambda: ours.DistributedOptimizer(optimizer, WORLD)),
        "jit": message_of(lambda: fit(callbacks=callbacks, jit_compile=True)) if SIZE > 1 else "",
        "steps": message_of(lambda: fit(num=32 - 4 * RANK, callbacks=callbacks)),
        "metric": message_of(lambda: fit(callbacks=callbacks, metrics=[Largest()])),
        "schedule": message_of(scheduled),
    }


def stopped_early() -> str:
    """Only the last rank stops after its first epoch."""

    class Stop(keras.callbacks.Callback):
        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            self.model.stop_training = RANK == SIZE - 1

    model = a_model()
    model.compile(ours.DistributedOptimizer(keras.optimizers.SGD(0.1), WORLD), LOSS, jit_compile=False)
    callbacks = [*ours.default_callbacks(world=WORLD), Stop()]
    return message_of(lambda: model.fit(*data_of(RANK, 16), batch_size=4, epochs=3, verbose=0, callbacks=callbacks))


def saved() -> None:
    """A model with everything of ours in it."""
    model = a_model(norm=True)
    optimizer = ours.DistributedOptimizer(
        keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(1e-2)), WORLD, compression="bf16"
    )
    model.compile(optimizer, LOSS, metrics=["accuracy"], jit_compile=False)
    model.fit(*data_of(RANK, 32), batch_size=8, verbose=0, callbacks=ours.default_callbacks(world=WORLD))
    if RANK == 0:
        model.save(FOLDER / "model.keras")


def distributed(optimizer: Any) -> Any:
    """What our users write."""
    return ours.DistributedOptimizer(optimizer)


results: dict[str, Any] = {
    "fit": fitted(distributed),
    "fit_accumulated": fitted(distributed, optimizer={"gradient_accumulation_steps": 2, "global_clipnorm": 1.0}),
    "fit_two_at_once": fitted(distributed, steps_per_execution=2),
    "fit_fp16": fitted(lambda optimizer: ours.DistributedOptimizer(optimizer, compression="fp16")),
    "fit_bf16": fitted(lambda optimizer: ours.DistributedOptimizer(optimizer, compression="bf16")),
    "metrics": metrics_of_all(),
    "warmup": warmed_up(),
    "refusals": refusals(),
    "overflow": overflows(1),
    "overflow_accumulated": overflows(2),
    "stopped_early": stopped_early(),
}
saved()
if GLOBAL_BATCH % (2 * SIZE) == 0:
    results["trained"] = trained(1)
    results["trained_in_micro_batches"] = trained(2)
    results["trained_with_norm"] = trained(1, norm=True)
for masked in (False, True):
    results["batch_norm_masked" if masked else "batch_norm"] = batch_norm(masked=masked)
results["horovod_imported"] = any(name.split(".")[0] == "horovod" for name in sys.modules)
if SIZE > 1:
    results["compressed"] = compressed()
    results["ahead"] = one_rank_ahead()
    results["drifted"] = {"ours": drifted(distributed), "horovods": drifted(horovods_own)}
(FOLDER / f"rank-{RANK}.json").write_text(json.dumps(results))
comm.barrier(WORLD)
