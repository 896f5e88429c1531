"""Every network has its published size, one contract, stable names, and weights that follow from the seed."""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import math
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from cvdist.errors import ConfigError
from cvdist.models import KERAS_NAMES, NETWORKS, create_model, describe, list_models, logits_of, training_heads
from cvdist.models.layers import (
    ApplicationPreprocessing,
    AuxiliaryHeads,
    CaffePreprocessing,
    Dropout,
    LocalResponseNormalization,
)

ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "CUDA_VISIBLE_DEVICES": ""}
CAFFE = ["vgg16", "resnet50", "vgg11", "resnet18", "googlenet"]
EFFICIENT = "keras:EfficientNetB0"
OWN = [name for name in list_models() if not name.startswith("keras:")]
# The deeper siblings of a family differ in one line; what costs most is shown for these.
FAMILIES = sorted({*OWN, EFFICIENT} - {"resnet34", "resnet101", "resnet152", "vgg13", "vgg19"})
KERAS_NAMED = {"inception_v3", EFFICIENT}  # Keras numbers their layers
# name, input shape, classes, parameters, trainable parameters; VGG 11 and 13 and ResNet 18 and 34 (trainable) as in
# torchvision, GoogLeNet as in BVLC's Caffe model, the rest as in the issue and in Keras.
PUBLISHED = [
    ("mnist_convnet", (28, 28, 1), 10, 93_322, 93_322),
    ("small_convnet", (150, 150, 3), 1, 3_453_121, 3_453_121),
    ("small_convnet", (150, 150, 3), 2, 3_453_121, 3_453_121),
    ("alexnet", (227, 227, 3), 100, 58_692_452, 58_691_748),
    ("googlenet", (224, 224, 3), 1000, 13_378_280, 13_378_280),
    ("inception_v3", (299, 299, 3), 1000, 23_851_784, 23_817_352),
    ("lenet5", (32, 32, 1), 10, 61_706, 61_706),
    ("resnet18", (224, 224, 3), 1000, 11_699_112, 11_689_512),
    ("resnet34", (224, 224, 3), 1000, 21_814_696, 21_797_672),
    ("resnet50", (224, 224, 3), 1000, 25_636_712, 25_583_592),
    ("resnet101", (224, 224, 3), 1000, 44_707_176, 44_601_832),
    ("resnet152", (224, 224, 3), 1000, 60_419_944, 60_268_520),
    ("simple_convnet", (28, 28, 1), 10, 421_642, 421_642),
    ("vgg11", (224, 224, 3), 1000, 132_863_336, 132_863_336),
    ("vgg13", (224, 224, 3), 1000, 133_047_848, 133_047_848),
    ("vgg16", (224, 224, 3), 1000, 138_357_544, 138_357_544),
    ("vgg19", (224, 224, 3), 1000, 143_667_240, 143_667_240),
    ("keras:EfficientNetB0", (224, 224, 3), 1000, 5_330_571, 5_288_548),
    ("keras:MobileNet", (224, 224, 3), 1000, 4_253_864, 4_231_976),
]


SCALES = [("mnist_convnet", 0, 1), ("small_convnet", 0, 1), ("alexnet", -1, 1), ("simple_convnet", 0, 1)]
SCALES += [("lenet5", -0.1, 1.175), ("inception_v3", -1, 1)]


@pytest.fixture(autouse=True, scope="module")
def forget_models() -> Iterator[None]:
    """Frees the memory of the models of this file at its end."""
    yield
    shared.cache_clear()
    keras.backend.clear_session()


def smallest(name: str, num_classes: int = 3, channels: int = 3, **kwargs: Any) -> keras.Model:
    """Makes a network for the smallest images it takes."""
    size = NETWORKS[name].min_size_px
    return create_model(name, input_shape=(size, size, channels), num_classes=num_classes, **kwargs)


@functools.cache
def shared(name: str) -> keras.Model:
    """Returns the smallest network with seed 3, to be looked at but not trained."""
    return smallest(name, seed=3)


def some_images(model: keras.Model, n: int = 2) -> np.ndarray:
    """Returns noise for a model, uint8 (n, H, W, C)."""
    return np.random.default_rng(1).integers(0, 256, (n, *model.input_shape[1:]), np.uint8)


def inside(model: keras.Model, layer: str, images: np.ndarray) -> np.ndarray:
    """Returns what a layer makes of images."""
    return np.asarray(keras.Model(model.input, model.get_layer(layer).output)(images))


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
    assert model.name == name.removeprefix("keras:")


def test_every_network_is_listed_and_has_a_published_size() -> None:
    assert list_models() == sorted(NETWORKS)
    assert sorted(OWN) == sorted({row[0] for row in PUBLISHED if not row[0].startswith("keras:")})


def test_every_network_of_keras_is_listed() -> None:
    names = {f"keras:{name}" for name, value in vars(keras.applications).items() if inspect.isfunction(value)}
    assert names == set(list_models()) - set(OWN)
    assert len(names) == len(KERAS_NAMES)


@pytest.mark.parametrize("name", [*OWN, EFFICIENT, "keras:MobileNet"])
def test_a_network_takes_a_step_forward_and_back(name: str) -> None:
    check_step(smallest(name))


@pytest.mark.parametrize("name", ["mnist_convnet", "alexnet", "resnet50", "googlenet"])
def test_a_network_takes_a_step_in_bfloat16_too(name: str) -> None:
    model = smallest(name, precision="bfloat16")
    check_step(model)
    assert "bfloat16" in {layer.compute_dtype for layer in model.layers}


def check_step(model: keras.Model) -> None:
    """Computes probabilities and gradients of a batch as training does, all in float32 at the ends."""
    heads, weights = training_heads(model)
    with tf.GradientTape() as tape:
        outputs = heads(some_images(model), training=True)
        classes = {name: model.layers[-1](logits) for name, logits in outputs.items()}
        loss = sum(-weight * tf.reduce_mean(tf.math.log(classes[name][:, 0])) for name, weight in weights.items())
    assert all(logits.dtype == tf.float32 and logits.shape == (2, 3) for logits in outputs.values())
    assert math.isfinite(float(loss))
    assert classes["logits"].dtype == tf.float32
    np.testing.assert_allclose(tf.reduce_sum(classes["logits"], axis=1), 1, rtol=1e-5)
    gradients = tape.gradient(loss, [variable.value for variable in model.trainable_variables])
    assert all(bool(tf.reduce_all(tf.math.is_finite(gradient))) for gradient in gradients)  # None would raise
    assert float(tf.reduce_max(tf.abs(gradients[0]))) > 0  # the first layer learns
    assert {variable.dtype for variable in model.weights if variable.name != "count"} == {"float32"}
    assert model.get_layer("logits").output.dtype == "float32"


@pytest.mark.parametrize("name", FAMILIES)
def test_the_last_two_layers_are_logits_and_probabilities(name: str) -> None:
    model = shared(name)
    logits, probabilities = model.layers[-2:]
    assert (logits.name, probabilities.name) == ("logits", "probabilities")
    assert isinstance(logits, keras.layers.Dense)
    assert logits.activation is keras.activations.linear
    assert probabilities.activation is keras.activations.softmax
    assert model.output_shape == (None, 3)


@pytest.mark.parametrize("num_classes", [1, 2])
def test_one_and_two_classes_have_one_sigmoid_output(num_classes: int) -> None:
    model = smallest("mnist_convnet", num_classes, precision="bfloat16")
    assert model.output_shape == (None, 1)
    assert model.layers[-1].activation is keras.activations.sigmoid
    assert model.layers[-1].output.dtype == "float32"


def test_the_global_policy_is_neither_obeyed_nor_changed() -> None:
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        model = smallest("mnist_convnet", precision="float32")
        assert keras.config.dtype_policy().name == "mixed_bfloat16"
    finally:
        keras.config.set_dtype_policy("float32")
    assert {layer.compute_dtype for layer in model.layers} == {"float32"}


@pytest.mark.parametrize("name", FAMILIES)
def test_bytes_and_floats_of_the_same_images_give_the_same_result(name: str) -> None:
    images = some_images(shared(name))
    np.testing.assert_array_equal(shared(name)(images), shared(name)(images.astype(np.float32)))


@pytest.mark.parametrize("name", CAFFE)
def test_preprocessing_is_the_published_one(name: str) -> None:
    images = some_images(shared(name)).astype(np.float32)
    expected = keras.applications.vgg16.preprocess_input(images.copy())
    np.testing.assert_allclose(inside(shared(name), "preprocessing", images), expected, atol=1e-4)
    assert shared(name).get_layer("preprocessing").count_params() == 0


def test_bfloat16_does_not_round_the_images() -> None:
    model = smallest("resnet50", precision="bfloat16")
    images = some_images(model).astype(np.float32) + np.float32(0.37)
    expected = keras.applications.vgg16.preprocess_input(images.copy())
    np.testing.assert_allclose(inside(model, "preprocessing", images), expected, atol=1e-4)


@pytest.mark.parametrize("name, low, high", SCALES)
def test_pixels_are_scaled_inside_the_model(name: str, low: float, high: float) -> None:
    images = np.zeros_like(some_images(shared(name)))
    images[1] = 255
    scaled = inside(shared(name), "preprocessing", images)
    np.testing.assert_allclose([scaled[0].max(), scaled[1].min()], [low, high], atol=1e-6)


@pytest.mark.parametrize("name", ["mnist_convnet", "small_convnet", "alexnet"])
def test_grey_images_work(name: str) -> None:
    model = smallest(name, channels=1)
    assert model(some_images(model)).shape == (2, 3)


@pytest.mark.parametrize("name", CAFFE)
def test_a_grey_image_is_seen_as_an_rgb_image_of_equal_channels(name: str) -> None:
    model = smallest(name, channels=1, seed=3)
    images = some_images(model)
    np.testing.assert_allclose(model(images), shared(name)(np.repeat(images, 3, axis=-1)), rtol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_names_and_weights_follow_from_the_network_and_the_seed_alone(name: str) -> None:
    first = shared(name)
    # Nothing that the process did before matters, nor its generators.
    keras.layers.Dense(1), keras.layers.Dropout(0.1), smallest("mnist_convnet")
    keras.utils.set_random_seed(99)
    before = random.getstate()
    second = smallest(name, seed=3)
    assert random.getstate() == before  # and the caller's generator is left alone
    assert [layer.name for layer in first.layers] == [layer.name for layer in second.layers]
    assert fingerprint(first) == fingerprint(second)
    paths = [variable.path for variable in first.variables]
    assert len(set(paths)) == len(paths)
    # Names that Keras makes up are those of classes.
    if name in KERAS_NAMED:
        return
    made_up = {"dense", "conv2d", "dropout", "batch_normalization", "seed_generator"}
    assert not made_up & {part for path in paths for part in path.split("/")}


def test_another_seed_gives_other_weights() -> None:
    assert fingerprint(smallest("mnist_convnet", seed=4)) != fingerprint(shared("mnist_convnet"))
    assert fingerprint(smallest("resnet50", seed=4)) != fingerprint(shared("resnet50"))


def test_every_layer_starts_with_weights_of_its_own() -> None:
    kernels = [np.asarray(v.value).ravel()[:8].tobytes() for v in shared("alexnet").weights if v.name == "kernel"]
    assert len(set(kernels)) == len(kernels) == 8
    states = [np.asarray(v.value).tobytes() for v in shared("alexnet").variables if v.name == "seed_generator_state"]
    assert len(set(states)) == 2


def test_another_process_makes_the_same_weights() -> None:
    program = """if True:
        import hashlib, json, numpy as np
        from cvdist.models import NETWORKS, create_model
        result = {}
        for name in ("alexnet", "resnet50", "keras:EfficientNetB0"):
            size = NETWORKS[name].min_size_px
            model, digest = create_model(name, input_shape=(size, size, 3), num_classes=3, seed=3), hashlib.sha256()
            for variable in model.variables:
                digest.update(variable.path.encode() + np.asarray(variable.value).tobytes())
            result[name] = digest.hexdigest()
        print(json.dumps(result))
    """
    environment = {**ENVIRONMENT, "PYTHONHASHSEED": "123"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True, timeout=150
    )
    expected = {name: fingerprint(shared(name)) for name in ("alexnet", "resnet50", EFFICIENT)}
    assert json.loads(done.stdout.splitlines()[-1]) == expected


def test_names_are_known_without_tensorflow() -> None:
    program = (
        "import sys, cvdist.models as m; m.list_models(); sys.exit(bool({'keras', 'tensorflow'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", program], env=ENVIRONMENT, check=True, timeout=60)


def test_dropout_acts_in_training_only_and_differs_from_step_to_step() -> None:
    features, dropout = np.ones((1, 4096), np.float32), Dropout(0.5, name="drop")
    np.testing.assert_array_equal(dropout(features, training=False), features)
    first, second = (np.asarray(dropout(features, training=True)) for _ in range(2))
    assert set(np.unique(first)) == {0.0, 2.0}
    assert abs((first == 0).mean() - 0.5) < 0.05
    assert (first != second).any()


def test_a_saved_model_loads_and_computes_the_same(tmp_path: Path) -> None:
    images = keras.Input((4, 4, 1), name="images")
    x = keras.layers.Flatten(name="flatten")(CaffePreprocessing()(images))
    model = keras.Model(images, keras.layers.Dense(2, name="logits")(Dropout(0.25, name="drop")(x)))
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(loaded(some_images(model)), model(some_images(model)), rtol=1e-5)
    assert [variable.path for variable in loaded.variables] == [variable.path for variable in model.variables]
    assert loaded.get_layer("drop").rate == 0.25


def test_published_convolutional_weights_fit_by_name() -> None:
    model = smallest("vgg16")
    base = keras.applications.VGG16(include_top=False, weights=None, input_shape=(32, 32, 3))
    for layer in base.layers[1:]:
        model.get_layer(layer.name).set_weights(layer.get_weights())
    images = some_images(model).astype(np.float32)
    expected = base(keras.applications.vgg16.preprocess_input(images.copy()))
    np.testing.assert_allclose(inside(model, "block5_pool", images), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", list_models())
def test_images_too_small_are_refused_with_the_least_size(name: str) -> None:
    size = NETWORKS[name].min_size_px
    for shape in ((size - 1, size, 3), (size, size - 1, 3)):
        with pytest.raises(ConfigError, match=f"model {name}: .* too small .* {size} x {size} px"):
            create_model(name, input_shape=shape, num_classes=3)


@pytest.mark.parametrize(
    "name", ["mnist_convnet", "simple_convnet", "small_convnet", "lenet5", "alexnet", "googlenet", "inception_v3"]
)
def test_the_least_size_is_the_least(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    size = NETWORKS[name].min_size_px
    monkeypatch.setitem(NETWORKS, name, NETWORKS[name]._replace(min_size_px=1))
    with pytest.raises(ValueError, match=r"(?i)negative|dimension|output size"):
        create_model(name, input_shape=(size - 1, size - 1, 3), num_classes=3)


@pytest.mark.parametrize(
    "name, nearest",
    [
        ("resnet5", "'resnet50'"),
        ("ResNet50", "'resnet50'"),
        ("EfficientNetB0", "'keras:EfficientNetB0'"),
        ("keras:efficientnetb9", "'keras:EfficientNetB"),
        ("keras:Nope", "'keras:"),
        ("keras:resnet18", "'keras:ResNet1"),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest_and_all(name: str, nearest: str) -> None:
    with pytest.raises(ConfigError, match=f"'{name}' is unknown; .*did you mean {nearest}") as caught:
        create_model(name, input_shape=(224, 224, 3), num_classes=3)
    assert ", ".join(OWN) in str(caught.value)
    assert "keras:NAME" in str(caught.value)


def test_a_name_like_no_other_is_refused_with_all() -> None:
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


def test_a_small_network_learns_from_its_logits() -> None:
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


def test_googlenet_has_two_auxiliary_heads_in_training_and_none_in_evaluation() -> None:
    model = smallest("googlenet", num_classes=2)
    heads, weights = training_heads(model)
    assert weights == {"logits": 1.0, "auxiliary1": 0.3, "auxiliary2": 0.3}
    assert {name: tuple(output.shape) for name, output in heads.output.items()} == dict.fromkeys(weights, (None, 1))
    auxiliary = [variable for variable in model.weights if variable.path.startswith("auxiliary")]
    assert len(auxiliary) == 2 * 6
    images = some_images(model)
    before, heads_before = np.asarray(model(images)), heads(images)
    for variable in auxiliary:
        variable.assign(variable + 0.5)
    np.testing.assert_array_equal(model(images), before)
    assert model.output_shape == logits_of(model).output_shape == (None, 1)
    heads_after = heads(images)
    changed = {name for name in weights if np.any(heads_after[name] != heads_before[name])}
    assert changed == {"auxiliary1", "auxiliary2"}


def test_googlenet_without_its_auxiliary_heads_is_the_published_network() -> None:
    model = create_model("googlenet", input_shape=(224, 224, 3), num_classes=1000)
    main = [math.prod(v.shape) for v in model.weights if not v.path.startswith("auxiliary")]
    assert sum(main) == 6_998_552
    assert model.get_layer("inception3a").output.shape == (None, 28, 28, 256)
    assert model.get_layer("inception5b").output.shape == (None, 7, 7, 1024)
    assert model.get_layer("auxiliary1_pool").output.shape == (None, 4, 4, 512)
    assert model.get_layer("auxiliary2_pool").output.shape == (None, 4, 4, 528)


def test_a_network_without_auxiliary_heads_trains_its_logits_alone() -> None:
    model = shared("mnist_convnet")
    heads, weights = training_heads(model)
    assert weights == {"logits": 1.0}
    outputs = heads(some_images(model))
    np.testing.assert_array_equal(outputs.pop("logits"), logits_of(model)(some_images(model)))
    assert not outputs


def test_dropout_of_small_convnet_is_a_setting() -> None:
    plain, dropped = (smallest("small_convnet", dropout=share) for share in (None, 0.5))
    assert describe(plain) == describe(dropped)
    names = [layer.name for layer in dropped.layers]
    assert names[names.index("flatten") :] == ["flatten", "dropout1", "dense1", "logits", "probabilities"]
    assert dropped.get_layer("dropout1").rate == 0.5
    assert "dropout1" not in [layer.name for layer in plain.layers]
    assert smallest("alexnet", dropout=0.1).get_layer("dropout2").rate == 0.1
    assert shared("alexnet").get_layer("dropout2").rate == 0.5


def test_a_dropout_that_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigError, match="vgg16 has no such setting; expected one of alexnet, small_convnet; leave"):
        smallest("vgg16", dropout=0.5)
    for share in (1.0, -0.1, float("nan")):
        with pytest.raises(ConfigError, match="is no share; expected 0 <= dropout < 1"):
            smallest("small_convnet", dropout=share)


@pytest.mark.parametrize("family", ["inception_v3", "densenet", "resnet", "efficientnet"])
@pytest.mark.parametrize("channels", [1, 3])
def test_preprocessing_of_a_family_of_keras_is_its_own(family: str, channels: int) -> None:
    images = np.random.default_rng(2).uniform(0, 255, (2, 5, 4, channels)).astype(np.float32)
    rgb = np.repeat(images, 3, axis=-1) if channels == 1 else images.copy()
    expected = getattr(keras.applications, family).preprocess_input(rgb)
    np.testing.assert_allclose(ApplicationPreprocessing(family)(images), expected, atol=1e-4)


def test_local_response_normalisation_is_the_papers_formula() -> None:
    maps = np.random.default_rng(3).normal(0, 100, (2, 3, 3, 8)).astype(np.float32)
    energy = [np.square(maps[..., max(0, c - 2) : c + 3]).sum(-1) for c in range(8)]
    expected = maps / (1 + 1e-4 / 5 * np.stack(energy, -1)) ** 0.75
    np.testing.assert_allclose(LocalResponseNormalization()(maps), expected, rtol=1e-4)


def test_saved_layers_come_back_with_their_settings() -> None:
    for layer in (ApplicationPreprocessing("densenet"), AuxiliaryHeads(0.3), LocalResponseNormalization(name="norm")):
        config = keras.saving.serialize_keras_object(layer)
        assert keras.saving.deserialize_keras_object(config).get_config() == layer.get_config()
