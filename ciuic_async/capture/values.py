"""Plain values as JSON nodes and back, without pickle (docs/format.md, section 2).

What is not in this file is refused by name. Nothing named in a file is ever imported: a type is found only if its
module is already loaded and holds it under that name.
"""

from __future__ import annotations

import base64
import collections
import enum
import functools
import operator
import re
import struct
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from ciuic_async.errors import IntegrityError, NotFoundError
from ciuic_async.format.jsontext import MAX_SAFE_INTEGER
from ciuic_async.format.manifest import Node

NOT_PLAIN: Any = object()
"""What ``encode_scalar`` returns for containers, tensors and everything unknown."""

FACTORIES: dict[str, type] = {t.__name__: t for t in (list, dict, int, float, str, set, tuple, bool)}

_DOUBLE = struct.Struct(">d")
_HEX16 = re.compile(r"[0-9a-f]{16}")
_NUMPY_DTYPE = re.compile(r"[<>|][biufcmMSUV][0-9]{1,9}(?:\[[0-9]{0,9}[A-Za-zμ]{1,7}\])?")  # as ``dtype.str`` writes
_HEX_INT = re.compile(r"-?0x[0-9a-f]+")
_NAMED_TORCH: dict[str, tuple[type, str]] = {
    "torch.dtype": (torch.dtype, "torch."),
    "torch.layout": (torch.layout, "torch."),
    "torch.memory_format": (torch.memory_format, "torch."),
}


def malformed(message: str) -> IntegrityError:
    """The error for a node that docs/format.md does not know."""
    return IntegrityError(f"manifest: {message}", kind="malformed_node", where="manifest")


# --- to nodes ---------------------------------------------------------------------------------------------------------


def encode_scalar(value: object) -> Node:
    """The node of one plain value that holds no other values, or ``NOT_PLAIN``. Types must match exactly."""
    encoder = _ENCODERS.get(type(value))
    if encoder is not None:
        return encoder(value)
    if isinstance(value, enum.Enum):
        return _encode_enum(value)
    if isinstance(value, np.generic) and value.dtype.names is None and not value.dtype.hasobject:
        return {"numpy.scalar": value.tobytes().hex(), "dtype": value.dtype.str}
    if isinstance(value, np.dtype) and value.names is None and not value.hasobject and value.subdtype is None:
        return {"numpy.dtype": value.str}
    return NOT_PLAIN


def _encode_int(value: int) -> Node:
    return value if -MAX_SAFE_INTEGER <= value <= MAX_SAFE_INTEGER else {"int": hex(value)}


def _double(value: float) -> str:
    return _DOUBLE.pack(value).hex()


def _encode_str(value: str) -> Node:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return {"str_hex": value.encode("utf-8", "surrogatepass").hex()}
    return value


def _encode_enum(value: enum.Enum) -> Node:
    name = value.name
    if name is None or isinstance(value, enum.Flag):
        members = [member.name for member in type(value) if member in value]
        combined = functools.reduce(operator.or_, (type(value)[n] for n in members if n), type(value)(0))
        if combined != value:  # bits without a name cannot be stored by name
            return NOT_PLAIN
        name = "|".join(n for n in members if n)
    return {"enum": type_name(type(value)), "name": name}


def _encode_torch_name(tag: str) -> Callable[[object], Node]:
    return lambda value: {tag: str(value).removeprefix("torch.")}


_ENCODERS: dict[type, Callable[[Any], Node]] = {
    type(None): lambda value: None,
    bool: lambda value: value,
    int: _encode_int,
    float: lambda value: {"float": _double(value)},
    complex: lambda value: {"complex": [_double(value.real), _double(value.imag)]},
    str: _encode_str,
    bytes: lambda value: {"bytes": base64.b64encode(value).decode("ascii")},
    bytearray: lambda value: {"bytearray": base64.b64encode(value).decode("ascii")},
    range: lambda value: {"range": [_encode_int(n) for n in (value.start, value.stop, value.step)]},
    torch.Size: lambda value: {"torch.Size": [_encode_int(int(n)) for n in value]},
    torch.dtype: _encode_torch_name("torch.dtype"),
    torch.layout: _encode_torch_name("torch.layout"),
    torch.memory_format: _encode_torch_name("torch.memory_format"),
    torch.device: lambda value: {"torch.device": str(value)},
}


def type_name(cls: type) -> str:
    """``module:qualname``: how a named tuple's or enum's type is written."""
    return f"{cls.__module__}:{cls.__qualname__}"


# --- from nodes -------------------------------------------------------------------------------------------------------


def decode_scalar(node: dict[str, Node]) -> object:
    """The value of an object node that ``encode_scalar`` writes, or ``NOT_PLAIN`` if it is another kind of node."""
    tag = next((key for key in node if key in _DECODERS), None)
    if tag is None:
        return NOT_PLAIN
    keys, decoder = _DECODERS[tag]
    if set(node) != keys:
        raise malformed(f"a {tag} node has the fields {sorted(node)}")
    try:
        return decoder(node)
    except (ValueError, TypeError, KeyError, RuntimeError, OverflowError) as error:
        raise malformed(f"a {tag} node does not hold a {tag}: {str(error)[:200]}") from None


def _decode_double(text: object) -> float:
    if not isinstance(text, str) or not _HEX16.fullmatch(text):
        raise ValueError("expected 16 hex digits")
    value: float = _DOUBLE.unpack(bytes.fromhex(text))[0]
    return value


def _decode_int(node: dict[str, Node]) -> int:
    if not isinstance(node["int"], str) or not _HEX_INT.fullmatch(node["int"]):
        raise ValueError("expected hex")
    value = int(node["int"], 16)
    if hex(value) != node["int"] or abs(value) <= MAX_SAFE_INTEGER:
        raise ValueError("not the shortest form")
    return value


def _decode_complex(node: dict[str, Node]) -> complex:
    real, imaginary = node["complex"]
    return complex(_decode_double(real), _decode_double(imaginary))


def _decode_base64(text: object) -> bytes:
    if not isinstance(text, str):
        raise ValueError("expected base64")
    return base64.b64decode(text, validate=True)


def _decode_str_hex(node: dict[str, Node]) -> str:
    return bytes.fromhex(node["str_hex"]).decode("utf-8", "surrogatepass")


def _integers(items: object, count: int | None = None) -> list[int]:
    if not isinstance(items, list) or (count is not None and len(items) != count):
        raise ValueError("expected a list of integers")
    result = []
    for item in items:
        number = _decode_int(item) if isinstance(item, dict) and set(item) == {"int"} else item
        if type(number) is not int:
            raise ValueError("expected integers")
        result.append(number)
    return result


def _decode_torch_name(tag: str) -> Callable[[dict[str, Node]], object]:
    cls, _ = _NAMED_TORCH[tag]

    def decode(node: dict[str, Node]) -> object:
        value = vars(torch).get(node[tag])
        if not isinstance(value, cls):
            raise ValueError(f"torch has no {tag} called {str(node[tag])[:80]!r}")
        return value

    return decode


def _numpy_dtype(text: object) -> np.dtype[Any]:
    if not isinstance(text, str) or not _NUMPY_DTYPE.fullmatch(text):
        raise ValueError("unknown numpy dtype")
    dtype = np.dtype(text)
    if dtype.hasobject or dtype.names is not None or dtype.subdtype is not None or dtype.str != text:
        raise ValueError(f"numpy dtype {text!r} is not allowed")
    return dtype


numpy_dtype = _numpy_dtype


def _decode_numpy_scalar(node: dict[str, Node]) -> object:
    dtype = _numpy_dtype(node["dtype"])
    data = bytes.fromhex(node["numpy.scalar"])
    if len(data) != dtype.itemsize:
        raise ValueError(f"{len(data)} bytes for {dtype}")
    if dtype.kind == "S":  # numpy takes zeros at the end for padding; here they are the value's own
        return np.bytes_(data)
    if dtype.kind == "U":
        return np.str_(data.decode("utf-32-be" if dtype.str[0] == ">" else "utf-32-le", "surrogatepass"))
    return np.frombuffer(data, dtype=dtype)[0] if dtype.itemsize else np.zeros((), dtype)[()]


def _decode_enum(node: dict[str, Node]) -> object:
    if not isinstance(node["name"], str):
        raise ValueError("expected a name")
    cls = find_type(node["enum"])
    if cls is None or not issubclass(cls, enum.Enum):
        module, _, name = str(node["enum"]).partition(":")
        raise NotFoundError(
            f"the state holds {name}.{node['name']}, an enum of module {module!r} that is not loaded; "
            f"import it before loading (nothing is imported by itself)",
            kind="enum_not_loaded",
        )
    if issubclass(cls, enum.Flag) and node["name"] not in cls.__members__:
        names = [name for name in node["name"].split("|") if name]
        return functools.reduce(operator.or_, (cls[name] for name in names), cls(0))
    return cls[node["name"]]


def find_type(name: object) -> type | None:
    """The class called ``module:qualname`` if its module is loaded and holds it; never imports, calls no code."""
    if not isinstance(name, str) or len(name) > 1000:
        raise ValueError("expected module:qualname")
    module_name, _, qualname = name.partition(":")
    module = sys.modules.get(module_name)
    current: object = module
    for part in qualname.split("."):
        try:
            current = vars(current)[part]
        except (TypeError, KeyError):
            return None
    return current if isinstance(current, type) and type_name(current) == name else None


def find_namedtuple(name: object, fields: object) -> type[tuple[Any, ...]]:
    """The named tuple's own type if it is loaded and has these fields, else a new one of that name and fields."""
    if not isinstance(fields, list) or not all(isinstance(field, str) for field in fields):
        raise malformed("a namedtuple node's fields are not strings")
    try:
        cls = find_type(name)
        if cls is not None and issubclass(cls, tuple) and getattr(cls, "_fields", None) == tuple(fields):
            return cls
        return collections.namedtuple(str(name).rpartition(".")[2].rpartition(":")[2], fields)
    except (ValueError, SyntaxError) as error:  # SyntaxError: two names that Python's normalization makes one
        raise malformed(f"a namedtuple node is not one: {str(error)[:200]}") from None


_DECODERS: dict[str, tuple[set[str], Callable[[dict[str, Node]], object]]] = {
    "int": ({"int"}, _decode_int),
    "float": ({"float"}, lambda node: _decode_double(node["float"])),
    "complex": ({"complex"}, _decode_complex),
    "str_hex": ({"str_hex"}, _decode_str_hex),
    "range": ({"range"}, lambda node: range(*_integers(node["range"], 3))),
    "enum": ({"enum", "name"}, _decode_enum),
    "torch.Size": ({"torch.Size"}, lambda node: torch.Size(_integers(node["torch.Size"]))),
    "torch.dtype": ({"torch.dtype"}, _decode_torch_name("torch.dtype")),
    "torch.layout": ({"torch.layout"}, _decode_torch_name("torch.layout")),
    "torch.memory_format": ({"torch.memory_format"}, _decode_torch_name("torch.memory_format")),
    "torch.device": ({"torch.device"}, lambda node: torch.device(str(node["torch.device"]))),
    "numpy.dtype": ({"numpy.dtype"}, lambda node: _numpy_dtype(node["numpy.dtype"])),
    "numpy.scalar": ({"numpy.scalar", "dtype"}, _decode_numpy_scalar),
}


def decode_bytes(node: dict[str, Node], tag: str) -> bytes:
    """The value of a ``bytes`` or ``bytearray`` node that holds base64."""
    try:
        return _decode_base64(node[tag])
    except ValueError as error:
        raise malformed(f"a {tag} node holds no base64: {error}") from None
