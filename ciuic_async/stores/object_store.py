"""Object stores: S3 and all that speak it, Google Cloud Storage, Azure. Through the package obstore, an extra.

Slots and other small names are single puts with create-once, judged by what the store then holds. Segments are
multipart uploads that begin with the first full part and become visible when they are complete; they rely on nothing
but their names, which their writer drew at random.

Equal bytes under a name mean the own write, whose answer was lost. That holds because what two writers create is never
equal: a slot is signed over a run and a time, ``ciuic.json`` holds a random origin, all else lies under a snapshot's
own random id. What is derived (tiles) is equal whoever writes it.
"""

from __future__ import annotations

import builtins
import os
import secrets
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar

from ciuic_async.errors import (
    CiuicError,
    CommitConflictError,
    IntegrityError,
    InternalError,
    NotFoundError,
    StoreError,
    UsageError,
)
from ciuic_async.format import layout
from ciuic_async.format.digest import Buffer
from ciuic_async.stores import credentials, remote_errors
from ciuic_async.stores.base import Capabilities, Listed, Unpublished, check_name
from ciuic_async.stores.multipart import PART_BYTES, PARTS_AT_ONCE, DirectUpload, Upload, join_all, on_threads
from ciuic_async.stores.retry import LONGEST_PAUSE_S, TRANSIENT, Patience, create_once

T = TypeVar("T")

_READ_STEP_BYTES = 1 << 20
_PUBLISH_THREADS = 8
_LOCK_WAIT_S = 10.0
_CLOSE_WAIT_S = 5.0
_TRIES = 10
_LISTED_LIMIT = 2_000_000
"""Objects of one listing: a few hundred MB of memory."""
_CLIENTS_SHARE = 0.5
"""Of the time for trying again: the client's own tries of one request, which alone can repeat a part of an upload."""


class _Process:
    """What this process knows of object stores."""

    def __init__(self) -> None:
        self.user: int | None = None
        """The process that the client's threads belong to: they do not survive a fork."""
        self.stores: weakref.WeakSet[ObjectStore] = weakref.WeakSet()
        self.kept: list[object] = []
        self.mutex = threading.Lock()
        self.orders_writers: dict[tuple[str, str], bool] = {}
        self.locks: weakref.WeakValueDictionary[tuple[str, str], Any] = weakref.WeakValueDictionary()

    def lock(self, place: tuple[str, str]) -> Any:
        with self.mutex:
            found = self.locks.get(place)
            if found is None:
                found = self.locks[place] = threading.RLock()
            return found

    def after_fork(self) -> None:
        """A child never lets go of its copies: freeing them could take connections from its parent."""
        self.kept = list(self.stores)
        self.mutex = threading.Lock()


_process = _Process()
os.register_at_fork(after_in_child=_process.after_fork)


class ObjectStore:
    """A store under a prefix of a bucket. Opening contacts nobody; buckets are never made.

    Usable from several threads. A forked child cannot use object stores once its parent did (kind ``forked``): start
    processes by spawn.

    Args:
        place: bucket and prefix.
        options: see ``credentials.settings``.

    Raises:
        UsageError: obstore is not installed (kind ``missing_extra``), or an option is wrong.
    """

    def __init__(self, place: credentials.Place, options: Mapping[str, str] | None = None) -> None:
        self._place = place
        self._settings = credentials.settings(place, options)
        self._key = (place.url, self._settings.endpoint)
        self._lock = _process.lock(self._key)
        self._keys = self._settings.take_keys() if place.scheme == "s3" else None
        self._client = _client(place)
        self._connected: Any = self._connect()  # to see at once whether the options are good; contacts nobody
        self._uploads: weakref.WeakSet[Upload] = weakref.WeakSet()
        self._threads: weakref.WeakSet[threading.Thread] = weakref.WeakSet()
        _process.stores.add(self)

    @property
    def url(self) -> str:
        return self._place.url

    def __repr__(self) -> str:
        return f"ObjectStore({self.url!r})"

    @property
    def capabilities(self) -> Capabilities:
        """What the place can do is tried, by writing, when it is first asked for. Raises StoreError."""
        known = _process.orders_writers.get(self._key)
        if known is None:
            # Twice before it is denied: whoever sweeps ``tmp/`` between the two creates makes one trial fail.
            known = self._try_create_once() or self._try_create_once()
            _process.orders_writers[self._key] = known
        return Capabilities(orders_writers=known)

    def initialize(self) -> None:
        """Object stores have no folders; that writing works at all is seen here. Raises StoreError."""
        _ = self.capabilities

    # --- reading ------------------------------------------------------------------------------------------------------

    def read(self, name: str, limit_bytes: int) -> bytes:
        self._check_visible(name)
        return self._call(name, lambda: self._read(name, limit_bytes))

    def _read(self, name: str, limit_bytes: int) -> bytes:
        result = self._client.get(self._remote, name)
        size = result.meta["size"]
        if size > limit_bytes:
            raise self._too_large(name, size, limit_bytes)
        pieces, found = [], 0
        for piece in result.stream(min_chunk_size=_READ_STEP_BYTES):
            found += len(piece)
            if found > limit_bytes:
                raise self._too_large(name, found, limit_bytes)
            pieces.append(bytes(piece))
        if found != size:
            raise StoreError(
                f"{self._where(name)}: the connection ended at byte {found} of {size}", kind="unreachable", where=name
            )
        return b"".join(pieces)

    def read_into(self, name: str, offset_bytes: int, buffer: memoryview) -> None:
        self._check_visible(name)
        view = buffer.cast("B")
        if not len(view):
            if self.size(name) is None:
                raise self._missing(name)
            return
        self._call(name, lambda: self._read_into(name, offset_bytes, view))

    def _read_into(self, name: str, offset_bytes: int, view: memoryview) -> None:
        done, end = 0, offset_bytes + len(view)
        try:
            result = self._client.get(self._remote, name, options={"range": (offset_bytes, end)})
            for piece in result.stream(min_chunk_size=_READ_STEP_BYTES):
                taken = memoryview(piece)[: len(view) - done]
                view[done : done + len(taken)] = taken
                done += len(taken)
                if done == len(view):
                    return
        except Exception as error:
            if remote_errors.status_of(error) != 416:
                raise
        # An answer may end too soon on its way here: that is no damage, and must not be taken for it.
        size = int(self._client.head(self._remote, name)["size"])
        if size >= end:
            raise StoreError(
                f"{self._where(name)}: an answer of {done} bytes for {len(view)} from {offset_bytes} on, and the "
                f"object has {size}: something on the way cuts answers off",
                kind="bad_answer",
                where=name,
            )
        raise IntegrityError(
            f"{self._where(name)}: {size} bytes, expected {end} or more: truncated", kind="truncated", where=name
        )

    def size(self, name: str) -> int | None:
        if _is_hidden(check_name(name)):
            return None
        try:
            return int(self._call(name, lambda: self._client.head(self._remote, name))["size"])
        except NotFoundError:
            return None

    def list(self, prefix: str = "") -> Iterator[Listed]:
        if prefix and _is_hidden(check_name(prefix)):
            return
        found = self._call(prefix, lambda: self._listed(prefix))
        yield from sorted((item for item in found if not _is_hidden(item.name)), key=lambda item: item.name)

    def _listed(self, prefix: str) -> builtins.list[Listed]:
        found: builtins.list[Listed] = []
        for page in self._client.list(self._remote, prefix or None):
            found += [Listed(item["path"], item["size"], item["last_modified"].timestamp()) for item in page]
            if len(found) > _LISTED_LIMIT:  # a server could go on for ever
                raise StoreError(
                    f"{self._where(prefix)}: lists more than {_LISTED_LIMIT} objects: more than a chain can have",
                    kind="too_many_objects",
                    where=prefix or self.url,
                )
        return found

    # --- writing ------------------------------------------------------------------------------------------------------

    def create(self, name: str, data: Buffer) -> None:
        check_name(name)
        if not self.capabilities.orders_writers:
            if self.size(name) is not None:
                raise self._exists(name)
            self.overwrite(name, data)
            return
        self._create(name, bytes(data))  # the same in every try, whatever the caller does with its buffer

    def _create(self, name: str, content: bytes) -> None:
        create_once(
            name,
            content,
            lambda: self._put(name, content, "create"),
            lambda: self._once(name, lambda: self._read(name, len(content))),
            Patience(self._settings.retry_timeout_s),
        )

    def _put(self, name: str, data: bytes, mode: str) -> None:
        self._once(name, lambda: self._client.put(self._remote, name, data, mode=mode, use_multipart=False))

    def overwrite(self, name: str, data: Buffer) -> None:
        content = bytes(data)
        self._call(check_name(name), lambda: self._put(name, content, "overwrite"))

    def begin(self, name: str) -> Unpublished:
        return _ObjectFile(self, check_name(name))

    def publish(self, files: Sequence[Unpublished]) -> None:
        ours = [file for file in files if isinstance(file, _ObjectFile)]
        if len(ours) != len(files) or any(file.store is not self or not file.is_open for file in ours):
            raise InternalError(f"{self.url}: publish was given a file that is not open here", kind="not_open")
        try:
            on_threads([file.complete for file in ours], _PUBLISH_THREADS)
        finally:
            for file in ours:
                file.discard()

    def upload(self, name: str) -> Upload | DirectUpload:
        """A multipart upload that has begun. For the files of this store."""
        self._check_process()

        def put(parts: Iterator[bytearray]) -> None:
            self._once(
                name,
                lambda: self._client.put(
                    self._remote,
                    name,
                    parts,
                    use_multipart=True,
                    chunk_size=PART_BYTES,
                    max_concurrency=PARTS_AT_ONCE,
                ),
            )

        try:
            upload = Upload(name, put)
        except RuntimeError:
            writer = self._client.open_writer(self._remote, name, buffer_size=PART_BYTES, max_concurrency=PARTS_AT_ONCE)
            return DirectUpload(writer, lambda work: self._once(name, work))
        self._uploads.add(upload)
        self._threads.add(upload.thread)
        return upload

    def delete(self, name: str) -> None:
        with suppress(NotFoundError):
            self._call(check_name(name), lambda: self._client.delete(self._remote, name))

    def sweep_unpublished(self, older_than_s: float) -> int:
        """What trials and looks at the clock left under ``tmp/``.

        The client cannot list uploads that were begun by processes which were killed: a rule of the bucket's for
        incomplete uploads removes those.
        """
        left = self._call(layout.TEMPORARY, lambda: self._listed(layout.TEMPORARY))
        if not left:
            return 0
        now_s = self.now_s()
        old = [item.name for item in left if now_s - item.modified_s >= older_than_s]
        for name in old:
            self.delete(name)
        return len(old)

    def now_s(self) -> float:
        # Read from a listing: what ``Listed`` is compared with, and finer than a head on some stores.
        folder = layout.temporary()
        name = f"{folder}/now"
        self.overwrite(name, b"")
        try:
            found = self._call(name, lambda: self._listed(folder))
        finally:
            self.delete(name)
        if not found:
            raise StoreError(f"{self._where(name)}: was written and is not listed", kind="store", where=name)
        return float(found[0].modified_s)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Among the threads of this process only. Waits at most ten seconds."""
        held = self._lock.acquire(timeout=_LOCK_WAIT_S)
        try:
            yield
        finally:
            if held:
                self._lock.release()

    def close(self) -> None:
        """Ends uploads that nobody published; waits a few seconds for the server to hear of it."""
        for upload in list(self._uploads):
            upload.abandon()
        join_all(self._threads, _CLOSE_WAIT_S)
        self._connected = None  # its connections end with it

    # --- inside -------------------------------------------------------------------------------------------------------

    @property
    def _remote(self) -> Any:
        """The client's object for this place, with its connections; another one after ``close``."""
        found = self._connected
        if found is None:
            found = self._connected = self._connect()
        return found

    def _connect(self) -> Any:
        place, settings, keys = self._place, self._settings, self._keys
        kind = {"s3": "S3Store", "gs": "GCSStore", "az": "AzureStore"}[place.scheme]
        retry = {
            "max_retries": _TRIES,
            "retry_timeout": timedelta(seconds=settings.retry_timeout_s * _CLIENTS_SHARE),
            "backoff": {"max_backoff": timedelta(seconds=LONGEST_PAUSE_S)},
        }
        try:
            return getattr(self._client.store, kind)(
                place.bucket,
                prefix=place.prefix or None,
                config=settings.config,
                client_options=settings.client,
                retry_config=retry,
                **({} if keys is None else {"credential_provider": lambda: keys}),
            )
        except Exception as error:
            failure = credentials.refused(error, place)
        raise failure

    def _try_create_once(self) -> bool:
        """Create one name twice. The second must fail, and the first one's bytes must stay."""
        name = f"{layout.temporary()}/once"
        first, second = secrets.token_bytes(8), secrets.token_bytes(8)
        try:
            self._create(name, first)
            self._create(name, second)
        except CommitConflictError:
            return True
        except StoreError as error:
            if error.kind != "not_supported":
                raise
        finally:
            with suppress(StoreError):
                self.delete(name)
        return False

    def _call(self, name: str, work: Callable[[], T]) -> T:
        """Do what the client does, again and again for a while where that may help: only what may be repeated."""
        patience = Patience(self._settings.retry_timeout_s)
        while True:
            try:
                return self._once(name, work)
            except StoreError as error:
                if error.kind not in TRANSIENT or not patience.pause():
                    raise

    def _once(self, name: str, work: Callable[[], T]) -> T:
        """Do what the client does; its errors become this package's, and nothing of its message travels along."""
        self._check_process()
        try:
            return work()
        except CiuicError:
            raise
        except Exception as error:
            if type(error).__name__ in ("AlreadyExistsError", "PreconditionError"):
                failure: CiuicError = self._exists(name)
            else:
                failure = remote_errors.translate(error, self.url, name)
        raise failure

    def _check_process(self) -> None:
        if _process.user is None:
            _process.user = os.getpid()
        if _process.user != os.getpid():
            raise StoreError(
                f"{self.url}: this process was forked from one that uses object stores, whose connections it cannot "
                "share: start it by spawn (multiprocessing.set_start_method)",
                kind="forked",
                where=self.url,
            )

    def _check_visible(self, name: str) -> None:
        if _is_hidden(check_name(name)):
            raise self._missing(name)

    def _missing(self, name: str) -> NotFoundError:
        return NotFoundError(f"{self._where(name)}: no such object", kind="no_file", where=name)

    def _exists(self, name: str) -> CommitConflictError:
        return CommitConflictError(f"{self._where(name)}: exists already", where=name)

    def _too_large(self, name: str, size_bytes: int, limit_bytes: int) -> IntegrityError:
        return IntegrityError(
            f"{self._where(name)}: {size_bytes} bytes, expected at most {limit_bytes}",
            kind="file_too_large",
            where=name,
        )

    def _where(self, name: str) -> str:
        return f"{self.url}/{name}"


class _ObjectFile:
    """A file being filled: in memory up to one part, then an upload."""

    def __init__(self, store: ObjectStore, name: str) -> None:
        self.name = name
        self.store = store
        self.is_open = True
        self._rest = bytearray()
        self._size_bytes = 0
        self._upload: Upload | DirectUpload | None = None
        self._is_filled = False

    def write(self, data: Buffer, /) -> None:
        if not self.is_open:
            raise InternalError(f"{self.name}: written to after publish or discard", kind="not_open", where=self.name)
        view = memoryview(data).cast("B")
        while len(view):
            taken = view[: PART_BYTES - len(self._rest)]
            self._rest += taken
            self._size_bytes += len(taken)
            view = view[len(taken) :]
            if len(self._rest) == PART_BYTES:
                self._send()

    def _send(self) -> None:
        # Given away for good: the client reads it while the caller goes on.
        part, self._rest = self._rest, bytearray()
        if self._upload is None:
            self._upload = self.store.upload(self.name)
        self._upload.add(part)

    def filled(self) -> None:
        # The client keeps the last part until the upload ends. So a file of several parts gets its name already: it is
        # whole, no manifest names it yet, and readers look at nothing else. A small one waits here. Who discards it
        # leaves an orphan: nothing that has a name is deleted but by retention, for the name may be somebody's.
        if self._upload is not None and not self._is_filled and self.store.size(self.name) is None:
            self._end(self._upload)

    def _end(self, upload: Upload | DirectUpload) -> None:
        if self._rest:
            self._send()
        upload.end()
        self._is_filled = True

    def complete(self) -> None:
        """Give it its name; durable on return. Raises CommitConflictError, StoreError."""
        if self._upload is None:
            self.store.create(self.name, self._rest)
            return
        if not self._is_filled:
            if self.store.size(self.name) is not None:
                raise CommitConflictError(f"{self.store.url}/{self.name}: exists already", where=self.name)
            self._end(self._upload)
        try:
            self._upload.wait()
        except (NotFoundError, StoreError):
            # The answer may have been lost, and the server forgets uploads that are complete. The name is this
            # writer's own, and an upload appears whole or not at all.
            if self.store.size(self.name) != self._size_bytes:
                raise

    def fileno(self) -> int:
        raise StoreError(f"{self.name}: an object has no descriptor", kind="no_descriptor", where=self.name)

    def discard(self) -> None:
        self.is_open = False
        self._rest = bytearray()
        if self._upload is not None:
            self._upload.abandon()


def _is_hidden(name: str) -> bool:
    return name == layout.TEMPORARY or name.startswith(layout.TEMPORARY + "/")


def _client(place: credentials.Place) -> Any:
    try:
        import obstore
    except ImportError:
        raise UsageError(
            f"{place.scheme}:// needs the package obstore: pip install 'ciuic-async[s3]'", kind="missing_extra"
        ) from None
    return obstore
