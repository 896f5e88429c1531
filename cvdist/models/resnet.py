"""Residual networks. Source: He 2016, Deep Residual Learning for Image Recognition, table 1; Keras's own network."""

from __future__ import annotations

import keras

from cvdist.models.layers import CaffePreprocessing


def resnet50(images: keras.KerasTensor) -> keras.KerasTensor:
    """Fifty layers of bottleneck blocks: 25,636,712 parameters with 1,000 classes, at any size."""
    x = CaffePreprocessing()(images)
    return keras.applications.ResNet50(include_top=False, weights=None, input_tensor=x, pooling="avg").output
