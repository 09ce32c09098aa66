"""A chain that goes on elsewhere under a name of its own: ``ciuic chain fork``.

The way out for a run that was copied, or whose key was lost: the new chain has a new origin and begins with an entry
that quotes the old one's last head. Every living snapshot is carried over, with all that it needs; the old chain is
only read. What the pin says of the old one is not asked: that it contradicts the pin is a reason to fork.

Snapshots keep their ids, so that manifests and segments are the same bytes. Their entries are made anew, since parents
are named by leaf hashes: first those on the line, then those that a rollback abandoned, then a rollback to the latest.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace

from ciuic_async.arguments import check_text
from ciuic_async.chain import Previous, SnapshotChain
from ciuic_async.errors import IntegrityError, NotFoundError, UsageError
from ciuic_async.format import layout, locator, merkle
from ciuic_async.format.chain_file import LIMIT_BYTES as CHAIN_FILE_LIMIT_BYTES
from ciuic_async.format.chain_file import ChainFile
from ciuic_async.format.entry import FileReference, NoteEntry, RollbackEntry, SnapshotEntry
from ciuic_async.pipeline.commit import publish_copies, resolve
from ciuic_async.pipeline.commit import read_root as read_manifest_root
from ciuic_async.pipeline.history import live_snapshots, tags, the_line
from ciuic_async.segments.whole import check_segment
from ciuic_async.stores.base import Store
from ciuic_async.stores.resolve import resolve as resolve_store
from ciuic_async.transparency import note
from ciuic_async.transparency.log import Log

ENTRIES_PER_SLOT = 1000
_QUOTED_BYTES = 32 << 10
"""Of a head with more cosignatures than fit into an entry only the log's own signature is quoted."""


@dataclass(frozen=True, slots=True)
class Fork:
    """What a fork made."""

    origin: str
    previous_origin: str
    previous_size: int
    snapshots: int
    copied_bytes: int


def fork(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    reason: str,
    key: str | os.PathLike[str] | None = None,
) -> Fork:
    """Make a chain that goes on where another stands. Durable on return.

    Args:
        source: the old chain; only read.
        destination: where the new one is made; there must be no chain yet.
        reason: for its history.
        key: signs; as for ``SnapshotChain``.

    Raises:
        NotFoundError: there is no old chain, or it has no log head.
        UsageError: kind ``chain_exists``.
        IntegrityError: the old one is damaged where a living snapshot needs it. What was made of the new one has no
            snapshot, and can be deleted.
    """
    check_text("reason", reason)
    with closing(resolve_store(destination)) as place:
        if place.size(layout.CHAIN_FILE) is not None or any(True for _ in place.list()):
            raise UsageError(
                f"{place.url}: there is something already; a fork needs a place of its own", kind="chain_exists"
            )
    with closing(resolve_store(source)) as old:
        file = _chain_file(old)
        log = Log(old, file.origin)
        log.refresh()
        quoted = _quoted_head(old, log)
        carried = _entries(log)
        with SnapshotChain(destination, key=key, previous=Previous(quoted, file)) as chain:
            copied = sum(_carry(old, chain.store, entry) for entry in carried)
            _append(chain, log, carried, reason)
            return Fork(chain.origin, file.origin, len(log), len(carried), copied)


def _chain_file(store: Store) -> ChainFile:
    try:
        return ChainFile.decode(store.read(layout.CHAIN_FILE, CHAIN_FILE_LIMIT_BYTES))
    except NotFoundError as error:
        raise NotFoundError(
            f"{store.url}: no chain here (there is no {layout.CHAIN_FILE})", kind="no_chain", where=store.url
        ) from error


def _quoted_head(store: Store, log: Log) -> str:
    """The old log's head, a signed note. One that is behind the slots says less, and nothing wrong."""
    data = store.read(layout.LOG_HEAD, note.LIMIT_BYTES)
    known = {(log.origin, key_id): note.parse_vkey(vkey) for key_id, vkey in log.known_keys().items()}
    parsed = note.parse(data, layout.LOG_HEAD)
    note.verify_note(parsed, known, layout.LOG_HEAD)
    note.parse_head(parsed.text, log.origin, layout.LOG_HEAD)
    if len(data) > _QUOTED_BYTES:
        return note.format_note(parsed.text, tuple(item for item in parsed.signatures if item.name == log.origin))
    return data.decode()


def _entries(log: Log) -> list[SnapshotEntry]:
    """The entries of the living snapshots for a new log, in its order: the line first, its newest last."""
    living = {line.leaf_hash: line for line in live_snapshots(log)}
    names = tags(log)
    new_hashes: dict[bytes, bytes | None] = {}
    made: dict[str, SnapshotEntry] = {}
    for index, entry in log.entries():
        if not isinstance(entry, SnapshotEntry):
            continue
        leaf = log.leaf_hash(index)
        parent = None if entry.parent is None else new_hashes.get(entry.parent)
        if leaf not in living:
            new_hashes[leaf] = parent  # pruned: its children descend from the nearest that is carried over
            continue
        made[entry.snapshot] = replace(entry, parent=parent, tags=names.get(entry.snapshot, ()))
        new_hashes[leaf] = merkle.leaf_hash(made[entry.snapshot].encode())
    line = [one.entry.snapshot for one in the_line(log)][::-1]
    abandoned = [snapshot for snapshot in made if snapshot not in set(line)]
    return [made[snapshot] for snapshot in (*line, *abandoned)]


def _carry(old: Store, new: Store, entry: SnapshotEntry) -> int:
    """Copy all that a snapshot needs, whoever wrote it, and check it where it arrives; how many bytes."""
    found = resolve(old, entry)
    missing = [segment for segment in found.segments if new.size(segment.path) is None]
    files = [(segment.path, segment.size_bytes) for segment in missing]
    files += [(part.path, part.size_bytes) for part in _manifest_files(old, entry)]
    where = replace(found.locator, generation=0)
    data = where.encode()
    publish_copies(old, new, files, [(layout.locator(entry.snapshot, 0), data)])
    for segment in missing:
        check_segment(new, segment)
    arrived = resolve(new, entry)
    if arrived.locator != locator.decode(data, entry.snapshot, 0, arrived.manifest.distinct_chunks()):
        raise IntegrityError(f"{layout.locator(entry.snapshot, 0)}: did not arrive as it was sent", kind="copy_differs")
    return sum(size for _, size in files) + len(data)


def _manifest_files(old: Store, entry: SnapshotEntry) -> Iterator[FileReference]:
    yield from read_manifest_root(old, entry).parts
    yield entry.manifest


def _append(chain: SnapshotChain, log: Log, carried: list[SnapshotEntry], reason: str) -> None:
    target = chain.target()
    for start in range(0, len(carried), ENTRIES_PER_SLOT):
        group = [entry.encode() for entry in carried[start : start + ENTRIES_PER_SLOT]]
        target.append(lambda _, group=group: group)  # type: ignore[misc]
    said = f"goes on from {log.origin} at {len(log)} entries" + (f": {reason}" if reason else "")
    last = [NoteEntry(chain.common(), said).encode()]
    latest = next(the_line(log), None)
    if latest is not None and carried[-1].snapshot != latest.entry.snapshot:
        newest = next(entry for entry in carried if entry.snapshot == latest.entry.snapshot)
        target_hash = merkle.leaf_hash(newest.encode())
        last.append(RollbackEntry(chain.common(), target_hash, "the latest of the chain before").encode())
    target.append(lambda _: last)
