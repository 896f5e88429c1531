"""Any network of keras.applications, as `keras:NAME`. Source: keras.io/api/applications, which names the papers.

The network is Keras's own to the last parameter, in its own top too (dropout, normalisation, 1x1 convolution), except
that its classifier is the Dense layer `logits` here. Keras's preprocessing for its family comes first.
"""

from __future__ import annotations

import keras
from keras import layers

from cvdist.models.layers import ApplicationPreprocessing


def application(images: keras.KerasTensor, application: str) -> keras.KerasTensor:
    """Keras's network `application`, up to what its classifier sees.

    Networks that scale their input themselves (EfficientNet, ConvNeXt, MobileNetV3) do it in the precision of the
    computation: in bfloat16 fractions of a grey level are lost there.
    """
    build = getattr(keras.applications, application)
    x = ApplicationPreprocessing(family=build.__module__.rpartition(".")[2])(images)
    network = build(weights=None, input_tensor=x, classes=1)
    # The classifier is the last layer with weights: Dense, or in MobileNet a 1x1 convolution of a 1x1 map.
    features = [layer for layer in network.layers if layer.weights][-1].input
    return features if len(features.shape) == 2 else layers.Flatten(name="features")(features)
