"""The only door to Horovod: the world of ranks, what they send each other, and the proof that they are in sync.

In a world of size 1 every function here is free, and Horovod is never imported. What ranks tell each other travels as
bytes and is never unpickled.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from cvdist import errors, rendezvous
from cvdist import variables as variables_of
from cvdist.errors import ConfigError, CvdistError, SyncError
from cvdist.variables import fingerprint
from cvdist.variables import stable_path as stable_path

# Seconds that a rank's Gloo waits for a peer that has stopped answering. Measured: with 10 a frozen rank ends the others
# after 12, and the job after 22 (horovodrun gives the frozen one 10 s to end).
GLOO_TIMEOUT_S = 20
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
    hvd = horovod(world)
    if not hvd.is_initialized():
        rendezvous.meet(world)
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
    layout = [variables_of.identity(variable) for variable in variables]
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
    for bucket in variables_of.buckets(variables):
        sizes = [variables_of.num_bytes(variable) for variable in bucket]
        mine = (
            [variables_of.bits(variable) for variable in bucket]
            if world.rank == root
            else [np.zeros(sum(sizes), np.uint8)]
        )
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
    hvd = horovod(world)
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
    values = [variables_of.value(variable) for variable in variables]
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


def barrier(world: World, what: str = "barrier") -> None:
    """Waits until every rank is here.

    Args:
        world: The ranks.
        what: Where this is, for the message to ranks that are elsewhere.

    Raises:
        SyncError: A rank has ended, or is somewhere else.
    """
    _exchange(what, b"", world)


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
    fix = (
        "broadcast all variables before the first step, in Keras's fit by cvdist.keras.BroadcastCallback"
        if step == 0
        else "resume from the last checkpoint, and if it comes back look for code that depends on the rank, or for a failing"
        " machine"
    )
    ranks = f"rank {differing[0]} differs" if len(differing) == 1 else f"ranks {', '.join(map(str, differing))} differ"
    raise SyncError(
        f"step {step}: {ranks} from rank {usual}, first in {next(places, 'their number')}; expected bit-identical weights on"
        f" all {world.size} ranks; {fix}"
    )


def _launched(name: str, default: int) -> int:
    """Returns a number that the launcher set."""
    text = os.environ.get(name, str(default))
    if not text.isdecimal():
        raise ConfigError(
            f"{name}: {text!r} is not a number; expected what horovodrun sets; unset it or start with horovodrun"
        )
    return int(text)


def horovod(world: World) -> Any:
    """Imports Horovod, for this module and `tensors.py`."""
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
    hvd = horovod(world)
    with _collective("an exchange between all ranks failed"), _on_cpu():
        return np.asarray(hvd.allgather(np.frombuffer(data, np.uint8), name=name).numpy())


def _broadcast_bytes(data: np.ndarray[Any, Any], world: World, root: int) -> np.ndarray[Any, Any]:
    """Returns the root's bytes; all ranks give as many."""
    hvd = horovod(world)
    with _collective(f"the broadcast from rank {root} failed"), _on_cpu():
        return np.asarray(hvd.broadcast(data, root_rank=root, name="cvdist.broadcast").numpy())
