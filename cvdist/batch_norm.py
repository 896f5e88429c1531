"""Batch normalisation over the global batch: Keras's own layer, with the moments of all ranks.

Keras's `synchronized=True` knows tf.distribute only: under Horovod it changes nothing and says nothing.
Source: Peng 2018, MegDet, section 3.3 (cross-GPU batch normalisation).
"""

from __future__ import annotations

import functools
from typing import Any

from cvdist import comm, tensors
from cvdist.comm import World
from cvdist.errors import ConfigError


def SyncBatchNormalization(*, world: World | None = None, **settings: Any) -> Any:  # noqa: N802 - the name that users look for
    """Makes a keras.layers.BatchNormalization that normalises with the mean and variance over the batches of all ranks.

    The layer is Keras's own, so a saved model knows nothing of ranks; one rebuilt by `from_config` or `clone_model` has to
    be given to `synchronize` again.

    Args:
        world: The ranks; by default those of horovodrun, joined here.
        settings: Arguments of keras.layers.BatchNormalization.
    """
    import keras

    layer = keras.layers.BatchNormalization(**settings)
    synchronize(layer, world)
    return layer


def synchronize(model: Any, world: World | None = None) -> int:
    """Makes every BatchNormalization of a model, or a layer, use the moments of all ranks; call it before the first step.

    Every rank must run the same layers in training mode in every step. A masked value counts on no rank; ranks may hold
    batches of different sizes.

    Args:
        model: A Keras model or layer; it is changed.
        world: The ranks; by default those of horovodrun, joined here.

    Returns:
        The number of layers found.

    Raises:
        ConfigError: A layer was made with synchronized=True.
    """
    import keras

    world = world or comm.init()
    layers = [layer for layer in model._flatten_layers() if isinstance(layer, keras.layers.BatchNormalization)]
    for layer in layers:
        if layer.synchronized:
            raise ConfigError(
                f"{layer.name} was made with synchronized=True, which knows tf.distribute only; expected a layer without;"
                " remove the argument"
            )
        if world.size > 1:
            layer._moments = functools.partial(_moments_of_all, layer, world)
    return len(layers)


def _moments_of_all(layer: Any, world: World, inputs: Any, mask: Any) -> tuple[Any, Any]:
    """Replaces `_moments`: returns mean and variance (C,) over the inputs of all ranks.

    Each rank's moments are combined around their common mean, which loses no digits where the mean is large.
    Source: Chan 1979, Updating formulae and a pairwise algorithm for computing sample variances.
    """
    import tensorflow as tf

    mean, variance = type(layer)._moments(layer, inputs, mask)
    if mask is None:
        shape = tf.shape(inputs)
        count = tf.cast(tf.reduce_prod(tf.gather(shape, layer._reduction_axes)), inputs.dtype)
    else:
        count = tf.reduce_sum(tf.cast(mask, inputs.dtype))
    rows = tensors.gather_rows(tf.concat([mean, variance, count[tf.newaxis]], axis=0), world)  # (ranks, 2 C + 1)
    num_channels = inputs.shape[layer.axis]
    means, variances, counts = tf.split(rows, [num_channels, num_channels, 1], axis=1)
    share = counts / tf.maximum(tf.reduce_sum(counts), 1)  # (ranks, 1)
    total_mean = tf.reduce_sum(share * means, axis=0)
    total_variance = tf.reduce_sum(share * (variances + tf.square(means - total_mean)), axis=0)
    return total_mean, total_variance
