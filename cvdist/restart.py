"""Restart markers for JPEGs that stay as they are: their coefficients are moved into a grid of tiles, without loss.

There is no coefficient-level JPEG library among Python packages that install everywhere, so libjpeg's own `jpegtran` does it.
"""

from __future__ import annotations

import functools
import shutil
import socket
import subprocess

from cvdist.errors import ConfigError
from cvdist.headers import SOF_BASELINE, Frame, read_frame

PROGRAM = "jpegtran"
TIMEOUT_S = 60
ATTEMPTS = 2


@functools.cache
def require_keep_original() -> None:
    """Makes sure that `keep_original` can be done on this machine.

    Raises:
        ConfigError: The program for it is not installed.
    """
    if not shutil.which(PROGRAM):
        raise ConfigError(
            f"keep_original: no {PROGRAM} on the PATH of {socket.gethostname()}; expected libjpeg-turbo's there and on every executor;"
            " install it (apt-get install libjpeg-turbo-progs, dnf install libjpeg-turbo-utils), or leave keep_original out"
        )


def restart_interval(width: int, mcu_width: int) -> int:
    """Returns how many MCUs lie between two restart markers: one that divides a row, so that the image is a grid of tiles."""
    row_mcus = -(-width // mcu_width)
    return next((interval for interval in (2, 3) if row_mcus % interval == 0), 1)


def is_keepable(frame: Frame | None, channels: int) -> bool:
    """Says whether a JPEG is of the kind that is stored: baseline, 8 bits, one scan, of so many channels."""
    kind = (SOF_BASELINE, 8, channels, channels)
    return frame is not None and (frame.marker, frame.bits, len(frame.factors), frame.scan_components) == kind


def with_restarts(data: bytes, channels: int) -> bytes | None:
    """Returns a JPEG with the same coefficients, a grid of restart markers and no metadata; None where that cannot be had.

    Raises:
        ConfigError: The program for it is not installed.
    """
    frame = read_frame(data)[0]
    if frame is None or not is_keepable(frame, channels):
        return None
    interval = restart_interval(frame.width, frame.mcu_width)
    # Huffman tables made for the image: 4 % fewer bytes on clothing photos, for 1 ms, and then they are read in every epoch.
    command = [PROGRAM, "-copy", "none", "-optimize", "-restart", f"{interval}B"]
    made = run(command, data)
    found = read_frame(made)[0]
    expected = (frame.height, frame.width, interval)
    if found is None or not is_keepable(found, channels):
        return None
    return made if (found.height, found.width, found.restart_interval) == expected else None


def run(command: list[str], data: bytes) -> bytes:
    """Returns what a program makes of its input; nothing where it fails, also when it is tried again."""
    for _ in range(ATTEMPTS):  # killed or late says something of the machine, not of the image
        try:
            done = subprocess.run(command, check=False, input=data, capture_output=True, timeout=TIMEOUT_S)
        except FileNotFoundError:
            require_keep_original.cache_clear()
            require_keep_original()
            raise
        except subprocess.TimeoutExpired:
            continue
        if done.returncode >= 0:
            return done.stdout if done.returncode == 0 else b""
    return b""
