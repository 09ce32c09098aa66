"""A mirror's log, read with as few questions to the mirror as possible."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager

from ciuic_async.errors import NotFoundError, StoreError
from ciuic_async.format import layout
from ciuic_async.format.digest import Buffer
from ciuic_async.stores.base import Capabilities, Listed, Store, Unpublished

_BY_THEIR_WORD = (layout.SLOTS + "/", layout.LOG_HEAD, layout.WITNESSED, layout.RECEIPTS + "/", layout.CHAIN_FILE)
"""What says how far the mirror is: only its own files tell. All else is checked against these, whoever gives it."""


class MirrorView:
    """The mirror as a store: everything is written, listed and deleted there.

    Tiles, bundles, manifests and locators are read from the local chain where it has them: the same names hold the same
    bytes, and readers check them all the same. So this shows what is true, and not what the mirror has: what is to be
    written there is compared with the mirror itself.

    Args:
        local: the chain.
        mirror: its copy.
    """

    def __init__(self, local: Store, mirror: Store) -> None:
        self._local = local
        self._mirror = mirror

    @property
    def capabilities(self) -> Capabilities:
        """Of the mirror. Asked when it is wanted: that writes there, and waits for a mirror that does not answer."""
        return self._mirror.capabilities

    @property
    def url(self) -> str:
        return self._mirror.url

    def read(self, name: str, limit_bytes: int) -> bytes:
        if not name.startswith(_BY_THEIR_WORD):
            try:
                return self._local.read(name, limit_bytes)
            except (NotFoundError, StoreError):
                pass
        return self._mirror.read(name, limit_bytes)

    def read_into(self, name: str, offset_bytes: int, buffer: memoryview) -> None:
        self._mirror.read_into(name, offset_bytes, buffer)

    def size(self, name: str) -> int | None:
        return self._mirror.size(name)

    def list(self, prefix: str = "") -> Iterator[Listed]:
        return self._mirror.list(prefix)

    def initialize(self) -> None:
        self._mirror.initialize()

    def create(self, name: str, data: Buffer) -> None:
        self._mirror.create(name, data)

    def overwrite(self, name: str, data: Buffer) -> None:
        self._mirror.overwrite(name, data)

    def begin(self, name: str) -> Unpublished:
        return self._mirror.begin(name)

    def publish(self, files: Sequence[Unpublished]) -> None:
        self._mirror.publish(files)

    def delete(self, name: str) -> None:
        self._mirror.delete(name)

    def sweep_unpublished(self, older_than_s: float) -> int:
        return self._mirror.sweep_unpublished(older_than_s)

    def now_s(self) -> float:
        return self._mirror.now_s()

    def lock(self) -> AbstractContextManager[None]:
        return self._mirror.lock()

    def close(self) -> None:
        """Nothing: the two stores belong to others."""
