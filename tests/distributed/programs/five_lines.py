"""What a user of Keras writes to train on all ranks: the five lines of the README, then what the test looks at."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from cvdist.keras import DistributedOptimizer, default_callbacks, image_dataset_from_shards, init

world = init()

import keras  # noqa: E402

train = image_dataset_from_shards(sys.argv[2], split="train", batch_size=16 // world.size, seed=1)
network = [
    keras.layers.Rescaling(1 / 255),
    keras.layers.Conv2D(8, 3, strides=2, activation="relu"),
    keras.layers.Flatten(),
]
model = keras.Sequential([keras.Input((32, 32, 3)), *network, keras.layers.Dense(3, activation="softmax")])
optimizer = DistributedOptimizer(keras.optimizers.Adam(1e-2))
model.compile(optimizer, "sparse_categorical_crossentropy", metrics=["accuracy"], jit_compile=False)
history = model.fit(train, epochs=3, callbacks=default_callbacks(), verbose=0).history

from cvdist import comm  # noqa: E402

bits = comm.fingerprint([*model.trainable_variables, *model.optimizer.variables]).hex()
(Path(sys.argv[1]) / f"rank-{world.rank}.json").write_text(json.dumps({"bits": bits, "history": history}))
