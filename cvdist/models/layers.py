"""Layers that Keras lacks. A saved `.keras` file that holds one loads where this module has been imported."""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf

# Mean of blue, green and red over ImageNet's training images. Source: Simonyan 2015, section 2.1 (the subtraction); the
# values are those of the authors' published Caffe models, as in keras.applications.imagenet_utils, mode "caffe".
IMAGENET_MEAN_BGR = (103.939, 116.779, 123.68)


@keras.saving.register_keras_serializable(package="cvdist")
class CaffePreprocessing(keras.layers.Layer):  # type: ignore[misc]
    """RGB or grey images, 0-255, to centred BGR, as the published weights of VGG and ResNet expect; no parameters.

    A grey image stands for an RGB image of three equal channels. Computed in float32: bfloat16 would round a centred
    pixel by up to half a grey level.
    """

    def __init__(self, name: str = "preprocessing", **kwargs: Any) -> None:
        """Makes the layer; `kwargs` are those of keras.layers.Layer."""
        kwargs.setdefault("dtype", "float32")
        super().__init__(name=name, **kwargs)

    def call(self, images: Any) -> Any:
        """Returns float32 (N, H, W, 3) for float32 (N, H, W, 1 or 3)."""
        return keras.ops.flip(as_rgb(images), axis=-1) - keras.ops.convert_to_tensor(IMAGENET_MEAN_BGR, dtype="float32")

    def compute_output_shape(self, input_shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
        """Returns the input's shape with three channels."""
        return (*input_shape[:-1], 3)


@keras.saving.register_keras_serializable(package="cvdist")
class ApplicationPreprocessing(keras.layers.Layer):  # type: ignore[misc]
    """RGB or grey images, 0-255, to what a family of keras.applications expects, in float32; no parameters.

    A grey image stands for an RGB image of three equal channels. Families that scale their input themselves get it as is.
    """

    def __init__(self, family: str, name: str = "preprocessing", **kwargs: Any) -> None:
        """Makes the layer for a module of keras.applications; `kwargs` are those of keras.layers.Layer."""
        kwargs.setdefault("dtype", "float32")
        super().__init__(name=name, **kwargs)
        self.family = family

    def call(self, images: Any) -> Any:
        """Returns float32 (N, H, W, 3) for float32 (N, H, W, 1 or 3)."""
        return getattr(keras.applications, self.family).preprocess_input(as_rgb(images), data_format="channels_last")

    def compute_output_shape(self, input_shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
        """Returns the input's shape with three channels."""
        return (*input_shape[:-1], 3)

    def get_config(self) -> dict[str, Any]:
        """Returns what `from_config` needs."""
        return {**super().get_config(), "family": self.family}


def as_rgb(images: Any) -> Any:
    """Returns images (N, H, W, 3) for images (N, H, W, 1 or 3)."""
    return keras.ops.repeat(images, 3, axis=-1) if images.shape[-1] == 1 else images


@keras.saving.register_keras_serializable(package="cvdist")
class AuxiliaryHeads(keras.layers.Layer):  # type: ignore[misc]
    """Keeps classifiers on inner maps in a network that does without them: returns its first input and drops the others.

    Called with [features, logits of head 1, logits of head 2, ...]; `training_heads` finds the logits here. A compiled
    evaluation computes none of the heads, because nothing depends on them.
    """

    def __init__(self, weight: float, **kwargs: Any) -> None:
        """Makes a layer whose heads' losses count `weight` each; `kwargs` are those of keras.layers.Layer."""
        super().__init__(**kwargs)
        self.weight = weight

    def call(self, inputs: list[Any]) -> Any:
        """Returns the features."""
        return inputs[0]

    def compute_output_shape(self, input_shape: list[tuple[int | None, ...]]) -> tuple[int | None, ...]:
        """Returns the shape of the features."""
        return input_shape[0]

    def get_config(self) -> dict[str, Any]:
        """Returns what `from_config` needs."""
        return {**super().get_config(), "weight": self.weight}


@keras.saving.register_keras_serializable(package="cvdist")
class LocalResponseNormalization(keras.layers.Layer):  # type: ignore[misc]
    """Divides each channel by a power of the energy of its five neighbours, in float32; no parameters.

    Source: Krizhevsky 2012, section 3.3; the constants are those of BVLC's Caffe models (alpha is 1e-4 over 5 channels).
    """

    def __init__(self, **kwargs: Any) -> None:
        """Makes the layer; `kwargs` are those of keras.layers.Layer."""
        kwargs.setdefault("dtype", "float32")
        super().__init__(**kwargs)

    def call(self, inputs: Any) -> Any:
        """Returns the normalised maps, float32 (N, H, W, C)."""
        return tf.nn.local_response_normalization(inputs, depth_radius=2, bias=1.0, alpha=1e-4 / 5, beta=0.75)

    def compute_output_shape(self, input_shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
        """Returns the input's shape."""
        return input_shape


@keras.saving.register_keras_serializable(package="cvdist")
class Dropout(keras.layers.Layer):  # type: ignore[misc]
    """Dropout whose random state has a path that does not depend on what the process made before.

    Keras's own layer names its state by a global counter, and the path of a variable is its key in checkpoints.
    Source: Srivastava 2014, section 4.
    """

    def __init__(self, rate: float, **kwargs: Any) -> None:
        """Makes a layer that drops the share `rate` of its inputs; `kwargs` are those of keras.layers.Layer."""
        super().__init__(**kwargs)
        self.rate = rate
        self.seed_generator = keras.random.SeedGenerator(name=self.name)

    def call(self, inputs: Any, training: bool = False) -> Any:
        """Returns the inputs, in training with a share of them set to zero and the rest scaled up."""
        return keras.random.dropout(inputs, self.rate, seed=self.seed_generator) if training else inputs

    def compute_output_shape(self, input_shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
        """Returns the input's shape."""
        return input_shape

    def get_config(self) -> dict[str, Any]:
        """Returns what `from_config` needs."""
        return {**super().get_config(), "rate": self.rate}
