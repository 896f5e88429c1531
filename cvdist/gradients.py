"""DistributedOptimizer: a Keras 3 optimizer that steps with the gradients of all ranks.

Horovod 0.28.1's own trains under Keras 3 without ever averaging, and says nothing; this is the glue that cvdist owns.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Literal, TypeVar

from cvdist import comm, tensors
from cvdist.comm import World
from cvdist.errors import ConfigError

T = TypeVar("T")

OPS = ("average", "sum")
COMPRESSIONS = (None, "fp16", "bf16")


def DistributedOptimizer(  # noqa: N802 - the name that Horovod's users look for
    optimizer: T,
    world: World | None = None,
    *,
    op: Literal["average", "sum"] = "average",
    compression: Literal["fp16", "bf16"] | None = None,
) -> T:
    """Makes a Keras 3 optimizer average the gradients over all ranks before it does anything with them.

    The optimizer itself is changed and returned: its class, settings, exclusions and variables stay as they are, so a
    saved model knows nothing of ranks, and loads where neither cvdist nor Horovod is installed. Clipping, weight decay
    and loss scaling come after the average. With `gradient_accumulation_steps` only the step that applies the gradients
    reduces them. Compile models with jit_compile=False, and give the same weights to all ranks before the first step
    (`comm.broadcast`, `cvdist.keras.BroadcastCallback`): the first step compares them.

    Args:
        optimizer: Not yet used. For float16 the LossScaleOptimizer, not the one inside.
        world: The ranks; by default those of horovodrun, joined here.
        op: average; or sum, for losses that are divided by the samples of all ranks.
        compression: fp16 or bf16: gradients travel in 16 bits, half of the traffic. fp16 has 3 more bits of precision, and
            turns what is beyond 65,504 into infinity, which a LossScaleOptimizer skips.

    Returns:
        The optimizer; in a world of one just as it was.

    Raises:
        ConfigError: An argument is unknown, or the optimizer is distributed already.
        SyncError: In the first step: the ranks start from different variables.
    """
    if op not in OPS:
        raise ConfigError(f"op: {op!r} is unknown; expected one of {OPS}; use one of them")
    if compression not in COMPRESSIONS:
        raise ConfigError(f"compression: {compression!r} is unknown; expected one of {COMPRESSIONS}; use one of them")
    world = world or comm.init()
    if world.size == 1:
        return optimizer
    if "apply" in vars(optimizer):
        raise ConfigError("the optimizer is distributed already; expected a plain one; call DistributedOptimizer once")
    reducer = _Reducer(optimizer, world, op, compression)
    optimizer.apply = reducer.apply  # type: ignore[attr-defined]
    return optimizer


def shared_variables(optimizer: Any) -> list[Any]:
    """Returns the variables of an optimizer that are the same on all ranks: all but what it has accumulated so far."""
    inner = getattr(optimizer, "inner_optimizer", optimizer)
    own = {id(variable) for variable in getattr(inner, "_accumulated_gradients", [])}
    return [variable for variable in optimizer.variables if id(variable) not in own]


class _Reducer:
    """What stands before the methods of an optimizer's class."""

    def __init__(self, optimizer: Any, world: World, op: str, compression: str | None) -> None:
        self._optimizer, self._world, self._has_started = optimizer, world, False
        self._reduce = functools.partial(tensors.reduce_tensors, world=world, op=op, compression=compression)
        self._inner = getattr(optimizer, "inner_optimizer", optimizer)  # that of a LossScaleOptimizer
        self._accumulates = bool(self._inner.gradient_accumulation_steps)
        self._has_reduced = False
        if self._accumulates:
            # Keras averages what it has accumulated, then clips, on the step that applies, in a condition on its counter of
            # steps. The counter is the same on all ranks; so must be whether a step is skipped.
            self._inner._clip_gradients = self._reduce_then_clip
            if self._inner is not optimizer:
                optimizer.check_finite = self._are_all_finite

    def apply(self, grads: Any, trainable_variables: Any = None) -> None:
        """Replaces `apply`: averages, unless that comes later, then does what the class does."""
        import tensorflow as tf

        if type(tf.compat.v1.get_default_graph()).__name__ == "CondBranchFuncGraph":
            raise ConfigError(
                "gradients are averaged inside a condition, where one rank's overflow would leave the others waiting for"
                " ever; expected the average outside; use DistributedOptimizer(LossScaleOptimizer(optimizer), world)"
            )
        variables = self._optimizer._trainable_variables if trainable_variables is None else list(trainable_variables)
        # Gradients of rows (IndexedSlices) become dense, and a graph does not know their shapes.
        grads = [
            None if grad is None else tf.ensure_shape(tf.convert_to_tensor(grad), variable.shape)
            for grad, variable in zip(grads, variables, strict=True)
        ]
        self._check_start(variables)
        if not self._accumulates:
            grads = self._reduce(grads)
        type(self._optimizer).apply(self._optimizer, grads, None if trainable_variables is None else variables)
        if self._accumulates and not self._has_reduced and not tf.executing_eagerly():
            raise ConfigError(
                f"{type(self._inner).__name__} accumulates gradients in a way of its own, so that they would not be averaged;"
                " expected Keras's; accumulate before `apply`, without gradient_accumulation_steps"
            )

    def _check_start(self, variables: Sequence[Any]) -> None:
        """Compares the ranks' variables before the first step, where all ranks meet anyway."""
        import tensorflow as tf

        if self._has_started:
            return
        self._has_started = True
        with tf.init_scope():  # now, not in the graph that is being traced
            held = [
                variable for variable in [*variables, *shared_variables(self._optimizer)] if hasattr(variable, "path")
            ]
            comm.check_in_sync(held, self._world, step=0)

    def _reduce_then_clip(self, grads: Any) -> Any:
        """Replaces `_clip_gradients`, which Keras calls once for each update."""
        self._has_reduced = True
        return type(self._inner)._clip_gradients(self._inner, self._reduce(grads))

    def _are_all_finite(self, grads: Any) -> Any:
        """Replaces `check_finite` of a LossScaleOptimizer: whether the gradients of all ranks are finite."""
        import tensorflow as tf

        is_finite = type(self._optimizer).check_finite(self._optimizer, grads)
        (num_finite,) = tensors.reduce_tensors(
            [tf.cast(is_finite, tf.float32)], self._world, op="sum", compression=None
        )
        return tf.equal(num_finite, self._world.size)
