"""The Horovod door under the real horovodrun, with 1, 2 and 3 ranks: one launch for each, many promises."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from typing import Any

import numpy as np
import psutil
import pytest

from tests.distributed.worlds import World

RunRanks = Callable[..., Any]


def gradients_of(rank: int) -> list[np.ndarray[Any, Any]]:
    """What comm_checks.py gives as the gradients of a rank, the table of four rows in full."""
    draw = np.random.default_rng(rank)
    dense = [draw.normal(size=shape).astype(np.float32) * 10 for shape in ((5, 3), (7,), ())]
    table = np.zeros((4, 3), np.float32)
    table[1:3] = draw.normal(size=(2, 3))
    return [*dense, np.zeros(2, np.float32), table]


@pytest.fixture(scope="module", params=[1, 2, 3], ids=["1-rank", "2-ranks", "3-ranks"])
def world(request: pytest.FixtureRequest, run_ranks: RunRanks) -> World:
    return World(run_ranks(request.param, "comm_checks.py"), request.param)


def test_every_rank_knows_its_place(world: World) -> None:
    assert world.each("world") == [[rank, world.size, rank, world.size] for rank in range(world.size)]
    cores = len(os.sched_getaffinity(0))
    assert world.same("threads") == (0 if world.size == 1 else max(1, cores // world.size))
    assert world.same("gathered") == [bytes(range(rank)).hex() for rank in range(world.size)]
    assert world.same("gathered_large") == [[rank * 1500] * 2 for rank in range(world.size)]


def test_horovod_is_imported_only_by_several_ranks(world: World) -> None:
    assert world.same("horovod_imported") == (world.size > 1)


@pytest.mark.parametrize("mode", ["eager", "graph"])
def test_gradients_are_the_average_of_all_ranks(world: World, mode: str) -> None:
    of_ranks = [gradients_of(rank) for rank in range(world.size)]
    expected = [-np.mean(np.stack(grads).astype(np.float64), axis=0) for grads in zip(*of_ranks, strict=True)]
    for found, average in zip(world.same("average")[mode], expected, strict=True):
        np.testing.assert_allclose(found, average, rtol=1e-6, atol=1e-7)


def test_gradients_of_all_float_types_are_averaged(world: World) -> None:
    average = -np.mean(np.arange(1, world.size + 1)) * np.array([1.0, 2.0, 4.0])
    assert world.same("types") == {name: average.tolist() for name in ("float16", "bfloat16", "float32", "float64")}


def test_clipping_comes_after_the_average(world: World) -> None:
    expected = [0.0, 0.0] if world.size == 1 else [-0.6, -0.8]
    np.testing.assert_allclose(world.same("clipped"), expected, rtol=1e-6)


def test_the_same_average_has_the_same_bits_every_time(world: World) -> None:
    assert world.same("repeated") == 1


def test_ranks_of_a_users_fit_stay_identical(world: World) -> None:
    fit = world.same("fit")
    assert fit["end"] != fit["start"]
    assert fit["type"] == "Adam"
    ends = {unwrapped["end"] for unwrapped in world.each("unwrapped")}
    assert len(ends) == world.size, "without the wrapper ranks must drift apart, or the test above shows nothing"


def test_horovods_own_optimizer_drifts_apart_or_fails(world: World) -> None:
    if world.size == 1:
        pytest.skip("one rank cannot drift")
    found = world.each("horovods_own")
    assert "error" in found[0] or len({rank["end"] for rank in found}) == world.size


def test_a_saved_model_knows_nothing_of_ranks(world: World) -> None:
    path = world.folder / "model.keras"
    config = json.loads(zipfile.ZipFile(path).read("config.json"))
    optimizer = config["compile_config"]["optimizer"]
    assert (optimizer["module"], optimizer["class_name"]) == ("keras.optimizers", "Adam")
    assert optimizer["registered_name"] is None
    assert "cvdist" not in json.dumps(config)
    assert "horovod" not in json.dumps(config)
    if world.size == 2:
        program = (
            "import sys; sys.modules['cvdist'] = sys.modules['horovod'] = None; import keras, numpy as np;"
            " model = keras.saving.load_model(sys.argv[1]); model.fit(np.zeros((4, 6)), np.zeros(4), verbose=0)"
        )
        subprocess.run([sys.executable, "-c", program, str(path)], check=True, capture_output=True)


def test_broadcast_copies_every_bit_of_every_type(world: World) -> None:
    for index, root in enumerate((0, world.size - 1)):
        of_ranks = [found[index] for found in world.each("broadcast")]
        assert len({json.dumps(found["before"]) for found in of_ranks}) == world.size
        for found in of_ranks:
            assert found["after"] == of_ranks[root]["before"]


def test_sums_are_exact_in_their_type(world: World) -> None:
    size, sums = world.size, world.same("sums")
    assert sums["int64"] == [(2**53 + 1) * size, -(2**60) * size, sum(range(size))]
    tenths, small = sum([0.1] * size), sum(1e-16 * rank for rank in range(size))
    np.testing.assert_allclose(sums["float64"], [[size, small], [tenths, sum(range(size))]], rtol=1e-15)
    assert sums["large"] == (np.arange(1000.0) * (size * (size + 1) // 2)).tolist()
    assert sums["scalar"] == size**2 / 2
    assert sums["list"] == [size, 2 * size]
    assert sums["empty"] == [0, 3]


def test_moving_statistics_are_averaged(world: World) -> None:
    mean = (world.size - 1) / 2
    values = world.same("averages")["values"]
    np.testing.assert_array_equal(values[0], np.full((2, 2), mean))
    np.testing.assert_allclose(values[1], 0.1 * mean, rtol=1e-7)


def test_one_failing_rank_stops_all(world: World) -> None:
    last = world.size - 1
    for rank, failures in enumerate(world.each("failures")):
        assert failures["none"] == {"kind": None}
        kind, text = ("ConfigError", "a: 1; use 2" if rank == last else f"rank {last} failed: a: 1; use 2")
        assert (failures["last"]["kind"], failures["last"]["text"]) == (kind, text)
        assert failures["last"]["seconds"] < 5
        foreign = failures["foreign"]
        if rank == 0:
            assert (foreign["kind"], foreign["text"]) == ("ValueError", "no\npickle ümlaut")
        else:
            assert (foreign["kind"], foreign["text"]) == ("SyncError", "rank 0 failed: ValueError: no pickle ümlaut")
        assert len(failures["long"]["text"]) <= (100_000 if rank == 0 else 5000)


def test_each_failing_rank_raises_its_own_error_and_the_others_name_the_first(world: World) -> None:
    if world.size == 1:
        pytest.skip("one rank has one error")
    found = [failures["two"] for failures in world.each("failures")]
    assert found[0]["kind"] == "KeyError"
    assert found[-1]["text"] == "the last"
    for others in found[1:-1]:
        assert (others["kind"], others["text"]) == ("SyncError", "rank 0 (and 1 more) failed: KeyError: 'zero'")


def test_one_perturbed_rank_stops_the_run_and_is_named(world: World) -> None:
    # Of two ranks nobody knows which one is right; the message takes rank zero's side.
    named = {"perturbed_last": world.size - 1, "perturbed_zero": {1: 0, 2: 1, 3: 0}[world.size]}
    for name, rank in named.items():
        for found in world.each(name):
            assert found["same"] == {"kind": None}
            if world.size == 1:
                assert found["after"] == {"kind": None}
                continue
            assert found["after"]["kind"] == "SyncError"
            assert (
                f"step 120: rank {rank} differs from rank {1 if rank == 0 else 0}, first in " in found["after"]["text"]
            )
            assert "/kernel; expected bit-identical weights" in found["after"]["text"]
            assert found["after"]["seconds"] < 5


def test_one_overflow_is_skipped_by_all_ranks(world: World) -> None:
    assert world.same("overflow") == {"skipped": [0.0, 0.0, 4.0], "taken": [-1.0, -1.0]}


def test_a_reduction_inside_of_loss_scaling_is_refused(world: World) -> None:
    if world.size == 1:
        pytest.skip("one rank does not reduce")
    for found in world.each("scaled_outside"):
        assert "use DistributedOptimizer(LossScaleOptimizer(optimizer), world)" in found["text"]


def test_ranks_with_other_variables_do_not_broadcast(world: World) -> None:
    for found in world.each("other_model"):
        if world.size == 1:
            assert found == {"kind": None}
        else:
            assert found["kind"] == "SyncError"
            assert f"rank {world.size - 1} has other variables than rank 0: v float64 (2, 3) instead" in found["text"]


def test_ranks_out_of_step_fail_instead_of_waiting(world: World) -> None:
    for found in world.each("out_of_step"):
        for case in ("shape", "type", "call"):
            if world.size == 1:
                assert found[case] == {"kind": None}
            else:
                assert found[case]["kind"] == "SyncError", case
                assert found[case]["text"].startswith("ranks are out of step: rank 0 is at sum of ")
                assert f"rank {world.size - 1} at " in found[case]["text"]
                assert found[case]["seconds"] < 5


def test_ranks_wait_for_a_late_one_longer_than_gloo_would(run_ranks: RunRanks) -> None:
    late_s, gloo_s = 8, 2
    outcome = run_ranks(2, "late.py", str(late_s), "60", env={"HOROVOD_GLOO_TIMEOUT_SECONDS": str(gloo_s)})
    assert outcome.returncode == 0, outcome.output
    assert [found["text"] for found in outcome.results()] == ["joined", "joined"]
    assert outcome.results()[0]["seconds"] > gloo_s + 2


def test_a_rank_that_does_not_start_is_named(run_ranks: RunRanks) -> None:
    found = run_ranks(3, "late.py", "12", "3").results()
    assert found[0]["text"].startswith("rank 2 did not start within 3 s")


def test_ranks_end_with_their_launcher(start_ranks: Callable[..., Any]) -> None:
    launch = start_ranks(2, "endless.py")
    pids = []
    for path in (launch.folder / "pid-0", launch.folder / "pid-1"):
        wait_until(path.exists, 120)
        pids.append(int(path.read_text()))
    launch.process.send_signal(signal.SIGKILL)
    launch.process.wait(10)
    wait_until(lambda: not is_alive(pids[0]), 5)  # it heeds SIGTERM
    wait_until(lambda: not is_alive(pids[1]), 20)  # it does not, and horovodrun's helper sends SIGKILL after 5 s
    wait_until(lambda: not launch.ranks(), 20)


def is_alive(pid: int) -> bool:
    """Says whether a process runs."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_until(holds: Callable[[], bool], timeout_s: float) -> None:
    """Waits for a condition."""
    started_s = time.monotonic()
    while not holds():
        assert time.monotonic() - started_s < timeout_s, f"not within {timeout_s} s"
        time.sleep(0.05)
