"""How close prepare is to the decoder's limit, and how far ahead of its peers: ratios of CPU-seconds, and peaks of memory.

    python tests/bench/prepare.py [--photos DIR] [--images 800] [--large 32] [--rounds 5] [--spark_rounds 3] [--listed 1000000]
        [--out results.json]

Corpus A is photos below DIR. Corpora B and C are 12-megapixel photos: mosaics of them, and enlarged ones. Every round measures each arm
once, one after the other, so that a machine that is busy with something else disturbs all alike. docs/benchmarks.md says what is
counted. Missing a target is no failure: the program says MISSED and exits 0.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import importlib.metadata
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # where it is run as a program

from tests.bench.arms import in_process_round
from tests.bench.peaks import driver_peak, task_peak
from tests.bench.photos import Corpus, copy_photos, enlarge, make_mosaics, repeat
from tests.bench.submits import spark_round

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("opencv-python-headless", "simplejpeg", "pillow", "pyarrow", "numpy", "pyspark", "petastorm")
PR_SET_CHILD_SUBREAPER = 36  # Source: <linux/prctl.h>
FLAT_MIB = 60
MIB = 1 << 20


@dataclasses.dataclass
class Results:
    """What was measured: values of each (arm, corpus) by round, and lines of the table."""

    cpu: dict[tuple[str, str], list[float]] = dataclasses.field(default_factory=dict)
    num_images: dict[tuple[str, str], int] = dataclasses.field(default_factory=dict)
    num_bytes: dict[tuple[str, str], int] = dataclasses.field(default_factory=dict)
    lines: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    def add(self, arm: str, corpus: str, seconds: float, num_bytes: int, num_images: int) -> None:
        """Adds a round."""
        self.cpu.setdefault((arm, corpus), []).append(seconds)
        self.num_images[arm, corpus] = num_images
        self.num_bytes[arm, corpus] = num_bytes

    def per_image(self, arm: str, corpus: str) -> list[float]:
        """Returns CPU-seconds for one image, by round."""
        return [seconds / self.num_images[arm, corpus] for seconds in self.cpu[arm, corpus]]

    def ratio(self, corpus: str, slow: str, fast: str, target: float | None = None) -> None:
        """Adds a line: how many times the CPU-seconds of `fast` does `slow` take?"""
        rounds = [a / b for a, b in zip(self.per_image(slow, corpus), self.per_image(fast, corpus), strict=True)]
        self.line(
            f"{slow} / {fast}", corpus, rounds, target, None if target is None else statistics.median(rounds) >= target
        )

    def line(self, what: str, corpus: str, values: Sequence[float], target: float | None, is_met: bool | None) -> None:
        """Adds a line with the median and the range of some values."""
        numbers = {"median": statistics.median(values), "min": min(values), "max": max(values)}
        verdict = "" if is_met is None else "ok" if is_met else "MISSED"
        self.lines.append({"what": what, "corpus": corpus, **numbers, "target": target, "verdict": verdict})

    def show(self) -> None:
        """Prints the tables."""
        print(
            "\n| arm | corpus | images per CPU-second | ms per image | bytes per image |\n| --- | --- | --- | --- | --- |"
        )
        for (arm, corpus), rounds in self.cpu.items():
            seconds, made = statistics.median(rounds) / self.num_images[arm, corpus], self.num_bytes[arm, corpus]
            size = f"{made / self.num_images[arm, corpus]:,.0f}" if made else ""
            print(f"| {arm} | {corpus} | {1 / seconds:,.1f} | {seconds * 1e3:.2f} | {size} |")
        print("\n| ratio or peak | corpus | median | min to max | target | |\n| --- | --- | --- | --- | --- | --- |")
        for line in self.lines:
            values = f"{line['median']:.2f} | {line['min']:.2f} to {line['max']:.2f}"
            target = "" if line["target"] is None else f"{line['target']:g}"
            print(f"| {line['what']} | {line['corpus']} | {values} | {target} | {line['verdict']} |", flush=True)


def measure_in_process(results: Results, corpora: Sequence[tuple[Corpus, Corpus]], folder: Path, rounds: int) -> None:
    """Measures all arms of this process; a round before the first is not counted, for it imports and warms up."""
    for number in range(rounds + 1):
        for corpus, many in corpora:
            for arm, measured in in_process_round(corpus, many, folder).items():
                if number:
                    results.add(arm, corpus.name, *measured)
        print(f"  round {number} of {rounds}", file=sys.stderr)
    for corpus, _ in corpora:
        results.ratio(corpus.name, "bare loop", "cvdist, whole run", 0.85)
        results.ratio(corpus.name, "bare loop", "cvdist, write_shard", 0.85)
        results.ratio(corpus.name, "OpenCV", "cvdist, write_shard", None if corpus.name == "A" else 6.0)
        for arm in ("OpenCV", "Pillow", "Pillow, draft"):
            results.ratio(corpus.name, arm, "bare loop")


def measure_spark(results: Results, corpora: Sequence[Corpus], folder: Path, rounds: int) -> None:
    """Measures cvdist and Petastorm under spark-submit; what they take for some twenty photos is their start-up."""
    empty = Corpus("empty", folder / "empty", ())
    for path in corpora[0].paths[:: max(1, len(corpora[0].paths) // 20)]:
        copy = empty.folder / path.parent.name / path.name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
    task_peaks = []
    spark_round({"empty": empty}, folder)  # reads the programs from disk
    for _ in range(rounds):
        found = spark_round({"empty": empty, **{corpus.name: corpus for corpus in corpora}}, folder)
        for corpus in corpora:
            for program in ("Petastorm", "cvdist"):
                seconds, start_up = found[program, corpus.name][0], found[program, "empty"][0]
                counts = (0, len(corpus.paths))
                results.add(f"{program}, spark-submit", corpus.name, seconds - start_up, *counts)
                results.add(f"{program}, spark-submit, start-up included", corpus.name, seconds, *counts)
        task_peaks.append(found["cvdist", corpora[-1].name][1] / MIB)
    for corpus in corpora:
        name = corpus.name
        results.ratio(name, "Petastorm, spark-submit", "cvdist, spark-submit", 3.0)
        with_start = "spark-submit, start-up included"
        results.ratio(name, f"Petastorm, {with_start}", f"cvdist, {with_start}")
        own = statistics.median(results.per_image("cvdist, whole run", name))
        values = [seconds / own for seconds in results.per_image("Petastorm, spark-submit", name)]
        results.line("Petastorm, spark-submit / cvdist, whole run", name, values, None, None)
    results.line(
        "peak MiB of a task's Python, spark-submit", corpora[-1].name, task_peaks, 1024, max(task_peaks) <= 1024
    )


def measure_memory(results: Results, small: Corpus, large: Corpus, folder: Path, listed: int) -> None:
    """Measures peaks of memory."""
    peak = task_peak(large, folder) / MIB
    results.line("peak MiB of a process in write_shard", large.name, [peak], 1024, peak <= 1024)
    peaks = []
    for num_inputs in (10_000, listed // 4, listed):
        found, seconds = driver_peak(small, folder, num_inputs)
        peaks.append(found / MIB)
        results.line(f"peak MiB of the driver, {num_inputs:,} listed", "table", peaks[-1:], None, None)
        print(f"  driver: {num_inputs:,} listed inputs took {seconds:.1f} CPU-seconds", flush=True)
    growth = peaks[-1] - peaks[0]
    results.line("growth of the driver, MiB", "table", [growth], FLAT_MIB, growth <= FLAT_MIB)


def describe(corpora: Sequence[Corpus]) -> dict[str, str]:
    """Returns what the numbers hold for."""
    cpu = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"], cwd=ROOT, capture_output=True, text=True
    )
    found = {
        "commit": commit.stdout.strip(),
        "command": " ".join(["python", *sys.argv]),
        "machine": f"{cpu[0].partition(': ')[2] if cpu else platform.machine()}, {os.cpu_count()} cores",
        "versions": ", ".join(
            [
                f"Python {platform.python_version()}",
                *(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES),
            ]
        ),
    }
    for corpus in corpora:
        mean = corpus.num_bytes / len(corpus.paths) / 1e3
        found[f"corpus {corpus.name}"] = f"{len(corpus.paths):,} photos, {mean:,.1f} kB each"
    return found


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, default=ROOT.parent / "shared" / "data" / "clothing")
    parser.add_argument("--images", type=int, default=800)
    parser.add_argument("--large", type=int, default=32)
    parser.add_argument("--copies", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--spark_rounds", type=int, default=3)
    parser.add_argument("--spark_images", type=int, default=8000)
    parser.add_argument("--listed", type=int, default=1_000_000)
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    if not any(options.photos.glob("*/*/*.jpg")):
        print(f"skipped: {options.photos} holds no SPLIT/CLASS/*.jpg; name a folder of photos by --photos")
        return
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    results = Results()
    with tempfile.TemporaryDirectory(prefix="cvdist-bench-") as name:
        folder = Path(name)
        small = copy_photos(options.photos, folder / "A", options.images)
        large = make_mosaics(small, folder / "B", options.large)
        enlarged = enlarge(small, folder / "C", options.large)
        about = describe([small, large, enlarged])
        print(*(f"{key}: {value}" for key, value in about.items()), sep="\n", flush=True)
        many, many_enlarged = (
            repeat(corpus, folder / f"{corpus.name}-many", options.copies) for corpus in (large, enlarged)
        )
        corpora = ((small, small), (large, many), (enlarged, many_enlarged))
        measure_in_process(results, corpora, folder, options.rounds)
        write(results, about, options.out)
        if options.spark_rounds:
            photos = repeat(small, folder / "A-many", -(-options.spark_images // len(small.paths)))
            measure_spark(results, [photos, many], folder, options.spark_rounds)
            write(results, about, options.out)
        if options.listed:
            measure_memory(results, small, large, folder, options.listed)
            write(results, about, options.out)
    results.show()


def write(results: Results, about: dict[str, str], path: Path | None) -> None:
    """Writes what is known so far."""
    if path:
        arms = [{"arm": arm, "corpus": corpus, "cpu_s": cpu} for (arm, corpus), cpu in results.cpu.items()]
        path.write_text(json.dumps({**about, "arms": arms, "lines": results.lines}, indent=1))


if __name__ == "__main__":
    main()
