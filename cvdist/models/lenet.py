"""LeNet-5. Source: LeCun 1998, Gradient-Based Learning Applied to Document Recognition, section II.B.

As the paper's network, with the four simplifications of today's textbooks: pooling is a plain average without a trained
factor, every map of the second convolution sees all maps of the first, the activation is tanh without the scale 1.7159,
and the last layer is a dense layer instead of radial basis functions.
"""

from __future__ import annotations

import keras
from keras import layers


def lenet5(images: keras.KerasTensor) -> keras.KerasTensor:
    """Two convolutions and two dense layers: 61,706 parameters at 32x32x1 with 10 classes."""
    # Source: section II.B: background (0 here) becomes -0.1 and ink (255) 1.175, which centres MNIST at unit variance.
    x = layers.Rescaling(1.275 / 255, offset=-0.1, dtype="float32", name="preprocessing")(images)
    x = layers.Conv2D(6, 5, activation="tanh", name="conv1")(x)
    x = layers.AveragePooling2D(2, name="pool1")(x)
    x = layers.Conv2D(16, 5, activation="tanh", name="conv2")(x)
    x = layers.AveragePooling2D(2, name="pool2")(x)
    x = layers.Flatten(name="flatten")(x)
    x = layers.Dense(120, activation="tanh", name="fc1")(x)
    return layers.Dense(84, activation="tanh", name="fc2")(x)
