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

from ciuic_async.codecs.base import ChunkEncoder, Kind
from ciuic_async.errors import StoreError
from ciuic_async.format import entry as entries
from ciuic_async.format import merkle
from ciuic_async.format.chain_file import ChainFile
from ciuic_async.format.digest import DIGEST_SIZE_BYTES, digest
from ciuic_async.format.entry import Common, SnapshotEntry
from ciuic_async.format.locator import ChunkLocation, Locator
from ciuic_async.format.manifest import Progress, dotted
from ciuic_async.handoffs import CapturePlan, EncodedChunk, PlannedChunk, Region, StagedWindow
from ciuic_async.options import WRITE
from ciuic_async.pipeline.bases import BaseFinder, InMemory, Parent, needed_bases
from ciuic_async.pipeline.commit import CommitTarget, commit
from ciuic_async.pipeline.describe import describe
from ciuic_async.pipeline.frozen import FrozenDigests, Remembered
from ciuic_async.pipeline.history import is_live
from ciuic_async.pipeline.moved import up_to_date
from ciuic_async.pipeline.rewrite import Rewriter
from ciuic_async.pipeline.workers import OrderedWorkers
from ciuic_async.segments.writer import SegmentWriter
from ciuic_async.version import ENGINE


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
    remembered: Remembered = field(default_factory=dict)
    """Regions whose bytes are not in the windows: the parent has them, under these digests."""
    deadline_s: float | None = None
    """By ``time.monotonic``: from then on the writer works at normal priority."""


@dataclass(frozen=True, slots=True)
class Persisted:
    """A durable snapshot. ``digests``: of every region its chunks' digests, concatenated."""

    index: int
    entry: SnapshotEntry
    leaf_hash: bytes
    where: Locator
    base_of: dict[bytes, bytes]
    digests: tuple[bytes, ...]
    deduplicated_bytes: int
    write_s: float

    def as_parent(self) -> Parent:
        return Parent(
            self.entry.snapshot, self.leaf_hash, self.where.chunks, self.where.bases, self.base_of, self.index + 1
        )


def common(run: str) -> Common:
    """Who and when, for an entry made now."""
    return Common(run, entries.timestamp(time.time()), platform.node()[:200], ENGINE)


class Persister:
    """Turns staged windows into durable snapshots of one chain.

    Args:
        target: where they go.
        chain: the chain's parameters.
        encoder: for chunks that are written.
        run: id of this training run.
    """

    def __init__(self, target: CommitTarget, chain: ChainFile, encoder: ChunkEncoder, run: str) -> None:
        self._target = target
        self._chain = chain
        self._encoder = encoder
        self._run = run
        self.frozen = FrozenDigests()
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
        kept: InMemory | None = None,
        may_claim: Callable[[], None] | None = None,
    ) -> Persisted:
        """Make one snapshot durable.

        Args:
            request: what it is.
            windows: all its bytes, in order; the next one is asked for when the previous one is written.
            window_done: told when a window's bytes are no longer needed; with ``keeps_memory`` only at the end, by the
                caller.
            keeps_memory: the windows stay valid until this returns.
            kept: the parent's bytes, if they are still in memory: for deltas.
            may_claim: called before every claim, with the log as it then is; what it raises ends the save.

        Raises:
            CiuicError: nothing became durable.
        """
        writer = SegmentWriter(self._target.store, request.snapshot, borrows=True)
        parent = up_to_date(self._target, request.parent)
        known = self._known_chunks(parent)
        finder = BaseFinder(request.plan, known, kept)
        content = _Content([bytearray() for _ in request.plan.regions])
        staged: list[StagedWindow] = []
        try:
            for window in windows:
                for chunk, chunk_digest, encoded in self._encoded(request, window, known, finder):
                    if content.add(chunk, chunk_digest, encoded, known) and encoded is not None:
                        writer.append(encoded)
                if keeps_memory:
                    staged.append(window)
                else:
                    writer.drain()
                    window_done(window)
            written = writer.finish()
            self._encoder.wrote(content.written_bytes, written.size_bytes, written.busy_s)
            about = describe(request.plan, request.snapshot, content.digests, request.progress, request.environment)
            places = {**content.referenced, **written.locations}
            chunks = {chunk: places[chunk] for chunk in about.distinct}
            bases, base_of = needed_bases(content.own_bases, chunks, about.distinct, parent)
            where = Locator(request.snapshot, 0, chunks, bases)
            entry = SnapshotEntry(
                common=common(self._run),
                snapshot=request.snapshot,
                parent=request.parent.leaf_hash if request.parent else None,
                step=request.step,
                epoch=request.epoch,
                batch=request.batch,
                tags=request.tags,
                metrics=request.metrics,
                manifest=about.encoded.reference,
                chunks=about.chunks,
                raw_bytes=about.raw_bytes,
                stored_bytes=written.size_bytes,
            )
            rewriter = Rewriter(
                self._target,
                self._encoder,
                request.snapshot,
                parent,
                staged,
                written.next_number,
                about.distinct,
            )
            data = entry.encode()

            def ensure(where: Locator, published: list[str]) -> Locator:
                if may_claim is not None:
                    may_claim()
                return rewriter.ensure(where, published)

            index = commit(self._target, about.encoded, written, where, data, ensure)
        except BaseException:
            self.frozen.forget()
            writer.abort()
            raise
        digests = tuple(map(bytes, content.digests))
        self.frozen.learn(request.plan, digests)
        # Not asked of the log: a read that fails now must not make a durable snapshot look like a failed one.
        return Persisted(
            index,
            entry,
            merkle.leaf_hash(data),
            rewriter.current or where,
            {} if rewriter.current else base_of,
            digests,
            content.deduplicated_bytes,
            written.busy_s,
        )

    def _known_chunks(self, parent: Parent | None) -> Mapping[bytes, ChunkLocation]:
        """Chunks that may be referenced: those of the parent whose segments are there, unless it was pruned."""
        if parent is None or not parent.locations:
            return {}
        self._target.log.refresh()
        if not is_live(self._target.log, parent.snapshot):
            return {}
        store = self._target.store
        # Bases too: content that comes back is found there, and never becomes a delta that leads to itself.
        places = {**{base: place for base, (_, place) in parent.bases.items()}, **parent.locations}
        segments = {place.segment for place in places.values()}
        gone = {segment for segment in segments if store.size(segment.path) != segment.size_bytes}

        def readable(chunk: bytes | None) -> bool:
            """It is there, and so is everything that it is a delta to, as far down as that goes."""
            place = None if chunk is None else places.get(chunk)
            if chunk is None or place is None or place.segment in gone:
                return False
            return place.depth == 0 or readable(parent.base_of.get(chunk))

        return {chunk: place for chunk, place in places.items() if readable(chunk)}

    def _encoded(
        self,
        request: SaveRequest,
        window: StagedWindow,
        known: Mapping[bytes, ChunkLocation],
        finder: BaseFinder,
    ) -> Iterator[tuple[PlannedChunk, bytes, EncodedChunk | None]]:
        """Digest every chunk and encode those that the parent has not; in order, a bounded number ahead."""
        encoder, kinds = self._encoder, _kinds(request.plan)
        regions, remembered = request.plan.regions, request.remembered

        def work(numbered: tuple[int, PlannedChunk]) -> tuple[PlannedChunk, bytes, EncodedChunk | None]:
            number, chunk = numbered
            if chunk.region in remembered:
                at = (chunk.address - regions[chunk.region].address) // request.plan.chunk_size_bytes
                chunk_digest = remembered[chunk.region][at * DIGEST_SIZE_BYTES :][:DIGEST_SIZE_BYTES]
                if chunk_digest not in known:
                    raise _gone(regions[chunk.region])
                return chunk, chunk_digest, None
            raw = window.bytes_of(chunk)
            chunk_digest = digest(raw) if window.digests is None else window.digests[number]
            if chunk_digest in known:
                return chunk, chunk_digest, None
            kind = kinds[chunk.region]
            if not encoder.wants_base(kind, chunk.item_size_bytes):
                return chunk, chunk_digest, encoder.encode(raw, chunk_digest, chunk.item_size_bytes, kind, None)
            with finder.base(chunk) as base:
                return chunk, chunk_digest, encoder.encode(raw, chunk_digest, chunk.item_size_bytes, kind, base)

        yield from self._workers.map(work, enumerate(window.chunks), deadline_s=request.deadline_s)


def _gone(region: Region) -> StoreError:
    name = dotted(region.path)
    return StoreError(
        f"{name}: frozen, and not copied, but the snapshot before, which has it, was pruned or its segments are gone; "
        "the next snapshot stores it again",
        kind="frozen_gone",
        where=name,
    )


def _kinds(plan: CapturePlan) -> list[Kind]:
    """What each region is a kind of: tensors of one kind compress alike."""
    return [
        (
            str(region.path[0]) if region.path else "",
            str(region.path[-1]) if region.path else "",
            "pack" if number < plan.pack_count else "",
        )
        for number, region in enumerate(plan.regions)
    ]


@dataclass(slots=True)
class _Content:
    """What a snapshot consists of, as its chunks come by."""

    digests: list[bytearray]
    own: set[bytes] = field(default_factory=set)
    own_bases: dict[bytes, bytes] = field(default_factory=dict)
    referenced: dict[bytes, ChunkLocation] = field(default_factory=dict)
    written_bytes: int = 0
    deduplicated_bytes: int = 0

    def add(
        self, chunk: PlannedChunk, digest: bytes, encoded: EncodedChunk | None, known: Mapping[bytes, ChunkLocation]
    ) -> bool:
        """Count a chunk; True if it must be written."""
        self.digests[chunk.region] += digest
        if digest in self.own or digest in self.referenced or encoded is None:
            self.deduplicated_bytes += chunk.size_bytes
            if encoded is None:
                self.referenced[digest] = known[digest]
            return False
        self.own.add(digest)
        if encoded.header.depth:
            self.own_bases[digest] = encoded.header.base
        self.written_bytes += chunk.size_bytes
        return True


def lower_priority() -> None:
    """Run the calling thread at low CPU priority: training comes first. On Linux niceness belongs to threads."""
    with suppress(OSError, AttributeError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), WRITE.niceness)
