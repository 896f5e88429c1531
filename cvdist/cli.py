"""The command line: the only place that prints and exits.

cvdist train | evaluate | adopt | inspect | show | models
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from cvdist import __version__, errors
from cvdist.arguments import parse
from cvdist.config import MAX_SEED, AdoptConfig, Resolved, TrainConfig, require_range, require_split, resolve
from cvdist.errors import CvdistError

if TYPE_CHECKING:
    from rich.progress import Progress

    from cvdist.comm import World
    from cvdist.metrics import Meter
    from cvdist.proof import Audit
    from cvdist.shards import Manifest

PROGRESS_EVERY_S = 10.0
MAX_CLASSES_SHOWN = 20
USAGE = """usage: cvdist VERB ... (cvdist VERB --help lists the settings of a verb)

  cvdist train --data URL --model NAME --epochs E --global_batch B --run URL   train; the same as python -m cvdist.train
  cvdist evaluate RUN_URL [--split test] [--json]                              exact top-1, top-5 and loss of a run
  cvdist adopt DATA_URL --image COLUMN --label COLUMN                          train on Parquet or Petastorm files as they are
  cvdist inspect DATA_URL [--grid OUT.png] [--verify]                          what a data set holds, looks like; whether it is whole
  cvdist show CONFIG.yaml [--size N]                                           what a configuration means on N ranks
  cvdist models                                                                names for --model
  cvdist --version"""


def main(argv: list[str] | None = None) -> int:
    """Runs `cvdist VERB ...` and returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    verbs: dict[str, Callable[[list[str]], None]] = {
        "train": run_train,
        "evaluate": run_evaluate,
        "adopt": run_adopt,
        "inspect": run_inspect,
        "show": run_show,
        "models": run_models,
    }
    if argv[:1] == ["--version"]:
        say(f"cvdist {__version__}")
        return 0
    if not argv or argv[0] in ("-h", "--help"):
        say(USAGE)
        return 0
    if argv[0] not in verbs:
        say(f"cvdist: {argv[0]!r} is no verb; expected one of {', '.join(verbs)}; run cvdist --help", error=True)
        return errors.ConfigError.exit_code
    return guard(verbs[argv[0]], argv[1:])


def guard(program: Callable[[list[str]], None], argv: list[str]) -> int:
    """Runs a program; an error that a user can cause becomes one line on stderr and its exit code."""
    try:
        program(argv)
    except SystemExit as leave:  # --help
        return leave.code if isinstance(leave.code, int) else 1
    except KeyboardInterrupt:
        say("cvdist: interrupted", error=True)
        return 130
    except CvdistError as error:
        say(f"cvdist: {type(error).__name__}: {error}", error=True)
        return error.exit_code
    except Exception as error:  # the other of the two broad catches of the design
        # An executor's error reaches the driver as text inside of an error of Spark's own.
        inner = re.search(r"cvdist\.errors\.(\w+): (.*)", str(error))
        kind = getattr(errors, inner.group(1), None) if inner else None
        if inner is None or kind is None:
            traceback.print_exc()
            return 1
        say(f"cvdist: {inner.group(1)}: {inner.group(2)}", error=True)
        return int(kind.exit_code)
    return 0


def say(text: str, *, error: bool = False) -> None:
    """Prints lines."""
    stream = sys.stderr if error else sys.stdout
    stream.write(text + "\n")
    stream.flush()


def run_train(argv: list[str]) -> None:
    """`cvdist train`, python -m cvdist.train."""
    config = parse(TrainConfig, argv, prog="cvdist train")
    load_tensorflow()
    from cvdist import comm, train

    world = comm.init()
    comm.configure_devices(world)
    with contextlib.closing(Reporter(world)) as report:
        train.train(config, world, report)


@dataclasses.dataclass(frozen=True)
class EvaluateArguments:
    """Evaluates the newest checkpoint of a run on a split, every sample once.

    Attributes:
        run: URL of the run.
        split: Which split of its data set.
        data: URL of another data set with the same classes; by default the run's.
        global_batch: Samples read at a time on all ranks; by default the run's.
        json: Print one line of JSON.
    """

    run: str
    split: str = "test"
    data: str | None = None
    global_batch: int | None = None
    json: bool = False


def run_evaluate(argv: list[str]) -> None:
    """`cvdist evaluate RUN_URL`."""
    arguments = parse(EvaluateArguments, argv, prog="cvdist evaluate", positional=("run",))
    load_tensorflow()
    from cvdist import comm
    from cvdist.evaluate import evaluate_run

    world = comm.init()
    comm.configure_devices(world)
    result = evaluate_run(
        arguments.run,
        split=arguments.split,
        world=world,
        report=lambda line: say(line, error=True),
        data_url=arguments.data,
        global_batch=arguments.global_batch,
    )
    Reporter(world).say(json.dumps(result) if arguments.json else evaluation_line(result))


def run_adopt(argv: list[str]) -> None:
    """`cvdist adopt DATA_URL --image COLUMN --label COLUMN`."""
    config = parse(AdoptConfig, argv, prog="cvdist adopt", positional=("url",))
    from cvdist import adopt, card, foreign, storage

    config = dataclasses.replace(config, url=storage.check_url(config.url, "url").rstrip("/"))
    files = foreign.find_files(config)
    with contextlib.closing(ReadProgress(sum(file.num_rows for file in files), "read")) as progress:
        manifest = adopt.adopt(config, files, progress=progress.add)
    show_data_set(config.url, manifest)
    say("\n".join(f"  {line}" for line in aligned(card.class_table(manifest, MAX_CLASSES_SHOWN))))
    say(f"  adopted: {config.url}/{manifest.name}")


@dataclasses.dataclass(frozen=True)
class InspectArguments:
    """Prints what a data set holds, without Spark and without TensorFlow.

    Attributes:
        data: URL of the data set.
        grid: Write a picture (PNG) of random samples of each class to this path or URL.
        split: Which split the samples are of.
        samples: Samples of each class.
        seed: Of the choice.
        verify: Re-read everything and prove it, as jobs/audit.py does.
        strict: Verify, and take a photo in two splits or in two classes for an error, not a warning.
    """

    data: str
    grid: str | None = None
    split: str = "train"
    samples: int = 8
    seed: int = 0
    verify: bool = False
    strict: bool = False

    def __post_init__(self) -> None:
        """Refuses values that no picture can be drawn with."""
        require_range("samples", self.samples, 1, 100)
        require_range("seed", self.seed, 0, MAX_SEED)


def run_inspect(argv: list[str]) -> None:
    """`cvdist inspect DATA_URL [--grid OUT.png] [--verify]`."""
    arguments = parse(InspectArguments, argv, prog="cvdist inspect", positional=("data",))
    from cvdist import card, grid, proof, storage
    from cvdist.shards import read_manifest

    url = storage.check_url(arguments.data, "data").rstrip("/")
    manifest = read_manifest(url)
    show_data_set(url, manifest)
    say(f"  {card.imbalance(manifest)}")
    say("\n".join(f"  {line}" for line in aligned(card.class_table(manifest, MAX_CLASSES_SHOWN))))
    if arguments.grid is not None:
        split = require_split("split", arguments.split, manifest, url)
        is_url = "://" in arguments.grid
        target = arguments.grid if is_url else f"file://{os.path.abspath(arguments.grid)}"
        picture = grid.draw(url, manifest, split, per_class=arguments.samples, seed=arguments.seed)
        storage.write_bytes(storage.check_url(target, "grid"), picture.png, overwrite=True)
        say(f"  drawn to {arguments.grid}: {picture.caption}")
    if arguments.verify or arguments.strict:
        with contextlib.closing(ReadProgress(manifest.num_rows)) as progress:
            audit = proof.audit_here(url, manifest, progress=progress.add)
        show_audit(audit)
        proof.require_proven(url, audit, strict=arguments.strict)


class ReadProgress:
    """How far a re-reading is, on stderr: a line that is overwritten in a terminal, elsewhere a line every 10 s."""

    def __init__(self, num_samples: int, verb: str = "re-read") -> None:
        """Starts the clock."""
        self._total, self._done, self._verb = num_samples, 0, verb
        self._started_s = self._last_s = time.monotonic()
        self._moves = sys.stderr.isatty()

    def add(self, num_samples: int) -> None:
        """Shows that so many more are done."""
        self._done += num_samples
        now_s = time.monotonic()
        if now_s - self._last_s < (0.2 if self._moves else PROGRESS_EVERY_S):
            return
        self._last_s = now_s
        per_s = self._done / (now_s - self._started_s)
        left_s = (self._total - self._done) / per_s
        line = f"{self._verb} {self._done:,} of {self._total:,} samples  {per_s:,.0f}/s  {left_s:,.0f} s to go"
        if self._moves:
            sys.stderr.write(f"\r{line}\033[K")
            sys.stderr.flush()
        else:
            say(line, error=True)

    def close(self) -> None:
        """Takes the line off the terminal."""
        if self._moves:
            sys.stderr.write("\r\033[K")
            sys.stderr.flush()


@dataclasses.dataclass(frozen=True)
class ShowArguments:
    """Prints what a configuration means on a number of ranks, without any of them.

    Attributes:
        file: YAML file of settings, or - for none.
        size: Number of ranks.
    """

    file: str
    size: int = 1


def run_show(argv: list[str]) -> None:
    """`cvdist show CONFIG.yaml --size N [--any.setting value]`."""
    own = [index for index, arg in enumerate(argv) if arg.split("=")[0] == "--size"]
    size_args = [value for index in own for value in argv[index : index + (1 if "=" in argv[index] else 2)]]
    rest = [arg for arg in argv if arg not in size_args]
    arguments = parse(ShowArguments, [*rest[:1], *size_args], prog="cvdist show", positional=("file",))
    config = parse(TrainConfig, ["--config", arguments.file, *rest[1:]], prog="cvdist show")
    from cvdist import storage
    from cvdist.shards import read_manifest

    plan = resolve(config, read_manifest(storage.check_url(config.data, "data")), arguments.size)
    say(resolved_block(config, plan))


def run_models(argv: list[str]) -> None:
    """`cvdist models`."""
    from cvdist.models import list_models

    del argv
    say("\n".join(list_models()))


def load_tensorflow() -> None:
    """Imports TensorFlow without the start-up notices that no setting of its own keeps off the screen; anything else is shown."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("KERAS_BACKEND", "tensorflow")
    sys.stderr.flush()
    screen = os.dup(2)
    with tempfile.TemporaryFile() as notices:
        os.dup2(notices.fileno(), 2)
        try:
            import keras  # noqa: F401
            import tensorflow as tf

            tf.config.list_physical_devices()
        finally:
            os.dup2(screen, 2)
            os.close(screen)
            notices.seek(0)
            lines = notices.read().decode(errors="replace").splitlines()
            for line in lines:
                if not re.match(
                    r"WARNING: All log messages before absl|[IWE]0000 .*(port|cudart_stub|cuda_platform)\.cc", line
                ):
                    say(line, error=True)


class Reporter:
    """What a run tells its user; rank zero alone speaks. In a terminal a bar moves, elsewhere a line comes every 10 s."""

    def __init__(self, world: World) -> None:
        """Speaks for `world`."""
        self._speaks = world.rank == 0
        self._bar: Progress | None = None
        self._last_s = time.monotonic()

    def say(self, text: str) -> None:
        """Prints lines, on rank zero."""
        if not self._speaks:
            return
        if self._bar is None:
            say(text)
        else:
            self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def show_run(self, config: TrainConfig, plan: Resolved, parameters: dict[str, int], done_steps: int) -> None:
        """Prints what is about to happen."""
        self.say(resolved_block(config, plan))
        self.say(f"  parameters        {parameters['num_parameters']:,} ({parameters['num_trainable']:,} trainable)")
        if done_steps:
            self.say(f"  goes on after     step {done_steps} of {plan.total_steps}")
        if self._speaks and sys.stdout.isatty():
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (
                "step",
                MofNCompleteColumn(),
                BarColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.description}"),
            )
            self._bar = Progress(*columns, transient=True)
            self._bar.add_task("", total=plan.total_steps, completed=done_steps)
            self._bar.start()

    def step(self, step: int, last_step: int, loss: float, meter: Meter) -> None:
        """Shows progress."""
        state = f"loss {loss:.4f}  {meter.images_per_s():,.0f} images/s  data wait {meter.wait_share():.0%}"
        now_s = time.monotonic()
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], total=last_step, completed=step, description=state)
        elif now_s - self._last_s >= PROGRESS_EVERY_S or step == last_step:
            self._last_s = now_s
            self.say(f"step {step}/{last_step}  {state}")

    def close(self) -> None:
        """Takes the bar off the screen."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def ledger(self, line: dict[str, Any]) -> None:
        """Shows what an epoch has read; it has been checked."""
        extra = "".join(f", {line[name]:,} {name}" for name in ("padded", "dropped", "retries") if line[name])
        lookups = line["cache_hits"] + line["cache_misses"]
        cached = f", {line['cache_hits'] / lookups:.0%} of row groups from the local cache" if lookups else ""
        since = f" from step {line['first_step']} on" if line["first_step"] else ""
        self.say(
            f"epoch {line['epoch']}{since}: {line['samples']:,} samples read once each{extra}; {line['bytes_read'] / 1e6:,.1f} MB"
            f"{cached}; data wait {line['wait_share']:.0%}"
        )

    def evaluation(self, step: int, result: dict[str, Any]) -> None:
        """Shows an evaluation."""
        self.say(f"step {step}: {evaluation_line(result)}")

    def end(self, config: TrainConfig, step: int) -> None:
        """Says where everything is."""
        self.say(
            f"done after step {step}: {config.run} holds checkpoints, metrics.jsonl, result.json and final.weights.h5"
        )


def evaluation_line(result: dict[str, Any]) -> str:
    """Puts an evaluation into words; fractions are percent here only."""
    loss = (
        f"loss {result['loss']:.4f}"
        if result["loss"] is not None
        else f"no loss: {result['nonfinite']} outputs are not numbers"
    )
    return f"{result['split']}: top-1 {result['top1']:.2%}  top-5 {result['top5']:.2%}  {loss}  ({result['samples']} samples)"


def resolved_block(config: TrainConfig, plan: Resolved) -> str:
    """Returns what a configuration means, in steps and per-rank numbers."""
    remainder = f"{plan.dropped_per_epoch} dropped" if plan.dropped_per_epoch else f"{plan.padded_per_epoch} padded"
    rows = {
        "data": f"{config.data} ({plan.num_samples:,} samples in {config.train_split}, {plan.num_classes} classes)",
        "model": f"{config.model}, {plan.image_size} x {plan.image_size} x {plan.channels}, {config.precision}",
        "ranks": f"{plan.world_size} x {plan.per_rank_batch} samples = global batch {config.global_batch}",
        "steps": f"{plan.total_steps:,} = {config.epochs} epochs x {plan.steps_per_epoch:,} ({remainder} in each epoch)",
        "learning rate": f"{plan.lr:.4g} {config.optim.schedule} after {plan.warmup_steps} steps of warm-up ({config.optim.name})",
        "evaluation": f"{plan.eval_split} every {config.evaluate.every_epochs} epochs" if plan.eval_split else "none",
        "run": config.run,
    }
    return "\n".join(f"  {name:<17} {value}" for name, value in rows.items())


def show_data_set(url: str, manifest: Manifest) -> None:
    """Prints what a data set holds."""
    spec = manifest.image
    stored = f"{spec.codec}, {spec.resize} side {spec.image_size} px"
    if manifest.adopted:
        stored = ", ".join(f"{count:,} {name}" for name, count in manifest.adopted.formats.items())
        stored += f" as {'RGB' if spec.channels == 3 else 'grey'}, trained on at {spec.image_size} px"
    say(f"{url}: {manifest.num_rows:,} samples, {len(manifest.classes)} classes, {stored}")
    for name, split in manifest.splits.items():
        shard_bytes = sum(shard.num_bytes for shard in split.shards)
        say(f"  {name:<6} {split.num_rows:>10,} samples in {len(split.shards)} shards, {shard_bytes / 1e6:,.1f} MB")
    if manifest.adopted:
        say(
            f"  images in {manifest.adopted.image!r}, labels in {manifest.adopted.label!r}, as others have written them"
        )
    else:
        say(
            f"  {manifest.num_inputs:,} inputs = {manifest.num_rows:,} samples + {manifest.num_quarantined:,} quarantined"
            f" + {manifest.num_skipped:,} skipped (no images by name, or left out)"
        )
    for target in manifest.targets:
        say(f"  target {target.name}: {target.kind}{f' of {len(target.classes)} classes' if target.classes else ''}")
    for table in manifest.quarantine:
        say(f"  reasons in {url}/{table.path}")
    leaks, conflicts = (manifest.repeat_files.get(kind, 0) for kind in ("leaks", "conflicts"))
    if leaks or conflicts:
        say(
            f"  WARNING: {leaks:,} files are in more than one split and {conflicts:,} in more than one class, see"
            f" {url}/{manifest.repeats[-1].path}; --on_leak drop, or --split_by content, keeps splits apart"
        )


def show_audit(audit: Audit) -> None:
    """Prints what re-reading a data set has found."""
    from cvdist import proof

    say("\n".join(proof.report_lines(audit)))


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Returns the lines of a table: the second column, of names, to the left, the others to the right."""
    from rich.cells import cell_len

    widths = [max(cell_len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        gaps = [" " * (width - cell_len(cell)) for width, cell in zip(widths, row, strict=True)]
        cells = (
            cell + gap if column == 1 else gap + cell for column, (cell, gap) in enumerate(zip(row, gaps, strict=True))
        )
        lines.append("  ".join(cells).rstrip())
    return lines


if __name__ == "__main__":
    sys.exit(main())
