"""A folder on a POSIX file system.

Saving a file, top to bottom (``begin``, ``_publish``): a temporary name in ``tmp/``, write, fsync, ``link`` to its
name (which fails if the name exists: create-once), unlink the temporary name, fsync the folder. No step is repeated
after a failed fsync: Linux reports a write-back error once and then forgets it. A failed fsync has a kind of its own,
``fsync_failed``: a name that can be read back may be gone after a loss of power.

Every path is walked one component at a time with O_NOFOLLOW, relative to the descriptor of the chain's folder: a
symbolic link inside a chain is refused, and renaming the chain's folder while it is open does no harm.
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import stat
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from ciuic_async.errors import CommitConflictError, IntegrityError, InternalError, NotFoundError, StoreError
from ciuic_async.format import layout
from ciuic_async.format.digest import Buffer, digest
from ciuic_async.stores.advice import advice, store_error
from ciuic_async.stores.base import Capabilities, DirectFile, Listed, Unpublished, check_name

_MAX_DEPTH = 32  # folders below the root; the format needs 11
_DIRECT = getattr(os, "O_DIRECT", 0)
_DIRECT_ALIGNMENT_BYTES = 4096
_FOLDER_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class LocalStore:
    """A store in ``folder``. Opening creates nothing; ``initialize`` does."""

    capabilities = Capabilities(orders_writers=True, file_descriptors=True)

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self._path = Path(os.path.abspath(folder))
        self._root: int | None = None
        self._root_lock = threading.Lock()
        self._durable_folders: set[str] = set()
        """Folders found there whose own names are known to be on stable storage."""

    @property
    def url(self) -> str:
        return str(self._path)

    def initialize(self) -> None:
        with self._errors("", writing=True):
            missing = [folder for folder in self._path.parents if not folder.exists()]
            self._path.mkdir(parents=True, exist_ok=True)
            for name in (
                layout.SEGMENTS,
                layout.MANIFESTS,
                layout.LOCATORS,
                layout.SLOTS,
                layout.TILES,
                layout.TEMPORARY,
            ):
                _close(self._folder(name, create=True))
            for folder in dict.fromkeys([self._path.parent, *(folder.parent for folder in missing)]):
                _fsync_path(folder)  # the names of folders that were made on the way

    # --- reading ------------------------------------------------------------------------------------------------------

    def read(self, name: str, limit_bytes: int) -> bytes:
        with self._errors(name):
            descriptor, size = self._open_file(name)
            try:
                if size > limit_bytes:
                    raise IntegrityError(
                        f"{self._where(name)}: {size} bytes, expected at most {limit_bytes}",
                        kind="file_too_large",
                        where=name,
                    )
                pieces = []
                # Asked for is little more than there is: os.read allocates what it is asked for.
                while piece := os.read(descriptor, min(limit_bytes, size) + 1):
                    pieces.append(piece)
                    limit_bytes -= len(piece)
                    if limit_bytes < 0:
                        raise IntegrityError(
                            f"{self._where(name)}: grows while it is read", kind="file_too_large", where=name
                        )
                return b"".join(pieces)
            finally:
                _close(descriptor)

    def read_into(self, name: str, offset_bytes: int, buffer: memoryview) -> None:
        buffer = buffer.cast("B")
        with self._errors(name):
            descriptor, _ = self._open_file(name)
            try:
                done = 0
                while done < len(buffer):
                    count = os.preadv(descriptor, [buffer[done:]], offset_bytes + done)
                    if count == 0:
                        raise IntegrityError(
                            f"{self._where(name)}: ends at byte {offset_bytes + done}, expected at least "
                            f"{offset_bytes + len(buffer)}: truncated",
                            kind="truncated",
                            where=name,
                        )
                    done += count
            finally:
                _close(descriptor)

    def open_direct(self, name: str) -> DirectFile:
        with self._errors(name):
            try:
                descriptor, _ = self._open_file(name, _DIRECT)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                descriptor, _ = self._open_file(name)  # a file system without reads past its cache
            return _LocalDirectFile(self, name, descriptor)

    def size(self, name: str) -> int | None:
        try:
            with self._errors(name):
                descriptor, size = self._open_file(name)
                _close(descriptor)
                return size
        except NotFoundError:
            return None

    def list(self, prefix: str = "") -> Iterator[Listed]:
        if prefix == layout.TEMPORARY or prefix.startswith(layout.TEMPORARY + "/"):
            return
        if prefix.count("/") >= _MAX_DEPTH:
            raise IntegrityError(
                f"{self._where(prefix)}: folders nested deeper than {_MAX_DEPTH}: not made by this package",
                kind="bad_name",
                where=prefix,
            )
        try:
            with self._errors(prefix):
                folder = self._folder(prefix)
        except NotFoundError:
            return
        try:
            with self._errors(prefix), os.scandir(folder) as scan:
                facts = []
                for entry in scan:
                    with suppress(FileNotFoundError):  # deleted since: a listing is no consistent view
                        facts.append((entry.name, entry.stat(follow_symlinks=False)))
        finally:
            _close(folder)
        # By whole name: a folder's files come where its name with the slash belongs.
        facts.sort(key=lambda fact: fact[0] + "/" * stat.S_ISDIR(fact[1].st_mode))
        for base, status in facts:
            name = f"{prefix}/{base}" if prefix else base
            if stat.S_ISDIR(status.st_mode):
                yield from self.list(name)
            else:
                yield Listed(name, status.st_size, status.st_mtime)

    # --- writing ------------------------------------------------------------------------------------------------------

    def create(self, name: str, data: Buffer) -> None:
        self._write_whole(name, data, replace=False)

    def overwrite(self, name: str, data: Buffer) -> None:
        self._write_whole(name, data, replace=True)

    def begin(self, name: str) -> Unpublished:
        check_name(name)
        with self._errors(name, writing=True):
            folder = self._folder(layout.TEMPORARY, create=True)
            temporary = os.path.basename(layout.temporary(_HOST))
            try:
                flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
                descriptor = os.open(temporary, flags, 0o666, dir_fd=folder)
            except OSError:
                _close(folder)
                raise
            with suppress(OSError):  # held until the file is closed: tells a sweep that its writer lives
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return _LocalFile(self, name, folder, temporary, descriptor)

    def publish(self, files: Sequence[Unpublished]) -> None:
        ours = [file for file in files if isinstance(file, _LocalFile)]
        if len(ours) != len(files):
            raise InternalError(f"{self.url}: publish was given a file of another store", kind="not_open")
        self._publish(ours, replace=False)

    def delete(self, name: str) -> None:
        with suppress(NotFoundError), self._errors(name):
            folder_name, _, base = check_name(name).rpartition("/")
            folder = self._folder(folder_name)
            try:
                os.unlink(base, dir_fd=folder)
            finally:
                _close(folder)
            self._remove_empty(folder_name)

    def sweep_unpublished(self, older_than_s: float) -> int:
        removed = 0
        with suppress(NotFoundError), self._errors(layout.TEMPORARY):
            folder = self._folder(layout.TEMPORARY)
            try:
                now = self.now_s()
                for base in sorted(os.listdir(folder)):
                    with suppress(FileNotFoundError, IsADirectoryError):  # a folder in tmp/ is not ours
                        age_s = now - os.stat(base, dir_fd=folder, follow_symlinks=False).st_mtime
                        alive = _writer_lives(folder, base)
                        limit_s = older_than_s if alive is None else min(older_than_s, _LOCK_GRACE_S)
                        if not alive and age_s >= limit_s:
                            os.unlink(base, dir_fd=folder)
                            removed += 1
            finally:
                _close(folder)
        return removed

    def now_s(self) -> float:
        with self._errors(layout.TEMPORARY):
            folder = self._folder(layout.TEMPORARY, create=True)
            name = os.path.basename(layout.temporary())
            try:
                descriptor = os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600, dir_fd=folder)
                try:
                    return os.fstat(descriptor).st_mtime
                finally:
                    _close(descriptor)
                    os.unlink(name, dir_fd=folder)
            finally:
                _close(folder)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """flock on the slots' folder: no lock file that could be left behind. Waits at most ten seconds."""
        with self._errors(layout.SLOTS):
            folder = self._folder(layout.SLOTS, create=True)
        try:
            deadline = time.monotonic() + 10.0
            while True:
                try:
                    fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except OSError as error:
                    # No lock is no harm: the slots order writers. Some network file systems have no flock.
                    if error.errno not in (errno.EWOULDBLOCK, errno.EINTR) or time.monotonic() > deadline:
                        break
                    time.sleep(0.005)
            yield
        finally:
            _close(folder)

    def close(self) -> None:
        with self._root_lock:
            if self._root is not None:
                _close(self._root)
                self._root = None

    def __del__(self) -> None:
        with suppress(Exception):
            self.close()

    # --- inside -------------------------------------------------------------------------------------------------------

    def _write_whole(self, name: str, data: Buffer, *, replace: bool) -> None:
        file = self.begin(name)
        assert isinstance(file, _LocalFile)
        try:
            file.write(data)
            self._publish([file], replace=replace)
        finally:
            file.discard()

    def _publish(self, files: Sequence[_LocalFile], *, replace: bool) -> None:
        folders: dict[str, int] = {}
        try:
            for file in files:
                self._fsync(file.fileno(), file.name)
            for file in files:
                folder_name, _, base = file.name.rpartition("/")
                try:
                    with self._errors(file.name, writing=True):
                        if folder_name not in folders:
                            folders[folder_name] = self._folder(folder_name, create=True)
                        file.move_to(folders[folder_name], base, replace=replace)
                except FileExistsError:
                    raise CommitConflictError(f"{self._where(file.name)}: exists already", where=file.name) from None
            for folder_name, folder in folders.items():
                self._fsync(folder, folder_name)
        finally:
            for folder in folders.values():
                _close(folder)
            for file in files:
                file.discard()

    def _open_root(self) -> int:
        """A new descriptor of the chain's folder, which may have been renamed since it was first opened."""
        with self._root_lock:
            if self._root is None:
                self._root = os.open(self._path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            return os.dup(self._root)

    def _folder(self, name: str, *, create: bool = False) -> int:
        """A new descriptor of a folder below the root, no link followed on the way.

        With ``create`` the names of all folders on the way are durable on return, before anything is put into them.
        That goes for those that are there already: who made them may have died before the fsync.
        """
        parts = check_name(name).split("/") if name else []
        current = self._open_root()
        try:
            for depth, part in enumerate(parts):
                path = "/".join(parts[: depth + 1])
                try:
                    following = _open_folder(part, current)
                    made = False
                except FileNotFoundError:
                    if not create:
                        raise
                    with suppress(FileExistsError):
                        os.mkdir(part, dir_fd=current)
                    following = _open_folder(part, current)
                    made = True
                if create and (made or path not in self._durable_folders):
                    try:
                        self._fsync(current, path)
                    except StoreError:
                        _close(following)
                        raise
                    if not made:  # a folder that is made is mostly a snapshot's: used once, not worth remembering
                        self._durable_folders.add(path)
                _close(current)
                current = following
            return current
        except (OSError, StoreError):
            _close(current)
            raise

    def _open_file(self, name: str, flags: int = 0) -> tuple[int, int]:
        """Descriptor and size of a regular file. O_NONBLOCK: opening a pipe must not wait for its writer."""
        folder_name, _, base = check_name(name).rpartition("/")
        if folder_name == layout.TEMPORARY:
            raise FileNotFoundError(errno.ENOENT, "unpublished files are invisible")
        folder = self._folder(folder_name)
        try:
            flags |= os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            descriptor = os.open(base, flags, dir_fd=folder)
        except OSError as error:
            if error.errno in (errno.ENXIO, errno.ENODEV):  # a socket, or a device without a driver
                raise IntegrityError(
                    f"{self._where(name)}: not a regular file", kind="not_a_file", where=name
                ) from error
            raise
        finally:
            _close(folder)
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise IntegrityError(f"{self._where(name)}: not a regular file", kind="not_a_file", where=name)
        except (OSError, IntegrityError):
            _close(descriptor)
            raise
        return descriptor, status.st_size

    def _remove_empty(self, folder_name: str) -> None:
        """Remove a snapshot's folder when its last file went."""
        parent_name, _, base = folder_name.rpartition("/")
        if parent_name not in (layout.SEGMENTS, layout.MANIFESTS):
            return
        parent = self._folder(parent_name)
        try:
            with suppress(OSError):
                os.rmdir(base, dir_fd=parent)
        finally:
            _close(parent)

    def _fsync(self, descriptor: int, name: str) -> None:
        """fsync, never repeated. Raises StoreError, kind ``fsync_failed``, whatever the system's reason."""
        try:
            os.fsync(descriptor)
        except OSError as error:
            number = error.errno or 0
            raise StoreError(
                f"{self._where(name)}: fsync failed, what was written may be lost: {os.strerror(number)} "
                f"({advice(number)})",
                kind="fsync_failed",
                where=name,
            ) from error

    def _where(self, name: str) -> str:
        return str(self._path / name) if name else str(self._path)

    @contextmanager
    def _errors(self, name: str, *, writing: bool = False) -> Iterator[None]:
        """Translate what the operating system says. FileExistsError passes: it is the caller's conflict.

        With ``writing`` a missing folder or temporary file is the place's fault, and not a name that is not there.
        """
        try:
            yield
        except FileExistsError as error:
            if name == "":  # mkdir of the chain's folder found a file
                raise store_error(self._where(name), name, errno.ENOTDIR) from error
            raise
        except FileNotFoundError as error:
            if writing:
                raise store_error(self._where(name), name, errno.ENOENT) from error
            raise NotFoundError(f"{self._where(name)}: no such file or folder", kind="no_file", where=name) from error
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise IntegrityError(
                    f"{self._where(name)}: {advice(errno.ELOOP)}", kind="symbolic_link", where=name
                ) from error
            raise store_error(self._where(name), name, error.errno or 0) from error


class _LocalFile:
    """A file in ``tmp/`` that will get its name by a link."""

    def __init__(self, store: LocalStore, name: str, folder: int, temporary: str, descriptor: int) -> None:
        self.name = name
        self._store = store
        self._folder = folder
        self._temporary = temporary
        self._descriptor = descriptor
        self._process = os.getpid()
        self._open = True

    def write(self, data: Buffer, /) -> None:
        with self._store._errors(self.name):
            view = memoryview(data).cast("B")
            while len(view):
                view = view[os.write(self.fileno(), view) :]

    def filled(self) -> None:
        pass

    def fileno(self) -> int:
        if not self._open:  # the number may already be another file's
            raise InternalError(f"{self.name}: used after publish or discard", kind="not_open", where=self.name)
        return self._descriptor

    def move_to(self, folder: int, base: str, *, replace: bool) -> None:
        """Give the file its name in ``folder``; without ``replace`` an existing name raises FileExistsError."""
        if replace:
            os.rename(self._temporary, base, src_dir_fd=self._folder, dst_dir_fd=folder)
        else:
            os.link(self._temporary, base, src_dir_fd=self._folder, dst_dir_fd=folder, follow_symlinks=False)
            with suppress(OSError):  # it has its name; a temporary name that stays is swept one day
                os.unlink(self._temporary, dir_fd=self._folder)
        self._close()

    def discard(self) -> None:
        if self._open:
            if self._process == os.getpid():  # a forked copy must not take the file away from its owner
                with suppress(OSError):
                    os.unlink(self._temporary, dir_fd=self._folder)
            self._close()

    def _close(self) -> None:
        if self._open:
            self._open = False
            _close(self._descriptor)
            _close(self._folder)

    def __del__(self) -> None:
        with suppress(Exception):
            self.discard()


class _LocalDirectFile:
    """An open file that is read past the page cache until the file system refuses that."""

    def __init__(self, store: LocalStore, name: str, descriptor: int) -> None:
        self._store = store
        self._name = name
        self._descriptor = descriptor
        self._direct = True

    def read_aligned(self, offset_bytes: int, buffer: memoryview) -> int:
        buffer = buffer.cast("B")
        done = 0
        with self._store._errors(self._name):
            while done < len(buffer):
                direct = self._direct
                try:
                    count = os.preadv(self._descriptor, [buffer[done:]], offset_bytes + done)
                except OSError as error:
                    if error.errno != errno.EINVAL or not direct:
                        raise
                    self._leave_direct()
                    continue
                done += count
                if count == 0 or (direct and count % _DIRECT_ALIGNMENT_BYTES):
                    break  # the content ends here: nothing else ends a direct read between two blocks
        return done

    def _leave_direct(self) -> None:
        """Through the page cache from now on; several threads may come here for one refusal each."""
        flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL)
        fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags & ~_DIRECT)
        self._direct = False

    def close(self) -> None:
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            _close(descriptor)

    def __del__(self) -> None:
        with suppress(Exception):
            self.close()


def _open_folder(part: str, parent: int) -> int:
    try:
        return os.open(part, _FOLDER_FLAGS, dir_fd=parent)
    except NotADirectoryError:
        # Linux says ENOTDIR for a link here too; the two need different advice.
        if stat.S_ISLNK(os.stat(part, dir_fd=parent, follow_symlinks=False).st_mode):
            raise OSError(errno.ELOOP, "a symbolic link") from None
        raise


def _close(descriptor: int) -> None:
    """Close; fsync has spoken and what was read is at hand: an error of close changes nothing."""
    with suppress(OSError):
        os.close(descriptor)


def _writer_lives(folder: int, base: str) -> bool | None:
    """Whether the writer of an unpublished file is alive; None if that cannot be known from here.

    Locks are reliable only on the machine that took them: some network file systems keep them to themselves.
    """
    if not layout.is_temporary_of(base, _HOST):
        return None
    try:
        descriptor = os.open(base, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except OSError as error:
        return True if error.errno == errno.EWOULDBLOCK else None
    finally:
        os.close(descriptor)


def _host() -> bytes:
    """This machine since it was started: what a lock is good for."""
    try:
        return digest(Path("/proc/sys/kernel/random/boot_id").read_bytes())[:8]
    except OSError:
        return secrets.token_bytes(8)


_HOST = _host()
_LOCK_GRACE_S = 60.0
"""Between making an unpublished file and locking it nobody may take it for a dead writer's."""


def _fsync_path(path: Path) -> None:
    """Best effort for a folder above the chain, which may not be ours to open."""
    with suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            _close(descriptor)
