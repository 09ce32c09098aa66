"""The order of durability, in one place: ``commit``; and its mirror image, ``resolve``.

    segments published -> manifest and locator published -> slot claimed -> tiles -> log head

Nobody else publishes. ``Store.publish`` flushes, fsyncs, names and fsyncs the folder, so each step is on stable storage
before the next begins. The claimed slot is the moment at which a snapshot exists. Before it, everything written can be
withdrawn; after it, nothing is ever taken back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import sha256

from ciuic_async.errors import CiuicError, IntegrityError, NotFoundError, StoreError
from ciuic_async.events import logger
from ciuic_async.format import layout, locator, manifest
from ciuic_async.format.entry import FileReference, SnapshotEntry
from ciuic_async.format.locator import Locator
from ciuic_async.format.manifest import EncodedManifest, Manifest
from ciuic_async.handoffs import SegmentReference
from ciuic_async.segments.writer import FinishedSegments
from ciuic_async.stores.base import Store, Unpublished
from ciuic_async.stores.fallback import FallbackStore
from ciuic_async.transparency.keys import SigningKey
from ciuic_async.transparency.log import Log

_REFUSED = frozenset({"enospc", "edquot", "efbig", "emfile", "enfile", "erofs", "eacces", "eperm"})
"""Errors of a claim that a local disk gives before it does anything: nothing was claimed, and nothing will be."""

_COPY_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class CommitTarget:
    """Where a snapshot goes, and under whose key. ``announce`` gives the key entry of a key the log does not know.

    ``check_pin`` raises if the log is not the one that this user knows; ``pin`` makes what was appended known, and
    never fails.
    """

    store: Store
    log: Log
    key: SigningKey
    announce: Callable[[], bytes]
    check_pin: Callable[[], None] = lambda: None
    pin: Callable[[], None] = lambda: None

    def append(self, build: Callable[[Log], Sequence[bytes]]) -> int:
        """``Log.append`` under this key, between a look at the pin and its move; the log's lock is not held then."""

        given: Sequence[bytes] = ()

        def checked(log: Log) -> Sequence[bytes]:
            nonlocal given
            self.check_pin()
            given = build(log)
            return given

        index = self.log.append(checked, self.key, announce=self.announce)
        if given:
            self.pin()
        return index


def commit(
    target: CommitTarget,
    encoded: EncodedManifest,
    written: FinishedSegments,
    where: Locator,
    entry: bytes,
    ensure_chunks: Callable[[Locator, list[str]], Locator],
) -> int:
    """Make a snapshot durable.

    Args:
        encoded: the files of its manifest.
        written: its own segments, filled and unpublished.
        where: locator of all its chunks, generation 0.
        entry: the log entry.
        ensure_chunks: called before every claim, since other writers may have pruned in between: gives the locator to
            go by, having published it and whatever it rewrote if that is a newer generation; names that it
            publishes go into the list first, so that a failure can withdraw them.

    Returns:
        Index of the entry: the snapshot is durable.

    Raises:
        CiuicError: it is not; what was published is withdrawn as far as that is possible, else gc sweeps it.
    """
    store = target.store
    published: list[str] = []
    claiming = False
    try:
        _publish(store, list(written.files), published)
        files = [*encoded.parts, encoded.root, (layout.locator(where.snapshot, where.generation), where.encode())]
        _publish(store, _filled(store, files), published)

        current = where

        def before_claim(log: Log) -> list[bytes]:
            nonlocal current, claiming
            current = ensure_chunks(current, published)
            _check_segments(store, current)
            claiming = True
            return [entry]

        return target.append(before_claim)
    except BaseException as error:
        # Once a claim was tried, its outcome may be unknown, and another reader may already count on these files.
        if not claiming or (isinstance(error, StoreError) and error.kind in _REFUSED):
            withdraw(store, published)
        raise


def publish_rewritten(store: Store, written: FinishedSegments, where: Locator, published: list[str]) -> None:
    """Publish replacement segments and the locator generation that names them; adds their names to ``published``."""
    _publish(store, list(written.files), published)
    name = layout.locator(where.snapshot, where.generation)
    _publish(store, _filled(store, [(name, where.encode())]), published)


def publish_copies(
    source: Store, store: Store, names: Sequence[tuple[str, int]], contents: list[tuple[str, bytes]]
) -> None:
    """Publish copies of another chain's files (name and size), then ``contents``; unchecked, in bounded memory.

    Raises:
        IntegrityError: kind ``truncated`` or ``missing``; one is shorter than it should be, or is not there.
    """
    buffer = memoryview(bytearray(_COPY_BYTES))
    for name, size_bytes in names:
        file = store.begin(name)
        try:
            for start in range(0, size_bytes, _COPY_BYTES):
                part = buffer[: min(_COPY_BYTES, size_bytes - start)]
                source.read_into(name, start, part)
                file.write(part)
            store.publish([file])
        except NotFoundError as error:
            raise IntegrityError(f"{name}: is missing", kind="missing", where=name) from error
        finally:
            file.discard()
    store.publish(_filled(store, contents))


def _publish(store: Store, files: list[Unpublished], published: list[str]) -> None:
    published.extend(file.name for file in files)
    store.publish(files)


def _filled(store: Store, contents: list[tuple[str, bytes]]) -> list[Unpublished]:
    files: list[Unpublished] = []
    try:
        for name, data in contents:
            files.append(store.begin(name))
            files[-1].write(data)
    except BaseException:
        for file in files:
            file.discard()
        raise
    return files


def withdraw(store: Store, names: list[str]) -> None:
    """Delete what a failed snapshot published, so that a full disk gets its space back. Best effort."""
    for name in names:
        with suppress(CiuicError):
            store.delete(name)


def _check_segments(store: Store, where: Locator) -> None:
    """A gc elsewhere may have taken a segment that looked orphaned: better to fail than to claim a hole."""
    for segment in where.segments():
        size = store.size(segment.path)
        if size != segment.size_bytes:
            raise StoreError(
                f"{segment.path}: expected {segment.size_bytes} bytes before the commit, found {size}; was it deleted?",
                kind="segment_vanished",
                where=segment.path,
            )


# --- resolve ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Resolved:
    """Everything needed to read a snapshot."""

    entry: SnapshotEntry
    manifest: Manifest
    locator: Locator
    in_memory: Mapping[bytes, memoryview] = field(default_factory=dict)
    """Chunks by digest that need not be read from the store. Not trusted: they are checked like those from there."""

    @property
    def segments(self) -> list[SegmentReference]:
        return self.locator.segments()


def resolve(store: Store, entry: SnapshotEntry) -> Resolved:
    """Read and check manifest and locator of a snapshot whose entry was verified.

    Raises:
        IntegrityError: a file is missing (kind ``missing``), damaged or lies; names it.
    """
    try:
        content = read_manifest(store, entry)
        return Resolved(entry, content, read_locator(store, content))
    except IntegrityError as error:
        if not isinstance(store, FallbackStore):
            raise
        return store.heal(error, lambda there: resolve(there, entry))


def read_root(store: Store, entry: SnapshotEntry) -> manifest.ManifestRoot:
    """The root of a manifest, checked against the entry."""
    root = manifest.decode_root(read_checked(store, entry.manifest, manifest.ROOT_LIMIT_BYTES), entry.snapshot)
    if root.chunks != entry.chunks or root.raw_bytes != entry.raw_bytes or root.world != entry.world:
        raise IntegrityError(
            f"{entry.manifest.path}: contradicts its log entry", kind="bad_manifest", where=entry.manifest.path
        )
    return root


def read_manifest(store: Store, entry: SnapshotEntry) -> Manifest:
    """A whole manifest, checked against the entry."""
    root = read_root(store, entry)
    # One part at a time: a root may name thousands, of 64 MiB each.
    return manifest.assemble(root, (read_checked(store, part, manifest.PART_LIMIT_BYTES) for part in root.parts))


def read_locator(store: Store, content: Manifest) -> Locator:
    """The newest locator that is intact. An older generation serves when a newer one is damaged."""
    distinct = content.distinct_chunks()
    generations = locator_generations(store, content.snapshot)
    failure: IntegrityError | None = None
    for generation in reversed(generations):
        name = layout.locator(content.snapshot, generation)
        try:
            data = store.read(name, locator.limit_bytes(len(distinct)))
            return locator.decode(data, content.snapshot, generation, distinct)
        except IntegrityError as error:
            failure = failure or error
            logger.warning("%s", error)
    if failure is not None:
        raise failure
    name = layout.locator(content.snapshot, 0)
    raise IntegrityError(f"{name}: is missing", kind="missing", where=name)


def locator_generations(store: Store, snapshot: str) -> list[int]:
    """Generations that exist. They are numbered without gaps, so this needs no listing."""
    generations: list[int] = []
    while store.size(layout.locator(snapshot, len(generations))) is not None:
        generations.append(len(generations))
    return generations


def read_checked(store: Store, reference: FileReference, limit_bytes: int) -> bytes:
    """A file that a signed entry or a checked file refers to."""
    if reference.size_bytes > limit_bytes:
        raise IntegrityError(
            f"{reference.path}: said to have {reference.size_bytes} bytes, at most {limit_bytes} are allowed",
            kind="file_too_large",
            where=reference.path,
        )
    try:
        data = store.read(reference.path, reference.size_bytes)
    except NotFoundError as error:
        raise IntegrityError(f"{reference.path}: is missing", kind="missing", where=reference.path) from error
    if len(data) != reference.size_bytes or sha256(data).digest() != reference.sha256:
        raise IntegrityError(
            f"{reference.path}: SHA-256 does not match: the file was changed or truncated "
            f"({len(data)} bytes, expected {reference.size_bytes})",
            kind="digest_mismatch",
            where=reference.path,
        )
    return data
