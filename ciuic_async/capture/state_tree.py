"""State trees to plans and back: ``flatten`` and ``inflate``.

``flatten`` walks nested containers once, on the training thread, and copies nothing but plain values: tensors and
arrays stay where they are until staging. ``inflate`` builds the same tree from nodes and stored tensors.
"""

from __future__ import annotations

import collections
import enum
import struct
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ciuic_async.capture import values
from ciuic_async.capture.tensors import Sources, TensorCollector, apply_view, check_view
from ciuic_async.capture.values import NOT_PLAIN, malformed
from ciuic_async.errors import UsageError
from ciuic_async.format import jsontext
from ciuic_async.format.fields import Fields
from ciuic_async.format.manifest import (
    SECTION_RNG,
    SECTION_STATE,
    TOP_DICT,
    TOP_SINGLE,
    Node,
    Path,
    StoredTensor,
    Tree,
    dotted,
)
from ciuic_async.handoffs import CapturePlan

MAX_DEPTH = 100
"""Containers inside containers. Each costs three levels of JSON, whose limit is 400."""
SPILL_BYTES = 64 << 10


@dataclass(frozen=True, slots=True)
class Captured:
    """A plan and the live memory it speaks of. ``sources`` are in address order, without those of ``left_out``."""

    plan: CapturePlan
    sources: Sources
    left_out: frozenset[int] = frozenset()
    """Regions, by number, that nobody copies."""

    def without(self, regions: Collection[int]) -> Captured:
        """The same, less the copies of some regions (by number)."""
        starts = np.array([self.plan.regions[number].address for number in sorted(regions)], dtype=np.int64)
        ends = starts + [self.plan.regions[number].size_bytes for number in sorted(regions)]
        inside = np.searchsorted(starts, self.sources.addresses, side="right") - 1
        within = (inside >= 0) & (self.sources.addresses < ends[inside])
        return Captured(self.plan, self.sources.select(~within), self.left_out.union(regions))


def flatten(
    state: object,
    *,
    chunk_size_bytes: int,
    rng: object = None,
    trainable: frozenset[int] = frozenset(),
) -> Captured:
    """Plan how to store ``state`` (and, apart from it, the ``rng`` states).

    Args:
        state: any nesting of the types docs/format.md lists. Not kept; its tensors are, until ``Captured`` is dropped.
        chunk_size_bytes: of the chain.
        rng: a state tree of its own, or None.
        trainable: see ``TensorCollector``.

    Raises:
        UsageError: a value of another type, a cycle, or too deep; names the path and the type. Nothing was changed.
    """
    return flatten_into(TensorCollector(trainable), state, chunk_size_bytes, rng)


def flatten_into(collector: TensorCollector, state: object, chunk_size_bytes: int, rng: object) -> Captured:
    """``flatten`` with a collector of the caller, which is empty before, and knows afterwards what was found."""
    flattener = _Flattener(collector)
    trees = []
    if type(state) is dict:
        top = TOP_DICT
        for key, value in state.items():
            key_node = flattener.key(key, ())
            trees.append(Tree(SECTION_STATE, key_node, flattener.node(value, (_step(key),))))
    else:
        top = TOP_SINGLE
        trees.append(Tree(SECTION_STATE, None, flattener.node(state, ())))
    if rng is not None:
        trees.append(Tree(SECTION_RNG, None, flattener.node(rng, ("rng",))))
    tensors, regions, packs, sources = collector.plan(chunk_size_bytes)
    return Captured(CapturePlan(top, tuple(trees), tensors, regions, packs, chunk_size_bytes), sources)


def encode_plain(value: object, what: str) -> Node:
    """The node of a value without tensors, for the manifest's root (epoch, batch)."""
    collector = TensorCollector()
    node = _Flattener(collector).node(value, (what,))
    if collector.plan(1 << 16)[0]:
        raise UsageError(f"{what}: expected a small plain value, found tensors or more than 64 KiB", where=what)
    return node


def flatten_plain(value: object, depth: int) -> tuple[Node, memoryview | None] | None:
    """Node of a value inside ``depth`` containers, and its JSON if that is stored outside the manifest.

    None if it holds tensors, arrays, or anything else that is stored outside.
    """
    collector = TensorCollector()
    node = _Flattener(collector, depth).node(value, ())
    if not collector.groups:
        return node, None
    if len(collector.groups) == 1 and type(node) is dict and "json" in node:
        return node, collector.groups[0].host
    return None


def holds_reference(node: Node) -> bool:
    """Whether a node has anything in it that is stored outside the manifest."""
    pending = [node]
    while pending:
        inner = pending.pop()
        if type(inner) is list:
            pending += inner
        elif type(inner) is dict:
            if not _REFERENCES.isdisjoint(inner):
                return True
            if any(type(inner.get(tag)) is int for tag in _LONG):
                return True
            pending += inner.values()
    return False


_REFERENCES = frozenset({"tensor", "numpy.array", "json"})
_LONG = ("str", "bytes", "bytearray")
"""Tags that hold a reference in place of the value itself when that is long."""


def _weight(node: Node) -> int:
    """What a plain value that holds no others counts towards ``SPILL_BYTES``."""
    return len(node) + 3 if type(node) is str else 24


def _alike(items: Collection[Any]) -> list[Node] | None:
    """Nodes of numbers of one type, each of weight 24, quickly: a history has thousands. None for other ``items``."""
    kinds = set(map(type, items))
    if kinds == {float}:
        # bytes.hex puts a space after every eight bytes
        return [{"float": text} for text in struct.pack(f">{len(items)}d", *items).hex(" ", 8).split(" ")]
    if kinds == {int} and min(items) >= -jsontext.MAX_SAFE_INTEGER and max(items) <= jsontext.MAX_SAFE_INTEGER:
        return list(items)
    return None


def decode_plain(node: Node) -> Any:
    """The way back from ``encode_plain``."""
    return Inflater((), _no_tensor).value(node, "progress")


def _no_tensor(index: int) -> torch.Tensor:
    raise malformed("a plain value refers to a tensor")


def _step(key: object) -> str | int:
    """A key as one step of a path."""
    if type(key) is int and abs(key) <= jsontext.MAX_SAFE_INTEGER:
        return key
    try:
        text = str(key)
    except Exception:  # Python prints no integer above 4300 digits, and an object may print as it likes
        text = f"<{type(key).__name__}>"
    return text.encode("utf-8", "backslashreplace").decode("utf-8")[:200]


class _Flattener:
    """Recursion over containers. ``size`` tracks the JSON of what was produced, to spill what is large.

    Args:
        depth: of containers around what will be flattened.
    """

    def __init__(self, collector: TensorCollector, depth: int = 0) -> None:
        self._collector = collector
        # Containers we are inside of, by id: a cycle meets one again. No id is negative.
        self._open: set[int] = set(range(-depth, 0))
        self.size = 0
        self._references = 0

    def key(self, key: object, path: Path) -> Node:
        """Keys are plain scalars or tuples of such."""
        node = self.node(key, (*path, _step(key)))
        if isinstance(key, torch.Tensor | np.ndarray | list | dict):
            raise UsageError(f"{dotted(path)}: {type(key).__name__} cannot be a key", kind="unsupported_type")
        return node

    def node(self, value: object, path: Path) -> Node:
        kind = type(value)
        if isinstance(value, torch.Tensor):
            self._references += 1
            self.size += 100
            return self._collector.add(value, path)
        if is_long(value):
            return self._spilled_scalar(value, path)
        scalar = values.encode_scalar(value)
        if scalar is not NOT_PLAIN:
            self.size += _weight(scalar)
            return scalar
        if kind is np.ndarray:
            return self._array(value, path)  # type: ignore[arg-type]
        return self._container(value, path)

    def _container(self, value: object, path: Path) -> Node:
        if id(value) in self._open:
            raise UsageError(f"{dotted(path)}: the state contains itself (a cycle)", kind="cycle", where=dotted(path))
        if len(self._open) >= MAX_DEPTH:
            raise UsageError(
                f"{dotted(path)[:200]}: nested deeper than {MAX_DEPTH}", kind="too_deep", where=dotted(path)[:200]
            )
        size, references = self.size, self._references
        self._open.add(id(value))
        try:
            node = self._container_node(value, path)
        finally:
            self._open.discard(id(value))
        if self._references == references and self.size - size > SPILL_BYTES:
            data = memoryview(jsontext.encode(node))
            self.size = size
            return {"json": self._spill(data, path)}
        return node

    def _container_node(self, value: Any, path: Path) -> Node:
        kind = type(value)
        if kind is dict:
            return {"dict": self._items(value, path)}
        if kind is list:
            return self._sequence(value, path)
        if kind is tuple:
            return {"tuple": self._sequence(value, path)}
        if kind is collections.OrderedDict:
            node: dict[str, Node] = {"ordered_dict": self._items(value, path)}
            extra = dict(vars(value))
            if "_metadata" in extra:  # what nn.Module.state_dict() attaches: the versions of its modules
                node["metadata"] = self.node(extra.pop("_metadata"), (*path, "_metadata"))
            if extra:
                raise self._unsupported(value, path, f" with the attribute {sorted(extra)[0]!r}")
            return node
        if kind in (set, frozenset):
            return {kind.__name__: self._sequence(value, path)}
        if kind is collections.deque:
            return {"deque": self._sequence(value, path), "maxlen": value.maxlen}
        if kind is collections.defaultdict:
            factory = value.default_factory
            name = None if factory is None else getattr(factory, "__name__", "")
            if name is not None and values.FACTORIES.get(name) is not factory:
                raise self._unsupported(value, path, f" with the factory {factory!r}")
            return {"default_dict": self._items(value, path), "factory": name}
        if kind is slice:
            parts = [self.node(part, path) for part in (value.start, value.stop, value.step)]
            return {"slice": parts}
        fields = getattr(kind, "_fields", None)
        if isinstance(value, tuple) and isinstance(fields, tuple) and not hasattr(value, "__dict__"):
            return {
                "namedtuple": self._sequence(value, path, fields),
                "type": values.type_name(kind),
                "fields": list(fields),
            }
        raise self._unsupported(value, path)

    def _items(self, value: Mapping[Any, Any], path: Path) -> list[Node]:
        return [[self.key(key, path), self.node(item, (*path, _step(key)))] for key, item in value.items()]

    def _sequence(self, value: Collection[Any], path: Path, names: tuple[str, ...] | None = None) -> list[Node]:
        if names is not None:
            return [self.node(item, (*path, name)) for item, name in zip(value, names, strict=True)]
        alike = _alike(value)
        if alike is not None:
            self.size += 24 * len(alike)
            return alike
        return [self.node(item, (*path, number)) for number, item in enumerate(value)]

    def _array(self, array: np.ndarray[Any, Any], path: Path) -> Node:
        found = array_bytes(array)
        if found is None:
            raise self._unsupported(array, path, f" of dtype {array.dtype}")
        self._references += 1
        self.size += 100
        return found[0] | {"numpy.array": self._collector.add_host_bytes(found[1], path)}

    def _spilled_scalar(self, value: Any, path: Path) -> Node:
        return {type(value).__name__: self._spill(long_bytes(value), path)}

    def _spill(self, data: memoryview, path: Path) -> int:
        self._references += 1
        self.size += 24
        return self._collector.add_host_bytes(data, path)

    @staticmethod
    def _unsupported(value: object, path: Path, detail: str = "") -> UsageError:
        kind = type(value)
        advice = (
            "store its name or value instead"
            if isinstance(value, enum.Enum)
            else "turn it into plain values, tensors or arrays, or give it state_dict() and load_state_dict()"
        )
        return UsageError(
            f"{dotted(path)}: {kind.__module__}.{kind.__qualname__}{detail} cannot be stored (no pickle is used); "
            f"{advice}",
            kind="unsupported_type",
            where=dotted(path),
        )


_SPILLED_SCALARS = (str, bytes, bytearray)


def is_long(value: object) -> bool:
    """Whether a value is stored outside the manifest for its length."""
    return type(value) in _SPILLED_SCALARS and len(value) > SPILL_BYTES  # type: ignore[arg-type]


def long_bytes(value: str | bytes | bytearray) -> memoryview:
    """The bytes of a long value.

    A bytearray may change after this returns: staging copies later than this line, but before ``save()`` returns.
    """
    return memoryview(value.encode("utf-8", "surrogatepass") if isinstance(value, str) else value)


def array_bytes(array: np.ndarray[Any, Any]) -> tuple[dict[str, Node], memoryview] | None:
    """What the node of an array says beside where its bytes are, and those bytes; None if it cannot be stored."""
    dtype = array.dtype
    if dtype.hasobject or dtype.names is not None or dtype.metadata:
        return None
    fortran = array.flags.f_contiguous and not array.flags.c_contiguous
    flat = (array.T if fortran else np.ascontiguousarray(array)).reshape(-1)
    data = (flat.view(np.uint8) if flat.size and dtype.itemsize else np.empty(0, np.uint8)).data
    return {"dtype": dtype.str, "shape": list(array.shape), "order": "F" if fortran else "C"}, data


# --- the way back -----------------------------------------------------------------------------------------------------


class Inflater:
    """Builds values from nodes.

    Args:
        tensors: the snapshot's stored tensors.
        load: gives the content of a stored tensor by index: contiguous, of its dtype and shape, starting its storage.
            Called once for each reference; leaves become views of what it returns.
    """

    def __init__(self, tensors: tuple[StoredTensor, ...], load: Callable[[int], torch.Tensor]) -> None:
        self._tensors = tensors
        self._load = load
        self._depth = 0

    def value(self, node: Node, where: str) -> Any:
        """The value of ``node``; ``where`` names it in errors.

        Raises:
            IntegrityError: kind ``malformed_node``.
            NotFoundError: an enum whose module is not loaded.
        """
        if not isinstance(node, dict | list):
            if isinstance(node, str | int | bool) or node is None:
                return node
            raise malformed(f"{where}: unexpected {type(node).__name__}")
        if self._depth > 2 * MAX_DEPTH:
            raise malformed(f"{where}: nested too deep")
        self._depth += 1
        try:
            if isinstance(node, list):
                return [self.value(item, where) for item in node]
            return self._object(node, where)
        finally:
            self._depth -= 1

    def _object(self, node: dict[str, Node], where: str) -> Any:
        if "tensor" in node:
            return self.tensor(node, where)
        scalar = values.decode_scalar(node)
        if scalar is not NOT_PLAIN:
            return scalar
        tag = next((key for key in node if key in _CONTAINERS), None)
        if tag is None:
            raise malformed(f"{where}: unknown node with the fields {sorted(node)[:5]}")
        if not _CONTAINERS[tag] <= set(node) <= _CONTAINERS[tag] | ({"metadata"} if tag == "ordered_dict" else set()):
            raise malformed(f"{where}: a {tag} node has the fields {sorted(node)[:8]}")
        if tag in ("str", "bytes", "bytearray", "json"):
            return self._long(tag, node, where)
        if tag == "numpy.array":
            return self._array(node, where)
        items = node[tag]
        if not isinstance(items, list):
            raise malformed(f"{where}: a {tag} node holds no list")
        return self._container(tag, node, items, where)

    def _container(self, tag: str, node: dict[str, Node], items: list[Node], where: str) -> Any:
        try:
            if tag == "tuple":
                return tuple(self.value(item, where) for item in items)
            if tag in ("set", "frozenset"):
                return (set if tag == "set" else frozenset)(self.value(item, where) for item in items)
            if tag == "deque":
                if node["maxlen"] is not None and (type(node["maxlen"]) is not int or node["maxlen"] < len(items)):
                    raise malformed(f"{where}: a deque of {len(items)} items cannot have this maxlen")
                return collections.deque((self.value(item, where) for item in items), node["maxlen"])
            if tag == "slice":
                if len(items) != 3:
                    raise malformed(f"{where}: a slice has 3 parts, found {len(items)}")
                return slice(*(self.value(item, where) for item in items))
            if tag == "namedtuple":
                cls = values.find_namedtuple(node["type"], node["fields"])
                if len(items) != len(node["fields"]):
                    raise malformed(f"{where}: {len(items)} values for {len(node['fields'])} fields")
                return tuple.__new__(cls, [self.value(item, where) for item in items])
            pairs = self._pairs(items, where)
            if tag == "dict":
                return dict(pairs)
            if tag == "default_dict":
                name = node["factory"]
                if name is not None and name not in values.FACTORIES:
                    raise malformed(f"{where}: unknown factory {str(name)[:80]!r}")
                return collections.defaultdict(None if name is None else values.FACTORIES[name], pairs)
            result = collections.OrderedDict(pairs)
            if "metadata" in node:
                result._metadata = self.value(node["metadata"], where)  # type: ignore[attr-defined]
            return result
        except (TypeError, ValueError, OverflowError) as error:  # unhashable keys, a negative maxlen, ...
            raise malformed(f"{where}: a {tag} node is not one: {str(error)[:200]}") from None

    def _pairs(self, items: list[Node], where: str) -> list[tuple[Any, Any]]:
        pairs = []
        for item in items:
            if not isinstance(item, list) or len(item) != 2:
                raise malformed(f"{where}: a dict's item is no pair")
            key = self.value(item[0], where)
            pairs.append((key, self.value(item[1], f"{where}.{_step(key)}")))
        if len({key for key, _ in pairs}) != len(pairs):
            raise malformed(f"{where}: a dict has a key twice")
        return pairs

    def tensor(self, node: dict[str, Node], where: str) -> torch.Tensor:
        """A tensor leaf as a view of its stored tensor."""
        index, view, requires_grad, parameter = tensor_node(node, self._tensors, where)
        result = apply_view(self._load(index), view)
        if parameter:
            return torch.nn.Parameter(result, requires_grad=requires_grad)
        return result.requires_grad_(requires_grad) if requires_grad else result

    def _long(self, tag: str, node: dict[str, Node], where: str) -> Any:
        reference = node[tag]
        if tag in ("bytes", "bytearray") and isinstance(reference, str):
            return (bytes if tag == "bytes" else bytearray)(values.decode_bytes(node, tag))
        data = self._bytes_of(reference, where)
        if tag == "bytes":
            return bytes(data)
        if tag == "bytearray":
            return bytearray(data)
        if tag == "str":
            try:
                return bytes(data).decode("utf-8", "surrogatepass")
            except UnicodeDecodeError as error:
                raise malformed(f"{where}: a long string is no UTF-8: {error}") from None
        inner = jsontext.decode(bytes(data), what=where, limit_bytes=len(data))
        # Nothing inside may refer to a tensor: else a document could contain itself.
        return Inflater((), _no_tensor).value(inner, where)

    def _array(self, node: dict[str, Node], where: str) -> Any:
        fields = Fields(node, where)
        shape = fields.integers("shape")
        try:
            dtype = values.numpy_dtype(fields.string("dtype"))
            data = self._bytes_of(fields.raw("numpy.array"), where)
            if node["order"] not in ("C", "F"):
                raise ValueError("unknown order")
            array = np.empty(0, dtype) if not len(data) else np.frombuffer(bytearray(data), dtype=dtype)
            if not len(data):
                return np.empty(shape, dtype, node["order"]) if 0 in shape or not dtype.itemsize else _empty_mismatch()
            return array.reshape(shape, order=node["order"])
        except (ValueError, TypeError, MemoryError) as error:
            raise malformed(f"{where}: a numpy array is not one: {str(error)[:200]}") from None

    def _bytes_of(self, index: object, where: str) -> memoryview:
        number = check_index(index, self._tensors, where)
        if self._tensors[number].dtype != "uint8" or len(self._tensors[number].shape) != 1:
            raise malformed(f"{where}: bytes are stored as a 1-D uint8 tensor, found another")
        return self._load(number).cpu().numpy().data


def _empty_mismatch() -> Any:
    raise ValueError("no bytes for a shape that is not empty")


def check_index(index: object, tensors: tuple[StoredTensor, ...], where: str) -> int:
    """``index`` if it is one of ``tensors``."""
    if type(index) is not int or not 0 <= index < len(tensors):
        raise malformed(f"{where}: refers to tensor {str(index)[:40]}, there are {len(tensors)}")
    return index


def tensor_node(node: dict[str, Node], tensors: tuple[StoredTensor, ...], where: str) -> tuple[int, Any, bool, bool]:
    """Index, checked view, ``requires_grad`` and ``parameter`` of a tensor node."""
    if not set(node) <= {"tensor", "view", "requires_grad", "parameter"}:
        raise malformed(f"{where}: a tensor node has the fields {sorted(node)[:8]}")
    index = check_index(node["tensor"], tensors, where)
    stored = tensors[index]
    flags = [node.get(name, False) for name in ("requires_grad", "parameter")]
    if any(type(flag) is not bool for flag in flags):
        raise malformed(f"{where}: a tensor node's flag is no boolean")
    view = check_view(node, stored.dtype, stored.shape, where)
    dtype = stored.dtype if view is None else view[0]
    if flags[0] and not dtype.startswith(("float", "bfloat", "complex")):
        raise malformed(f"{where}: a {dtype} tensor cannot require a gradient")
    return index, view, flags[0], flags[1]


_CONTAINERS: dict[str, set[str]] = {
    "dict": {"dict"},
    "tuple": {"tuple"},
    "set": {"set"},
    "frozenset": {"frozenset"},
    "deque": {"deque", "maxlen"},
    "slice": {"slice"},
    "ordered_dict": {"ordered_dict"},
    "default_dict": {"default_dict", "factory"},
    "namedtuple": {"namedtuple", "type", "fields"},
    "numpy.array": {"numpy.array", "dtype", "shape", "order"},
    "str": {"str"},
    "bytes": {"bytes"},
    "bytearray": {"bytearray"},
    "json": {"json"},
}
