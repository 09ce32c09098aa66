"""Tensors of files: by which names their types go, built from bytes within bounds, and back to plain arrays."""

from __future__ import annotations

import collections
from typing import Any

import numpy as np
import torch

from ciuic_async.capture.tensors import DTYPES, empty
from ciuic_async.format.manifest import MAX_DIMENSIONS
from ciuic_async.interchange import limits

STORAGE_NAMES: dict[torch.dtype, str] = {
    torch.float64: "DoubleStorage",
    torch.float32: "FloatStorage",
    torch.float16: "HalfStorage",
    torch.bfloat16: "BFloat16Storage",
    torch.int64: "LongStorage",
    torch.int32: "IntStorage",
    torch.int16: "ShortStorage",
    torch.int8: "CharStorage",
    torch.uint8: "ByteStorage",
    torch.bool: "BoolStorage",
    torch.complex64: "ComplexFloatStorage",
    torch.complex128: "ComplexDoubleStorage",
}
"""What ``.pt`` files call storages of the older types; tensors of newer ones name their dtype themselves."""
STORAGE_DTYPES: dict[str, torch.dtype | None] = {
    **{f"torch.{name}": dtype for dtype, name in STORAGE_NAMES.items()},
    **{f"torch.cuda.{name}": dtype for dtype, name in STORAGE_NAMES.items()},
    "torch.storage.UntypedStorage": None,
}
_KNOWN_DTYPES = frozenset(DTYPES.values())


def rebuilt(
    storage: torch.UntypedStorage,
    dtype: Any,
    offset: Any,
    size: Any,
    stride: Any,
    where: str,
    allowance: limits.Allowance,
) -> torch.Tensor:
    """A view of a storage, checked: ``offset``, ``size`` and ``stride`` are in elements and hostile.

    Raises:
        IntegrityError: kind ``file_malformed``: not inside the storage; ``file_bomb``: its strides repeat too much.
    """
    numbers = (offset, *size, *stride)
    if dtype not in _KNOWN_DTYPES or not all(type(number) is int and 0 <= number < 2**62 for number in numbers):
        raise limits.malformed(where, "a tensor of a shape or type that is none")
    if len(size) != len(stride) or len(size) > MAX_DIMENSIONS:
        raise limits.malformed(where, f"a tensor of {len(size)} dimensions and {len(stride)} strides")
    item_bytes = dtype.itemsize
    count = 1
    for length in size:
        count *= length
    extent = offset + 1 + sum((length - 1) * step for length, step in zip(size, stride, strict=True)) if count else 0
    if extent * item_bytes > storage.nbytes():
        raise limits.malformed(
            where, f"a tensor needs {extent * item_bytes} bytes of a storage of {storage.nbytes()} bytes"
        )
    if count * item_bytes > storage.nbytes():
        allowance.take(count * item_bytes, "a tensor whose strides repeat elements")
    view = empty((0,), dtype, storage.device)
    if not count:
        return view.new_empty(tuple(size))
    with torch.no_grad():
        return view.set_(storage, offset, tuple(size), tuple(stride))


def elements(tensor: torch.Tensor) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """The elements in row-major order as bytes: the tensor's shape and one more dimension, of an element's bytes.

    Read around torch's operators, which some dtypes lack. A view where the tensor is contiguous on the CPU.
    """
    plain = tensor.detach()
    if plain.is_conj() or plain.is_neg():
        plain = plain.resolve_conj().resolve_neg()
    plain = plain.cpu()
    item_bytes = plain.element_size()
    if not plain.numel():
        return np.empty((*plain.shape, item_bytes), np.uint8)
    memory = torch.empty(0, dtype=torch.uint8).set_(plain.untyped_storage()).numpy()
    strides = (*(step * item_bytes for step in plain.stride()), 1)
    offset_bytes = int(plain.storage_offset()) * item_bytes
    seen: np.ndarray[Any, np.dtype[np.uint8]] = np.ndarray(
        (*plain.shape, item_bytes), np.uint8, memory.data, offset_bytes, strides
    )
    return np.ascontiguousarray(seen)


def measure(value: Any, where: str) -> None:
    """Refuse a state that shared parts make larger than memory, that contains itself, or that is nested too deep.

    Every container is looked at once, however often it is used.

    Raises:
        IntegrityError: kind ``file_bomb`` or ``file_malformed``.
    """
    weights: dict[int, int] = {}
    depths: dict[int, int] = {}
    open_: set[int] = set()
    pending: list[tuple[Any, bool]] = [(value, False)]
    while pending:
        current, done = pending.pop()
        number = id(current)
        if number in weights and not done:
            continue
        inside = _inside(current)
        if not done:
            if not inside:
                weights[number], depths[number] = _weight(current), 0
                continue
            if number in open_:
                raise limits.malformed(where, "its state contains itself")
            open_.add(number)
            pending.append((current, True))
            for item in inside:
                if id(item) in open_:
                    raise limits.malformed(where, "its state contains itself")
                if id(item) not in weights:
                    pending.append((item, False))
            continue
        open_.discard(number)
        weights[number] = 1 + sum(weights[id(item)] for item in inside)
        depths[number] = 1 + max(depths[id(item)] for item in inside)
        if weights[number] > limits.MAX_VALUES:
            raise limits.malformed(where, f"its state has more than {limits.MAX_VALUES} values where all are counted")
        if depths[number] > limits.MAX_DEPTH:
            raise limits.malformed(where, f"its state is nested deeper than {limits.MAX_DEPTH}")


def _inside(value: Any) -> list[Any]:
    if isinstance(value, dict):
        extra = getattr(value, "_metadata", None)
        return [*value.keys(), *value.values(), *([] if extra is None else [extra])]
    if type(value) in (list, tuple, set, frozenset, collections.deque):
        return list(value)
    if type(value) is slice:
        return [value.start, value.stop, value.step]
    return []


def _weight(value: Any) -> int:
    """In values: long texts, and arrays that are used again and again, count by their length."""
    if isinstance(value, str | bytes | bytearray):
        return 1 + len(value) // 256
    return 1 + (value.nbytes // 4096 if isinstance(value, np.ndarray) else 0)
