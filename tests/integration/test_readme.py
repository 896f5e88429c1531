"""What the README says is run: every command of the three steps, for one machine and for a cluster, with smaller settings."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cvdist import storage
from tests.made_data import class_tree

BIN = Path(sys.executable).parent
ROOT = Path(__file__).resolve().parents[2]
SMALLER = {
    "--image_size 224": "--image_size 32",
    "--model resnet50": "--model mnist_convnet",
    "--epochs 90": "--epochs 1",
    "--global_batch 256": "--global_batch 8",
    "--global_batch 2048": "--global_batch 8",
    "-np 8 -H node1:4,node2:4": "-np 2 -H localhost:2",
    "--master spark://master:7077": "--master local[2,4]",
}

MODEL = """
def my_model():
    import keras
    layers = [keras.layers.Rescaling(1 / 255), keras.layers.Flatten(), keras.layers.Dense(2, activation="softmax")]
    return keras.Sequential([keras.Input((32, 32, 3)), *layers])
"""


def commands() -> list[str]:
    """Returns the bash blocks of the README."""
    return re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


def shell(command: str) -> subprocess.CompletedProcess[str]:
    """Runs a command as the README's reader would, in an activated environment."""
    environment = {
        **os.environ,
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "PYSPARK_PYTHON": sys.executable,
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(["bash", "-ec", command], capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done


@pytest.mark.timeout(600)
@pytest.mark.parametrize("place", ["one machine", "cluster"])
def test_the_three_steps_of_the_readme_run(place: str, hdfs: Any, tmp_path: Path) -> None:
    class_tree(tmp_path / "data" / "photos", {"cat": 20, "dog": 20})
    if place == "cluster":
        for path in sorted((tmp_path / "data" / "photos").rglob("*.jpg")):
            storage.write_bytes(storage.join(hdfs.url, str(path.relative_to(tmp_path / "data"))), path.read_bytes())
    mine = [
        command
        for command in commands()
        if ("hdfs://" in command) == (place == "cluster") and "local_hdfs" not in command
    ]
    assert [
        re.match(r"(?:horovodrun \S+ \S+ \S+ \S+ )?(?:python -m )?(\S+)", command).group(1) for command in mine
    ] == [  # type: ignore[union-attr]
        "spark-submit",
        "cvdist.train",
        "cvdist",
    ]
    places = {"hdfs://namenode:8020": hdfs.url, "file:///": f"file://{tmp_path}/"}
    for command in mine:
        for ours, theirs in (SMALLER | places).items():
            command = command.replace(ours, theirs)
        done = shell(command)
    result = json.loads(re.search(r"\{.*\}", done.stdout).group())  # type: ignore[union-attr]
    assert set(result) == {"split", "samples", "top1", "top5", "loss"}
    assert result["samples"] == 4
    if place == "one machine":
        (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
        program = (
            MODEL
            + block.replace("file:///", f"file://{tmp_path}/")
            + "assert len(model.history.history['loss']) == 3\n"
        )
        (tmp_path / "program.py").write_text(program)
        shell(f"python {tmp_path}/program.py")
        shell(f"horovodrun -np 2 -H localhost:2 python {tmp_path}/program.py")


@pytest.mark.timeout(300)
def test_the_demo_takes_a_folder_of_photos(tmp_path: Path) -> None:
    class_tree(tmp_path / "photos", {"cat": 20, "dog": 20})
    done = shell(f"python cluster/demo.py --images {tmp_path}/photos --folder {tmp_path}/demo")
    assert "test: top-1" in done.stdout
    assert "(4 samples)" in done.stdout
    assert f"run      file://{tmp_path}/demo/runs/" in done.stdout
    assert "0000 " not in done.stderr
