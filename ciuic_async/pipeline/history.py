"""The snapshots of a log: which there are, which were pruned, which a ref means."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

from ciuic_async.errors import NotFoundError, UsageError
from ciuic_async.format.entry import PruneEntry, SnapshotEntry
from ciuic_async.transparency.log import Log

_ANCESTOR = re.compile(r"(.*)~([0-9]{1,6})")
_NUMBER = re.compile(r"[0-9]{1,18}")
_ID_PREFIX = re.compile(r"[0-9a-f]{4,20}")


@dataclass(frozen=True, slots=True)
class Line:
    """A snapshot in the log. ``leaf_hash`` is how children name it."""

    index: int
    entry: SnapshotEntry
    leaf_hash: bytes


def newest_first(log: Log) -> Iterator[Line]:
    """Snapshots that are not pruned, newest first; reads only as much of the log as is asked for."""
    pruned: set[str] = set()
    for index, entry in log.reversed_entries():
        if isinstance(entry, PruneEntry):
            pruned.update(entry.snapshots)
        elif isinstance(entry, SnapshotEntry) and entry.snapshot not in pruned:
            yield Line(index, entry, log.leaf_hash(index))


@dataclass(slots=True)
class _Index:
    """What was read of a log so far. A log only grows, so each entry is read once in the life of its object."""

    size: int = 0
    living: dict[str, Line] = field(default_factory=dict)
    names: dict[bytes, str] = field(default_factory=dict)


_indexes: WeakKeyDictionary[Log, _Index] = WeakKeyDictionary()


def _index(log: Log) -> _Index:
    # Under the log's own lock and no other: appending holds it when it asks for the living snapshots.
    with log.lock:
        index = _indexes.setdefault(log, _Index())
        for number, entry in log.entries(index.size):
            if isinstance(entry, SnapshotEntry):
                line = Line(number, entry, log.leaf_hash(number))
                index.living[entry.snapshot] = line
                index.names[line.leaf_hash] = entry.snapshot
            elif isinstance(entry, PruneEntry):
                for snapshot in entry.snapshots:
                    index.living.pop(snapshot, None)
            index.size = number + 1
        return index


def live_snapshots(log: Log) -> list[Line]:
    """Snapshots that are not pruned, oldest first. Reads the whole log once, later only what is new."""
    with log.lock:
        return list(_index(log).living.values())


def is_live(log: Log, snapshot: str) -> bool:
    """Whether the log has this snapshot and no later entry prunes it."""
    return any(line.entry.snapshot == snapshot for line in newest_first(log))


def resolve_ref(log: Log, ref: str) -> Line:
    """What a ref means: ``latest``, ``latest~2``, ``step:1200``, ``best:loss``, a tag, an id or a unique prefix.

    Raises:
        UsageError: not a ref.
        NotFoundError: kind ``no_snapshot`` (there is none at all) or ``no_such_snapshot``; says what there is.
    """
    if not isinstance(ref, str) or not ref:
        raise UsageError(f"a ref is a text such as 'latest', 'step:100' or a snapshot id, found {ref!r}")
    match = _ANCESTOR.fullmatch(ref)
    if match and match[1]:
        return _ancestor(log, resolve_ref(log, match[1]), int(match[2]), ref)
    if ref == "latest":
        return _first(log, lambda line: True, ref)
    kind, _, value = ref.partition(":")
    if kind == "step" and _NUMBER.fullmatch(value):
        return _first(log, lambda line: line.entry.step == int(value), ref)
    if kind == "best" and value:
        return _best(log, value)
    tagged = next((line for line in newest_first(log) if ref in line.entry.tags), None)
    if tagged is not None:
        return tagged
    if _ID_PREFIX.fullmatch(ref):
        found = [line for line in newest_first(log) if line.entry.snapshot.startswith(ref)]
        if len(found) > 1:
            names = ", ".join(line.entry.snapshot for line in found[:4])
            raise UsageError(f"{ref!r} is the beginning of several snapshot ids ({names}): give more digits")
        if found:
            return found[0]
    raise _not_found(log, ref)


def _first(log: Log, accept: Callable[[Line], bool], ref: str) -> Line:
    found = next((line for line in newest_first(log) if accept(line)), None)
    if found is None:
        raise _not_found(log, ref)
    return found


def _best(log: Log, metric: str) -> Line:
    """The snapshot with the smallest value of a metric; of equals the newest."""
    best: tuple[float, Line] | None = None
    for line in newest_first(log):
        value = dict(line.entry.metrics).get(metric)
        if value is not None and float(value) == float(value) and (best is None or float(value) < best[0]):
            best = (float(value), line)
    if best is None:
        raise _not_found(log, f"best:{metric}")
    return best[1]


def _ancestor(log: Log, line: Line, generations: int, ref: str) -> Line:
    for _ in range(generations):
        parent = line.entry.parent
        found = next((other for other in newest_first(log) if other.leaf_hash == parent), None)
        if parent is None or found is None:
            raise NotFoundError(
                f"{ref}: snapshot {line.entry.snapshot} has no parent that is still there",
                kind="no_such_snapshot",
                where=ref,
            )
        line = found
    return line


def _not_found(log: Log, ref: str) -> NotFoundError:
    newest = next(newest_first(log), None)
    if newest is None:
        return NotFoundError(f"{ref}: the chain holds no snapshot yet", kind="no_snapshot", where=ref)
    return NotFoundError(
        f"{ref}: no such snapshot; the newest is {newest.entry.snapshot} at step {newest.entry.step} "
        f"('ciuic log' lists all)",
        kind="no_such_snapshot",
        where=ref,
    )


def parents(log: Log) -> dict[bytes, str]:
    """Snapshot id of every snapshot entry by its leaf hash, pruned ones included."""
    with log.lock:
        return dict(_index(log).names)
