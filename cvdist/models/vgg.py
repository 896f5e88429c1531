"""VGG networks. Source: Simonyan 2015, Very Deep Convolutional Networks, table 1.

Configurations D and E (16 and 19 layers) are Keras's own; Keras has none of A and B (11 and 13), made here in its manner.
All are without dropout, as Keras's, and layers have Keras's names, so that published weights load by name.
"""

from __future__ import annotations

import keras
from keras import layers

from cvdist.models.layers import CaffePreprocessing


def vgg11(images: keras.KerasTensor) -> keras.KerasTensor:
    """Configuration A: 132,863,336 parameters at 224x224x3 with 1,000 classes."""
    return dense_layers(convolutions(CaffePreprocessing()(images), (1, 1, 2, 2, 2)))


def vgg13(images: keras.KerasTensor) -> keras.KerasTensor:
    """Configuration B: 133,047,848 parameters at 224x224x3 with 1,000 classes."""
    return dense_layers(convolutions(CaffePreprocessing()(images), (2, 2, 2, 2, 2)))


def vgg16(images: keras.KerasTensor) -> keras.KerasTensor:
    """Configuration D: 138,357,544 parameters at 224x224x3 with 1,000 classes."""
    x = CaffePreprocessing()(images)
    return dense_layers(keras.applications.VGG16(include_top=False, weights=None, input_tensor=x).output)


def vgg19(images: keras.KerasTensor) -> keras.KerasTensor:
    """Configuration E: 143,667,240 parameters at 224x224x3 with 1,000 classes."""
    x = CaffePreprocessing()(images)
    return dense_layers(keras.applications.VGG19(include_top=False, weights=None, input_tensor=x).output)


def convolutions(x: keras.KerasTensor, num_convs: tuple[int, ...]) -> keras.KerasTensor:
    """Five pooled blocks of padded 3x3 convolutions, `num_convs` in each."""
    for block, (convs, filters) in enumerate(zip(num_convs, (64, 128, 256, 512, 512), strict=True), start=1):
        for number in range(1, convs + 1):
            name = f"block{block}_conv{number}"
            x = layers.Conv2D(filters, 3, padding="same", activation="relu", name=name)(x)
        x = layers.MaxPooling2D(2, name=f"block{block}_pool")(x)
    return x


def dense_layers(x: keras.KerasTensor) -> keras.KerasTensor:
    """The two dense layers under the logits."""
    x = layers.Flatten(name="flatten")(x)
    x = layers.Dense(4096, activation="relu", name="fc1")(x)
    return layers.Dense(4096, activation="relu", name="fc2")(x)
