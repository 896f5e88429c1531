"""Environments of the peers: one virtual environment for those that agree, made on first use from a pinned list, below the user's cache."""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cvdist" / "bench"
REQUIREMENTS = ROOT / "requirements" / "bench"
INSTALL_TIMEOUT_S = 1800
# What pkg-config knows, or a header, and the Debian package that brings it.
DEBIAN = {"opencv4": "libopencv-dev", "libturbojpeg": "libturbojpeg0-dev", "libjpeg": "libjpeg62-turbo-dev"}
# MosaicML Streaming imports torchvision for data sets of its own that are not used here; the released one needs another torch.
STUBS = {
    "mosaic": {
        "torchvision/__init__.py": "",
        "torchvision/datasets.py": "class VisionDataset: ...\n",
        "torchvision/transforms/__init__.py": "",
        "torchvision/transforms/functional.py": "to_tensor = None\n",
    }
}


class UnavailableError(Exception):
    """A row of the table cannot be measured on this machine; says why."""


@functools.cache
def python_of(name: str) -> str:
    """Returns the interpreter of an environment, which is made where it is not there yet; `main` is this one.

    Raises:
        UnavailableError: It cannot be made.
    """
    if name == "main":
        return sys.executable
    requirements = REQUIREMENTS / f"{name}.txt"
    folder = CACHE / "envs" / name
    stamp = folder / "made-from"
    wanted = hashlib.sha256(requirements.read_bytes() + repr(STUBS.get(name)).encode()).hexdigest()
    if not stamp.is_file() or stamp.read_text() != wanted:
        make(name, requirements, folder)
        stamp.write_text(wanted)
    return str(folder / "bin" / "python")


def make(name: str, requirements: Path, folder: Path) -> None:
    """Makes an environment; one that is half made is made again."""
    if name == "ffcv":
        require_debian("opencv4", "libturbojpeg")
    print(f"  making the environment {name}: {folder}", file=sys.stderr)
    shutil.rmtree(folder, ignore_errors=True)
    run([sys.executable, "-m", "venv", str(folder)])
    pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet"]
    # The lists are complete; several of these packages ask for gigabytes of CUDA that they do not need here.
    run([*pip, "--no-deps", "--requirement", str(requirements)])
    (site,) = (folder / "lib").glob("python3*/site-packages")
    for path, text in STUBS.get(name, {}).items():
        (site / path).parent.mkdir(parents=True, exist_ok=True)
        (site / path).write_text(text)


def run(command: list[str]) -> None:
    """Runs one step of an installation."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_TIMEOUT_S)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()
        hint = "; for a CPU build of torch name a place by PIP_FIND_LINKS" if "+cpu" in done.stderr else ""
        raise UnavailableError(f"cannot be installed: {errors[-1][:160] if errors else command}{hint}")


def require_debian(*names: str) -> None:
    """Makes sure that libraries are there to build with.

    Raises:
        UnavailableError: One is not; names the packages.
    """
    if not shutil.which("pkg-config"):
        raise UnavailableError("no pkg-config; apt-get install pkg-config")
    missing = [DEBIAN[name] for name in names if subprocess.run(["pkg-config", "--exists", name]).returncode]
    if missing:
        raise UnavailableError(f"apt-get install {' '.join(missing)}")


@functools.cache
def limits_library() -> Path:
    """Returns the library of loader_limits/limits.c, compiled where it is not there yet.

    Raises:
        UnavailableError: There is no compiler or no libjpeg to compile it with.
    """
    source = Path(__file__).with_name("loader_limits") / "limits.c"
    library = CACHE / f"limits-{hashlib.sha256(source.read_bytes()).hexdigest()[:16]}.so"
    if not library.exists():
        require_debian("libjpeg")
        if not shutil.which("cc"):
            raise UnavailableError("no C compiler; apt-get install gcc")
        CACHE.mkdir(parents=True, exist_ok=True)
        run(["cc", "-O3", "-shared", "-fPIC", "-o", f"{library}.part", str(source), "-ljpeg"])
        os.replace(f"{library}.part", library)
    return library
