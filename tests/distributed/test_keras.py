"""cvdist.keras under the real horovodrun, with 1, 2 and 3 ranks: one launch for each, many promises."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tests.distributed.worlds import World
from tests.made_data import class_tree, data_set

RunRanks = Callable[..., Any]

FITS = ["fit", "fit_accumulated", "fit_two_at_once", "fit_fp16", "fit_bf16"]


@pytest.fixture(scope="module")
def worlds(run_ranks: RunRanks) -> Callable[[int], World]:
    """Runs a world of a size once."""
    held: dict[int, World] = {}

    def get(size: int) -> World:
        if size not in held:
            held[size] = World(run_ranks(size, "keras_checks.py", timeout_s=400), size)
        return held[size]

    return get


@pytest.fixture(params=[1, 2, 3], ids=["1-rank", "2-ranks", "3-ranks"])
def world(request: pytest.FixtureRequest, worlds: Callable[[int], World]) -> World:
    return worlds(request.param)


@pytest.fixture(params=[2, 3], ids=["2-ranks", "3-ranks"])
def ranks(request: pytest.FixtureRequest, worlds: Callable[[int], World]) -> World:
    return worlds(request.param)


def test_horovod_is_imported_only_by_several_ranks(world: World) -> None:
    assert world.same("horovod_imported") == (world.size > 1)


@pytest.mark.parametrize("name", FITS)
def test_a_users_fit_keeps_ranks_identical(world: World, name: str) -> None:
    found = world.each(name)
    assert len({rank["start"] for rank in found}) == world.size, "ranks must start apart, or the test shows nothing"
    assert {rank["error"] for rank in found} == {""}
    assert len({rank["end"] for rank in found}) == 1
    assert found[0]["end"] != found[0]["start"]
    assert {rank["steps"] for rank in found} == {6 if name == "fit_accumulated" else 12}


def test_each_rank_drops_out_others(world: World) -> None:
    seeds = [rank["seed"] for rank in world.each("fit")]
    assert seeds == [seeds[0] + rank for rank in range(world.size)]


def test_with_horovods_own_optimizer_ranks_drift_apart(ranks: World) -> None:
    """The proof of why ours exists: one fit, from equal weights, on data that differ between ranks."""
    found = ranks.each("drifted")
    for name in ("ours", "horovods"):
        assert len({rank[name]["start"] for rank in found}) == 1
        assert {rank[name]["error"] for rank in found} == {""}
    assert len({rank["ours"]["end"] for rank in found}) == 1
    assert len({rank["horovods"]["end"] for rank in found}) == ranks.size


@pytest.mark.parametrize("name, tolerance", [("trained", 1e-5), ("trained_with_norm", 1e-4)])
def test_two_ranks_train_as_one_with_the_whole_batch(
    worlds: Callable[[int], World], name: str, tolerance: float
) -> None:
    one, two = worlds(1).same(name), worlds(2).same(name)
    np.testing.assert_allclose(two["losses"], one["losses"], rtol=0, atol=tolerance)
    np.testing.assert_allclose(two["weights"], one["weights"], rtol=0, atol=tolerance)
    assert len(one["losses"]) == 20
    assert np.std(one["losses"]) > 0.01


@pytest.mark.parametrize("size", [1, 2])
def test_micro_batches_train_as_one_batch(worlds: Callable[[int], World], size: int) -> None:
    whole, found = worlds(1).same("trained"), worlds(size).same("trained_in_micro_batches")
    np.testing.assert_allclose(found["losses"], whole["losses"], rtol=0, atol=1e-5)
    np.testing.assert_allclose(found["weights"], whole["weights"], rtol=0, atol=1e-5)


def test_only_the_step_that_applies_reduces(ranks: World) -> None:
    mean = -1 / ranks.size * np.array([3.0, 3.0 * (ranks.size - 1)])
    for ahead, before, after in ranks.each("ahead"):
        assert ahead == "True", "rank 0 waited for the others in a step that only accumulates"
        assert json.loads(before) == [0.0, 0.0]
        np.testing.assert_allclose(json.loads(after), mean, rtol=1e-6)


@pytest.mark.parametrize("name, steps", [("overflow", 11), ("overflow_accumulated", 5)])
def test_an_overflow_of_one_rank_is_skipped_by_all(world: World, name: str, steps: int) -> None:
    found = world.same(name)
    assert found["error"] == ""
    assert found["scales"] == [1024.0] * 2 + [512.0] * 10
    assert (found["steps"], found["finite"]) == (steps, True)


def compressed_by_hand(name: str, op: str, size: int) -> list[np.ndarray[Any, Any]]:
    """The sums of what keras_checks.py gives, in double precision."""
    shapes = ((5, 7), (), (11,), (3, 2, 2))
    of_ranks = []
    for rank in range(size):
        draw = np.random.default_rng(rank)
        of_ranks.append([draw.normal(size=shape).astype(np.float64) for shape in shapes])
    sums = [np.sum(np.stack(grads), axis=0) for grads in zip(*of_ranks, strict=True)]
    return [total / size if op == "average" else total for total in sums]


@pytest.mark.parametrize("name, relative", [("fp16", 2**-10), ("bf16", 2**-7)])
@pytest.mark.parametrize("op", ["average", "sum"])
def test_compressed_gradients_are_the_same_on_all_ranks_and_nearly_right(
    ranks: World, name: str, relative: float, op: str
) -> None:
    found = ranks.same("compressed")["sums"]
    expected = compressed_by_hand(name, op, ranks.size)
    # Rounded once by each rank and once as a sum; the largest term is 4.
    for mode in ("eager", "graph"):
        for tensor, wanted in zip(found[f"{name} {op} {mode}"], expected, strict=True):
            np.testing.assert_allclose(tensor, wanted, rtol=0, atol=relative * 4 * ranks.size)
    assert any(
        np.max(np.abs(np.asarray(tensor) - wanted)) > 1e-6
        for tensor, wanted in zip(found[f"{name} {op} graph"], expected, strict=True)
    )


def test_gradients_of_rows_are_compressed_too(ranks: World) -> None:
    expected = {2: [-1.0, -2.0, -1.0, 0.0, 0.0], 3: [-1.0, -2.0, -2.0, -1.0, 0.0]}[ranks.size]
    np.testing.assert_allclose(ranks.same("compressed")["table"], expected, rtol=2**-7)


def test_what_does_not_fit_into_fp16_becomes_infinite_on_all_ranks(ranks: World) -> None:
    assert ranks.same("compressed")["huge"] == ["inf", str(float(ranks.size))]


@pytest.mark.parametrize("name", ["batch_norm", "batch_norm_masked"])
def test_synchronized_batch_norm_is_that_of_the_whole_batch(world: World, name: str) -> None:
    for found in world.each(name):
        assert found["outputs"] < 1e-5
        assert found["of_inputs"] < 1e-5
        assert found["of_weights"] < 1e-5
        assert found["statistics"] < 1e-5
        assert found["bits"] == world.each(name)[0]["bits"]


def test_metrics_are_those_of_the_samples_of_all_ranks(world: World) -> None:
    found = world.same("metrics")
    assert set(found["found"]) == {name + part for name in ("", "val_") for part in ("loss", "accuracy", "top2")}
    for name, value in found["found"].items():
        assert value == pytest.approx(found["expected"][name], rel=1e-6)
    for name, value in found["plain"].items():
        assert value == pytest.approx(found["expected"][name], rel=1e-6)


def test_the_rate_rises_from_that_of_one_rank(world: World) -> None:
    start = 1 / world.size
    shares = [start + (1 - start) * step / 5 for step in range(1, 6)] + [1.0] * 3
    np.testing.assert_allclose(world.same("warmup"), 0.5 * np.array(shares), rtol=1e-6)


def test_what_would_drift_or_hang_is_refused(ranks: World) -> None:
    expected = {
        "not_broadcast": "first in .*kernel; expected bit-identical weights .*cvdist.keras.BroadcastCallback",
        "twice": "distributed already",
        "jit": "jit_compile=False",
        "steps": "steps in an epoch .*expected the same on all",
        "metric": "metric largest: Largest keeps variables of its own",
        "schedule": "the learning rate is a CosineDecay",
    }
    for found in ranks.each("refusals"):
        for name, pattern in expected.items():
            kind = "SyncError" if name == "not_broadcast" else "ConfigError"
            assert re.match(f"{kind}: .*{pattern}", found[name]), (name, found[name])


def test_a_rank_that_stops_early_ends_the_others(ranks: World) -> None:
    for found in ranks.each("stopped_early"):
        assert found.startswith("SyncError: ranks are out of step: rank 0 is at epoch 1, rank ")


def test_alone_nothing_is_refused_that_needs_no_other_rank(worlds: Callable[[int], World]) -> None:
    refusals = worlds(1).same("refusals")
    assert {name for name, message in refusals.items() if message} == {"schedule"}
    assert worlds(1).same("stopped_early") == ""


def test_a_saved_model_loads_without_cvdist(worlds: Callable[[int], World]) -> None:
    path = worlds(2).folder / "model.keras"
    config = zipfile.ZipFile(path).read("config.json").decode()
    assert "cvdist" not in config
    assert "horovod" not in config
    assert "LossScaleOptimizer" in config
    program = (
        "import sys; sys.modules['cvdist'] = sys.modules['horovod'] = None; import keras, numpy as np;"
        " model = keras.saving.load_model(sys.argv[1]); model.fit(np.zeros((4, 6)), np.zeros(4), verbose=0);"
        " print(type(model.optimizer.inner_optimizer).__name__, type(model.layers[1]).__name__)"
    )
    done = subprocess.run([sys.executable, "-c", program, str(path)], check=True, capture_output=True, text=True)
    assert done.stdout.split()[-2:] == ["Adam", "BatchNormalization"]


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A data set of 3 classes whose samples do not divide over the ranks."""
    folder = tmp_path_factory.mktemp("shards")
    images = class_tree(folder / "images", {"bird": 41, "cat": 40, "dog": 38}, height=40, width=52)
    data_set(images, f"file://{folder}/data", image_size=32)
    return f"file://{folder}/data"


@pytest.mark.parametrize("size", [1, 2])
def test_a_program_of_five_lines_trains_on_any_number_of_ranks(run_ranks: RunRanks, url: str, size: int) -> None:
    outcome = run_ranks(size, "five_lines.py", url)
    assert outcome.returncode == 0, outcome.output
    found = outcome.results()
    assert len(found) == size
    assert all(rank == found[0] for rank in found)
    assert all(math.isfinite(loss) for loss in found[0]["history"]["loss"])
    assert found[0]["history"]["loss"][-1] < found[0]["history"]["loss"][0]


def test_a_model_without_weights_is_refused_on_all_ranks_with_how_to_build_it(run_ranks: RunRanks, url: str) -> None:
    outcome = run_ranks(2, "unbuilt.py", url)
    assert outcome.returncode != 0
    assert "the model has no weights yet" in outcome.output
    assert "begin it with keras.Input((H, W, C))" in outcome.output
