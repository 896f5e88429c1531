"""Starts rank programs under the real horovodrun, and leaves no process behind."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = Path(__file__).resolve().parent / "programs"
HOROVODRUN = Path(sys.executable).parent / "horovodrun"
MARK = "CVDIST_TEST_LAUNCH"


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a launch ended: exit code of horovodrun (None where it had to be killed), what all ranks wrote, seconds."""

    returncode: int | None
    output: str
    seconds: float
    folder: Path

    def results(self) -> list[Any]:
        """Returns what each rank wrote to `rank-N.json`, in the order of ranks."""
        paths = sorted(self.folder.glob("rank-*.json"))
        return [json.loads(path.read_text()) for path in paths]


class Launch:
    """A horovodrun under way. Its ranks lead sessions of their own, so they are found by a variable in their environment."""

    def __init__(self, size: int, command: list[str], folder: Path, env: dict[str, str]) -> None:
        self.mark, self.folder, self.started_s = uuid.uuid4().hex, folder, time.monotonic()
        self.output_path = folder / "output.txt"
        with self.output_path.open("wb") as output:
            self.process = subprocess.Popen(
                # More ranks than cores: horovodrun asks nothing about slots where the host names them.
                [str(HOROVODRUN), "-np", str(size), "-H", f"localhost:{size}", *command],
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": str(ROOT), "TF_CPP_MIN_LOG_LEVEL": "2", MARK: self.mark, **env},
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )

    def ranks(self) -> list[psutil.Process]:
        """Returns the processes of this launch, horovodrun and its helpers included, that are alive."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARK) == self.mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def wait(self, timeout_s: float) -> Outcome:
        """Waits for the end; afterwards nothing of the launch is alive."""
        try:
            returncode: int | None = self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            returncode = None
        seconds = time.monotonic() - self.started_s
        self.kill()
        return Outcome(returncode, self.output_path.read_text(errors="replace"), seconds, self.folder)

    def kill(self) -> None:
        """Ends every process of the launch."""
        for process in self.ranks():
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        self.process.wait(10)


@pytest.fixture(scope="session")
def start_ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Launch]]:
    """Starts `horovodrun -np size python programs/NAME FOLDER ARGUMENTS`, or `python ARGUMENTS` where there is no name."""
    if not HOROVODRUN.exists():
        pytest.skip("Horovod is not installed beside this Python; run: make setup")
    launches: list[Launch] = []

    def start(size: int, program: str, *arguments: str, env: dict[str, str] | None = None) -> Launch:
        folder = tmp_path_factory.mktemp(f"ranks-{size}")
        command = [sys.executable, *([str(PROGRAMS / program), str(folder)] if program else []), *arguments]
        launches.append(Launch(size, command, folder, env or {}))
        return launches[-1]

    yield start
    for launch in launches:
        launch.kill()


@pytest.fixture(scope="session")
def run_ranks(start_ranks: Callable[..., Launch]) -> Callable[..., Outcome]:
    """Runs a launch to its end; see `start_ranks`."""

    def run(
        size: int, program: str, *arguments: str, env: dict[str, str] | None = None, timeout_s: float = 150
    ) -> Outcome:
        return start_ranks(size, program, *arguments, env=env).wait(timeout_s)

    return run
