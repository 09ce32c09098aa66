"""Where the chunks of a parent lie now: retention moves what living snapshots need out of segments that are to go.

A move copies records as they are and gives the snapshot a new locator generation; only then an entry is claimed that
lets the old places go. So a writer that looks here before each claim never leans on what goes: either its claim comes
before that entry, and retention sees what it leans on, or it has read that entry, and finds the new generation here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from ciuic_async.errors import IntegrityError
from ciuic_async.format.locator import ChunkLocation, Locator
from ciuic_async.pipeline.bases import Parent
from ciuic_async.pipeline.commit import CommitTarget, Resolved, locator_generations, read_locator, resolve
from ciuic_async.pipeline.history import newest_first
from ciuic_async.stores.base import Store


def newer_locator(target: CommitTarget, snapshot: str) -> Locator | None:
    """The newest locator of a living snapshot, if it was given more than its first one.

    Raises:
        IntegrityError: none of them can be read.
    """
    if len(locator_generations(target.store, snapshot)) < 2:
        return None
    line = next((line for line in newest_first(target.log) if line.entry.snapshot == snapshot), None)
    return None if line is None else resolve(target.store, line.entry).locator


def reread(store: Store, resolved: Resolved) -> Resolved | None:
    """The snapshot with a locator newer than the one it was resolved with; None when there is none."""
    if len(locator_generations(store, resolved.entry.snapshot)) <= resolved.locator.generation + 1:
        return None
    newest = read_locator(store, resolved.manifest)
    return replace(resolved, locator=newest) if newest.generation > resolved.locator.generation else None


def same_record(newest: Locator, chunk: bytes, place: ChunkLocation) -> ChunkLocation | None:
    """Where the record of a chunk lies now; None if there is none that can stand for it under what builds on it."""
    now = newest.place(chunk)
    if now is None or (now.depth, now.codec, now.record_size_bytes) != (
        place.depth, place.codec, place.record_size_bytes,
    ):  # fmt: skip
        return None
    return now


def up_to_date(target: CommitTarget, parent: Parent | None) -> Parent | None:
    """A parent whose places are those of its newest locator; without places where that cannot be read."""
    if parent is None or not parent.locations:
        return parent
    try:
        newest = newer_locator(target, parent.snapshot)
    except IntegrityError:
        return replace(parent, locations={}, bases={}, base_of={})
    if newest is None:
        return parent
    locations = {chunk: same_record(newest, chunk, place) for chunk, place in parent.locations.items()}
    bases = {chunk: (size, same_record(newest, chunk, place)) for chunk, (size, place) in parent.bases.items()}
    return replace(
        parent,
        locations={chunk: place for chunk, place in locations.items() if place is not None},
        bases={chunk: (size, place) for chunk, (size, place) in bases.items() if place is not None},
    )


def follow(newest: Locator, where: Locator, own: Callable[[ChunkLocation], bool]) -> Locator | None:
    """``where`` with every place that is not its ``own`` as ``newest`` has it: itself if nothing changes.

    Returns:
        None: something that ``where`` leans on is not in ``newest``.
    """
    chunks = {c: place if own(place) else same_record(newest, c, place) for c, place in where.chunks.items()}
    bases = {b: place if own(place) else same_record(newest, b, place) for b, (_, place) in where.bases.items()}
    if None in chunks.values() or None in bases.values():
        return None
    followed = Locator(
        where.snapshot,
        where.generation + 1,
        {chunk: place for chunk, place in chunks.items() if place is not None},
        {base: (where.bases[base][0], place) for base, place in bases.items() if place is not None},
    )
    return where if (followed.chunks, followed.bases) == (where.chunks, where.bases) else followed
