"""A store that writes and reads here, and takes what is missing or damaged here from a second copy there.

Only data falls back (segments, manifests, locators): what it must be is known from digests, so it does not matter who
gives it. The log never does: which entries there are is for the slots *here* to say. Nor does ``size``: what is
referred to instead of written must be here.

Bytes that are there and wrong are found by whoever checks digests, above this store; ``heal`` is their way to the other
copy.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import TypeVar

from ciuic_async.errors import CiuicError, IntegrityError, NotFoundError, StoreError
from ciuic_async.events import logger
from ciuic_async.format import layout
from ciuic_async.format.digest import Buffer
from ciuic_async.stores.base import Capabilities, Listed, Store, Unpublished

T = TypeVar("T")

_TOLD_KEPT = 1000
"""Names of damaged files that are remembered; further ones are told of again."""


class FallbackStore:
    """Two stores as one.

    Args:
        here: everything is written here, and read if it is good.
        there: holds the same names with the same bytes, or some of them. Closed with this object.
    """

    def __init__(self, here: Store, there: Store) -> None:
        self.here = here
        self.there = there
        self._mutex = threading.Lock()
        self._told: set[str] = set()

    @property
    def capabilities(self) -> Capabilities:
        """Of the store here. Asked when it is wanted: a remote place is tried by writing, and readers do not write."""
        return self.here.capabilities

    @property
    def url(self) -> str:
        return self.here.url

    @property
    def healed(self) -> frozenset[str]:
        """Names that were missing or damaged here, and good there."""
        with self._mutex:
            return frozenset(self._told)

    def heal(self, error: CiuicError, read: Callable[[Store], T]) -> T:
        """What ``read`` gives of the other copy, after ``error`` here; told of in the log once for each file.

        Raises:
            CiuicError: the error from here, with what the other copy said, and that as its cause.
        """
        try:
            found = read(self.there)
        except CiuicError as other:
            message = f"{error}; and the copy at {self.there.url}: {other}"
            raise type(error)(message, kind=error.kind, where=error.where) from other
        self._tell(error)
        return found

    def forget_healed(self, name: str) -> None:
        """A file is good here again."""
        with self._mutex:
            self._told.discard(name)

    # --- reading ------------------------------------------------------------------------------------------------------

    def read(self, name: str, limit_bytes: int) -> bytes:
        try:
            return self.here.read(name, limit_bytes)
        except (NotFoundError, StoreError) as error:
            if not _is_data(name):
                raise
            return self.heal(_named(error, name), lambda there: there.read(name, limit_bytes))

    def read_into(self, name: str, offset_bytes: int, buffer: memoryview) -> None:
        try:
            self.here.read_into(name, offset_bytes, buffer)
        except (NotFoundError, StoreError, IntegrityError) as error:
            if not _is_data(name):
                raise
            self.heal(_named(error, name), lambda there: there.read_into(name, offset_bytes, buffer))

    def size(self, name: str) -> int | None:
        return self.here.size(name)

    def list(self, prefix: str = "") -> Iterator[Listed]:
        return self.here.list(prefix)

    # --- writing: here alone ------------------------------------------------------------------------------------------

    def initialize(self) -> None:
        self.here.initialize()

    def create(self, name: str, data: Buffer) -> None:
        self.here.create(name, data)

    def overwrite(self, name: str, data: Buffer) -> None:
        self.here.overwrite(name, data)

    def begin(self, name: str) -> Unpublished:
        return self.here.begin(name)

    def publish(self, files: Sequence[Unpublished]) -> None:
        self.here.publish(files)

    def delete(self, name: str) -> None:
        self.here.delete(name)

    def sweep_unpublished(self, older_than_s: float) -> int:
        return self.here.sweep_unpublished(older_than_s)

    def now_s(self) -> float:
        return self.here.now_s()

    def lock(self) -> AbstractContextManager[None]:
        return self.here.lock()

    def close(self) -> None:
        self.here.close()
        self.there.close()

    def _tell(self, error: CiuicError) -> None:
        name = (error.where or "").partition(": ")[0]
        with self._mutex:
            if name in self._told:
                return
            if len(self._told) < _TOLD_KEPT:
                self._told.add(name)
        logger.warning("%s: not good here, read from %s instead: %s", name or self.here.url, self.there.url, error)


def out_of_reach(error: BaseException) -> StoreError | None:
    """Why a copy could not be asked, if an error comes of that: then what was to be read is not known to be lost."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, StoreError) and cause.kind != "eio":
            return cause
        cause = cause.__cause__
    return None


def _is_data(name: str) -> bool:
    return name.startswith((layout.SEGMENTS + "/", layout.MANIFESTS + "/", layout.LOCATORS + "/"))


def _named(error: CiuicError, name: str) -> CiuicError:
    """The error with the name of the file as its place: stores may say it in their own way."""
    return error if error.where == name else type(error)(str(error), kind=error.kind, where=name)
