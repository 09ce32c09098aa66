"""A folder in HDFS.

Saving a file: written under a temporary name in ``tmp/``, ``hsync`` at the end of each block and of the file, closed,
renamed without overwrite. The NameNode does the rename as one step and refuses it when the name exists: create-once.
A file that is created under its own name would be seen before it is filled, so nobody does that.

What durable means here: ``hsync`` makes every DataNode of the write's pipeline fsync the block and its checksums, and
the NameNode logs close and rename to its journal, synced, before it answers. So all replicas that were written are on
disks, not in memory. Three things are the cluster's: a pipeline from which DataNodes fell away goes on with those that
are left, and the NameNode makes the missing replicas later; older DataNodes do not sync the *folder* that a closed
block is moved to (HDFS-5042), so there a loss of power of all replicas at once may still take a block that was closed
seconds ago; and the journal is as durable as the disks (or JournalNodes) it is on.

A lost answer to a rename is judged by what is there then. What a killed writer leaves lies under ``tmp/``, with a lease
that the NameNode recovers some day; nobody waits for it, because names are never reused.
"""

from __future__ import annotations

import importlib.util
import os
import re
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, NoReturn, TypeVar
from urllib.parse import unquote, urlsplit

from ciuic_async.errors import (
    CommitConflictError,
    IntegrityError,
    InternalError,
    NotFoundError,
    StoreError,
    UsageError,
)
from ciuic_async.format import layout
from ciuic_async.format.digest import Buffer
from ciuic_async.stores.base import Capabilities, DirectFile, Listed, Unpublished, check_name
from ciuic_async.stores.hdfs_link import Access, Borrowed, Link

if TYPE_CHECKING:
    from hdfs_native import Client, FileReader, FileStatus, WriteOptions
    from hdfs_native._internal import RawFileWriter

T = TypeVar("T")

_TIMEOUT_S = 60.0
_DATA_TIMEOUTS = 3  # a DataNode that hangs is replaced after a minute; that must fit in
_DISCARD_TIMEOUT_S = 10.0
_BLOCK_BYTES = 128 << 20
_BUFFER_BYTES = 4 << 20
_PIECE_BYTES = 1 << 20  # handed to the client library at once: copied with the GIL held
_READ_BYTES = 4 << 20
_READ_ATTEMPTS = 3
_MAX_DEPTH = 32  # folders below the root; the format needs 11
_OWN_OPTIONS = (
    "timeout_s",
    "block_size_bytes",
    "config_dir",
    "kerberos_principal",
    "kerberos_keytab",
    "kerberos_cache",
)
_FOLDERS = (
    layout.SEGMENTS,
    layout.MANIFESTS,
    layout.LOCATORS,
    layout.SLOTS,
    layout.TILES,
    layout.TEMPORARY,
)


class HdfsStore:
    """A store in a folder of HDFS. Opening contacts nobody.

    Args:
        url: ``hdfs://host:port/path``, or ``hdfs://nameservice/path`` with a configuration folder that defines it.
        options: ``timeout_s`` of a question to the NameNode (60; writing and reading data may take three times as
            long), ``block_size_bytes`` (128 MiB), ``config_dir`` instead of ``HADOOP_CONF_DIR``,
            ``kerberos_principal``, ``kerberos_keytab``, ``kerberos_cache``; every name with a dot is a setting of
            Hadoop's client, and goes before the configuration folder.

    Raises:
        UsageError: what the URL or the options say cannot be meant; the package hdfs-native is not installed (kind
            ``missing_extra``).
    """

    capabilities = Capabilities(orders_writers=True)

    def __init__(self, url: str, options: Mapping[str, str] | None = None) -> None:
        authority, self._root = _parse(url)
        if importlib.util.find_spec("hdfs_native") is None:
            raise UsageError(
                f"{url}: HDFS needs the package hdfs-native: pip install 'ciuic-async[hdfs]'", kind="missing_extra"
            )
        options = options or {}
        unknown = sorted(name for name in options if name not in _OWN_OPTIONS and "." not in name)
        if unknown:
            raise UsageError(f"{url}: unknown option {unknown[0]!r}: expected one of {', '.join(_OWN_OPTIONS)}")
        self._timeout_s = _positive(options, "timeout_s", _TIMEOUT_S)
        self._block_bytes = int(_positive(options, "block_size_bytes", _BLOCK_BYTES))
        if self._block_bytes % 512:
            raise UsageError(f"block_size_bytes: a multiple of 512, found {self._block_bytes}")
        self._url = f"hdfs://{authority}{self._root}"
        settings = {name: value for name, value in options.items() if "." in name}
        # Another replica is asked before the whole call is given up.
        settings.setdefault("dfs.client.socket-timeout", str(int(self._timeout_s * 1000 / 3)))
        if ":" in authority:  # one NameNode: there is no other to go to
            settings.setdefault("dfs.client.failover.max.attempts", "1")
        self._link = Link(
            Access(
                authority,
                settings,
                options.get("config_dir"),
                options.get("kerberos_principal"),
                options.get("kerberos_keytab"),
                options.get("kerberos_cache"),
            ),
            self._url,
        )

    @property
    def url(self) -> str:
        return self._url

    def initialize(self) -> None:
        def make(client: Client) -> None:
            for folder in _FOLDERS:
                client.mkdirs(self._path(folder), create_parent=True)

        try:
            self._ask(make, "")
        except FileExistsError as error:
            raise StoreError(
                f"{self._url}: a file stands where a folder is expected: choose another path", kind="enotdir"
            ) from error

    # --- reading ------------------------------------------------------------------------------------------------------

    def read(self, name: str, limit_bytes: int) -> bytes:
        path = self._visible(name)

        def whole(client: Client) -> bytes:
            reader = client.read(path)
            if len(reader) > limit_bytes:
                raise IntegrityError(
                    f"{self._where(name)}: {len(reader)} bytes, expected at most {limit_bytes}",
                    kind="file_too_large",
                    where=name,
                )
            return b"".join(self._pieces(reader, name, 0, len(reader)))

        return self._read(_again(whole), name)

    def read_into(self, name: str, offset_bytes: int, buffer: memoryview) -> None:
        path, size, target = self._visible(name), buffer.nbytes, Borrowed(buffer.cast("B"))

        def fill(client: Client) -> None:
            reader = client.read(path)
            if size and offset_bytes + size > len(reader):
                self._truncated(name, min(len(reader), offset_bytes + size), offset_bytes + size)
            self._fill(reader, name, offset_bytes, size, target)

        try:
            self._read(_again(fill), name)
        finally:
            target.take_back()

    def open_direct(self, name: str) -> DirectFile:
        """Saves the question where the blocks lie, which every other read asks."""
        path = self._visible(name)
        return _HdfsDirectFile(self, name, self._read(lambda client: (client, client.read(path)), name))

    def size(self, name: str) -> int | None:
        try:
            status = self._ask(lambda client: client.get_file_info(self._path(name)), name)
        except FileNotFoundError:
            return None
        if name == layout.TEMPORARY or name.startswith(layout.TEMPORARY + "/"):
            return None
        if status.isdir:
            raise IntegrityError(f"{self._where(name)}: not a regular file", kind="not_a_file", where=name)
        return status.length

    def list(self, prefix: str = "") -> Iterator[Listed]:
        if prefix == layout.TEMPORARY or prefix.startswith(layout.TEMPORARY + "/"):
            return
        if prefix.count("/") >= _MAX_DEPTH:
            raise IntegrityError(
                f"{self._where(prefix)}: folders nested deeper than {_MAX_DEPTH}: not made by this package",
                kind="bad_name",
                where=prefix,
            )
        found = self._folder(prefix)
        # By whole name: a folder's files come where its name with the slash belongs.
        for base in sorted(found, key=lambda base: base + "/" * found[base].isdir):
            name = f"{prefix}/{base}" if prefix else base
            if found[base].isdir:
                yield from self.list(name)
            else:
                yield Listed(name, found[base].length, found[base].modification_time / 1000)

    # --- writing ------------------------------------------------------------------------------------------------------

    def create(self, name: str, data: Buffer) -> None:
        self._write_whole(name, data, replace=False)

    def overwrite(self, name: str, data: Buffer) -> None:
        self._write_whole(name, data, replace=True)

    def begin(self, name: str) -> Unpublished:
        check_name(name)
        path = self._path(layout.temporary())
        try:
            made = self._ask(lambda client: (client, client.inner.create(path, self._write_options())), name)
        except (FileNotFoundError, FileExistsError) as error:
            raise StoreError(f"{self._where(name)}: {str(error)[:200]}", kind="store", where=name) from error
        return _HdfsFile(self, name, path, *made)

    def publish(self, files: Sequence[Unpublished]) -> None:
        ours = [file for file in files if isinstance(file, _HdfsFile) and file.store is self]
        if len(ours) != len(files) or any(not file.is_open for file in ours):
            for file in files:
                file.discard()
            raise InternalError(f"{self._url}: publish was given a file that is not open here", kind="not_open")
        try:
            self._finish(ours)
            for file in ours:
                self._move(file, lambda file=file: self._arrived(file), replace=False)  # type: ignore[misc]
        finally:
            for file in ours:
                file.discard()

    def delete(self, name: str) -> None:
        path = self._path(check_name(name))
        with suppress(FileNotFoundError):
            self._ask(lambda client: client.delete(path), name)
        folder = name.rpartition("/")[0]
        if folder.rpartition("/")[0] in (layout.SEGMENTS, layout.MANIFESTS):  # a snapshot's: goes with its last file
            with suppress(StoreError, FileNotFoundError):
                self._ask(lambda client: client.delete(self._path(folder)), name)

    def sweep_unpublished(self, older_than_s: float) -> int:
        """By age alone, but for the open files of this process: what other writers do cannot be known from here."""
        mine = {file.path for file in list(_open_files)}
        now_s, removed = self.now_s(), 0
        for base, status in sorted(self._folder(layout.TEMPORARY).items()):
            path = f"{self._path(layout.TEMPORARY)}/{base}"
            if status.isdir or path in mine or now_s - status.modification_time / 1000 < older_than_s:
                continue
            with suppress(FileNotFoundError):
                removed += self._ask(lambda client, path=path: client.delete(path), layout.TEMPORARY)  # type: ignore[misc]
        return removed

    def now_s(self) -> float:
        path = self._path(layout.temporary())

        def look(client: Client) -> float:
            file = client.inner.create(path, self._write_options())
            try:
                return client.get_file_info(path).modification_time / 1000
            finally:
                file.close()
                client.delete(path)

        try:
            return self._ask(look, layout.TEMPORARY)
        except (FileNotFoundError, FileExistsError) as error:
            raise StoreError(
                f"{self._where(layout.TEMPORARY)}: {str(error)[:200]}", kind="store", where=layout.TEMPORARY
            ) from error

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Nothing: a lock would need a lease that somebody can hold and die. The slots order writers."""
        yield

    def close(self) -> None:
        self._link.close()

    # --- inside -------------------------------------------------------------------------------------------------------

    def _write_whole(self, name: str, data: Buffer, *, replace: bool) -> None:
        file = self.begin(name)
        assert isinstance(file, _HdfsFile)
        try:
            file.write(data)
            self._finish([file])
            self._move(file, lambda: self._holds(name, data), replace=replace)
        finally:
            file.discard()

    def _finish(self, files: Sequence[_HdfsFile]) -> None:
        """Flush, hsync and close, all at once: closing waits half a second for the DataNode's report."""
        if files:
            self._data_calls([file.finish for file in files], files[0].name)

    def _move(self, file: _HdfsFile, arrived: Callable[[], bool], *, replace: bool) -> None:
        """Give the file its name. After any error but the NameNode's plain no, what is there decides."""
        target = self._path(file.name)

        def rename(client: Client) -> None:
            client.rename(file.path, target, replace)

        try:
            try:
                self._ask(rename, file.name)
            except FileNotFoundError:  # mostly the folder: a snapshot's is made by its first file
                self._ask(lambda client: client.mkdirs(target.rpartition("/")[0], create_parent=True), file.name)
                self._ask(rename, file.name)
        except FileExistsError:
            raise CommitConflictError(f"{self._where(file.name)}: exists already", where=file.name) from None
        except FileNotFoundError as error:
            raise StoreError(
                f"{self._where(file.name)}: the unpublished file is gone: somebody removed {file.path}",
                kind="lost_temporary",
                where=file.name,
            ) from error
        except StoreError as error:
            with suppress(StoreError, NotFoundError, IntegrityError):
                if arrived():
                    file.moved()
                    return
            raise error
        file.moved()

    def _holds(self, name: str, data: Buffer) -> bool:
        view = memoryview(data).cast("B")
        return self.read(name, len(view)) == view

    def _arrived(self, file: _HdfsFile) -> bool:
        """Only the rename and a sweep take the temporary name away, and it was drawn at random for this file."""
        if self.size(file.name) != file.size_bytes:
            return False
        try:
            self._ask(lambda client: client.get_file_info(file.path), file.name)
        except FileNotFoundError:
            return True
        return False

    def _folder(self, prefix: str) -> dict[str, FileStatus]:
        """What one folder holds, by the last part of the name; nothing where there is no such folder."""
        path = self._path(check_name(prefix)) if prefix else self._root
        try:
            found = self._read(lambda client: list(client.list_status(path)), prefix)
        except NotFoundError:
            return {}
        if [status.path for status in found if not status.isdir] == [path]:
            raise StoreError(f"{self._where(prefix)}: a file, expected a folder", kind="enotdir", where=prefix)
        named = {status.path.rpartition("/")[2]: status for status in found}
        for base in named:
            check_name(base)
        if not prefix:
            named.pop(layout.TEMPORARY, None)
        return named

    def _pieces(self, reader: FileReader, name: str, start: int, size_bytes: int) -> Iterator[bytes]:
        """A range in pieces. A server that sends less than it said is found out."""
        for at in range(start, start + size_bytes, _READ_BYTES):
            wanted = min(_READ_BYTES, start + size_bytes - at)
            piece = reader.read_range(at, wanted)
            if len(piece) != wanted:
                self._truncated(name, at + len(piece), start + size_bytes)
            yield piece

    def _fill(self, reader: FileReader, name: str, start: int, size_bytes: int, target: Borrowed) -> None:
        at = 0
        for piece in self._pieces(reader, name, start, size_bytes):
            target.put(at, piece)
            at += len(piece)

    def _truncated(self, name: str, end_bytes: int, expected_bytes: int) -> NoReturn:
        raise IntegrityError(
            f"{self._where(name)}: ends at byte {end_bytes}, expected at least {expected_bytes}: truncated",
            kind="truncated",
            where=name,
        )

    def _write_options(self) -> WriteOptions:
        from hdfs_native import WriteOptions

        return WriteOptions(block_size=self._block_bytes, permission=0o644, overwrite=False, create_parent=True)

    def _ask(self, work: Callable[[Client], T], name: str) -> T:
        return self._link.call(work, name, self._timeout_s)

    def _data_calls(self, works: Sequence[Callable[[Client], None]], name: str) -> None:
        try:
            self._link.call_all(works, name, _DATA_TIMEOUTS * self._timeout_s)
        except (FileNotFoundError, FileExistsError) as error:  # the file was removed while it was written
            raise StoreError(f"{self._where(name)}: {str(error)[:200]}", kind="lost_temporary", where=name) from error

    def _read(self, work: Callable[[Client], T], name: str) -> T:
        try:
            return self._link.call(work, name, _DATA_TIMEOUTS * self._timeout_s)
        except FileNotFoundError as error:
            if str(error).startswith("Path is not a file"):
                raise IntegrityError(
                    f"{self._where(name)}: not a regular file", kind="not_a_file", where=name
                ) from None
            raise NotFoundError(f"{self._where(name)}: no such file or folder", kind="no_file", where=name) from None

    def _visible(self, name: str) -> str:
        """The path of a name that may be read."""
        path = self._path(check_name(name))
        if name.startswith(layout.TEMPORARY + "/"):
            raise NotFoundError(f"{self._where(name)}: unpublished files are invisible", kind="no_file", where=name)
        return path

    def _path(self, name: str) -> str:
        return f"{self._root}/{check_name(name)}"

    def _where(self, name: str) -> str:
        return f"{self._url}/{name}" if name else self._url


class _HdfsFile:
    """A file in ``tmp/`` that will get its name by a rename."""

    def __init__(self, store: HdfsStore, name: str, path: str, client: Client, writer: RawFileWriter) -> None:
        self.name = name
        self.store = store
        self.path = path
        self.size_bytes = 0
        self.is_open = True
        self._client: Client | None = client  # its connection carries the writer, so it stays as long
        self._writer: RawFileWriter | None = writer
        """Without the wrapper, which closes the file, however long that takes, when it is dropped."""
        self._buffer = bytearray()
        self._block_bytes = store._block_bytes
        self._process = os.getpid()
        _open_files.add(self)

    def write(self, data: Buffer, /) -> None:
        if not self.is_open:
            raise InternalError(f"{self.name}: used after publish or discard", kind="not_open", where=self.name)
        view = memoryview(data).cast("B")
        while len(view):
            taken = view[: _BUFFER_BYTES - len(self._buffer)]
            self._buffer += taken
            view = view[len(taken) :]
            if len(self._buffer) == _BUFFER_BYTES:
                self.store._data_calls([self._send], self.name)

    def filled(self) -> None:
        self.store._data_calls([self._send], self.name)

    def fileno(self) -> int:
        raise StoreError(f"{self.name}: a file in HDFS has no descriptor", kind="no_descriptor", where=self.name)

    def finish(self, client: Client) -> None:
        """All of it on the DataNodes' disks, and the file closed. On a thread of the link."""
        self._send(client)
        assert self._writer is not None
        self._writer.hsync()
        self._writer.close()

    def moved(self) -> None:
        """It has its name."""
        self._leave()

    def discard(self) -> None:
        if self.is_open:
            self._leave()
            if self._process == os.getpid():  # a forked copy must not take the file away from its owner
                with suppress(StoreError, OSError):
                    self.store._link.call(lambda client: client.delete(self.path), self.name, _DISCARD_TIMEOUT_S)

    def _send(self, _client: Client) -> None:
        """The buffer, synced where a block ends: the next one has another pipeline, and only that is synced then."""
        assert self._writer is not None
        at = 0
        while at < len(self._buffer):
            left_in_block = self._block_bytes - self.size_bytes % self._block_bytes
            piece = bytes(self._buffer[at : at + min(_PIECE_BYTES, left_in_block)])
            self._writer.write(piece)
            self.size_bytes += len(piece)
            at += len(piece)
            if self.size_bytes % self._block_bytes == 0:
                self._writer.hsync()
        self._buffer.clear()

    def _leave(self) -> None:
        self.is_open = False
        if self._process == os.getpid():
            self._writer = self._client = None
            self._buffer = bytearray()
        _open_files.discard(self)

    def __del__(self) -> None:
        with suppress(Exception):
            self.discard()


_open_files: weakref.WeakSet[_HdfsFile] = weakref.WeakSet()
"""Of this process, over all stores: a sweep spares them."""


class _HdfsDirectFile:
    """A published file whose blocks are known."""

    def __init__(self, store: HdfsStore, name: str, opened: tuple[Client, FileReader]) -> None:
        self._store = store
        self._name = name
        self._opened: tuple[Client, FileReader] | None = opened  # the client carries the reader

    def read_aligned(self, offset_bytes: int, buffer: memoryview) -> int:
        if self._opened is None:
            raise InternalError(f"{self._name}: read after close", kind="not_open", where=self._name)
        reader, target = self._opened[1], Borrowed(buffer.cast("B"))
        count = max(0, min(buffer.nbytes, len(reader) - offset_bytes))
        try:
            self._store._read(lambda _: self._store._fill(reader, self._name, offset_bytes, count, target), self._name)
        finally:
            target.take_back()
        return count

    def close(self) -> None:
        self._opened = None


def _again(work: Callable[[Client], T]) -> Callable[[Client], T]:
    """A read that failed starts again from the name: the log head may have been replaced, its old blocks freed."""

    def attempts(client: Client) -> T:
        for _ in range(_READ_ATTEMPTS - 1):
            with suppress(RuntimeError):
                return work(client)
        return work(client)

    return attempts


def _positive(options: Mapping[str, str], name: str, default: float) -> float:
    try:
        value = float(options.get(name, default))
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise UsageError(f"{name}: a positive number, found {options.get(name)!r}")
    return value


def _parse(url: str) -> tuple[str, str]:
    """Host (with port) and path, as they are used; what cannot be meant is refused."""
    expected = "expected hdfs://host:port/path or hdfs://nameservice/path"
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise UsageError(f"{url!r} is no URL: {error}; {expected}") from error
    if "@" in parts.netloc:
        raise UsageError(f"hdfs://...@{host}: no user in a URL: set HADOOP_USER_NAME, or use Kerberos")
    if parts.scheme.lower() != "hdfs" or not host or not re.fullmatch(r"[A-Za-z0-9._-]+|[0-9a-f:]+", host):
        raise UsageError(f"{url!r}: {expected}")
    if parts.query or parts.fragment:
        raise UsageError(f"{url!r}: write '?' as %3F and '#' as %23 in an HDFS URL")
    path = "/" + "/".join(part for part in unquote(parts.path).split("/") if part)
    if path == "/":
        raise UsageError(f"{url!r}: a chain needs a folder of its own, not the root; {expected}")
    if not path.isprintable() or ":" in path or any(part in (".", "..") for part in path.split("/")):
        raise UsageError(f"{url!r}: not a path that HDFS takes")
    name = f"[{host}]" if ":" in host else host
    return f"{name}:{port}" if port is not None else name, path
