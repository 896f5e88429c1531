"""A model that does not know the shape of its input, on several ranks."""

from __future__ import annotations

import sys

from cvdist.keras import DistributedOptimizer, default_callbacks, image_dataset_from_shards, init

init()

import keras  # noqa: E402

model = keras.Sequential([keras.layers.Flatten(), keras.layers.Dense(3, activation="softmax")])
model.compile(DistributedOptimizer(keras.optimizers.SGD(0.1)), "sparse_categorical_crossentropy", jit_compile=False)
model.fit(image_dataset_from_shards(sys.argv[2], batch_size=8), callbacks=default_callbacks(), verbose=0)
