"""What test_comm.py asks of every world: each rank calls everything in cvdist.comm and writes what it got to FOLDER/rank-N.json."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cvdist import comm, gradients
from cvdist.errors import ConfigError

STARTED_S = time.monotonic()
WORLD = comm.init()
JOINED_S = time.monotonic() - STARTED_S
comm.configure_devices(WORLD)

import keras  # noqa: E402 - the world is joined first, as train.py does
import numpy as np  # noqa: E402
import tensorflow as tf  # noqa: E402

RANK, SIZE = WORLD.rank, WORLD.size
FOLDER = Path(sys.argv[1])


def gradients_of(rank: int) -> list[Any]:
    """The gradients of one rank: three dense ones, none at all, and one of two rows of a table of four."""
    draw = np.random.default_rng(rank)
    dense = [draw.normal(size=shape).astype(np.float32) * 10 for shape in ((5, 3), (7,), ())]
    return [*dense, None, draw.normal(size=(2, 3)).astype(np.float32)]


def average_of_gradients() -> dict[str, Any]:
    """One step of SGD with rate 1 from zero is minus the average."""
    shapes = [(5, 3), (7,), (), (2,), (4, 3)]
    variables = [keras.Variable(np.zeros(shape, np.float32), name=f"v{i}") for i, shape in enumerate(shapes)]
    optimizer = gradients.DistributedOptimizer(keras.optimizers.SGD(1.0), WORLD)
    optimizer.build(variables)

    def step(dense: list[Any], rows: Any) -> None:
        table = tf.IndexedSlices(rows, tf.constant([1, 2]), tf.constant([4, 3]))
        optimizer.apply([*dense, None, table], variables)

    *dense, _, rows = gradients_of(RANK)
    results = []
    for call in (step, tf.function(step, jit_compile=False)):
        for variable in variables:
            variable.assign(np.zeros(variable.shape))
        call([tf.constant(grad) for grad in dense], tf.constant(rows))
        results.append([variable.numpy().tolist() for variable in variables])
    return {"eager": results[0], "graph": results[1]}


def clipped_after_average() -> list[float]:
    """Rank r has the gradient (30 r, 40 r); clipped to norm 1 after the average it is (0.6, 0.8)."""
    variable = keras.Variable(np.zeros(2, np.float32))
    optimizer = gradients.DistributedOptimizer(keras.optimizers.SGD(1.0, global_clipnorm=1.0), WORLD)
    optimizer.apply([tf.constant([30.0, 40.0]) * RANK], [variable])
    return [float(x) for x in variable.numpy()]


def one_type_after_the_other() -> dict[str, Any]:
    """Gradients of several types in one step."""
    names = ["float16", "bfloat16", "float32", "float64"]
    variables = [keras.Variable(np.zeros(3), dtype=name) for name in names]
    optimizer = gradients.DistributedOptimizer(keras.optimizers.SGD(1.0), WORLD)
    optimizer.apply([tf.cast([1.0, 2.0, 4.0], name) * (RANK + 1) for name in names], variables)
    return {name: variable.numpy().astype(np.float64).tolist() for name, variable in zip(names, variables, strict=True)}


def repeated_averages() -> int:
    """How many different results the same ten averages of many tensors have."""
    draw = np.random.default_rng(RANK)
    grads = [tf.constant(draw.normal(size=(size,)).astype(np.float32)) for size in [1, 1000, 37, 65536, 3, 250_000] * 8]
    variables = [keras.Variable(np.zeros(grad.shape, np.float32)) for grad in grads]
    optimizer = gradients.DistributedOptimizer(keras.optimizers.SGD(1.0), WORLD)
    optimizer.build(variables)
    step = tf.function(lambda: optimizer.apply(grads, variables), jit_compile=False)
    found = set()
    for _ in range(10):
        for variable in variables:
            variable.assign(np.zeros(variable.shape))
        step()
        found.add(comm.fingerprint(variables))
    return len(found)


def fitted(wrap: Callable[[Any], Any]) -> dict[str, Any]:
    """Trains a user's model by fit on data that differs between ranks."""
    keras.utils.set_random_seed(1 + RANK)
    model = keras.Sequential(
        [keras.Input((6,)), keras.layers.Dense(16, activation="relu"), keras.layers.Dropout(0.2), keras.layers.Dense(3)]
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(wrap(keras.optimizers.Adam(1e-2)), loss, jit_compile=False)
    model.optimizer.build(model.trainable_variables)
    comm.broadcast([*model.variables, *model.optimizer.variables], WORLD)
    draw = np.random.default_rng(RANK)
    images, labels = draw.normal(size=(64, 6)).astype(np.float32), draw.integers(0, 3, 64)
    start = comm.fingerprint(model.trainable_variables).hex()
    model.fit(images, labels, batch_size=16, epochs=2, verbose=0)
    if RANK == 0:
        model.save(FOLDER / "model.keras")
    weights = [*model.trainable_variables, *model.optimizer.variables]
    return {"start": start, "end": comm.fingerprint(weights).hex(), "type": type(model.optimizer).__name__}


def fit_with_horovods_own() -> dict[str, Any]:
    """The proof of why ours exists: from equal weights, on data that differs between ranks."""
    import horovod.tensorflow.keras as hvd

    keras.utils.set_random_seed(1)
    model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(3)])
    draw = np.random.default_rng(RANK)
    try:
        model.compile(hvd.DistributedOptimizer(keras.optimizers.SGD(0.1)), "mse", jit_compile=False)
        model.fit(draw.normal(size=(64, 6)), draw.normal(size=(64, 3)), batch_size=16, verbose=0)
    except Exception as error:  # noqa: BLE001 - any failure will do
        return {"error": f"{type(error).__name__}: {error}"}
    return {"end": comm.fingerprint(model.variables).hex()}


def variables_of_all_types() -> list[Any]:
    """Variables with random bits of this rank, not-a-numbers included."""
    draw = np.random.default_rng(100 + RANK)
    variables = []
    for name in ("float32", "float64", "float16", "bfloat16", "int64", "int32", "uint8", "bool", "uint32"):
        for shape in ((), (3, 5), (0, 2)):
            variable = keras.Variable(np.zeros(shape), dtype=name, trainable=False)
            raw = variable.value.numpy()
            bits = draw.integers(0, 2 if name == "bool" else 256, raw.nbytes, np.uint8)
            variable.assign(np.frombuffer(bits.tobytes(), raw.dtype).reshape(shape))
            variables.append(variable)
    return [*variables, keras.random.SeedGenerator(5 + RANK).state]


def broadcast_bits() -> list[dict[str, Any]]:
    """Broadcasts from the first and from the last rank."""
    found = []
    for root in (0, SIZE - 1):
        variables = variables_of_all_types()
        before = [variable.value.numpy().tobytes().hex() for variable in variables]
        comm.broadcast(variables, WORLD, root)
        after = [variable.value.numpy().tobytes().hex() for variable in variables]
        found.append({"root": root, "before": before, "after": after})
    return found


def sums() -> dict[str, Any]:
    """Sums in the data type given."""
    big = np.array([2**53 + 1, -(2**60), RANK], np.int64)
    return {
        "int64": comm.allreduce_sum(big, WORLD).tolist(),
        "float64": comm.allreduce_sum(np.array([[1.0, 1e-16 * RANK], [0.1, RANK]]), WORLD).tolist(),
        "large": comm.allreduce_sum(np.arange(1000.0) * (RANK + 1), WORLD).tolist(),
        "scalar": comm.allreduce_sum(np.float64(RANK + 0.5), WORLD).tolist(),
        "list": comm.allreduce_sum([1, 2], WORLD).tolist(),
        "empty": list(comm.allreduce_sum(np.zeros((0, 3)), WORLD).shape),
    }


def averages() -> dict[str, Any]:
    """Moving statistics differ between ranks until they are averaged."""
    variables = [keras.Variable(np.full((2, 2), RANK, np.float32)), keras.Variable(np.float32(0.1 * RANK))]
    comm.average(variables, WORLD)
    return {"values": [variable.numpy().tolist() for variable in variables], "bits": comm.fingerprint(variables).hex()}


def message_of(call: Callable[[], object]) -> dict[str, Any]:
    """What a call raises, and after how many seconds."""
    start_s = time.monotonic()
    try:
        call()
    except Exception as error:  # noqa: BLE001 - the test looks at it
        return {"kind": type(error).__name__, "text": str(error), "seconds": time.monotonic() - start_s}
    return {"kind": None}


def failures() -> dict[str, Any]:
    """Ranks that fail together."""
    last, two = SIZE - 1, {0: KeyError("zero"), SIZE - 1: ConfigError("the last")}
    foreign = ValueError("no\npickle ümlaut") if RANK == 0 else None
    return {
        "none": message_of(lambda: comm.all_ranks_ok(WORLD, None)),
        "last": message_of(lambda: comm.all_ranks_ok(WORLD, ConfigError("a: 1; use 2") if last == RANK else None)),
        "foreign": message_of(lambda: comm.all_ranks_ok(WORLD, foreign)),
        "two": message_of(lambda: comm.all_ranks_ok(WORLD, two.get(RANK))),
        "long": message_of(lambda: comm.all_ranks_ok(WORLD, ConfigError("x" * 100_000) if RANK == 0 else None)),
    }


def perturbed(rank: int) -> dict[str, Any]:
    """One bit of one weight of one rank is flipped in the second variable."""
    keras.utils.set_random_seed(3)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3), keras.layers.Dense(2)])
    same = message_of(lambda: comm.check_in_sync(model.variables, WORLD, 1))
    if rank == RANK:
        bits = model.variables[2].value.numpy()
        bits.reshape(-1).view(np.uint32)[1] ^= 1
        model.variables[2].assign(bits)
    return {"same": same, "after": message_of(lambda: comm.check_in_sync(model.variables, WORLD, 120))}


def overflow() -> dict[str, Any]:
    """float16 with the reduction outside of the loss scaling: one rank overflows, all skip the step."""
    variable = keras.Variable(np.zeros(2, np.float32))
    optimizer = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(1.0), initial_scale=8.0)
    optimizer = gradients.DistributedOptimizer(optimizer, WORLD)
    optimizer.build([variable])
    step = tf.function(lambda grad: optimizer.apply([grad], [variable]), jit_compile=False)
    step(tf.constant([np.inf if RANK == SIZE - 1 else 8.0, 8.0]))
    skipped = [*variable.numpy().tolist(), float(optimizer.dynamic_scale.numpy())]
    step(tf.constant([4.0, 4.0]))
    return {"skipped": skipped, "taken": variable.numpy().tolist()}


def scaled_outside() -> dict[str, Any]:
    """The loss scaling around the reduction is refused."""
    variable = keras.Variable(np.zeros(2, np.float32))
    optimizer = keras.optimizers.LossScaleOptimizer(gradients.DistributedOptimizer(keras.optimizers.SGD(1.0), WORLD))
    optimizer.build([variable])
    step = tf.function(lambda grad: optimizer.apply([grad], [variable]), jit_compile=False)
    return message_of(lambda: step(tf.constant([1.0, 2.0])))


def other_model_on_last_rank() -> dict[str, Any]:
    """Ranks with different variables do not broadcast."""
    variables = [keras.Variable(np.zeros((2, 3 if RANK == SIZE - 1 else 4)), name="v")]
    return message_of(lambda: comm.broadcast(variables, WORLD))


def out_of_step() -> dict[str, Any]:
    """The last rank calls something else than the others, or with something else."""
    last = SIZE - 1 == RANK and SIZE > 1
    found = {
        "shape": message_of(lambda: comm.allreduce_sum(np.zeros(0 if last else 3), WORLD)),
        "type": message_of(lambda: comm.allreduce_sum(np.zeros(3, np.int64 if last else np.float64), WORLD)),
        "call": message_of(lambda: comm.barrier(WORLD) if last else comm.allreduce_sum([1], WORLD)),
    }
    comm.barrier(WORLD)  # and the next call works again
    return found


def seconds_for_large() -> dict[str, float]:
    """Seconds for 64 MiB of weights."""
    variables = [keras.Variable(np.full((1 << 20,), RANK, np.float32)) for _ in range(16)]
    optimizer = gradients.DistributedOptimizer(keras.optimizers.SGD(1.0), WORLD)
    optimizer.build(variables)
    grads = [tf.ones((1 << 20,)) for _ in variables]
    seconds = {}
    calls: dict[str, Callable[[], object]] = {
        "broadcast": lambda: comm.broadcast(variables, WORLD),
        "fingerprint": lambda: comm.fingerprint(variables),
        "check_in_sync": lambda: comm.check_in_sync(variables, WORLD, 1),
        "first_apply": lambda: optimizer.apply(grads, variables),
        "apply": lambda: optimizer.apply(grads, variables),
        "barrier": lambda: comm.barrier(WORLD),
        "all_ranks_ok": lambda: comm.all_ranks_ok(WORLD, None),
        "allreduce_sum": lambda: comm.allreduce_sum(np.ones(100), WORLD),
    }
    for name, call in calls.items():
        start_s = time.monotonic()
        call()
        seconds[name] = round(time.monotonic() - start_s, 4)
    return seconds


results: dict[str, Any] = {
    "world": [WORLD.rank, WORLD.size, WORLD.local_rank, WORLD.local_size],
    "joined_s": JOINED_S,
    "threads": tf.config.threading.get_intra_op_parallelism_threads(),
    "gathered": [part.hex() for part in comm.gather_bytes(bytes(range(RANK)), WORLD)],
    "gathered_large": [[len(part), part.count(b"7")] for part in comm.gather_bytes(b"7" * RANK * 1500, WORLD)],
    "average": average_of_gradients(),
    "clipped": clipped_after_average(),
    "types": one_type_after_the_other(),
    "repeated": repeated_averages(),
    "unwrapped": fitted(lambda optimizer: optimizer),
    "fit": fitted(lambda optimizer: gradients.DistributedOptimizer(optimizer, WORLD)),
    "broadcast": broadcast_bits(),
    "sums": sums(),
    "averages": averages(),
    "failures": failures(),
    "perturbed_last": perturbed(SIZE - 1),
    "perturbed_zero": perturbed(0),
    "overflow": overflow(),
    "other_model": other_model_on_last_rank(),
    "out_of_step": out_of_step(),
    "seconds": seconds_for_large(),
}
if SIZE > 1:
    results["scaled_outside"] = scaled_outside()
    results["horovods_own"] = fit_with_horovods_own()
results["horovod_imported"] = any(name.split(".")[0] == "horovod" for name in sys.modules)
(FOLDER / f"rank-{RANK}.json").write_text(json.dumps(results))
comm.barrier(WORLD)
