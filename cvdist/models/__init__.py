"""The networks, one family per file, and the one function that makes them.

Every model keeps one contract:

- Input: images as float or uint8 "(N, H, W, C), 0-255", RGB or grey. Preprocessing is inside the model.
- Its last two layers are a Dense layer `logits` and an Activation `probabilities`, both computed in float32, so that
  training takes `model.get_layer("logits").output` for a loss that neither overflows nor saturates.
- One or two classes give one sigmoid output, more give softmax.
- Layer names, and with them variable paths, depend on nothing but the model's name: they are keys in checkpoints.

This module imports Keras only when a model is made, because `cvdist models` and --help list names without it.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import math
import random
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Literal, NamedTuple

from cvdist.errors import ConfigError

if TYPE_CHECKING:
    import keras


class Network(NamedTuple):
    """Where a network is defined, and the smallest image it can see.

    Attributes:
        location: "module:function" below this package; the function maps images to the features under the logits.
        min_size_px: Least height and width of its input.
    """

    location: str
    min_size_px: int


NETWORKS = {
    "alexnet": Network("alexnet:alexnet", 67),
    "mnist_convnet": Network("convnet:mnist_convnet", 18),
    "resnet50": Network("resnet:resnet50", 32),
    "small_convnet": Network("convnet:small_convnet", 46),
    "vgg16": Network("vgg:vgg16", 32),
}
POLICIES = {"float32": "float32", "bfloat16": "mixed_bfloat16"}


def list_models() -> list[str]:
    """Returns the names that `create_model` knows, sorted."""
    return sorted(NETWORKS)


def create_model(
    name: str,
    *,
    input_shape: tuple[int, int, int],
    num_classes: int,
    seed: int = 0,
    precision: Literal["float32", "bfloat16"] = "float32",
) -> keras.Model:
    """Makes the network `name` with random weights.

    Args:
        name: One of `list_models()`.
        input_shape: Height, width and channels (1 or 3) of the images.
        num_classes: Classes to tell apart; 1 and 2 both give one sigmoid output.
        seed: Of the initial weights and of dropout; the same seed gives the same weights in every process.
        precision: Of the computation; weights, logits and probabilities are float32 either way. Keras's global dtype
            policy is neither obeyed nor changed.

    Raises:
        ConfigError: The name is unknown, or the network cannot be made for such images, classes or precision.
    """
    network = find_network(name)
    check_arguments(name, network, input_shape, num_classes, precision)

    import keras

    if keras.config.image_data_format() != "channels_last":
        raise ConfigError(
            f"keras.json: image_data_format is {keras.config.image_data_format()!r}; images here are (N, H, W, C);"
            " set it to 'channels_last'"
        )
    module, function = network.location.split(":")
    body: Callable[[keras.KerasTensor], keras.KerasTensor] = getattr(
        importlib.import_module(f"{__name__}.{module}"), function
    )
    num_outputs = 1 if num_classes <= 2 else num_classes
    with seeded(seed), dtype_policy(POLICIES[precision]):
        images = keras.Input(tuple(input_shape), dtype="float32", name="images")
        logits = keras.layers.Dense(num_outputs, dtype="float32", name="logits")(body(images))
        activation = "sigmoid" if num_outputs == 1 else "softmax"
        probabilities = keras.layers.Activation(activation, dtype="float32", name="probabilities")(logits)
    # Made outside the policy: a model with a bfloat16 policy would round its input images before preprocessing.
    with dtype_policy("float32"):
        return keras.Model(images, probabilities, name=name)


def logits_of(model: keras.Model) -> keras.Model:
    """Returns the same network, weights shared, up to its logits: float32 (N, K), or (N, 1) for one or two classes."""
    import keras

    return keras.Model(model.input, model.get_layer("logits").output)


def describe(model: keras.Model) -> dict[str, int]:
    """Returns the numbers of all and of trainable parameters of a model."""

    def count(variables: list[keras.Variable]) -> int:
        return sum(math.prod(variable.shape) for variable in variables)

    return {"num_parameters": count(model.weights), "num_trainable": count(model.trainable_weights)}


def find_network(name: str) -> Network:
    """Returns the entry of `name`.

    Raises:
        ConfigError: There is none.
    """
    if name in NETWORKS:
        return NETWORKS[name]
    close = difflib.get_close_matches(name, NETWORKS, n=1, cutoff=0.4)
    hint = f"did you mean {close[0]!r}?" if close else "choose one of these"
    raise ConfigError(f"model: {name!r} is unknown; expected one of {', '.join(list_models())}; {hint}")


def check_arguments(
    name: str, network: Network, input_shape: tuple[int, ...], num_classes: int, precision: str
) -> None:
    """Raises ConfigError when `network` cannot be made with these arguments."""
    if len(input_shape) != 3 or input_shape[2] not in (1, 3):
        raise ConfigError(
            f"model {name}: the input shape {tuple(input_shape)} is not (height, width, channels) with 1 or 3 channels;"
            " prepare the data set with channels 1 or 3"
        )
    height_px, width_px = input_shape[:2]
    if min(height_px, width_px) < network.min_size_px:
        raise ConfigError(
            f"model {name}: images of {height_px} x {width_px} px are too small for it; expected at least"
            f" {network.min_size_px} x {network.min_size_px} px; raise image_size or choose a smaller network"
        )
    if num_classes < 1:
        raise ConfigError(f"model {name}: {num_classes} classes were asked for; expected 1 or more; check the data set")
    if precision not in POLICIES:
        raise ConfigError(
            f"precision: {precision!r} is unknown; expected one of {', '.join(POLICIES)}; choose one of these"
        )


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Makes Keras's unseeded initializers deterministic, and leaves Python's generator as it was.

    Keras draws the seed of each such initializer from Python's global generator, in the order of creation. This is the
    only way to seed the networks of keras.applications, which take no initializers.
    """
    state = random.getstate()
    random.seed(seed)
    try:
        yield
    finally:
        random.setstate(state)


@contextlib.contextmanager
def dtype_policy(name: str) -> Iterator[None]:
    """Makes `name` Keras's global dtype policy for a while."""
    import keras

    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(name)
    try:
        yield
    finally:
        keras.config.set_dtype_policy(before)
