"""From tensors to storages: what is stored once, how leaves look into it, and where its bytes are.

Leaves that share a storage share one stored tensor (ties and views come back shared, each byte is stored once). A leaf
alone on its storage keeps its strides when it is dense. Sources are flat byte views of *live* memory: they are valid
until training changes it, so whoever copies them does so before (docs/format.md section 3 has the rules).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, overload

import numpy as np
import torch

from ciuic_async.errors import UsageError
from ciuic_async.format.dtypes import ITEM_SIZE_BYTES
from ciuic_async.format.fields import Fields, malformed
from ciuic_async.format.manifest import (
    MAX_DIMENSIONS,
    PACK_ALIGNMENT_BYTES,
    PACK_LIMIT_BYTES,
    Node,
    Path,
    dotted,
    volume,
)
from ciuic_async.format.segment import align_up
from ciuic_async.handoffs import PlannedTensor, Region

REGION_ALIGNMENT_BYTES = 4096

DTYPES: dict[str, torch.dtype] = {
    name: dtype for name in ITEM_SIZE_BYTES if isinstance(dtype := getattr(torch, name, None), torch.dtype)
}
DTYPE_NAMES: dict[torch.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}
_ALLOWED_TYPES = (torch.Tensor, torch.nn.Parameter)

View = tuple[str, tuple[int, ...], tuple[int, ...], int]  # dtype, shape, stride, offset in bytes from the storage
Owner = torch.UntypedStorage | memoryview
"""What live bytes belong to, and what keeps them alive: a tensor's storage, or host memory."""


@dataclass(frozen=True, slots=True)
class Source:
    """Bytes to copy: ``flat`` (1-D uint8 tensor on any device, or host memory) goes to ``address`` of the plan.

    ``flat`` of None means zeros: padding, which must not keep what an earlier snapshot left there.
    """

    address: int
    size_bytes: int
    flat: torch.Tensor | memoryview | None


@dataclass(frozen=True, slots=True, eq=False)
class Sources(Sequence[Source]):
    """All copies of a plan in address order, as columns: a state of 20,000 tensors would be as many views otherwise.

    Row ``n`` are ``sizes_bytes[n]`` bytes for ``addresses[n]`` of the plan, at ``pointers[n]``, which is ``lows[n]``
    bytes into its owner. Rows whose owner is None are zeros. ``owners`` keeps all of it alive.

    Attributes:
        groups: the stored tensor that a row belongs to, or -1.
        owner_numbers: the owner of each row, by its place in ``owners``.
        device_rows: rows whose pointer is no address of host memory.
    """

    addresses: np.ndarray[Any, np.dtype[np.int64]]
    sizes_bytes: np.ndarray[Any, np.dtype[np.int64]]
    lows: np.ndarray[Any, np.dtype[np.int64]]
    groups: np.ndarray[Any, np.dtype[np.int64]]
    pointers: np.ndarray[Any, np.dtype[np.int64]]
    owner_numbers: np.ndarray[Any, np.dtype[np.int64]]
    owners: Sequence[Owner | None]
    device_rows: np.ndarray[Any, np.dtype[np.int64]]

    def __len__(self) -> int:
        return len(self.addresses)

    @overload
    def __getitem__(self, row: int) -> Source: ...
    @overload
    def __getitem__(self, row: slice) -> list[Source]: ...
    def __getitem__(self, row: int | slice) -> Source | list[Source]:
        if isinstance(row, slice):
            return [self[number] for number in range(len(self))[row]]
        low, size, owner = int(self.lows[row]), int(self.sizes_bytes[row]), self.owners[self.owner_numbers[row]]
        flat = flat_bytes(owner, low, low + size) if isinstance(owner, torch.UntypedStorage) else owner
        return Source(int(self.addresses[row]), size, flat)

    def select(self, rows: np.ndarray[Any, Any]) -> Sources:
        """Some of the rows: a mask, or numbers that rise."""
        numbers = np.flatnonzero(rows) if rows.dtype == np.bool_ else rows
        return Sources(
            self.addresses[numbers],
            self.sizes_bytes[numbers],
            self.lows[numbers],
            self.groups[numbers],
            self.pointers[numbers],
            self.owner_numbers[numbers],
            self.owners,
            np.flatnonzero(np.isin(numbers, self.device_rows)),
        )

    def storage_addresses(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Where the storage begins that a row belongs to; 0 for rows that are no tensor's."""
        begins = [owner.data_ptr() if isinstance(owner, torch.UntypedStorage) else 0 for owner in self.owners]
        return np.take(np.array(begins, dtype=np.int64), self.owner_numbers)


@dataclass(slots=True)
class _Leaf:
    node: dict[str, Node]
    tensor: torch.Tensor
    storage: torch.UntypedStorage
    view: View
    low: int
    high: int
    contiguous: bool


@dataclass(slots=True)
class _Group:
    """All leaves on one storage, or one piece of host memory."""

    path: Path
    requires_grad: bool
    device: str
    leaves: list[_Leaf] = field(default_factory=list)
    host: memoryview | None = None
    frozen: bool = False
    gathered: bool = False
    """Its elements lie apart: what is stored is a copy of them."""


@dataclass(slots=True)
class _Stored:
    """A stored tensor with the pieces of live memory it is made of."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    device: str
    size_bytes: int
    requires_grad: bool
    pieces: list[tuple[int, Owner, int, int]]
    """Offset in the stored tensor; owner; where the piece lies in it, from byte to byte."""


class TensorCollector:
    """Collects the tensors of one state tree in order, then plans how they are stored.

    Args:
        trainable: addresses of storages whose parameters are being trained; small tensors are packed by this, so that
            one trained bias does not re-store its frozen neighbours (a state_dict's tensors do not say it themselves).
        frozen: patterns of paths (``model.trunk.*``): what only they lead to does not change, by the user's word.
    """

    def __init__(self, trainable: frozenset[int] = frozenset(), frozen: Sequence[str] = ()) -> None:
        self._trainable = trainable
        self._frozen = tuple(frozen)
        self.groups: list[_Group] = []
        """What will be stored, by index."""
        self._by_storage: dict[tuple[str, int], int] = {}
        self._device_names: dict[torch.device, str] = {}

    def add(self, tensor: torch.Tensor, path: Path) -> dict[str, Node]:
        """The node of a leaf. Its view is filled in by ``plan``, when all leaves on its storage are known.

        Raises:
            UsageError: kind ``unsupported_tensor``: sparse, quantized, meta, a subclass, an unknown dtype.
        """
        refusal = None if _is_ordinary(tensor) else _refusal(tensor)
        if refusal is None:
            plain = tensor
            if plain.is_conj() or plain.is_neg():
                plain = plain.detach().resolve_conj().resolve_neg()
            if plain.device.type not in ("cpu", "cuda"):
                plain = plain.detach().cpu()
            item_size = plain.element_size()
            low = int(plain.storage_offset()) * item_size
            contiguous = plain.is_contiguous()
            high = low + (plain.numel() * item_size if contiguous else _extent_bytes(plain))
            storage = plain.untyped_storage()
            if high > low and storage.nbytes() < high:
                refusal = "its storage was freed or shrunk (untyped_storage().resize_)"
        if refusal is not None:
            raise UsageError(
                f"{dotted(path)}: a tensor that cannot be stored: {refusal}; convert it or leave it out of the state",
                kind="unsupported_tensor",
                where=dotted(path),
            )
        node: dict[str, Node] = {}
        requires_grad = tensor.requires_grad
        if type(tensor) is torch.nn.Parameter:
            node["parameter"] = True
        if requires_grad:
            node["requires_grad"] = True
        address = storage.data_ptr() if high > low else 0
        device = self._device_name(tensor.device)
        number = self._by_storage.get((device, address)) if address else None
        if number is None:
            number = len(self.groups)
            trained = requires_grad or address in self._trainable
            self.groups.append(_Group(path, trained, device, frozen=self._is_frozen(path)))
            if address:
                self._by_storage[device, address] = number
        elif self.groups[number].frozen:
            self.groups[number].frozen = self._is_frozen(path)
        node["tensor"] = number
        view = (DTYPE_NAMES[plain.dtype], tuple(plain.shape), plain.stride(), low)
        self.groups[number].leaves.append(_Leaf(node, plain, storage, view, low, high, contiguous))
        return node

    def _is_frozen(self, path: Path) -> bool:
        return bool(self._frozen) and any(fnmatchcase(dotted(path), pattern) for pattern in self._frozen)

    def _device_name(self, device: torch.device) -> str:
        name = self._device_names.get(device)
        if name is None:
            name = self._device_names[device] = str(device)
        return name

    def add_host_bytes(self, data: memoryview, path: Path) -> int:
        """A stored 1-D uint8 tensor of host memory (numpy arrays, long strings); its index."""
        self.groups.append(_Group(path, False, "cpu", host=data, frozen=self._is_frozen(path)))
        return len(self.groups) - 1

    def plan(self, chunk_size_bytes: int) -> tuple[tuple[PlannedTensor, ...], tuple[Region, ...], int, Sources]:
        """Decide what is stored where.

        Returns:
            Tensors in order of their index, regions (packs first), the number of packs, and the copies to make.
        """
        stored = [_store(group) for group in self.groups]
        frozen = [group.frozen for group in self.groups]
        packs = _packs(stored, frozen, chunk_size_bytes)
        regions: list[Region] = []
        rows = _Rows()
        places: dict[int, tuple[int, int | None]] = {}
        address = 0
        for members, size, item_size in packs:
            base = address
            position = 0
            for number, offset in members:
                rows.zeros(base + position, offset - position)
                rows.stored(base + offset, number, stored[number])
                places[number] = (len(regions), offset)
                position = offset + stored[number].size_bytes
            rows.zeros(base + position, size - position)
            first = members[0][0]
            regions.append(Region(base, size, item_size, stored[first].path, frozen[first]))
            address = align_up(base + size, REGION_ALIGNMENT_BYTES)
        for number, tensor in enumerate(stored):
            if number in places:
                continue
            if not tensor.size_bytes:
                places[number] = (-1, None)
                continue
            rows.stored(address, number, tensor)
            places[number] = (len(regions), None)
            item_size = ITEM_SIZE_BYTES[tensor.dtype]
            regions.append(Region(address, tensor.size_bytes, item_size, tensor.path, frozen[number]))
            address = align_up(address + tensor.size_bytes, REGION_ALIGNMENT_BYTES)
        tensors = tuple(
            PlannedTensor(tensor.path, tensor.dtype, tensor.shape, tensor.device, *places[number])
            for number, tensor in enumerate(stored)
        )
        return tensors, tuple(regions), len(packs), rows.sources()


def _is_ordinary(tensor: torch.Tensor) -> bool:
    """Whether nothing but its storage can keep a tensor from being stored: the quick way to say so."""
    return (
        type(tensor) in _ALLOWED_TYPES
        and tensor.layout is torch.strided
        and not tensor.is_nested
        and tensor.dtype in DTYPE_NAMES
        and not tensor.is_meta
        and tensor.dim() <= MAX_DIMENSIONS
    )


def _refusal(tensor: torch.Tensor) -> str:
    """Why a tensor that is not ordinary cannot be stored."""
    if type(tensor) not in _ALLOWED_TYPES:
        return f"type {type(tensor).__module__}.{type(tensor).__qualname__} is not torch.Tensor or nn.Parameter"
    if tensor.layout != torch.strided:
        return f"layout {tensor.layout}, only dense (strided) tensors are stored"
    if tensor.is_quantized:
        return f"quantized dtype {tensor.dtype}"
    if tensor.is_nested:
        return "a nested tensor"
    if tensor.device.type == "meta":
        return "it is on the meta device and has no data"
    if tensor.dtype not in DTYPE_NAMES:
        return f"dtype {tensor.dtype}"
    return f"{tensor.dim()} dimensions, at most {MAX_DIMENSIONS}"


def _extent_bytes(tensor: torch.Tensor) -> int:
    """Bytes from the first to the last element, inclusive."""
    if not tensor.numel():
        return 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


def flat_bytes(storage: torch.UntypedStorage, low: int, high: int) -> torch.Tensor:
    """Bytes ``low..high`` of a storage as a 1-D uint8 tensor that shares its memory."""
    flat = torch.empty(0, dtype=torch.uint8, device=storage.device)
    return flat.set_(storage, low, (high - low,), (1,))


def _store(group: _Group) -> _Stored:
    if group.host is not None:
        size = len(group.host)
        pieces: list[tuple[int, Owner, int, int]] = [(0, group.host, 0, size)] if size else []
        return _Stored(group.path, "uint8", (size,), group.device, size, group.requires_grad, pieces)
    if len(group.leaves) == 1 or len({leaf.view for leaf in group.leaves}) == 1:
        return _store_single(group)
    return _store_shared(group)


def _store_single(group: _Group) -> _Stored:
    """One view of a storage, seen once or several times."""
    first = group.leaves[0]
    tensor, storage = first.tensor, _widest(group)
    dtype, shape, stride, _ = first.view
    dense_bytes = volume(shape) * ITEM_SIZE_BYTES[dtype]
    extent = first.high - first.low
    if not dense_bytes or first.contiguous:
        pieces: list[tuple[int, Owner, int, int]] = [(0, storage, first.low, first.high)] if dense_bytes else []
        return _Stored(group.path, dtype, shape, group.device, dense_bytes, group.requires_grad, pieces)
    if extent <= dense_bytes:  # permuted or expanded: keep the memory order and the strides
        for leaf in group.leaves:
            leaf.node["view"] = _view_json(dtype, shape, stride, 0)
        elements = extent // ITEM_SIZE_BYTES[dtype]
        pieces = [(0, storage, first.low, first.high)]
        return _Stored(group.path, dtype, (elements,), group.device, extent, group.requires_grad, pieces)
    group.gathered = True  # gaps belong to nobody here: store the elements alone, in row-major order
    pieces = [(0, gather(tensor), 0, dense_bytes)]
    return _Stored(group.path, dtype, shape, group.device, dense_bytes, group.requires_grad, pieces)


def gather(tensor: torch.Tensor) -> torch.UntypedStorage:
    """The elements of a tensor alone, in row-major order."""
    return tensor.detach().contiguous().untyped_storage()


def _widest(group: _Group) -> torch.UntypedStorage:
    """Storages are told apart by where they begin: numpy makes several of different length over one array."""
    if len(group.leaves) == 1:
        return group.leaves[0].storage
    return max((leaf.storage for leaf in group.leaves), key=torch.UntypedStorage.nbytes)


def _store_shared(group: _Group) -> _Stored:
    """Several views of a storage: the union of what they see, each gap closed, alignment kept modulo 16."""
    runs: list[list[int]] = []
    for low, high in sorted((leaf.low, leaf.high) for leaf in group.leaves):
        if runs and low <= runs[-1][1]:
            runs[-1][1] = max(runs[-1][1], high)
        else:
            runs.append([low, high])
    position = 0
    storage = _widest(group)
    pieces: list[tuple[int, Owner, int, int]] = []
    shifts: list[tuple[int, int, int]] = []  # low, high, where low went
    for low, high in runs:
        position = align_up(position, 16) + low % 16 if position or low % 16 else 0
        pieces.append((position, storage, low, high))
        shifts.append((low, high, position))
        position += high - low
    names = {leaf.view[0] for leaf in group.leaves}
    dtype = names.pop() if len(names) == 1 else "uint8"
    size = align_up(position, ITEM_SIZE_BYTES[dtype])
    for leaf in group.leaves:
        low, _, target = next(run for run in shifts if run[0] <= leaf.low and leaf.high <= run[1])
        name, shape, stride, _ = leaf.view
        offset = (target + leaf.low - low) // ITEM_SIZE_BYTES[name]
        leaf.node["view"] = _view_json(name, shape, stride, offset)
    shape = (size // ITEM_SIZE_BYTES[dtype],)
    return _Stored(group.path, dtype, shape, group.device, size, group.requires_grad, pieces)


def _view_json(dtype: str, shape: Sequence[int], stride: Sequence[int], offset_elements: int) -> dict[str, Node]:
    return {"dtype": dtype, "shape": list(shape), "stride": list(stride), "offset_elements": offset_elements}


def _packs(
    stored: Iterable[_Stored], frozen: Sequence[bool], chunk_size_bytes: int
) -> list[tuple[list[tuple[int, int]], int, int]]:
    """Small tensors grouped into packs: (members as (index, offset), size, item size), in order of first member."""
    packs: list[tuple[list[tuple[int, int]], int, int]] = []
    open_packs: dict[tuple[str | int | None, int, bool, bool], int] = {}
    for number, tensor in enumerate(stored):
        if not 0 < tensor.size_bytes < PACK_LIMIT_BYTES:
            continue
        item_size = ITEM_SIZE_BYTES[tensor.dtype]
        # A tensor that is itself a top-level item shares packs with its like: a bare state_dict is one name, not many.
        key = (tensor.path[0] if len(tensor.path) > 1 else None, item_size, tensor.requires_grad, frozen[number])
        current = open_packs.get(key)
        if current is not None:
            members, size, _ = packs[current]
            offset = align_up(size, PACK_ALIGNMENT_BYTES)
            if offset + tensor.size_bytes <= chunk_size_bytes:
                members.append((number, offset))
                packs[current] = (members, offset + tensor.size_bytes, item_size)
                continue
        open_packs[key] = len(packs)
        packs.append(([(number, 0)], tensor.size_bytes, item_size))
    return packs


class _Rows:
    """Gathers ``Sources``, in address order."""

    def __init__(self) -> None:
        self._rows: list[tuple[int, int, int, int, int]] = []  # address, size, low, group, pointer
        self._owners: list[Owner | None] = []
        self._device_rows: list[int] = []

    def stored(self, address: int, group: int, tensor: _Stored) -> None:
        """All of a stored tensor, gaps between its pieces included."""
        position = 0
        for offset, owner, low, high in tensor.pieces:
            self.zeros(address + position, offset - position)
            if isinstance(owner, torch.UntypedStorage):
                pointer = owner.data_ptr() + low
                if owner.device.type != "cpu":
                    self._device_rows.append(len(self._rows))
            else:
                pointer = host_address(owner) + low
            self._rows.append((address + offset, high - low, low, group, pointer))
            self._owners.append(owner)
            position = offset + high - low
        self.zeros(address + position, tensor.size_bytes - position)

    def zeros(self, address: int, size_bytes: int) -> None:
        if size_bytes:
            self._rows.append((address, size_bytes, 0, -1, 0))
            self._owners.append(None)

    def sources(self) -> Sources:
        rows = np.array(self._rows, dtype=np.int64).reshape(len(self._rows), 5)
        addresses, sizes, lows, groups, pointers = np.ascontiguousarray(rows.T)
        device_rows = np.array(self._device_rows, dtype=np.int64)
        numbers = np.arange(len(self._owners), dtype=np.int64)
        return Sources(addresses, sizes, lows, groups, pointers, numbers, self._owners, device_rows)


def host_address(memory: memoryview) -> int:
    """Where host memory begins."""
    return int(np.frombuffer(memory, dtype=np.uint8).ctypes.data)


# --- the way back -----------------------------------------------------------------------------------------------------


def check_view(node: dict[str, Node], dtype: str, shape: Sequence[int], where: str) -> View | None:
    """The view of a tensor node, checked to lie inside its stored tensor; None for the stored tensor itself.

    The view's offset is in bytes.
    """
    view = node.get("view")
    if view is None:
        return None
    fields = Fields(view, f"{where}: view")
    name = fields.string("dtype")
    sizes, strides = fields.integers("shape"), fields.integers("stride")
    offset = fields.integer("offset_elements")
    fields.done()
    if name not in DTYPES or len(sizes) != len(strides) or len(sizes) > MAX_DIMENSIONS:
        raise malformed(where, "a view's dtype, shape or stride is not one")
    item_size = ITEM_SIZE_BYTES[name]
    available = volume(shape) * ITEM_SIZE_BYTES[dtype]
    last = sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
    if all(sizes) and (offset + last + 1) * item_size > available:
        raise malformed(where, "a view lies outside its tensor")
    if volume([max(size, 1) for size in sizes]) > 2**53:
        raise malformed(where, "a view has too many elements")
    return name, sizes, strides, offset * item_size


def apply_view(stored: torch.Tensor, view: View | None) -> torch.Tensor:
    """A new tensor object on ``stored``'s memory. ``stored`` is contiguous and starts its storage."""
    if view is None:
        return stored.detach()
    name, shape, stride, offset = view
    dtype = DTYPES[name]
    if not volume(shape):
        return empty(shape, dtype, stored.device)
    with torch.no_grad():
        result = empty((0,), dtype, stored.device)
        return result.set_(stored.untyped_storage(), offset // dtype.itemsize, shape, stride)


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device | str) -> torch.Tensor:
    """``torch.empty`` for who fills all of it at once.

    Without the warning that experimental dtypes print, which is nothing to a restoring user; and without the filling
    that deterministic algorithms ask of ``torch.empty``, which takes as long as reading what belongs there.
    """
    storage = torch.UntypedStorage(volume(shape) * dtype.itemsize, device=device)  # type: ignore[no-untyped-call]
    flat = torch.empty(0, dtype=torch.uint8, device=device).set_(storage)
    return flat.view(dtype).view(tuple(shape))
