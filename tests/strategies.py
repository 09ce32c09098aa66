"""State trees of every kind that docs/format.md lists, and what it means that two of them are the same.

``fingerprint`` is the judge: types, order and bits, with nothing in it that the engine computes. ``sharing`` says which
tensors lie in one storage and how they overlap.
"""

from __future__ import annotations

import collections
import enum
import struct
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from hypothesis import strategies as st

from ciuic_async.capture.tensors import empty
from ciuic_async.format.dtypes import ITEM_SIZE_BYTES


class Color(enum.Enum):
    RED = 1
    GREEN = "g"


class Level(enum.IntEnum):
    LOW = 1
    HIGH = 2


class Word(str, enum.Enum):  # noqa: UP042 - the older way to write it must work too
    A = "a"


class Access(enum.Flag):
    READ = 1
    WRITE = 2


class Point(NamedTuple):
    x: Any
    y: Any


DTYPES = {name: getattr(torch, name) for name in ITEM_SIZE_BYTES if hasattr(torch, name)}
FLOATING = [name for name, dtype in DTYPES.items() if dtype.is_floating_point or dtype.is_complex]
with warnings.catch_warnings():  # torch says once in a process that complex32 is experimental; here is where
    warnings.simplefilter("ignore")
    torch.empty(1, dtype=torch.complex32)
NUMPY_DTYPES = ["?", "i1", "<i4", ">i4", "<u8", "<f2", "<f4", ">f8", "<c8", "<c16", "S3", "<U2", "<M8[ns]", "<m8[s]"]


# --- plain values -----------------------------------------------------------------------------------------------------


def doubles() -> st.SearchStrategy[float]:
    """Every bit pattern of a double: subnormals, -0.0, and nan with all payloads."""
    patterns = st.one_of(
        st.integers(0, 2**64 - 1),
        st.sampled_from([0x8000000000000000, 0x7FF0000000000000, 0x7FF8000000000001, 0xFFF8DEADBEEF0000]),
    )
    return patterns.map(lambda n: struct.unpack("<d", struct.pack("<Q", n))[0])


def texts() -> st.SearchStrategy[str]:
    """Text with every code point, lone surrogates included."""
    return st.text(st.characters(), max_size=8)


def numpy_scalars() -> st.SearchStrategy[np.generic]:
    return st.builds(
        lambda name, seed: numpy_array(name, (1,), seed)[0], st.sampled_from(NUMPY_DTYPES), st.integers(0, 2**32)
    )


def scalars() -> st.SearchStrategy[Any]:
    """Hashable values that hold no others."""
    return st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.integers(min_value=2**53 - 2, max_value=2**53 + 2),
        st.integers(min_value=-(10**60), max_value=10**60),
        doubles(),
        st.builds(complex, doubles(), doubles()),
        texts(),
        st.binary(max_size=8),
        st.builds(range, st.integers(-9, 9), st.integers(-9, 9), st.integers(1, 3)),
        st.sampled_from([*Color, *Level, *Word, Access.READ, Access.READ | Access.WRITE, Access(0)]),
        st.sampled_from([torch.float32, torch.bfloat16, torch.strided, torch.channels_last, torch.device("cuda", 3)]),
        st.lists(st.integers(0, 9), max_size=3).map(torch.Size),
        st.sampled_from(NUMPY_DTYPES).map(np.dtype),
        numpy_scalars(),
    )


def keys() -> st.SearchStrategy[Any]:
    """What a dict's keys and a set's members can be."""
    return st.recursive(scalars(), lambda inner: st.lists(inner, max_size=2).map(tuple), max_leaves=3)


def numpy_array(dtype: str, shape: tuple[int, ...], seed: int, order: str = "C") -> np.ndarray[Any, Any]:
    """Random bits as an array."""
    kind = np.dtype(dtype)
    count = int(np.prod(shape))
    data = np.random.default_rng(seed).bytes(count * kind.itemsize)
    if kind == np.bool_:
        data = bytes(byte & 1 for byte in data)
    if kind.kind == "U":  # code points must exist
        data = "".join(chr(byte) for byte in data[: count * 2]).encode("utf-32-le")
    array = np.frombuffer(data, kind).reshape(shape)
    return np.asfortranarray(array.copy()) if order == "F" else array.copy()


def arrays() -> st.SearchStrategy[np.ndarray[Any, Any]]:
    """Arrays in both memory orders, reversed and strided."""
    whole = st.builds(
        numpy_array,
        st.sampled_from(NUMPY_DTYPES),
        st.lists(st.integers(0, 3), max_size=3).map(tuple),
        st.integers(0, 2**32),
        st.sampled_from("CF"),
    )
    return st.one_of(whole, whole.map(lambda array: array[::-1] if array.ndim else array))


# --- tensors ----------------------------------------------------------------------------------------------------------


def storage(size_bytes: int, seed: int) -> torch.Tensor:
    """Random bytes as a tensor."""
    data = bytearray(np.random.default_rng(seed).bytes(size_bytes) or b"")
    return torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)


def typed(flat: torch.Tensor, dtype: str) -> torch.Tensor:
    """A uint8 tensor seen as another dtype."""
    if dtype == "bool":
        flat &= 1
    return flat.view(DTYPES[dtype])


@st.composite
def lone_tensors(draw: st.DrawFn) -> State:
    """A tensor that is alone on its storage, in any memory layout."""
    dtype = draw(st.sampled_from(sorted(DTYPES)))
    shape = tuple(draw(st.lists(st.integers(0, 4), max_size=4)))
    layout = draw(
        st.sampled_from(["plain", "transposed", "expanded", "strided", "channels_last", "offset", "unfolded"])
    )
    count = int(np.prod(shape))
    flat = typed(storage((2 * count + 3) * ITEM_SIZE_BYTES[dtype], draw(st.integers(0, 2**32))), dtype)
    tensor = flat[:count].view(shape)
    if layout == "transposed" and tensor.dim() >= 2:
        tensor = tensor.transpose(0, -1)
    elif layout == "expanded":
        tensor = tensor.unsqueeze(0).expand(3, *shape)
    elif layout == "strided":
        tensor = flat[: 2 * count : 2].view(shape) if len(shape) < 2 else flat[: 2 * count].view(*shape, 2)[..., 0]
    elif layout == "channels_last" and tensor.dim() == 4:
        n, c, h, w = shape
        tensor = flat[:count].view(n, h, w, c).permute(0, 3, 1, 2)
    elif layout == "offset":
        tensor = flat[3 : 3 + count].view(shape)
    elif layout == "unfolded":
        tensor = flat.as_strided((count + 1, 2), (1, 1), 1)
    return State(_as_leaf(draw, tensor, dtype))


@st.composite
def families(draw: st.DrawFn) -> State:
    """Tensors that look into one storage: overlapping, disjoint, of different dtypes, and the same twice."""
    size = draw(st.integers(64, 400))
    base = storage(size, draw(st.integers(0, 2**32)))
    base &= 1  # so that any of them may be a bool
    members = []
    for _ in range(draw(st.integers(2, 4))):
        dtype = draw(st.sampled_from(sorted(DTYPES)))
        item = ITEM_SIZE_BYTES[dtype]
        low = draw(st.integers(0, (size - item) // item)) * item
        high = low + draw(st.integers(1, (size - low) // item)) * item
        view = empty((0,), DTYPES[dtype], "cpu")
        view.set_(base.untyped_storage(), low // item, ((high - low) // item,), (1,))
        members.append(_as_leaf(draw, view[:: draw(st.integers(1, 2))], dtype))
    return State(members)


def _as_leaf(draw: st.DrawFn, tensor: torch.Tensor, dtype: str) -> torch.Tensor:
    if dtype in ("float16", "bfloat16", "float32", "float64", "complex64"):
        kind = draw(st.sampled_from(["plain", "grad", "parameter", "frozen"]))
        if kind == "grad":
            return tensor.requires_grad_()
        if kind != "plain":
            return torch.nn.Parameter(tensor, requires_grad=kind == "parameter")
    return tensor


# --- trees ------------------------------------------------------------------------------------------------------------


class State:
    """A drawn value. It prints as its fingerprint: torch cannot print tensors of every dtype."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __repr__(self) -> str:
        return f"State({fingerprint(self.value)})"


@st.composite
def trees(draw: st.DrawFn) -> State:
    """A state tree. Leaves are drawn from a pool of tensors, so that some come twice and in different places."""
    pool = [lone.value for lone in draw(st.lists(lone_tensors(), max_size=3))]
    for family in draw(st.lists(families(), max_size=2)):
        pool += family.value
    leaves = [scalars(), arrays(), st.binary(max_size=9).map(bytearray)]
    if pool:
        leaves.append(st.integers(0, len(pool) - 1).map(lambda number: pool[number]))
    return State(draw(st.recursive(st.one_of(leaves), _containers, max_leaves=12)))


def _containers(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    items = st.lists(inner, max_size=4)
    dicts = st.dictionaries(keys(), inner, max_size=4)
    return st.one_of(
        items,
        items.map(tuple),
        dicts,
        dicts.map(collections.OrderedDict),
        dicts.map(_with_metadata),
        dicts.map(lambda items: collections.defaultdict(list, items)),
        dicts.map(lambda items: collections.defaultdict(None, items)),
        items.map(collections.deque),
        items.map(lambda items: collections.deque(items, maxlen=5)),
        st.sets(keys(), max_size=4),
        st.frozensets(keys(), max_size=4),
        st.builds(Point, inner, inner),
        st.builds(slice, scalars(), scalars(), scalars()),
    )


def _with_metadata(items: dict[Any, Any]) -> collections.OrderedDict[Any, Any]:
    result = collections.OrderedDict(items)
    result._metadata = collections.OrderedDict({"": {"version": 1}})  # type: ignore[attr-defined]
    return result


# --- the judge --------------------------------------------------------------------------------------------------------


def bits(tensor: torch.Tensor) -> bytes:
    """The elements of a tensor in row-major order, byte for byte, read around torch's operators."""
    plain = tensor.detach().resolve_conj().resolve_neg().cpu()
    memory = torch.empty(0, dtype=torch.uint8).set_(plain.untyped_storage()).numpy()
    item = plain.element_size()
    if not plain.numel():
        return b""
    return np.ndarray(
        (*plain.shape, item),
        np.uint8,
        memory.data,
        plain.storage_offset() * item,
        (*(stride * item for stride in plain.stride()), 1),
    ).tobytes()


def fingerprint(value: Any) -> Any:
    """Nested tuples that are equal for two values exactly if type, order and bits are."""
    kind = type(value)
    name = f"{kind.__module__}.{kind.__qualname__}"
    if isinstance(value, torch.Tensor):
        return (name, str(value.dtype), tuple(value.shape), value.requires_grad, bits(value))
    if isinstance(value, np.ndarray):
        fortran = value.flags.f_contiguous and not value.flags.c_contiguous
        return (name, value.dtype.str, value.shape, fortran, value.tobytes())
    if isinstance(value, np.generic):
        return (name, value.dtype.str, value.tobytes())
    if kind is float:
        return (name, struct.pack(">d", value))
    if kind is complex:
        return (name, struct.pack(">d", value.real), struct.pack(">d", value.imag))
    if isinstance(value, dict):
        extra = fingerprint(getattr(value, "_metadata", None))
        factory = getattr(value, "default_factory", None)
        return (name, factory, extra, [(fingerprint(key), fingerprint(item)) for key, item in value.items()])
    if kind in (set, frozenset):
        return (name, sorted((fingerprint(item) for item in value), key=repr))
    if kind is collections.deque:
        return (name, value.maxlen, [fingerprint(item) for item in value])
    if kind is slice:
        return (name, [fingerprint(part) for part in (value.start, value.stop, value.step)])
    if isinstance(value, tuple | list):
        return (name, [fingerprint(item) for item in value])
    if kind is int:
        return (name, hex(value))  # Python prints no decimal above 4300 digits
    return (name, repr(value))


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """All tensors of a tree, in order."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, tuple | list | collections.deque):
        for item in value:
            yield from tensors_in(item)


def sharing(value: Any) -> list[Any]:
    """For every pair of tensors: whether they share a storage, and how far apart they begin where they overlap."""
    found = list(tensors_in(value))
    pairs: list[Any] = []
    for number, one in enumerate(found):
        for other in found[:number]:
            if not one.numel() or not other.numel() or one.device != other.device:
                pairs.append(None)
            elif one.untyped_storage().data_ptr() != other.untyped_storage().data_ptr():
                pairs.append("apart")
            else:
                overlap = one.data_ptr() < _end(other) and other.data_ptr() < _end(one)
                pairs.append(("together", one.data_ptr() - other.data_ptr() if overlap else None))
    return pairs


def _end(tensor: torch.Tensor) -> int:
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr() + (last + 1) * tensor.element_size()
