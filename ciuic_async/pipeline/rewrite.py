"""A prune by somebody else between writing and claiming: what it took away is written again, what it moved followed."""

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
from ciuic_async.pipeline.moved import follow, newer_locator
from ciuic_async.segments.writer import FinishedSegments, SegmentWriter

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
        """``where``, or a newer generation that leans neither on a pruned parent nor on places that were given up."""
        leaning = {
            chunk: place
            for chunk, place in where.chunks.items()
            if place.depth or layout.owner(place.segment.path) != self._snapshot
        }
        if not leaning or self._parent is None:
            return where
        if is_live(self._target.log, self._parent.snapshot):
            followed = self._followed(where, published)
            if followed is not None:
                return followed
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

    def _followed(self, where: Locator, published: list[str]) -> Locator | None:
        """``where``, or a newer generation that follows what was moved; None: what it leans on is not to be found."""
        assert self._parent is not None
        newest = newer_locator(self._target, self._parent.snapshot)
        if newest is None:
            return where
        followed = follow(newest, where, lambda place: layout.owner(place.segment.path) == self._snapshot)
        if followed is not None and followed is not where:
            nothing = FinishedSegments((), {}, 0, self._next_number)
            publish_rewritten(self._target.store, nothing, followed, published)
            self.current = followed
        return followed

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
