"""The immutable values that pass between stages: the waist where modules meet. No torch here.

capture --(CapturePlan)--> staging --(StagedWindow)--> codecs --(EncodedChunk)--> segments --(ChunkLocation)--> commit
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from ciuic_async.format.digest import Buffer
from ciuic_async.format.locator import ChunkLocation, SegmentReference
from ciuic_async.format.manifest import Path, Tree
from ciuic_async.format.segment import RecordHeader

__all__ = [
    "CapturePlan",
    "ChunkLocation",
    "Decoder",
    "EncodedChunk",
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
    page-aligned in memory.
    """

    address: int
    size_bytes: int
    item_size_bytes: int
    path: Path


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


@dataclass(frozen=True, slots=True)
class CapturePlan:
    """What one snapshot will hold, in order, before a byte is copied. Packs' regions come first."""

    top: str
    trees: tuple[Tree, ...]
    tensors: tuple[PlannedTensor, ...]
    regions: tuple[Region, ...]
    pack_count: int
    chunk_size_bytes: int

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


@dataclass(frozen=True, slots=True)
class StagedWindow:
    """Consecutive chunks whose bytes lie in host memory we own.

    ``memory[chunk.address - base : ...]`` are a chunk's bytes. The memory is read only, and valid until the slot it
    belongs to is released.
    """

    base: int
    chunks: tuple[PlannedChunk, ...]
    memory: memoryview

    def bytes_of(self, chunk: PlannedChunk) -> memoryview:
        start = chunk.address - self.base
        return self.memory[start : start + chunk.size_bytes]


@dataclass(frozen=True, slots=True)
class EncodedChunk:
    """A record before it has a place. The payload's pieces together are ``header.stored_size_bytes`` long.

    Pieces may be views of a slot: they are valid as long as the window they come from.
    """

    header: RecordHeader
    payload: tuple[Buffer, ...]


class Decoder(Protocol):
    """The way back, chosen by ``header.codec``."""

    def __call__(self, header: RecordHeader, payload: Buffer, out: memoryview) -> None:
        """Fill ``out`` (``header.raw_size_bytes`` long, writable) or raise ``IntegrityError`` (kind ``bad_payload``).

        ``header`` has passed ``parse_record_header``; ``payload`` is hostile. What is decoded is not yet trusted: the
        caller checks the digest.
        """
