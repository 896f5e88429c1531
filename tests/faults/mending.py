"""An HDFS that a test has broken, whole again for the next one."""

from __future__ import annotations

from cluster.local_hdfs import LocalHdfs


def mend(hdfs: LocalHdfs) -> None:
    """Thaws and restarts its processes, and waits until both DataNodes live."""
    for name in hdfs.names:
        hdfs.thaw(name)
        if name not in hdfs.running():
            hdfs.restart(name)
    hdfs.wait_live(2)
