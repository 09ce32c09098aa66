"""The part of reading HDF5 that runs in a process of its own (``hdf5_read``): the file becomes plain bytes and nodes.

Only what is in the file itself is followed: hard links to groups and datasets. Soft and external links, virtual
datasets, external storage, and filters that would be loaded from elsewhere are refused by name, before any data is
read. What a dataset claims to hold is compared with what is stored, and counted, before memory is taken.

Run as ``python -m ciuic_async.interchange.hdf5_child FILE WHERE SIZE LOAD DATA_FD ANSWER_FD``; imports no torch.
"""

from __future__ import annotations

import json
import math
import os
import struct
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import h5py
import numpy as np

from ciuic_async.errors import CiuicError, IntegrityError
from ciuic_async.format import jsontext
from ciuic_async.format.dtypes import ITEM_SIZE_BYTES
from ciuic_async.interchange import limits
from ciuic_async.interchange.hdf5_names import ALIGNMENT_BYTES, DTYPE, FORMAT, TREE, VERSION, stored_as

_FILTERS = {h5py.h5z.FILTER_DEFLATE, h5py.h5z.FILTER_SHUFFLE, h5py.h5z.FILTER_FLETCHER32}
"""Those that libhdf5 has in it; any other would be looked for among plugins, which are code."""
_CHUNK_BYTES = 1 << 30
_OBJECTS = 1_000_000
_FREE_BYTES = 1 << 20
_ATTRIBUTES_AS = "@"
"""In trees of files that are not ours: what the key of an attribute begins with."""


class _Data:
    """Where elements go: one after the other into a file, each from a multiple of the alignment."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._end = 0
        self.blobs: list[dict[str, Any]] = []

    def add(self, dtype: str, shape: tuple[int, ...], array: np.ndarray[Any, Any] | None) -> int:
        """The number of a blob; without an array only its description."""
        blob: dict[str, Any] = {"dtype": dtype, "shape": list(shape)}
        if array is not None:
            blob["offset"] = self._end
            data = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data if array.size else memoryview(b"")
            position = self._end
            while data:
                written = os.pwrite(self._descriptor, data, position)
                data, position = data[written:], position + written
            self._end = position + -position % ALIGNMENT_BYTES
        self.blobs.append(blob)
        return len(self.blobs) - 1


def _node(value: Any) -> Any:
    """A plain value as a node (docs/format.md, section 2)."""
    if value is None or type(value) is bool:
        return value
    if type(value) is int:
        return value if abs(value) <= jsontext.MAX_SAFE_INTEGER else {"int": hex(value)}
    if type(value) is float:
        return {"float": struct.pack(">d", value).hex()}
    if type(value) is complex:
        return {"complex": [struct.pack(">d", part).hex() for part in (value.real, value.imag)]}
    if isinstance(value, np.generic):
        return {"numpy.scalar": value.tobytes().hex(), "dtype": value.dtype.str}
    if isinstance(value, list):
        return [_node(item) for item in value]
    text = str(value)
    if any("\ud800" <= character <= "\udfff" for character in text):
        return {"str_hex": text.encode("utf-8", "surrogatepass").hex()}
    return text


class _Reader:
    def __init__(self, file: h5py.File, where: str, allowance: limits.Allowance, load_data: bool, data: _Data) -> None:
        self._file = file
        self._where = where
        self._allowance = allowance
        self._load_data = load_data
        self._open_groups: set[Any] = set()
        self._objects = 0
        self._data = data

    # --- ours ---------------------------------------------------------------------------------------------------------

    def own(self) -> dict[str, Any]:
        """The tree that ``hdf5_write`` wrote; its numbers are those of the blobs."""
        document = jsontext.decode(
            self._array(self._dataset(self._file, TREE), "<u1").tobytes(),
            what=self._where,
            limit_bytes=limits.STRUCTURE_BYTES,
        )
        if not isinstance(document, dict) or document.get("format") != VERSION:
            raise limits.unsupported(self._where, "it was exported by a newer version; upgrade ciuic-async")
        names, trees = document.get("datasets"), document.get("trees")
        if not isinstance(names, list) or not isinstance(trees, list):
            raise limits.malformed(self._where, f"{TREE} is no tree")
        for name in names:
            found = self._find(name)
            self._blob(found, self._dtype(found))
        return {"top": document.get("top"), "trees": trees}

    def _find(self, name: Any) -> h5py.Dataset:
        """The dataset of a name, by hard links alone."""
        if type(name) is not str or not name.startswith("/") or len(name) > 100_000:
            raise limits.malformed(self._where, f"{TREE} names a dataset that is none")
        group: Any = self._file
        *around, last = name[1:].split("/")
        for part in around:
            group = self._member(group, part)
            if not isinstance(group, h5py.Group):
                raise limits.malformed(self._where, f"{name[:80]!r}: {part[:80]!r} is no group")
        return self._dataset(group, last)

    def _dtype(self, dataset: h5py.Dataset) -> str:
        """What the elements of a dataset are, checked against how they are stored."""
        if DTYPE in dataset.attrs:
            name = self._attribute(dataset, DTYPE)
        else:
            name = np.dtype(dataset.dtype).name
        if type(name) is not str or name not in ITEM_SIZE_BYTES:
            raise limits.malformed(self._where, f"{dataset.name[:80]!r}: unknown element type {str(name)[:40]!r}")
        if np.dtype(stored_as(name, ITEM_SIZE_BYTES[name])) != dataset.dtype:
            raise limits.malformed(self._where, f"{dataset.name[:80]!r}: {dataset.dtype} does not hold {name}")
        return name

    def _blob(self, dataset: h5py.Dataset, dtype: str) -> int:
        """The number of a dataset's elements. Bytes are always read: they may be an array's, or a long text's."""
        shape = tuple(map(int, dataset.shape))
        wanted = self._load_data or (dtype == "uint8" and len(shape) == 1)
        array = self._array(dataset, stored_as(dtype, ITEM_SIZE_BYTES[dtype])) if wanted else None
        return self._data.add(dtype, shape, array)

    # --- files of others ----------------------------------------------------------------------------------------------

    def group(self, group: h5py.Group, depth: int) -> dict[str, Any]:
        """A group as the node of a dict: attributes first, under ``@name``, then its members in the file's order."""
        if depth > limits.MAX_DEPTH:
            raise limits.malformed(self._where, f"groups are nested deeper than {limits.MAX_DEPTH}")
        token = h5py.h5o.get_info(group.id).addr
        if token in self._open_groups:
            raise limits.malformed(self._where, f"group {group.name[:80]!r} contains itself")
        self._open_groups.add(token)
        items = [[_node(f"{_ATTRIBUTES_AS}{name}"), self._attribute_node(group, name)] for name in group.attrs]
        for name in group:
            member = self._member(group, name)
            if isinstance(member, h5py.Group):
                items.append([_node(name), self.group(member, depth + 1)])
                continue
            items.append([_node(name), self._foreign(self._dataset(group, name))])
            for attribute in member.attrs:
                key = _node(f"{name}{_ATTRIBUTES_AS}{attribute}")
                items.append([key, self._attribute_node(member, attribute)])
        self._open_groups.discard(token)
        return {"dict": items}

    def _foreign(self, dataset: h5py.Dataset) -> Any:
        """The node of a tensor, or of texts."""
        kind = dataset.dtype
        if h5py.check_string_dtype(kind) is not None:
            return _node(self._strings(dataset.name, dataset, lambda: dataset[()]))
        if DTYPE in dataset.attrs:
            return {"tensor": self._blob(dataset, self._dtype(dataset))}
        name = kind.newbyteorder("=").name
        if name not in ITEM_SIZE_BYTES or kind.kind not in "biufc":
            raise limits.unsupported(self._where, f"dataset {dataset.name[:80]!r} is of type {kind}, expected numbers")
        array = self._array(dataset, kind.str).astype(kind.newbyteorder("<")) if self._load_data else None
        return {"tensor": self._data.add(name, tuple(map(int, dataset.shape)), array)}

    def _attribute_node(self, holder: Any, name: str) -> Any:
        value = self._attribute(holder, name)
        if not isinstance(value, np.ndarray):
            return _node(value)
        data = np.frombuffer(np.ascontiguousarray(value).tobytes(), np.uint8)
        number = self._data.add("uint8", data.shape, data)
        return {"numpy.array": number, "dtype": value.dtype.str, "shape": list(value.shape), "order": "C"}

    def _attribute(self, holder: Any, name: str) -> Any:
        """A plain number, text, or array of numbers."""
        info = h5py.h5a.open(holder.id, name.encode())
        what = f"attribute {name[:80]!r} of {str(holder.name)[:80]!r}"
        self._count()
        self._allowance.take(math.prod(info.shape) * info.dtype.itemsize, what)
        if info.get_space().get_simple_extent_type() == h5py.h5s.NULL:
            return None
        if h5py.check_string_dtype(info.dtype) is not None:
            return self._strings(what, info, lambda: holder.attrs[name])
        if info.dtype.kind not in "biufc":
            raise limits.unsupported(self._where, f"{what} is of type {info.dtype}, expected a number or text")
        value = holder.attrs[name]
        if isinstance(value, np.ndarray):
            return value
        plain = value.item()
        return plain if np.dtype(type(plain)) == info.dtype or info.dtype.kind in "bi" else value

    def _strings(self, what: str, holder: Any, read: Any) -> Any:
        """One text, or a list of those. Texts of no fixed length may all be one: then each costs the whole file."""
        count = math.prod(holder.shape)
        kind = h5py.check_string_dtype(holder.dtype)
        if kind.length is None and count > 1:
            raise limits.unsupported(self._where, f"{what}: several texts of no fixed length are not read")
        value = read()
        found = [text if isinstance(text, str) else _decoded(text) for text in np.asarray(value, object).reshape(-1)]
        self._allowance.take(sum(map(len, found)), what)
        return found if np.ndim(value) else found[0]

    # --- what is followed and read ------------------------------------------------------------------------------------

    def _count(self) -> None:
        self._objects += 1
        if self._objects > _OBJECTS:
            raise limits.malformed(self._where, f"more than {_OBJECTS} objects")

    def _member(self, group: h5py.Group, name: str) -> Any:
        """A group or dataset that is in this very file and group."""
        self._count()
        link = group.get(name, getlink=True)
        if link is None:
            raise limits.malformed(self._where, f"{name[:80]!r} is missing")
        if not isinstance(link, h5py.HardLink):
            raise limits.refused(
                self._where,
                f"{name[:80]!r} is a {type(link).__name__}, which may lead anywhere; only what is in the file is read",
            )
        found = group[name]
        if not isinstance(found, h5py.Group | h5py.Dataset):
            raise limits.unsupported(self._where, f"{name[:80]!r} is a {type(found).__name__}, expected data")
        return found

    def _dataset(self, group: h5py.Group, name: str) -> h5py.Dataset:
        """A dataset whose bytes are all in this file."""
        found = self._member(group, name)
        if not isinstance(found, h5py.Dataset):
            raise limits.malformed(self._where, f"{name[:80]!r} is no dataset")
        properties = found.id.get_create_plist()
        what = f"dataset {name[:80]!r}"
        if properties.get_layout() == h5py.h5d.VIRTUAL:
            raise limits.refused(self._where, f"{what} is virtual: its data is in other files, which are not read")
        if properties.get_external_count():
            raise limits.refused(self._where, f"{what} has its data in another file, which is not read")
        for number in range(properties.get_nfilters()):
            code = properties.get_filter(number)[0]
            if code not in _FILTERS:
                raise limits.refused(
                    self._where, f"{what} needs filter {code}, which would be a plugin: none is loaded"
                )
        if found.shape is None:
            raise limits.unsupported(self._where, f"{what} is empty and has no shape")
        if found.chunks is not None and math.prod(found.chunks) * found.dtype.itemsize > _CHUNK_BYTES:
            raise limits.malformed(self._where, f"{what}: chunks of more than {_CHUNK_BYTES} bytes")
        return found

    def _array(self, dataset: h5py.Dataset, kind: str) -> np.ndarray[Any, Any]:
        """All elements of a dataset; what it claims to hold must be stored, but for what compresses."""
        claimed_bytes = math.prod(map(int, dataset.shape)) * dataset.dtype.itemsize
        stored_bytes = dataset.id.get_storage_size()
        what = f"dataset {str(dataset.name)[:80]!r}"
        compressed = dataset.id.get_create_plist().get_nfilters() > 0
        if claimed_bytes > max(_FREE_BYTES, stored_bytes) and not (compressed and stored_bytes):
            raise IntegrityError(
                f"{self._where}: {what} claims {claimed_bytes} bytes and stores {stored_bytes}",
                kind="file_bomb",
                where=self._where,
            )
        if dataset.chunks is not None:
            self._allowance.take(math.prod(dataset.chunks) * dataset.dtype.itemsize, what)
        self._allowance.take(claimed_bytes, what)
        array = np.empty(dataset.shape, kind)
        if array.size:
            dataset.read_direct(array)
        return array


def _decoded(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")


def read(path: str, where: str, allowance: limits.Allowance, load_data: bool, descriptor: int) -> dict[str, Any]:
    """The file's tree as nodes, and which of them lie where in the file of ``descriptor``.

    Raises:
        IntegrityError, UsageError: as ``read_hdf5``.
    """
    data = _Data(descriptor)
    with _errors(where), h5py.File(path, "r", locking=False) as file:
        reader = _Reader(file, where, allowance, load_data, data)
        if FORMAT in file.attrs and TREE in file:
            found = reader.own()
        else:
            found = {"top": "single", "trees": [{"key": None, "node": reader.group(file, 0)}]}
    return {**found, "blobs": data.blobs}


@contextmanager
def _errors(where: str) -> Iterator[None]:
    try:
        yield
    except CiuicError:
        raise
    except Exception as error:  # of libhdf5 there are many kinds
        raise limits.malformed(where, f"no HDF5 file, or damaged: {error!s:.200}") from error


def main() -> None:
    """Read the file that the arguments name, and write the answer: nodes, or the error."""
    path, where, size_bytes, load_data, data, answer = sys.argv[1:]
    try:
        found = read(path, where, limits.Allowance.of_file(where, int(size_bytes)), load_data == "1", int(data))
        text = json.dumps(found)
    except (CiuicError, RecursionError) as error:
        kind = error.kind if isinstance(error, CiuicError) else "file_malformed"
        text = json.dumps({"error": type(error).__name__, "kind": kind, "message": str(error)})
    with os.fdopen(int(answer), "wb") as file:
        file.write(text.encode("ascii"))


if __name__ == "__main__":
    main()
