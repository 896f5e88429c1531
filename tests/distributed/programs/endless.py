"""Ranks that reduce for ever; each writes its process id to FOLDER/pid-N once all have joined."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import numpy as np

from cvdist import comm

if "deaf" in sys.argv:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
world = comm.init()
comm.barrier(world)
path = Path(sys.argv[1]) / f"pid-{world.rank}"
path.with_suffix(".tmp").write_text(str(os.getpid()))
path.with_suffix(".tmp").rename(path)
while True:
    comm.allreduce_sum(np.ones(1000), world)
    time.sleep(0.01)
