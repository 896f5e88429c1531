"""What the ranks of a test program have found."""

from __future__ import annotations

from typing import Any


class World:
    """The outcome of a program of checks in a world of one size."""

    def __init__(self, outcome: Any, size: int) -> None:
        assert outcome.returncode == 0, outcome.output
        self.size, self.folder, self.output, self.ranks = size, outcome.folder, outcome.output, outcome.results()
        assert len(self.ranks) == size

    def each(self, name: str) -> list[Any]:
        """Returns one result of every rank."""
        return [rank[name] for rank in self.ranks]

    def same(self, name: str) -> Any:
        """Returns a result that must be the same on every rank."""
        first, *others = self.each(name)
        assert all(other == first for other in others), f"{name} differs between ranks"
        return first
