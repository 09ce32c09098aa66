"""How much room a policy asks for. Upper bounds: what snapshots share is stored once, and most is compressed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ciuic_async.retention.policy import (
    KeepBest,
    KeepBytes,
    KeepDaily,
    KeepHourly,
    KeepLatest,
    KeepWeekly,
    KeepWithin,
    Policy,
    rules_of,
)
from ciuic_async.stores.space import room

_FITTING = 2
"""Where nothing is ever pruned, room for fewer snapshots than this is worth a word before the first."""


@dataclass(frozen=True, slots=True)
class Demand:
    """What is there at once at most: so many snapshots, and so many bytes besides."""

    snapshots: int
    more_bytes: int = 0

    def size_bytes(self, snapshot_bytes: int) -> int:
        """The same in bytes, where a snapshot takes so many."""
        return self.snapshots * snapshot_bytes + self.more_bytes


def demand(policy: Policy | None, interval_s: float | None = None) -> Demand | None:
    """The most that a policy keeps, with the snapshot that is being written while none has gone yet.

    Args:
        interval_s: time from one snapshot to the next, where that is known.

    Returns:
        None: there is no bound, or none that is known: all are kept, or every 1000th step, or what has a tag.
    """
    if policy is None:
        return None
    snapshots, more_bytes, keeps_latest = 1, 0, False
    for rule in rules_of(policy):
        match rule:
            case KeepLatest(count) | KeepHourly(count) | KeepDaily(count) | KeepWeekly(count):
                snapshots, keeps_latest = snapshots + count, True
            case KeepBest(_, count):
                snapshots += count
            case KeepWithin(seconds) if interval_s:
                snapshots, keeps_latest = snapshots + int(seconds / interval_s) + 1, True
            case KeepBytes(max_bytes):
                more_bytes += max_bytes
            case _:
                return None
    return Demand(snapshots + (not keeps_latest), more_bytes)  # the latest stays, whatever the rules say


def too_small(folder: str | None, policy: Policy | None, snapshot_bytes: int, stored: Callable[[], int]) -> str | None:
    """Before the first snapshot of a run: a warning where the disk cannot hold what the policy asks for; else None.

    Args:
        folder: of the chain; None: it is not on a local disk.
        snapshot_bytes: of the state, uncompressed.
        stored: bytes that the chain's snapshots take already; only called where it matters.
    """
    space = room(folder)
    if space is None or snapshot_bytes <= 0:
        return None
    free, size = _human(space.free_bytes), _human(snapshot_bytes)
    asked = demand(policy)
    if policy is None or asked is None:
        if space.free_bytes >= _FITTING * snapshot_bytes:
            return None
        rule = "nothing is pruned (keep=None)" if policy is None else f"keep={policy.describe()!r} has no bound"
        return (
            f"{folder}: {free} are free, and a snapshot takes up to {size}: at least "
            f"{space.free_bytes // snapshot_bytes} of them fit, and {rule}. What they share is stored once, so it may "
            "be more; give keep=, or use a larger disk"
        )
    asked_bytes = asked.size_bytes(snapshot_bytes)
    if asked_bytes <= space.free_bytes:
        return None
    held_bytes = stored()
    if asked_bytes <= space.free_bytes + held_bytes:
        return None
    held = f" beside {_human(held_bytes)} in this chain" if held_bytes else ""
    return (
        f"{folder}: keep={policy.describe()!r} asks for up to {_human(asked_bytes)}: at most "
        f"{asked.snapshots} snapshots of up to {size}, the one being written included; {free} are free{held}. What "
        "snapshots share is stored once, and most is compressed, so it may fit; else keep fewer, or use a larger disk"
    )


def _human(size_bytes: int) -> str:
    return f"{size_bytes / 1e9:.1f} GB" if size_bytes >= 10**9 else f"{size_bytes / 1e6:.1f} MB"
