"""What to keep: small rules over the list of snapshots, without any storage. ``a | b`` keeps what either keeps.

All rules look from the latest backwards, so that of two snapshots with equal claims the one that a rollback abandoned
goes. Texts such as ``latest=3 | best=loss`` are read by ``parse.py``, which also reads what ``describe`` writes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from fnmatch import fnmatchcase
from typing import Any, Protocol, runtime_checkable

from ciuic_async.errors import UsageError
from ciuic_async.format.entry import SnapshotEntry
from ciuic_async.retention import words

_LARGEST = 10**15
"""No limit is larger: a quadrillion of bytes, steps or seconds."""

Footprint = Callable[[str], Mapping[str, int]]
"""Id of a snapshot -> name and size in bytes of every file that reading it needs, whoever wrote it."""


class Policy(Protocol):
    """Chooses the snapshots that stay. Any class with these two methods is one."""

    def keep(self, snapshots: Sequence[SnapshotEntry]) -> set[str]:
        """Ids that stay; the latest does in any case.

        Args:
            snapshots: none of them pruned, with the tags that they have now; first those that a rollback abandoned,
                then the others, both oldest first: the latest is the last.
        """

    def describe(self) -> str:
        """What is written into the prune entry."""


@runtime_checkable
class SizedPolicy(Protocol):
    """A policy that also asks how many bytes snapshots take; retention then calls this instead of ``keep``."""

    def keep_sized(self, snapshots: Sequence[SnapshotEntry], footprint: Footprint) -> set[str]:
        """As ``Policy.keep``. ``footprint`` reads from the store; it raises StoreError and IntegrityError."""


def choose(policy: Policy, snapshots: Sequence[SnapshotEntry], footprint: Footprint) -> set[str]:
    """What a policy keeps, whichever of its two methods says so."""
    if isinstance(policy, SizedPolicy):
        return policy.keep_sized(snapshots, footprint)
    return policy.keep(snapshots)


def rules_of(policy: Policy) -> tuple[Policy, ...]:
    """The parts of a union; of any other policy itself."""
    return policy.rules if isinstance(policy, KeepAny) else (policy,)


class Rule:
    """What the rules here share: ``|``. A user's own policy may inherit it, and need not."""

    __slots__ = ()

    def __or__(self, other: Policy) -> KeepAny:
        return _union(self, other)

    def __ror__(self, other: Policy) -> KeepAny:
        return _union(other, self)


def _union(*policies: Any) -> KeepAny:
    for policy in policies:
        if not (callable(getattr(policy, "keep", None)) and callable(getattr(policy, "describe", None))):
            raise UsageError(f"{policy!r} is no policy: expected one such as KeepLatest(3) on both sides of |")
    return KeepAny(tuple(rule for policy in policies for rule in rules_of(policy)))


@dataclass(frozen=True, slots=True)
class KeepAny(Rule):
    """Keep what at least one of several rules keeps: what ``KeepLatest(3) | KeepBest("loss")`` makes."""

    rules: tuple[Policy, ...]

    def keep(self, snapshots: Sequence[SnapshotEntry]) -> set[str]:
        return set().union(*(rule.keep(snapshots) for rule in self.rules))

    def keep_sized(self, snapshots: Sequence[SnapshotEntry], footprint: Footprint) -> set[str]:
        """Every rule decides for itself: what another one keeps counts for no limit."""
        return set().union(*(choose(rule, snapshots, footprint) for rule in self.rules))

    def describe(self) -> str:
        return " | ".join(rule.describe() for rule in self.rules)


@dataclass(frozen=True, slots=True)
class KeepLatest(Rule):
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
        return f"latest={self.count}"


@dataclass(frozen=True, slots=True)
class KeepEvery(Rule):
    """Keep the first snapshot of every ``steps`` steps: those at multiples, or the next ones after them.

    The first of a range stays the first, so pruning again drops nothing more. Snapshots without a step are not kept by
    this rule.
    """

    steps: int

    def __post_init__(self) -> None:
        _check_count("KeepEvery", self.steps)

    def keep(self, snapshots: Sequence[SnapshotEntry]) -> set[str]:
        first: dict[int, SnapshotEntry] = {}
        current: int | None = None
        for entry in reversed(snapshots):
            if entry.step is None:
                continue
            bucket = entry.step // self.steps
            if bucket not in first:
                first[bucket] = entry
            elif bucket == current and entry.step < (first[bucket].step or 0):
                first[bucket] = entry  # further back on the same pass; an earlier pass does not count again
            current = bucket
        return {entry.snapshot for entry in first.values()}

    def describe(self) -> str:
        return f"every={self.steps}"


@dataclass(frozen=True, slots=True)
class KeepBest(Rule):
    """Keep the ``count`` snapshots with the smallest value of a metric, or the largest; of equals the newest.

    Snapshots that do not have the metric, or have NaN, are not kept by this rule.
    """

    metric: str
    count: int = 1
    largest: bool = False

    def __post_init__(self) -> None:
        _check_text("KeepBest", self.metric)
        _check_count("KeepBest", self.count)

    def keep(self, snapshots: Sequence[SnapshotEntry]) -> set[str]:
        found = []
        for entry in reversed(snapshots):
            value = float(dict(entry.metrics).get(self.metric, "nan"))
            if not math.isnan(value):
                found.append((-value if self.largest else value, entry.snapshot))
        found.sort(key=lambda pair: pair[0])  # stable: the newest of equals stays first
        return {snapshot for _, snapshot in found[: self.count]}

    def describe(self) -> str:
        parts = [words.quote(self.metric)]
        parts += [str(self.count)] if self.count != 1 else []
        parts += ["largest"] if self.largest else []
        return "best=" + ":".join(parts)


@dataclass(frozen=True, slots=True, init=False)
class KeepTagged(Rule):
    """Keep snapshots that have a tag: any tag, or one that matches a name or a pattern (``*``, ``?``, ``[abc]``)."""

    patterns: tuple[str, ...]

    def __init__(self, *patterns: str) -> None:
        for pattern in patterns:
            _check_text("KeepTagged", pattern)
        object.__setattr__(self, "patterns", patterns)

    def keep(self, snapshots: Sequence[SnapshotEntry]) -> set[str]:
        return {entry.snapshot for entry in snapshots if any(map(self._matches, entry.tags))}

    def _matches(self, tag: str) -> bool:
        return not self.patterns or any(fnmatchcase(tag, pattern) for pattern in self.patterns)

    def describe(self) -> str:
        return "tagged" if not self.patterns else "tagged=" + ",".join(map(words.quote, self.patterns))


@dataclass(frozen=True, slots=True)
class _KeepPeriods(Rule):
    """Keep the newest snapshot of each of the last ``count`` periods that have one, in UTC, by the writers' clocks."""

    count: int

    def __post_init__(self) -> None:
        _check_count(type(self).__name__, self.count)

    def keep(self, snapshots: Sequence[SnapshotEntry]) -> set[str]:
        newest: dict[tuple[int, ...], str] = {}
        for entry in reversed(snapshots):
            if len(newest) == self.count:
                break
            newest.setdefault(self._period(_created(entry)), entry.snapshot)
        return set(newest.values())

    def _period(self, created: datetime) -> tuple[int, ...]:
        raise AssertionError("a kind of period says which one a time is in")

    def describe(self) -> str:
        return f"{type(self).__name__.removeprefix('Keep').lower()}={self.count}"


class KeepHourly(_KeepPeriods):
    """Keep the newest snapshot of each of the last ``count`` hours that have one (UTC)."""

    __slots__ = ()

    def _period(self, created: datetime) -> tuple[int, ...]:
        return (created.year, created.month, created.day, created.hour)


class KeepDaily(_KeepPeriods):
    """Keep the newest snapshot of each of the last ``count`` days that have one (UTC)."""

    __slots__ = ()

    def _period(self, created: datetime) -> tuple[int, ...]:
        return (created.year, created.month, created.day)


class KeepWeekly(_KeepPeriods):
    """Keep the newest snapshot of each of the last ``count`` weeks that have one (Monday to Sunday, UTC)."""

    __slots__ = ()

    def _period(self, created: datetime) -> tuple[int, ...]:
        return tuple(created.isocalendar()[:2])


@dataclass(frozen=True, slots=True)
class KeepWithin(Rule):
    """Keep snapshots that were made at most so many seconds before the latest one, by the writers' clocks.

    It is the latest that time counts back from, not the clock here: a training that stands still loses nothing.
    """

    seconds: float

    def __post_init__(self) -> None:
        if type(self.seconds) not in (int, float) or not 0 < self.seconds <= _LARGEST:
            raise UsageError(f"KeepWithin({self.seconds!r}): expected a number of seconds above 0")

    def keep(self, snapshots: Sequence[SnapshotEntry]) -> set[str]:
        if not snapshots:
            return set()
        latest = _created(snapshots[-1])
        return {e.snapshot for e in snapshots if (latest - _created(e)) / timedelta(seconds=1) <= self.seconds}

    def describe(self) -> str:
        return f"within={words.duration(self.seconds)}"


@dataclass(frozen=True, slots=True)
class KeepBytes(Rule):
    """Keep the newest snapshots that fit into so many bytes together; what they share is counted once.

    Counted are their segments and manifests. The first that does not fit ends it, and everything older goes.
    """

    max_bytes: int

    def __post_init__(self) -> None:
        _check_count("KeepBytes", self.max_bytes)

    def keep(self, snapshots: Sequence[SnapshotEntry]) -> set[str]:
        """By what each one wrote for itself: a guess, for callers that have no store at hand."""
        sizes = {entry.snapshot: entry.stored_bytes for entry in snapshots}
        return self.keep_sized(snapshots, lambda snapshot: {snapshot: sizes[snapshot]})

    def keep_sized(self, snapshots: Sequence[SnapshotEntry], footprint: Footprint) -> set[str]:
        """By the files that each one needs."""
        kept: set[str] = set()
        files: dict[str, int] = {}
        total_bytes = 0
        for entry in reversed(snapshots):
            more = {name: size for name, size in footprint(entry.snapshot).items() if name not in files}
            total_bytes += sum(more.values())
            if total_bytes > self.max_bytes:
                break
            files.update(more)
            kept.add(entry.snapshot)
        return kept

    def describe(self) -> str:
        return f"bytes={words.size(self.max_bytes)}"


def kept_by(policy: Policy, snapshots: Sequence[SnapshotEntry], footprint: Footprint) -> Iterator[tuple[str, set[str]]]:
    """Every rule of a policy, as it describes itself, with the ids that it keeps."""
    for rule in rules_of(policy):
        yield rule.describe(), choose(rule, snapshots, footprint)


def ids(snapshots: Iterable[SnapshotEntry]) -> list[str]:
    """Their ids, in order."""
    return [entry.snapshot for entry in snapshots]


def _created(entry: SnapshotEntry) -> datetime:
    return datetime.fromisoformat(entry.common.created)  # its form was checked when the entry was read


def _check_count(rule: str, value: object) -> None:
    if type(value) is not int or not 1 <= value <= _LARGEST:
        raise UsageError(f"{rule}: expected an integer of at least 1, found {value!r}")


def _check_text(rule: str, value: object) -> None:
    if type(value) is not str or not value or len(value) > 200 or not value.isprintable():
        raise UsageError(f"{rule}: expected a text of 1 to 200 printable characters, found {value!r}")
