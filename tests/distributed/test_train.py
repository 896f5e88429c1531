"""Training under the real horovodrun: one run on any number of ranks, ranks in sync, and going on after a kill -9."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cvdist.shards import read_manifest
from tests.made_data import class_tree, data_set

RunRanks = Callable[..., Any]
CLASSES = {"down": 60, "left": 60, "right": 50}
SETTINGS = {
    "model": "mnist_convnet",
    "epochs": 4,
    "global_batch": 24,
    "seed": 3,
    "log_every_steps": 1,
    "optim.lr": 0.005,
    "augment.flip": "true",
    "augment.crop_scale_min": 0.5,
    "augment.rotation_deg": 10,
    "augment.brightness": 0.2,
}


def arguments(data: str, run: str, **changes: object) -> list[str]:
    """Returns the command line of a run."""
    settings = {
        **SETTINGS,
        "data": data,
        "run": run,
        **{key.replace("__", "."): value for key, value in changes.items()},
    }
    return ["-m", "cvdist.train", *(word for key, value in settings.items() for word in (f"--{key}", str(value)))]


def losses(run: Path) -> list[float]:
    """Returns the loss of every step of a run."""
    return [line["loss"] for line in history(run) if "loss" in line]


def history(run: Path) -> list[dict[str, Any]]:
    """Returns the lines of metrics.jsonl, but for those that hold times."""
    return [line for line in lines(run) if "ledger" not in line]


def ledgers(run: Path) -> list[dict[str, Any]]:
    """Returns the ledger of each epoch."""
    return [line["ledger"] for line in lines(run) if "ledger" in line]


def lines(run: Path) -> list[dict[str, Any]]:
    """Returns the lines of metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


TIMES = {"wait_s": 0, "total_s": 0, "wait_share": 0, "bytes_read": 0}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small data set on local disk."""
    folder = tmp_path_factory.mktemp("data")
    url = f"file://{folder}/set"
    data_set(class_tree(folder / "images", CLASSES), url, image_size=32, row_group_bytes=16384)
    return url


@pytest.fixture(scope="module")
def undisturbed(data: str, run_ranks: RunRanks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on two ranks."""
    run = tmp_path_factory.mktemp("runs") / "undisturbed"
    outcome = run_ranks(2, "", *arguments(data, f"file://{run}", checkpoint__every_steps=5))
    assert outcome.returncode == 0, outcome.output
    return run


@pytest.mark.timeout(400)
def test_a_run_killed_in_an_epoch_goes_on_with_bit_identical_losses(
    data: str, undisturbed: Path, start_ranks: Callable[..., Any], run_ranks: RunRanks, tmp_path: Path
) -> None:
    run = tmp_path / "killed"
    command = arguments(data, f"file://{run}", checkpoint__every_steps=5)
    launch = start_ranks(2, "", *command, env={"CVDIST_STORAGE_DEADLINE_S": "20"})
    wait_for(run / "checkpoints" / "step-00000010" / "COMMIT.json", launch)
    for process in launch.ranks():
        process.send_signal(signal.SIGKILL)
    outcome = launch.wait(60)
    assert outcome.returncode != 0
    assert not (run / "result.json").exists(), "the run ended before it was killed; nothing was tested"

    outcome = run_ranks(2, "", *command, "--resume")
    assert outcome.returncode == 0, outcome.output
    assert "goes on after" in outcome.output
    assert history(run) == history(undisturbed)
    assert len(losses(run)) == 24
    whole = ledgers(undisturbed)
    assert [line["epoch"] for line in whole] == list(range(len(whole)))
    assert {(line["first_step"], line["samples"]) for line in whole} == {
        (0, read_manifest(data).splits["train"].num_rows)
    }
    assert ledgers(run)[-1] | TIMES == whole[-1] | TIMES
    assert [line["epoch"] for line in ledgers(run)] == [line["epoch"] for line in whole]


def wait_for(path: Path, launch: Any, timeout_s: float = 120) -> None:
    """Waits until `path` exists; the launch must still be under way."""
    started_s = time.monotonic()
    while not path.exists():
        assert launch.process.poll() is None, (launch.folder / "output.txt").read_text()
        assert time.monotonic() - started_s < timeout_s
        time.sleep(0.02)


@pytest.mark.timeout(400)
def test_one_rank_that_drifts_stops_the_run_and_is_named(data: str, run_ranks: RunRanks, tmp_path: Path) -> None:
    command = arguments(data, f"file://{tmp_path}/run", check_sync_every_steps=4)[2:]
    outcome = run_ranks(3, "drifting_train.py", *command)
    assert outcome.returncode != 0
    assert "SyncError: step 8: rank 1 differs from rank 0" in outcome.output
    assert not (tmp_path / "run" / "result.json").exists()


def test_world_of_one_never_imports_horovod(data: str, tmp_path: Path) -> None:
    program = (
        "import sys; from cvdist import cli; code = cli.main(sys.argv[1:]);"
        " assert code == 0; assert not [name for name in sys.modules if name.split('.')[0] == 'horovod']"
    )
    command = ["train", *arguments(data, f"file://{tmp_path}/run", max_steps=2)[2:]]
    done = subprocess.run(
        [sys.executable, "-c", program, *command], capture_output=True, text=True, env=dict(os.environ)
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "result.json").exists()


def test_bad_settings_stop_all_ranks_with_one_clear_line(data: str, run_ranks: RunRanks, tmp_path: Path) -> None:
    outcome = run_ranks(3, "", *arguments(data, f"file://{tmp_path}/run", global_batch=25))
    assert outcome.returncode != 0
    assert "ConfigError: global_batch: 25 does not divide over 3 ranks; use 24 or 27" in outcome.output
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_of_another_model_is_refused_by_all_ranks(
    data: str, undisturbed: Path, run_ranks: RunRanks
) -> None:
    before = sorted(path.name for path in undisturbed.rglob("*"))
    outcome = run_ranks(
        2, "", *arguments(data, f"file://{undisturbed}", model="small_convnet", image_size=48), "--resume"
    )
    assert outcome.returncode != 0
    assert "is a checkpoint of model 'mnist_convnet'; expected 'small_convnet'" in outcome.output
    assert sorted(path.name for path in undisturbed.rglob("*")) == before
