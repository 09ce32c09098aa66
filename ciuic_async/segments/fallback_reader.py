"""Chunks from whichever of two copies is good: read here, checked, and read there where the check fails."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress

from ciuic_async.errors import IntegrityError, StoreError
from ciuic_async.format.locator import ChunkLocation
from ciuic_async.handoffs import Decoder
from ciuic_async.segments.reader import BaseLookup, ChunkRequest, SegmentReader
from ciuic_async.stores.fallback import FallbackStore


class FallbackReader(SegmentReader):
    """A ``SegmentReader`` of two stores. What the first cannot give as its digest says is read from the second.

    Without ``verify`` bytes that were changed go unnoticed in both.
    """

    def __init__(
        self,
        store: FallbackStore,
        decode: Decoder,
        *,
        verify: bool = True,
        bases: BaseLookup | None = None,
        direct: bool = True,
    ) -> None:
        super().__init__(store.here, decode, verify=verify, bases=bases, direct=direct)
        self._pair = store
        self._there = SegmentReader(store.there, decode, verify=verify, bases=bases, direct=direct)

    def close(self) -> None:
        super().close()
        self._there.close()

    def read_chunk(self, digest: bytes, raw_size_bytes: int, location: ChunkLocation) -> memoryview:
        try:
            return super().read_chunk(digest, raw_size_bytes, location)
        except (IntegrityError, StoreError) as error:
            return self._pair.heal(error, lambda _: self._there.read_chunk(digest, raw_size_bytes, location))

    def read_run(self, requests: Sequence[ChunkRequest]) -> Iterator[memoryview]:
        done = 0
        with suppress(IntegrityError, StoreError):
            for raw in super().read_run(requests):
                yield raw
                done += 1
        # From the one that failed on, each by itself: most of them are good here.
        for request in requests[done:]:
            yield self.read_chunk(request.digest, request.raw_size_bytes, request.location)
