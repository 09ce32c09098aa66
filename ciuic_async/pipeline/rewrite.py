"""A prune by somebody else, between writing and claiming: what it took away is written again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from ciuic_async.codecs.base import ChunkEncoder
from ciuic_async.errors import IntegrityError
from ciuic_async.format import layout
from ciuic_async.format.digest import digest
from ciuic_async.format.locator import ChunkLocation, Locator
from ciuic_async.handoffs import StagedWindow
from ciuic_async.pipeline.bases import Parent
from ciuic_async.pipeline.chunks import chunk_reader
from ciuic_async.pipeline.commit import CommitTarget, publish_rewritten
from ciuic_async.pipeline.history import is_live
from ciuic_async.segments.writer import SegmentWriter

_KIND = ("", "", "rewritten")


class Rewriter:
    """Rewrites chunks of a parent that another writer pruned while a snapshot was on its way.

    Args:
        staged: what of the snapshot is still in memory.
        next_number: of its segments.
        sizes: raw size of each of its chunks.
    """

    def __init__(
        self,
        target: CommitTarget,
        encoder: ChunkEncoder,
        snapshot: str,
        parent: Parent | None,
        staged: Sequence[StagedWindow],
        next_number: int,
        sizes: Mapping[bytes, int],
    ) -> None:
        self._target = target
        self._encoder = encoder
        self._snapshot = snapshot
        self._parent = parent
        self._staged = staged
        self._next_number = next_number
        self._sizes = sizes
        self.current: Locator | None = None

    def ensure(self, where: Locator, published: list[str]) -> Locator:
        """``where``, or a newer generation that does not lean on a pruned parent: neither chunks nor bases of it."""
        leaning = {
            chunk: place
            for chunk, place in where.chunks.items()
            if place.depth or layout.owner(place.segment.path) != self._snapshot
        }
        if not leaning or self._parent is None or is_live(self._target.log, self._parent.snapshot):
            return where
        writer = SegmentWriter(self._target.store, self._snapshot, first_number=self._next_number)
        try:
            for chunk, raw, item_size in self._raw(leaning, where):
                writer.append(self._encoder.encode(raw, chunk, item_size, _KIND))
            written = writer.finish()
            newer = Locator(where.snapshot, where.generation + 1, {**where.chunks, **written.locations})
            publish_rewritten(self._target.store, written, newer, published)
        except BaseException:
            writer.abort()
            raise
        self._next_number = written.next_number
        self.current = newer
        return newer

    def _raw(self, wanted: Mapping[bytes, ChunkLocation], where: Locator) -> Iterator[tuple[bytes, memoryview, int]]:
        """The chunks' bytes: from memory where they are still staged, else from the store while it has them."""
        left = dict(wanted)
        for window in self._staged:
            for chunk in window.chunks:
                raw = window.bytes_of(chunk)
                if left and (chunk_digest := digest(raw)) in left:
                    del left[chunk_digest]
                    yield chunk_digest, raw, chunk.item_size_bytes
        with chunk_reader(self._target.store, where=where, sizes=self._sizes) as reader:
            for chunk_digest, place in left.items():
                try:
                    raw = reader.read_chunk(chunk_digest, self._sizes[chunk_digest], place)
                except IntegrityError as error:
                    raise IntegrityError(
                        f"{place.segment.path}: pruned by another writer while this snapshot referred to it; "
                        "the next snapshot will not",
                        kind="pruned_under_us",
                        where=place.segment.path,
                    ) from error
                yield chunk_digest, raw, 1
