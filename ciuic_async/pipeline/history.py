"""What the entries of a log mean together (docs/design/004-chain.md): which snapshots there are, which is the latest,
what a ref names.

A rollback is a jump backwards. What a walk from the end of the log meets, following the jumps, is the *line*; living
snapshots that it does not meet are abandoned.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from weakref import WeakKeyDictionary

from ciuic_async.errors import NotFoundError, UsageError
from ciuic_async.format.entry import Entry, PruneEntry, RollbackEntry, SnapshotEntry, TagEntry
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


# --- walking backwards: only as much of the log is read as is asked for -----------------------------------------------


def the_line(log: Log) -> Iterator[Line]:
    """Living snapshots from the latest on, following rollbacks."""
    size = len(log)
    for given, line in enumerate(_walk(log, size)):
        if line is None:
            # A history that has one invalid rollback may have very many, each a search through the whole log.
            yield from _read_index(log, size).line()[::-1][given:]
            return
        yield line


def _walk(log: Log, size: int) -> Iterator[Line | None]:
    """The line of the first ``size`` entries, lazily; None and no more at a rollback that is invalid."""
    pruned: set[str] = set()
    jump: bytes | None = None  # to what
    pruned_since: set[str] = set()  # by entries that the jump passes over
    for index in range(size - 1, -1, -1):
        entry = log.entry(index)
        if isinstance(entry, PruneEntry):
            (pruned if jump is None else pruned_since).update(entry.snapshots)
        elif isinstance(entry, RollbackEntry):
            if jump is None:
                jump = entry.target
                pruned_since = set()
        elif isinstance(entry, SnapshotEntry):
            if jump is not None and log.leaf_hash(index) == jump:
                if entry.snapshot in pruned_since:  # to one that was gone by then
                    break
                pruned |= pruned_since
                jump = None
            if jump is None and entry.snapshot not in pruned:
                yield Line(index, entry, log.leaf_hash(index))
    if jump is not None:
        yield None


def newest_first(log: Log) -> Iterator[Line]:
    """All living snapshots in the reverse order of the log, abandoned ones too."""
    pruned: set[str] = set()
    for index, entry in log.reversed_entries():
        if isinstance(entry, PruneEntry):
            pruned.update(entry.snapshots)
        elif isinstance(entry, SnapshotEntry) and entry.snapshot not in pruned:
            yield Line(index, entry, log.leaf_hash(index))


def is_live(log: Log, snapshot: str) -> bool:
    """Whether the log has this snapshot and no later entry prunes it."""
    return any(line.entry.snapshot == snapshot for line in newest_first(log))


def tagged(log: Log, name: str) -> Line | None:
    """The snapshot that has a tag: the one that was given it last, if that is not pruned."""
    pruned: set[str] = set()
    bearer: str | None = None
    for index, entry in log.reversed_entries():
        if isinstance(entry, PruneEntry):
            pruned.update(entry.snapshots)
        elif isinstance(entry, TagEntry) and entry.name == name and bearer is None:
            if entry.snapshot is None:
                return None
            bearer = entry.snapshot
        elif isinstance(entry, SnapshotEntry) and (entry.snapshot == bearer or (bearer is None and name in entry.tags)):
            return None if entry.snapshot in pruned else Line(index, entry, log.leaf_hash(index))
    return None


# --- the whole log, read once -----------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Index:
    """What was read of a log so far. A log only grows, so each entry is read once in the life of its object."""

    size: int = 0
    living: dict[str, Line] = field(default_factory=dict)
    names: dict[bytes, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    newest: int | None = None
    """The snapshot, pruned or not, that the line ends with; like those below by the index of its entry."""
    before: dict[int, int | None] = field(default_factory=dict)
    """Of every snapshot the one that the line had before it when it was new: always a smaller index."""
    bearers: dict[int, Line] = field(default_factory=dict)
    """Living snapshots."""
    numbers: dict[bytes, int] = field(default_factory=dict)
    """The last snapshot that has a leaf hash."""

    def add(self, number: int, entry: Entry, leaf_hash: bytes) -> None:
        match entry:
            case SnapshotEntry():
                self._forget(entry.snapshot)  # one id twice is no valid history: the last one counts
                self.living[entry.snapshot] = self.bearers[number] = Line(number, entry, leaf_hash)
                self.before[number], self.newest = self.newest, number
                self.names[leaf_hash] = entry.snapshot
                self.numbers[leaf_hash] = number
                self.tags.update(dict.fromkeys(entry.tags, entry.snapshot))
            case PruneEntry():
                for snapshot in entry.snapshots:
                    self._forget(snapshot)
            case RollbackEntry(target=target):
                if (wanted := self.numbers.get(target)) in self.bearers:
                    self.newest = wanted
            case TagEntry(name=name, snapshot=None):
                self.tags.pop(name, None)
            case TagEntry(name=name, snapshot=str(snapshot)):
                self.tags[name] = snapshot
            case _:
                pass
        self.size = number + 1

    def line(self) -> list[Line]:
        """What ``the_line`` gives, in the order of the log, without reading the log again."""
        found: list[Line] = []
        self.newest = at = self._living_from(self.newest)
        while at is not None:
            found.append(self.bearers[at])
            # Pruning is final: who was passed over once need not be met again.
            earlier = self._living_from(self.before[at])
            self.before[at] = earlier
            at = earlier
        return found[::-1]

    def _living_from(self, at: int | None) -> int | None:
        while at is not None and at not in self.bearers:
            at = self.before[at]
        return at

    def _forget(self, snapshot: str) -> None:
        gone = self.living.pop(snapshot, None)
        if gone is not None:
            del self.bearers[gone.index]


def _read_index(log: Log, size: int) -> _Index:
    """What the first ``size`` entries mean, whatever was appended since."""
    index = _Index()
    for number in range(size):
        index.add(number, log.entry(number), log.leaf_hash(number))
    return index


_indexes: WeakKeyDictionary[Log, _Index] = WeakKeyDictionary()


def _index(log: Log) -> _Index:
    # Under the log's own lock and no other: appending holds it when it asks for the living snapshots.
    with log.lock:
        index = _indexes.setdefault(log, _Index())
        for number, entry in log.entries(index.size):
            index.add(number, entry, log.leaf_hash(number))
        return index


def live_snapshots(log: Log) -> list[Line]:
    """All living snapshots in the order of the log, abandoned ones too."""
    with log.lock:
        return list(_index(log).living.values())


def parents(log: Log) -> dict[bytes, str]:
    """Snapshot id of every snapshot entry by its leaf hash, pruned ones included."""
    with log.lock:
        return dict(_index(log).names)


def tags(log: Log) -> dict[str, tuple[str, ...]]:
    """The tags of every living snapshot that has one, in the order in which they were given."""
    with log.lock:
        index = _index(log)
        found: dict[str, tuple[str, ...]] = {}
        for name, snapshot in index.tags.items():
            if snapshot in index.living:
                found[snapshot] = (*found.get(snapshot, ()), name)
        return found


def for_retention(log: Log) -> list[SnapshotEntry]:
    """All living snapshots for a policy, with the tags that they have now: abandoned ones first, the latest last."""
    with log.lock:
        line = [one.entry.snapshot for one in _index(log).line()]
        living = {one.entry.snapshot: one.entry for one in live_snapshots(log)}
        names = tags(log)
        on_line = set(line)
        order = [*(snapshot for snapshot in living if snapshot not in on_line), *line]
        return [replace(living[snapshot], tags=names.get(snapshot, ())) for snapshot in order]


# --- refs -------------------------------------------------------------------------------------------------------------


def resolve_ref(log: Log, ref: str) -> Line:
    """What a ref means: ``latest``, ``latest~2``, ``step:1200``, ``best:loss``, a tag, an id or a unique prefix.

    ``step:`` looks along the line first, then at what is abandoned; ``best:`` at everything.

    Raises:
        UsageError: not a ref.
        NotFoundError: kind ``no_snapshot`` (there is none at all) or ``no_such_snapshot``; says what there is.
    """
    if not isinstance(ref, str) or not ref:
        raise UsageError(f"a ref is a text such as 'latest', 'step:100' or a snapshot id, found {ref!r}")
    match = _ANCESTOR.fullmatch(ref)
    if match and match[1]:
        return _ancestor(log, resolve_ref(log, match[1]), int(match[2]), ref)
    found: Line | None = None
    kind, _, value = ref.partition(":")
    if ref == "latest":
        found = next(the_line(log), None)
    elif kind == "step" and _NUMBER.fullmatch(value):
        wanted = int(value)
        found = _first(the_line(log), wanted) or _first(newest_first(log), wanted)
    elif kind == "best" and value:
        found = _best(log, value)
    else:
        found = tagged(log, ref) or _by_id(log, ref)
    if found is None:
        raise _not_found(log, ref)
    return found


def _first(lines: Iterator[Line], step: int) -> Line | None:
    return next((line for line in lines if line.entry.step == step), None)


def _by_id(log: Log, ref: str) -> Line | None:
    """A whole id or a prefix that only one snapshot has. Raises UsageError."""
    if not _ID_PREFIX.fullmatch(ref):
        return None
    found = [line for line in newest_first(log) if line.entry.snapshot.startswith(ref)]
    if len(found) > 1:
        names = ", ".join(line.entry.snapshot for line in found[:4])
        raise UsageError(f"{ref!r} is the beginning of several snapshot ids ({names}): give more digits")
    return found[0] if found else None


def _best(log: Log, metric: str) -> Line | None:
    """The snapshot with the smallest value of a metric; of equals the newest."""
    best: tuple[float, Line] | None = None
    for line in newest_first(log):
        value = dict(line.entry.metrics).get(metric)
        if value is not None and float(value) == float(value) and (best is None or float(value) < best[0]):
            best = (float(value), line)
    return None if best is None else best[1]


def _ancestor(log: Log, line: Line, generations: int, ref: str) -> Line:
    with log.lock:
        index = _index(log)
        bearers = {one.leaf_hash: one for one in index.bearers.values()} if generations else {}
    for _ in range(generations):
        parent = line.entry.parent
        found = None if parent is None else bearers.get(parent)
        if found is None:
            raise NotFoundError(
                f"{ref}: snapshot {line.entry.snapshot} has no parent that is still there",
                kind="no_such_snapshot",
                where=ref,
            )
        line = found
    return line


def _not_found(log: Log, ref: str) -> NotFoundError:
    newest = next(the_line(log), None)
    if newest is None:
        return NotFoundError(f"{ref}: the chain holds no snapshot yet", kind="no_snapshot", where=ref)
    return NotFoundError(
        f"{ref}: no such snapshot; the newest is {newest.entry.snapshot} at step {newest.entry.step} "
        f"('ciuic log' lists all)",
        kind="no_such_snapshot",
        where=ref,
    )
