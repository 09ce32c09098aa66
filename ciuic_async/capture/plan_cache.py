"""Planning the same state again and again: what a training run does.

Between two snapshots training changes numbers, hardly ever the structure. ``PlanCache`` remembers the structure of the
last state: containers, keys and types level by level, and of every tensor what decides how it is stored. A state that
compares equal gets the same plan; live memory is resolved anew every time. Nothing that belongs to the state is
remembered, but for its plain values, which never change (numbers, strings).

A wrong match would store wrong bytes, so every comparison is exact, and whatever this file does not know is planned
from scratch. It works in columns, one for each property and level: built-in functions walk them at a hundredth of a
microsecond for an item, where a loop of Python's own needs some.
"""

from __future__ import annotations

import collections
import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain, compress
from typing import Any

import numpy as np
import torch

from ciuic_async.capture import values
from ciuic_async.capture.state_tree import (
    Captured,
    flatten_into,
    flatten_plain,
    is_long,
    weight,
)
from ciuic_async.capture.structure import (
    BITS,
    EXACT,
    FIXED,
    KEYS,
    MAPS,
    SEQUENCES,
    SPILLED,
    TENSORS,
    Columns,
    DifferentError,
    Level,
    Memory,
    Plain,
    Special,
    empty_level,
    has_metadata,
    hosted_bytes,
    interned,
    look_at,
    roots_of,
    values_inside,
)
from ciuic_async.capture.tensors import Owner, Sources, TensorCollector, gather, host_address
from ciuic_async.format import jsontext
from ciuic_async.format.jsontext import Hole
from ciuic_async.format.manifest import Node, Tree
from ciuic_async.handoffs import CapturePlan


@dataclass(slots=True)
class _Remembered:
    """The structure of a state. ``values`` and those of ``levels`` follow the state, as does ``plan``.

    Attributes:
        rows: sources without what belongs to one state.
    """

    top_keys: tuple[list[Any], list[type]] | None
    levels: list[Level]
    columns: list[Columns]
    memory: Memory
    values: list[Node]
    plan: CapturePlan
    rows: Sources


class PlanCache:
    """``state_tree.flatten``, quicker for a state of the same structure as the last one. Not thread-safe.

    Plans of one structure share their ``memo``.

    Args:
        frozen: see ``TensorCollector``.
    """

    def __init__(self, frozen: Sequence[str] = ()) -> None:
        self._frozen = tuple(frozen)
        self._last: _Remembered | None = None

    def flatten(
        self,
        state: object,
        *,
        chunk_size_bytes: int,
        rng: object = None,
        trainable: frozenset[int] = frozenset(),
    ) -> Captured:
        """See ``state_tree.flatten``: the same content is planned, and the same errors are raised."""
        with _collector_paused():
            return self._flatten(state, chunk_size_bytes, rng, trainable)

    def _flatten(self, state: object, chunk_size_bytes: int, rng: object, trainable: frozenset[int]) -> Captured:
        last, self._last = self._last, None
        if last is not None and last.plan.chunk_size_bytes == chunk_size_bytes:
            try:
                captured = _Match(last).captured(state, rng, trainable)
            except Exception:  # whatever is wrong with the state, planning it from scratch says it better
                pass
            else:
                self._last = last
                return captured
        collector = TensorCollector(trainable, self._frozen)
        captured = flatten_into(collector, state, chunk_size_bytes, rng)
        try:
            self._last = _Builder(collector, captured).remembered(state, rng, trainable)
        except DifferentError:
            return captured
        return Captured(self._last.plan, captured.sources)


@contextmanager
def _collector_paused() -> Iterator[None]:
    """Keep Python from looking for garbage: planning makes many objects and no cycles, and is half as long without."""
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


# --- the same again ---------------------------------------------------------------------------------------------------


class _Match:
    """One comparison. What it finds changed is noted in ``remembered``, which is of no use when this raises."""

    def __init__(self, remembered: _Remembered) -> None:
        self._remembered = remembered
        self._changed = False
        self._leaves: list[torch.Tensor] = []
        self._hosts = dict(remembered.memory.static)

    def captured(self, state: object, rng: object, trainable: frozenset[int]) -> Captured:
        """The plan for ``state`` and where its bytes are now.

        Raises:
            Exception: it is not of the remembered structure.
        """
        last = self._remembered
        roots, top_keys = roots_of(state, rng)
        if top_keys != last.top_keys:
            raise DifferentError
        level_values = roots
        for depth, level in enumerate(last.levels):
            level_values = self._level(level, level_values, depth)
        if level_values:
            raise DifferentError
        sources = self._sources(trainable)
        if self._changed:
            last.plan = replace(last.plan, values=tuple(last.values))
        return Captured(last.plan, sources)

    def _level(self, level: Level, level_values: list[Any], depth: int) -> list[Any]:
        """Compare one level; the values of the next one."""
        if list(map(type, level_values)) != level.types:
            raise DifferentError
        maps = list(compress(level_values, level.maps))
        keys = list(chain.from_iterable(maps))
        if list(map(len, maps)) != level.map_sizes or list(map(type, keys)) != level.key_types or keys != level.keys:
            raise DifferentError
        ordered = [item for item in maps if type(item) is collections.OrderedDict]
        if list(map(has_metadata, ordered)) != level.metadata:
            raise DifferentError
        sequences = list(compress(level_values, level.sequences))
        if list(map(len, sequences)) != level.sequence_sizes:
            raise DifferentError
        self._leaves += compress(level_values, level.tensors)
        self._plain(level.exact, level_values, equality_is_exact=True)
        self._plain(level.bits, level_values, equality_is_exact=False)
        for special in level.opaque:
            self._opaque(special, level_values[special.position], depth)
        for special in level.hosted:
            self._hosted(special, level_values[special.position])
        return values_inside(maps, sequences, ordered)

    def _plain(self, plain: Plain, level_values: list[Any], *, equality_is_exact: bool) -> None:
        """Take over plain values that changed. Their types are known to be equal."""
        found = list(compress(level_values, plain.selectors))
        before, plain.values = plain.values, found
        if equality_is_exact and found == before:
            return
        for new, old, hole in zip(found, before, plain.holes, strict=True):
            if new is not old:
                self._change(hole, new, old)

    def _change(self, hole: int, new: Any, old: Any) -> None:
        node, before = values.encode_scalar(new), values.encode_scalar(old)
        if node == before:
            return
        # Another weight, or length, could have it stored in another way, or the containers around it.
        if hole == FIXED or is_long(new) or weight(node) != weight(before):
            raise DifferentError
        self._remembered.values[hole] = node
        self._changed = True

    def _opaque(self, special: Special, value: object, depth: int) -> None:
        found = flatten_plain(value, depth)
        if found is None or found[1] != special.weight:
            raise DifferentError
        current = special.node if special.hole == FIXED else self._remembered.values[special.hole]
        if jsontext.encode(found[0]) != jsontext.encode(current):
            if special.hole == FIXED:
                raise DifferentError
            self._remembered.values[special.hole] = found[0]
            self._changed = True

    def _hosted(self, special: Special, value: Any) -> None:
        node, data = hosted_bytes(value)
        if len(data) != special.size_bytes or node != special.node:
            raise DifferentError
        self._hosts[special.group] = data

    def _sources(self, trainable: frozenset[int]) -> Sources:
        """Where everything is now, if leaves share storages as they did."""
        memory, rows = self._remembered.memory, self._remembered.rows
        storages: list[torch.UntypedStorage] = []
        found: list[int] = []
        for columns, (current, block, begins) in zip(self._remembered.columns, look_at(self._leaves), strict=True):
            if current != columns:
                raise DifferentError
            storages += block
            found += begins
        addresses = np.array(found, dtype=np.int64)
        if not memory.is_shared_alike(addresses):
            raise DifferentError
        if memory.trained_of(addresses, trainable) != memory.trained:
            raise DifferentError
        owners: list[Owner | None] = [*storages, None]
        pointers = np.append(addresses, 0)[memory.row_leaves] + rows.lows
        numbers = memory.row_leaves.copy()
        for row, leaf in memory.gathered:
            gathered = gather(self._leaves[leaf])
            pointers[row], numbers[row] = gathered.data_ptr(), len(owners)
            owners.append(gathered)
        for row, group in memory.hosted:
            data = self._hosts[group]
            pointers[row], numbers[row] = host_address(data), len(owners)
            owners.append(data)
        return replace(rows, owners=owners, owner_numbers=numbers, pointers=pointers)


# --- remembering ------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Item:
    """A value, its node, and where its form goes: into ``container[index]``."""

    value: Any
    node: Node
    container: Any
    index: Any


class _Builder:
    """Walks a state beside the plan that was just made of it."""

    def __init__(self, collector: TensorCollector, captured: Captured) -> None:
        self._collector = collector
        self._captured = captured
        self._values: list[Node] = []
        self._leaves: list[torch.Tensor] = []
        self._leaf_groups: list[int] = []
        self._static: dict[int, memoryview] = {}

    def remembered(self, state: object, rng: object, trainable: frozenset[int]) -> _Remembered:
        """What there is to remember.

        Raises:
            DifferentError: the state has something that is not remembered.
        """
        plan, sources = self._captured.plan, self._captured.sources
        roots, top_keys = roots_of(state, rng)
        forms: list[Node] = [None] * len(roots)
        items = [
            _Item(root, tree.node, forms, number)
            for number, (root, tree) in enumerate(zip(roots, plan.forms, strict=True))
        ]
        levels: list[Level] = []
        while items:
            level, items = self._level(items, len(levels))
            levels.append(level)
        blocks = list(look_at(self._leaves))
        columns = interned(block for block, _, _ in blocks)
        if any(any(block.negated) or any(block.conjugated) for block in columns):
            raise DifferentError
        addresses = np.array([begin for _, _, begins in blocks for begin in begins], dtype=np.int64)
        trees = tuple(Tree(tree.section, tree.key, form) for tree, form in zip(plan.forms, forms, strict=True))
        nothing = np.zeros(0, dtype=np.int64)
        return _Remembered(
            top_keys=top_keys,
            levels=levels,
            columns=columns,
            memory=self._memory(columns, addresses, trainable),
            values=self._values,
            plan=replace(plan, forms=trees, values=tuple(self._values)),
            rows=replace(sources, owners=(), owner_numbers=nothing, pointers=nothing),
        )

    def _level(self, items: list[_Item], depth: int) -> tuple[Level, list[_Item]]:
        level = empty_level([item.value for item in items])
        children: tuple[list[_Item], list[_Item], list[_Item]] = ([], [], [])
        for position, item in enumerate(items):
            value, kind = item.value, type(item.value)
            if kind in TENSORS:
                item.container[item.index] = item.node
                self._leaves.append(value)
                self._leaf_groups.append(item.node["tensor"])
            elif kind in MAPS or kind in SEQUENCES:
                if item.node is not SPILLED and type(item.node) is dict and "json" in item.node:
                    group = item.node["json"]
                    self._static[group] = _host(self._collector, group)
                    item.container[item.index] = item.node
                    item.node = SPILLED
                if kind in MAPS:
                    self._map(level, item, children[0], children[2])
                else:
                    self._sequence(level, item, children[1])
            elif kind is np.ndarray or is_long(value):
                item.container[item.index] = item.node
                node, data = hosted_bytes(value)
                group = item.node["numpy.array" if kind is np.ndarray else kind.__name__]
                level.hosted.append(Special(position, node, group=group, size_bytes=len(data)))
            elif kind in EXACT or kind in BITS:
                plain = level.exact if kind in EXACT else level.bits
                plain.values.append(value)
                plain.holes.append(self._hole(item))
            else:
                found = flatten_plain(value, depth)
                if found is None:
                    raise DifferentError
                level.opaque.append(Special(position, found[0], found[1], self._hole(item)))
        return level, [*children[0], *children[1], *children[2]]

    def _hole(self, item: _Item) -> int:
        """Take a plain value's node out of the form."""
        if item.node is SPILLED:
            return FIXED
        number = len(self._values)
        self._values.append(item.node)
        item.container[item.index] = Hole(number)
        return number

    def _map(self, level: Level, item: _Item, children: list[_Item], metadata: list[_Item]) -> None:
        value = item.value
        keys = list(value)
        if not KEYS.issuperset(map(type, keys)):
            raise DifferentError
        level.map_sizes.append(len(keys))
        level.keys += keys
        level.key_types += map(type, keys)
        tag = "dict" if type(value) is dict else "ordered_dict"
        spilled = item.node is SPILLED
        pairs = [[None, SPILLED]] * len(keys) if spilled else item.node[tag]
        forms = [[key, None] for key, _ in pairs]
        form: dict[str, Any] = {tag: forms}
        children += [
            _Item(child, node, pair, 1) for child, (_, node), pair in zip(value.values(), pairs, forms, strict=True)
        ]
        if tag == "ordered_dict":
            level.metadata.append(has_metadata(value))
            if level.metadata[-1]:
                node = SPILLED if spilled else item.node["metadata"]
                form["metadata"] = None
                metadata.append(_Item(vars(value)["_metadata"], node, form, "metadata"))
        if not spilled:
            item.container[item.index] = form

    def _sequence(self, level: Level, item: _Item, children: list[_Item]) -> None:
        level.sequence_sizes.append(len(item.value))
        forms: list[Node] = [None] * len(item.value)
        if item.node is SPILLED:
            nodes = [SPILLED] * len(forms)
        elif type(item.value) is list:
            nodes, item.container[item.index] = item.node, forms
        else:
            nodes, item.container[item.index] = item.node["tuple"], {"tuple": forms}
        children += [
            _Item(child, node, forms, number)
            for number, (child, node) in enumerate(zip(item.value, nodes, strict=True))
        ]

    def _memory(
        self, columns: list[Columns], addresses: np.ndarray[Any, np.dtype[np.int64]], trainable: frozenset[int]
    ) -> Memory:
        count = len(self._leaves)
        shapes = chain.from_iterable(block.shapes for block in columns)
        storage_bytes = list(chain.from_iterable(block.storage_bytes for block in columns))
        of_leaves = list(chain.from_iterable(block.devices for block in columns))
        live = [number for number, shape in enumerate(shapes) if 0 not in shape]
        numbers: dict[int, int] = {}  # of storages, by group
        first: list[int] = []
        widest: dict[int, int] = {}
        for leaf in live:
            group = self._leaf_groups[leaf]
            if group not in numbers:
                numbers[group] = len(first)
                first.append(leaf)
                widest[group] = leaf
            elif storage_bytes[leaf] > storage_bytes[widest[group]]:
                widest[group] = leaf
        devices = [of_leaves[leaf] for leaf in first]
        if not {"cpu", "cuda"}.issuperset(device.type for device in devices):
            raise DifferentError
        gathered, hosted, row_leaves = [], [], []
        for row, group in enumerate(self._captured.sources.groups.tolist()):
            leaf = count
            if group >= 0 and self._collector.groups[group].host is not None:
                hosted.append((row, group))
            elif group >= 0 and self._collector.groups[group].gathered:
                gathered.append((row, widest[group]))
            elif group >= 0:
                leaf = widest[group]
            row_leaves.append(leaf)
        memory = Memory(
            live=np.array(live, dtype=np.int64),
            storages=np.array([numbers[self._leaf_groups[leaf]] for leaf in live], dtype=np.int64),
            first=np.array(first, dtype=np.int64),
            devices=devices if len(set(devices)) > 1 else None,
            trained=[],
            row_leaves=np.array(row_leaves, dtype=np.int64),
            gathered=gathered,
            hosted=hosted,
            static=self._static,
        )
        if not memory.is_shared_alike(addresses):
            raise DifferentError  # memory without an address, which is never shared
        return replace(memory, trained=memory.trained_of(addresses, trainable))


def _host(collector: TensorCollector, group: int) -> memoryview:
    memory = collector.groups[group].host
    assert memory is not None
    return memory
