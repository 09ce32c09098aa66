"""What to keep: a small object over the list of snapshots, without any storage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from ciuic_async.errors import UsageError
from ciuic_async.format.entry import SnapshotEntry


class Policy(Protocol):
    """Chooses the snapshots that stay."""

    def keep(self, snapshots: Sequence[SnapshotEntry]) -> set[str]:
        """Ids that stay; the latest does in any case.

        Args:
            snapshots: none of them pruned, with the tags that they have now; first those that a rollback abandoned,
                then the others, both oldest first: the latest is the last.
        """

    def describe(self) -> str:
        """What is written into the prune entry."""


@dataclass(frozen=True, slots=True)
class KeepLatest:
    """Keep the newest ``count`` snapshots."""

    count: int

    def __post_init__(self) -> None:
        if type(self.count) is not int or self.count < 1:
            raise UsageError(
                f"KeepLatest({self.count!r}): keep at least 1 snapshot; nothing would be left to resume from"
            )

    def keep(self, snapshots: Sequence[SnapshotEntry]) -> set[str]:
        return {entry.snapshot for entry in snapshots[-self.count :]}

    def describe(self) -> str:
        return f"KeepLatest({self.count})"
