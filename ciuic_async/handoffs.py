"""The immutable values that pass between stages: the waist where modules meet. No torch here.

capture --(CapturePlan)--> staging --(StagedWindow)--> codecs --(EncodedChunk)--> segments --(ChunkLocation)--> commit
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

from ciuic_async.format.digest import Buffer, digest
from ciuic_async.format.jsontext import Hole, Template
from ciuic_async.format.locator import ChunkLocation, SegmentReference
from ciuic_async.format.manifest import Node, Path, Tree
from ciuic_async.format.segment import RecordHeader

__all__ = [
    "CapturePlan",
    "ChunkLocation",
    "Decoder",
    "EncodedChunk",
    "PlanMemo",
    "PlannedChunk",
    "PlannedTensor",
    "Region",
    "SegmentReference",
    "StagedWindow",
]


@dataclass(frozen=True, slots=True)
class Region:
    """One run of bytes that is cut into chunks: a tensor, or a pack of small tensors.

    ``address`` is its place in the plan's address space, a multiple of 4096: slots mirror this space, so a region lies
    page-aligned in memory. ``frozen``: it does not change from snapshot to snapshot, by the user's word.
    """

    address: int
    size_bytes: int
    item_size_bytes: int
    path: Path
    frozen: bool = False


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """A stored tensor before its digests are known; ``pack_offset_bytes`` is None when it has its region to itself."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    device: str
    region: int
    pack_offset_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class PlannedChunk:
    """A chunk by place: which region, and where in the plan's address space."""

    region: int
    address: int
    size_bytes: int
    item_size_bytes: int


@dataclass(slots=True)
class PlanMemo:
    """What was worked out once and holds for every snapshot of the same structure. Only the writer uses it."""

    part: Template | None = None
    """The manifest's only part, with holes for values, the snapshot's id and digests (``pipeline.describe``)."""
    raw_bytes: int = 0
    values: tuple[Node, ...] = ()
    texts: tuple[bytes, ...] = ()
    """JSON of ``values``, which are those of the last snapshot."""


@dataclass(frozen=True, slots=True)
class CapturePlan:
    """What one snapshot will hold, in order, before a byte is copied. Packs' regions come first.

    ``forms`` are the state's trees. Where a ``Hole`` stands, the node is ``values[hole.number]``: snapshots of one
    structure share everything but these values. ``memo`` is shared by them, too.
    """

    top: str
    forms: tuple[Tree, ...]
    tensors: tuple[PlannedTensor, ...]
    regions: tuple[Region, ...]
    pack_count: int
    chunk_size_bytes: int
    values: tuple[Node, ...] = ()
    memo: PlanMemo = field(default_factory=PlanMemo, compare=False, repr=False)

    @property
    def trees(self) -> tuple[Tree, ...]:
        """The state's trees without holes."""
        if not self.values:
            return self.forms
        return tuple(Tree(tree.section, tree.key, _filled(tree.node, self.values)) for tree in self.forms)

    @property
    def size_bytes(self) -> int:
        """Length of the address space."""
        return self.regions[-1].address + self.regions[-1].size_bytes if self.regions else 0

    def chunks(self) -> Iterator[PlannedChunk]:
        """All chunks in address order: packs, then tensors; the manifest's order."""
        for number, region in enumerate(self.regions):
            for start in range(0, region.size_bytes, self.chunk_size_bytes):
                size = min(self.chunk_size_bytes, region.size_bytes - start)
                yield PlannedChunk(number, region.address + start, size, region.item_size_bytes)


def _filled(node: Node, values: tuple[Node, ...]) -> Node:
    if isinstance(node, Hole):
        return values[node.number]
    if isinstance(node, list):
        return [_filled(item, values) for item in node]
    if isinstance(node, dict):
        return {name: _filled(item, values) for name, item in node.items()}
    return node


@dataclass(frozen=True, slots=True)
class StagedWindow:
    """Consecutive chunks whose bytes lie in host memory we own.

    ``memory[chunk.address - base : ...]`` are a chunk's bytes. The memory is read only, and valid until the slot it
    belongs to is released.
    """

    base: int
    chunks: tuple[PlannedChunk, ...]
    memory: memoryview
    digests: tuple[bytes, ...] | None = None
    """Of the chunks, where staging computed them; else the writer does. Empty for those that were not copied."""

    def bytes_of(self, chunk: PlannedChunk) -> memoryview:
        start = chunk.address - self.base
        return self.memory[start : start + chunk.size_bytes]

    def digest_of(self, chunk: PlannedChunk) -> bytes:
        return digest(self.bytes_of(chunk))


@dataclass(frozen=True, slots=True)
class EncodedChunk:
    """A record before it has a place. The payload's pieces together are ``header.stored_size_bytes`` long.

    Pieces may be views of a slot: they are valid as long as the window they come from.
    """

    header: RecordHeader
    payload: tuple[Buffer, ...]


class Decoder(Protocol):
    """The way back, chosen by ``header.codec``."""

    def __call__(self, header: RecordHeader, payload: Buffer, out: memoryview, base: memoryview | None = None) -> None:
        """Fill ``out`` (``header.raw_size_bytes`` long, writable) or raise ``IntegrityError``.

        ``header`` has passed ``parse_record_header``; ``payload`` is hostile (kind ``bad_payload``). ``base`` holds the
        checked bytes of the chunk ``header.base`` of a delta, apart from ``out``; of another length or missing it is
        kind ``bad_base``. Other codecs ignore it. What is decoded is not yet trusted: the caller checks the digest.
        """
