"""Layers that Keras lacks. A saved `.keras` file that holds one loads where this module has been imported."""

from __future__ import annotations

from typing import Any

import keras

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
        if images.shape[-1] == 1:
            images = keras.ops.repeat(images, 3, axis=-1)
        return keras.ops.flip(images, axis=-1) - keras.ops.convert_to_tensor(IMAGENET_MEAN_BGR, dtype="float32")

    def compute_output_shape(self, input_shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
        """Returns the input's shape with three channels."""
        return (*input_shape[:-1], 3)


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
