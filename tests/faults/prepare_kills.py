"""Kills prepare, and what it stands on, at random moments; whatever was killed, reruns must end with the same data set.

    python tests/faults/prepare_kills.py --kills 100 --seed 1 [--images 360] [--only NUMBER ...] [--keep]

A real HDFS with two DataNodes and a real Spark with two executors serve all runs. One undisturbed run says what the data set has to
be. Then each kill starts the job with a target of its own, waits for a moment drawn from the seed, kills or freezes one process, lets
the run end, and runs the job again until it succeeds. In the end every byte of the target is compared with the undisturbed one, and
every key is looked for. Deals of eight kills hold each of SCENARIOS once.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import hashlib
import io
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # where it is run as a program

from cluster.hadoop import SetupError
from cluster.local_hdfs import WITH_PARENT, LocalHdfs
from cluster.local_spark import LocalSpark, Process, all_processes
from cvdist import storage
from cvdist.errors import DataError, NotFoundError
from cvdist.shards import read_manifest
from tests.made_data import class_tree

ROOT = Path(__file__).resolve().parents[2]
SCENARIOS = (
    "driver Python", "driver JVM", "executor JVM", "Python of a task", "Python daemon", "DataNode", "second run", "twin",
)  # fmt: skip
CLASSES = ("ant", "großer Hund", "two  words")
SETTINGS = (
    "--image_size=32", "--codec=raw", "--shard_bytes=65536", "--row_group_bytes=16384", "--max_bad_fraction=0.1", "--seed=3",
)  # fmt: skip
SPARK_CONF = ("spark.locality.wait=0", "spark.python.worker.faulthandler.enabled=true")
TWINS_CONF = (
    "spark.speculation=true", "spark.speculation.interval=50ms", "spark.speculation.multiplier=1.1",
    "spark.speculation.quantile=0.1",
)  # fmt: skip
RUN_LIMIT_S = 150.0
REFUSAL_LIMIT_S = 20.0
TWIN_LIMIT_S = 60.0
ORPHANS_LIMIT_S = 20.0
MAX_RERUNS = 5
MAX_TRIES = 6


class KillFailedError(Exception):
    """A promise was broken; the message says which."""


@dataclasses.dataclass(frozen=True)
class State:
    """What of a data set can be seen at a moment."""

    has_work: bool = False
    num_shards: int = 0
    has_manifest: bool = False

    def words(self, total: int) -> str:
        """Says it."""
        if self.has_manifest:
            return "manifest there, work folder " + ("there" if self.has_work else "gone")
        if self.num_shards:
            return f"{self.num_shards} of {total} shards"
        return "work folder, no shard" if self.has_work else "nothing there"


def look(target: str) -> State:
    """Looks at a data set that is being made."""
    try:
        entries = {storage.name(entry.url): entry for entry in storage.list_dir(target)}
        # While the run is under way its ledgers tell which shards are finished; in the end they have their names.
        inner = [entry.url for name, entry in entries.items() if entry.is_dir and name != "_prepare"]
        if "_prepare" in entries:
            jobs = [entry for entry in storage.list_dir(entries["_prepare"].url) if entry.is_dir]
            inner = [storage.join(entry.url, "done") for entry in jobs]
        found = [storage.name(entry.url) for url in inner for entry in storage.list_dir(url)]
    except NotFoundError:
        return State(has_work=storage.exists(storage.join(target, "_prepare")))
    return State("_prepare" in entries, len([n for n in found if n[0] not in "._"]), "manifest.json" in entries)


class Run:
    """One start of the job: spark-submit, the driver's JVM that it becomes, and the driver's Python, in a process group."""

    def __init__(self, spark: LocalSpark, arguments: list[str], log_path: Path) -> None:
        """Starts it; it ends with this program at the latest."""
        self._log_path = log_path
        self.started_s = time.monotonic()
        command = [sys.executable, "-S", "-c", WITH_PARENT, str(os.getpid()), spark.submit, *arguments]
        with open(log_path, "wb") as log:
            self._child = subprocess.Popen(
                command,
                cwd=ROOT,
                env={**spark.environment(), "PYTHONFAULTHANDLER": "1"},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def seconds(self) -> float:
        """Returns how long ago it was started."""
        return time.monotonic() - self.started_s

    def code(self) -> int | None:
        """Returns how spark-submit has ended, None while it runs."""
        return self._child.poll()

    def output(self) -> str:
        """Returns what it has printed."""
        return self._log_path.read_text(errors="replace")

    def processes(self) -> list[Process]:
        """Returns its processes on this side of the executors."""
        return [process for process in all_processes() if process.group == self._child.pid]

    def driver_python(self) -> int | None:
        """Returns the process that runs jobs/prepare.py."""
        pythons = [process for process in self.processes() if "java" not in process.command[0]]
        return next((process.pid for process in pythons if process.command[1:2] == (f"{ROOT}/jobs/prepare.py",)), None)

    def driver_jvm(self) -> int | None:
        """Returns the JVM that runs the scheduler."""
        jvms = [process for process in self.processes() if "org.apache.spark.deploy.SparkSubmit" in process.command]
        return next((jvm.pid for jvm in jvms if "org.apache.spark.launcher.Main" not in jvm.command), None)

    def wait(self, limit_s: float = RUN_LIMIT_S) -> int:
        """Waits until it and all its processes have ended by themselves; returns the exit code."""
        try:
            code = self._child.wait(limit_s)
        except subprocess.TimeoutExpired:
            if python := self.driver_python():
                os.kill(python, signal.SIGABRT)  # writes its stacks to the log
                time.sleep(1)
            self.end()
            raise KillFailedError(f"a run does not end in {limit_s:g} s; see {self._log_path}") from None
        end_s = time.monotonic() + ORPHANS_LIMIT_S
        while left := self.processes():
            if time.monotonic() > end_s:
                self.end()
                names = ", ".join(" ".join(process.command)[:80] for process in left)
                raise KillFailedError(f"{names} outlives spark-submit by {ORPHANS_LIMIT_S:g} s; see {self._log_path}")
            time.sleep(0.05)
        return code

    def end(self) -> None:
        """Ends what is left of it."""
        while left := self.processes():
            for process in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGKILL)
            self._child.poll()
            time.sleep(0.02)
        self._child.wait()


@dataclasses.dataclass(frozen=True)
class Content:
    """What a data set holds: sha256 of each file, what lies in its folder, and how often each input is there."""

    sha256: dict[str, str]
    entries: frozenset[str]
    keys: collections.Counter[str]
    num_shards: int

    def content_hash(self) -> str:
        """Returns one hash of all names and bytes."""
        return hashlib.sha256(repr(sorted(self.sha256.items())).encode()).hexdigest()


def read_back(target: str) -> Content:
    """Reads a whole data set, and proves its shards against the manifest."""
    manifest = read_manifest(target)
    files = {storage.relative(entry.url, target): storage.read_bytes(entry.url) for entry in storage.walk_files(target)}
    sha256 = {path: hashlib.sha256(data).hexdigest() for path, data in files.items()}
    keys: collections.Counter[str] = collections.Counter()
    shards = [shard for split in manifest.splits.values() for shard in split.shards]
    for shard in shards:
        if sha256.get(shard.path) != shard.sha256:
            raise KillFailedError(f"{target}/{shard.path} is not what the manifest names")
        keys.update(pq.read_table(io.BytesIO(files[shard.path]), columns=["key"])["key"].to_pylist())
    if "quarantine.parquet" in files:
        keys.update(pq.read_table(io.BytesIO(files["quarantine.parquet"]))["path"].to_pylist())
    entries = frozenset(storage.name(entry.url) for entry in storage.list_dir(target))
    return Content(sha256, entries, keys, len(shards))


@dataclasses.dataclass
class Outcome:
    """What came of one kill."""

    line: str
    is_ok: bool
    num_lost: int = 0
    num_doubled: int = 0


class Killer:
    """The cluster, the inputs, what the data set has to be, and the kills."""

    def __init__(self, hdfs: LocalHdfs, spark: LocalSpark, folder: Path) -> None:
        """Works with a cluster that is up; `folder` takes the logs."""
        self.hdfs, self.spark, self._folder = hdfs, spark, folder
        self.inputs: frozenset[str] = frozenset()
        self.reference = Content({}, frozenset(), collections.Counter(), 0)
        self.undisturbed_s = 0.0
        self._num_runs = 0
        self._running: list[Run] = []

    @property
    def source(self) -> str:
        """Where the images are."""
        return storage.join(self.hdfs.url, "photos")

    def upload(self, num_images: int) -> None:
        """Puts class folders of small photos on HDFS, bad ones and odd names among them."""
        per_class = num_images // len(CLASSES)
        tree = class_tree(self._folder / "photos", dict.fromkeys(CLASSES, per_class))
        first = CLASSES[0]
        data = (tree / first / "000.jpg").read_bytes()
        odd = {
            f"{first}/notes.jpg": b"this is no photo",
            f"{CLASSES[1]}/cut.jpg": data[: len(data) * 6 // 10],
            f"{CLASSES[2]}/empty.jpg": b"",
            # The same word in two ways of writing it, and characters that URLs, shells and patterns give a meaning.
            f"{first}/caf\u00e9.jpg": data,
            f"{first}/cafe\u0301.jpg": (tree / first / "001.jpg").read_bytes(),
            f"{first}/a b%20c#d?e*[f]'g\"$h.jpg": (tree / first / "002.jpg").read_bytes(),
            "README.txt": b"passed over",
        }
        for path in tree.rglob("*.jpg"):
            odd.setdefault(str(path.relative_to(tree)), path.read_bytes())
        with ThreadPoolExecutor(8) as pool:
            list(
                pool.map(
                    lambda item: storage.write_bytes(storage.join(self.source, *item[0].split("/")), item[1]),
                    odd.items(),
                )
            )
        self.inputs = frozenset(odd) - {"README.txt"}
        shutil.rmtree(tree)

    def target(self, name: str) -> str:
        """Returns where a data set goes."""
        return storage.join(self.hdfs.url, "sets", name)

    @contextlib.contextmanager
    def run(self, target: str, conf: tuple[str, ...] = ()) -> Iterator[Run]:
        """Starts the job; nothing of it is left behind the block."""
        self._num_runs += 1
        settings = [word for setting in (*SPARK_CONF, *conf) for word in ("--conf", setting)]
        arguments = ["--master", self.spark.url, *settings, f"{ROOT}/jobs/prepare.py", self.source, target, *SETTINGS]
        run = Run(self.spark, arguments, self._folder / f"run-{self._num_runs:04d}.log")
        try:
            yield run
        finally:
            run.end()

    def make_reference(self) -> None:
        """Runs the job undisturbed, twice: the second time says how long it takes on a warm machine."""
        hashes = []
        for name in ("first", "reference"):
            with self.run(self.target(name)) as run:
                if run.wait():
                    raise KillFailedError(f"an undisturbed run fails: {run.output()[-3000:]}")
                self.undisturbed_s = run.seconds()
            self.reference = read_back(self.target(name))
            hashes.append(self.reference.content_hash())
        odd = [path for path in self.reference.sha256 if path.startswith((".", "_prepare"))]
        if len(set(hashes)) != 1 or odd or set(self.reference.keys) != self.inputs:
            raise KillFailedError(
                f"two undisturbed runs: content hashes {hashes}; leftovers {odd}; expected one and none"
            )

    def kill(self, number: int, seed: int) -> Outcome:
        """Disturbs one run; says what came of it."""
        scenario = scenario_of(number, seed)
        draw = random.Random(f"{seed} {number}")
        started_s = time.monotonic()
        words = ""
        target = ""
        try:
            for attempt in range(MAX_TRIES):
                target = self.target(f"{seed}-{number}-{attempt}")
                if words := self._disturb(scenario, target, draw, 0.8**attempt):
                    break
                storage.delete(target, recursive=True)  # the run was faster: nothing was killed
            else:
                raise KillFailedError(f"{MAX_TRIES} runs ended before the moment of the kill came")
            reruns = self._rerun(target)
            self._mend()
            outcome = self._check(target)
            line = f"{words}; {reruns} rerun{'' if reruns == 1 else 's'}"
        except (KillFailedError, DataError) as error:
            self._mend()
            return Outcome(f"{scenario}: {words}; {time.monotonic() - started_s:.1f} s; FAILED: {error}", is_ok=False)
        if outcome.is_ok:
            storage.delete(target, recursive=True)
        outcome.line = f"{scenario}: {line}; {time.monotonic() - started_s:.1f} s; {outcome.line}"
        return outcome

    def _rerun(self, target: str) -> int:
        """Runs the job until it succeeds, if it has not; returns how often."""
        for reruns in range(MAX_RERUNS + 1):
            if look(target) == State(False, self.reference.num_shards, True):
                return reruns
            if reruns == MAX_RERUNS:
                break
            with self.run(target) as run:
                code = run.wait()
                if code == 0 and not look(target).has_manifest:
                    raise KillFailedError(f"a rerun ended with 0 and left no manifest: {run.output()[-1000:]}")
        raise KillFailedError(f"{MAX_RERUNS} reruns did not end well; the last one said: {run.output()[-1000:]}")

    def _mend(self) -> None:
        """Brings the cluster back to what it was; waits until no executor of an ended run is left."""
        for name in self.hdfs.names:
            self.hdfs.thaw(name)
            if name not in self.hdfs.running():
                self.hdfs.restart(name)
        self.hdfs.wait_live(len(self.hdfs.names) - 1)
        end_s = time.monotonic() + ORPHANS_LIMIT_S
        while left := self.spark.processes():
            for process in left:
                self.spark.kill(process.pid, signal.SIGKILL if time.monotonic() > end_s else signal.SIGCONT)
            time.sleep(0.1)

    def _check(self, target: str) -> Outcome:
        """Compares a data set with the undisturbed one."""
        found = read_back(target)
        lost = sorted(self.inputs - set(found.keys))
        doubled = sorted(key for key, count in found.keys.items() if count > 1)
        differing = sorted(
            path
            for path in {*found.sha256, *self.reference.sha256}
            if found.sha256.get(path) != self.reference.sha256.get(path)
        )
        leftovers = sorted(found.entries - self.reference.entries)
        is_ok = not (lost or doubled or differing or leftovers)
        problems = {"lost": lost, "doubled": doubled, "other files": differing, "leftovers": leftovers}
        line = (
            "ok"
            if is_ok
            else "FAILED: " + "; ".join(f"{name} {value[:5]}" for name, value in problems.items() if value)
        )
        return Outcome(line, is_ok, len(lost), len(doubled))

    def _disturb(self, scenario: str, target: str, draw: random.Random, haste: float) -> str:
        """Starts a run and does one thing to it; says what, or nothing where the run was over before."""
        with self.run(target, TWINS_CONF if scenario == "twin" else ()) as run:
            moment = self._moment(scenario, draw, haste)
            state = self._await(run, target, moment)
            if state is None:
                if run.wait():
                    raise KillFailedError(f"a run failed before anything was done to it: {run.output()[-1000:]}")
                return ""
            at = f"at {run.seconds():.1f} s ({state.words(self.reference.num_shards)})"
            if scenario == "second run":
                did = self._second_run(run, target, draw)
            elif scenario == "twin":
                did = self._twin(run, draw)
            elif scenario == "DataNode":
                did = self._hit_datanode(run, draw)
            else:
                did = self._hit_process(scenario, run, draw)
            if not did:
                run.wait()
                return ""
            words = f"{did} {at}"
            code = run.wait()
            if code == 0 and not look(target).has_manifest:
                raise KillFailedError(f"the run ended with 0 and left no manifest: {run.output()[-1000:]}")
            return f"{words}; it ended with {code}"

    def _moment(self, scenario: str, draw: random.Random, haste: float) -> Callable[[float, State], bool]:
        """Draws when to strike."""
        total = self.reference.num_shards
        kind = draw.choice(("time", "work", "shard", "shard", "shard", "last shard", "manifest"))
        if scenario in ("executor JVM", "Python of a task", "Python daemon", "second run", "twin"):
            kind = "shard"  # else there is no executor yet, or none any more
        if kind == "time":
            at_s = draw.uniform(0.5, self.undisturbed_s) * haste
            return lambda seconds, state: seconds >= at_s
        if kind == "work":
            return lambda seconds, state: state.has_work
        if kind == "manifest":
            return lambda seconds, state: state.has_manifest
        num_shards = total if kind == "last shard" else int(draw.uniform(0, 0.9 * total) * haste)
        return lambda seconds, state: state.has_work and state.num_shards >= num_shards

    def _await(self, run: Run, target: str, moment: Callable[[float, State], bool]) -> State | None:
        """Waits for a moment; None when the run is over before."""
        while run.code() is None:
            if run.seconds() > RUN_LIMIT_S:
                raise KillFailedError(f"nothing moves for {RUN_LIMIT_S:g} s; see the last log")
            if moment(run.seconds(), state := look(target)):
                return state
            time.sleep(0.02)
        return None

    def _victim(self, scenario: str, run: Run, draw: random.Random) -> int | None:
        """Chooses a process; executors and their Pythons are waited for as long as the run lives."""
        while run.code() is None:
            found: dict[str, Callable[[], list[int | None]]] = {
                "driver Python": lambda: [run.driver_python()],
                "driver JVM": lambda: [run.driver_jvm()],
                "executor JVM": lambda: [*self.spark.executors()],
                "Python of a task": lambda: [*self.spark.python_task_runners()],
                "Python daemon": lambda: [*self.spark.python_daemons()],
            }
            if pids := [pid for pid in found[scenario]() if pid is not None]:
                return draw.choice(sorted(pids))
            time.sleep(0.02)
        return None

    def _hit_process(self, scenario: str, run: Run, draw: random.Random) -> str:
        """Kills a process, or freezes it and then kills or thaws it."""
        pid = self._victim(scenario, run, draw)
        freeze_s = draw.uniform(0.2, 3.0) if draw.random() < 0.3 else 0.0
        last = draw.choice((signal.SIGKILL, signal.SIGCONT)) if freeze_s else signal.SIGKILL
        if pid is None:
            return ""
        try:
            if freeze_s:
                os.kill(pid, signal.SIGSTOP)
                time.sleep(freeze_s)
            os.kill(pid, last)
        except ProcessLookupError:
            return ""
        first = f"frozen for {freeze_s:.1f} s, " if freeze_s else ""
        return first + ("killed" if last == signal.SIGKILL else "thawed")

    def _hit_datanode(self, run: Run, draw: random.Random) -> str:
        """Kills or freezes a DataNode for a while."""
        name = draw.choice([name for name in self.hdfs.names if name != "namenode"])
        seconds = draw.uniform(1.0, 5.0)
        freezes = draw.random() < 0.3
        (self.hdfs.freeze if freezes else self.hdfs.kill)(name)
        end_s = time.monotonic() + seconds
        while run.code() is None and time.monotonic() < end_s:
            time.sleep(0.05)
        (self.hdfs.thaw if freezes else self.hdfs.restart)(name)
        return f"{name} {'frozen' if freezes else 'killed, restarted'} after {seconds:.1f} s"

    def _second_run(self, run: Run, target: str, draw: random.Random) -> str:
        """Starts the job once more while the first one stands still: it must leave at once. Then kills a driver."""
        frozen = self.spark.executors()
        if not frozen or run.code() is not None:
            return ""
        for pid in frozen:
            self.spark.kill(pid, signal.SIGSTOP)
        try:
            owner = run.driver_python()
            with self.run(target) as second:
                code = second.wait(REFUSAL_LIMIT_S)
                seconds, output = second.seconds(), second.output()
            if run.code() is not None or owner is None or look(target).has_manifest:
                return ""
            if code == 0 or f"process {owner} on {socket.gethostname()}" not in output:
                raise KillFailedError(f"a second run beside process {owner} ended with {code}: {output[-1000:]}")
        finally:
            for pid in frozen:
                self.spark.kill(pid, signal.SIGCONT)
        victim = draw.choice((run.driver_python, run.driver_jvm))()
        if victim is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(victim, signal.SIGKILL)
        return f"refused with {code} after {seconds:.1f} s, then the first driver was killed"

    def _twin(self, run: Run, draw: random.Random) -> str:
        """Freezes all of one executor, so that Spark runs its tasks twice; wakes it during the run or after its end."""
        victim = self._victim("Python of a task", run, draw)
        if victim is None:
            return ""
        folder = os.path.realpath(f"/proc/{victim}/cwd")
        pids = [
            process.pid for process in self.spark.processes() if os.path.realpath(f"/proc/{process.pid}/cwd") == folder
        ]
        is_late = draw.random() < 0.5
        seconds = draw.uniform(0.5, 4.0)
        for pid in pids:
            self.spark.kill(pid, signal.SIGSTOP)
        try:
            end_s = time.monotonic() + (TWIN_LIMIT_S if is_late else seconds)
            while run.code() is None and time.monotonic() < end_s:
                time.sleep(0.05)
            if is_late and run.code() is None:
                raise KillFailedError(f"with one executor frozen, the other does not end the run in {TWIN_LIMIT_S:g} s")
        finally:
            for pid in pids:
                self.spark.kill(pid, signal.SIGCONT)
        return f"an executor frozen {'until the run had ended' if is_late else f'for {seconds:.1f} s'}"


def scenario_of(number: int, seed: int) -> str:
    """Returns what kill `number` (from 1) is: each deal of eight holds all scenarios."""
    deal, index = divmod(number - 1, len(SCENARIOS))
    return random.Random(f"{seed} deal {deal}").sample(SCENARIOS, len(SCENARIOS))[index]


def main() -> int:
    """Runs the kills; 0 when every one of them ended with the same data set."""
    parser = argparse.ArgumentParser(prog="prepare_kills.py", description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=8)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--images", type=int, default=360, help="photos in the source (default %(default)s)")
    parser.add_argument("--only", type=int, nargs="+", help="do only these of the kills, counted from 1")
    parser.add_argument("--keep", action="store_true", help="keep logs and files, also when all is well")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    folder = Path(tempfile.mkdtemp(prefix="prepare_kills-"))
    os.environ["TMPDIR"] = str(folder)  # what killed processes leave behind goes with the rest
    is_ok = False
    try:
        is_ok = disturb_all(arguments, folder)
    except (SetupError, KillFailedError) as error:
        print(f"prepare_kills: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        print("prepare_kills: interrupted", file=sys.stderr)
    finally:
        if is_ok and not arguments.keep:
            shutil.rmtree(folder, ignore_errors=True)
        else:
            print(f"logs and files are kept in {folder}", flush=True)
    return 0 if is_ok else 1


def disturb_all(arguments: argparse.Namespace, folder: Path) -> bool:
    """Starts the cluster, does the kills, and says whether all ended well."""
    with contextlib.ExitStack() as stack:
        hdfs = LocalHdfs(folder / "hdfs", 2, die_with_parent=True)
        stack.callback(hdfs.stop, at_once=True)
        hdfs.start()
        killer = Killer(hdfs, stack.enter_context(LocalSpark(folder / "spark", 2)), folder)
        killer.upload(arguments.images)
        killer.make_reference()
        print(
            f"undisturbed: {killer.undisturbed_s:.1f} s, {len(killer.inputs)} images, {killer.reference.num_shards} shards,"
            f" content hash {killer.reference.content_hash()[:16]}",
            flush=True,
        )
        numbers = arguments.only or range(1, arguments.kills + 1)
        outcomes = []
        for number in numbers:
            outcomes.append(killer.kill(number, arguments.seed))
            print(f"kill {number}, {outcomes[-1].line}", flush=True)
    num_ok = sum(outcome.is_ok for outcome in outcomes)
    num_lost, num_doubled = sum(o.num_lost for o in outcomes), sum(o.num_doubled for o in outcomes)
    print(
        f"{num_ok} of {len(outcomes)} runs end with the same content hash; {num_lost} lost, {num_doubled} doubled",
        flush=True,
    )
    return num_ok == len(outcomes)


if __name__ == "__main__":
    sys.exit(main())
