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
        options: What else the function takes: `dropout`, `num_outputs` or `application`.
    """

    location: str
    min_size_px: int
    options: tuple[str, ...] = ()


KERAS_PREFIX = "keras:"
# Names in keras.applications, here because they are listed without importing Keras.
KERAS_NAMES = [
    *(f"ConvNeXt{size}" for size in ("Tiny", "Small", "Base", "Large", "XLarge")),
    *(f"DenseNet{depth}" for depth in (121, 169, 201)),
    *(f"EfficientNetB{size}" for size in range(8)),
    *(f"EfficientNetV2{size}" for size in ("B0", "B1", "B2", "B3", "S", "M", "L")),
    *("InceptionResNetV2", "InceptionV3", "Xception"),
    *("MobileNet", "MobileNetV2", "MobileNetV3Large", "MobileNetV3Small"),
    *("NASNetLarge", "NASNetMobile"),
    *(f"ResNet{depth}{version}" for depth in (50, 101, 152) for version in ("", "V2")),
    *("VGG16", "VGG19"),
]
KERAS_MIN_SIZE_PX = {"InceptionResNetV2": 75, "InceptionV3": 75, "Xception": 71}  # of the others: 32
NETWORKS = {
    "alexnet": Network("alexnet:alexnet", 67, ("dropout",)),
    "googlenet": Network("googlenet:googlenet", 65, ("num_outputs",)),
    "inception_v3": Network("inception:inception_v3", 75),
    "lenet5": Network("lenet:lenet5", 16),
    "mnist_convnet": Network("convnet:mnist_convnet", 18),
    "resnet18": Network("resnet:resnet18", 32),
    "resnet34": Network("resnet:resnet34", 32),
    "resnet50": Network("resnet:resnet50", 32),
    "resnet101": Network("resnet:resnet101", 32),
    "resnet152": Network("resnet:resnet152", 32),
    "simple_convnet": Network("convnet:simple_convnet", 4),
    "small_convnet": Network("convnet:small_convnet", 46, ("dropout",)),
    "vgg11": Network("vgg:vgg11", 32),
    "vgg13": Network("vgg:vgg13", 32),
    "vgg16": Network("vgg:vgg16", 32),
    "vgg19": Network("vgg:vgg19", 32),
    **{
        KERAS_PREFIX + name: Network("applications:application", KERAS_MIN_SIZE_PX.get(name, 32), ("application",))
        for name in KERAS_NAMES
    },
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
    dropout: float | None = None,
) -> keras.Model:
    """Makes the network `name` with random weights.

    Args:
        name: One of `list_models()`.
        input_shape: Height, width and channels (1 or 3) of the images.
        num_classes: Classes to tell apart; 1 and 2 both give one sigmoid output.
        seed: Of the initial weights and of dropout; the same seed gives the same weights in every process.
        precision: Of the computation; weights, logits and probabilities are float32 either way. Keras's global dtype
            policy is neither obeyed nor changed.
        dropout: Share dropped before dense layers, in networks that leave it open; by default the network's own.

    Raises:
        ConfigError: The name is unknown, or the network cannot be made for such images, classes, precision or dropout.
    """
    network = find_network(name)
    check_arguments(name, network, input_shape, num_classes, precision)
    check_dropout(name, network, dropout)

    import keras

    if keras.config.image_data_format() != "channels_last":
        raise ConfigError(
            f"keras.json: image_data_format is {keras.config.image_data_format()!r}; images here are (N, H, W, C);"
            " set it to 'channels_last'"
        )
    module, function = network.location.split(":")
    body: Callable[..., keras.KerasTensor] = getattr(importlib.import_module(f"{__name__}.{module}"), function)
    num_outputs = 1 if num_classes <= 2 else num_classes
    plain_name = name.removeprefix(KERAS_PREFIX)
    known = {"dropout": dropout, "num_outputs": num_outputs, "application": plain_name}
    options = {option: known[option] for option in network.options if known[option] is not None}
    with seeded(seed), dtype_policy(POLICIES[precision]), fresh_names():
        images = keras.Input(tuple(input_shape), dtype="float32", name="images")
        logits = keras.layers.Dense(num_outputs, dtype="float32", name="logits")(body(images, **options))
        activation = "sigmoid" if num_outputs == 1 else "softmax"
        probabilities = keras.layers.Activation(activation, dtype="float32", name="probabilities")(logits)
    # Made outside the policy: a model with a bfloat16 policy would round its input images before preprocessing.
    with dtype_policy("float32"):
        return keras.Model(images, probabilities, name=plain_name)


def logits_of(model: keras.Model) -> keras.Model:
    """Returns the same network, weights shared, up to its logits: float32 (N, K), or (N, 1) for one or two classes."""
    import keras

    return keras.Model(model.input, model.get_layer("logits").output)


def training_heads(model: keras.Model) -> tuple[keras.Model, dict[str, float]]:
    """Returns the same network, weights shared, up to all logits that training takes losses of.

    Returns:
        A model whose output is a dict of logits, float32 (N, K), or (N, 1) for one or two classes: `logits` as of
        `logits_of`, and `auxiliary1`, `auxiliary2` where the network has such heads; and the weight of each one's loss.
    """
    import keras

    from cvdist.models.layers import AuxiliaryHeads

    outputs, weights = {"logits": model.get_layer("logits").output}, {"logits": 1.0}
    for layer in model.layers:
        if isinstance(layer, AuxiliaryHeads):
            heads = {f"auxiliary{number}": head for number, head in enumerate(layer.input[1:], start=1)}
            outputs, weights = outputs | heads, weights | dict.fromkeys(heads, layer.weight)
    return keras.Model(model.input, outputs), weights


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
    own = [known for known in list_models() if not known.startswith(KERAS_PREFIX)]
    # The case of letters and a forgotten prefix hide no name; where Keras and we have it, ours is meant.
    plain = {known.lower(): KERAS_PREFIX + known for known in KERAS_NAMES}
    cutoff = 0.0
    if not name.startswith(KERAS_PREFIX):
        plain, cutoff = plain | {known: known for known in own}, 0.4
    close = difflib.get_close_matches(name.removeprefix(KERAS_PREFIX).lower(), plain, n=1, cutoff=cutoff)
    hint = f"did you mean {plain[close[0]]!r}?" if close else "choose one of these"
    raise ConfigError(
        f"model: {name!r} is unknown; expected one of {', '.join(own)}, or {KERAS_PREFIX}NAME for a network of"
        f" keras.applications (`cvdist models` lists them all); {hint}"
    )


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


def check_dropout(name: str, network: Network, dropout: float | None) -> None:
    """Raises ConfigError for a dropout that is no share, or that `network` does not leave open."""
    if dropout is None:
        return
    if "dropout" not in network.options:
        able = [known for known in list_models() if "dropout" in NETWORKS[known].options]
        raise ConfigError(
            f"dropout: {dropout} was asked for; model {name} has no such setting; expected one of {', '.join(able)};"
            " leave dropout out"
        )
    if not 0 <= dropout < 1:
        raise ConfigError(f"dropout: {dropout} is no share; expected 0 <= dropout < 1; 0.5 is usual")


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


@contextlib.contextmanager
def fresh_names() -> Iterator[None]:
    """Lets Keras number the names it makes up from the start, and then go on where it was.

    Some networks of keras.applications leave names of layers and random states to Keras (`conv2d_7`), which counts them
    for the whole process; they must not depend on what the process made before. Keras has no public way to say so.
    """
    from keras.src.backend.common import global_state

    before = global_state.get_global_attribute("object_name_uids")
    global_state.set_global_attribute("object_name_uids", None)
    try:
        yield
    finally:
        global_state.set_global_attribute("object_name_uids", before)
