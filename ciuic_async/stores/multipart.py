"""A large object on its way, in parts, while it is still being written.

The client's own streaming upload pulls parts out of an iterator, on a thread of this object: it keeps at most a few
of them on their way, and it tells the server to forget the upload when the iterator raises. Both are what is needed
here, and neither is offered by its file-like writer, which also goes on using a buffer after ``write`` returned.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from typing import Any

from ciuic_async.errors import CiuicError, StoreError

PART_BYTES = 16 << 20
PARTS_AT_ONCE = 4
"""On their way at once, for each object. Together with the part that waits and the one that is filled this is all the
memory that an upload takes: 96 MiB."""
_EXIT_WAIT_S = 5.0

_live: weakref.WeakSet[Upload] = weakref.WeakSet()
_threads: weakref.WeakSet[threading.Thread] = weakref.WeakSet()
"""Of all uploads, also of those that were dropped: a thread that runs is kept alive by the interpreter."""


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

    Raises:
        RuntimeError: no thread can be had: there are too many, or the interpreter ends.
    """

    def __init__(self, name: str, put: Callable[[Iterator[bytearray]], None]) -> None:
        self._name = name
        self._process = os.getpid()
        self._parts = _Parts()
        self._failure: list[CiuicError] = []
        arguments = (put, self._parts, self._failure)  # not self: what is dropped ends
        # A daemon: at exit the interpreter waits for other threads before anybody can tell them to end.
        self.thread = threading.Thread(target=_run, args=arguments, name="ciuic-upload", daemon=True)
        self.thread.start()
        _live.add(self)
        _threads.add(self.thread)

    def add(self, part: bytearray) -> None:
        """Hand over the next part, for good; waits while enough are on their way. Raises what the upload raised."""
        self._check_process()
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
        """No more parts will come: the object gets its name when all have arrived. Does not wait."""
        with self._parts.changed:
            self._parts.ended = True
            self._parts.changed.notify_all()

    def wait(self) -> None:
        """After ``end``: until the object is there. Raises what the upload failed with."""
        self._check_process()
        self.thread.join()
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

    def __del__(self) -> None:
        with suppress(Exception):
            self.abandon()

    def _check_process(self) -> None:
        if self._process != os.getpid():
            raise StoreError(f"{self._name}: this process was forked while it was written", kind="forked")

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


class DirectUpload:
    """The same through the client's file-like writer, for when the interpreter ends and no thread may begin any more.

    It cannot tell the server to forget an upload: what is abandoned here stays until a rule of the bucket removes it.

    Args:
        writer: the client's.
        call: runs what it is given and translates the client's errors.
    """

    def __init__(self, writer: Any, call: Callable[[Callable[[], object]], object]) -> None:
        self._writer = writer
        self._call = call

    def add(self, part: bytearray) -> None:
        self._call(lambda: self._writer.write(part))

    def end(self) -> None:
        pass

    def wait(self) -> None:
        self._call(self._writer.close)

    def abandon(self) -> None:
        self._writer = None


def join_all(threads: Iterable[threading.Thread], timeout_s: float) -> None:
    """Wait for uploads that were given up, so long at most. In a forked child they are not alive."""
    deadline_s = time.monotonic() + timeout_s
    for thread in list(threads):
        thread.join(max(0.0, deadline_s - time.monotonic()))


def on_threads(work: Sequence[Callable[[], None]], at_once: int) -> None:
    """Do all of ``work``, several at a time where threads can be had; returns when all has ended.

    Not a thread pool of the standard library: those take no work while the interpreter ends, which is when the last
    snapshots are committed.

    Raises:
        the first error, in the order of ``work``.
    """
    left = iter(enumerate(work))
    errors: dict[int, BaseException] = {}
    mutex = threading.Lock()

    def take() -> None:
        while True:
            with mutex:
                number, one = next(left, (-1, None))
            if one is None:
                return
            try:
                one()
            except BaseException as error:
                errors[number] = error

    threads = [
        threading.Thread(target=take, name="ciuic-publish", daemon=True) for _ in range(1, min(at_once, len(work)))
    ]
    started = []
    for thread in threads:
        with suppress(RuntimeError):
            thread.start()
            started.append(thread)
    take()
    for thread in started:
        thread.join()
    if errors:
        raise errors[min(errors)]


def _abandon_all() -> None:
    """At process end nothing half uploaded stays at the server, if it can be told within a few seconds."""
    for upload in list(_live):
        upload.abandon()
    join_all(_threads, _EXIT_WAIT_S)


# Not atexit, which would come first: of finalizers the newest go first, and those of whoever writes are newer.
weakref.finalize(_Parts, _abandon_all)
