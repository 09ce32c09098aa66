"""``.pt`` and ``.pth``: the zip file that ``torch.save`` writes, read and written without it.

Read: members are only looked up by name, nothing is unpacked to disk, and members must be stored as they are (torch
never compresses), so that a file gives no more bytes than it has. Written: what ``torch.load(weights_only=True)``
reads, with storages at multiples of 64 bytes, so that ``mmap=True`` works too.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch

from ciuic_async.errors import CiuicError
from ciuic_async.interchange import limits
from ciuic_async.interchange.pickle_read import PickleReader
from ciuic_async.interchange.pickle_write import PickleWriter
from ciuic_async.interchange.tensors import measure

_PIECE_BYTES = 4 << 20
_ALIGNMENT_BYTES = 64
_LOCAL_HEADER_BYTES = 30
_ZIP64_FIELD_BYTES = 20
_LARGE_BYTES = 1 << 31
_ROOT = "archive"
_PADDING_FIELD = b"FB"  # the extra field that torch pads with
_LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."


class _Bounded:
    """A file whose single reads are bounded: ``zipfile`` reads a directory as long as the file claims it to be."""

    def __init__(self, file: IO[bytes], where: str) -> None:
        self._file = file
        self._where = where
        self.seek, self.tell, self.close = file.seek, file.tell, file.close
        self.seekable, self.readable = file.seekable, file.readable

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(limits.STRUCTURE_BYTES + 1 if size < 0 else min(size, limits.STRUCTURE_BYTES + 1))
        if len(data) > limits.STRUCTURE_BYTES:
            raise limits.malformed(self._where, f"its directory is longer than {limits.STRUCTURE_BYTES} bytes")
        return data


class _Archive:
    """The members of one zip file. Each storage is read once."""

    def __init__(self, zipped: zipfile.ZipFile, where: str, size_bytes: int, load_data: bool) -> None:
        self._zip = zipped
        self._where = where
        self._left_bytes = size_bytes
        self._load_data = load_data
        self._members: dict[str, zipfile.ZipInfo] = {}
        for info in zipped.infolist():
            if info.filename in self._members:
                raise limits.malformed(where, f"two members are called {info.filename[:80]!r}")
            self._members[info.filename] = info
        pickles = [name for name in self._members if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise limits.malformed(where, "no file of torch.save: expected one <name>/data.pkl in it")
        self._root = pickles[0].removesuffix("data.pkl")
        if f"{self._root}constants.pkl" in self._members:
            raise limits.refused(where, "it is a TorchScript program, which is code; export its state_dict instead")
        order = self._members.get(f"{self._root}byteorder")
        if order is not None and self._bytes(order, 16) != b"little":
            raise limits.unsupported(where, "it was written on a big-endian machine; convert it there")

    def structure(self) -> bytes:
        """The pickle."""
        return self._bytes(self._members[f"{self._root}data.pkl"], limits.STRUCTURE_BYTES)

    def load(self, key: str, size_bytes: int) -> torch.UntypedStorage:
        """A storage by its key. On the meta device where only the structure is wanted."""
        info = self._members.get(f"{self._root}data/{key}")
        if info is None:
            raise limits.malformed(self._where, f"storage {key[:40]!r} is missing")
        self._account(info)
        if info.file_size != size_bytes:
            raise limits.malformed(
                self._where, f"storage {key[:40]!r}: expected {size_bytes} bytes, found {info.file_size}"
            )
        if not self._load_data:
            self._check(info)
            return torch.empty(size_bytes, dtype=torch.uint8, device="meta").untyped_storage()
        storage = torch.empty(size_bytes, dtype=torch.uint8).untyped_storage()
        if not size_bytes:
            return storage
        view = torch.empty(0, dtype=torch.uint8).set_(storage).numpy().data
        position = 0
        with self._zip.open(info) as file:  # checks the CRC at the end
            while piece := file.read(_PIECE_BYTES):
                view[position : position + len(piece)] = piece
                position += len(piece)
        if position != size_bytes:
            raise limits.malformed(self._where, f"storage {key[:40]!r} ends after {position} of {size_bytes} bytes")
        return storage

    def _check(self, info: zipfile.ZipInfo) -> None:
        """Read a member for its CRC alone: damage is found before anything is made of the file, or of others."""
        with self._zip.open(info) as file:
            while file.read(_PIECE_BYTES):
                pass

    def _bytes(self, info: zipfile.ZipInfo, limit_bytes: int) -> bytes:
        self._account(info)
        if info.file_size > limit_bytes:
            raise limits.malformed(
                self._where, f"{info.filename[-40:]!r} has {info.file_size} bytes, expected at most {limit_bytes}"
            )
        with self._zip.open(info) as file:
            return file.read(info.file_size)

    def _account(self, info: zipfile.ZipInfo) -> None:
        """Members that overlap would give more bytes than the file has."""
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size or info.flag_bits & 1:
            raise limits.malformed(
                self._where, f"{info.filename[:80]!r} is compressed or encrypted, which torch.save never does"
            )
        self._left_bytes -= info.file_size
        if self._left_bytes < 0:
            raise limits.malformed(self._where, "its members together are longer than the file")


def read_torch_file(file: IO[bytes], where: str, size_bytes: int, load_data: bool = True) -> Any:
    """The state in a ``.pt`` file, on the CPU.

    Args:
        load_data: False: tensors are on the meta device; their data is checked, and not kept.

    Raises:
        IntegrityError: kind ``file_malformed``, ``file_refused`` or ``file_bomb``.
        UsageError: kind ``file_unsupported``.
    """
    if file.read(len(_LEGACY_MAGIC)) == _LEGACY_MAGIC:
        raise limits.unsupported(
            where, "it is of the format before torch 1.6; load it with torch and save it again, then import that"
        )
    with _zip_errors(where), zipfile.ZipFile(_Bounded(file, where)) as zipped:
        archive = _Archive(zipped, where, size_bytes, load_data)
        allowance = limits.Allowance.of_file(where, size_bytes)
        state = PickleReader(archive.structure(), archive, where, allowance).load()
    measure(state, where)
    return state


@contextmanager
def _zip_errors(where: str) -> Iterator[None]:
    try:
        yield
    except CiuicError:
        raise
    except (zipfile.BadZipFile, EOFError, ValueError, KeyError, RuntimeError, OSError) as error:
        raise limits.malformed(where, f"no file of torch.save, or damaged: {error!s:.200}") from error


def write_torch_file(state: Any, path: Path) -> dict[str, int]:
    """Write ``state`` to a new file at ``path``.

    Returns:
        What the format cannot hold and was turned into something like it: kinds of values and how many.

    Raises:
        UsageError: kind ``unsupported_type``.
    """
    writer = PickleWriter()
    structure = writer.encode(state)
    with zipfile.ZipFile(path, "x") as zipped:
        _member(zipped, "data.pkl", memoryview(structure))
        _member(zipped, ".format_version", memoryview(b"1"))
        _member(zipped, ".storage_alignment", memoryview(str(_ALIGNMENT_BYTES).encode()))
        _member(zipped, "byteorder", memoryview(b"little"))
        for number, (storage, size_bytes) in enumerate(writer.storages):
            _member(zipped, f"data/{number}", _memory(storage)[:size_bytes])
        _member(zipped, "version", memoryview(b"3\n"))
    return dict(writer.converted)


def _memory(storage: torch.UntypedStorage) -> memoryview:
    if not storage.nbytes():
        return memoryview(b"")
    flat = torch.empty(0, dtype=torch.uint8).set_(storage)
    memory: memoryview = flat.numpy().data
    return memory


def _member(zipped: zipfile.ZipFile, name: str, data: memoryview) -> None:
    """One member as it is, its bytes at a multiple of the alignment."""
    info = zipfile.ZipInfo(f"{_ROOT}/{name}")  # of a fixed date: equal states are equal files
    info.file_size = len(data)
    large = len(data) >= _LARGE_BYTES
    before = zipped.fp.tell() + _LOCAL_HEADER_BYTES + len(info.filename) + 4  # type: ignore[union-attr]
    before += _ZIP64_FIELD_BYTES if large else 0
    padding = -before % _ALIGNMENT_BYTES
    info.extra = _PADDING_FIELD + padding.to_bytes(2, "little") + bytes(padding)
    with zipped.open(info, "w", force_zip64=large) as file:
        for start in range(0, len(data), _PIECE_BYTES):
            file.write(data[start : start + _PIECE_BYTES])
