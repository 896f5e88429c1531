"""The only door to Horovod: the world of ranks, gradient averages under Keras 3, and the proof that ranks are in sync.

Horovod 0.28.1's own DistributedOptimizer trains under Keras 3 without ever averaging; this module is the glue that
cvdist owns. In a world of size 1 every function here is free, and Horovod is never imported. What ranks tell each other
travels as bytes and is never unpickled.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import http.client
import json
import math
import os
import re
import time
import types
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import xxhash

from cvdist import errors
from cvdist.errors import ConfigError, CvdistError, SyncError

T = TypeVar("T")

# Seconds that a rank's Gloo waits for a peer that has stopped answering. Measured: with 10 a frozen rank ends the others
# after 12, and the job after 22 (horovodrun gives the frozen one 10 s to end).
GLOO_TIMEOUT_S = 20
# Seconds that ranks wait for each other to start: nodes import TensorFlow at very different speeds when disks are cold.
START_S = 300.0
BROADCAST_BYTES = 64 << 20
# What ranks tell each other first, and the largest array that is summed with it.
ROW_BYTES, SMALL_BYTES = 1016, 768
MESSAGE_BYTES = 4096


@dataclasses.dataclass(frozen=True)
class World:
    """Who this process is among the ranks of a job.

    Attributes:
        rank: Of this process, 0 to size - 1.
        size: Number of ranks.
        local_rank: Of this process among those on its node.
        local_size: Number of ranks on this node.
    """

    rank: int
    size: int
    local_rank: int
    local_size: int

    @classmethod
    def alone(cls) -> World:
        """Returns the world of one process."""
        return cls(rank=0, size=1, local_rank=0, local_size=1)


def init() -> World:
    """Joins the ranks that `horovodrun` started; without a launcher, and with one rank, there is nothing to join.

    Sets HOROVOD_GLOO_TIMEOUT_SECONDS unless it is set.

    Raises:
        ConfigError: The launcher's variables make no sense, or there are several ranks and Horovod is not installed.
        SyncError: The ranks did not find each other.
    """
    world = launched()
    if world.size == 1:
        return world
    os.environ.setdefault("HOROVOD_GLOO_TIMEOUT_SECONDS", str(GLOO_TIMEOUT_S))
    hvd = _horovod(world)
    _meet(world)
    with _collective(f"rank {world.rank} of {world.size} could not join the others"):
        hvd.init()
    joined = World(rank=hvd.rank(), size=hvd.size(), local_rank=hvd.local_rank(), local_size=hvd.local_size())
    if joined != world:
        raise SyncError(
            f"Horovod says {joined}; expected {world} as the launcher set it; start all ranks with one horovodrun"
        )
    return world


def launched() -> World:
    """Returns which rank `horovodrun` started this process as; joins nobody.

    Raises:
        ConfigError: The launcher's variables make no sense.
    """
    size = _launched("HOROVOD_SIZE", 1)
    foreign = os.environ.get("OMPI_COMM_WORLD_SIZE", os.environ.get("PMI_SIZE", "1"))
    if "HOROVOD_SIZE" not in os.environ and foreign != "1":
        raise ConfigError(
            f"this process is one of {foreign} that an MPI launcher started; expected horovodrun, without which each of"
            f" them would train alone; start it as: horovodrun -np {foreign} python -m cvdist.train ..."
        )
    world = World(
        rank=_launched("HOROVOD_RANK", 0),
        size=size,
        local_rank=_launched("HOROVOD_LOCAL_RANK", 0),
        local_size=_launched("HOROVOD_LOCAL_SIZE", 1),
    )
    if not (0 <= world.rank < size and 0 <= world.local_rank < world.local_size <= size):
        raise ConfigError(
            f"the launcher's variables say {world}; expected ranks below their sizes; start it with horovodrun -np N"
        )
    return world


def configure_devices(world: World) -> None:
    """Gives this rank its GPU, or its share of the node's cores. Call it before TensorFlow has run anything.

    Raises:
        ConfigError: There are GPUs, but fewer than ranks on this node.
    """
    import tensorflow as tf

    gpus = tf.config.list_physical_devices("GPU")
    if gpus and world.local_rank >= len(gpus):
        raise ConfigError(
            f"local rank {world.local_rank} has no GPU: this node has {len(gpus)} for {world.local_size} ranks; expected one"
            f" for each; start at most {len(gpus)} ranks on this node, or hide the GPUs with CUDA_VISIBLE_DEVICES="
        )
    if gpus:
        tf.config.set_visible_devices(gpus[world.local_rank], "GPU")
        tf.config.experimental.set_memory_growth(gpus[world.local_rank], True)
    if world.local_size > 1:
        tf.config.threading.set_intra_op_parallelism_threads(max(1, len(os.sched_getaffinity(0)) // world.local_size))


def DistributedOptimizer(optimizer: T, world: World) -> T:  # noqa: N802 - the name that Horovod's users look for
    """Makes a Keras 3 optimizer average the gradients over all ranks before it does anything with them.

    The optimizer itself is changed and returned: its class, settings, exclusions and variables stay as they are, so a
    saved model knows nothing of ranks, and loads where neither cvdist nor Horovod is installed. Clipping, weight decay
    and loss scaling come after the average. For float16 give it the LossScaleOptimizer, not the one inside. Compile models
    with jit_compile=False.

    Build the optimizer, then `broadcast` all variables, before the first step.
    """
    if world.size > 1:
        optimizer.apply = types.MethodType(_apply_averaged, optimizer)  # type: ignore[attr-defined]
    return optimizer


def broadcast(variables: Sequence[Any], world: World, root: int = 0) -> None:
    """Gives all ranks the root's values, bit for bit, whatever the data types.

    Args:
        variables: Keras variables, the same on all ranks in the same order.
        world: The ranks.
        root: Whose values.

    Raises:
        SyncError: The ranks hold variables of different names, shapes or types.
    """
    if world.size == 1:
        return
    layout = [_identity(variable) for variable in variables]
    layouts = _exchange(f"broadcast from rank {root}", "\n".join(layout).encode(), world)
    for rank, theirs in enumerate(layouts):
        if theirs != layouts[root]:
            lines, expected = theirs.decode().split("\n"), layouts[root].decode().split("\n")
            index = next((i for i, pair in enumerate(zip(lines, expected, strict=False)) if pair[0] != pair[1]), None)
            found, wanted = (len(lines), len(expected)) if index is None else (lines[index], expected[index])
            raise SyncError(
                f"rank {rank} has other variables than rank {root}: {found} instead of {wanted}; expected the same model"
                " and optimizer on all ranks, both built; give all ranks one configuration and one version of the code"
            )
    for bucket in _buckets(variables):
        sizes = [_num_bytes(variable) for variable in bucket]
        mine = [_bytes_of(variable) for variable in bucket] if world.rank == root else [np.zeros(sum(sizes), np.uint8)]
        data = _broadcast_bytes(np.concatenate(mine), world, root)
        if world.rank == root:
            continue
        for variable, part in zip(bucket, np.split(data, np.cumsum(sizes)[:-1]), strict=True):
            variable.assign(np.frombuffer(part.tobytes(), np.dtype(variable.dtype)).reshape(tuple(variable.shape)))


def allreduce_sum(values: npt.ArrayLike, world: World) -> np.ndarray[Any, Any]:
    """Sums an array over all ranks in its own data type: int64 stays exact beyond 2**53, float64 is not cut to float32.

    Args:
        values: float64 or int64, of the same shape on all ranks.
        world: The ranks.

    Raises:
        SyncError: The shapes differ, or a rank has ended.
    """
    array = np.asarray(values)
    if array.dtype not in (np.dtype(np.float64), np.dtype(np.int64)):
        raise TypeError(f"allreduce_sum takes float64 and int64, found {array.dtype}")
    if world.size == 1:
        return array.copy()
    small = array.nbytes <= SMALL_BYTES
    parts = _exchange(f"sum of {array.dtype} {array.shape}", array.tobytes() if small else b"", world)
    if small:
        stacked = np.stack([np.frombuffer(part, array.dtype) for part in parts])
        return np.asarray(stacked.sum(axis=0)).reshape(array.shape)
    hvd = _horovod(world)
    with _collective("a sum over all ranks failed"), _on_cpu():
        total = hvd.allreduce(array.reshape(-1), op=hvd.Sum, name="cvdist.sum")
    return np.asarray(total.numpy()).reshape(array.shape)


def average(variables: Sequence[Any], world: World) -> None:
    """Gives floating-point Keras variables their average over all ranks: for moving statistics.

    Raises:
        SyncError: The ranks hold different variables, or a rank has ended.
    """
    if world.size == 1 or not variables:
        return
    values = [_value(variable) for variable in variables]
    total = (
        allreduce_sum(np.concatenate([value.astype(np.float64).reshape(-1) for value in values]), world) / world.size
    )
    parts = np.split(total, np.cumsum([value.size for value in values])[:-1])
    for variable, value, part in zip(variables, values, parts, strict=True):
        variable.assign(part.reshape(value.shape).astype(value.dtype))


def gather_bytes(data: bytes, world: World) -> list[bytes]:
    """Returns what each rank gave, in the order of ranks.

    Raises:
        SyncError: A rank has ended.
    """
    return _exchange("gather", data, world)


def barrier(world: World) -> None:
    """Waits until every rank is here.

    Raises:
        SyncError: A rank has ended.
    """
    _exchange("barrier", b"", world)


def all_ranks_ok(world: World, error: Exception | None) -> None:
    """Makes the ranks fail together: every rank calls it, and where one has an error all of them raise.

    Args:
        world: The ranks.
        error: What went wrong on this rank, if anything.

    Raises:
        Exception: `error` itself on a rank that has one; on the others a CvdistError of the same class (SyncError where
            it is none of ours) that names the first failing rank and repeats its message.
    """
    report = {} if error is None else {"kind": type(error).__name__, "text": str(error)[:MESSAGE_BYTES]}
    reports = _exchange("check of errors", json.dumps(report).encode() if report else b"", world)
    if error is not None:
        raise error
    failed = [rank for rank, line in enumerate(reports) if line]
    if failed:
        theirs = json.loads(reports[failed[0]])
        kind = getattr(errors, theirs["kind"], None)
        ours = isinstance(kind, type) and issubclass(kind, CvdistError)
        text = " ".join(f"{'' if ours else theirs['kind'] + ': '}{theirs['text']}".split())
        others = f" (and {len(failed) - 1} more)" if failed[1:] else ""
        raise_as: type[CvdistError] = kind if ours and kind else SyncError
        raise raise_as(f"rank {failed[0]}{others} failed: {text}")


def stable_path(variable: Any) -> str:
    """Returns the path of a Keras variable without the numbers that Keras gives layers by a counter of the process.

    `dense_7/kernel` here may be `dense/kernel` in a process that has made fewer models.
    """
    return re.sub(r"_[0-9]+(?=[/_]|$)", "", variable.path)


def fingerprint(variables: Sequence[Any]) -> bytes:
    """Returns 16 bytes that change when any name, shape, data type or bit of the variables does (XXH3-128)."""
    digest = xxhash.xxh3_128()
    for variable in variables:
        digest.update(_identity(variable).encode())
        digest.update(_bytes_of(variable).data)
    return digest.digest()


def check_in_sync(variables: Sequence[Any], world: World, step: int) -> None:
    """Compares the variables of all ranks, bit for bit.

    Args:
        variables: Keras variables of the model and the optimizer.
        world: The ranks.
        step: The current one, for the message.

    Raises:
        SyncError: Some differ. Raised on every rank; it names the ranks that differ from most (from rank zero where there
            is no majority) and the first variable that does.
    """
    if world.size == 1:
        return
    digests = _exchange(f"comparison at step {step}", fingerprint(variables), world)
    if len(set(digests)) == 1:
        return
    (digest, count), *_ = collections.Counter(digests).most_common()
    usual = digests.index(digest) if count > world.size / 2 else 0
    differing = [rank for rank in range(world.size) if digests[rank] != digests[usual]]
    single = gather_bytes(b"".join(fingerprint([variable]) for variable in variables), world)
    theirs, expected = single[differing[0]], single[usual]
    places = (variable.path for i, variable in enumerate(variables) if theirs[16 * i :][:16] != expected[16 * i :][:16])
    ranks = f"rank {differing[0]} differs" if len(differing) == 1 else f"ranks {', '.join(map(str, differing))} differ"
    raise SyncError(
        f"step {step}: {ranks} from rank {usual}, first in {next(places, 'their number')}; expected bit-identical weights on"
        f" all {world.size} ranks; resume from the last checkpoint, and if it comes back look for code that depends on the"
        " rank, or for a failing machine"
    )


def _meet(world: World) -> None:
    """Waits until all ranks have started, through the launcher's store of keys.

    Gloo would wait for its own timeout only, and then abort the process without a word.
    """
    address, port = (os.environ.get(f"HOROVOD_GLOO_RENDEZVOUS_{part}", "") for part in ("ADDR", "PORT"))
    if not (address and port.isdecimal()):
        raise ConfigError(
            f"HOROVOD_SIZE is {world.size}, but HOROVOD_GLOO_RENDEZVOUS_ADDR and _PORT say {address!r} and {port!r};"
            " expected the address of a launcher; start all ranks with horovodrun -np N, or unset HOROVOD_SIZE"
        )
    deadline_s = time.monotonic() + START_S

    def ask(method: str, key: str) -> int:
        with contextlib.closing(http.client.HTTPConnection(address, int(port), timeout=30)) as connection:
            connection.request(method, f"/cvdist/{key}", body=b"1" if method == "PUT" else None)
            return connection.getresponse().status

    def await_key(key: str) -> None:
        while ask("GET", key) != http.HTTPStatus.OK:
            if time.monotonic() > deadline_s:
                raise SyncError(
                    f"rank {key.removeprefix('rank-')} did not start within {START_S:.0f} s, as rank {world.rank} saw it;"
                    f" expected {world.size} ranks; look at its first lines of output, and at the load of its node"
                )
            time.sleep(0.1)

    try:
        ask("PUT", f"rank-{world.rank}")
        if world.rank == 0:
            for rank in range(world.size):
                await_key(f"rank-{rank}")
            ask("PUT", "all")
        await_key("all")
    except (OSError, http.client.HTTPException) as error:
        raise SyncError(
            f"the launcher at {address}:{port} cannot be reached ({error}); expected horovodrun there; start all ranks with"
            " one horovodrun, and let its port through"
        ) from error


def _launched(name: str, default: int) -> int:
    """Returns a number that the launcher set."""
    text = os.environ.get(name, str(default))
    if not text.isdecimal():
        raise ConfigError(
            f"{name}: {text!r} is not a number; expected what horovodrun sets; unset it or start with horovodrun"
        )
    return int(text)


def _horovod(world: World) -> Any:
    """Imports Horovod."""
    try:
        import horovod.tensorflow as hvd
    except ImportError as error:
        raise ConfigError(
            f"Horovod cannot be imported ({error}); expected it for a world of {world.size} ranks; build it with: make"
            " setup"
        ) from error
    return hvd


def _on_cpu() -> Any:
    """Keeps what is small, or must be exact, away from GPUs."""
    import tensorflow as tf

    return tf.device("/cpu:0")


@contextlib.contextmanager
def _collective(what: str) -> Iterator[None]:
    """Turns the errors of a collective into ours."""
    import tensorflow as tf

    try:
        yield
    except (tf.errors.OpError, RuntimeError, ValueError) as error:
        line = " ".join(str(error).split())[:MESSAGE_BYTES]
        raise SyncError(
            f"{what}: {line}; expected all ranks to take part; look at the first error of the other ranks, one has"
            " probably ended"
        ) from error


def _apply_averaged(self: Any, grads: Any, trainable_variables: Any = None) -> None:
    """Replaces an optimizer's `apply`: averages, then does what its class does."""
    type(self).apply(self, _average(list(grads)), trainable_variables)


def _average(grads: list[Any]) -> list[Any]:
    """Averages gradients over all ranks in one fused reduction; None stays None."""
    import horovod.tensorflow as hvd
    import tensorflow as tf

    if type(tf.compat.v1.get_default_graph()).__name__ == "CondBranchFuncGraph":
        raise ConfigError(
            "gradients are averaged inside a condition, where one rank's overflow would leave the others waiting for ever;"
            " expected the average outside; use DistributedOptimizer(LossScaleOptimizer(optimizer), world)"
        )
    # Gradients of rows (IndexedSlices) become dense.
    averaged: list[Any] = [None if grad is None else tf.convert_to_tensor(grad) for grad in grads]
    groups = collections.defaultdict(list)
    for index, grad in enumerate(averaged):
        if grad is not None:
            # Horovod knows no bfloat16, and a sum of float16 may overflow.
            groups[tf.float64 if grad.dtype == tf.float64 else tf.float32].append(index)
    for dtype, indices in groups.items():
        means = hvd.grouped_allreduce([tf.cast(averaged[index], dtype) for index in indices], op=hvd.Average)
        for index, mean in zip(indices, means, strict=True):
            averaged[index] = tf.cast(mean, averaged[index].dtype)
    return averaged


def _exchange(what: str, data: bytes, world: World) -> list[bytes]:
    """Returns what each rank gave. Every collective but that of gradients begins here, so that ranks out of step are told.

    Horovod itself would leave them waiting for ever for the missing halves of two collectives.
    """
    if world.size == 1:
        return [data]
    message = what.encode() + b"\0" + data
    # Rows of one length first, which is all for most messages, then what did not fit.
    row = len(message).to_bytes(8, "little") + message[:ROW_BYTES].ljust(ROW_BYTES, b"\0")
    rows = _gather(row, world, "cvdist.rows").reshape(world.size, -1)
    sizes = [int.from_bytes(theirs[:8].tobytes(), "little") for theirs in rows]
    rest_bytes = [max(0, size - ROW_BYTES) for size in sizes]
    rests = _gather(message[ROW_BYTES:], world, "cvdist.rests") if any(rest_bytes) else np.zeros(0, np.uint8)
    messages = [
        theirs[8 : 8 + size].tobytes() + rest.tobytes()
        for theirs, size, rest in zip(rows, sizes, np.split(rests, np.cumsum(rest_bytes)[:-1]), strict=True)
    ]
    doing = [message.partition(b"\0")[0].decode() for message in messages]
    for rank, theirs in enumerate(doing):
        if theirs != doing[0]:
            raise SyncError(
                f"ranks are out of step: rank 0 is at {doing[0]}, rank {rank} at {theirs}; expected all ranks to do the same;"
                " make the code that led here independent of the rank, or pass its errors through all_ranks_ok"
            )
    return [message.partition(b"\0")[2] for message in messages]


def _gather(data: bytes, world: World, name: str) -> np.ndarray[Any, Any]:
    """Joins the bytes of all ranks, in the order of ranks."""
    hvd = _horovod(world)
    with _collective("an exchange between all ranks failed"), _on_cpu():
        return np.asarray(hvd.allgather(np.frombuffer(data, np.uint8), name=name).numpy())


def _broadcast_bytes(data: np.ndarray[Any, Any], world: World, root: int) -> np.ndarray[Any, Any]:
    """Returns the root's bytes; all ranks give as many."""
    hvd = _horovod(world)
    with _collective(f"the broadcast from rank {root} failed"), _on_cpu():
        return np.asarray(hvd.broadcast(data, root_rank=root, name="cvdist.broadcast").numpy())


def _buckets(variables: Sequence[Any]) -> Iterator[list[Any]]:
    """Groups variables so that few collectives move many, and none moves more than it must hold."""
    bucket: list[Any] = []
    num_bytes = 0
    for variable in variables:
        size = _num_bytes(variable)
        if bucket and num_bytes + size > BROADCAST_BYTES:
            yield bucket
            bucket, num_bytes = [], 0
        bucket.append(variable)
        num_bytes += size
    if bucket:
        yield bucket


def _value(variable: Any) -> np.ndarray[Any, Any]:
    """Copies a Keras variable to the host."""
    return np.asarray(variable.value.numpy())


def _bytes_of(variable: Any) -> np.ndarray[Any, Any]:
    """Returns the bits of a Keras variable, "uint8 (bytes,)"."""
    return np.ascontiguousarray(_value(variable)).reshape(-1).view(np.uint8)


def _num_bytes(variable: Any) -> int:
    """Returns the size of a Keras variable."""
    return int(math.prod(variable.shape)) * np.dtype(variable.dtype).itemsize


def _identity(variable: Any) -> str:
    """Names a variable, its data type and shape."""
    return f"{stable_path(variable)} {variable.dtype} {tuple(variable.shape)}"
