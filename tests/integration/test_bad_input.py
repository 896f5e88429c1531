"""What users get wrong: one clear line, an exit code of its own, and nothing written or lost."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.made_data import class_tree, data_set

BIN = Path(sys.executable).parent
ROOT = Path(__file__).resolve().parents[2]
CONFIG, DATA, STORAGE, CHECKPOINT = 80, 81, 82, 83


def run(*command: object) -> subprocess.CompletedProcess[str]:
    """Runs a program of the virtual environment in the checkout."""
    environment = {**os.environ, "PYSPARK_PYTHON": sys.executable, "PYTHONPATH": str(ROOT)}
    words = [str(word) for word in command]
    return subprocess.run(words, capture_output=True, text=True, cwd=ROOT, env=environment)


def prepare(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Runs the job as Spark's driver would, without a JVM: what these tests are about is found before Spark starts."""
    return run(sys.executable, "jobs/prepare.py", *arguments)


def submit(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Runs the job under the real spark-submit."""
    return run(BIN / "spark-submit", "--master", "local[2,4]", "jobs/prepare.py", *arguments)


def train(data: str, run_url: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Runs a training of one step."""
    settings = ["--model", "mnist_convnet", "--epochs", 1, "--global_batch", 8, "--max_steps", 1]
    return run(sys.executable, "-m", "cvdist.train", "--data", data, "--run", run_url, *settings, *arguments)


def refused(done: subprocess.CompletedProcess[str], code: int, *parts: str) -> None:
    """Asserts that a program ended with `code` and one line on stderr (spark-submit joins it to stdout) that holds all `parts`."""
    output = done.stderr + done.stdout
    lines = [line for line in output.splitlines() if "cvdist:" in line]
    assert len(lines) == 1, output
    assert "Traceback" not in output
    for part in parts:
        assert part in lines[0]
    assert done.returncode == code


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Twelve photos in two classes."""
    return class_tree(tmp_path / "photos", {"cat": 6, "dog": 6})


@pytest.fixture
def closed_port() -> Iterator[int]:
    """A port of this machine on which nothing listens: bound, never listening, so nobody else takes it."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield taken.getsockname()[1]


def test_source_without_images_is_refused(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    done = prepare(f"file://{tmp_path}/photos", f"file://{tmp_path}/set")
    refused(done, DATA, "holds no images in class folders", "expected CLASS/IMAGE.jpg", "correct the URL")
    assert not (tmp_path / "set").exists()


def test_absent_source_is_refused(tmp_path: Path) -> None:
    done = prepare(f"file://{tmp_path}/photos", f"file://{tmp_path}/set")
    refused(
        done, DATA, f"file://{tmp_path}/photos does not exist", "expected a folder of class folders", "correct the URL"
    )


def test_one_class_is_refused(photos: Path, tmp_path: Path) -> None:
    shutil.rmtree(photos / "dog")
    done = prepare(f"file://{photos}", f"file://{tmp_path}/set")
    refused(
        done,
        DATA,
        "holds the single class 'cat'",
        "expected at least two class folders",
        "add another, or go one folder up",
    )
    assert not (tmp_path / "set").exists()


def test_an_empty_class_is_refused_and_named(photos: Path, tmp_path: Path) -> None:
    (photos / "bird").mkdir()
    done = prepare(f"file://{photos}", f"file://{tmp_path}/set")
    refused(done, DATA, f"{photos}/bird holds no image", "expected files named", "add images or remove the folder")
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize("which", ["source", "target"])
def test_url_without_scheme_is_refused_with_the_url_that_was_meant(photos: Path, tmp_path: Path, which: str) -> None:
    urls = {"source": f"file://{photos}", "target": f"file://{tmp_path}/set"}
    path = urls[which].removeprefix("file://")
    done = prepare(*({**urls, which: path}.values()))
    refused(
        done,
        CONFIG,
        f"{which}_url: '{path}' has no scheme",
        "expected file:///path or hdfs://host:port/path",
        f"use file://{path}",
    )


def test_url_without_scheme_is_refused_by_train_and_evaluate(tmp_path: Path) -> None:
    refused(
        train(f"{tmp_path}/set", f"file://{tmp_path}/run"),
        CONFIG,
        f"data: '{tmp_path}/set' has no scheme",
        "use file://",
    )
    done = run(sys.executable, "-m", "cvdist.cli", "evaluate", f"{tmp_path}/run")
    refused(done, CONFIG, f"run: '{tmp_path}/run' has no scheme", "use file://")


@pytest.mark.timeout(120)
def test_hdfs_that_is_down_is_named_within_ten_seconds(photos: Path, tmp_path: Path, closed_port: int) -> None:
    base = f"hdfs://127.0.0.1:{closed_port}"
    programs = {
        "prepare from": lambda: prepare(f"{base}/photos", f"file://{tmp_path}/set"),
        "prepare to": lambda: prepare(f"file://{photos}", f"{base}/set"),
        "evaluate": lambda: run(sys.executable, "-m", "cvdist.cli", "evaluate", f"{base}/run"),
        "train": lambda: train(f"{base}/set", f"file://{tmp_path}/run"),
    }
    start_up_s = measured_s(lambda: run(sys.executable, "-c", "import cvdist.evaluate"))
    for name, program in programs.items():
        started_s = time.monotonic()
        done = program()
        seconds = time.monotonic() - started_s
        refused(
            done,
            STORAGE,
            f"{base} does not answer",
            f"expected a running NameNode at 127.0.0.1:{closed_port}",
            "start it or correct the URL",
        )
        assert seconds < 10 + start_up_s, (
            f"{name}: {seconds:.1f} s, of which importing TensorFlow takes {start_up_s:.1f} s"
        )
    assert not (tmp_path / "set").exists()
    assert not (tmp_path / "run").exists()


def measured_s(function: object) -> float:
    """Returns how long a call takes."""
    started_s = time.monotonic()
    function()  # type: ignore[operator]
    return time.monotonic() - started_s


def test_target_with_another_data_set_is_refused_and_left_alone(photos: Path, tmp_path: Path) -> None:
    target = f"file://{tmp_path}/set"
    data_set(photos, target, image_size=32)
    before = {path: path.read_bytes() for path in (tmp_path / "set").rglob("*") if path.is_file()}
    done = prepare(f"file://{photos}", target, "--image_size", 48)
    refused(
        done,
        DATA,
        "holds another data set",
        "image_size 32 there, 48 here",
        "choose another target URL, or delete that folder first",
    )
    assert before == {path: path.read_bytes() for path in (tmp_path / "set").rglob("*") if path.is_file()}


@pytest.mark.timeout(120)
def test_a_text_named_jpg_and_a_truncated_photo_are_quarantined_with_reasons(photos: Path, tmp_path: Path) -> None:
    (photos / "cat" / "notes.jpg").write_text("this is no photo")
    whole = (photos / "dog" / "000.jpg").read_bytes()
    (photos / "dog" / "cut.jpg").write_bytes(whole[: len(whole) * 6 // 10])
    done = submit(f"file://{photos}", f"file://{tmp_path}/set", "--image_size", 32, "--max_bad_fraction", 0.2)
    assert done.returncode == 0, done.stderr
    assert "14 inputs = 12 samples + 2 quarantined + 0 skipped" in done.stdout
    rows = pq.read_table(tmp_path / "set" / "quarantine.parquet").to_pylist()
    assert {row["path"]: row["reason"] for row in rows} == {
        "cat/notes.jpg": "not_an_image",
        "dog/cut.jpg": "undecodable",
    }
    assert all(row["detail"] for row in rows)


@pytest.mark.timeout(120)
def test_too_many_bad_images_end_the_job_without_a_data_set(photos: Path, tmp_path: Path) -> None:
    (photos / "cat" / "notes.jpg").write_text("this is no photo")
    done = submit(f"file://{photos}", f"file://{tmp_path}/set", "--image_size", 32)
    refused(
        done,
        DATA,
        "1 of 13 images cannot be used",
        "(not_an_image 1 times, first cat/notes.jpg)",
        "expected at most 1.00%",
        "raise --max_bad_fraction, which keeps the work done",
    )
    assert not (tmp_path / "set" / "manifest.json").exists()
    assert pq.read_table(tmp_path / "set" / "_prepare" / "quarantine.parquet")["path"].to_pylist() == ["cat/notes.jpg"]


def test_training_without_a_data_set_is_refused(tmp_path: Path) -> None:
    done = train(f"file://{tmp_path}/set", f"file://{tmp_path}/run")
    refused(
        done, DATA, "set/manifest.json does not exist", "expected a prepared data set", "spark-submit jobs/prepare.py"
    )
    assert not (tmp_path / "run").exists()


def test_a_run_is_not_written_over(photos: Path, tmp_path: Path) -> None:
    data, run_url = f"file://{tmp_path}/set", f"file://{tmp_path}/run"
    data_set(photos, data, image_size=32)
    done = train(data, run_url)
    assert done.returncode == 0, done.stderr
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    refused(
        train(data, run_url),
        CONFIG,
        "holds a run already",
        "expected a new folder",
        "use --resume to go on, or another --run URL",
    )
    other = train(data, run_url, "--resume", "--model", "small_convnet", "--image_size", 48)
    refused(
        other,
        CHECKPOINT,
        "is a checkpoint of model 'mnist_convnet'",
        "expected 'small_convnet'",
        "or another run folder",
    )
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}


def test_evaluating_what_is_no_run_is_refused(tmp_path: Path) -> None:
    done = run(sys.executable, "-m", "cvdist.cli", "evaluate", f"file://{tmp_path}/run")
    refused(done, CONFIG, "run/config.json does not exist", "expected the folder of a training run", "correct the URL")
