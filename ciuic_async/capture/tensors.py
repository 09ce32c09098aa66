"""From tensors to storages: what is stored once, how leaves look into it, and where its bytes are.

Leaves that share a storage share one stored tensor (ties and views come back shared, each byte is stored once). A leaf
alone on its storage keeps its strides when it is dense. Sources are flat byte views of *live* memory: they are valid
until training changes it, so whoever copies them does so before (docs/format.md section 3 has the rules).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

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


@dataclass(frozen=True, slots=True)
class Source:
    """Bytes to copy: ``flat`` (1-D uint8 tensor on any device, or host memory) goes to ``address`` of the plan.

    ``flat`` of None means zeros: padding, which must not keep what an earlier snapshot left there.
    """

    address: int
    size_bytes: int
    flat: torch.Tensor | memoryview | None


@dataclass(slots=True)
class _Leaf:
    node: dict[str, Node]
    tensor: torch.Tensor
    view: View
    low: int
    high: int


@dataclass(slots=True)
class _Group:
    """All leaves on one storage, or one piece of host memory."""

    path: Path
    requires_grad: bool
    device: str
    leaves: list[_Leaf] = field(default_factory=list)
    host: memoryview | None = None


@dataclass(slots=True)
class _Stored:
    """A stored tensor with the pieces of live memory it is made of: (offset, flat)."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    device: str
    size_bytes: int
    requires_grad: bool
    pieces: list[tuple[int, torch.Tensor | memoryview]]


class TensorCollector:
    """Collects the tensors of one state tree in order, then plans how they are stored.

    Args:
        trainable: addresses of storages whose parameters are being trained; small tensors are packed by this, so that
            one trained bias does not re-store its frozen neighbours (a state_dict's tensors do not say it themselves).
    """

    def __init__(self, trainable: frozenset[int] = frozenset()) -> None:
        self._trainable = trainable
        self._groups: list[_Group] = []
        self._by_storage: dict[tuple[str, int], int] = {}

    def add(self, tensor: torch.Tensor, path: Path) -> dict[str, Node]:
        """The node of a leaf. Its view is filled in by ``plan``, when all leaves on its storage are known.

        Raises:
            UsageError: kind ``unsupported_tensor``: sparse, quantized, meta, a subclass, an unknown dtype.
        """
        refusal = _refusal(tensor)
        if refusal:
            raise UsageError(
                f"{dotted(path)}: a tensor that cannot be stored: {refusal}; convert it or leave it out of the state",
                kind="unsupported_tensor",
                where=dotted(path),
            )
        node: dict[str, Node] = {}
        if isinstance(tensor, torch.nn.Parameter):
            node["parameter"] = True
        if tensor.requires_grad:
            node["requires_grad"] = True
        plain = tensor.detach()
        if plain.is_conj() or plain.is_neg():
            plain = plain.resolve_conj().resolve_neg()
        if plain.device.type not in ("cpu", "cuda"):
            plain = plain.cpu()
        storage = plain.untyped_storage()
        address = storage.data_ptr() if plain.numel() else 0
        device = str(tensor.device)
        number = self._by_storage.get((device, address)) if address else None
        if number is None:
            number = len(self._groups)
            self._groups.append(_Group(path, tensor.requires_grad or address in self._trainable, device))
            if address:
                self._by_storage[device, address] = number
        node["tensor"] = number
        low = int(plain.storage_offset()) * plain.element_size()
        view = (DTYPE_NAMES[plain.dtype], tuple(plain.shape), tuple(plain.stride()), low)
        self._groups[number].leaves.append(_Leaf(node, plain, view, low, low + _extent_bytes(plain)))
        return node

    def add_host_bytes(self, data: memoryview, path: Path) -> int:
        """A stored 1-D uint8 tensor of host memory (numpy arrays, long strings); its index."""
        self._groups.append(_Group(path, False, "cpu", host=data))
        return len(self._groups) - 1

    def plan(self, chunk_size_bytes: int) -> tuple[tuple[PlannedTensor, ...], tuple[Region, ...], int, list[Source]]:
        """Decide what is stored where.

        Returns:
            Tensors in order of their index, regions (packs first), the number of packs, and the copies to make.
        """
        stored = [_store(group) for group in self._groups]
        packs = _packs(stored, chunk_size_bytes)
        regions: list[Region] = []
        sources: list[Source] = []
        places: dict[int, tuple[int, int | None]] = {}
        address = 0
        for members, size, item_size in packs:
            base = address
            position = 0
            for number, offset in members:
                _zeros(sources, base + position, offset - position)
                _pieces(sources, base + offset, stored[number])
                places[number] = (len(regions), offset)
                position = offset + stored[number].size_bytes
            _zeros(sources, base + position, size - position)
            regions.append(Region(base, size, item_size, stored[members[0][0]].path))
            address = align_up(base + size, REGION_ALIGNMENT_BYTES)
        for number, tensor in enumerate(stored):
            if number in places:
                continue
            if not tensor.size_bytes:
                places[number] = (-1, None)
                continue
            _pieces(sources, address, tensor)
            places[number] = (len(regions), None)
            regions.append(Region(address, tensor.size_bytes, ITEM_SIZE_BYTES[tensor.dtype], tensor.path))
            address = align_up(address + tensor.size_bytes, REGION_ALIGNMENT_BYTES)
        tensors = tuple(
            PlannedTensor(tensor.path, tensor.dtype, tensor.shape, tensor.device, *places[number])
            for number, tensor in enumerate(stored)
        )
        return tensors, tuple(regions), len(packs), sources


def _refusal(tensor: torch.Tensor) -> str | None:
    """Why a tensor cannot be stored, or None."""
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
    needed = int(tensor.storage_offset()) * tensor.element_size() + _extent_bytes(tensor)
    if tensor.numel() and tensor.untyped_storage().nbytes() < needed:
        return "its storage was freed or shrunk (untyped_storage().resize_)"
    if tensor.dim() > MAX_DIMENSIONS:
        return f"{tensor.dim()} dimensions, at most {MAX_DIMENSIONS}"
    return None


def _extent_bytes(tensor: torch.Tensor) -> int:
    """Bytes from the first to the last element, inclusive."""
    if not tensor.numel():
        return 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


def flat_bytes(tensor: torch.Tensor, low: int, high: int) -> torch.Tensor:
    """Bytes ``low..high`` of a tensor's storage as a 1-D uint8 tensor that shares its memory."""
    with torch.no_grad():
        flat = torch.empty(0, dtype=torch.uint8, device=tensor.device)
        return flat.set_(tensor.untyped_storage(), low, (high - low,), (1,))


def _store(group: _Group) -> _Stored:
    if group.host is not None:
        size = len(group.host)
        pieces: list[tuple[int, torch.Tensor | memoryview]] = [(0, group.host)] if size else []
        return _Stored(group.path, "uint8", (size,), group.device, size, group.requires_grad, pieces)
    if len({leaf.view for leaf in group.leaves}) == 1:
        return _store_single(group)
    return _store_shared(group)


def _store_single(group: _Group) -> _Stored:
    """One view of a storage, seen once or several times."""
    first = group.leaves[0]
    tensor = first.tensor
    dtype, shape, stride, _ = first.view
    dense_bytes = tensor.numel() * tensor.element_size()
    extent = first.high - first.low
    if not dense_bytes or tensor.is_contiguous():
        flat = [] if not dense_bytes else [(0, flat_bytes(tensor, first.low, first.high))]
        return _Stored(group.path, dtype, shape, group.device, dense_bytes, group.requires_grad, list(flat))
    if extent <= dense_bytes:  # permuted or expanded: keep the memory order and the strides
        for leaf in group.leaves:
            leaf.node["view"] = _view_json(dtype, shape, stride, 0)
        pieces = [(0, flat_bytes(tensor, first.low, first.high))]
        elements = extent // tensor.element_size()
        return _Stored(group.path, dtype, (elements,), group.device, extent, group.requires_grad, list(pieces))
    packed = tensor.contiguous()  # gaps belong to nobody here: store the elements alone, in row-major order
    pieces = [(0, flat_bytes(packed, 0, dense_bytes))]
    return _Stored(group.path, dtype, shape, group.device, dense_bytes, group.requires_grad, list(pieces))


def _store_shared(group: _Group) -> _Stored:
    """Several views of a storage: the union of what they see, each gap closed, alignment kept modulo 16."""
    runs: list[list[int]] = []
    for low, high in sorted((leaf.low, leaf.high) for leaf in group.leaves):
        if runs and low <= runs[-1][1]:
            runs[-1][1] = max(runs[-1][1], high)
        else:
            runs.append([low, high])
    position = 0
    # Storages are told apart by where they begin: numpy makes several of different length over one array.
    widest = max((leaf.tensor for leaf in group.leaves), key=lambda tensor: tensor.untyped_storage().nbytes())
    pieces: list[tuple[int, torch.Tensor | memoryview]] = []
    shifts: list[tuple[int, int, int]] = []  # low, high, where low went
    for low, high in runs:
        position = align_up(position, 16) + low % 16 if position or low % 16 else 0
        pieces.append((position, flat_bytes(widest, low, high)))
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


def _packs(stored: Iterable[_Stored], chunk_size_bytes: int) -> list[tuple[list[tuple[int, int]], int, int]]:
    """Small tensors grouped into packs: (members as (index, offset), size, item size), in order of first member."""
    packs: list[tuple[list[tuple[int, int]], int, int]] = []
    open_packs: dict[tuple[str | int | None, int, bool], int] = {}
    for number, tensor in enumerate(stored):
        if not 0 < tensor.size_bytes < PACK_LIMIT_BYTES:
            continue
        item_size = ITEM_SIZE_BYTES[tensor.dtype]
        # A tensor that is itself a top-level item shares packs with its like: a bare state_dict is one name, not many.
        key = (tensor.path[0] if len(tensor.path) > 1 else None, item_size, tensor.requires_grad)
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


def _pieces(sources: list[Source], address: int, tensor: _Stored) -> None:
    position = 0
    for offset, flat in tensor.pieces:
        _zeros(sources, address + position, offset - position)
        size = len(flat) if isinstance(flat, memoryview) else flat.numel()
        sources.append(Source(address + offset, size, flat))
        position = offset + size
    _zeros(sources, address + position, tensor.size_bytes - position)


def _zeros(sources: list[Source], address: int, size_bytes: int) -> None:
    if size_bytes:
        sources.append(Source(address, size_bytes, None))


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
    """``torch.empty`` without the warning that experimental dtypes print, which is nothing to a restoring user."""
    flat = torch.empty(volume(shape) * dtype.itemsize, dtype=torch.uint8, device=device)
    return flat.view(dtype).view(tuple(shape))
