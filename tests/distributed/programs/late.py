"""The last rank joins some seconds after the others; all write how long they waited."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

from cvdist import comm, rendezvous
from cvdist.errors import CvdistError

folder, late_s, rendezvous.START_S = Path(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3])
rank, size = int(os.environ["HOROVOD_RANK"]), int(os.environ["HOROVOD_SIZE"])
if rank == size - 1:
    time.sleep(late_s)
started_s = time.monotonic()
try:
    comm.barrier(comm.init())
    text = "joined"
except CvdistError as error:
    text = str(error)
(folder / f"rank-{rank}.json").write_text(json.dumps({"text": text, "seconds": time.monotonic() - started_s}))
sys.exit(text != "joined")
