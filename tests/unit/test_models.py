"""Every network has its published size, one contract, stable names, and weights that follow from the seed."""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from cvdist.errors import ConfigError
from cvdist.models import NETWORKS, create_model, describe, list_models

# name, input shape, classes, parameters, trainable parameters
PUBLISHED = [
    ("mnist_convnet", (28, 28, 1), 10, 93_322, 93_322),
    ("small_convnet", (150, 150, 3), 1, 3_453_121, 3_453_121),
    ("small_convnet", (150, 150, 3), 2, 3_453_121, 3_453_121),
    ("alexnet", (227, 227, 3), 100, 58_692_452, 58_691_748),
    ("resnet50", (224, 224, 3), 1000, 25_636_712, 25_583_592),
    ("vgg16", (224, 224, 3), 1000, 138_357_544, 138_357_544),
]


@pytest.fixture(autouse=True)
def forget_models() -> Iterator[None]:
    """Frees the memory of the models of a test."""
    yield
    keras.backend.clear_session()


def smallest(name: str, num_classes: int = 3, channels: int = 3, **kwargs: Any) -> keras.Model:
    """Makes a network for the smallest images it takes."""
    size = NETWORKS[name].min_size_px
    return create_model(name, input_shape=(size, size, channels), num_classes=num_classes, **kwargs)


def some_images(model: keras.Model, n: int = 2) -> np.ndarray:
    """Returns noise for a model, uint8 (n, H, W, C)."""
    return np.random.default_rng(1).integers(0, 256, (n, *model.input_shape[1:]), np.uint8)


def fingerprint(model: keras.Model) -> str:
    """Returns a hash of the names and values of all variables."""
    digest = hashlib.sha256()
    for variable in model.variables:
        digest.update(variable.path.encode() + np.asarray(variable.value).tobytes())
    return digest.hexdigest()


@pytest.mark.parametrize("name, shape, num_classes, total, trainable", PUBLISHED)
def test_a_network_has_its_published_number_of_parameters(
    name: str, shape: tuple[int, int, int], num_classes: int, total: int, trainable: int
) -> None:
    model = create_model(name, input_shape=shape, num_classes=num_classes)
    assert describe(model) == {"num_parameters": total, "num_trainable": trainable}
    assert model.count_params() == total
    assert model.name == name


def test_every_network_is_listed_and_has_a_published_size() -> None:
    assert list_models() == sorted(NETWORKS) == sorted({row[0] for row in PUBLISHED})


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", list_models())
def test_a_network_takes_a_step_forward_and_back(name: str, precision: Any) -> None:
    model = smallest(name, precision=precision)
    images = some_images(model)
    with tf.GradientTape() as tape:
        probabilities = model(images, training=True)
        loss = -tf.reduce_mean(tf.math.log(probabilities[:, 0]))
    assert probabilities.dtype == tf.float32
    assert probabilities.shape == (2, 3)
    np.testing.assert_allclose(tf.reduce_sum(probabilities, axis=1), 1, rtol=1e-5)
    gradients = tape.gradient(loss, [variable.value for variable in model.trainable_variables])
    assert all(gradient is not None and bool(tf.reduce_all(tf.math.is_finite(gradient))) for gradient in gradients)
    assert any(float(tf.reduce_max(tf.abs(gradient))) > 0 for gradient in gradients)
    assert {variable.dtype for variable in model.weights} == {"float32"}


@pytest.mark.parametrize("name", list_models())
def test_the_last_two_layers_are_logits_and_probabilities(name: str) -> None:
    for num_classes, activation in ((1, "sigmoid"), (2, "sigmoid"), (3, "softmax")):
        model = smallest(name, num_classes, precision="bfloat16")
        logits, probabilities = model.layers[-2:]
        assert (logits.name, probabilities.name) == ("logits", "probabilities")
        assert isinstance(logits, keras.layers.Dense)
        assert logits.activation is keras.activations.linear
        assert probabilities.activation.__name__ == activation
        assert logits.output.dtype == probabilities.output.dtype == model.output.dtype == "float32"
        assert model.output_shape == (None, 3 if num_classes == 3 else 1)
        if name != "mnist_convnet":
            break  # heads are made in one place; one network shows all three


def test_bfloat16_computes_in_bfloat16_whatever_the_global_policy_says() -> None:
    assert smallest("mnist_convnet", precision="bfloat16").get_layer("conv2").output.dtype == "bfloat16"
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        model = smallest("mnist_convnet", precision="float32")
        assert keras.config.dtype_policy().name == "mixed_bfloat16"
    finally:
        keras.config.set_dtype_policy("float32")
    assert {layer.compute_dtype for layer in model.layers} == {"float32"}


@pytest.mark.parametrize("name", list_models())
def test_bytes_and_floats_of_the_same_images_give_the_same_result(name: str) -> None:
    model = smallest(name)
    images = some_images(model)
    np.testing.assert_array_equal(model(images), model(images.astype(np.float32)))


@pytest.mark.parametrize("name", ["vgg16", "resnet50"])
def test_preprocessing_is_the_published_one(name: str) -> None:
    model = smallest(name, precision="bfloat16")
    images = some_images(model).astype(np.float32) + np.float32(0.37)  # bfloat16 would lose the fraction
    inside = keras.Model(model.input, model.get_layer("preprocessing").output)(images)
    np.testing.assert_allclose(inside, keras.applications.vgg16.preprocess_input(images.copy()), atol=1e-4)
    assert model.get_layer("preprocessing").count_params() == 0


@pytest.mark.parametrize(
    "name, low, high", [("mnist_convnet", 0, 1), ("small_convnet", 0, 1), ("alexnet", -1, 1)]
)
def test_pixels_are_scaled_inside_the_model(name: str, low: float, high: float) -> None:
    model = smallest(name)
    images = np.zeros_like(some_images(model))
    images[1] = 255
    inside = keras.Model(model.input, model.get_layer("preprocessing").output)(images).numpy()
    np.testing.assert_allclose([inside[0].max(), inside[1].min()], [low, high], atol=1e-6)


@pytest.mark.parametrize("name", list_models())
def test_grey_images_work(name: str) -> None:
    model = smallest(name, channels=1)
    assert model(some_images(model)).shape == (2, 3)


@pytest.mark.parametrize("name", ["vgg16", "resnet50"])
def test_a_grey_image_is_seen_as_an_rgb_image_of_equal_channels(name: str) -> None:
    grey, colour = smallest(name, channels=1, seed=5), smallest(name, channels=3, seed=5)
    images = some_images(grey)
    np.testing.assert_allclose(grey(images), colour(np.repeat(images, 3, axis=-1)), rtol=1e-4)


@pytest.mark.parametrize("name", list_models())
def test_names_do_not_depend_on_what_was_made_before(name: str) -> None:
    first = smallest(name)
    smallest("alexnet"), keras.layers.Dense(1), keras.layers.Dropout(0.1)
    second = smallest(name)
    assert [layer.name for layer in first.layers] == [layer.name for layer in second.layers]
    paths = [variable.path for variable in first.variables]
    assert paths == [variable.path for variable in second.variables]
    assert len(set(paths)) == len(paths)
    # Names that Keras makes up would be those of classes, with or without a number.
    assert not {"dense", "conv2d", "dropout", "batch_normalization", "flatten_1", "seed_generator"} & {
        part for path in paths for part in path.split("/")
    }


@pytest.mark.parametrize("name", list_models())
def test_the_same_seed_gives_the_same_weights_and_another_seed_others(name: str) -> None:
    random.seed(1)
    first = fingerprint(smallest(name, seed=3))
    before = random.getstate()
    keras.utils.set_random_seed(99)
    random.setstate(before)
    assert fingerprint(smallest(name, seed=3)) == first
    assert random.getstate() == before  # the caller's generator is left alone
    assert fingerprint(smallest(name, seed=4)) != first


def test_every_layer_starts_with_weights_of_its_own() -> None:
    model = smallest("alexnet")
    kernels = [
        np.asarray(variable.value).ravel()[:8].tobytes()
        for variable in model.weights
        if variable.path.endswith("kernel")
    ]
    assert len(set(kernels)) == len(kernels) == 8
    states = [np.asarray(v.value).tobytes() for v in model.variables if v.path.endswith("seed_generator_state")]
    assert len(set(states)) == 2


def test_another_process_makes_the_same_weights() -> None:
    names = ["alexnet", "resnet50"]
    program = (
        "import hashlib, json, numpy as np; from cvdist.models import NETWORKS, create_model\n"
        "result = {}\n"
        f"for name in {names[::-1]!r}:\n"
        "    size = NETWORKS[name].min_size_px\n"
        "    model = create_model(name, input_shape=(size, size, 3), num_classes=3, seed=7)\n"
        "    digest = hashlib.sha256()\n"
        "    for v in model.variables: digest.update(v.path.encode() + np.asarray(v.value).tobytes())\n"
        "    result[name] = digest.hexdigest()\n"
        "print(json.dumps(result))\n"
    )
    environment = {
        **os.environ,
        "PYTHONHASHSEED": "123",
        "PYTHONPATH": os.pathsep.join(sys.path),
        "CUDA_VISIBLE_DEVICES": "",
    }
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True, timeout=120
    )
    assert json.loads(done.stdout.splitlines()[-1]) == {name: fingerprint(smallest(name, seed=7)) for name in names}


def test_names_are_known_without_tensorflow() -> None:
    program = "import sys, cvdist.models as m; m.list_models(); sys.exit('keras' in sys.modules or 'tensorflow' in sys.modules)"
    subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        check=True,
        timeout=60,
    )


def test_dropout_acts_in_training_only_and_differs_from_step_to_step() -> None:
    model = smallest("alexnet")
    features = np.ones((1, 4096), np.float32)
    dropout = model.get_layer("dropout1")
    np.testing.assert_array_equal(dropout(features, training=False), features)
    first, second = (np.asarray(dropout(features, training=True)) for _ in range(2))
    assert set(np.unique(first)) == {0.0, 2.0}
    assert abs((first == 0).mean() - 0.5) < 0.05
    assert (first != second).any()


def test_a_saved_model_loads_and_computes_the_same(tmp_path: Any) -> None:
    for name in ("alexnet", "resnet50"):
        model = smallest(name)
        path = tmp_path / f"{name}.keras"
        model.save(path)
        loaded = keras.saving.load_model(path)
        np.testing.assert_allclose(loaded(some_images(model)), model(some_images(model)), rtol=1e-5)
        assert [variable.path for variable in loaded.variables] == [variable.path for variable in model.variables]


def test_published_convolutional_weights_fit_by_name() -> None:
    model = smallest("vgg16")
    base = keras.applications.VGG16(include_top=False, weights=None, input_shape=(32, 32, 3))
    for layer in base.layers[1:]:
        model.get_layer(layer.name).set_weights(layer.get_weights())
    # Logits of random weights are small, so an equal feature map is what shows that the layers are the same.
    inside = keras.Model(model.input, model.get_layer("block5_pool").output)
    images = some_images(model).astype(np.float32)
    expected = base(keras.applications.vgg16.preprocess_input(images.copy()))
    np.testing.assert_allclose(inside(images), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", list_models())
def test_images_too_small_are_refused_with_the_least_size(name: str) -> None:
    size = NETWORKS[name].min_size_px
    for shape in ((size - 1, size, 3), (size, size - 1, 3)):
        with pytest.raises(ConfigError, match=f"model {name}: .* too small .* {size} x {size} px"):
            create_model(name, input_shape=shape, num_classes=3)


@pytest.mark.parametrize("name", ["mnist_convnet", "small_convnet", "alexnet"])
def test_the_least_size_is_the_least(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    size = NETWORKS[name].min_size_px
    monkeypatch.setitem(NETWORKS, name, NETWORKS[name]._replace(min_size_px=1))
    with pytest.raises(ValueError, match=r"(?i)negative|dimension|output size"):
        create_model(name, input_shape=(size - 1, size - 1, 3), num_classes=3)


def test_an_unknown_name_is_refused_with_the_nearest_and_all() -> None:
    with pytest.raises(ConfigError) as caught:
        create_model("resnet5", input_shape=(224, 224, 3), num_classes=3)
    assert "'resnet5' is unknown" in str(caught.value)
    assert "did you mean 'resnet50'?" in str(caught.value)
    assert ", ".join(list_models()) in str(caught.value)
    with pytest.raises(ConfigError, match="choose one of these"):
        create_model("xyz", input_shape=(224, 224, 3), num_classes=3)


@pytest.mark.parametrize("shape", [(28, 28), (28, 28, 2), (28, 28, 4)])
def test_images_that_are_neither_grey_nor_rgb_are_refused(shape: Any) -> None:
    with pytest.raises(ConfigError, match="1 or 3 channels"):
        create_model("mnist_convnet", input_shape=shape, num_classes=3)


def test_other_wrong_arguments_are_refused() -> None:
    with pytest.raises(ConfigError, match="0 classes were asked for"):
        smallest("mnist_convnet", num_classes=0)
    with pytest.raises(ConfigError, match="precision: 'float16' is unknown"):
        smallest("mnist_convnet", precision="float16")
    keras.config.set_image_data_format("channels_first")
    try:
        with pytest.raises(ConfigError, match="channels_last"):
            smallest("mnist_convnet")
    finally:
        keras.config.set_image_data_format("channels_last")


def test_a_small_network_learns() -> None:
    """Bright against dark images are told apart after a few steps on the logits."""
    model = smallest("mnist_convnet", num_classes=2, channels=1)
    rng, optimizer = np.random.default_rng(0), keras.optimizers.Adam(3e-3)
    both = keras.Model(model.input, [model.get_layer("logits").output, model.output])
    labels = rng.integers(0, 2, 32).astype(np.float32)
    images = (rng.uniform(0, 120, (32, 18, 18, 1)) + 120 * labels[:, None, None, None]).astype(np.uint8)
    losses = []
    for _ in range(15):
        with tf.GradientTape() as tape:
            logits, _ = both(images, training=True)
            loss = tf.reduce_mean(tf.nn.sigmoid_cross_entropy_with_logits(labels=labels[:, None], logits=logits))
        values = [variable.value for variable in model.trainable_variables]
        optimizer.apply(tape.gradient(loss, values), model.trainable_variables)
        losses.append(float(loss))
    assert losses[0] == pytest.approx(math.log(2), abs=0.2)
    assert losses[-1] < 0.25
    np.testing.assert_allclose(both(images)[1], tf.sigmoid(both(images)[0]), rtol=1e-5)
