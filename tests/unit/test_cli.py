"""The command line: what it prints and how it exits."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from cvdist import cli
from cvdist.errors import CheckpointError, ConfigError, DataError, StorageError, SyncError
from tests.made_data import class_tree, data_set


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("data")
    data_set(class_tree(folder / "images", {"down": 30, "left": 30}), f"file://{folder}/set", image_size=32)
    return f"file://{folder}/set"


@pytest.mark.parametrize("kind", [ConfigError, DataError, StorageError, CheckpointError, SyncError])
def test_errors_of_users_end_with_one_line_and_their_own_exit_code(
    kind: type, capsys: pytest.CaptureFixture[str]
) -> None:
    def program(argv: list[str]) -> None:
        raise kind("x: found; expected; fix")

    assert cli.guard(program, []) == kind.exit_code
    assert capsys.readouterr().err == f"cvdist: {kind.__name__}: x: found; expected; fix\n"


def test_exit_codes_differ() -> None:
    assert len({kind.exit_code for kind in (ConfigError, DataError, StorageError, CheckpointError, SyncError)}) == 5


def test_an_error_of_an_executor_is_shown_as_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    def program(argv: list[str]) -> None:
        raise RuntimeError(
            "Job aborted\n  File x\ncvdist.errors.StorageError: hdfs://a:1 does not answer; start it\n\tat java"
        )

    assert cli.guard(program, []) == StorageError.exit_code
    assert capsys.readouterr().err == "cvdist: StorageError: hdfs://a:1 does not answer; start it\n"


def test_a_fault_of_ours_shows_its_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    def program(argv: list[str]) -> None:
        raise ZeroDivisionError("ours")

    assert cli.guard(program, []) == 1
    assert "Traceback" in capsys.readouterr().err


def test_unknown_verb_names_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["trian"]) == ConfigError.exit_code
    assert (
        "'trian' is no verb; expected one of train, evaluate, adopt, inspect, show, models" in capsys.readouterr().err
    )


def test_models_lists_the_networks_without_tensorflow() -> None:
    program = "import sys; from cvdist import cli; cli.main(['models']); assert 'tensorflow' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert {"alexnet", "mnist_convnet", "resnet50", "small_convnet", "vgg16"} <= set(done.stdout.split())


def test_show_says_what_a_configuration_means_on_any_number_of_ranks(
    data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.yaml").write_text(
        f"data: {data}\nmodel: vgg16\nepochs: 3\nglobal_batch: 32\nrun: file:///runs/x\n"
    )
    assert cli.main(["show", str(tmp_path / "run.yaml"), "--size", "16", "--epochs", "4"]) == 0
    shown = capsys.readouterr().out
    assert "16 x 2 samples = global batch 32" in shown
    assert "8 = 4 epochs x 2 (16 padded in each epoch)" in shown
    assert cli.main(["show", str(tmp_path / "run.yaml"), "--size", "5"]) == ConfigError.exit_code
    assert "use 30 or 35" in capsys.readouterr().err


def test_a_terminal_gets_a_bar_and_all_lines(data: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    settings = f"--model mnist_convnet --epochs 2 --global_batch 16 --data {data} --run file://{run}"
    screen, terminal = pty.openpty()
    command = [sys.executable, "-m", "cvdist.train", *settings.split()]
    with subprocess.Popen(
        command, stdout=terminal, stderr=subprocess.PIPE, env={**os.environ, "TERM": "xterm"}
    ) as process:
        os.close(terminal)
        shown = b""
        while chunk := read(screen):
            shown += chunk
        assert process.wait() == 0
    text = shown.decode()
    assert "images/s" in text
    assert "━" in text
    assert "val: top-1" in text
    assert "done after step 6" in text
    assert json.loads((run / "result.json").read_text())["steps"] == 6


def read(screen: int) -> bytes:
    """Reads from a terminal; its end is an error of the system."""
    try:
        return os.read(screen, 65536)
    except OSError:
        return b""
