"""Stores that wrap a store: trying again, counting, failing on purpose. Each works on every store.

Unpublished files are those of the store inside: whoever wraps sees ``begin`` and ``publish``, not every ``write``.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import TypeVar

from ciuic_async.errors import StoreError
from ciuic_async.format.digest import Buffer
from ciuic_async.stores.base import Capabilities, Listed, Store, Unpublished
from ciuic_async.stores.retry import TRANSIENT, Patience, create_once

T = TypeVar("T")


class Wrapper:
    """Passes every call on. What wraps overrides ``_call``, which all of them go through."""

    def __init__(self, store: Store) -> None:
        self.store = store

    def _call(self, method: str, name: str, work: Callable[[], T]) -> T:
        """Do ``work``, which is ``method`` of the store inside for ``name``."""
        return work()

    @property
    def capabilities(self) -> Capabilities:
        # Descriptors would let writers go past the wrapper.
        return replace(self._call("capabilities", "", lambda: self.store.capabilities), file_descriptors=False)

    @property
    def url(self) -> str:
        return self.store.url

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.store!r})"

    def initialize(self) -> None:
        self._call("initialize", "", self.store.initialize)

    def read(self, name: str, limit_bytes: int) -> bytes:
        return self._call("read", name, lambda: self.store.read(name, limit_bytes))

    def read_into(self, name: str, offset_bytes: int, buffer: memoryview) -> None:
        self._call("read_into", name, lambda: self.store.read_into(name, offset_bytes, buffer))

    def size(self, name: str) -> int | None:
        return self._call("size", name, lambda: self.store.size(name))

    def list(self, prefix: str = "") -> Iterator[Listed]:
        return iter(self._call("list", prefix, lambda: tuple(self.store.list(prefix))))

    def create(self, name: str, data: Buffer) -> None:
        self._call("create", name, lambda: self.store.create(name, data))

    def overwrite(self, name: str, data: Buffer) -> None:
        self._call("overwrite", name, lambda: self.store.overwrite(name, data))

    def begin(self, name: str) -> Unpublished:
        return self._call("begin", name, lambda: self.store.begin(name))

    def publish(self, files: Sequence[Unpublished]) -> None:
        self._call("publish", files[0].name if files else "", lambda: self.store.publish(files))

    def delete(self, name: str) -> None:
        self._call("delete", name, lambda: self.store.delete(name))

    def sweep_unpublished(self, older_than_s: float) -> int:
        return self._call("sweep_unpublished", "", lambda: self.store.sweep_unpublished(older_than_s))

    def now_s(self) -> float:
        return self._call("now_s", "", self.store.now_s)

    def lock(self) -> AbstractContextManager[None]:
        return self.store.lock()

    def close(self) -> None:
        self.store.close()


class Retrying(Wrapper):
    """Tries again what may be tried again, where the place was not to be reached or had too much to do.

    ``publish`` and what is written to unpublished files is never repeated. Other errors pass at once.

    Args:
        limit_s: no try begins later than this after the first one of a call.
    """

    def __init__(self, store: Store, limit_s: float = 60.0) -> None:
        super().__init__(store)
        self._limit_s = limit_s

    def _call(self, method: str, name: str, work: Callable[[], T]) -> T:
        patience = Patience(self._limit_s)
        while True:
            try:
                return work()
            except StoreError as error:
                if error.kind not in TRANSIENT or method == "publish" or not patience.pause():
                    raise

    def create(self, name: str, data: Buffer) -> None:
        content = bytes(data)  # the same in every try
        create_once(
            name,
            content,
            lambda: self.store.create(name, content),
            lambda: self.store.read(name, len(content)),
            Patience(self._limit_s),
        )


@dataclass(frozen=True, slots=True)
class Meter:
    """What was asked of a store by one method."""

    calls: int = 0
    failed: int = 0
    bytes: int = 0
    """Read or written through the call itself; what unpublished files take is not in it."""
    busy_s: float = 0.0
    """Summed over all threads."""


class Metered(Wrapper):
    """Counts calls, failures, bytes and time, by method."""

    def __init__(self, store: Store) -> None:
        super().__init__(store)
        self._mutex = threading.Lock()
        self._meters: dict[str, Meter] = {}

    def meters(self) -> dict[str, Meter]:
        """What was counted up to now."""
        with self._mutex:
            return dict(self._meters)

    def read(self, name: str, limit_bytes: int) -> bytes:
        data = super().read(name, limit_bytes)
        self._add("read", bytes=len(data))
        return data

    def read_into(self, name: str, offset_bytes: int, buffer: memoryview) -> None:
        super().read_into(name, offset_bytes, buffer)
        self._add("read_into", bytes=buffer.nbytes)

    def create(self, name: str, data: Buffer) -> None:
        super().create(name, data)
        self._add("create", bytes=memoryview(data).nbytes)

    def overwrite(self, name: str, data: Buffer) -> None:
        super().overwrite(name, data)
        self._add("overwrite", bytes=memoryview(data).nbytes)

    def _call(self, method: str, name: str, work: Callable[[], T]) -> T:
        started = time.perf_counter()
        failed = 1
        try:
            result = work()
            failed = 0
            return result
        finally:
            self._add(method, calls=1, failed=failed, busy_s=time.perf_counter() - started)

    def _add(self, method: str, *, calls: int = 0, failed: int = 0, bytes: int = 0, busy_s: float = 0.0) -> None:
        with self._mutex:
            old = self._meters.get(method, Meter())
            self._meters[method] = Meter(old.calls + calls, old.failed + failed, old.bytes + bytes, old.busy_s + busy_s)


@dataclass(frozen=True, slots=True)
class Fault:
    """What goes wrong with one call."""

    error: Exception
    after: bool = False
    """The call is done and only its answer is lost."""


class Faulty(Wrapper):
    """Fails where it is told to. For trials of what happens then.

    Args:
        plan: asked before each call, with the method's name and the name it is about; None: nothing goes wrong.
            Called by any thread.
    """

    def __init__(self, store: Store, plan: Callable[[str, str], Fault | None]) -> None:
        super().__init__(store)
        self._plan = plan

    def _call(self, method: str, name: str, work: Callable[[], T]) -> T:
        fault = self._plan(method, name)
        if fault is None:
            return work()
        if fault.after:
            work()
        raise fault.error
