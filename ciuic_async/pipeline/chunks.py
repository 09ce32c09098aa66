"""Chunks by location: where reading segments and decoding meet."""

from __future__ import annotations

from collections.abc import Mapping

from ciuic_async.codecs.decode import decode
from ciuic_async.format.locator import ChunkLocation, Locator
from ciuic_async.segments.fallback_reader import FallbackReader
from ciuic_async.segments.reader import SegmentReader
from ciuic_async.stores.base import Store
from ciuic_async.stores.fallback import FallbackStore


def chunk_reader(
    store: Store,
    *,
    verify: bool = True,
    where: Locator | None = None,
    sizes: Mapping[bytes, int] | None = None,
    direct: bool = True,
) -> SegmentReader:
    """A reader that knows every codec of this version; see ``SegmentReader``. Close it, or use it in a ``with``.

    Args:
        where: says where the bases of deltas lie. Without it a delta is an error (kind ``missing_base``).
        sizes: raw sizes of the chunks that ``where`` has and that may be bases: ``Manifest.distinct_chunks()``.
        direct: read past the page cache where the store can.
    """
    known = sizes or {}

    def base(digest: bytes) -> tuple[int, ChunkLocation] | None:
        if where is None:
            return None
        if digest in where.bases:
            return where.bases[digest]
        return (known[digest], where.chunks[digest]) if digest in where.chunks and digest in known else None

    if isinstance(store, FallbackStore):
        return FallbackReader(store, decode, verify=verify, bases=base, direct=direct)
    return SegmentReader(store, decode, verify=verify, bases=base, direct=direct)
