"""From staged to durable, without torch: chunk, digest, deduplicate, encode, write, commit.

One ``Persister`` serves one checkpointer; ``persist`` runs on the writer thread, one snapshot at a time.
"""

from __future__ import annotations

import os
import platform
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field

from ciuic_async.codecs.base import Codec
from ciuic_async.errors import IntegrityError
from ciuic_async.format import entry as entries
from ciuic_async.format import layout, manifest, merkle
from ciuic_async.format.chain_file import ChainFile
from ciuic_async.format.digest import digest
from ciuic_async.format.entry import Common, SnapshotEntry
from ciuic_async.format.locator import ChunkLocation, Locator
from ciuic_async.format.manifest import Manifest, Pack, Progress, Shard, StoredTensor
from ciuic_async.handoffs import CapturePlan, EncodedChunk, PlannedChunk, StagedWindow
from ciuic_async.options import WRITE
from ciuic_async.pipeline.chunks import chunk_reader
from ciuic_async.pipeline.commit import CommitTarget, commit, publish_rewritten
from ciuic_async.pipeline.history import is_live
from ciuic_async.pipeline.workers import OrderedWorkers
from ciuic_async.segments.writer import SegmentWriter
from ciuic_async.version import ENGINE


@dataclass(frozen=True, slots=True)
class Parent:
    """The durable snapshot a new one came from; its chunks are referenced instead of written again."""

    snapshot: str
    leaf_hash: bytes
    locations: Mapping[bytes, ChunkLocation]


@dataclass(frozen=True, slots=True)
class SaveRequest:
    """What to record beside the bytes. ``metrics`` are (name, shortest decimal), sorted."""

    snapshot: str
    plan: CapturePlan
    step: int | None = None
    epoch: entries.Position = None
    batch: entries.Position = None
    progress: Progress = field(default_factory=Progress)
    metrics: tuple[tuple[str, str], ...] = ()
    tags: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    parent: Parent | None = None
    deadline_s: float | None = None
    """By ``time.monotonic``: from then on the writer works at normal priority."""


@dataclass(frozen=True, slots=True)
class Persisted:
    """A durable snapshot."""

    index: int
    entry: SnapshotEntry
    leaf_hash: bytes
    locations: dict[bytes, ChunkLocation]
    deduplicated_bytes: int

    def as_parent(self) -> Parent:
        return Parent(self.entry.snapshot, self.leaf_hash, self.locations)


def common(run: str) -> Common:
    """Who and when, for an entry made now."""
    return Common(run, entries.timestamp(time.time()), platform.node()[:200], ENGINE)


class Persister:
    """Turns staged windows into durable snapshots of one chain.

    Args:
        target: where they go.
        chain: the chain's parameters.
        codec: for chunks that are written.
        run: id of this training run.
    """

    def __init__(self, target: CommitTarget, chain: ChainFile, codec: Codec, run: str) -> None:
        self._target = target
        self._chain = chain
        self._codec = codec
        self._run = run
        self._workers = OrderedWorkers(WRITE.encode_threads, "ciuic-encode", lower_priority)

    def start(self) -> None:
        """Start the encoding threads: early, since an interpreter that ends starts none any more. Idempotent."""
        self._workers.start()

    def close(self) -> None:
        """Stop the encoding threads. Idempotent."""
        self._workers.close()

    def persist(
        self,
        request: SaveRequest,
        windows: Iterable[StagedWindow],
        window_done: Callable[[StagedWindow], None],
        keeps_memory: bool,
    ) -> Persisted:
        """Make one snapshot durable.

        Args:
            request: what it is.
            windows: all its bytes, in order; the next one is asked for when the previous one is written.
            window_done: told when a window's bytes are no longer needed; with ``keeps_memory`` only at the end, by the
                caller.
            keeps_memory: the windows stay valid until this returns.

        Raises:
            CiuicError: nothing became durable.
        """
        writer = SegmentWriter(self._target.store, request.snapshot, borrows=True)
        known = self._known_chunks(request.parent)
        digests: list[bytearray] = [bytearray() for _ in request.plan.regions]
        own: dict[bytes, int] = {}
        referenced: dict[bytes, ChunkLocation] = {}
        deduplicated = 0
        kept: list[StagedWindow] = []
        try:
            for window in windows:
                for chunk, chunk_digest, encoded in self._encoded(window, known, request.deadline_s):
                    digests[chunk.region] += chunk_digest
                    if chunk_digest in own or chunk_digest in referenced:
                        deduplicated += chunk.size_bytes
                    elif encoded is None:
                        referenced[chunk_digest] = known[chunk_digest]
                        deduplicated += chunk.size_bytes
                    else:
                        own[chunk_digest] = chunk.size_bytes
                        writer.append(encoded)
                if keeps_memory:
                    kept.append(window)
                else:
                    writer.drain()
                    window_done(window)
            written = writer.finish()
            content = _manifest(request, digests)
            order = content.distinct_chunks()
            places = {**referenced, **written.locations}
            where = Locator(request.snapshot, 0, {chunk: places[chunk] for chunk in order})
            encoded_manifest = manifest.encode(content)
            entry = SnapshotEntry(
                common=common(self._run),
                snapshot=request.snapshot,
                parent=request.parent.leaf_hash if request.parent else None,
                step=request.step,
                epoch=request.epoch,
                batch=request.batch,
                tags=request.tags,
                metrics=request.metrics,
                manifest=encoded_manifest.reference,
                chunks=content.chunk_tree(),
                raw_bytes=content.raw_bytes,
                stored_bytes=written.size_bytes,
            )
            rewriter = _Rewriter(self._target, self._codec, request, kept, written.next_number, order)
            data = entry.encode()
            index = commit(self._target, encoded_manifest, written, where, data, rewriter.ensure)
        except BaseException:
            writer.abort()
            raise
        final = rewriter.current or where
        # Not asked of the log: a read that fails now must not make a durable snapshot look like a failed one.
        return Persisted(index, entry, merkle.leaf_hash(data), final.chunks, deduplicated)

    def _known_chunks(self, parent: Parent | None) -> Mapping[bytes, ChunkLocation]:
        """Chunks that may be referenced: those of the parent whose segments are there, unless it was pruned."""
        if parent is None or not parent.locations:
            return {}
        self._target.log.refresh()
        if not is_live(self._target.log, parent.snapshot):
            return {}
        store = self._target.store
        segments = {place.segment for place in parent.locations.values()}
        gone = {segment for segment in segments if store.size(segment.path) != segment.size_bytes}
        if not gone:
            return parent.locations
        return {chunk: place for chunk, place in parent.locations.items() if place.segment not in gone}

    def _encoded(
        self, window: StagedWindow, known: Mapping[bytes, ChunkLocation], deadline_s: float | None
    ) -> Iterator[tuple[PlannedChunk, bytes, EncodedChunk | None]]:
        """Digest every chunk and encode those that the parent has not; in order, a bounded number ahead."""

        def work(chunk: PlannedChunk) -> tuple[PlannedChunk, bytes, EncodedChunk | None]:
            raw = window.bytes_of(chunk)
            chunk_digest = digest(raw)
            encoded = None if chunk_digest in known else self._codec.encode(raw, chunk_digest, chunk.item_size_bytes)
            return chunk, chunk_digest, encoded

        yield from self._workers.map(work, window.chunks, deadline_s=deadline_s)


def lower_priority() -> None:
    """Run the calling thread at low CPU priority: training comes first. On Linux niceness belongs to threads."""
    with suppress(OSError, AttributeError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), WRITE.niceness)


def _manifest(request: SaveRequest, digests: list[bytearray]) -> Manifest:
    plan = request.plan
    packs = tuple(
        Pack(region.item_size_bytes, region.size_bytes, bytes(digests[number]))
        for number, region in enumerate(plan.regions[: plan.pack_count])
    )
    tensors = []
    for tensor in plan.tensors:
        zeros = (0,) * len(tensor.shape)
        if tensor.pack_offset_bytes is not None:
            shard = Shard(zeros, tensor.shape, pack=(tensor.region, tensor.pack_offset_bytes))
        else:
            content = bytes(digests[tensor.region]) if tensor.region >= 0 else b""
            shard = Shard(zeros, tensor.shape, plan.chunk_size_bytes, content)
        tensors.append(StoredTensor(tensor.path, tensor.dtype, tensor.shape, tensor.device, (shard,)))
    return Manifest(
        request.snapshot, plan.top, plan.trees, packs, tuple(tensors), request.progress, request.environment
    )


class _Rewriter:
    """Rewrites chunks of a parent that another writer pruned while this snapshot was on its way."""

    def __init__(
        self,
        target: CommitTarget,
        codec: Codec,
        request: SaveRequest,
        kept: list[StagedWindow],
        next_number: int,
        sizes: dict[bytes, int],
    ) -> None:
        self._target = target
        self._codec = codec
        self._request = request
        self._kept = kept
        self._next_number = next_number
        self._sizes = sizes
        self.current: Locator | None = None

    def ensure(self, where: Locator, published: list[str]) -> Locator:
        """``where``, or a newer generation that does not lean on a pruned parent."""
        parent = self._request.parent
        foreign = {
            chunk: place
            for chunk, place in where.chunks.items()
            if layout.owner(place.segment.path) != self._request.snapshot
        }
        if not foreign or parent is None or is_live(self._target.log, parent.snapshot):
            return where
        writer = SegmentWriter(self._target.store, self._request.snapshot, first_number=self._next_number)
        try:
            for chunk, raw, item_size in self._raw(foreign):
                writer.append(self._codec.encode(raw, chunk, item_size))
            written = writer.finish()
            newer = Locator(where.snapshot, where.generation + 1, {**where.chunks, **written.locations})
            publish_rewritten(self._target.store, written, newer, published)
        except BaseException:
            writer.abort()
            raise
        self._next_number = written.next_number
        self.current = newer
        return newer

    def _raw(self, wanted: dict[bytes, ChunkLocation]) -> Iterator[tuple[bytes, memoryview, int]]:
        """The chunks' bytes: from memory where they are still staged, else from the store while it has them."""
        left = dict(wanted)
        for window in self._kept:
            for chunk in window.chunks:
                raw = window.bytes_of(chunk)
                if left and (chunk_digest := digest(raw)) in left:
                    del left[chunk_digest]
                    yield chunk_digest, raw, chunk.item_size_bytes
        reader = chunk_reader(self._target.store)
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
