"""VGG networks. Source: Simonyan 2015, Very Deep Convolutional Networks, table 1; Keras's own network."""

from __future__ import annotations

import keras
from keras import layers

from cvdist.models.layers import CaffePreprocessing


def vgg16(images: keras.KerasTensor) -> keras.KerasTensor:
    """Configuration D: 138,357,544 parameters at 224x224x3 with 1,000 classes.

    Without dropout, as Keras's network; its layers have Keras's names, so that published weights load by name.
    """
    x = CaffePreprocessing()(images)
    x = keras.applications.VGG16(include_top=False, weights=None, input_tensor=x).output
    x = layers.Flatten(name="flatten")(x)
    x = layers.Dense(4096, activation="relu", name="fc1")(x)
    return layers.Dense(4096, activation="relu", name="fc2")(x)
