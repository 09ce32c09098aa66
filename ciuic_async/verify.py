"""Walk a chain and check every byte of it. Reads only, imports no torch.

Order: the chain's file, the log (head, slots, tiles, entries), who signed it (``trust``), then every snapshot that is
not pruned: manifest, locators, and with ``deep`` all chunk data and every segment as a whole; receipts. Leftovers of
crashed writers are not problems: they are no part of history, and gc sweeps them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from hashlib import sha256

from ciuic_async.errors import CiuicError, IntegrityError, NotFoundError, UsageError
from ciuic_async.events import Event, Listener, notify
from ciuic_async.format import layout, locator
from ciuic_async.format.chain_file import LIMIT_BYTES as CHAIN_FILE_LIMIT_BYTES
from ciuic_async.format.chain_file import ChainFile
from ciuic_async.format.entry import Entry, KeyEntry, PruneEntry, RollbackEntry, SnapshotEntry, TagEntry
from ciuic_async.format.locator import Locator, SegmentReference
from ciuic_async.format.manifest import Manifest, dotted
from ciuic_async.pipeline.chunks import chunk_reader
from ciuic_async.pipeline.commit import locator_generations, read_manifest, resolve
from ciuic_async.segments.reader import SegmentReader
from ciuic_async.segments.whole import check_segment
from ciuic_async.stores.base import Store
from ciuic_async.transparency import receipt
from ciuic_async.transparency.anchor import load_roots, timestamped
from ciuic_async.transparency.audit import LogAudit, audit_log
from ciuic_async.transparency.log import Log
from ciuic_async.transparency.note import Vkey
from ciuic_async.transparency.pins import Pins
from ciuic_async.transparency.policy import LIMIT_BYTES as POLICY_LIMIT_BYTES
from ciuic_async.transparency.policy import Policy
from ciuic_async.transparency.receipt import Receipt
from ciuic_async.trust import (
    FAILED,
    NOT_ASKED,
    OK,
    UNKNOWN,
    History,
    Level,
    Reader,
    Timestamps,
    Verdict,
    check_head,
    find_pin,
    judge,
    parse_keys,
)

LEVELS = ("signature", "tiles", "entries", "manifests", "chunk data")
FURTHER = ("pinned", "witnessed", "fresh", "timestamped")
NO_KEY = "integrity only"


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong. ``where`` is a file of the chain; ``snapshot`` and ``tensor`` may be empty."""

    kind: str
    where: str
    message: str
    snapshot: str = ""
    tensor: str = ""


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What verify found.

    Attributes:
        problems: everything that is wrong; empty means that all that was checked is as it was written.
        level: the deepest level reached without a gap up to "chunk data", and those of the further ones that hold;
            "integrity only": no key came from the caller, a policy or a pin, so who wrote the chain is not proven.
        snapshots: how many were checked.
        checked_bytes: of files read.
        notes: facts that are no problems (leftovers, unendorsed keys, what could not be noticed).
        levels: every level in order, with its state.
    """

    problems: tuple[Problem, ...]
    level: str
    snapshots: int
    checked_bytes: int
    notes: tuple[str, ...] = ()
    levels: tuple[Level, ...] = ()

    @property
    def ok(self) -> bool:
        return not self.problems


@dataclass(slots=True)
class _Walk:
    store: Store
    listener: Listener | None
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    checked_bytes: int = 0
    users: dict[str, list[str]] = field(default_factory=dict)
    """Snapshots that need a segment, by its path: it is checked as a whole for the first of them."""
    needed: set[str] = field(default_factory=set)
    """Segments that living snapshots need, whoever wrote them."""

    def report(self, error: CiuicError, *, snapshot: str = "", tensor: str = "", where: str = "") -> None:
        place = (error.where or where).partition(": ")[0]  # the file; the message has the field in it too
        unpruned = error.kind == "missing" and snapshot
        message = f"{error}, and no prune entry says that the snapshot was given up" if unpruned else str(error)
        self.problems.append(Problem(error.kind, place, message, snapshot, tensor))

    def attempt(self, check: Callable[[], None], **place: str) -> bool:
        """Run one check; what it finds becomes a problem and the walk goes on."""
        try:
            check()
        except CiuicError as error:
            self.report(error, **place)
            return False
        return True


def verify_store(
    store: Store,
    *,
    deep: bool = True,
    level: str | None = None,
    keys: Sequence[str | os.PathLike[str] | Vkey] = (),
    policy: Policy | None = None,
    endorsed: bool = False,
    max_age_s: float | None = None,
    pins: Pins | None = None,
    now_s: float | None = None,
    roots: str | os.PathLike[str] | None = None,
    listener: Listener | None = None,
) -> VerifyReport:
    """Check a whole chain. Only reads, but for the pin: that moves on to the head of a chain without problems.

    Args:
        deep: read all chunk data too.
        level: stop earlier: ``"manifests"`` is what ``deep=False`` does.
        keys: verifier keys of writers, or files of them: one of them must have signed the head.
        policy: more of them, and the witnesses that count.
        endorsed: entries of keys that are in neither are a problem.
        max_age_s: a chain without a newer sign of life is a problem.
        pins: the reader's; None: they are neither looked at nor moved.
        now_s: POSIX seconds; None: the clock's.
        roots: certificates (PEM) of the authorities whose time stamps count; None: they are not looked at.

    Raises:
        NotFoundError: there is no chain.
        UsageError: a level or a key that is none.
    """
    if level not in (None, *LEVELS[-2:]):
        raise UsageError(f"level={level!r}: expected 'manifests' or 'chunk data'")
    deep = deep and level != "manifests"
    if endorsed and not keys and (policy is None or not policy.logs):
        raise UsageError("endorsed: nobody was named whom to endorse: give keys, or a policy with log lines")
    stamps = None if roots is None else _timestamps(roots)
    reader = Reader(parse_keys(keys), policy, endorsed, max_age_s, pins, now_s, stamps)
    walk = _Walk(store, listener)
    try:
        data = store.read(layout.CHAIN_FILE, CHAIN_FILE_LIMIT_BYTES)
    except NotFoundError as error:
        if store.size(layout.LOG_HEAD) is None and not any(True for _ in store.list(layout.SLOTS)):
            raise NotFoundError(
                f"{store.url}: no chain here (there is no {layout.CHAIN_FILE})", kind="no_chain", where=store.url
            ) from error
        walk.problems.append(Problem("missing", layout.CHAIN_FILE, f"{layout.CHAIN_FILE}: is missing"))
        return _report(walk, 0, deep)
    except IntegrityError as error:
        walk.report(error, where=layout.CHAIN_FILE)
        return _report(walk, 0, deep)
    try:
        chain = ChainFile.decode(data)
    except CiuicError as error:
        walk.report(error, where=layout.CHAIN_FILE)
        return _report(walk, 0, deep)
    pin = find_pin(reader, chain.origin)
    audit = audit_log(store, chain.origin)
    walk.problems += [Problem(found.kind, found.where, found.message) for found in audit.problems]
    _check_chain_file(walk, data, chain.origin, audit.entries)
    history = History(audit.leaf_hashes, Log(store, chain.origin))
    verdict = judge(store, chain.origin, audit, history, reader, pin)
    walk.problems += [Problem(found.kind, found.where, found.message) for found in verdict.problems]
    walk.notes += verdict.notes
    living = _check_history(walk, audit.entries, audit.leaf_hashes)
    for number, entry in enumerate(living):
        found = len(walk.problems)
        _check_snapshot(walk, entry, deep=deep)
        if len(walk.problems) > found and _forget_given_up(walk, entry, found):
            _check_snapshot(walk, entry, deep=deep)
        notify(listener, Event("verify", entry.snapshot, entry.raw_bytes, total_bytes=number + 1))
    _check_receipts(walk, chain.origin, audit, history)
    _check_policy_copy(walk)
    _check_names(walk, {e.snapshot for e in audit.entries if isinstance(e, SnapshotEntry)})
    gone = _forget_pruned(walk, chain.origin, audit.entries)
    if pins is not None and verdict.may_pin and not walk.problems:
        try:
            pins.save(chain.origin, audit.head_file, history.had)
        except IntegrityError as error:  # another process moved it meanwhile, to a head that contradicts this one
            walk.report(error)
    return _report(walk, len(living) - len(gone), deep, verdict)


def _timestamps(roots: str | os.PathLike[str]) -> Timestamps:
    """Judges time stamps by these roots."""
    known = load_roots(os.fspath(roots))

    def judge_stamps(store: Store, audit: LogAudit) -> Level:
        origin = next((vkey.name for vkey in audit.keys.values()), None)
        if origin is None:
            return Level("timestamped", UNKNOWN, "the log announces no key")
        refused: list[CiuicError] = []
        try:
            log = Log(store, origin)
            log.refresh()
            found = timestamped(store, log, known, refused)
        except CiuicError as error:
            return Level("timestamped", FAILED, str(error))
        if found:
            index, when = found[-1]
            detail = f"the log up to entry {index} existed at {when:%Y-%m-%d %H:%M:%S} UTC"
            if refused:
                detail += f"; of {len(found) + len(refused)} tokens {len(refused)} do not hold: {refused[0]}"
            return Level("timestamped", OK, detail)
        return Level("timestamped", FAILED, str(refused[0])) if refused else Level("timestamped", UNKNOWN, "no token")

    return judge_stamps


def _report(walk: _Walk, snapshots: int, deep: bool, verdict: Verdict | None = None) -> VerifyReport:
    failed = {_level_of(problem) for problem in walk.problems}
    levels = [Level("signature", UNKNOWN) if verdict is None else verdict.signature]
    if "signature" in failed:
        levels[0] = Level("signature", FAILED, levels[0].detail)
    for name in LEVELS[1:]:
        if name in failed:
            levels.append(Level(name, FAILED))
        elif verdict is None or (name == LEVELS[-1] and not deep):
            levels.append(Level(name, UNKNOWN if verdict is None else NOT_ASKED))
        elif not verdict.entries or (not snapshots and name in LEVELS[-2:]):
            # That all of nothing is good says nothing: perhaps it was taken away.
            levels.append(Level(name, UNKNOWN, f"there is no {'snapshot' if verdict.entries else 'entry'}"))
        else:
            levels.append(Level(name, OK))
    further = [Level(name, UNKNOWN) for name in FURTHER] if verdict is None else verdict.further
    further = [Level(level.name, FAILED, level.detail) if level.name in failed else level for level in further]
    return VerifyReport(
        tuple(walk.problems),
        _summary(levels, further),
        snapshots,
        walk.checked_bytes,
        tuple(walk.notes),
        (*levels, *further),
    )


def _summary(levels: Sequence[Level], further: Sequence[Level]) -> str:
    """One line: how deep without a gap, and what holds besides."""
    reached = "none"
    proven = levels[0].state == OK
    for level in levels:
        if level.state != OK and (level.name != LEVELS[0] or level.state == FAILED):
            break
        if level.state == OK or level.name != LEVELS[0]:
            reached = level.name
    held = [f"{level.name} {level.detail.split(',')[0]}" if level.name == "witnessed" else level.name
            for level in further if level.state == OK]  # fmt: skip
    return ", ".join([reached, *held]) + ("" if proven else f" ({NO_KEY})")


def _level_of(problem: Problem) -> str:
    """The level that a problem breaks."""
    where, kind = problem.where, problem.kind
    if kind.startswith("pin_"):
        return "pinned"
    if kind in ("not_fresh", "not_timestamped"):
        return "fresh" if kind == "not_fresh" else "timestamped"
    if kind in ("bad_history", "unendorsed", "not_pinned") or where.startswith("entry "):
        return "entries"
    if where == layout.CHAIN_FILE:
        return "entries"
    if where == layout.LOG_HEAD:
        return "signature"
    if where in (layout.WITNESSED, layout.POLICY) or where.startswith(layout.RECEIPTS + "/"):
        return "witnessed"
    if where.startswith("log/"):
        return "tiles"
    return "chunk data" if where.startswith(layout.SEGMENTS + "/") or problem.tensor else "manifests"


def _check_chain_file(walk: _Walk, data: bytes, origin: str, history: list[Entry]) -> None:
    """Entry 0 is a key and pins ciuic.json."""
    if not history:
        # A chain whose creator died before its first entry has no problem. But one with entries that nobody can check
        # has: with another origin in ciuic.json no signature holds.
        if walk.problems:
            walk.problems.append(
                Problem(
                    "not_pinned",
                    layout.CHAIN_FILE,
                    f"{layout.CHAIN_FILE}: names the log {origin}, of which no entry could be verified; either this "
                    f"file was changed or {layout.slot(0)}",
                )
            )
        return
    first = history[0]
    if not isinstance(first, KeyEntry) or first.chain is None:
        walk.problems.append(Problem("bad_history", "entry 0", "entry 0: does not pin ciuic.json with its first key"))
    elif (len(data), sha256(data).digest()) != (first.chain.size_bytes, first.chain.sha256):
        walk.problems.append(
            Problem("digest_mismatch", layout.CHAIN_FILE, f"{layout.CHAIN_FILE}: is not the file that entry 0 pins")
        )


def _check_history(walk: _Walk, history: list[Entry], leaf_hashes: Sequence[bytes]) -> list[SnapshotEntry]:
    """Rules between entries; the snapshots that must still be there, oldest first."""
    seen: dict[str, SnapshotEntry] = {}
    by_leaf: dict[bytes, str] = {}
    pruned: set[str] = set()

    def bad(index: int, message: str) -> None:
        walk.problems.append(Problem("bad_history", f"entry {index}", f"entry {index}: {message}"))

    for index, entry in enumerate(history):
        match entry:
            case SnapshotEntry():
                if entry.snapshot in seen:
                    bad(index, f"snapshot {entry.snapshot} twice")
                if entry.parent is not None and entry.parent not in by_leaf:
                    parent = entry.parent.hex()[:16]
                    bad(index, f"snapshot {entry.snapshot} names the parent {parent}, which is no snapshot before it")
                seen[entry.snapshot] = entry
                by_leaf[leaf_hashes[index]] = entry.snapshot
            case PruneEntry():
                unknown = [snapshot for snapshot in entry.snapshots if snapshot not in seen]
                if unknown:
                    bad(index, f"prunes {unknown[0]}, which is not before it")
                pruned.update(entry.snapshots)
            case RollbackEntry():
                target = by_leaf.get(entry.target)
                if target is None:
                    bad(index, f"rolls back to {entry.target.hex()[:16]}, which is no snapshot before it")
                elif target in pruned:
                    bad(index, f"rolls back to {target}, which was pruned before it")
            case TagEntry(snapshot=str(snapshot)) if snapshot not in seen:
                bad(index, f"gives a tag to {snapshot}, which is not before it")
            case _:
                pass
    return [entry for snapshot, entry in seen.items() if snapshot not in pruned]


def _check_snapshot(walk: _Walk, entry: SnapshotEntry, *, deep: bool) -> None:
    try:
        content = read_manifest(walk.store, entry)
    except CiuicError as error:
        walk.report(error, snapshot=entry.snapshot)
        return
    walk.checked_bytes += entry.manifest.size_bytes
    newest: Locator | None = None
    distinct = content.distinct_chunks()
    try:
        generations = locator_generations(walk.store, entry.snapshot)
    except CiuicError as error:
        walk.report(error, snapshot=entry.snapshot)
        return
    if not generations:
        name = layout.locator(entry.snapshot, 0)
        walk.report(IntegrityError(f"{name}: is missing", kind="missing", where=name), snapshot=entry.snapshot)
    for generation in generations:
        name = layout.locator(entry.snapshot, generation)
        try:
            data = walk.store.read(name, locator.limit_bytes(len(distinct)))
            newest = locator.decode(data, entry.snapshot, generation, distinct)
        except CiuicError as error:
            walk.report(error, snapshot=entry.snapshot, where=name)
    if newest is None:
        return
    names = _tensor_names(content)
    walk.needed.update(segment.path for segment in newest.segments())
    chunk_in: dict[str, bytes] = {}
    for chunk, place in newest.chunks.items():
        chunk_in.setdefault(place.segment.path, chunk)
    for segment in newest.segments():
        hit = names.get(chunk_in.get(segment.path, b""), "")
        walk.attempt(
            lambda segment=segment: _check_size(walk.store, segment),  # type: ignore[misc]
            snapshot=entry.snapshot,
            tensor=hit,
        )
    if deep:
        _check_chunks(walk, entry, newest, distinct, names)


def _forget_pruned(walk: _Walk, origin: str, history: list[Entry]) -> set[str]:
    """Drop the problems of snapshots that were pruned meanwhile: a chain that is being trained on loses files rightly.

    Only what a signed prune entry after ``history`` names is let go; the damage of a segment that another snapshot
    needs stays a problem of that one.

    Returns:
        The snapshots whose problems were dropped.
    """
    if not any(problem.snapshot for problem in walk.problems):
        return set()
    entries = audit_log(walk.store, origin).entries
    if entries[: len(history)] != history:
        return set()  # not a continuation of what was checked: nothing it says excuses anything
    pruned = {name for entry in entries[len(history) :] if isinstance(entry, PruneEntry) for name in entry.snapshots}
    gone = {problem.snapshot for problem in walk.problems} & pruned
    kept = []
    for problem in walk.problems:
        if problem.snapshot not in gone:
            kept.append(problem)
            continue
        heir = next((user for user in walk.users.get(problem.where, ()) if user not in pruned), None)
        if heir is not None:
            kept.append(replace(problem, snapshot=heir, tensor=""))
    walk.problems = kept
    if gone:
        walk.notes.append(f"{len(gone)} snapshots were pruned while they were being checked")
    return gone


def _forget_given_up(walk: _Walk, entry: SnapshotEntry, found: int) -> bool:
    """Drop problems since ``found`` that are no damage: retention moved what was there, and a new locator says where.

    Returns:
        Whether there were any: then the snapshot must be looked at again.
    """
    try:
        named = {segment.path for segment in resolve(walk.store, entry).segments}
    except CiuicError:
        return False
    left = [one for one in walk.problems[found:] if one.kind != "missing" or one.where in named]
    gave_up = len(left) < len(walk.problems) - found
    walk.problems[found:] = left
    return gave_up


def _tensor_names(content: Manifest) -> dict[bytes, str]:
    """A tensor for every chunk, to name in problems."""
    names: dict[bytes, str] = {}
    for tensor in content.tensors:
        for shard in tensor.shards:
            chunks: Iterable[bytes] = shard.chunk_digests()
            if shard.pack is not None:
                chunks = [content.packs[shard.pack[0]].digest]
            for chunk in chunks:
                names.setdefault(chunk, dotted(tensor.path))
    return names


def _check_chunks(
    walk: _Walk, entry: SnapshotEntry, where: Locator, distinct: dict[bytes, int], names: dict[bytes, str]
) -> None:
    """Every segment as a whole, then every chunk through its own digest."""
    for segment in where.segments():
        users = walk.users.setdefault(segment.path, [])
        users.append(entry.snapshot)
        if len(users) > 1:
            continue
        if walk.attempt(lambda segment=segment: _check_whole(walk.store, segment), snapshot=entry.snapshot):  # type: ignore[misc]
            walk.checked_bytes += segment.size_bytes
    # Not past the page cache: the segments have just been read through it.
    with chunk_reader(walk.store, where=where, sizes=distinct, direct=False) as reader:
        for chunk, place in where.chunks.items():
            walk.attempt(
                lambda chunk=chunk, place=place: _read(reader, chunk, distinct[chunk], place),  # type: ignore[misc]
                snapshot=entry.snapshot,
                tensor=names.get(chunk, ""),
                where=place.segment.path,
            )


def _check_size(store: Store, segment: SegmentReference) -> None:
    size = store.size(segment.path)
    if size != segment.size_bytes:
        kind, found = ("missing", "is missing") if size is None else ("truncated", f"has {size} bytes")
        raise IntegrityError(
            f"{segment.path}: {found}, expected {segment.size_bytes} bytes", kind=kind, where=segment.path
        )


def _check_whole(store: Store, segment: SegmentReference) -> None:
    check_segment(store, segment)


def _read(reader: SegmentReader, chunk: bytes, size: int, place: locator.ChunkLocation) -> None:
    reader.read_chunk(chunk, size, place)


def _check_receipts(walk: _Walk, origin: str, audit: LogAudit, history: History) -> None:
    """Every receipt that is there is of its snapshot, under a head that this log had.

    Each is read twice, so that one is in memory at a time and all roots are found in one pass.
    """
    places = {e.snapshot: index for index, e in enumerate(audit.entries) if isinstance(e, SnapshotEntry)}
    sizes: dict[str, int] = {}

    def read(owner: str) -> Receipt:
        name = layout.receipt(owner)
        return Receipt.decode(walk.store.read(name, receipt.LIMIT_BYTES), name)

    def look(owner: str) -> None:
        with suppress(NotFoundError):  # it was swept since it was listed
            sizes[owner] = read(owner).claimed_head(origin, layout.receipt(owner)).size

    def check(owner: str) -> None:
        with suppress(NotFoundError):
            name, index, found = layout.receipt(owner), places[owner], read(owner)
            head = check_head(found.head, origin, audit, history, name).head
            if found.index != index:
                raise IntegrityError(
                    f"{name}: a receipt of entry {found.index}, the snapshot's is entry {index}",
                    kind="proof_invalid",
                    where=name,
                )
            receipt.check_leaf(found, history.leaf_hash(index), head, name)

    for file in walk.store.list(layout.RECEIPTS):
        owner = layout.owner(file.name)
        if owner in places and file.name == layout.receipt(owner):
            walk.attempt(lambda owner=owner: look(owner), snapshot=owner, where=file.name)  # type: ignore[misc]
    history.prepare(sizes.values())
    for owner in sizes:
        walk.attempt(lambda owner=owner: check(owner), snapshot=owner, where=layout.receipt(owner))  # type: ignore[misc]


def _check_policy_copy(walk: _Walk) -> None:
    """``log/policy.txt`` can be read. It is never trusted: whoever writes the store writes it."""
    try:
        Policy.parse(walk.store.read(layout.POLICY, POLICY_LIMIT_BYTES), layout.POLICY)
    except NotFoundError:
        return
    except CiuicError as error:
        walk.report(error, where=layout.POLICY)
        return
    walk.notes.append(f"{layout.POLICY} is a copy for convenience: nothing in it was trusted")


def _check_names(walk: _Walk, claimed: set[str]) -> None:
    """Files that the format does not know, and leftovers that are no part of history."""
    leftovers = 0
    for file in walk.store.list():
        if file.name.startswith("log/"):
            continue  # the audit has looked at each
        if not layout.is_known(file.name):
            walk.problems.append(
                Problem("unknown_file", file.name, f"{file.name}: no such file belongs to a chain; who put it there?")
            )
            continue
        owner = layout.owner(file.name)
        if owner is not None and owner not in claimed and file.name not in walk.needed:
            leftovers += 1
    if leftovers:
        walk.notes.append(f"{leftovers} files of snapshots that never became part of the chain; gc sweeps them")
