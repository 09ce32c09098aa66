"""HDF5 read as hostile input: nothing outside the file, no plugin, and no more memory than the file may ask for.

Only what is in the file itself is followed: hard links to groups and datasets. Soft and external links, virtual
datasets, external storage, and filters that would be loaded from elsewhere are refused by name, before any data is
read. What a dataset claims to hold is compared with what is stored, and counted, before memory is taken.

The parser below all this is libhdf5, a large C library: a file from strangers deserves a sandbox all the same.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import h5py
import numpy as np
import torch

from ciuic_async.capture.state_tree import Inflater, decode_plain
from ciuic_async.capture.tensors import DTYPES, empty
from ciuic_async.errors import CiuicError, IntegrityError
from ciuic_async.format import jsontext
from ciuic_async.format.dtypes import ITEM_SIZE_BYTES
from ciuic_async.format.manifest import TOP_DICT, StoredTensor
from ciuic_async.interchange import limits
from ciuic_async.interchange.hdf5_write import DTYPE, FORMAT, TREE, VERSION, stored_as
from ciuic_async.interchange.tensors import measure

_FILTERS = {h5py.h5z.FILTER_DEFLATE, h5py.h5z.FILTER_SHUFFLE, h5py.h5z.FILTER_FLETCHER32}
"""Those that libhdf5 has in it; any other would be looked for among plugins, which are code."""
_CHUNK_BYTES = 1 << 30
_OBJECTS = 1_000_000
_FREE_BYTES = 1 << 20
_ATTRIBUTES_AS = "@"
"""In trees of files that are not ours: what the key of an attribute begins with."""


def read_hdf5(path: str, where: str, size_bytes: int, load_data: bool = True) -> Any:
    """The state in an HDF5 file: the very tree of one that was exported, else nested dicts by its groups.

    Args:
        load_data: False: tensors are on the meta device, arrays of files that are not ours are not read.

    Raises:
        IntegrityError: kind ``file_malformed``, ``file_refused`` or ``file_bomb``.
        UsageError: kind ``file_unsupported``.
    """
    allowance = limits.Allowance.of_file(where, size_bytes)
    with _errors(where), h5py.File(os.fspath(path), "r", locking=False) as file:
        reader = _Reader(file, where, allowance, load_data)
        if FORMAT in file.attrs and TREE in file:
            state = reader.own()
        else:
            state = reader.group(file, 0)
    measure(state, where)
    return state


@contextmanager
def _errors(where: str) -> Iterator[None]:
    try:
        yield
    except CiuicError:
        raise
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, OverflowError, MemoryError) as error:
        raise limits.malformed(where, f"no HDF5 file, or damaged: {error!s:.200}") from error


class _Reader:
    def __init__(self, file: h5py.File, where: str, allowance: limits.Allowance, load_data: bool) -> None:
        self._file = file
        self._where = where
        self._allowance = allowance
        self._load_data = load_data
        self._open_groups: set[Any] = set()
        self._objects = 0
        self._datasets: dict[str, torch.Tensor] = {}

    # --- ours ---------------------------------------------------------------------------------------------------------

    def own(self) -> Any:
        """The tree that ``hdf5_write`` wrote."""
        document = jsontext.decode(
            self._array(self._dataset(self._file, TREE), "<u1").tobytes(),
            what=self._where,
            limit_bytes=limits.STRUCTURE_BYTES,
        )
        if not isinstance(document, dict) or document.get("format") != VERSION:
            raise limits.unsupported(self._where, "it was exported by a newer version; upgrade ciuic-async")
        names, trees = document.get("datasets"), document.get("trees")
        if not isinstance(names, list) or not isinstance(trees, list) or (not trees and document["top"] != TOP_DICT):
            raise limits.malformed(self._where, f"{TREE} is no tree")
        found = [self._find(name) for name in names]
        stored = tuple(StoredTensor((), self._dtype(one), tuple(map(int, one.shape)), "cpu", ()) for one in found)
        inflater = Inflater(stored, lambda index: self._tensor(found[index], stored[index]))
        values = [inflater.value(tree["node"], self._where) for tree in trees]
        if document["top"] != TOP_DICT:
            return values[0]
        keys = [decode_plain(tree["key"]) for tree in trees]
        if len(set(keys)) != len(keys):
            raise limits.malformed(self._where, "two items of the state have one key")
        return dict(zip(keys, values, strict=True))

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
        if type(name) is not str or name not in ITEM_SIZE_BYTES or name not in DTYPES:
            raise limits.malformed(self._where, f"{dataset.name[:80]!r}: unknown element type {str(name)[:40]!r}")
        if np.dtype(stored_as(name, ITEM_SIZE_BYTES[name])) != dataset.dtype:
            raise limits.malformed(self._where, f"{dataset.name[:80]!r}: {dataset.dtype} does not hold {name}")
        return name

    def _tensor(self, dataset: h5py.Dataset, stored: StoredTensor) -> torch.Tensor:
        """The content of a dataset; read once, though each reference to bytes makes a copy of them, and counts."""
        if stored.dtype == "uint8" and len(stored.shape) == 1:
            self._allowance.take(stored.size_bytes, f"dataset {dataset.name[:80]!r}")
        elif not self._load_data:
            return torch.empty(stored.shape, dtype=DTYPES[stored.dtype], device="meta")
        known = self._datasets.get(dataset.name)
        if known is None:
            known = self._datasets[dataset.name] = self._read(dataset, stored.dtype, tuple(stored.shape))
        return known

    def _read(self, dataset: h5py.Dataset, dtype: str, shape: tuple[int, ...]) -> torch.Tensor:
        array = self._array(dataset, stored_as(dtype, ITEM_SIZE_BYTES[dtype]))
        tensor = empty(shape, DTYPES[dtype], "cpu")
        if tensor.numel():
            memory = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
            memory.numpy()[:] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        return tensor

    # --- files of others ----------------------------------------------------------------------------------------------

    def group(self, group: h5py.Group, depth: int) -> dict[str, Any]:
        """A group as a dict: attributes first, under ``@name``, then its members in the file's order."""
        if depth > limits.MAX_DEPTH:
            raise limits.malformed(self._where, f"groups are nested deeper than {limits.MAX_DEPTH}")
        token = h5py.h5o.get_info(group.id).addr
        if token in self._open_groups:
            raise limits.malformed(self._where, f"group {group.name[:80]!r} contains itself")
        self._open_groups.add(token)
        result: dict[str, Any] = {}
        for name in group.attrs:
            result[f"{_ATTRIBUTES_AS}{name}"] = self._attribute(group, name)
        for name in group:
            member = self._member(group, name)
            if isinstance(member, h5py.Group):
                result[name] = self.group(member, depth + 1)
            else:
                result[name] = self._foreign(self._dataset(group, name))
                for attribute in member.attrs:
                    result[f"{name}{_ATTRIBUTES_AS}{attribute}"] = self._attribute(member, attribute)
        self._open_groups.discard(token)
        return result

    def _foreign(self, dataset: h5py.Dataset) -> Any:
        """A tensor where torch has the type, else an array or text."""
        kind = dataset.dtype
        if h5py.check_string_dtype(kind) is not None:
            return self._strings(dataset.name, dataset, lambda: dataset[()])
        own = DTYPE in dataset.attrs
        name = self._dtype(dataset) if own else kind.newbyteorder("=").name
        if not own and (name not in ITEM_SIZE_BYTES or kind.kind not in "biufc"):
            raise limits.unsupported(self._where, f"dataset {dataset.name[:80]!r} is of type {kind}, expected numbers")
        shape = tuple(map(int, dataset.shape))
        if not self._load_data:
            return torch.empty(shape, dtype=DTYPES[name], device="meta")
        if own:
            return self._read(dataset, name, shape)
        array = self._array(dataset, kind.str)
        return torch.from_numpy(array.astype(kind.newbyteorder("="), copy=True))

    def _attribute(self, holder: Any, name: str) -> Any:
        """A plain number, text, or array of numbers."""
        info = h5py.h5a.open(holder.id, name.encode())
        what = f"attribute {name[:80]!r} of {str(holder.name)[:80]!r}"
        size_bytes = math.prod(info.shape) * info.dtype.itemsize
        self._count()
        self._allowance.take(size_bytes, what)
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
