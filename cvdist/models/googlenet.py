"""GoogLeNet (Inception v1) with its two auxiliary heads. Source: Szegedy 2015, Going Deeper with Convolutions, table 1.

As the paper's network, which is BVLC's published Caffe model of it, with a global average in place of the last 7x7 pool:
the same at 224 px, and it takes other sizes. The auxiliary heads are dense, so their size follows the image's.
"""

from __future__ import annotations

import keras
from keras import layers

from cvdist.models.layers import AuxiliaryHeads, CaffePreprocessing, Dropout, LocalResponseNormalization

# Source: Szegedy 2015, table 1: 1x1, reduction before 3x3, 3x3, reduction before 5x5, 5x5, projection of the pool.
BLOCKS = {
    "3a": (64, 96, 128, 16, 32, 32),
    "3b": (128, 128, 192, 32, 96, 64),
    "4a": (192, 96, 208, 16, 48, 64),
    "4b": (160, 112, 224, 24, 64, 64),
    "4c": (128, 128, 256, 24, 64, 64),
    "4d": (112, 144, 288, 32, 64, 64),
    "4e": (256, 160, 320, 32, 128, 128),
    "5a": (256, 160, 320, 32, 128, 128),
    "5b": (384, 192, 384, 48, 128, 128),
}
# Source: Szegedy 2015, section 5: heads on 4a and 4d, their losses weighted by 0.3, 70 % dropped there and 40 % at the end.
AUXILIARY_WEIGHT, AUXILIARY_DROPOUT, DROPOUT = 0.3, 0.7, 0.4


def googlenet(images: keras.KerasTensor, num_outputs: int) -> keras.KerasTensor:
    """Nine inception blocks: 13,378,280 parameters at 224x224x3 with 1,000 classes, 6,998,552 of them in use afterwards."""
    x = CaffePreprocessing()(images)
    x = conv(x, 64, 7, "conv1", strides=2)
    x = layers.MaxPooling2D(3, 2, "same", name="pool1")(x)
    x = LocalResponseNormalization(name="norm1")(x)
    x = conv(x, 64, 1, "conv2_reduce")
    x = conv(x, 192, 3, "conv2")
    x = LocalResponseNormalization(name="norm2")(x)
    x = layers.MaxPooling2D(3, 2, "same", name="pool2")(x)
    auxiliary: list[keras.KerasTensor] = []
    for block in BLOCKS:
        x = inception(x, block)
        if block in ("3b", "4e"):
            x = layers.MaxPooling2D(3, 2, "same", name=f"pool{block[0]}")(x)
        if block in ("4a", "4d"):
            auxiliary.append(auxiliary_head(x, num_outputs, f"auxiliary{len(auxiliary) + 1}"))
    x = layers.GlobalAveragePooling2D(name="pool5")(x)
    x = Dropout(DROPOUT, name="pool5_dropout")(x)
    return AuxiliaryHeads(AUXILIARY_WEIGHT, name="auxiliary")([x, *auxiliary])


def conv(x: keras.KerasTensor, filters: int, size: int, name: str, strides: int = 1) -> keras.KerasTensor:
    """A padded convolution and ReLU."""
    return layers.Conv2D(filters, size, strides, "same", activation="relu", name=name)(x)


def inception(x: keras.KerasTensor, block: str) -> keras.KerasTensor:
    """Four branches side by side. Source: Szegedy 2015, figure 2b."""
    name = f"inception{block}"
    filters_1, reduce_3, filters_3, reduce_5, filters_5, project = BLOCKS[block]
    branch_1 = conv(x, filters_1, 1, f"{name}_1x1")
    branch_3 = conv(conv(x, reduce_3, 1, f"{name}_3x3_reduce"), filters_3, 3, f"{name}_3x3")
    branch_5 = conv(conv(x, reduce_5, 1, f"{name}_5x5_reduce"), filters_5, 5, f"{name}_5x5")
    pooled = layers.MaxPooling2D(3, 1, "same", name=f"{name}_pool")(x)
    pooled = conv(pooled, project, 1, f"{name}_pool_project")
    return layers.Concatenate(name=name)([branch_1, branch_3, branch_5, pooled])


def auxiliary_head(x: keras.KerasTensor, num_outputs: int, name: str) -> keras.KerasTensor:
    """Returns float32 logits of a small classifier on an inner map. Source: Szegedy 2015, section 5."""
    x = layers.AveragePooling2D(5, 3, name=f"{name}_pool")(x)
    x = conv(x, 128, 1, f"{name}_conv")
    x = layers.Flatten(name=f"{name}_flatten")(x)
    x = layers.Dense(1024, activation="relu", name=f"{name}_fc")(x)
    x = Dropout(AUXILIARY_DROPOUT, name=f"{name}_dropout")(x)
    return layers.Dense(num_outputs, dtype="float32", name=f"{name}_logits")(x)
