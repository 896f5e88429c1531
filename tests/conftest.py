"""Fixtures of all tests: a real HDFS, and fresh places to write on it and on local disk."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cluster.hadoop import SetupError, find_java, hadoop_classpath
from cluster.local_hdfs import LocalHdfs
from cvdist import storage

pytest_plugins = ["tests.require_groups"]


def make_hdfs(directory: Path, datanodes: int = 2, settings: dict[str, str] | None = None) -> LocalHdfs:
    """Starts an HDFS that ends with the tests; skips where Java or Hadoop's jars cannot be had."""
    try:
        find_java()
        hadoop_classpath()
    except SetupError as error:
        pytest.skip(f"no HDFS: {error}")
    return LocalHdfs(directory, datanodes, die_with_parent=True, settings=settings).start()


@pytest.fixture(scope="session")
def hdfs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalHdfs]:
    """One HDFS with two DataNodes for all tests that leave it as it is."""
    # Long directories are listed in pages; small ones let tests turn them.
    cluster = make_hdfs(tmp_path_factory.mktemp("hdfs"), settings={"dfs.ls.limit": "100"})
    yield cluster
    cluster.stop(at_once=True)


@pytest.fixture(scope="module")
def private_hdfs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., LocalHdfs]]:
    """Makes HDFSs that tests may break: private_hdfs(datanodes=2, settings=None)."""
    clusters = []

    def make(datanodes: int = 2, settings: dict[str, str] | None = None) -> LocalHdfs:
        clusters.append(make_hdfs(tmp_path_factory.mktemp("private_hdfs"), datanodes, settings))
        return clusters[-1]

    yield make
    for cluster in clusters:
        cluster.stop(at_once=True)


@pytest.fixture
def hdfs_url(hdfs: LocalHdfs) -> str:
    """A fresh directory on HDFS."""
    url = storage.join(hdfs.url, "tests", uuid.uuid4().hex)
    storage.make_dirs(url)
    return url


@pytest.fixture(params=["file", "hdfs"])
def storage_url(request: pytest.FixtureRequest) -> str:
    """A fresh directory, once on local disk and once on HDFS."""
    if request.param == "file":
        path: Path = request.getfixturevalue("tmp_path")
        return f"file://{path}"
    url: str = request.getfixturevalue("hdfs_url")
    return url
