"""A large object on its way, in parts, while it is still being written.

The client's own streaming upload pulls parts out of an iterator, on a thread of this object: it keeps at most a few
of them on their way, and it tells the server to forget the upload when the iterator raises. Both are what is needed
here, and neither is offered by its file-like writer, which also goes on using a buffer after ``write`` returned.
"""

from __future__ import annotations

import atexit
import os
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress

from ciuic_async.errors import CiuicError, StoreError

PART_BYTES = 16 << 20
PARTS_AT_ONCE = 4
"""On their way at once, for each object. Together with the part that waits and the one that is filled this is all the
memory that an upload takes: 96 MiB."""
_EXIT_WAIT_S = 5.0

_live: weakref.WeakSet[Upload] = weakref.WeakSet()


class _AbandonedError(Exception):
    """Raised inside the client, so that it aborts the upload."""


class _Parts(Iterator[bytearray]):
    """What the client pulls from: at most one part waits."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.waiting: bytearray | None = None
        self.ended = False
        self.abandoned = False
        self.done = False

    def __next__(self) -> bytearray:
        with self.changed:
            while self.waiting is None and not self.ended and not self.abandoned:
                self.changed.wait()
            if self.abandoned:
                raise _AbandonedError
            part, self.waiting = self.waiting, None
            self.changed.notify_all()
            if part is None:
                raise StopIteration
            return part


class Upload:
    """One upload. Belongs to one thread at a time; a forked copy does nothing.

    Args:
        name: for the thread's name and messages.
        put: uploads all parts of an iterator; called on this object's thread; raises CiuicError.
    """

    def __init__(self, name: str, put: Callable[[Iterator[bytearray]], None]) -> None:
        self._name = name
        self._process = os.getpid()
        self._parts = _Parts()
        self._failure: list[CiuicError] = []
        arguments = (put, self._parts, self._failure)  # not self: what is dropped ends
        # A daemon: at exit the interpreter waits for other threads before anybody can tell them to end.
        self._thread = threading.Thread(target=_run, args=arguments, name="ciuic-upload", daemon=True)
        self._thread.start()
        _live.add(self)

    def add(self, part: bytearray) -> None:
        """Hand over the next part, for good; waits while enough are on their way. Raises what the upload raised."""
        parts = self._parts
        with parts.changed:
            while parts.waiting is not None and not parts.done:
                parts.changed.wait()
            if not parts.done:
                parts.waiting = part
                parts.changed.notify_all()
                return
        self._raise()

    def end(self) -> None:
        """No more parts will come. Does not wait."""
        with self._parts.changed:
            self._parts.ended = True
            self._parts.changed.notify_all()

    def wait(self) -> None:
        """After ``end``: until the object is there. Raises what the upload failed with."""
        self._thread.join()
        if self._failure:
            self._raise()

    def abandon(self) -> None:
        """Let the server forget it, if it is not complete; does not wait. Never raises."""
        if self._process != os.getpid():
            return
        with self._parts.changed:
            self._parts.abandoned = True
            self._parts.waiting = None
            self._parts.changed.notify_all()

    def join(self, timeout_s: float | None = None) -> None:
        """Until its thread has ended."""
        if self._process == os.getpid():
            self._thread.join(timeout_s)

    def __del__(self) -> None:
        with suppress(Exception):
            self.abandon()

    def _raise(self) -> None:
        if self._failure:
            raise self._failure[0]
        raise StoreError(f"{self._name}: the upload ended early", kind="store", where=self._name)


def _run(put: Callable[[Iterator[bytearray]], None], parts: _Parts, failure: list[CiuicError]) -> None:
    try:
        put(parts)
    except CiuicError as error:
        failure.append(error)
    finally:
        with parts.changed:
            parts.done = True
            parts.waiting = None
            parts.changed.notify_all()


@atexit.register
def _abandon_all() -> None:
    """At process end nothing half uploaded stays at the server, if it can be told within a few seconds."""
    uploads = list(_live)
    for upload in uploads:
        upload.abandon()
    for upload in uploads:
        upload.join(_EXIT_WAIT_S / len(uploads))
