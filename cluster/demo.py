"""From images to an exact test result on this machine, with the same commands that a cluster takes; each is printed before it runs.

python cluster/demo.py [--images DIR] [--ranks 2] [--folder .demo]

Without --images it takes Fashion-MNIST (Debian's package dataset-fashion-mnist, else Keras's download) as a tree of JPEG files.
"""

from __future__ import annotations

import argparse
import gzip
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt

Images = npt.NDArray[np.uint8]

DEBIAN_PACKAGE = "dataset-fashion-mnist"
DEBIAN_FOLDER = Path("usr/share/datasets/fashion-mnist")
CLASSES = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle-boot")
NUM_VAL = 5_000
NOTICE = r"WARNING: All log messages before absl|[IWE]0000 |To enable the following instructions"
BIN = Path(sys.executable).parent
ROOT = Path(__file__).resolve().parent.parent

FASHION = {
    "prepare": "--image_size 28 --resize exact --channels 1 --quality 95",
    "train": "--model mnist_convnet --epochs 3 --global_batch 128 --optim.name adam",
}
PHOTOS = {
    "prepare": "--image_size 96",
    "train": "--model small_convnet --epochs 10 --global_batch 32 --optim.name adam --augment.flip --augment.crop_scale_min 0.6",
}


def main() -> int:
    """Runs the demo; returns the exit code of the first step that fails."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--images", type=Path, help="a folder of class folders, with or without train, val, test above them"
    )
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=Path(".demo"))
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()
    if arguments.images is not None and not arguments.images.is_dir():
        sys.stderr.write(
            f"demo: {arguments.images} is no folder; expected a folder of class folders; correct IMAGES=\n"
        )
        return 80
    source = arguments.images.resolve() if arguments.images else fashion_mnist(folder)
    settings = PHOTOS if arguments.images else FASHION
    source_url = shlex.quote(f"file://{source}")
    data = f"file://{folder}/data-{source.name}"
    run = f"file://{folder}/runs/{time.strftime('%Y%m%d-%H%M%S')}-{source.name}"
    ranks = f"horovodrun -np {arguments.ranks} -H localhost:{arguments.ranks}"
    steps = {
        "1. prepare": f"spark-submit --master local[*,4] {ROOT}/jobs/prepare.py {source_url} {data} {settings['prepare']}",
        "2. train": f"{ranks} python -m cvdist.train --data {data} --run {run} {settings['train']}",
        "3. evaluate": f"{ranks} cvdist evaluate {run} --split test",
    }
    for name, command in steps.items():
        say(f"\n{name}\n  $ {command}")
        started_s = time.monotonic()
        code = run_step(command)
        if code:
            return code
        say(f"  ({time.monotonic() - started_s:.0f} s)")
    say(f"\nimages   {source}\ndata     {data}\nrun      {run}")
    return 0


def run_step(command: str) -> int:
    """Runs a step and returns its exit code; TensorFlow's start-up notices, which horovodrun cannot be told to omit, are left out."""
    environment = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", "PYSPARK_PYTHON": sys.executable}
    with subprocess.Popen(
        shlex.split(command), env=environment, stderr=subprocess.PIPE, text=True, cwd=ROOT
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if not re.match(NOTICE, line):
                sys.stderr.write(line)
                sys.stderr.flush()
    return process.returncode


def say(text: str) -> None:
    """Prints lines at once, between those of the steps."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def fashion_mnist(folder: Path) -> Path:
    """Returns a tree train|val|test/CLASS/NUMBER.jpg of Fashion-MNIST, written unless it is there already."""
    tree = folder / "fashion-mnist"
    if tree.is_dir():
        return tree
    folder.mkdir(parents=True, exist_ok=True)
    (images, labels), (test_images, test_labels) = load_fashion_mnist(folder)
    unfinished = folder / f"fashion-mnist.{os.getpid()}"
    write_tree(unfinished / "train", images[:-NUM_VAL], labels[:-NUM_VAL])
    write_tree(unfinished / "val", images[-NUM_VAL:], labels[-NUM_VAL:])
    write_tree(unfinished / "test", test_images, test_labels)
    unfinished.rename(tree)
    return tree


def load_fashion_mnist(folder: Path) -> tuple[tuple[Images, Images], tuple[Images, Images]]:
    """Returns ((train images, labels), (test images, labels)), uint8 (N, 28, 28) and (N,)."""
    places = [Path("/") / DEBIAN_FOLDER, folder / "package" / DEBIAN_FOLDER]
    if not any(place.is_dir() for place in places) and shutil.which("apt-get"):
        download_package(folder / "package")
    for place in places:
        if place.is_dir():
            say(f"Fashion-MNIST from {place}")
            return (read_idx(place, "train"), read_idx(place, "t10k"))
    say("Fashion-MNIST from Keras's download")
    import keras

    train, test = keras.datasets.fashion_mnist.load_data()
    return train, test


def download_package(target: Path) -> None:
    """Unpacks Debian's package below `target`, installing nothing; leaves no folder where that fails."""
    target.mkdir(parents=True, exist_ok=True)
    download = ["apt-get", "download", "-qq", "-o", "APT::Sandbox::User=root", DEBIAN_PACKAGE]
    if subprocess.run(download, cwd=target, capture_output=True, check=False).returncode:
        subprocess.run(["apt-get", "update", "-qq"], capture_output=True, check=False)
        subprocess.run(download, cwd=target, capture_output=True, check=False)
    for package in target.glob("*.deb"):
        subprocess.run(["dpkg-deb", "-x", package, target], check=True)


def read_idx(place: Path, part: str) -> tuple[Images, Images]:
    """Reads the images and labels of one part. Source: LeCun, the IDX format: magic, sizes (big-endian), bytes."""
    with gzip.open(place / f"{part}-images-idx3-ubyte.gz") as file:
        images = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 28, 28)
    with gzip.open(place / f"{part}-labels-idx1-ubyte.gz") as file:
        labels = np.frombuffer(file.read(), np.uint8, offset=8)
    return images, labels


def write_tree(folder: Path, images: Images, labels: Images) -> None:
    """Writes CLASS/NUMBER.jpg."""
    for name in CLASSES:
        (folder / name).mkdir(parents=True)
    for index, (image, label) in enumerate(zip(images, labels, strict=True)):
        done, encoded = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 95])
        if not done:
            raise OSError(f"OpenCV could not encode image {index}")
        (folder / CLASSES[label] / f"{index:05d}.jpg").write_bytes(encoded.tobytes())


if __name__ == "__main__":
    sys.exit(main())
