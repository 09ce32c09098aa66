"""The pickle inside a ``.pt`` file, written: protocol 2, of names that ``torch.load(weights_only=True)`` allows.

A value that loading would refuse is turned into the nearest that it does not, and counted.
"""

from __future__ import annotations

import collections
import enum
import struct
from collections.abc import Collection
from typing import Any

import numpy as np
import torch

from ciuic_async.errors import UsageError
from ciuic_async.interchange.limits import MAX_DEPTH
from ciuic_async.interchange.tensors import STORAGE_NAMES

_SMALL_INT = range(-(2**31), 2**31)


class PickleWriter:
    """One pickle. ``encode`` once.

    Attributes:
        storages: what tensors lie in and how many bytes of it, by the number that the pickle gives them.
        converted: what was turned into something like it, and how often: ``"numpy.ndarray as torch.Tensor"``.
    """

    def __init__(self) -> None:
        self.storages: list[tuple[torch.UntypedStorage, int]] = []
        self.converted: collections.Counter[str] = collections.Counter()
        self._numbers: dict[tuple[torch.device, int, torch.dtype], int] = {}
        self._out = bytearray(b"\x80\x02")

    def encode(self, value: Any) -> bytes:
        """The pickle of a state tree.

        Raises:
            UsageError: kind ``unsupported_type``: a value that no such file can hold.
        """
        self._value(value, 0)
        self._out += b"."
        return bytes(self._out)

    def _value(self, value: Any, depth: int) -> None:
        if depth > MAX_DEPTH:
            raise UsageError(f"nested deeper than {MAX_DEPTH}", kind="too_deep")
        kind = type(value)
        if isinstance(value, torch.Tensor):
            self._tensor(value)
        elif value is None or kind is bool:
            self._out += {None: b"N", True: b"\x88", False: b"\x89"}[value]
        elif kind is int:
            self._integer(value)
        elif kind is float:
            self._out += b"G" + struct.pack(">d", value)
        elif kind is str:
            self._text(value)
        elif kind in _MAKERS:
            _MAKERS[kind](self, value, depth)
        elif isinstance(value, torch.dtype):
            self._name("torch", str(value).removeprefix("torch."))
        elif isinstance(value, torch.layout):
            self._call("torch.serialization", "_get_layout", (str(value),), depth)
        else:
            self._value(self._converted(value), depth + 1)

    def _converted(self, value: Any) -> Any:
        """The nearest value that can be loaded without trust."""
        for kinds, target, convert in _CONVERSIONS:
            if isinstance(value, kinds):
                name = type(value).__name__ if isinstance(value, enum.Enum | tuple) else kinds[0].__name__
                self.converted[f"{name} as {target}"] += 1
                return convert(value)
        raise UsageError(
            f"a {type(value).__name__} cannot be put into a .pt file; export to .h5, or with only=",
            kind="unsupported_type",
        )

    # --- parts --------------------------------------------------------------------------------------------------------

    def _integer(self, value: int) -> None:
        if value in _SMALL_INT:
            self._out += b"J" + value.to_bytes(4, "little", signed=True)
            return
        data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
        if len(data) > 255:
            self.converted["int as str"] += 1
            self._text(hex(value))
            return
        self._out += b"\x8a" + bytes([len(data)]) + data

    def _text(self, value: str) -> None:
        data = value.encode("utf-8", "surrogatepass")
        self._out += b"X" + len(data).to_bytes(4, "little") + data

    def _name(self, module: str, name: str) -> None:
        self._out += f"c{module}\n{name}\n".encode()

    def _call(self, module: str, name: str, arguments: tuple[Any, ...], depth: int) -> None:
        self._name(module, name)
        self._out += b"("
        for argument in arguments:
            self._value(argument, depth + 1)
        self._out += b"tR"

    def _tensor(self, tensor: torch.Tensor) -> None:
        if type(tensor) is torch.nn.Parameter:
            self._name("torch._utils", "_rebuild_parameter")
            self._out += b"("
            self._plain_tensor(tensor.detach(), False)
            self._out += (b"\x88" if tensor.requires_grad else b"\x89") + _NO_HOOKS + b"tR"
        else:
            self._plain_tensor(tensor.detach(), tensor.requires_grad)

    def _plain_tensor(self, tensor: torch.Tensor, requires_grad: bool) -> None:
        if tensor.is_conj() or tensor.is_neg():
            tensor = tensor.resolve_conj().resolve_neg()
        old = STORAGE_NAMES.get(tensor.dtype)
        storage = tensor.untyped_storage()
        count = storage.nbytes() // (1 if old is None else tensor.element_size())
        number = self._number(storage, tensor.dtype)
        self._name("torch._utils", "_rebuild_tensor_v3" if old is None else "_rebuild_tensor_v2")
        self._out += b"(("
        self._text("storage")
        self._name(*(("torch.storage", "UntypedStorage") if old is None else ("torch", old)))
        self._text(str(number))
        self._text("cpu")
        self._integer(count)
        self._out += b"tQ"
        self._integer(int(tensor.storage_offset()))
        for numbers in (tensor.shape, tensor.stride()):
            self._out += b"("
            for one in numbers:
                self._integer(one)
            self._out += b"t"
        self._out += (b"\x88" if requires_grad else b"\x89") + _NO_HOOKS
        if old is None:
            self._name("torch", str(tensor.dtype).removeprefix("torch."))
        self._out += b"tR"

    def _number(self, storage: torch.UntypedStorage, dtype: torch.dtype) -> int:
        """Tensors that share a storage refer to one; torch gives each of those one dtype. Empty ones share nothing."""
        key = (storage.device, storage.data_ptr(), dtype)
        number = self._numbers.get(key) if storage.nbytes() else None
        if number is None:
            number = len(self.storages)
            item_bytes = dtype.itemsize if dtype in STORAGE_NAMES else 1
            self.storages.append((storage, storage.nbytes() // item_bytes * item_bytes))
            if storage.nbytes():
                self._numbers[key] = number
        return number

    def _list(self, value: list[Any], depth: int) -> None:
        self._out += b"]("
        for item in value:
            self._value(item, depth + 1)
        self._out += b"e"

    def _tuple(self, value: tuple[Any, ...], depth: int) -> None:
        self._out += b"("
        for item in value:
            self._value(item, depth + 1)
        self._out += b"t"

    def _dict(self, value: dict[Any, Any], depth: int) -> None:
        self._out += b"}"
        self._items(value, depth)

    def _ordered_dict(self, value: dict[Any, Any], depth: int) -> None:
        self._out += _NO_HOOKS  # an empty OrderedDict
        self._items(value, depth)
        metadata = getattr(value, "_metadata", None)
        if metadata is not None:
            self._out += b"}("
            self._text("_metadata")
            self._value(metadata, depth + 1)
            self._out += b"ub"

    def _items(self, value: dict[Any, Any], depth: int) -> None:
        self._out += b"("
        for key, item in zip(self._keys(value), value.values(), strict=True):
            self._value(key, depth + 1)
            self._value(item, depth + 1)
        self._out += b"u"

    def _set(self, value: set[Any], depth: int) -> None:
        self._call("builtins", "set", (self._keys(value),), depth)

    def _keys(self, keys: Collection[Any]) -> list[Any]:
        """Keys as they can be loaded; two that would become one are refused, else one of their values was lost."""
        found = [self._key(key) for key in keys]
        if len(set(found)) != len(found):
            raise UsageError(
                "two keys of a dict, or members of a set, would be one in a .pt file; export to .h5",
                kind="duplicate_name",
            )
        return found

    def _key(self, key: Any) -> Any:
        if type(key) is tuple:
            return tuple(map(self._key, key))
        plain = key is None or type(key) in _PLAIN_KEYS or isinstance(key, torch.dtype | torch.layout)
        return key if plain else self._key(self._converted(key))

    def _bytes(self, value: bytes, depth: int) -> None:
        self._call("_codecs", "encode", (value.decode("latin1"), "latin1"), depth)

    def _bytearray(self, value: bytearray, depth: int) -> None:
        self._call("builtins", "bytearray", (bytes(value),), depth)

    def _complex(self, value: complex, depth: int) -> None:
        self._call("builtins", "complex", (value.real, value.imag), depth)

    def _size(self, value: torch.Size, depth: int) -> None:
        self._call("torch", "Size", (tuple(value),), depth)

    def _device(self, value: torch.device, depth: int) -> None:
        index = () if value.index is None else (value.index,)
        self._call("torch", "device", (value.type, *index), depth)


_PLAIN_KEYS = (bool, int, float, complex, str, bytes, torch.Size, torch.device)
_NO_HOOKS = b"ccollections\nOrderedDict\n)R"
_MAKERS: dict[type, Any] = {
    list: PickleWriter._list,
    tuple: PickleWriter._tuple,
    dict: PickleWriter._dict,
    collections.OrderedDict: PickleWriter._ordered_dict,
    set: PickleWriter._set,
    bytes: PickleWriter._bytes,
    bytearray: PickleWriter._bytearray,
    complex: PickleWriter._complex,
    torch.Size: PickleWriter._size,
    torch.device: PickleWriter._device,
}


def _array(value: np.ndarray[Any, Any]) -> Any:
    """A tensor, or nested lists where torch has no such dtype."""
    native = value.astype(value.dtype.newbyteorder("="), copy=True)
    try:
        return torch.from_numpy(native)
    except TypeError:
        return [str(item) for item in native.reshape(-1)]


def _scalar(value: np.generic) -> Any:
    plain = value.item()
    return plain if isinstance(plain, bool | int | float | complex | str | bytes) else str(value)


_CONVERSIONS: tuple[tuple[tuple[type, ...], str, Any], ...] = (
    ((enum.Enum,), "its name", lambda value: value.name or str(value)),
    ((np.ndarray,), "torch.Tensor", _array),
    ((np.generic,), "a number or text", _scalar),
    ((np.dtype,), "str", lambda value: value.str),
    ((collections.defaultdict,), "dict", lambda value: dict(value)),
    ((collections.deque,), "list", list),
    ((frozenset,), "tuple", lambda value: tuple(value)),
    ((range,), "tuple", lambda value: (value.start, value.stop, value.step)),
    ((slice,), "tuple", lambda value: (value.start, value.stop, value.step)),
    ((torch.memory_format,), "str", str),
    ((tuple,), "tuple", tuple),  # named
)
