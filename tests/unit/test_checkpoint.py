"""Checkpoints: complete or invisible, verified byte for byte, never fewer than two."""

from __future__ import annotations

import hashlib
import json
import random
import threading
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

from cvdist import checkpoint, storage
from cvdist.checkpoint import Checkpointer, State
from cvdist.errors import CheckpointError, StorageError

FILES = ("variables.npz", "state.json", "COMMIT.json")


def make_model(units: int = 4, seed: int = 1) -> keras.Model:
    """A built model with weights, moving statistics and a seed."""
    keras.utils.set_random_seed(seed)
    layers = [
        keras.layers.Dense(units),
        keras.layers.BatchNormalization(),
        keras.layers.Dropout(0.5),
        keras.layers.Dense(2),
    ]
    return keras.Sequential([keras.Input((3,)), *layers])


def trained(steps: int = 3, units: int = 4) -> tuple[keras.Model, keras.optimizers.Optimizer]:
    """A model and an Adam that has taken some steps."""
    model, optimizer = make_model(units), keras.optimizers.Adam(1e-2)
    optimizer.build(model.trainable_variables)
    draw = np.random.default_rng(5)
    for _ in range(steps):
        optimizer.apply([draw.normal(size=variable.shape).astype(np.float32) for variable in model.trainable_variables])
    return model, optimizer


def state(step: int, **changes: Any) -> State:
    """The state of a run at a step."""
    return State(**{"model": "small", "epoch": step // 10, "step": step, "seed": 7, "global_batch": 32, **changes})


def bits(model: keras.Model, optimizer: keras.optimizers.Optimizer) -> list[bytes]:
    """Everything that must survive."""
    return [variable.value.numpy().tobytes() for variable in (*model.variables, *optimizer.variables)]


def save(run_url: str, *steps: int, keep: int = 10, reports: list[str] | None = None) -> list[bytes]:
    """Saves checkpoints of a fresh model and returns its bits."""
    model, optimizer = trained()
    with Checkpointer(run_url, keep=keep, report=(reports if reports is not None else []).append) as checkpointer:
        for step in steps:
            checkpointer.save(model, optimizer, state(step))
    return bits(model, optimizer)


def names(run_url: str) -> list[str]:
    """The entries of the folder of checkpoints, hidden ones too."""
    return [storage.name(entry.url) for entry in storage.list_dir(storage.join(run_url, "checkpoints"))]


def never(message: str) -> None:
    raise AssertionError(f"nothing was to be reported: {message}")


@pytest.fixture
def local(tmp_path: Path) -> tuple[str, Path]:
    """A run's folder as URL and as path."""
    return f"file://{tmp_path}", tmp_path / "checkpoints"


class TestEverywhere:
    """On local disk and on HDFS."""

    def test_everything_comes_back_bit_for_bit(self, storage_url: str) -> None:
        model, optimizer = trained()
        model.variables[0].assign(np.full(model.variables[0].shape, np.float32("nan")))
        with Checkpointer(storage_url, keep=2, report=never) as checkpointer:
            checkpointer.save(model, optimizer, state(120, extra={"classes": ["a", "ü"], "best": 0.1}, data_digest="d"))
        found = checkpoint.latest(storage_url, never)
        assert found is not None
        assert found.url == storage.join(storage_url, "checkpoints", "step-00000120")
        assert found.state.versions["keras"] == keras.__version__
        expected = state(
            120, extra={"classes": ["a", "ü"], "best": 0.1}, data_digest="d", versions=found.state.versions
        )
        assert found.state == expected
        other, its_optimizer = trained(steps=0)
        assert bits(other, its_optimizer) != bits(model, optimizer)
        checkpoint.restore(found, other, its_optimizer, model_name="small")
        assert bits(other, its_optimizer) == bits(model, optimizer)
        assert int(its_optimizer.iterations) == 3

    def test_nothing_but_whole_checkpoints_is_left(self, storage_url: str) -> None:
        save(storage_url, 1, 2)
        assert names(storage_url) == ["step-00000001", "step-00000002"]
        folder = storage.join(storage_url, "checkpoints", "step-00000002")
        assert sorted(storage.name(entry.url) for entry in storage.list_dir(folder)) == sorted(FILES)

    def test_only_the_newest_stay(self, storage_url: str) -> None:
        save(storage_url, 10, 20, 30, 40, keep=2)
        assert names(storage_url) == ["step-00000030", "step-00000040"]

    def test_a_checkpoint_of_the_same_step_is_replaced(self, storage_url: str) -> None:
        save(storage_url, 5)
        model, optimizer = trained(steps=7)
        with Checkpointer(storage_url, keep=2, report=never) as checkpointer:
            checkpointer.save(model, optimizer, state(5))
        found = checkpoint.require_latest(storage_url, never)
        other, its_optimizer = trained(steps=0)
        checkpoint.restore(found, other, its_optimizer, model_name="small")
        assert bits(other, its_optimizer) == bits(model, optimizer)
        assert names(storage_url) == ["step-00000005"]

    def test_restore_walks_back_over_damage_and_says_so(self, storage_url: str) -> None:
        save(storage_url, 1, 2, 3)
        newest, second = (storage.join(storage_url, "checkpoints", f"step-0000000{step}") for step in (3, 2))
        data = bytearray(storage.read_bytes(storage.join(newest, "variables.npz")))
        data[len(data) // 2] ^= 1
        storage.write_bytes(storage.join(newest, "variables.npz"), bytes(data), overwrite=True)
        storage.delete(storage.join(second, "COMMIT.json"))
        reports: list[str] = []
        found = checkpoint.latest(storage_url, reports.append)
        assert found is not None
        assert found.state.step == 1
        assert len(reports) == 2
        assert "step-00000003/variables.npz is damaged: sha256" in reports[0]
        assert "step-00000002" in reports[1]
        assert "missing" in reports[1]

    def test_what_dead_saves_left_is_removed_at_the_start_of_this_run_only(self, storage_url: str) -> None:
        mine, other = storage.join(storage_url, "a"), storage.join(storage_url, "b")
        for url in (mine, other):
            save(url, 1)
            storage.write_bytes(storage.join(url, "checkpoints", ".tmp-00000002-dead", "variables.npz"), b"half")
        reports: list[str] = []
        assert Checkpointer(mine, keep=2, report=reports.append).remove_unfinished() == 1
        assert "removed 1 unfinished" in reports[0]
        assert names(mine) == ["step-00000001"]
        assert names(other) == [".tmp-00000002-dead", "step-00000001"]

    def test_weights_are_exported_with_their_digest(self, storage_url: str) -> None:
        model, _ = trained()
        url = storage.join(storage_url, "final.weights.h5")
        for _ in range(2):
            digest = checkpoint.export_weights(model, url)
        data = storage.read_bytes(url)
        assert hashlib.sha256(data).hexdigest() == digest
        assert storage.read_bytes(url + ".sha256") == f"{digest}  final.weights.h5\n".encode()
        assert names_of(storage_url) == ["final.weights.h5", "final.weights.h5.sha256"]


def names_of(url: str) -> list[str]:
    """The entries of a folder."""
    return [storage.name(entry.url) for entry in storage.list_dir(url)]


def test_exported_weights_load_in_keras(tmp_path: Path) -> None:
    model, _ = trained()
    checkpoint.export_weights(model, f"file://{tmp_path}/w.weights.h5")
    other = make_model(seed=9)
    other.load_weights(tmp_path / "w.weights.h5")
    for found, expected in zip(other.weights, model.weights, strict=True):
        np.testing.assert_array_equal(found.numpy(), expected.numpy())
    with pytest.raises(CheckpointError, match=r"ends in \.weights\.h5"):
        checkpoint.export_weights(model, f"file://{tmp_path}/w.h5")


@pytest.mark.parametrize("file", FILES)
def test_every_flipped_bit_is_detected(local: tuple[str, Path], file: str) -> None:
    run_url, folder = local
    save(run_url, 1)
    path, url = folder / "step-00000001" / file, storage.join(run_url, "checkpoints", "step-00000001")
    whole = path.read_bytes()
    draw = random.Random(file)
    stride = max(1, len(whole) // 400)
    for position in range(0, len(whole), stride):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match="is damaged"):
            checkpoint.read(url)
    path.write_bytes(whole)
    assert checkpoint.read(url).state.step == 1


@pytest.mark.parametrize("file", FILES)
def test_every_cut_and_every_addition_is_detected(local: tuple[str, Path], file: str) -> None:
    run_url, folder = local
    save(run_url, 1)
    path, url = folder / "step-00000001" / file, storage.join(run_url, "checkpoints", "step-00000001")
    whole = path.read_bytes()
    for damaged in (
        *(whole[: len(whole) * share // 10] for share in range(10)),
        whole[:-1],
        whole + b"\0",
        whole + b"\n",
    ):
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match="is damaged"):
            checkpoint.read(url)


@pytest.mark.parametrize("file", FILES)
def test_a_missing_file_is_reported_and_passed_over(local: tuple[str, Path], file: str) -> None:
    run_url, folder = local
    save(run_url, 1, 2)
    (folder / "step-00000002" / file).unlink()
    reports: list[str] = []
    found = checkpoint.latest(run_url, reports.append)
    assert found is not None
    assert found.state.step == 1
    assert len(reports) == 1
    assert file in reports[0]


def test_files_of_another_checkpoint_are_detected(local: tuple[str, Path]) -> None:
    run_url, folder = local
    save(run_url, 1, 2)
    (folder / "step-00000001").rename(folder / "step-00000003")
    reports: list[str] = []
    found = checkpoint.latest(run_url, reports.append)
    assert found is not None
    assert found.state.step == 2
    assert "is of step 1; expected step 3" in reports[0]
    (folder / "step-00000002" / "state.json").write_bytes((folder / "step-00000003" / "state.json").read_bytes())
    assert checkpoint.latest(run_url, reports.append) is None


def test_no_checkpoint_is_none_and_resume_says_what_to_do(local: tuple[str, Path]) -> None:
    run_url, folder = local
    assert checkpoint.latest(run_url, never) is None
    with pytest.raises(
        CheckpointError, match="holds no checkpoint; expected the run to have saved one; check the run's URL"
    ):
        checkpoint.require_latest(run_url, never)
    save(run_url, 1)
    (folder / "step-00000001" / "COMMIT.json").write_bytes(b"{}")
    reports: list[str] = []
    with pytest.raises(CheckpointError, match=r"holds no checkpoint that verifies \(1 damaged; newest: passing over"):
        checkpoint.require_latest(run_url, reports.append)
    assert len(reports) == 1


def test_other_entries_of_the_folder_are_left_alone(local: tuple[str, Path]) -> None:
    run_url, folder = local
    save(run_url, 1)
    (folder / "notes.txt").write_text("mine")
    (folder / "step-old").mkdir()
    save(run_url, 2, 3, 4, keep=2)
    assert names(run_url) == ["notes.txt", "step-00000003", "step-00000004", "step-old"]


def test_steps_beyond_eight_digits_are_ordered_as_numbers(local: tuple[str, Path]) -> None:
    save(local[0], 99_999_999, 100_000_000, keep=2)
    assert checkpoint.require_latest(local[0], never).state.step == 100_000_000


def test_damaged_checkpoints_do_not_count_among_those_kept(local: tuple[str, Path]) -> None:
    run_url, folder = local
    save(run_url, 1, 2, 3, 4)
    for step in (3, 4):
        (folder / f"step-0000000{step}" / "variables.npz").write_bytes(b"rot")
    reports: list[str] = []
    save(run_url, 5, keep=2, reports=reports)
    # 5 and 2 are good; the damaged ones between them stay for whoever wants to look, 1 goes.
    assert names(run_url) == ["step-00000002", "step-00000003", "step-00000004", "step-00000005"]
    assert len([line for line in reports if "does not count among the 2" in line]) == 2


def test_fewer_than_two_are_never_kept(local: tuple[str, Path]) -> None:
    with pytest.raises(CheckpointError, match="1 is too few; expected at least 2"):
        Checkpointer(local[0], keep=1, report=never)


def test_equal_states_give_equal_bytes(tmp_path: Path) -> None:
    first, second = (f"file://{tmp_path}/{name}" for name in "ab")
    assert save(first, 1) == save(second, 1)
    assert checkpoint.require_latest(first, never).data == checkpoint.require_latest(second, never).data


def test_a_save_holds_the_variables_of_its_moment(local: tuple[str, Path]) -> None:
    model, optimizer = trained()
    before = bits(model, optimizer)
    extra = {"list": [1]}
    with Checkpointer(local[0], keep=2, report=never) as checkpointer:
        held, go = threading.Event(), threading.Event()
        checkpointer._thread.submit(lambda: (held.set(), go.wait(10)))  # the background thread is busy
        held.wait(10)
        checkpointer.save(model, optimizer, state(1, extra=extra))
        extra["list"].append(2)
        for variable in (*model.variables, *optimizer.variables):
            variable.assign(variable.value * 0)
        go.set()
    found = checkpoint.require_latest(local[0], never)
    assert found.state.extra == {"list": [1]}
    checkpoint.restore(found, model, optimizer, model_name="small")
    assert bits(model, optimizer) == before


def test_every_type_of_variable_survives(local: tuple[str, Path]) -> None:
    class Holder:
        def __init__(self, fill: int) -> None:
            types = ("float32", "float64", "float16", "bfloat16", "int64", "int32", "uint32", "uint8", "bool")
            self.variables = [
                keras.Variable(np.full(shape, fill), dtype=name, name=f"{name}_{len(shape)}", trainable=False)
                for name in types
                for shape in ((), (2, 3), (0, 2))
            ]

    saved, other = Holder(1), Holder(0)
    with Checkpointer(local[0], keep=2, report=never) as checkpointer:
        checkpointer.save(saved, None, state(1))
    checkpoint.restore(checkpoint.require_latest(local[0], never), other, model_name="small")
    for found, expected in zip(other.variables, saved.variables, strict=True):
        assert found.dtype == expected.dtype
        assert found.value.numpy().tobytes() == expected.value.numpy().tobytes()


def test_a_checkpoint_is_not_pickled(local: tuple[str, Path]) -> None:
    save(local[0], 1)
    with np.load(local[1] / "step-00000001" / "variables.npz", allow_pickle=False) as stored:
        assert stored["model/0000/sequential/dense/kernel"].shape == (3, 4)
        assert all(array.dtype != object for array in stored.values())


class TestOtherModel:
    """A checkpoint that does not fit is refused in one line, and nothing is assigned."""

    def refused(self, run_url: str, model: Any, optimizer: Any, model_name: str = "small") -> str:
        before = (
            bits(model, optimizer) if optimizer else [variable.value.numpy().tobytes() for variable in model.variables]
        )
        with pytest.raises(CheckpointError) as caught:
            checkpoint.restore(checkpoint.require_latest(run_url, never), model, optimizer, model_name=model_name)
        after = (
            bits(model, optimizer) if optimizer else [variable.value.numpy().tobytes() for variable in model.variables]
        )
        assert after == before
        text = str(caught.value)
        assert "\n" not in text
        assert "expected" in text
        assert "use " in text
        return text

    def test_of_another_name(self, local: tuple[str, Path]) -> None:
        save(local[0], 1)
        text = self.refused(local[0], *trained(0), model_name="resnet50")
        assert "step-00000001 is a checkpoint of model 'small'; expected 'resnet50'" in text

    def test_of_other_shapes(self, local: tuple[str, Path]) -> None:
        save(local[0], 1)
        text = self.refused(local[0], *trained(0, units=5))
        assert "model/0000/sequential/dense/kernel is float32 of shape (3, 4) in the checkpoint" in text
        assert "expected float32 of shape (3, 5)" in text

    def test_with_fewer_variables(self, local: tuple[str, Path]) -> None:
        save(local[0], 1)
        text = self.refused(local[0], keras.Sequential([keras.Input((3,)), keras.layers.Dense(4)]), None)
        assert (
            "model/0002/sequential/batch_normalization/gamma is float32 of shape (4,) in the checkpoint; expected absent"
            in text
        )

    def test_with_another_optimizer(self, local: tuple[str, Path]) -> None:
        save(local[0], 1)
        model, optimizer = make_model(), keras.optimizers.SGD(0.1)
        optimizer.build(model.trainable_variables)
        text = self.refused(local[0], model, optimizer)
        assert (
            "does not fit this optimizer: optimizer/0000/adam/iteration is int64 of shape () in the checkpoint" in text
        )

    def test_without_an_optimizer_only_the_model_is_restored(self, local: tuple[str, Path]) -> None:
        saved = save(local[0], 1)
        model = make_model(seed=9)
        checkpoint.restore(checkpoint.require_latest(local[0], never), model, model_name="small")
        found = [variable.value.numpy().tobytes() for variable in model.variables]
        assert found == saved[: len(found)]


class TestErrorsInTheBackground:
    """A save that fails says so at the next occasion; the checkpoints before it stay."""

    def broken(self, local: tuple[str, Path]) -> Checkpointer:
        save(local[0], 1)
        checkpointer = Checkpointer(local[0], keep=2, report=[].append)
        (local[1].parent / "moved").parent.mkdir(exist_ok=True)
        local[1].rename(local[1].parent / "moved")
        local[1].write_text("a file where the folder was")
        return checkpointer

    def mended(self, local: tuple[str, Path]) -> None:
        local[1].unlink()
        (local[1].parent / "moved").rename(local[1])

    @pytest.mark.parametrize("occasion", ["wait", "close", "save", "exit"])
    def test_surface(self, local: tuple[str, Path], occasion: str) -> None:
        checkpointer = self.broken(local)
        model, optimizer = trained()
        checkpointer.save(model, optimizer, state(2))
        with pytest.raises(StorageError):
            {
                "wait": checkpointer.wait,
                "close": checkpointer.close,
                "save": lambda: checkpointer.save(model, optimizer, state(3)),
                "exit": lambda: checkpointer.__exit__(None, None, None),
            }[occasion]()
        self.mended(local)
        assert names(local[0]) == ["step-00000001"]
        if occasion == "wait":
            checkpointer.save(model, optimizer, state(3))
            checkpointer.wait()
            assert checkpoint.require_latest(local[0], never).state.step == 3
        checkpointer.close()

    def test_are_reported_beside_the_error_that_ends_the_run(self, local: tuple[str, Path]) -> None:
        checkpointer = self.broken(local)
        reports: list[str] = []
        checkpointer._report = reports.append
        model, optimizer = trained()

        def run() -> None:
            with checkpointer:
                checkpointer.save(model, optimizer, state(2))
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            run()
        assert any("the last checkpoint could not be saved" in line for line in reports)

    def test_what_json_cannot_hold_is_refused_at_once(self, local: tuple[str, Path]) -> None:
        model, optimizer = trained()
        with Checkpointer(local[0], keep=2, report=never) as checkpointer, pytest.raises(TypeError):
            checkpointer.save(model, optimizer, state(1, extra={"x": {1, 2}}))


def test_an_unreadable_checkpoint_is_passed_over_but_is_no_missing_one(local: tuple[str, Path]) -> None:
    run_url, folder = local
    save(run_url, 1, 2)
    for step in (2, 1):
        path = folder / f"step-0000000{step}" / "variables.npz"
        path.unlink()
        path.mkdir()
        reports: list[str] = []
        if step == 2:
            found = checkpoint.latest(run_url, reports.append)
            assert found is not None
            assert found.state.step == 1
            assert "cannot be read" in reports[0]
        else:
            with pytest.raises(StorageError):
                checkpoint.latest(run_url, reports.append)


def test_commit_names_bytes_and_digest_of_each_file(local: tuple[str, Path]) -> None:
    save(local[0], 4)
    folder = local[1] / "step-00000004"
    commit = json.loads((folder / "COMMIT.json").read_text())
    assert commit["step"] == 4
    for file, entry in commit["files"].items():
        data = (folder / file).read_bytes()
        assert entry == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    assert set(commit["files"]) == {"variables.npz", "state.json"}
