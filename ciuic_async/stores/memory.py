"""A store in this process's memory: for tests and trials. Nothing survives the process, though all contracts hold."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from ciuic_async.errors import CommitConflictError, IntegrityError, InternalError, NotFoundError, StoreError
from ciuic_async.format.digest import Buffer
from ciuic_async.stores.base import Capabilities, Listed, Unpublished, check_name


class MemoryStore:
    """Names and bytes in a dict."""

    capabilities = Capabilities(orders_writers=True)

    def __init__(self) -> None:
        self._files: dict[str, tuple[bytes, float]] = {}
        self._mutex = threading.RLock()
        self._publishing = threading.RLock()

    @property
    def url(self) -> str:
        return "memory://"

    def initialize(self) -> None:
        pass

    def read(self, name: str, limit_bytes: int) -> bytes:
        data = self._get(name)
        if len(data) > limit_bytes:
            raise IntegrityError(
                f"{name}: {len(data)} bytes, expected at most {limit_bytes}", kind="file_too_large", where=name
            )
        return data

    def read_into(self, name: str, offset_bytes: int, buffer: memoryview) -> None:
        view = buffer.cast("B")
        content = self._get(name)
        end = offset_bytes + len(view)
        if len(view) and len(content) < end:
            raise IntegrityError(
                f"{name}: ends at byte {len(content)}, expected at least {end}: truncated", kind="truncated", where=name
            )
        view[:] = content[offset_bytes:end]

    def size(self, name: str) -> int | None:
        check_name(name)
        with self._mutex:
            return len(self._files[name][0]) if name in self._files else None

    def list(self, prefix: str = "") -> Iterator[Listed]:
        with self._mutex:
            files = sorted(self._files.items())
        for name, (data, modified) in files:
            if not prefix or name.startswith(prefix + "/"):
                yield Listed(name, len(data), modified)

    def create(self, name: str, data: Buffer) -> None:
        check_name(name)
        with self._mutex:
            if name in self._files:
                raise CommitConflictError(f"{name}: exists already", where=name)
            self._files[name] = (bytes(data), time.time())

    def overwrite(self, name: str, data: Buffer) -> None:
        check_name(name)
        with self._mutex:
            self._files[name] = (bytes(data), time.time())

    def begin(self, name: str) -> Unpublished:
        return _MemoryFile(check_name(name))

    def publish(self, files: Sequence[Unpublished]) -> None:
        ours = [file for file in files if isinstance(file, _MemoryFile)]
        if len(ours) != len(files) or any(file.closed for file in ours):
            raise InternalError("publish was given a file that is not open in this store", kind="not_open")
        try:
            for file in ours:
                self.create(file.name, file.content)
        finally:
            for file in ours:
                file.discard()

    def delete(self, name: str) -> None:
        check_name(name)
        with self._mutex:
            self._files.pop(name, None)

    def sweep_unpublished(self, older_than_s: float) -> int:
        return 0

    def now_s(self) -> float:
        return time.time()

    @contextmanager
    def lock(self) -> Iterator[None]:
        with self._publishing:
            yield

    def close(self) -> None:
        pass

    def _get(self, name: str) -> bytes:
        check_name(name)
        with self._mutex:
            if name not in self._files:
                raise NotFoundError(f"{name}: no such name", kind="no_file", where=name)
            return self._files[name][0]


class _MemoryFile:
    def __init__(self, name: str) -> None:
        self.name = name
        self.content = bytearray()
        self.closed = False

    def write(self, data: Buffer, /) -> None:
        if self.closed:
            raise InternalError(f"{self.name}: written to after publish or discard", kind="not_open", where=self.name)
        self.content += data

    def filled(self) -> None:
        pass

    def fileno(self) -> int:
        raise StoreError(f"{self.name}: a file in memory has no descriptor", kind="no_descriptor", where=self.name)

    def discard(self) -> None:
        self.closed = True
        self.content = bytearray()
