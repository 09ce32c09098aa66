"""Chunks by location: where reading segments and decoding meet."""

from __future__ import annotations

from ciuic_async.codecs.decode import decode
from ciuic_async.segments.reader import SegmentReader
from ciuic_async.stores.base import Store


def chunk_reader(store: Store, *, verify: bool = True) -> SegmentReader:
    """A reader that knows every codec of this version; see ``SegmentReader``."""
    return SegmentReader(store, decode, verify=verify)
