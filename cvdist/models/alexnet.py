"""AlexNet. Source: Krizhevsky 2012, ImageNet Classification with Deep Convolutional Neural Networks, section 3.5.

As the paper's network, with four differences: one tower instead of two (so no grouped convolutions), batch
normalisation (Ioffe 2015) after the first two pools instead of local response normalisation, the initial weights of
He 2015, section 2.2, which train without the paper's biases of one, and pixels scaled to -1..1 instead of centred on
the training set's mean image, which a model that carries its preprocessing cannot know.
"""

from __future__ import annotations

import keras
from keras import layers

from cvdist.models.layers import Dropout

INITIALIZER = "he_normal"


def alexnet(images: keras.KerasTensor, dropout: float = 0.5) -> keras.KerasTensor:
    """Five convolutions and two dense layers: 58,692,452 parameters at 227x227x3 with 100 classes."""

    def conv(x: keras.KerasTensor, number: int, filters: int, size: int, strides: int = 1) -> keras.KerasTensor:
        padding = "valid" if strides > 1 else "same"
        return layers.Conv2D(
            filters, size, strides, padding, activation="relu", kernel_initializer=INITIALIZER, name=f"conv{number}"
        )(x)

    x = layers.Rescaling(1 / 127.5, offset=-1.0, dtype="float32", name="preprocessing")(images)
    x = conv(x, 1, 96, 11, strides=4)
    x = layers.MaxPooling2D(3, 2, name="pool1")(x)
    x = layers.BatchNormalization(name="norm1")(x)
    x = conv(x, 2, 256, 5)
    x = layers.MaxPooling2D(3, 2, name="pool2")(x)
    x = layers.BatchNormalization(name="norm2")(x)
    x = conv(x, 3, 384, 3)
    x = conv(x, 4, 384, 3)
    x = conv(x, 5, 256, 3)
    x = layers.MaxPooling2D(3, 2, name="pool5")(x)
    x = layers.Flatten(name="flatten")(x)
    # Source: Krizhevsky 2012, section 4.2: half of the first two dense layers is dropped.
    for number in (1, 2):
        x = layers.Dense(4096, activation="relu", kernel_initializer=INITIALIZER, name=f"fc{number}")(x)
        x = Dropout(dropout, name=f"dropout{number}")(x)
    return x
