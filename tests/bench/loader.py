"""How fast the loader is beside every other one, and beside the decoder alone: images per CPU-second, and ratios of them.

    python tests/bench/loader.py [--peers all|light|NAME,NAME] [--corpus 500x375,short-256,raw] [--kernel own,ours] [--rounds 3]
        [--what speed,memory,first_batch,shards,hdfs,busy] [--images 3072] [--photos DIR] [--out results.json]

Every run is a fresh process. A round runs each loader once, and ours between them; every other round goes backwards. A ratio is taken
against ours right before and right after. Environments, corpora and containers are made once, below the user's cache, so a run that was
cut off goes on quickly. docs/benchmarks.md says what is counted. Missing a target is no failure: the program says MISSED and exits 0.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # where it is run as a program

from tests.bench import loader_costs
from tests.bench.corpora import SHAPES, make_corpus
from tests.bench.environments import CACHE, ROOT, UnavailableError, limits_library, python_of
from tests.bench.prepare import describe

RUN_TIMEOUT_S, WRITE_TIMEOUT_S = 300, 1200
OURS_EVERY = 3  # other loaders between two runs of ours
PYTHON_KERNEL = ("torch, OpenCV", "WebDataset", "MosaicML Streaming", "LitData", "SPDL", "Grain")


@dataclasses.dataclass(frozen=True)
class Row:
    """One loader of the table.

    Attributes:
        module: Of tests/bench/peers.
        environment: That it runs in.
        target: Least ratio of ours to it, by images per CPU-second; None where none was set.
        kernel: Who decodes; see peers.common.Work.
        options: Further settings.
        is_light: Installs everywhere, so that CI can run it.
        container: Shared by rows whose containers are the same; by default the row's own.
    """

    module: str
    environment: str = "main"
    target: float | None = None
    kernel: str = "own"
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    is_light: bool = True
    container: str = ""


OURS = "cvdist"
ROWS = {
    OURS: Row("ours", container="ours"),
    "cvdist, tf.data.Dataset": Row("ours", options={"api": "dataset"}, container="ours"),
    "bare L2": Row("bare", target=1.10, options={"limit": "L2"}),
    "bare L3": Row("bare", target=0.85, options={"limit": "L3"}),
    "bare cvdist.crop": Row("bare", options={"limit": "kernel"}),
    "tf.data + TFRecord": Row("tf_records", target=1.7),
    "FFCV raw": Row("ffcv_beton", "ffcv", 1.2, options={"mode": "raw"}, is_light=False),
    "FFCV JPEG": Row("ffcv_beton", "ffcv", 2.5, options={"mode": "jpg"}, is_light=False),
    "DALI on CPU": Row("dali_files", "dali", 2.2, is_light=False),
    "WebDataset": Row("web_dataset", "torch", 2.2, "opencv"),
    "MosaicML Streaming": Row("mosaic", "mosaic", 2.2, "opencv", is_light=False),
    "LitData": Row("lit_data", "torch", 2.2, "opencv", is_light=False),
    "SPDL": Row("spdl_files", "torch", 2.2, "opencv", is_light=False),
    "Grain": Row("grain_records", "torch", 2.0, "opencv"),
    "torch, OpenCV": Row("torch_files", "torch", 2.0, "opencv"),
    "torch, Pillow": Row("torch_files", "torch", 3.2, "pillow"),
    "Petastorm make_batch_reader": Row(
        "petastorm_rows", target=2.0, kernel="opencv", options={"reader": "make_batch_reader"}
    ),
    "Petastorm make_reader": Row("petastorm_rows", target=3.2, kernel="opencv", options={"reader": "make_reader"}),
}
RAW_ROWS = {OURS: Row("ours", options={"codec": "raw"}, container="ours-raw"), "FFCV raw": ROWS["FFCV raw"]}


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows measured on one corpus, in one lane of decoders."""

    corpus: str
    lane: str
    rows: dict[str, Row]


@dataclasses.dataclass
class Results:
    """What was found: rates and ratios by (corpus, lane, row), why rows are missing, what else was seen, other lines."""

    rates: dict[tuple[str, str, str], list[float]] = dataclasses.field(default_factory=dict)
    ratios: dict[tuple[str, str, str], list[float]] = dataclasses.field(default_factory=dict)
    skipped: dict[tuple[str, str, str], str] = dataclasses.field(default_factory=dict)
    seen: dict[tuple[str, str, str], dict[str, Any]] = dataclasses.field(default_factory=dict)
    lines: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    def markdown(self) -> Iterator[str]:
        """Yields the tables."""
        yield "| corpus | decoder | loader | images per CPU-second | cvdist / it | min to max | target | | first batch |"
        yield "| --- | --- | --- | --- | --- | --- | --- | --- | --- |"
        for key in [*self.rates, *(key for key in self.skipped if key not in self.rates)]:
            corpus, lane, name = key
            if key in self.skipped:
                yield f"| {corpus} | {lane} | {name} | | | | | {self.skipped[key]} | |"
                continue
            ratios, target = self.ratios.get(key), table_rows(corpus, lane)[name].target
            yield f"| {corpus} | {lane} | {name} | {spread(self.rates[key], '{:,.0f}')} | {compared(ratios, target)} | {self.note(key)} |"
        if self.lines:
            yield "\n| what | found | target | |\n| --- | --- | --- | --- |"
        for line in self.lines:
            yield f"| {line['what']} | {line['found']} | {line['target']} | {line['verdict']} |"

    def note(self, key: tuple[str, str, str]) -> str:
        """Says what the first batch was compared with, and whether samples were lost."""
        seen = self.seen[key]
        difference = "" if seen["difference"] is None else f": {seen['difference']}"
        lost = (
            f"; LOST {seen['num_lost']} of {seen['num_images'] + seen['num_lost']} samples" if seen["num_lost"] else ""
        )
        return f"{seen['checked']}{difference}{lost}"


def spread(values: list[float], form: str) -> str:
    """Words a median and a range."""
    return f"{form.format(statistics.median(values))} ({form.format(min(values))} to {form.format(max(values))})"


def compared(ratios: list[float] | None, target: float | None) -> str:
    """Words the columns of a ratio."""
    if not ratios:
        return "| | |"
    median = statistics.median(ratios)
    verdict = "" if target is None else "ok" if median >= target else "MISSED"
    return (
        f"{median:.2f} | {min(ratios):.2f} to {max(ratios):.2f} | {'' if target is None else f'{target:g}'} | {verdict}"
    )


def table_rows(corpus: str, lane: str) -> dict[str, Row]:
    """Returns the rows of a corpus in a lane: `own`, each loader with the decoder of its users; `ours`, all with that of cvdist."""
    if corpus == "raw":
        return RAW_ROWS if lane == "own" else {}
    if lane == "own":
        return ROWS
    decoded = {name: dataclasses.replace(ROWS[name], kernel="ours", target=None) for name in PYTHON_KERNEL}
    return {OURS: ROWS[OURS], **decoded}


def chosen_rows(corpus: str, lane: str, peers: str) -> dict[str, Row]:
    """Returns the rows that were asked for; ours always."""
    rows = table_rows(corpus, lane)
    if peers == "all":
        return rows
    if peers == "light":
        return {name: row for name, row in rows.items() if row.is_light}
    unknown = [name for name in peers.split(",") if name not in ROWS]
    if unknown:
        raise SystemExit(
            f"--peers: there is no {', '.join(unknown)}; expected all, light, or some of {', '.join(ROWS)}"
        )
    return {name: row for name, row in rows.items() if name == OURS or name in peers.split(",")}


def task(row: Row, corpus: Path, action: str, min_images: int) -> dict[str, Any]:
    """Returns what peers/run.py is asked to do."""
    name = row.container or "-".join(
        [row.module, *row.options.values(), *(["restart"] if row.kernel == "ours" else [])]
    )
    options = {**row.options, "library": str(limits_library())} if row.module == "bare" else row.options
    asked = {"module": row.module, "corpus": str(corpus), "container": str(corpus / "containers" / name)}
    return {**asked, "kernel": row.kernel, "options": options, "action": action, "min_images": min_images}


def run(row: Row, asked: dict[str, Any], timeout_s: float) -> dict[str, Any]:
    """Runs peers/run.py in a fresh process of the row's environment; returns what it printed.

    Raises:
        UnavailableError: It failed; with the last line that it wrote.
    """
    python_path = os.pathsep.join([str(ROOT / "tests" / "bench"), str(ROOT)])
    settings = {
        "PYTHONPATH": python_path,
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }
    command = [python_of(row.environment), "-W", "ignore", "-m", "peers.run", json.dumps(asked)]
    try:
        done = subprocess.run(
            command, env={**os.environ, **settings}, cwd=CACHE, capture_output=True, text=True, timeout=timeout_s
        )
    except subprocess.TimeoutExpired:
        raise UnavailableError(f"took longer than {timeout_s:g} s") from None
    if done.returncode:
        words = [line for line in done.stderr.splitlines() if line.strip()]
        raise UnavailableError(f"failed: {words[-1][:200] if words else f'exit code {done.returncode}'}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1]) if asked["action"] == "measure" else {}
    return found


def make_container(row: Row, corpus: Path) -> None:
    """Writes the container of a row where it is not there yet; `done` beside it says that it is whole."""
    asked = task(row, corpus, "write", 0)
    container = Path(asked["container"])
    done = container.with_name(f"{container.name}.done")
    has_container = "def write(" in (ROOT / "tests" / "bench" / "peers" / f"{row.module}.py").read_text()
    if done.exists() or not has_container:
        return
    print(f"  writing {container}", file=sys.stderr)
    shutil.rmtree(container, ignore_errors=True)
    container.mkdir(parents=True)
    run(row, asked, WRITE_TIMEOUT_S)
    done.touch()


def measure(table: Table, corpus: Path, rounds: int, min_images: int, results: Results) -> Iterator[None]:
    """Measures the rows of a table, a round for each turn; a row that fails is told of, and the others go on."""
    rows = dict(table.rows)
    for name, row in table.rows.items():
        try:
            python_of(row.environment)
            make_container(row, corpus)
        except UnavailableError as error:
            results.skipped[table.corpus, table.lane, name] = f"skipped: {error}"
            del rows[name]
    if OURS not in rows:
        return
    for number in range(rounds):
        names = [name for name in rows if name != OURS]
        runs = ordered(names if number % 2 == 0 else names[::-1])
        found = [one_run(table, rows, name, corpus, min_images, results) for name in runs]
        add_ratios(table, runs, found, results)
        print(f"  {table.corpus}, {table.lane}: round {number + 1} of {rounds}", file=sys.stderr, flush=True)
        yield


def add_ratios(table: Table, runs: list[str], rates: list[float | None], results: Results) -> None:
    """Adds the ratio of ours, right before and right after, to each other loader of a round."""
    for at, (name, rate) in enumerate(zip(runs, rates, strict=True)):
        before = [rates[other] for other in range(at) if runs[other] == OURS][-1:]
        after = [rates[other] for other in range(at, len(runs)) if runs[other] == OURS][:1]
        ours = [one for one in (*before, *after) if one]
        if name != OURS and rate and ours:
            results.ratios.setdefault((table.corpus, table.lane, name), []).append(statistics.mean(ours) / rate)


def ordered(names: list[str]) -> list[str]:
    """Returns the runs of a round: ours first, last, and after every few others."""
    runs = [OURS]
    for start in range(0, len(names), OURS_EVERY):
        runs += [*names[start : start + OURS_EVERY], OURS]
    return runs


def one_run(
    table: Table, rows: dict[str, Row], name: str, corpus: Path, min_images: int, results: Results
) -> float | None:
    """Measures one loader once; returns images per CPU-second, or None where it failed, and then it is not tried again."""
    key = (table.corpus, table.lane, name)
    if name not in rows:
        return None
    try:
        found = run(rows[name], task(rows[name], corpus, "measure", min_images), RUN_TIMEOUT_S)
    except UnavailableError as error:
        results.skipped[key] = str(error)
        print(f"  {name}: {error}", file=sys.stderr)
        rows.pop(name)
        return None
    rate = float(found["num_images"] / found["cpu_s"])
    results.rates.setdefault(key, []).append(rate)
    worse = max(found["num_lost"], results.seen.get(key, found)["num_lost"])
    results.seen[key] = {**found, "num_lost": worse}
    print(
        f"  {name}: {rate:,.0f} images per CPU-second, {found['num_images'] / found['wall_s']:,.0f} per second",
        file=sys.stderr,
    )
    return rate


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", default="all", help="all, light, or names of rows, comma-separated")
    parser.add_argument("--corpus", default="500x375,short-256,raw")
    parser.add_argument("--kernel", default="own,ours", help="lanes: each with its own decoder; all with ours")
    parser.add_argument("--what", default="speed", help=f"speed, {', '.join(loader_costs.MEASURES)}; or all")
    parser.add_argument(
        "--rounds", type=int, default=3, help="of 500x375; other tables take half as many, at least one"
    )
    parser.add_argument("--images", type=int, default=3072, help="of a corpus; a multiple of 512")
    parser.add_argument("--photos", type=Path, default=ROOT.parent / "shared" / "data" / "clothing")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def write(results: Results, about: dict[str, str], path: Path | None) -> None:
    """Writes what is known so far as JSON, and as Markdown beside it."""
    if not path:
        return
    keys = [*results.rates, *(key for key in results.skipped if key not in results.rates)]
    rows = [
        {
            "corpus": key[0],
            "decoder": key[1],
            "loader": key[2],
            "images_per_cpu_s": results.rates.get(key, []),
            "ratios": results.ratios.get(key, []),
            "skipped": results.skipped.get(key),
            "last_run": results.seen.get(key),
        }
        for key in keys
    ]
    path.write_text(json.dumps({**about, "rows": rows, "lines": results.lines}, indent=1))
    path.with_suffix(".md").write_text("\n".join(results.markdown()) + "\n")


def measure_speed(options: argparse.Namespace, results: Results, about: dict[str, str]) -> None:
    """Measures every table that was asked for."""
    for name in options.corpus.split(","):
        corpus = make_corpus("500x375" if name == "raw" else name, options.photos, CACHE / "corpora", options.images)
        sizes = json.loads((corpus / "corpus.json").read_text())
        mean, restart = (sizes[key] / sizes["num_images"] / 1e3 for key in ("num_bytes", "num_restart_bytes"))
        print(
            f"corpus {name}: {sizes['num_images']:,} photos, {mean:.1f} kB each, {restart:.1f} kB with restart markers",
            flush=True,
        )
        for lane in options.kernel.split(","):
            rows = chosen_rows(name, lane, options.peers)
            if len(rows) < 2:
                continue
            is_main = (name, lane) == ("500x375", "own")
            rounds = options.rounds if is_main else max(1, options.rounds // 2)
            for _ in measure(Table(name, lane, rows), corpus, rounds, options.images, results):
                write(results, about, options.out)


def main() -> None:
    options = parse_arguments()
    unknown = [name for name in options.corpus.split(",") if name not in (*SHAPES, "raw")]
    if unknown or options.images % 512:
        raise SystemExit(
            f"--corpus: {', '.join(unknown)}; --images: {options.images}; expected {', '.join(SHAPES)}, raw; a multiple of 512"
        )
    if not any(options.photos.glob("*/*/*.jpg")):
        print(f"skipped: {options.photos} holds no SPLIT/CLASS/*.jpg; name a folder of photos by --photos")
        return
    CACHE.mkdir(parents=True, exist_ok=True)
    results, about = Results(), describe([])
    print(*(f"{key}: {value}" for key, value in about.items()), sep="\n", flush=True)
    asked = ["speed", *loader_costs.MEASURES] if options.what == "all" else options.what.split(",")
    if "speed" in asked:
        measure_speed(options, results, about)
    corpus = make_corpus("500x375", options.photos, CACHE / "corpora", options.images)
    for what in asked:
        if what != "speed":
            make_container(ROWS[OURS], corpus)
            results.lines += loader_costs.MEASURES[what](corpus)
            write(results, about, options.out)
    print("\n" + "\n".join(results.markdown()), flush=True)


if __name__ == "__main__":
    main()
