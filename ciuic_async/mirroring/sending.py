"""Files from one copy of a chain to another: in bounded memory, checked where they come from and where they arrive.

Names are never reused, so a file that is there with the right size is there. One of another size was cut off on the way
or damaged since: it goes, and is sent again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from ciuic_async.errors import (
    CiuicError,
    CommitConflictError,
    FormatVersionError,
    IntegrityError,
    NotFoundError,
    StoreError,
)
from ciuic_async.format import layout, locator, manifest
from ciuic_async.format.entry import SnapshotEntry
from ciuic_async.format.locator import SegmentReference
from ciuic_async.pipeline.commit import Resolved, locator_generations, read_checked, read_root, resolve
from ciuic_async.pipeline.spoilt import read_again
from ciuic_async.segments.whole import check_segment
from ciuic_async.stores.base import Store

PART_BYTES = 4 << 20
"""Of a segment that is on its way: all the memory that sending it takes, besides the store's own."""


class SourceError(Exception):
    """What should be sent cannot be read, or is not what it should be; ``cause`` says why."""

    def __init__(self, cause: CiuicError) -> None:
        super().__init__(str(cause))
        self.cause = cause


@contextmanager
def _reading_source() -> Iterator[None]:
    """Tells what is lost at the source from what is only out of reach: that is not left out, but tried again."""
    try:
        yield
    except StoreError as error:
        if error.kind != "eio":  # a disk that cannot read what it holds has lost it
            raise
        raise SourceError(error) from error
    except CiuicError as error:
        raise SourceError(error) from error


class Sender:
    """Sends files from ``source`` to ``target``. Belongs to one thread.

    Args:
        pause: called between parts; what it raises ends the sending, and nothing of the file is visible then.
        read_back: read every segment again where it arrived, and check every byte.
        home: the target is the chain itself. Locators are not signed: one that is good there is never exchanged for
            what the other copy has under its name.
    """

    def __init__(
        self,
        source: Store,
        target: Store,
        *,
        pause: Callable[[], None] = lambda: None,
        read_back: bool = False,
        home: bool = False,
    ) -> None:
        self._source = source
        self._target = target
        self._pause = pause
        self._read_back = read_back
        self._home = home
        self._buffer = memoryview(bytearray(0))
        self.sent_bytes = 0

    def snapshot(self, entry: SnapshotEntry) -> None:
        """All that a snapshot needs, in the order of a commit; what has arrived before is left alone.

        Raises:
            SourceError: something of it is missing or damaged at the source.
            StoreError: the source is out of reach, or the target failed.
            IntegrityError: the target failed.
        """
        found = self._resolved(entry)
        for segment in found.segments:
            self.segment(segment)
        self._descriptions(found)

    def descriptions(self, entry: SnapshotEntry) -> None:
        """Manifest and locators alone. Errors as ``snapshot``."""
        self._descriptions(self._resolved(entry))

    def _resolved(self, entry: SnapshotEntry) -> Resolved:
        with _reading_source():
            return read_again(self._source, f"snapshot {entry.snapshot}", lambda: resolve(self._source, entry))

    def _descriptions(self, found: Resolved) -> None:
        entry = found.entry
        with _reading_source():
            root = read_root(self._source, entry)
            generations = locator_generations(self._source, entry.snapshot)
        for part in (*root.parts, entry.manifest):
            if self._target.size(part.path) != part.size_bytes:
                with _reading_source():
                    data = read_checked(self._source, part, max(manifest.PART_LIMIT_BYTES, manifest.ROOT_LIMIT_BYTES))
                self._small(part.path, data)
        distinct = found.manifest.distinct_chunks()
        for generation in generations:
            name = layout.locator(entry.snapshot, generation)
            if self._home and self._has_locator(name, generation, found):
                continue
            with _reading_source():
                data = self._source.read(name, locator.limit_bytes(len(distinct)))
            self._small(name, data)

    def _has_locator(self, name: str, generation: int, found: Resolved) -> bool:
        """Whether the target has it, and it can be one of this snapshot."""
        distinct = found.manifest.distinct_chunks()
        try:
            data = self._target.read(name, locator.limit_bytes(len(distinct)))
            locator.decode(data, found.entry.snapshot, generation, distinct)
        except (NotFoundError, IntegrityError, FormatVersionError):
            return False
        return True

    def segment(self, reference: SegmentReference) -> None:
        """One segment, unless it is there. Every byte is checked before it is sent. Errors as ``snapshot``."""
        name, size = reference.path, reference.size_bytes
        if self._settle(name, size):
            return
        with _reading_source():
            read_again(self._source, name, lambda: check_segment(self._source, reference))
        self._stream(name, size)
        if self._target.size(name) != size:
            raise _lost(self._target, name, size)
        if self._read_back:
            self._check_there(reference)
        self.sent_bytes += size

    def _settle(self, name: str, size_bytes: int) -> bool:
        """Whether a file is there already; one of the wrong size goes."""
        found = self._target.size(name)
        if found is not None and found != size_bytes:
            self._target.delete(name)
        return found == size_bytes

    def _stream(self, name: str, size_bytes: int) -> None:
        if not self._buffer:
            self._buffer = memoryview(bytearray(PART_BYTES))
        file = self._target.begin(name)
        try:
            for start in range(0, size_bytes, PART_BYTES):
                self._pause()
                part = self._buffer[: min(PART_BYTES, size_bytes - start)]
                with _reading_source():
                    self._source.read_into(name, start, part)
                file.write(part)
            with suppress(CommitConflictError):  # another node sent it meanwhile
                self._target.publish([file])
        finally:
            file.discard()

    def _small(self, name: str, data: bytes) -> None:
        self._pause()
        try:
            self._target.create(name, data)
        except CommitConflictError:
            try:
                if self._target.read(name, len(data)) == data:
                    return
            except IntegrityError:
                pass  # longer
            except NotFoundError as error:
                raise _lost(self._target, name, len(data)) from error
            self._target.delete(name)
            self._target.create(name, data)
        if self._target.size(name) != len(data):
            raise _lost(self._target, name, len(data))
        self.sent_bytes += len(data)

    def _check_there(self, reference: SegmentReference) -> None:
        try:
            check_segment(self._target, reference)
        except IntegrityError as error:
            self._target.delete(reference.path)
            raise StoreError(
                f"{self._target.url}: {error}: it arrived otherwise than it was sent, and is sent again",
                kind="copy_differs",
                where=reference.path,
            ) from error


def _lost(target: Store, name: str, size_bytes: int) -> StoreError:
    return StoreError(
        f"{target.url}: {name}: sent with {size_bytes} bytes, which the place took, and not there now",
        kind="copy_lost",
        where=name,
    )
