"""Optimizers step, decay and clip as configured; the learning rate is exact at every step."""

from __future__ import annotations

import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf

from cvdist.config import OptimConfig
from cvdist.errors import ConfigError
from cvdist.optim import lr_at, make_optimizer

NAMES = ["sgd", "adam", "adamw", "rmsprop"]


def a_model() -> keras.Model:
    """Returns a model that has kernels, biases and both parameters of a normalisation, none of them zero."""
    return keras.Sequential(
        [
            keras.Input((6, 6, 3)),
            keras.layers.Conv2D(4, 3, name="conv", bias_initializer="ones"),
            keras.layers.BatchNormalization(name="norm", beta_initializer="ones"),
            keras.layers.Flatten(),
            # Layers may be called anything: exclusion looks at the variable.
            keras.layers.Dense(2, name="gamma_and_bias", bias_initializer="ones"),
        ]
    )


def zero_step(optimizer: keras.optimizers.Optimizer, model: keras.Model) -> dict[str, float]:
    """Applies gradients of zero and returns by which factor each variable has shrunk."""
    variables = model.trainable_variables
    optimizer.build(variables)
    before = [variable.numpy().copy() for variable in variables]
    gradients = [np.zeros(variable.shape, np.float32) for variable in variables]
    tf.function(lambda: optimizer.apply(gradients, variables))()  # in a graph, as train.py does
    return {
        variable.path: float(np.mean(variable.numpy() / old)) for variable, old in zip(variables, before, strict=True)
    }


@pytest.mark.parametrize("name", NAMES)
def test_weight_decay_shrinks_kernels_by_lr_times_decay_and_nothing_else(name: str) -> None:
    optimizer = make_optimizer(OptimConfig(name=name, weight_decay=0.1), 0.5)  # type: ignore[arg-type]
    shrunk = zero_step(optimizer, a_model())
    assert len(shrunk) == 6
    for path, factor in shrunk.items():
        assert factor == pytest.approx(0.95 if path.endswith("/kernel") else 1.0, abs=1e-6), path


@pytest.mark.parametrize("name", NAMES)
def test_without_weight_decay_nothing_shrinks(name: str) -> None:
    shrunk = zero_step(make_optimizer(OptimConfig(name=name), 0.5), a_model())  # type: ignore[arg-type]
    assert set(shrunk.values()) == {1.0}


def test_sgd_has_plain_momentum() -> None:
    optimizer = make_optimizer(OptimConfig(name="sgd", momentum=0.9), 0.1)
    variable = keras.Variable([1.0])
    optimizer.build([variable])
    for _ in range(2):
        optimizer.apply([np.ones(1, np.float32)], [variable])
    # Velocities -0.1 and -0.19; Nesterov would have gone further.
    assert variable.numpy()[0] == pytest.approx(1 - 0.1 - 0.19)


@pytest.mark.parametrize("name", NAMES)
def test_each_name_makes_its_optimizer(name: str) -> None:
    optimizer = make_optimizer(OptimConfig(name=name, momentum=0.8), 0.25)  # type: ignore[arg-type]
    assert type(optimizer).__name__.lower() == name
    assert float(optimizer.learning_rate) == 0.25
    assert getattr(optimizer, "momentum", 0.8) == 0.8
    optimizer.learning_rate = 0.125  # as train.py does before each step
    assert float(optimizer.learning_rate) == 0.125


def test_an_unknown_optimizer_is_refused() -> None:
    with pytest.raises(ConfigError, match="'lion' is unknown; expected sgd, adam, adamw or rmsprop"):
        make_optimizer(OptimConfig(name="lion"), 0.1)  # type: ignore[arg-type]


def test_clipping_limits_the_norm_of_all_gradients_together() -> None:
    variables = [keras.Variable([0.0]), keras.Variable([0.0])]
    optimizer = make_optimizer(OptimConfig(momentum=0.0, clip_norm=1.0), 1.0)
    optimizer.build(variables)
    optimizer.apply([np.array([3.0], np.float32), np.array([4.0], np.float32)], variables)
    np.testing.assert_allclose([v.numpy()[0] for v in variables], [-0.6, -0.8], rtol=1e-6)


def test_no_clipping_by_default() -> None:
    variable = keras.Variable([0.0])
    optimizer = make_optimizer(OptimConfig(momentum=0.0), 1.0)
    optimizer.build([variable])
    optimizer.apply([np.array([1000.0], np.float32)], [variable])
    assert variable.numpy()[0] == -1000


def rates(schedule: str, *, warmup: int = 0, total: int = 100, per_epoch: int = 10, peak: float = 0.4) -> list[float]:
    """Returns the rates of all steps of a run."""
    return [
        lr_at(
            step,
            peak=peak,
            warmup_steps=warmup,
            total_steps=total,
            schedule=schedule,  # type: ignore[arg-type]
            steps_per_epoch=per_epoch,
        )
        for step in range(total + 1)
    ]


@pytest.mark.parametrize("schedule", ["cosine", "constant", "step"])
def test_warm_up_grows_linearly_to_the_peak_and_goes_on_from_there(schedule: str) -> None:
    values = rates(schedule, warmup=8)
    np.testing.assert_allclose(values[:9], [0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.4], rtol=1e-12)
    assert all(value <= 0.4 for value in values)


def test_cosine_falls_from_the_peak_through_its_half_to_zero() -> None:
    values = rates("cosine", warmup=20)
    assert values[20] == 0.4
    assert values[40] == pytest.approx(0.4 * (1 + np.sqrt(0.5)) / 2)
    assert values[60] == pytest.approx(0.2)
    assert values[100] == pytest.approx(0, abs=1e-15)
    assert all(later < earlier for earlier, later in itertools.pairwise(values[20:]))


def test_constant_stays_at_the_peak() -> None:
    assert set(rates("constant")) == {0.4}


def test_step_divides_by_ten_after_30_60_and_80_of_90_epochs() -> None:
    values = rates("step", total=900, per_epoch=10)
    for step, expected in (
        (0, 0.4),
        (299, 0.4),
        (300, 0.04),
        (599, 0.04),
        (600, 0.004),
        (799, 0.004),
        (800, 0.0004),
        (899, 0.0004),
    ):
        assert values[step] == pytest.approx(expected, rel=1e-9), step


def test_step_changes_only_where_an_epoch_begins() -> None:
    values = rates("step", total=7 * 13, per_epoch=13)
    changes = [step for step in range(1, 91) if values[step] != values[step - 1]]
    # 7 epochs: 30/90, 60/90 and 80/90 of them are over after 2.33, 4.67 and 6.22.
    assert changes == [3 * 13, 5 * 13]


def test_a_run_that_is_all_warm_up_ends_at_the_peak() -> None:
    assert rates("cosine", warmup=10, total=10)[9] == 0.4


def test_an_unknown_schedule_is_refused() -> None:
    with pytest.raises(ConfigError, match="'linear' is unknown"):
        rates("linear")
