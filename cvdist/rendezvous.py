"""Where ranks wait for each other before Horovod does: the key store of `horovodrun`."""

from __future__ import annotations

import contextlib
import http.client
import os
import time
from typing import TYPE_CHECKING

from cvdist.errors import ConfigError, SyncError

if TYPE_CHECKING:
    from cvdist.comm import World

# Seconds that ranks wait for each other to start: nodes import TensorFlow at very different speeds when disks are cold.
START_S = 300.0


def meet(world: World) -> None:
    """Waits until all ranks have started, through the launcher's store of keys.

    Gloo would wait for its own timeout only, and then abort the process without a word.

    Raises:
        ConfigError: No launcher's address is set.
        SyncError: The launcher cannot be reached, or a rank did not start in time.
    """
    address, port = (os.environ.get(f"HOROVOD_GLOO_RENDEZVOUS_{part}", "") for part in ("ADDR", "PORT"))
    if not (address and port.isdecimal()):
        raise ConfigError(
            f"HOROVOD_SIZE is {world.size}, but HOROVOD_GLOO_RENDEZVOUS_ADDR and _PORT say {address!r} and {port!r};"
            " expected the address of a launcher; start all ranks with horovodrun -np N, or unset HOROVOD_SIZE"
        )
    deadline_s = time.monotonic() + START_S

    def ask(method: str, key: str) -> int:
        with contextlib.closing(http.client.HTTPConnection(address, int(port), timeout=30)) as connection:
            connection.request(method, f"/cvdist/{key}", body=b"1" if method == "PUT" else None)
            return connection.getresponse().status

    def await_key(key: str) -> None:
        while ask("GET", key) != http.HTTPStatus.OK:
            if time.monotonic() > deadline_s:
                raise SyncError(
                    f"rank {key.removeprefix('rank-')} did not start within {START_S:.0f} s, as rank {world.rank} saw it;"
                    f" expected {world.size} ranks; look at its first lines of output, and at the load of its node"
                )
            time.sleep(0.1)

    try:
        ask("PUT", f"rank-{world.rank}")
        if world.rank == 0:
            for rank in range(world.size):
                await_key(f"rank-{rank}")
            ask("PUT", "all")
        await_key("all")
    except (OSError, http.client.HTTPException) as error:
        raise SyncError(
            f"the launcher at {address}:{port} cannot be reached ({error}); expected horovodrun there; start all ranks with"
            " one horovodrun, and let its port through"
        ) from error
