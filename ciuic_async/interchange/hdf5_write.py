"""HDF5 that others can read, and that comes back as the very same tree.

Groups follow the tree, every tensor is a dataset in its place, and plain numbers and texts of dicts are attributes of
their group: that is for others. What ``hdf5_read`` goes by is one more dataset, ``ciuic.tree``: the tree as nodes of
docs/format.md section 2, in which tensors and long values are numbers of datasets. Element types that HDF5 lacks are
raw integers with an attribute ``ciuic.dtype``.

Tensors are written in row-major order, each for itself; the very same view of one storage in several places is one
dataset with several names.
"""

from __future__ import annotations

import os
from pathlib import Path as FilePath
from typing import Any

import h5py
import numpy as np
import torch

from ciuic_async.capture.state_tree import flatten_into
from ciuic_async.capture.tensors import DTYPE_NAMES, Sources, TensorCollector
from ciuic_async.format import jsontext
from ciuic_async.format.manifest import Node, Path
from ciuic_async.handoffs import PlannedTensor, Region
from ciuic_async.interchange.hdf5_names import DTYPE, FORMAT, NATIVE, TREE, VERSION, stored_as
from ciuic_async.interchange.tensors import elements

_ATTRIBUTE_BYTES = 32 << 10
_ATTRIBUTES = 256
"""Of one group: they are a convenience, and the tree has all of them."""
_LIBRARY_VERSIONS = ("v110", "v114")


class _Datasets(TensorCollector):
    """Writes what the walk over the tree finds, at once."""

    def __init__(self, file: h5py.File) -> None:
        super().__init__()
        self.names: list[str] = []
        self._groups: dict[Path, h5py.Group] = {(): file}
        self._seen: dict[tuple[Any, ...], int] = {}

    def add(self, tensor: torch.Tensor, path: Path) -> dict[str, Node]:
        """The node of a leaf, whose dataset is written."""
        node = super().add(tensor, path)  # refuses what no state can hold
        storage = tensor.untyped_storage()
        view = (str(tensor.dtype), tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()))
        key = (str(tensor.device), storage.data_ptr(), view, tensor.is_conj(), tensor.is_neg())
        number = self._seen.get(key) if tensor.numel() else None
        if number is None:
            name = DTYPE_NAMES[tensor.dtype]
            data = elements(tensor)
            number = self._seen[key] = self._dataset(data, stored_as(name, tensor.element_size()), name, path)
        else:
            group, name = self._place(path)
            group[name] = group.file[self.names[number]]  # a second name for it
        node["tensor"] = number
        return node

    def add_host_bytes(self, data: memoryview, path: Path) -> int:
        """A dataset of bytes: an array's, or those of a value that is long."""
        return self._dataset(np.frombuffer(data, np.uint8).reshape(-1, 1), "<u1", "uint8", path)

    def plan(self, chunk_size_bytes: int) -> tuple[tuple[PlannedTensor, ...], tuple[Region, ...], int, Sources]:
        """Nothing is left to be stored."""
        none = np.empty(0, np.int64)
        return (), (), 0, Sources(none, none, none, none, none, none, (), none)

    def _dataset(self, data: np.ndarray[Any, Any], kind: str, dtype: str, path: Path) -> int:
        group, name = self._place(path)
        array = data.view(kind).reshape(data.shape[:-1])
        made = group.create_dataset(name, data=array)
        if dtype not in NATIVE:
            made.attrs[DTYPE] = dtype
        self.names.append(made.name)
        return len(self.names) - 1

    def _place(self, path: Path) -> tuple[h5py.Group, str]:
        group = self.group(path[:-1])
        return group, _free(group, path[-1] if path else "state")

    def group(self, path: Path) -> h5py.Group:
        """The group of a container; made with those around it. Keys that read alike get names apart."""
        found = self._groups.get(path)
        if found is None:
            around = self.group(path[:-1])
            found = self._groups[path] = around.create_group(_free(around, path[-1]), track_order=True)
        return found


def _free(group: h5py.Group, step: str | int) -> str:
    """A name that HDF5 can have and the group has not."""
    name = str(step).replace("%", "%25").replace("/", "%2F").replace("\0", "%00").replace(".", "%2E", step == ".")
    name = name or "%"
    if name == TREE or name in group:
        number = 2
        while f"{name}~{number}" in group:
            number += 1
        name = f"{name}~{number}"
    return name


def write_hdf5(state: Any, path: FilePath, attributes: dict[str, str]) -> None:
    """Write ``state`` to a new file at ``path``.

    Args:
        attributes: said about the file as a whole.

    Raises:
        UsageError: kind ``unsupported_type``.
        OSError: the place refused it.
    """
    with h5py.File(os.fspath(path), "x", libver=_LIBRARY_VERSIONS, track_order=True) as file:
        datasets = _Datasets(file)
        plan = flatten_into(datasets, state, 1 << 22, None).plan
        tree = {
            "format": VERSION,
            "top": plan.top,
            "trees": [{"key": tree.key, "node": tree.node} for tree in plan.trees],
            "datasets": list(datasets.names),
        }
        file.create_dataset(TREE, data=np.frombuffer(jsontext.encode(tree), np.uint8))
        file.attrs[FORMAT] = VERSION
        for name, text in attributes.items():
            file.attrs[name] = text
        _describe(datasets, state, ())


def _describe(datasets: _Datasets, value: Any, path: Path) -> None:
    """Plain values of dicts as attributes, as far as HDF5 has their type: for others, never read back."""
    if not isinstance(value, dict):
        return
    count = 0
    for key, item in value.items():
        if type(key) not in (str, int):
            continue
        if isinstance(item, dict) and item:
            _describe(datasets, item, (*path, key))
        elif count < _ATTRIBUTES and _fits(key, item):
            group = datasets.group(path)
            name = str(key)
            if name and name not in group.attrs:
                group.attrs[name] = item
                count += 1


def _fits(key: Any, item: Any) -> bool:
    if type(item) is int:
        plain = -(2**63) <= item < 2**63
    elif type(item) is str:
        plain = len(item) <= _ATTRIBUTE_BYTES // 4 and "\0" not in item and _is_text(item)
    else:
        plain = type(item) in (float, bool)
    return plain and "\0" not in str(key) and len(str(key)) <= 1000 and _is_text(str(key))


def _is_text(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text)
