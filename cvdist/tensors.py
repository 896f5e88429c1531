"""Sums and gathers of tensors over all ranks, in graphs: gradients and batch moments.

Unlike what `comm.py` exchanges these carry no label, because they run in every step: all ranks must run the same graph.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from cvdist import comm
from cvdist.comm import World


def reduce_tensors(tensors: Sequence[Any], world: World, *, op: str, compression: str | None) -> list[Any]:
    """Averages or sums tensors over all ranks in one fused reduction; works in a graph.

    Args:
        tensors: Floating point, of the same shapes on all ranks; None stays None, rows (IndexedSlices) become dense.
        world: The ranks, more than one.
        op: average or sum.
        compression: None; or fp16 or bf16, in which all but float64 travels in 16 bits and is summed in float32.

    Returns:
        Tensors of the same types, with the same bits on all ranks.
    """
    import tensorflow as tf

    reduced: list[Any] = [None if tensor is None else tf.convert_to_tensor(tensor) for tensor in tensors]
    groups = collections.defaultdict(list)
    for index, tensor in enumerate(reduced):
        if tensor is not None:
            # Horovod knows no bfloat16, and a sum of float16 may overflow.
            groups[tf.float64 if tensor.dtype == tf.float64 else tf.float32].append(index)
    for dtype, indices in groups.items():
        group = [tf.cast(reduced[index], dtype) for index in indices]
        if compression and dtype == tf.float32:
            results = _reduce_in_16_bits(group, world, op, {"fp16": tf.float16, "bf16": tf.bfloat16}[compression])
        else:
            hvd = comm.horovod(world)
            results = hvd.grouped_allreduce(group, op=hvd.Average if op == "average" else hvd.Sum)
        for index, result in zip(indices, results, strict=True):
            reduced[index] = tf.cast(result, reduced[index].dtype)
    return reduced


def gather_rows(row: Any, world: World) -> Any:
    """Stacks a tensor of each rank, in the order of ranks; works in a graph, and gradients flow back to all ranks.

    A rank's gradient is that of the sum of all ranks' losses. (Horovod's own gradient is that of their average.)

    Args:
        row: Floating point (K,), on all ranks of one length.
        world: The ranks, more than one.

    Returns:
        A tensor (ranks, K).
    """
    import tensorflow as tf

    hvd = comm.horovod(world)

    @tf.custom_gradient
    def gathered(own: Any) -> tuple[Any, Callable[[Any], Any]]:
        return hvd.allgather(own[tf.newaxis]), lambda upstream: hvd.allreduce(upstream, op=hvd.Sum)[world.rank]

    return gathered(row)


def _reduce_in_16_bits(tensors: list[Any], world: World, op: str, dtype: Any) -> list[Any]:
    """Sums float32 tensors that travel as `dtype`: each rank sums one part of all values in float32, then all gather the parts.

    What travels is half of what a reduction in float32 sends, and a value is rounded twice, whatever the number of ranks.
    """
    import tensorflow as tf

    sizes = [int(np.prod(tensor.shape)) for tensor in tensors]
    filling = tf.zeros([-sum(sizes) % world.size], dtype)
    flat = tf.concat(
        [*(tf.reshape(tf.cast(tensor, dtype), [-1]) for tensor in tensors), filling], axis=0
    )  # (ranks x part,)
    # Horovod knows no bfloat16, and does not look into what it only moves.
    parts = tf.bitcast(comm.horovod(world).alltoall(tf.bitcast(flat, tf.float16)), dtype)  # what this rank is to sum
    total = tf.add_n([tf.cast(part, tf.float32) for part in tf.split(parts, world.size)])
    total = tf.cast(total / world.size if op == "average" else total, dtype)
    flat = tf.bitcast(comm.horovod(world).allgather(tf.bitcast(total, tf.float16)), dtype)
    flats = tf.split(flat, [*sizes, -1])[:-1]
    return [tf.reshape(tf.cast(one, tf.float32), tensor.shape) for one, tensor in zip(flats, tensors, strict=True)]
