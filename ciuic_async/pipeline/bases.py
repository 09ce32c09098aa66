"""What a delta may build on: the parent's bytes while they are still in memory, and where a reader finds them later."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from ciuic_async.codecs.base import Base
from ciuic_async.format.digest import DIGEST_SIZE_BYTES
from ciuic_async.format.locator import ChunkLocation
from ciuic_async.format.segment import MAX_DEPTH
from ciuic_async.handoffs import CapturePlan, PlannedChunk
from ciuic_async.staging.retained import Retained

Bases = dict[bytes, tuple[int, ChunkLocation]]
"""Digest of a base that its snapshot does not hold itself -> raw size, location (``Locator.bases``)."""


@dataclass(frozen=True, slots=True)
class Parent:
    """The durable snapshot a new one came from; its chunks are referenced instead of written again.

    ``bases`` are those of its locator, ``base_of`` the base of each chunk stored as a delta, as far as it is known:
    locators do not say it, so after a restore deltas are neither referenced nor built upon, and stored anew. ``since``:
    this run's entries from that index of the log on came after it.
    """

    snapshot: str
    leaf_hash: bytes
    locations: Mapping[bytes, ChunkLocation]
    bases: Mapping[bytes, tuple[int, ChunkLocation]] = field(default_factory=dict)
    base_of: Mapping[bytes, bytes] = field(default_factory=dict)
    since: int = 0


@dataclass(frozen=True, slots=True)
class InMemory:
    """The bytes of the parent, as long as nobody needs their slot. ``digests``: of every region, concatenated; empty
    where its bytes are not there."""

    snapshot: str
    plan: CapturePlan
    digests: tuple[bytes, ...]
    memory: Retained


class BaseFinder:
    """Finds the same tensor's bytes in the parent. May be used by several threads at once.

    Args:
        plan: of the new snapshot.
        known: the parent's chunks that the new snapshot may refer to. One that it holds itself is then at the same
            place for both, so that a reader finds the depth that its delta was made with.
        kept: the parent's bytes, or None when they are gone.
    """

    def __init__(self, plan: CapturePlan, known: Mapping[bytes, ChunkLocation], kept: InMemory | None) -> None:
        self._plan = plan
        self._known = known
        self._kept = kept
        self._same: dict[int, int] = {}
        if self._kept is not None:
            places = {region.path: number for number, region in enumerate(self._kept.plan.regions)}
            for number, region in enumerate(plan.regions):
                old = places.get(region.path)
                if old is None:
                    continue
                before = self._kept.plan.regions[old]
                if (before.size_bytes, before.item_size_bytes) == (region.size_bytes, region.item_size_bytes):
                    self._same[number] = old

    @contextmanager
    def base(self, chunk: PlannedChunk) -> Iterator[Base | None]:
        """The bytes at the same place of the same tensor, while the context lasts; None when there is no such base."""
        kept, old = self._kept, self._same.get(chunk.region)
        if kept is None or old is None:
            yield None
            return
        offset = chunk.address - self._plan.regions[chunk.region].address
        at = offset // self._plan.chunk_size_bytes * DIGEST_SIZE_BYTES
        digest = kept.digests[old][at : at + DIGEST_SIZE_BYTES]
        location = self._known.get(digest)  # no digest: no bytes
        if location is None or location.depth >= MAX_DEPTH:
            yield None
            return
        with kept.memory.reading() as memory:
            if memory is None:
                yield None
                return
            start = kept.plan.regions[old].address + offset
            yield Base(memory[start : start + chunk.size_bytes], digest, location.depth)


def needed_bases(
    own: Mapping[bytes, bytes],
    chunks: Mapping[bytes, ChunkLocation],
    sizes: Mapping[bytes, int],
    parent: Parent | None,
) -> tuple[Bases, dict[bytes, bytes]]:
    """All bases, at every depth, that a reader of ``chunks`` needs besides them; and the base of each delta among both.

    Args:
        own: base of each chunk that this snapshot stores as a delta.
        chunks: where the snapshot's chunks lie.
        sizes: their raw sizes; a base is as long as what is built on it.
    """
    if not any(location.depth for location in chunks.values()):
        return {}, {}
    assert parent is not None  # nothing else can be built upon
    bases: Bases = {}
    base_of: dict[bytes, bytes] = {}
    for chunk, location in chunks.items():
        above, depth = chunk, location.depth
        while depth:
            below = own[above] if above in own else parent.base_of[above]
            base_of[above] = below
            if below in chunks:  # its own bases are followed from there
                break
            if below in parent.locations:
                place = parent.locations[below]
            else:
                place = parent.bases[below][1]
            bases[below] = (sizes[chunk], place)
            above, depth = below, place.depth
    return bases, base_of
