"""The structure of a state, as ``plan_cache`` remembers and compares it: columns, one for each property and level.

Built-in functions walk a column at a hundredth of a microsecond for an item, where a loop of Python's own needs some.
"""

from __future__ import annotations

import collections
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
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
BITS = frozenset({float, complex})
"""Plain types where that is not so: 0.0 == -0.0, and nan is no nan."""

BLOCK_LEAVES = 256

FIXED = -1
"""Hole of a plain value that must not change: it is part of text that is stored outside the manifest."""
SPILLED: Any = object()
"""In place of the nodes of such values."""


class DifferentError(Exception):
    """The state is not as it was, or of a kind that is not remembered."""


@dataclass(slots=True)
class Plain:
    """Columns of plain values of one level, and the holes they go into."""

    selectors: bytes
    values: list[Any] = field(default_factory=list)
    holes: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Special:
    """A value that is looked at alone: where it is in its level, and what its node was."""

    position: int
    node: Node
    weight: int = 0
    hole: int = FIXED
    group: int = -1
    size_bytes: int = 0


@dataclass(slots=True)
class Level:
    """All values inside equally many containers: those of dicts first, then of lists and tuples, then metadata."""

    types: list[type]
    maps: bytes
    map_sizes: list[int]
    keys: list[Any]
    key_types: list[type]
    metadata: list[bool]
    sequences: bytes
    sequence_sizes: list[int]
    tensors: bytes
    exact: Plain
    bits: Plain
    opaque: list[Special]
    hosted: list[Special]


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


def empty_level(level_values: list[Any]) -> Level:
    """A level with its types, and which of them are what."""
    types = list(map(type, level_values))
    long = list(map(is_long, level_values))

    def among(kinds: frozenset[type]) -> bytes:
        return bytes(kind in kinds and not too_long for kind, too_long in zip(types, long, strict=True))

    return Level(
        types=types,
        maps=among(MAPS),
        map_sizes=[],
        keys=[],
        key_types=[],
        metadata=[],
        sequences=among(SEQUENCES),
        sequence_sizes=[],
        tensors=among(TENSORS),
        exact=Plain(among(EXACT)),
        bits=Plain(among(BITS)),
        opaque=[],
        hosted=[],
    )


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


def values_inside(
    maps: Sequence[Any], sequences: Sequence[Any], ordered: Sequence[collections.OrderedDict[Any, Any]]
) -> list[Any]:
    """The values inside the containers of a level."""
    inside = list(chain.from_iterable(map(methodcaller("values"), maps)))
    inside += chain.from_iterable(sequences)
    inside += [vars(item)["_metadata"] for item in ordered if vars(item)]
    return inside


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
