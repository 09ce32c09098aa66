"""One file in, one file out: which format a name means, what an honest file says of its training, whole or not at all.

torch and h5py are imported when a file of theirs is opened.
"""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from hashlib import file_digest
from pathlib import Path
from typing import Any

from ciuic_async.errors import CiuicError, NotFoundError, StoreError, UsageError

FORMATS = {
    ".safetensors": "safetensors",
    ".pt": "torch",
    ".pth": "torch",
    ".h5": "hdf5",
    ".hdf5": "hdf5",
}
"""What a file's name says of its format."""

IMPORTED = "imported"
"""The item of a snapshot's config that says which file it was made from."""


def format_of(path: Path) -> str:
    """The format that a file's name means.

    Raises:
        UsageError: kind ``unknown_format``.
    """
    found = FORMATS.get(path.suffix.lower())
    if found is None:
        raise UsageError(
            f"{path}: unknown format {path.suffix!r}; expected a name that ends in {', '.join(FORMATS)}",
            kind="unknown_format",
        )
    return found


def check_available(kind: str) -> None:
    """Refuse HDF5 where h5py is not installed. Raises UsageError, kind ``not_installed``."""
    if kind != "hdf5":
        return
    try:
        import h5py  # noqa: F401
    except ImportError as error:
        raise UsageError(
            f"HDF5 needs h5py, which cannot be imported: {error}; install it with: pip install 'ciuic-async[hdf5]'",
            kind="not_installed",
        ) from error


# --- in ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Content:
    """A file that was read.

    Attributes:
        state: the state tree, tensors on the CPU; on the meta device if only its structure was asked for.
        sha256: of the file, as hex.
    """

    path: Path
    format: str
    sha256: str
    size_bytes: int
    state: Any = field(repr=False)

    def origin(self) -> dict[str, Any]:
        """For a snapshot's config: which file it was made from. Export and later imports go by it."""
        return {
            IMPORTED: {
                "name": self.path.name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")[:1000],
                "format": self.format,
                "sha256": self.sha256,
                "size_bytes": self.size_bytes,
            }
        }


def read(path: Path, *, load_data: bool = True) -> Content:
    """Read a file as data: nothing in it is run, nothing outside it is read. Takes about the file's size in memory.

    Args:
        load_data: False: read the structure and plain values only.

    Raises:
        NotFoundError: there is no such file.
        UsageError: its name means no format, or it is of a kind that is not read (``file_unsupported``).
        IntegrityError: kind ``file_malformed``, ``file_refused`` (it asks for more than data) or ``file_bomb``.
        StoreError: it cannot be read, or changes meanwhile (kind ``file_changed``).
    """
    kind, where = format_of(path), str(path)
    check_available(kind)
    try:
        with open(path, "rb", opener=_open_regular) as file:
            before = _version(os.fstat(file.fileno()))
            digest = file_digest(file, "sha256").hexdigest()
            size_bytes = file.tell()
            file.seek(0)
            if kind == "torch":
                from ciuic_async.interchange.torch_file import read_torch_file

                state: Any = read_torch_file(file, where, size_bytes, load_data)
            elif kind == "safetensors":
                from ciuic_async.interchange.safetensors_file import read_safetensors

                # By its descriptor: the library opens files by name, and takes no name that is not UTF-8.
                state = read_safetensors(f"/proc/self/fd/{file.fileno()}", where, size_bytes, load_data)
            else:
                from ciuic_async.interchange.hdf5_read import read_hdf5

                state = read_hdf5(where, where, size_bytes, load_data)
            if _version(os.stat(path)) != before:  # then digest and state may be of two files
                raise StoreError(f"{path}: it changed while it was read; try again", kind="file_changed", where=where)
    except FileNotFoundError as error:
        raise NotFoundError(f"{path}: there is no such file", kind="no_such_file", where=where) from error
    except OSError as error:
        raise StoreError(
            f"{path}: cannot be read: {error.strerror or error}", kind="unreadable", where=where
        ) from error
    return Content(path, kind, digest, size_bytes, state)


def _version(status: os.stat_result) -> tuple[int, ...]:
    """What changes when a file is replaced or written to."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _open_regular(path: str, flags: int) -> int:
    """Open a file that is one: a pipe would wait for ever, a device never end."""
    descriptor = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(0, "it is no regular file")
    return descriptor


# --- out --------------------------------------------------------------------------------------------------------------


def write(state: Any, path: Path, facts: Mapping[str, str], *, overwrite: bool = True) -> dict[str, int]:
    """Write a state tree; the file appears whole or not at all, and is on stable storage when this returns.

    Args:
        facts: texts about its origin; ``.pt`` has no place for them.
        overwrite: False: a file that is there stays.

    Returns:
        What the format could not hold as it is, and how often.

    Raises:
        UsageError: kind ``unknown_format``, ``file_exists``, ``duplicate_name`` or ``unsupported_type``.
        StoreError: kind ``export_failed``.
    """
    kind = format_of(path)
    check_available(kind)
    changed: dict[str, int] = {}
    with _replacing(path, overwrite) as temporary:
        if kind == "torch":
            from ciuic_async.interchange.torch_file import write_torch_file

            changed = write_torch_file(state, temporary)
        elif kind == "safetensors":
            from ciuic_async.interchange.safetensors_file import write_safetensors

            changed = write_safetensors(state, temporary, dict(facts))
        else:
            from ciuic_async.interchange.hdf5_write import write_hdf5

            write_hdf5(state, temporary, dict(facts))
    return changed


def check_folder(path: Path) -> None:
    """Refuse a place whose folder cannot take a file. Raises StoreError, kind ``export_failed``."""
    folder = path.parent
    if not folder.is_dir():
        reason = "is no folder" if os.path.lexists(folder) else "there is no such folder"
    elif not os.access(folder, os.W_OK | os.X_OK):
        reason = "this user may not write there"
    else:
        return
    raise StoreError(f"{path}: cannot export: {folder}: {reason}", kind="export_failed", where=str(path))


def check_free(path: Path) -> None:
    """Refuse a place where something is. Raises UsageError, kind ``file_exists``."""
    if os.path.lexists(path):
        raise UsageError(
            f"{path}: is there already; choose another name, or replace it with --force",
            kind="file_exists",
            where=str(path),
        )


@contextmanager
def _replacing(path: Path, overwrite: bool) -> Iterator[Path]:
    """A temporary name beside the target; then fsync, a new name for it, fsync of the folder."""
    if not overwrite:
        check_free(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        yield temporary
        _sync(temporary)
        if overwrite:
            temporary.replace(path)
        else:
            os.link(temporary, path)  # fails where something came meanwhile
            temporary.unlink()
        _sync(path.parent)
    except FileExistsError:
        check_free(path)
        raise
    except CiuicError:
        raise
    except Exception as error:
        raise StoreError(f"{path}: cannot export: {error}", kind="export_failed", where=str(path)) from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
