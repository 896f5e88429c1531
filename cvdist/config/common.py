"""What all settings share: names, ranges, and the way to plain values and back."""

from __future__ import annotations

import dataclasses
import re
from typing import Any, TypeVar, get_type_hints

from cvdist.errors import ConfigError

T = TypeVar("T")
MIB = 1 << 20
GIB = 1024 * MIB
CONFIG_NAME = "config.json"  # of a run
MAX_SEED = (1 << 32) - 1


def canonical_split(name: str) -> str:
    """Returns the one name of a split: validation is val."""
    return "val" if name == "validation" else name


def require_range(name: str, value: float, low: float, high: float) -> None:
    """Raises ConfigError unless low <= value <= high."""
    if not low <= value <= high:
        raise ConfigError(
            f"{name}: {value} is out of range; expected {low} to {high}; change it to a value in that range"
        )


def different_names(setting: str, text: str, *, of: str, example: str) -> tuple[str, ...]:
    """Returns the names that the comma-separated `text` of a setting lists.

    Args:
        setting: Its name, for the message.
        text: Its value.
        of: What it is a list of.
        example: A value that is one.

    Raises:
        ConfigError: A name is empty or there twice.
    """
    names = tuple(name.strip() for name in text.split(","))
    if not all(names) or len(set(names)) < len(names):
        raise ConfigError(
            f"{setting}: {text!r} is no list of {of}; expected different names with commas between them; use for example {example}"
        )
    return names


def split_shares(text: str) -> dict[str, float]:
    """Returns the shares of name=share pairs by canonical split name.

    Raises:
        ConfigError: The text is not name=share pairs, or the shares do not sum to 1.
    """
    pairs = re.findall(r"(?:^|,)(train|val|validation|test)=(\d+(?:\.\d*)?|\.\d+)(?=,|$)", text)
    shares = {canonical_split(name): float(share) for name, share in pairs}
    if len(shares) != text.count(",") + 1 or abs(sum(shares.values()) - 1) > 1e-6:
        raise ConfigError(
            f"split: {text!r} is not a list of shares; expected name=share pairs of train, val, test that sum to 1;"
            " use for example train=0.8,val=0.1,test=0.1"
        )
    return {name: share for name, share in shares.items() if share > 0}


def dump(config: Any) -> dict[str, Any]:
    """Returns a dataclass of this module as plain values, for YAML and JSON."""
    return dataclasses.asdict(config)


def from_dict(kind: type[T], values: dict[str, Any], where: str) -> T:
    """Builds a dataclass of this module of what `dump` returned.

    Raises:
        ConfigError: A key is unknown or missing, as in a file of another version.
    """
    hints = get_type_hints(kind)
    try:
        nested = {
            key: from_dict(hints[key], value, where) if isinstance(value, dict) else value
            for key, value in values.items()
        }
        return kind(**nested)
    except (KeyError, TypeError) as error:
        raise ConfigError(
            f"{where} does not fit this version of cvdist ({error}); use the version that wrote it"
        ) from None
