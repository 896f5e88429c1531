"""Inception v3. Source: Szegedy 2016, Rethinking the Inception Architecture for Computer Vision; Keras's own network."""

from __future__ import annotations

import keras

from cvdist.models.layers import ApplicationPreprocessing


def inception_v3(images: keras.KerasTensor) -> keras.KerasTensor:
    """Eleven inception blocks: 23,851,784 parameters with 1,000 classes, at any size; without the auxiliary head."""
    x = ApplicationPreprocessing(family="inception_v3")(images)
    return keras.applications.InceptionV3(include_top=False, weights=None, input_tensor=x, pooling="avg").output
