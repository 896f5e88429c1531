"""Keras variables as names and bits: what ranks compare, and what they send."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import xxhash

BUCKET_BYTES = 64 << 20


def stable_path(variable: Any) -> str:
    """Returns the path of a Keras variable without the numbers that Keras gives layers by a counter of the process.

    `dense_7/kernel` here may be `dense/kernel` in a process that has made fewer models.
    """
    return re.sub(r"_[0-9]+(?=[/_]|$)", "", variable.path)


def identity(variable: Any) -> str:
    """Names a variable, its data type and shape."""
    return f"{stable_path(variable)} {variable.dtype} {tuple(variable.shape)}"


def fingerprint(variables: Sequence[Any]) -> bytes:
    """Returns 16 bytes that change when any name, shape, data type or bit of the variables does (XXH3-128)."""
    digest = xxhash.xxh3_128()
    for variable in variables:
        digest.update(identity(variable).encode())
        digest.update(bits(variable).data)
    return digest.digest()


def value(variable: Any) -> np.ndarray[Any, Any]:
    """Copies a Keras variable to the host."""
    return np.asarray(variable.value.numpy())


def bits(variable: Any) -> np.ndarray[Any, Any]:
    """Returns the bits of a Keras variable, "uint8 (bytes,)"."""
    return np.ascontiguousarray(value(variable)).reshape(-1).view(np.uint8)


def num_bytes(variable: Any) -> int:
    """Returns the size of a Keras variable."""
    return int(math.prod(variable.shape)) * np.dtype(variable.dtype).itemsize


def buckets(variables: Sequence[Any]) -> Iterator[list[Any]]:
    """Groups variables so that few collectives move many, and none moves more than it must hold."""
    bucket: list[Any] = []
    held_bytes = 0
    for variable in variables:
        size_bytes = num_bytes(variable)
        if bucket and held_bytes + size_bytes > BUCKET_BYTES:
            yield bucket
            bucket, held_bytes = [], 0
        bucket.append(variable)
        held_bytes += size_bytes
    if bucket:
        yield bucket


def is_seed(variable: Any) -> bool:
    """Tells whether a variable is the state of a random generator, which each rank has for itself."""
    return str(variable.path).endswith("seed_generator_state")
