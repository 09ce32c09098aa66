"""Walk a chain and check every byte of it. Reads only, imports no torch.

Order: the chain's file, the log (head, slots, tiles, entries), then every snapshot that is not pruned: manifest,
locators, and with ``deep`` all chunk data and every segment as a whole. Leftovers of crashed writers are not problems:
they are no part of history, and gc sweeps them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from hashlib import sha256

from ciuic_async.errors import CiuicError, IntegrityError, NotFoundError
from ciuic_async.events import Event, Listener, notify
from ciuic_async.format import layout, locator
from ciuic_async.format.chain_file import LIMIT_BYTES as CHAIN_FILE_LIMIT_BYTES
from ciuic_async.format.chain_file import ChainFile
from ciuic_async.format.entry import Entry, KeyEntry, PruneEntry, SnapshotEntry
from ciuic_async.format.locator import Locator, SegmentReference
from ciuic_async.format.manifest import Manifest, dotted
from ciuic_async.pipeline.chunks import chunk_reader
from ciuic_async.pipeline.commit import locator_generations, read_manifest, resolve
from ciuic_async.segments.reader import SegmentReader
from ciuic_async.segments.whole import check_segment
from ciuic_async.stores.base import Store
from ciuic_async.transparency.audit import audit_log

LEVELS = ("signature", "tiles", "entries", "manifests", "chunk data")
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
        level: the deepest level checked, and "integrity only": no key was given by the caller, so who wrote the chain
            is not proven.
        snapshots: how many were checked.
        checked_bytes: of files read.
        notes: facts that are no problems (leftovers, unendorsed keys).
    """

    problems: tuple[Problem, ...]
    level: str
    snapshots: int
    checked_bytes: int
    notes: tuple[str, ...] = ()

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

    def report(self, error: CiuicError, *, snapshot: str = "", tensor: str = "", where: str = "") -> None:
        place = (error.where or where).partition(": ")[0]  # the file; the message has the field in it too
        self.problems.append(Problem(error.kind, place, str(error), snapshot, tensor))

    def attempt(self, check: Callable[[], None], **place: str) -> bool:
        """Run one check; what it finds becomes a problem and the walk goes on."""
        try:
            check()
        except CiuicError as error:
            self.report(error, **place)
            return False
        return True


def verify_store(store: Store, *, deep: bool = True, listener: Listener | None = None) -> VerifyReport:
    """Check a whole chain.

    Raises:
        NotFoundError: there is no chain.
    """
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
    audit = audit_log(store, chain.origin)
    walk.problems += [Problem(found.kind, found.where, found.message) for found in audit.problems]
    _check_chain_file(walk, data, chain.origin, audit.entries)
    living = _check_history(walk, audit.entries, audit.leaf_hashes)
    for number, entry in enumerate(living):
        found = len(walk.problems)
        _check_snapshot(walk, entry, deep=deep)
        if len(walk.problems) > found and _forget_given_up(walk, entry, found):
            _check_snapshot(walk, entry, deep=deep)
        notify(listener, Event("verify", entry.snapshot, entry.raw_bytes, total_bytes=number + 1))
    _check_names(walk, {e.snapshot for e in audit.entries if isinstance(e, SnapshotEntry)})
    gone = _forget_pruned(walk, chain.origin, audit.entries)
    return _report(walk, len(living) - len(gone), deep)


def _report(walk: _Walk, snapshots: int, deep: bool) -> VerifyReport:
    level = f"{LEVELS[-1] if deep else LEVELS[-2]} ({NO_KEY})"
    return VerifyReport(tuple(walk.problems), level, snapshots, walk.checked_bytes, tuple(walk.notes))


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


def _check_history(walk: _Walk, history: list[Entry], leaf_hashes: list[bytes]) -> list[SnapshotEntry]:
    """Rules between entries; the snapshots that must still be there, oldest first."""
    seen: dict[str, SnapshotEntry] = {}
    pruned: set[str] = set()
    names: set[bytes] = set()  # by which children name their parents
    for index, entry in enumerate(history):
        if isinstance(entry, SnapshotEntry):
            if entry.snapshot in seen:
                walk.problems.append(
                    Problem("bad_history", f"entry {index}", f"entry {index}: snapshot {entry.snapshot} twice")
                )
            if entry.parent is not None and entry.parent not in names:
                walk.problems.append(
                    Problem(
                        "bad_history",
                        f"entry {index}",
                        f"entry {index}: snapshot {entry.snapshot} names the parent {entry.parent.hex()[:16]}, which "
                        "is no snapshot before it",
                    )
                )
            names.add(leaf_hashes[index])
            seen[entry.snapshot] = entry
        elif isinstance(entry, PruneEntry):
            unknown = [snapshot for snapshot in entry.snapshots if snapshot not in seen]
            if unknown:
                walk.problems.append(
                    Problem(
                        "bad_history", f"entry {index}", f"entry {index}: prunes {unknown[0]}, which is not before it"
                    )
                )
            pruned.update(entry.snapshots)
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
        walk.problems.append(Problem("missing", name, f"{name}: is missing", entry.snapshot))
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
    for segment in newest.segments():
        hit = next((names.get(c, "") for c, place in newest.chunks.items() if place.segment == segment), "")
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
        if owner is not None and owner not in claimed:
            leftovers += 1
    if leftovers:
        walk.notes.append(f"{leftovers} files of snapshots that never became part of the chain; gc sweeps them")
