"""The pickle inside a ``.pt`` file, read as data.

No module is imported and nothing is called because a file says so: a name in the pickle either stands in the table
``KNOWN`` (``pickle_names.py``), which says how its *value* is made from plain arguments, or the file is refused by it.
What ``torch.load(weights_only=True)`` reads is read, and beside it numpy arrays and the containers of ``collections``.
Time and memory are bounded by the length of the pickle, as it cannot make a value that is larger than itself; what
may become larger (shared parts, strides) is counted before it is made.
"""

from __future__ import annotations

import collections
import struct
from collections.abc import Callable
from typing import Any, Protocol

import torch

from ciuic_async.errors import IntegrityError
from ciuic_async.interchange import limits
from ciuic_async.interchange.pickle_names import (
    KNOWN,
    Arguments,
    Name,
    StoredBytes,
    Unfinished,
    fill,
    is_size,
    torch_dtype,
)
from ciuic_async.interchange.tensors import STORAGE_DTYPES

_MAX_KEY_DEPTH = 8
_MAX_ODD_KEYS = 10_000
"""Long integers and tuples can be made to collide, and a dict of those takes forever."""
_MAX_KEY_ITEMS = 64
_ODD_KEYS = frozenset({tuple, complex, torch.Size})
_KEYS = _ODD_KEYS | {str, int, float, bool, type(None), bytes, torch.dtype, torch.device, torch.layout}
_MAX_INT_BYTES = 1024


class Storages(Protocol):
    """Where the bytes of tensors are."""

    def load(self, key: str, size_bytes: int) -> torch.UntypedStorage: ...


_MARK: Any = object()
_PROTOCOLS = range(2, 6)


class PickleReader:
    """One pickle. ``load`` once.

    Args:
        data: the pickle.
        storages: where tensors' bytes are.
        where: the file, for messages.
        allowance: what the file may take; tensors that are larger than their bytes count.
    """

    def __init__(self, data: bytes, storages: Storages, where: str, allowance: limits.Allowance) -> None:
        self._data = data
        self._storages = storages
        self.where = where
        self.allowance = allowance
        self._at = 0
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        self._odd_keys = 0
        self._loaded: dict[str, torch.UntypedStorage] = {}

    def load(self) -> Any:
        """The value of the pickle.

        Raises:
            IntegrityError: kind ``file_malformed``, ``file_refused`` (it asks for more than data), ``file_bomb``.
        """
        try:
            value = self._run()
        except IntegrityError:
            raise
        except (IndexError, KeyError, ValueError, TypeError, OverflowError, AttributeError, struct.error) as error:
            raise self.malformed(f"no pickle that can be read: {type(error).__name__}: {error!s:.200}") from error
        return self.finished(value)

    def _run(self) -> Any:
        operations = _OPERATIONS
        while True:
            code = self._take(1)[0]
            if code == 0x2E:  # STOP
                return self._pop()
            operation = operations.get(code)
            if operation is None:
                raise self.malformed(f"opcode 0x{code:02x} at byte {self._at - 1} is none that checkpoints have")
            operation(self)

    # --- bytes --------------------------------------------------------------------------------------------------------

    def _take(self, count: int) -> bytes:
        piece = self._data[self._at : self._at + count]
        if count < 0 or len(piece) != count:
            raise self.malformed(f"ends at byte {len(self._data)}, inside a value")
        self._at += count
        return piece

    def _number(self, size_bytes: int, signed: bool = False) -> int:
        return int.from_bytes(self._take(size_bytes), "little", signed=signed)

    def _line(self) -> str:
        end = self._data.find(b"\n", self._at, self._at + 1000)
        if end < 0:
            raise self.malformed("a name without end")
        return self._take(end + 1 - self._at)[:-1].decode("utf-8")

    def malformed(self, message: str) -> IntegrityError:
        return limits.malformed(self.where, message)

    # --- stack --------------------------------------------------------------------------------------------------------

    def _push(self, value: Any) -> None:
        self._stack.append(value)

    def _pop(self) -> Any:
        value = self._stack.pop()
        if value is _MARK:
            raise self.malformed("a mark where a value is expected")
        return value

    def _popped(self) -> Any:
        """What goes into a container: a value of its own, and nothing unfinished."""
        return self.finished(self._pop())

    def finished(self, value: Any) -> Any:
        value = self._known(value)
        while isinstance(value, Arguments):
            value = next(item for item in value if isinstance(item, Name | StoredBytes | Arguments))
        if isinstance(value, Name):
            raise self.refused_name(value.text)
        if isinstance(value, StoredBytes):
            raise limits.refused(self.where, "it holds a bare storage, expected tensors; save tensors instead")
        return value

    def _known(self, value: Any) -> Any:
        """A value that is ready for a tuple; names and storages stay, for a call."""
        if isinstance(value, Unfinished):
            if value.value is None:
                raise self.malformed("a numpy array without content")
            return value.value
        if isinstance(value, Name):
            return torch_dtype(value.text) or value
        return value

    def _push_tuple(self, items: list[Any]) -> None:
        items = list(map(self._known, items))
        kind = Arguments if any(isinstance(item, Name | StoredBytes | Arguments) for item in items) else tuple
        self._push(kind(items))

    def refused_name(self, name: str) -> IntegrityError:
        return limits.refused(
            self.where,
            f"it names {name[:200]!r}, which is no data and would have to be run. Nothing was run. If you trust where "
            "the file comes from, load it there and save its state_dicts and plain values only",
        )

    def _marked(self) -> list[Any]:
        """Everything above the newest mark, which goes too."""
        stack = self._stack
        for index in range(len(stack) - 1, -1, -1):
            if stack[index] is _MARK:
                items = [self.finished(item) for item in stack[index + 1 :]]
                del stack[index:]
                return items
        raise self.malformed("a mark is missing")

    def _raw_marked(self) -> list[Any]:
        """The same for arguments, which may be names and storages."""
        stack = self._stack
        for index in range(len(stack) - 1, -1, -1):
            if stack[index] is _MARK:
                items = stack[index + 1 :]
                del stack[index:]
                return items
        raise self.malformed("a mark is missing")

    def key(self, key: Any, depth: int = 0) -> Any:
        """A key that can be hashed in bounded time."""
        kind = type(key)
        if kind not in _KEYS:
            raise self.malformed(f"a {kind.__name__} is a key")
        if kind in _ODD_KEYS or (kind is int and not -(2**63) <= key < 2**64):
            self._odd_keys += 1
            if self._odd_keys > _MAX_ODD_KEYS:
                raise self.malformed(f"more than {_MAX_ODD_KEYS} keys that are tuples or long numbers")
        if kind is tuple:
            if depth >= _MAX_KEY_DEPTH or len(key) > _MAX_KEY_ITEMS:
                raise self.malformed("a tuple that is a key is too long, or nested too deep")
            for item in key:
                self.key(item, depth + 1)
        return key

    # --- operations ---------------------------------------------------------------------------------------------------

    def _protocol(self) -> None:
        if (protocol := self._take(1)[0]) not in _PROTOCOLS:
            raise self.malformed(f"pickle protocol {protocol}, expected 2 to 5")

    def _frame(self) -> None:
        self._take(8)  # how much to read at once: all is here

    def _pop_one(self) -> None:
        self._stack.pop()

    def _pop_mark(self) -> None:
        self._raw_marked()

    def _duplicate(self) -> None:
        self._push(self._stack[-1])

    def _long1(self) -> None:
        self._long(self._number(1))

    def _long4(self) -> None:
        self._long(self._number(4))

    def _long(self, size_bytes: int) -> None:
        if size_bytes > _MAX_INT_BYTES:
            raise self.malformed(f"an integer of {size_bytes} bytes, expected at most {_MAX_INT_BYTES}")
        self._push(self._number(size_bytes, signed=True))

    def _float(self) -> None:
        self._push(struct.unpack(">d", self._take(8))[0])

    def _text(self, width: int) -> None:
        self._push(self._take(self._number(width)).decode("utf-8", "surrogatepass"))

    def _old_text(self, width: int) -> None:
        """A string of Python 2. As torch reads it: UTF-8."""
        self._push(self._take(self._number(width)).decode("utf-8"))

    def _bytes(self, width: int) -> None:
        self._push(self._take(self._number(width)))

    def _bytearray(self) -> None:
        self._push(bytearray(self._take(self._number(8))))

    def _tuple(self, count: int) -> None:
        items = self._stack[len(self._stack) - count :]
        if len(items) != count or any(item is _MARK for item in items):
            raise self.malformed("a tuple of fewer values than it says")
        del self._stack[len(self._stack) - count :]
        self._push_tuple(items)

    def _list(self) -> None:
        self._push(self._marked())

    def _append(self) -> None:
        self._extend([self._popped()])

    def _appends(self) -> None:
        self._extend(self._marked())

    def _extend(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if type(target) not in (list, collections.deque):
            raise self.malformed(f"items for a {type(target).__name__}")
        target.extend(items)

    def _dict(self) -> None:
        items = self._marked()
        self._push({})
        self._set(items)

    def _set_item(self) -> None:
        value = self._popped()
        self._set([self._popped(), value])

    def _set_items(self) -> None:
        self._set(self._marked())

    def _set(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if not isinstance(target, dict) or len(items) % 2:
            raise self.malformed(f"pairs for a {type(target).__name__}, or half of one")
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[self.key(key)] = value

    def _add_items(self) -> None:
        items = self._marked()
        if type(self._stack[-1]) is not set:
            raise self.malformed("members for what is no set")
        self._stack[-1].update(map(self.key, items))

    def _frozenset(self) -> None:
        self._push(frozenset(map(self.key, self._marked())))

    def _put(self, number: int) -> None:
        if self._stack[-1] is _MARK:
            raise self.malformed("a mark is remembered")
        self._memo[number] = self._stack[-1]

    def _get(self, number: int) -> None:
        self._push(self._memo[number])

    def _global(self) -> None:
        self._push(Name(self._line(), self._line()))

    def _stack_global(self) -> None:
        name, module = self._pop(), self._pop()
        if type(name) is not str or type(module) is not str or len(name) + len(module) > 1000:
            raise self.malformed("a name that is no text")
        self._push(Name(module, name))

    def _persistent(self) -> None:
        found = self._pop()
        if not isinstance(found, tuple) or len(found) != 5 or found[0] != "storage":
            raise self.malformed("a reference that is not to a storage")
        _, kind, key, location, count = found
        if not isinstance(kind, Name) or type(key) is not str or type(location) is not str or not is_size(count):
            raise self.malformed("a reference to a storage that does not say which")
        if kind.text not in STORAGE_DTYPES:
            raise self.refused_name(kind.text)
        dtype = STORAGE_DTYPES[kind.text]
        size_bytes = count * (1 if dtype is None else dtype.itemsize)
        storage = self._loaded.get(key)
        if storage is None:
            storage = self._loaded[key] = self._storages.load(key, size_bytes)
        elif storage.nbytes() != size_bytes:
            raise self.malformed(f"storage {key[:40]!r} has {storage.nbytes()} bytes and {size_bytes} bytes")
        self._push(StoredBytes(storage, dtype))

    def _reduce(self) -> None:
        arguments, function = self._pop(), self._pop()
        if not isinstance(function, Name) or not isinstance(arguments, tuple):
            raise self.malformed("a call of what is no name")
        maker = KNOWN.get(function.text)
        if maker is None:
            raise self.refused_name(function.text)
        self._push(maker(self, arguments))

    def _build(self) -> None:
        state, target = self._pop(), self._stack[-1]
        if type(target) is collections.OrderedDict and type(state) is dict and set(state) <= {"_metadata"}:
            vars(target).update(state)
        elif isinstance(target, Unfinished) and isinstance(state, tuple):
            fill(self, target, state)
        else:
            raise limits.refused(
                self.where, f"it sets attributes of a {type(target).__name__}, which is no plain data; nothing was run"
            )

    def copies(self, size_bytes: int) -> None:
        """A call is about to copy as much; a pickle can ask for it again and again with a few bytes."""
        self.allowance.take(size_bytes, "its pickle")


_OPERATIONS: dict[int, Callable[[PickleReader], None]] = {
    0x80: PickleReader._protocol,
    0x95: PickleReader._frame,
    ord("0"): PickleReader._pop_one,
    ord("1"): PickleReader._pop_mark,
    ord("2"): PickleReader._duplicate,
    ord("("): lambda reader: reader._push(_MARK),
    ord("N"): lambda reader: reader._push(None),
    0x88: lambda reader: reader._push(True),
    0x89: lambda reader: reader._push(False),
    ord("J"): lambda reader: reader._push(reader._number(4, signed=True)),
    ord("K"): lambda reader: reader._push(reader._number(1)),
    ord("M"): lambda reader: reader._push(reader._number(2)),
    0x8A: PickleReader._long1,
    0x8B: PickleReader._long4,
    ord("G"): PickleReader._float,
    0x8C: lambda reader: reader._text(1),
    ord("X"): lambda reader: reader._text(4),
    0x8D: lambda reader: reader._text(8),
    ord("U"): lambda reader: reader._old_text(1),
    ord("T"): lambda reader: reader._old_text(4),
    ord("C"): lambda reader: reader._bytes(1),
    ord("B"): lambda reader: reader._bytes(4),
    0x8E: lambda reader: reader._bytes(8),
    0x96: PickleReader._bytearray,
    ord(")"): lambda reader: reader._push(()),
    ord("t"): lambda reader: reader._push_tuple(reader._raw_marked()),
    0x85: lambda reader: reader._tuple(1),
    0x86: lambda reader: reader._tuple(2),
    0x87: lambda reader: reader._tuple(3),
    ord("]"): lambda reader: reader._push([]),
    ord("l"): PickleReader._list,
    ord("a"): PickleReader._append,
    ord("e"): PickleReader._appends,
    ord("}"): lambda reader: reader._push({}),
    ord("d"): PickleReader._dict,
    ord("s"): PickleReader._set_item,
    ord("u"): PickleReader._set_items,
    0x8F: lambda reader: reader._push(set()),
    0x90: PickleReader._add_items,
    0x91: PickleReader._frozenset,
    ord("q"): lambda reader: reader._put(reader._number(1)),
    ord("r"): lambda reader: reader._put(reader._number(4)),
    0x94: lambda reader: reader._put(len(reader._memo)),
    ord("h"): lambda reader: reader._get(reader._number(1)),
    ord("j"): lambda reader: reader._get(reader._number(4)),
    ord("c"): PickleReader._global,
    0x93: PickleReader._stack_global,
    ord("Q"): PickleReader._persistent,
    ord("R"): PickleReader._reduce,
    0x81: PickleReader._reduce,  # NEWOBJ: a class and its arguments
    ord("b"): PickleReader._build,
}
