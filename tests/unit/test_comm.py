"""The Horovod door in a world of one, and what it says about launchers that are wrong."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest

from cvdist import comm
from cvdist.comm import World
from cvdist.errors import ConfigError, DataError

ALONE = World.alone()
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(("HOROVOD_", "OMPI_", "PMI_")):
            monkeypatch.delenv(name)


def variables() -> list[keras.Variable]:
    """Variables of several types with names."""
    return [
        keras.Variable(np.arange(6, dtype=np.float32).reshape(2, 3), name="a"),
        keras.Variable(np.array([1, 2, 3]), dtype="int64", name="b", trainable=False),
        keras.Variable(np.float32(1.5), name="c"),
    ]


def test_without_a_launcher_the_world_is_one() -> None:
    assert comm.init() == ALONE == World(rank=0, size=1, local_rank=0, local_size=1)


def test_world_of_one_never_imports_horovod() -> None:
    program = (
        "import sys; from cvdist import comm, gradients; world = comm.init(); comm.configure_devices(world); import keras, numpy as np;"
        " optimizer = keras.optimizers.SGD(1.0); assert gradients.DistributedOptimizer(optimizer, world) is optimizer;"
        " assert 'apply' not in vars(optimizer); variable = keras.Variable(np.zeros(2)); optimizer.apply([np.ones(2)], [variable]);"
        " comm.broadcast([variable], world); comm.average([variable], world); comm.allreduce_sum([1.0], world);"
        " comm.all_ranks_ok(world, None); comm.check_in_sync([variable], world, 1); comm.barrier(world);"
        " assert not [name for name in sys.modules if name.split('.')[0] == 'horovod']"
    )
    env = {**os.environ, "HOROVOD_RANK": "0", "HOROVOD_SIZE": "1", "HOROVOD_LOCAL_RANK": "0", "HOROVOD_LOCAL_SIZE": "1"}
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_door_opens_without_tensorflow() -> None:
    program = "import sys; from cvdist import comm; comm.init(); assert 'tensorflow' not in sys.modules; assert 'keras' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


@pytest.mark.parametrize(
    "env, message",
    [
        ({"HOROVOD_SIZE": "two"}, "HOROVOD_SIZE: 'two' is not a number"),
        ({"HOROVOD_SIZE": "2", "HOROVOD_RANK": "2"}, "expected ranks below their sizes"),
        ({"HOROVOD_SIZE": "2", "HOROVOD_RANK": "-1"}, "HOROVOD_RANK: '-1' is not a number"),
        ({"HOROVOD_SIZE": "0"}, "expected ranks below their sizes"),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, "horovodrun -np 4"),
        ({"PMI_SIZE": "3"}, "horovodrun -np 3"),
    ],
)
def test_a_wrong_launcher_is_named(env: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=message):
        comm.init()


@pytest.mark.parametrize("installed", [True, False])
def test_several_ranks_without_horovod_or_launcher_are_told_what_to_do(installed: bool) -> None:
    hide = "" if installed else "sys.modules['horovod'] = None;"
    program = f"import sys; {hide} from cvdist import comm; comm.init()"
    env = {**os.environ, "HOROVOD_RANK": "0", "HOROVOD_SIZE": "2", "HOROVOD_LOCAL_RANK": "0", "HOROVOD_LOCAL_SIZE": "2"}
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=env, capture_output=True, text=True)
    line = done.stderr.strip().splitlines()[-1]
    assert line.startswith("cvdist.errors.ConfigError: ")
    assert ("make setup" in line) or (installed and "start all ranks with horovodrun" in line)


def test_alone_nothing_changes() -> None:
    held = variables()
    before = comm.fingerprint(held)
    comm.broadcast(held, ALONE)
    comm.average(held, ALONE)
    comm.check_in_sync(held, ALONE, 1)
    comm.barrier(ALONE)
    comm.all_ranks_ok(ALONE, None)
    assert comm.fingerprint(held) == before
    assert comm.gather_bytes(b"abc", ALONE) == [b"abc"]


def test_a_sum_of_one_is_a_copy() -> None:
    values = np.array([2**62, 1])
    total = comm.allreduce_sum(values, ALONE)
    assert total is not values
    np.testing.assert_array_equal(total, values)


def test_sums_refuse_types_that_would_lose_digits() -> None:
    with pytest.raises(TypeError, match="found float32"):
        comm.allreduce_sum(np.zeros(1, np.float32), ALONE)


def test_an_error_alone_is_raised_as_it_is() -> None:
    error = DataError("x")
    with pytest.raises(DataError) as caught:
        comm.all_ranks_ok(ALONE, error)
    assert caught.value is error


def test_a_fingerprint_sees_every_bit_name_type_and_shape() -> None:
    def changed(index: int, value: object, **settings: object) -> bytes:
        held = variables()
        old = held[index]
        held[index] = keras.Variable(value, name=settings.get("name", old.name), dtype=settings.get("dtype", old.dtype))
        return comm.fingerprint(held)

    base = comm.fingerprint(variables())
    values = variables()[0].numpy()
    flipped = values.copy()
    flipped.reshape(-1).view(np.uint32)[5] ^= 1
    assert changed(0, values) == base
    different = {
        base,
        changed(0, flipped),
        changed(0, values.reshape(3, 2)),
        changed(0, values, name="z"),
        changed(1, np.array([1, 2, 3]), dtype="uint64"),
        changed(2, np.float32(-0.0)),
        changed(2, np.float32(0.0)),
        comm.fingerprint(variables()[::-1]),
        comm.fingerprint(variables()[:2]),
    }
    assert len(different) == 9


def test_fingerprints_do_not_depend_on_how_many_models_a_process_has_made() -> None:
    def model() -> keras.Model:
        keras.utils.set_random_seed(1)
        return keras.Sequential([keras.Input((3,)), keras.layers.Dense(2), keras.layers.Dense(2)])

    first, second = model(), model()
    assert first.variables[0].path != second.variables[0].path
    assert comm.fingerprint(first.variables) == comm.fingerprint(second.variables)
