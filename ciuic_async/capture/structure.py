"""The structure of a state, as ``plan_cache`` remembers and compares it: columns, one for each property and level.

Built-in functions walk a column at a hundredth of a microsecond for an item, where a loop of Python's own needs some.
"""

from __future__ import annotations

import collections
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import chain, compress
from operator import attrgetter, methodcaller
from typing import Any

import numpy as np
import torch

from ciuic_async.capture.state_tree import array_bytes, is_long, long_bytes
from ciuic_async.format.manifest import Node

TENSORS = frozenset({torch.Tensor, torch.nn.Parameter})
MAPS = frozenset({dict, collections.OrderedDict})
SEQUENCES = frozenset({list, tuple})
KEYS = frozenset({str, int, bool, type(None)})
EXACT = frozenset({type(None), bool, int, str, bytes})
"""Plain types of which two values of one type are stored alike exactly if they are equal."""
_FLOAT = frozenset({float})
_QUIET = EXACT | _FLOAT | MAPS | SEQUENCES

BLOCK_LEAVES = 256


class DifferentError(Exception):
    """The state is not as it was, or of a kind that is not remembered."""


@dataclass(frozen=True, slots=True)
class Hosted:
    """An array or a long value: where it is in its level, and how it was stored."""

    position: int
    node: Node
    group: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Place:
    """Where a plain value goes: into the hole of this number; or for one that is spilled, into the tensor ``group``."""

    depth: int
    hole: int
    group: int = -1


@dataclass(slots=True)
class Containers:
    """Which values of a level are dicts and sequences, and what is compared of them."""

    maps: bytes
    sequences: bytes
    map_sizes: list[int] = field(default_factory=list)
    key_types: list[type] = field(default_factory=list)
    keys: list[Any] = field(default_factory=list)
    metadata: list[bool] = field(default_factory=list)
    sequence_sizes: list[int] = field(default_factory=list)

    def matched(self, level_values: list[Any]) -> list[Any]:
        """The values inside.

        Args:
            level_values: their types are known to be equal.

        Raises:
            DifferentError: containers have another length or other keys.
        """
        found = Containers(self.maps, self.sequences)
        inside = found.look(level_values)
        if (
            found.map_sizes != self.map_sizes
            or found.key_types != self.key_types  # before keys, as True == 1
            or found.keys != self.keys
            or found.metadata != self.metadata
            or found.sequence_sizes != self.sequence_sizes
        ):
            raise DifferentError
        return inside

    def look(self, level_values: list[Any]) -> list[Any]:
        """Fill in what is compared; the values inside: those of dicts first, then of sequences, then metadata."""
        maps = list(compress(level_values, self.maps))
        sequences = list(compress(level_values, self.sequences))
        ordered = [item for item in maps if type(item) is collections.OrderedDict]
        self.map_sizes = list(map(len, maps))
        self.keys = list(chain.from_iterable(maps))
        self.key_types = list(map(type, self.keys))
        self.metadata = list(map(has_metadata, ordered))
        self.sequence_sizes = list(map(len, sequences))
        inside = list(chain.from_iterable(map(methodcaller("values"), maps)))
        inside += chain.from_iterable(sequences)
        inside += [vars(item)["_metadata"] for item in ordered if vars(item)]
        return inside


@dataclass(slots=True)
class Level:
    """All values inside equally many containers, of those containers that hold tensors or arrays somewhere.

    Attributes:
        count: of values.
        others: those that are not plain (``plain`` and ``spilled`` are), and of these ...
        types: ... the types.
    """

    count: int
    others: bytes
    types: list[type]
    containers: Containers
    tensors: bytes
    hosted: list[Hosted]
    plain: bytes
    spilled: bytes


@dataclass(frozen=True, slots=True)
class QuietLevel:
    """One level of plain values that are expected not to change."""

    types: list[type]
    containers: Containers
    exact: bytes
    exact_values: list[Any]
    floats: bytes
    float_bits: bytes


def quiet_levels(level_values: list[Any]) -> list[QuietLevel]:
    """Plain values level by level, to be compared with ``is_quiet``.

    Raises:
        DifferentError: there is something among them that only looking at it alone can compare.
    """
    levels = []
    while level_values:
        types = list(map(type, level_values))
        if not _QUIET.issuperset(types):
            raise DifferentError
        exact, floats = among(types, EXACT), among(types, _FLOAT)
        containers = Containers(among(types, MAPS), among(types, SEQUENCES))
        exact_values = list(compress(level_values, exact))
        bits = _float_bits(level_values, floats)
        level_values = containers.look(level_values)
        if not KEYS.issuperset(containers.key_types):
            raise DifferentError
        levels.append(QuietLevel(types, containers, exact, exact_values, floats, bits))
    return levels


def is_quiet(levels: list[QuietLevel], level_values: list[Any]) -> bool:
    """Whether values are, bit for bit, those that ``quiet_levels`` saw."""
    for level in levels:
        if (
            list(map(type, level_values)) != level.types
            or list(compress(level_values, level.exact)) != level.exact_values
            or _float_bits(level_values, level.floats) != level.float_bits
        ):
            return False
        try:
            level_values = level.containers.matched(level_values)
        except DifferentError:
            return False
    return not level_values


def _float_bits(level_values: list[Any], floats: bytes) -> bytes:
    return array("d", compress(level_values, floats)).tobytes()


def among(types: list[type], kinds: frozenset[type]) -> bytes:
    """Which of ``types`` are some of ``kinds``, for ``compress``."""
    return bytes(map(kinds.__contains__, types))


@dataclass(frozen=True, slots=True)
class Columns:
    """What of some tensors decides how they are stored, but for where they are."""

    dtypes: list[torch.dtype]
    shapes: list[torch.Size]
    strides: list[tuple[int, ...]]
    offsets: list[int]
    devices: list[torch.device]
    layouts: list[torch.layout]
    requires_grad: list[bool]
    negated: list[bool]
    conjugated: list[bool]
    storage_bytes: list[int]


@dataclass(frozen=True, slots=True)
class Memory:
    """How leaves share storages, and which storage each row of ``Sources`` comes from.

    Attributes:
        live: leaves that have memory.
        storages: for each of those the number of its storage, in order of first use.
        first: the first leaf of each storage.
        devices: of each storage; None when all are on one, so that equal addresses mean the same memory.
        trained: whether each storage is one of those that are being trained.
        row_leaves: for each row a leaf whose storage it is part of, else the number of leaves.
        gathered: rows of tensors whose elements lie apart: (row, leaf).
        hosted: rows of host memory: (row, group).
        static: host memory that is part of the structure, by group.
    """

    live: np.ndarray[Any, np.dtype[np.int64]]
    storages: np.ndarray[Any, np.dtype[np.int64]]
    first: np.ndarray[Any, np.dtype[np.int64]]
    devices: list[torch.device] | None
    trained: list[bool]
    row_leaves: np.ndarray[Any, np.dtype[np.int64]]
    gathered: list[tuple[int, int]]
    hosted: list[tuple[int, int]]
    static: dict[int, memoryview]

    def is_shared_alike(self, addresses: np.ndarray[Any, np.dtype[np.int64]]) -> bool:
        """Whether leaves whose storages begin at ``addresses`` share them exactly as they did."""
        begins = addresses[self.first]
        if not begins.all() or not np.array_equal(begins[self.storages], addresses[self.live]):
            return False
        places = begins.tolist()
        if self.devices is None:
            return len(set(places)) == len(places)
        return len(set(zip(self.devices, places, strict=True))) == len(places)

    def trained_of(self, addresses: np.ndarray[Any, np.dtype[np.int64]], trainable: frozenset[int]) -> list[bool]:
        """Which storages are being trained."""
        return list(map(trainable.__contains__, addresses[self.first].tolist()))


def roots_of(state: object, rng: object) -> tuple[list[Any], tuple[list[Any], list[type]] | None]:
    """The values at the root of each tree, and the keys of a dict at the top with their types."""
    top_keys = None
    roots = [state]
    if type(state) is dict:
        top_keys = (list(state), list(map(type, state)))
        roots = list(state.values())
        if not KEYS.issuperset(top_keys[1]):
            raise DifferentError
    return [*roots, rng] if rng is not None else roots, top_keys


def has_metadata(value: collections.OrderedDict[Any, Any]) -> bool:
    """Whether a dict has what ``nn.Module.state_dict()`` attaches."""
    extra = vars(value)
    if extra and list(extra) != ["_metadata"]:
        raise DifferentError
    return bool(extra)


def hosted_bytes(value: Any) -> tuple[Node, memoryview]:
    """What is stored of an array or a long value, and the bytes that are stored as a tensor."""
    if type(value) is np.ndarray:
        found = array_bytes(value)
        if found is None:
            raise DifferentError
        return found
    if not is_long(value):
        raise DifferentError
    return type(value).__name__, long_bytes(value)


def look_at(leaves: list[torch.Tensor]) -> Iterator[tuple[Columns, list[torch.UntypedStorage], list[int]]]:
    """Columns, storages and where these begin, of a block of tensors after the other.

    A block stays in the processor's caches while one property after the other is asked for.
    """
    for start in range(0, len(leaves), BLOCK_LEAVES):
        block = leaves[start : start + BLOCK_LEAVES]
        storages = list(map(torch.Tensor.untyped_storage, block))
        dtypes = list(map(attrgetter("dtype"), block))
        columns = Columns(
            dtypes=dtypes,
            shapes=list(map(attrgetter("shape"), block)),
            strides=list(map(torch.Tensor.stride, block)),
            offsets=list(map(torch.Tensor.storage_offset, block)),  # type: ignore[arg-type]  # no SymInt here
            devices=list(map(attrgetter("device"), block)),
            layouts=list(map(attrgetter("layout"), block)),
            requires_grad=list(map(attrgetter("requires_grad"), block)),
            negated=list(map(torch.Tensor.is_neg, block)),
            # Only complex numbers can be.
            conjugated=list(map(torch.Tensor.is_conj, block)) if any(kind.is_complex for kind in set(dtypes)) else [],
            storage_bytes=list(map(torch.UntypedStorage.nbytes, storages)),
        )
        yield columns, storages, list(map(torch.UntypedStorage.data_ptr, storages))


def interned(blocks: Iterable[Columns]) -> list[Columns]:
    """The same columns with one object for each shape and stride: they stay for as long as the run."""
    shapes: dict[torch.Size, torch.Size] = {}
    strides: dict[tuple[int, ...], tuple[int, ...]] = {}
    return [
        replace(
            block,
            shapes=[shapes.setdefault(shape, shape) for shape in block.shapes],
            strides=[strides.setdefault(stride, stride) for stride in block.strides],
        )
        for block in blocks
    ]
