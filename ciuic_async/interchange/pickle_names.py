"""What the names in a pickle mean: a table of how the *value* of each is made, and nothing else.

Nothing here is found by a name that a file gives but by looking into ``KNOWN``. Arguments are hostile.
"""

from __future__ import annotations

import collections
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch

from ciuic_async.capture.values import FACTORIES
from ciuic_async.errors import IntegrityError
from ciuic_async.interchange import limits
from ciuic_async.interchange.tensors import rebuilt


class Name:
    """A global of the pickle: only ever looked up in the table of known names."""

    __slots__ = ("text",)

    def __init__(self, module: str, name: str) -> None:
        self.text = f"{module}.{name}"


class StoredBytes:
    """A storage that the pickle refers to. ``dtype`` None: bytes without a type."""

    __slots__ = ("dtype", "storage")

    def __init__(self, storage: torch.UntypedStorage, dtype: torch.dtype | None) -> None:
        self.storage = storage
        self.dtype = dtype


class Unfinished:
    """A numpy dtype or array between the opcode that begins it and the one that fills it."""

    __slots__ = ("kind", "value")

    def __init__(self, kind: str, value: Any = None) -> None:
        self.kind = kind
        self.value = value


_ITEM_BYTES = 64
"""What an item of a container may cost in Python."""


class Arguments(tuple[Any, ...]):
    """A tuple that holds names or storages: good for a call, and no value."""


class Calling(Protocol):
    """What a call needs of the reader."""

    where: str
    allowance: limits.Allowance

    def malformed(self, message: str) -> IntegrityError: ...

    def refused_name(self, name: str) -> IntegrityError: ...

    def finished(self, value: Any) -> Any: ...

    def key(self, key: Any, depth: int = 0) -> Any: ...

    def copies(self, size_bytes: int) -> None: ...


def is_size(value: Any) -> bool:
    """Whether a value of a pickle can be a length."""
    return type(value) is int and 0 <= value < 2**62


def torch_dtype(name: str) -> torch.dtype | None:
    """The element type of a name; None if it is none."""
    found = vars(torch).get(name.removeprefix("torch.")) if name.startswith("torch.") else None
    return found if isinstance(found, torch.dtype) else None


def _tensor(reader: Calling, arguments: tuple[Any, ...], dtype: torch.dtype | None = None) -> torch.Tensor:
    """A tensor from (storage, offset, size, stride, requires_grad, hooks[, metadata])."""
    stored, offset, size, stride = arguments[:4]
    rest: list[Any] = [*arguments[4:7], None, None, None]
    requires_grad, hooks, metadata = rest[:3]
    if not isinstance(stored, StoredBytes) or (dtype or stored.dtype) is None:
        raise reader.malformed("a tensor without a storage of a type")
    if hooks:
        raise limits.refused(reader.where, "a tensor has hooks, which are code; nothing was run")
    if metadata and not (type(metadata) is dict and set(metadata) <= {"conj", "neg"}):
        raise reader.malformed("a tensor has metadata that is not known")
    made = rebuilt(stored.storage, dtype or stored.dtype, offset, size, stride, reader.where, reader.allowance)
    for name, mirrored in (("conj", torch.conj), ("neg", torch._neg_view)):
        if (metadata or {}).get(name):
            made = mirrored(made)
    return made.requires_grad_() if requires_grad is True and made.dtype.is_floating_point else made


def _tensor_v2(reader: Calling, arguments: tuple[Any, ...]) -> Any:
    return _tensor(reader, arguments)


def _tensor_v3(reader: Calling, arguments: tuple[Any, ...]) -> Any:
    dtype = arguments[6]
    if not isinstance(dtype, torch.dtype):
        raise reader.malformed("a tensor whose dtype is none")
    return _tensor(reader, (*arguments[:6], *arguments[7:8]), dtype)


def _parameter(reader: Calling, arguments: tuple[Any, ...]) -> Any:
    data, requires_grad, hooks = arguments
    if not isinstance(data, torch.Tensor) or hooks:
        raise limits.refused(reader.where, "a parameter that is no tensor, or has hooks; nothing was run")
    return torch.nn.Parameter(data.detach(), requires_grad=bool(requires_grad))


def _items(reader: Calling, value: Any) -> list[Any]:
    """The items of a list, tuple or set that is an argument."""
    if type(value) not in (list, tuple, set, frozenset):
        raise reader.malformed(f"a {type(value).__name__} where items are expected")
    reader.copies(_ITEM_BYTES * len(value))
    return list(value)  # what containers hold is finished


def _ordered_dict(reader: Calling, arguments: tuple[Any, ...]) -> Any:
    pairs = _items(reader, arguments[0]) if arguments else []
    return collections.OrderedDict((reader.key(key), reader.finished(value)) for key, value in pairs)


def _default_dict(reader: Calling, arguments: tuple[Any, ...]) -> Any:
    factory = arguments[0] if arguments else None
    if factory is None:
        return collections.defaultdict(None)
    name = factory.text.rpartition(".")[2] if isinstance(factory, Name) else ""
    if name not in FACTORIES or factory.text.rpartition(".")[0] not in ("builtins", "__builtin__"):
        raise reader.refused_name(factory.text if isinstance(factory, Name) else "a factory")
    return collections.defaultdict(FACTORIES[name])


def _deque(reader: Calling, arguments: tuple[Any, ...]) -> Any:
    limit = arguments[1] if len(arguments) > 1 else None
    if limit is not None and not is_size(limit):
        raise reader.malformed("a deque of a length that is none")
    return collections.deque(_items(reader, arguments[0]) if arguments else (), limit)


def _encode(reader: Calling, arguments: tuple[Any, ...]) -> Any:
    text, encoding = arguments
    if encoding not in ("latin1", "latin-1"):
        raise reader.malformed("bytes in another encoding than latin1")
    reader.copies(len(text))
    return text.encode("latin1")


def _bytearray(reader: Calling, arguments: tuple[Any, ...]) -> Any:
    if not arguments:
        return bytearray()
    if type(arguments[0]) is bytes:
        reader.copies(len(arguments[0]))
        return bytearray(arguments[0])
    return bytearray(_encode(reader, arguments))


def _integers(reader: Calling, arguments: tuple[Any, ...], count: int) -> tuple[int, ...]:
    if len(arguments) > count or not all(type(item) is int for item in arguments):
        raise reader.malformed("integers are expected")
    return arguments


def _size(reader: Calling, arguments: tuple[Any, ...]) -> Any:
    return torch.Size(_integers(reader, tuple(_items(reader, arguments[0])), 64)) if arguments else torch.Size()


def _device(reader: Calling, arguments: tuple[Any, ...]) -> Any:
    if not 1 <= len(arguments) <= 2 or type(arguments[0]) is not str or not all(map(is_size, arguments[1:])):
        raise reader.malformed("a device that is none")
    try:
        return torch.device(*arguments)
    except RuntimeError as error:
        raise reader.malformed(f"a device that is none: {error!s:.200}") from error


def _layout(reader: Calling, arguments: tuple[Any, ...]) -> Any:
    found = vars(torch).get(str(arguments[0]).removeprefix("torch."))
    if not isinstance(found, torch.layout):
        raise reader.malformed("a layout that is none")
    return found


# --- numpy ------------------------------------------------------------------------------------------------------------


def _numpy_dtype(reader: Calling, arguments: tuple[Any, ...]) -> Any:
    text = arguments[0]
    if type(text) is not str or len(text) > 12 or text[:1] not in tuple("biufcmMSUV"):
        raise limits.refused(reader.where, f"a numpy dtype {str(text)[:40]!r} that is not of plain numbers or texts")
    return Unfinished("dtype", np.dtype(text))


def _array(reader: Calling, arguments: tuple[Any, ...]) -> Any:
    if not isinstance(arguments[0], Name) or arguments[0].text != "numpy.ndarray":
        raise reader.refused_name(arguments[0].text if isinstance(arguments[0], Name) else "a numpy subclass")
    return Unfinished("array")


def _scalar(reader: Calling, arguments: tuple[Any, ...]) -> Any:
    dtype, data = _plain_dtype(reader, arguments[0]), arguments[1]
    if type(data) is not bytes or len(data) != dtype.itemsize or not dtype.itemsize:
        raise reader.malformed("a numpy number of another length than its dtype")
    reader.copies(len(data))
    return np.frombuffer(data, dtype)[0]


def _plain_dtype(reader: Calling, value: Any) -> np.dtype[Any]:
    if not isinstance(value, np.dtype) or value.hasobject:
        raise reader.malformed("a numpy dtype that is none")
    return value


def fill(reader: Calling, target: Unfinished, state: tuple[Any, ...]) -> None:
    """Give an unfinished dtype or array its content."""
    if target.kind == "dtype":
        order, fields = state[1], state[2:5]
        if order not in ("<", ">", "|", "=") or any(item is not None for item in fields):
            raise limits.refused(reader.where, "a structured numpy dtype; expected plain numbers or texts")
        size = state[5] if len(state) > 5 else -1
        kind = target.value.kind
        if kind in "SUV" and is_size(size) and size <= limits.STRUCTURE_BYTES:
            target.value = np.dtype(f"{kind}{size // 4 if kind == 'U' else size}")
        if kind in "mM" and len(state) > 8 and state[8] is not None:
            unit = state[8][1][0]
            unit = unit.decode() if type(unit) is bytes else unit
            target.value = np.dtype(f"{kind}8[{unit}]") if state[8][1][1] == 1 else None
        target.value = target.value.newbyteorder(order if order != "|" else "=")
        return
    if target.value is not None:
        raise reader.malformed("a numpy array is filled twice")
    _, shape, dtype, fortran, data = state
    target.value = _filled(reader, data, dtype, shape, fortran is True)


def _from_buffer(reader: Calling, arguments: tuple[Any, ...]) -> Any:
    data, dtype, shape, order = arguments
    return _filled(reader, data, dtype, shape, order == "F")


def _filled(reader: Calling, data: Any, dtype: Any, shape: Any, fortran: bool) -> np.ndarray[Any, Any]:
    if type(data) not in (bytes, bytearray) or type(shape) is not tuple or not all(map(is_size, shape)):
        raise reader.malformed("a numpy array without bytes or shape")
    reader.copies(len(data))
    kind = _plain_dtype(reader, dtype)
    made: np.ndarray[Any, Any] = np.frombuffer(bytearray(data), kind) if data else np.empty(0, kind)
    return made.reshape(shape, order="F" if fortran else "C")


_Maker = Callable[[Calling, tuple[Any, ...]], Any]
KNOWN: dict[str, _Maker] = {
    "torch._utils._rebuild_tensor": _tensor_v2,
    "torch._utils._rebuild_tensor_v2": _tensor_v2,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
    "torch._utils._rebuild_parameter": _parameter,
    "torch.Size": _size,
    "torch.device": _device,
    "torch.serialization._get_layout": _layout,
    "collections.OrderedDict": _ordered_dict,
    "collections.defaultdict": _default_dict,
    "collections.deque": _deque,
    "_codecs.encode": _encode,
    "numpy.dtype": _numpy_dtype,
    **{
        f"numpy.{core}.multiarray.{name}": maker
        for core in ("core", "_core")
        for name, maker in (("_reconstruct", _array), ("scalar", _scalar))
    },
    "numpy.core.numeric._frombuffer": _from_buffer,
    "numpy._core.numeric._frombuffer": _from_buffer,
    **{
        f"{module}.{name}": maker
        for module in ("builtins", "__builtin__")
        for name, maker in {
            "set": lambda reader, arguments: set(map(reader.key, _items(reader, arguments[0] if arguments else ()))),
            "frozenset": lambda reader, arguments: frozenset(
                map(reader.key, _items(reader, arguments[0] if arguments else ()))
            ),
            "list": lambda reader, arguments: _items(reader, arguments[0] if arguments else ()),
            "tuple": lambda reader, arguments: tuple(_items(reader, arguments[0] if arguments else ())),
            "bytearray": _bytearray,
            "complex": lambda reader, arguments: complex(float(arguments[0]), float(arguments[1])),
            "slice": lambda reader, arguments: slice(*map(reader.finished, arguments[:3])),
            "range": lambda reader, arguments: range(*_integers(reader, arguments, 3)),
            "xrange": lambda reader, arguments: range(*_integers(reader, arguments, 3)),
        }.items()
    },
}
"""How the value of each known name is made. ``float`` is no name of a pickle here: it only sees numbers."""
