"""Small convolutional networks from courses: two first networks for digits, and one for cats and dogs from scratch.

Source: Chollet 2018, Deep Learning with Python, sections 5.1 (`mnist_convnet`) and 5.2.3 (`small_convnet`);
`simple_convnet` is the common exercise beside them, padded and with a wider dense layer.
"""

from __future__ import annotations

import keras
from keras import layers

from cvdist.models.layers import Dropout


def mnist_convnet(images: keras.KerasTensor) -> keras.KerasTensor:
    """Three valid 3x3 convolutions and a dense layer: 93,322 parameters at 28x28x1 with 10 classes."""
    x = layers.Rescaling(1 / 255, dtype="float32", name="preprocessing")(images)
    x = layers.Conv2D(32, 3, activation="relu", name="conv1")(x)
    x = layers.MaxPooling2D(2, name="pool1")(x)
    x = layers.Conv2D(64, 3, activation="relu", name="conv2")(x)
    x = layers.MaxPooling2D(2, name="pool2")(x)
    x = layers.Conv2D(64, 3, activation="relu", name="conv3")(x)
    x = layers.Flatten(name="flatten")(x)
    return layers.Dense(64, activation="relu", name="dense1")(x)


def simple_convnet(images: keras.KerasTensor) -> keras.KerasTensor:
    """Two pooled padded 3x3 convolutions and a dense layer: 421,642 parameters at 28x28x1 with 10 classes."""
    x = layers.Rescaling(1 / 255, dtype="float32", name="preprocessing")(images)
    for number, filters in enumerate((32, 64), start=1):
        x = layers.Conv2D(filters, 3, padding="same", activation="relu", name=f"conv{number}")(x)
        x = layers.MaxPooling2D(2, name=f"pool{number}")(x)
    x = layers.Flatten(name="flatten")(x)
    return layers.Dense(128, activation="relu", name="dense1")(x)


def small_convnet(images: keras.KerasTensor, dropout: float = 0.0) -> keras.KerasTensor:
    """Four pooled valid 3x3 convolutions and a dense layer: 3,453,121 parameters at 150x150x3 with one output.

    The book's section 5.2.5 drops half of what the dense layer sees: `dropout` 0.5.
    """
    x = layers.Rescaling(1 / 255, dtype="float32", name="preprocessing")(images)
    for number, filters in enumerate((32, 64, 128, 128), start=1):
        x = layers.Conv2D(filters, 3, activation="relu", name=f"conv{number}")(x)
        x = layers.MaxPooling2D(2, name=f"pool{number}")(x)
    x = layers.Flatten(name="flatten")(x)
    if dropout > 0:
        x = Dropout(dropout, name="dropout1")(x)
    return layers.Dense(512, activation="relu", name="dense1")(x)
