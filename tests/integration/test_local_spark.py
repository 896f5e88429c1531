"""The Spark of cluster/local_spark.py: where it listens, its processes, the executor that replaces a lost one, and its end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from cluster.hadoop import SetupError, find_java
from cluster.local_spark import LocalSpark, all_processes, spark_home, working_dir

ROOT = Path(__file__).parents[2]
# Each task says where it runs, and goes on until the test lets it end.
JOB = """
import os, pathlib, sys, time
from pyspark.sql import SparkSession

folder, package = pathlib.Path(sys.argv[1]), sys.argv[2]

def task(number):
    import cvdist
    (folder / f"started-{number}").touch()
    while not (folder / "go").exists():
        time.sleep(0.05)
    return number, sys.executable, os.path.dirname(cvdist.__file__), os.getcwd()

spark = SparkSession.builder.getOrCreate()
rows = spark.sparkContext.parallelize(range(4), 4).map(task).collect()
assert [row[0] for row in rows] == [0, 1, 2, 3], rows
assert {row[1:3] for row in rows} == {(sys.executable, package)}, rows
print("EXECUTORS", len({row[3] for row in rows}))
spark.stop()
"""


def wait_for(condition: Callable[[], object], what: str, timeout_s: float = 30) -> None:
    """Waits until something holds."""
    end_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end_s, f"in {timeout_s} s: no {what}"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def spark(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalSpark]:
    try:
        find_java()
        spark_home()
    except SetupError as error:
        pytest.skip(f"no Spark: {error}")
    with LocalSpark(tmp_path_factory.mktemp("local spark")) as cluster:
        yield cluster


@pytest.fixture
def job(spark: LocalSpark, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A job whose four tasks wait for the file `go`."""
    (tmp_path / "job.py").write_text(JOB)
    twins = ["--conf", "spark.speculation=true", "--conf", "spark.speculation.quantile=0.1"]
    command = [
        spark.submit,
        "--master",
        spark.url,
        *twins,
        str(tmp_path / "job.py"),
        str(tmp_path),
        str(ROOT / "cvdist"),
    ]
    with subprocess.Popen(
        command, env=spark.environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        yield process
        process.kill()


def test_each_of_two_executors_runs_tasks_with_this_python_and_cvdist(
    spark: LocalSpark, job: subprocess.Popen[str], tmp_path: Path
) -> None:
    wait_for(lambda: len(list(tmp_path.glob("started-*"))) == 2, "two tasks at once")
    assert len(spark.executors()) == len(spark.python_daemons()) == len(spark.python_task_runners()) == 2
    assert set(spark.python_processes()) == {*spark.python_daemons(), *spark.python_task_runners()}
    (tmp_path / "go").touch()
    output, _ = job.communicate(timeout=60)
    assert job.returncode == 0, output
    assert "EXECUTORS 2\n" in output
    wait_for(lambda: not spark.processes(), "end of all processes of the job")


@pytest.mark.parametrize("victim", ["executors", "python_daemons", "python_task_runners"])
def test_a_killed_process_is_replaced_and_the_job_ends_well(
    spark: LocalSpark, job: subprocess.Popen[str], tmp_path: Path, victim: str
) -> None:
    wait_for(lambda: len(list(tmp_path.glob("started-*"))) == 2, "two tasks at once")
    executors = spark.executors()
    pid = getattr(spark, victim)()[0]
    assert spark.kill(pid)
    wait_for(lambda: pid not in [process.pid for process in spark.processes()], "end of the victim")
    assert not spark.kill(pid), "it is gone"
    if victim == "executors":
        wait_for(lambda: len(spark.executors()) == 2 and spark.executors() != executors, "another executor")
    (tmp_path / "go").touch()
    output, _ = job.communicate(timeout=60)
    assert job.returncode == 0, output


def test_a_twin_of_a_frozen_task_runs_on_the_other_executor(
    spark: LocalSpark, job: subprocess.Popen[str], tmp_path: Path
) -> None:
    wait_for(lambda: len(list(tmp_path.glob("started-*"))) == 2, "two tasks at once")
    frozen = spark.python_task_runners()[0]
    assert spark.kill(frozen, signal.SIGSTOP)
    (tmp_path / "go").touch()
    output, _ = job.communicate(timeout=60)
    assert job.returncode == 0, output
    assert "EXECUTORS 1\n" in output


def test_it_listens_on_this_machine_only(spark: LocalSpark) -> None:
    jvms = [
        psutil.Process(process.pid) for process in all_processes() if working_dir(process.pid) == str(spark.directory)
    ]
    assert len(jvms) == 3
    sockets = [found for jvm in jvms for found in jvm.net_connections() if found.status == psutil.CONN_LISTEN]
    assert len(sockets) >= 6, "each has a port for Spark and one for its web server"
    assert {found.laddr.ip.removeprefix("::ffff:") for found in sockets} == {"127.0.0.1", "127.0.0.2"}


def test_no_stranger_is_killed(spark: LocalSpark) -> None:
    with subprocess.Popen(["sleep", "60"]) as stranger:
        assert not spark.kill(stranger.pid)
        assert stranger.poll() is None
        stranger.kill()


def test_processes_end_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    program = (
        "import sys, time; from cluster.local_spark import LocalSpark\n"
        "LocalSpark(sys.argv[1], 1).start(); print('up', flush=True); time.sleep(600)\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as parent:
        if parent.stdout.readline() != "up\n":
            pytest.skip(f"no Spark: {parent.stderr.read().splitlines()[-1]}")
        pids = [process.pid for process in all_processes() if working_dir(process.pid) == str(tmp_path)]
        assert len(pids) == 2
        parent.send_signal(signal.SIGKILL)
    wait_for(lambda: not any(os.path.exists(f"/proc/{pid}/exe") for pid in pids), "end of the JVMs", 10)


def test_a_start_that_fails_names_the_cause_and_the_log(tmp_path: Path) -> None:
    try:
        find_java()
        spark_home()
    except SetupError as error:
        pytest.skip(f"no Spark: {error}")
    spark = LocalSpark(tmp_path, 1, memory="much")
    with pytest.raises(
        SetupError, match=rf"the worker1 ended by itself \(.+\); expected it to run; see {tmp_path}/worker1.log"
    ):
        spark.start()
    assert spark.processes() == []
    assert [process for process in all_processes() if working_dir(process.pid) == str(tmp_path)] == []
