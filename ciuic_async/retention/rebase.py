"""Re-basing: what living snapshots need of a segment that is mostly garbage is copied, so that the segment can go.

A segment whose writer was pruned stays as long as a living locator refers to one record in it. Where that keeps more
garbage than it serves, the records are copied as they are (a delta stays a delta, at the same depth) into a new segment
of the newest snapshot that needs them, and every snapshot that needs them gets a new locator generation. Manifests and
entries do not change. Order: the newest snapshot first, its segments before its locator; so whatever is published names
only what is published before it, and a crash between any two steps leaves every snapshot readable.

Nothing is deleted here, and nothing that is replaced may go before an entry is claimed: ``collect.py``.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace

from ciuic_async.codecs.decode import decode
from ciuic_async.errors import CiuicError, CommitConflictError, IntegrityError
from ciuic_async.events import logger
from ciuic_async.format import layout, segment
from ciuic_async.format.digest import digest
from ciuic_async.format.entry import SnapshotEntry
from ciuic_async.format.locator import ChunkLocation, Locator, SegmentReference
from ciuic_async.handoffs import EncodedChunk
from ciuic_async.pipeline.chunks import chunk_reader
from ciuic_async.pipeline.commit import Resolved, locator_generations, publish_rewritten, resolve, withdraw
from ciuic_async.segments.reader import SegmentReader
from ciuic_async.segments.reading import parse_header, read_into
from ciuic_async.segments.writer import SegmentWriter
from ciuic_async.stores.base import Store

NEEDED_SHARE = 0.5
"""A segment is given up when less than this share of it is needed: each byte copied then frees more than one."""

_FIRST_DRAWN, _DRAWN = 10**6, 10**9 - 2 * 10**6
"""Numbers of segments that a re-basing writes: beyond those of any snapshot (half an exabyte), within nine digits."""

Place = tuple[str, int]
"""Segment and offset of a record."""


@dataclass(frozen=True, slots=True)
class Record:
    """A record that living snapshots need; ``user`` is the newest of them, which will own the copy."""

    digest: bytes
    raw_size_bytes: int
    location: ChunkLocation
    user: str

    @property
    def place(self) -> Place:
        """Where it lies."""
        return self.location.segment.path, self.location.offset_bytes


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be copied, and what can go then.

    Attributes:
        records: all that is copied.
        emptied: segments that no locator of a living snapshot refers to afterwards.
        affected: living snapshots that get a new locator, newest first.
    """

    records: tuple[Record, ...] = ()
    emptied: frozenset[str] = frozenset()
    affected: tuple[SnapshotEntry, ...] = ()

    @property
    def moved_bytes(self) -> int:
        """Bytes of the records."""
        return sum(record.location.record_size_bytes for record in self.records)


@dataclass(slots=True)
class _Usage:
    """What living snapshots need of one segment."""

    segment: SegmentReference
    records: dict[int, Record] = field(default_factory=dict)
    users: set[str] = field(default_factory=set)
    stays: bool = False

    @property
    def needed_bytes(self) -> int:
        return sum(record.location.record_size_bytes for record in self.records.values())


def plan(store: Store, living: Sequence[SnapshotEntry]) -> Plan:
    """What is worth being copied when only these snapshots live; oldest first. Reads manifests and locators.

    Raises:
        CiuicError: one of them cannot be read.
    """
    owners = {entry.snapshot for entry in living}
    usage: dict[str, _Usage] = {}
    for entry in living:
        resolved = resolve(store, entry)
        is_newest = locator_generations(store, entry.snapshot)[-1] == resolved.locator.generation
        for record in _records(resolved):
            if layout.owner(record.location.segment.path) in owners:
                continue
            used = usage.setdefault(record.location.segment.path, _Usage(record.location.segment))
            used.users.add(entry.snapshot)
            before = used.records.get(record.location.offset_bytes)
            same = before is None or replace(before, user=record.user) == record
            # Locators that contradict each other, or one newer that is damaged: nothing to build upon.
            used.stays = used.stays or not same or not is_newest or used.segment != record.location.segment
            used.records[record.location.offset_bytes] = record
    chosen: list[_Usage] = []
    taken: set[tuple[str, bytes]] = set()
    for _, used in sorted(usage.items()):
        copies = {(record.user, record.digest) for record in used.records.values()}
        small = used.needed_bytes < NEEDED_SHARE * used.segment.size_bytes
        # A segment holds a chunk once: of two records of one chunk the second stays where it is.
        if small and not used.stays and len(copies) == len(used.records) and not copies & taken:
            chosen.append(used)
            taken |= copies
    return _worth_it(store, living, chosen)


def _worth_it(store: Store, living: Sequence[SnapshotEntry], chosen: Sequence[_Usage]) -> Plan:
    """The plan for these segments; an empty one if that writes more than it frees."""
    users = {user for used in chosen for user in used.users}
    affected = tuple(entry for entry in reversed(living) if entry.snapshot in users)
    records = tuple(record for used in chosen for record in used.records.values())
    cost_bytes = segment.DIRECT_ALIGNMENT_BYTES * len({record.user for record in records})
    cost_bytes += sum(
        segment.align_up(record.location.record_size_bytes, segment.ALIGNMENT_BYTES) for record in records
    )
    for entry in affected:
        newest = locator_generations(store, entry.snapshot)[-1]
        cost_bytes += store.size(layout.locator(entry.snapshot, newest)) or 0
    if cost_bytes >= sum(used.segment.size_bytes for used in chosen):
        return Plan()
    return Plan(records, frozenset(used.segment.path for used in chosen), affected)


def _records(resolved: Resolved) -> list[Record]:
    """Every record that a snapshot needs, bases included."""
    where, sizes, user = resolved.locator, resolved.manifest.distinct_chunks(), resolved.entry.snapshot
    own = [Record(chunk, sizes[chunk], place, user) for chunk, place in where.chunks.items()]
    return own + [Record(base, size, place, user) for base, (size, place) in where.bases.items()]


def carry_out(store: Store, planned: Plan) -> int:
    """Copy and publish; durable on return. Reads and writes one record at a time.

    A record that is damaged stays where it is, and so does its segment: only a warning tells.

    Returns:
        Bytes of the records that were copied.

    Raises:
        CommitConflictError: somebody else is doing the same; what was done so far is sound.
        StoreError: as well.
    """
    moved: dict[Place, ChunkLocation] = {}
    copied_bytes = 0
    for entry in planned.affected:
        resolved = resolve(store, entry)
        mine = [record for record in planned.records if record.user == entry.snapshot]
        mine.sort(key=lambda record: record.place)
        copied_bytes += _move(store, resolved, mine, moved)
    return copied_bytes


def _move(store: Store, resolved: Resolved, mine: Sequence[Record], moved: dict[Place, ChunkLocation]) -> int:
    """One snapshot's part: its segments and its locator. Adds to ``moved`` what then lies elsewhere."""
    snapshot = resolved.entry.snapshot
    writer = SegmentWriter(store, snapshot, first_number=_next_number(store, snapshot))
    published: list[str] = []
    copied: list[Record] = []
    try:
        with chunk_reader(store, where=resolved.locator, sizes=resolved.manifest.distinct_chunks()) as reader:
            for record in mine:
                try:
                    writer.append(_verified(store, resolved.locator, record, reader))
                except IntegrityError as error:
                    logger.warning("%s; it stays where it is: run 'ciuic verify'", error)
                    continue
                copied.append(record)
        written = writer.finish()
        new = {record.place: written.locations[record.digest] for record in copied}
        where = _replaced(resolved.locator, moved | new)
        if where is not None:
            publish_rewritten(store, written, where, published)
        moved.update(new)
    except BaseException as error:
        writer.abort()
        _withdraw(store, snapshot, published, error)
        raise
    return sum(record.location.record_size_bytes for record in copied)


def _withdraw(store: Store, snapshot: str, published: Sequence[str], error: BaseException) -> None:
    """Take back segments of which it is certain that no locator names them: somebody else's came before ours.

    Of any other failure the outcome may be unknown; gc sweeps what nobody refers to.
    """
    locators = [name for name in published if name.startswith(layout.LOCATORS)]
    if locators and isinstance(error, CommitConflictError):
        with suppress(CiuicError):
            text = store.read(locators[0], 1 << 28)
            names = [name for name in published if name.startswith(f"{layout.SEGMENTS}/{snapshot}/")]
            withdraw(store, [name for name in names if f'"{name}"'.encode() not in text])


def _replaced(where: Locator, moved: Mapping[Place, ChunkLocation]) -> Locator | None:
    """The next generation, with the new places; None if nothing of it was moved."""

    def now(place: ChunkLocation) -> ChunkLocation:
        return moved.get((place.segment.path, place.offset_bytes), place)

    chunks = {chunk: now(place) for chunk, place in where.chunks.items()}
    bases = {base: (size, now(place)) for base, (size, place) in where.bases.items()}
    if (chunks, bases) == (where.chunks, where.bases):
        return None
    return Locator(where.snapshot, where.generation + 1, chunks, bases)


def _verified(store: Store, where: Locator, record: Record, reader: SegmentReader) -> EncodedChunk:
    """The very bytes that were read, decoded and checked. Raises IntegrityError, StoreError."""
    location = record.location
    path, offset = record.place
    data = memoryview(bytearray(location.record_size_bytes))
    read_into(store, path, offset, data)
    header = parse_header(data, offset, path)
    found = (header.digest, header.raw_size_bytes, header.record_size_bytes, header.codec, header.depth)
    expected = (record.digest, record.raw_size_bytes, len(data), location.codec, location.depth)
    if found != expected:
        raise IntegrityError(f"{path}, record at {offset}: is not what a locator says", kind="wrong_record", where=path)
    payload = data[header.size_bytes :]
    raw = payload
    if header.codec != segment.CODEC_RAW:
        base = None
        if header.depth:
            place = where.place(header.base)
            if place is None or place.depth != header.depth - 1:
                raise IntegrityError(
                    f"{path}, record at {offset}: no locator says where its base lies", kind="missing_base", where=path
                )
            base = reader.read_chunk(header.base, header.raw_size_bytes, place)
        raw = memoryview(bytearray(header.raw_size_bytes))
        decode(header, payload, raw, base)
    if digest(raw) != record.digest:
        raise IntegrityError(
            f"{path}, record at {offset}: chunk {record.digest.hex()[:16]} does not match its digest",
            kind="digest_mismatch",
            where=path,
        )
    return EncodedChunk(header, (payload,))


def _next_number(store: Store, snapshot: str) -> int:
    """Of a segment that rank 0 of a snapshot has not written yet, nor does anybody else at this moment.

    Drawn: two nodes may prune at once, and on an object store a large file that is completed replaces what has its
    name. The snapshot's own segments have small numbers.
    """
    names = [file.name for file in store.list(f"{layout.SEGMENTS}/{snapshot}") if layout.is_known(file.name)]
    numbers = {int(name.rpartition("-")[2].removesuffix(".seg")) for name in names}
    while True:
        number = _FIRST_DRAWN + secrets.randbelow(_DRAWN)
        if not any(number <= one < number + _FIRST_DRAWN for one in numbers):
            return number
