"""Residual networks. Source: He 2016, Deep Residual Learning for Image Recognition, table 1.

With 50, 101 and 152 layers they are Keras's own. Keras has none with 18 and 34: these are the paper's, with projections
where a shortcut changes its shape (option B) and the initial weights of He 2015, section 2.2.
"""

from __future__ import annotations

import keras
from keras import layers

from cvdist.models.layers import CaffePreprocessing

EPSILON = 1.001e-5  # of the batch normalisation in Keras's residual networks


def resnet18(images: keras.KerasTensor) -> keras.KerasTensor:
    """Eight basic blocks: 11,699,112 parameters with 1,000 classes, at any size."""
    return basic_resnet(images, (2, 2, 2, 2))


def resnet34(images: keras.KerasTensor) -> keras.KerasTensor:
    """Sixteen basic blocks: 21,814,696 parameters with 1,000 classes, at any size."""
    return basic_resnet(images, (3, 4, 6, 3))


def resnet50(images: keras.KerasTensor) -> keras.KerasTensor:
    """Fifty layers of bottleneck blocks: 25,636,712 parameters with 1,000 classes, at any size."""
    x = CaffePreprocessing()(images)
    return keras.applications.ResNet50(include_top=False, weights=None, input_tensor=x, pooling="avg").output


def resnet101(images: keras.KerasTensor) -> keras.KerasTensor:
    """101 layers of bottleneck blocks: 44,707,176 parameters with 1,000 classes, at any size."""
    x = CaffePreprocessing()(images)
    return keras.applications.ResNet101(include_top=False, weights=None, input_tensor=x, pooling="avg").output


def resnet152(images: keras.KerasTensor) -> keras.KerasTensor:
    """152 layers of bottleneck blocks: 60,419,944 parameters with 1,000 classes, at any size."""
    x = CaffePreprocessing()(images)
    return keras.applications.ResNet152(include_top=False, weights=None, input_tensor=x, pooling="avg").output


def basic_resnet(images: keras.KerasTensor, num_blocks: tuple[int, ...]) -> keras.KerasTensor:
    """A residual network of basic blocks, `num_blocks` of them at each of four sizes."""
    x = CaffePreprocessing()(images)
    x = conv_norm(x, 64, 7, "conv1", strides=2)
    x = layers.Activation("relu", name="conv1_relu")(x)
    x = layers.ZeroPadding2D(1, name="pool1_pad")(x)
    x = layers.MaxPooling2D(3, 2, name="pool1_pool")(x)
    for stage, blocks in enumerate(num_blocks):
        for block in range(blocks):
            strides = 2 if stage > 0 and block == 0 else 1
            x = basic_block(x, 64 * 2**stage, f"conv{stage + 2}_block{block + 1}", strides)
    return layers.GlobalAveragePooling2D(name="avg_pool")(x)


def basic_block(x: keras.KerasTensor, filters: int, name: str, strides: int) -> keras.KerasTensor:
    """Two 3x3 convolutions and a shortcut. Source: He 2016, figure 5, left, and equation 2."""
    shortcut = x
    if strides > 1 or x.shape[-1] != filters:
        shortcut = conv_norm(x, filters, 1, f"{name}_0", strides)
    x = conv_norm(x, filters, 3, f"{name}_1", strides)
    x = layers.Activation("relu", name=f"{name}_1_relu")(x)
    x = conv_norm(x, filters, 3, f"{name}_2")
    x = layers.Add(name=f"{name}_add")([shortcut, x])
    return layers.Activation("relu", name=f"{name}_out")(x)


def conv_norm(x: keras.KerasTensor, filters: int, size: int, name: str, strides: int = 1) -> keras.KerasTensor:
    """A convolution without bias, padded alike on all sides, and batch normalisation."""
    if size > 1:
        x = layers.ZeroPadding2D(size // 2, name=f"{name}_pad")(x)
    x = layers.Conv2D(filters, size, strides, use_bias=False, kernel_initializer="he_normal", name=f"{name}_conv")(x)
    return layers.BatchNormalization(epsilon=EPSILON, name=f"{name}_bn")(x)
