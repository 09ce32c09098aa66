"""Planning the same state again and again: what a training run does.

Between two snapshots training changes numbers, hardly ever the structure. ``PlanCache`` remembers the structure of the
last state: containers, keys and types level by level, and of every tensor what decides how it is stored. A state that
compares equal gets the same plan; live memory is resolved anew every time. Nothing that belongs to the state is
remembered, but for its plain values, which never change (numbers, strings).

Only containers with a tensor or an array somewhere inside are structure. A subtree of plain values is one value, a hole
of the plan, and may become any other: a history of losses grows. Most such values are *quiet*, they stay as they are,
and all of them are compared at once; *lively* ones changed lately, and are looked at one by one. A subtree that is
spilled (its JSON is stored outside the manifest) is structure again: its size decides where others are stored.

A wrong match would store wrong bytes, so every comparison is exact, and whatever this file does not know is planned
from scratch. It works in columns, one for each property and level: built-in functions walk them at a hundredth of a
microsecond for an item, where a loop of Python's own needs some.
"""

from __future__ import annotations

import gc
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain, compress
from typing import Any

import numpy as np
import torch

from ciuic_async.capture import values
from ciuic_async.capture.state_tree import Captured, flatten_into, flatten_plain, holds_reference, is_long
from ciuic_async.capture.structure import (
    EXACT,
    KEYS,
    MAPS,
    SEQUENCES,
    TENSORS,
    Columns,
    Containers,
    DifferentError,
    Hosted,
    Level,
    Memory,
    Place,
    QuietLevel,
    hosted_bytes,
    interned,
    is_quiet,
    look_at,
    quiet_levels,
    roots_of,
)
from ciuic_async.capture.tensors import Owner, Sources, TensorCollector, gather, host_address
from ciuic_async.format.jsontext import Hole
from ciuic_async.format.manifest import Node, Tree
from ciuic_async.handoffs import CapturePlan

CALM_SNAPSHOTS = 8
"""A lively value that stayed the same for so many snapshots is quiet again."""


@dataclass(slots=True)
class _Remembered:
    """The structure of a state. Values follow the state, as does ``plan``.

    Attributes:
        plain: what is known of plain values.
        spilled: what stays the same, and the places of others, each compared alone.
        rows: sources without what belongs to one state.
    """

    top_keys: tuple[list[Any], list[type]] | None
    levels: list[Level]
    columns: list[Columns]
    memory: Memory
    values: list[Node]
    plain: _PlainValues
    spilled: _SpilledValues
    plan: CapturePlan
    rows: Sources


@dataclass(slots=True)
class _PlainValues:
    """Plain values in order of their levels.

    Attributes:
        lively: by number, for how many snapshots each has not changed.
        quiet: which are not lively, for ``compress``.
        quiet_levels: what those were.
    """

    places: list[Place]
    lively: dict[int, int]
    quiet: bytes
    quiet_levels: list[QuietLevel]


@dataclass(slots=True)
class _SpilledValues:
    """Plain values that are stored outside the manifest, in order of their levels.

    Attributes:
        alone: numbers of those that are encoded to be compared.
        together: which are not, for ``compress``.
        together_levels: what those were.
    """

    places: list[Place]
    alone: list[int]
    together: bytes
    together_levels: list[QuietLevel]


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
        level_values, top_keys = roots_of(state, rng)
        if top_keys != last.top_keys:
            raise DifferentError
        plain: list[Any] = []
        spilled: list[Any] = []
        for level in last.levels:
            plain += compress(level_values, level.plain)
            spilled += compress(level_values, level.spilled)
            level_values = self._level(level, level_values)
        if level_values:
            raise DifferentError
        self._spilled(last.spilled, spilled)
        self._plain(last.plain, plain)
        sources = self._sources(trainable)
        if self._changed:
            last.plan = replace(last.plan, values=tuple(last.values))
        return Captured(last.plan, sources)

    def _level(self, level: Level, level_values: list[Any]) -> list[Any]:
        """Compare one level; the values of the next one."""
        if len(level_values) != level.count or list(map(type, compress(level_values, level.others))) != level.types:
            raise DifferentError
        inside = level.containers.matched(level_values)
        self._leaves += compress(level_values, level.tensors)
        for hosted in level.hosted:
            self._hosted(hosted, level_values[hosted.position])
        return inside

    def _spilled(self, known: _SpilledValues, found: list[Any]) -> None:
        if not is_quiet(known.together_levels, list(compress(found, known.together))):
            raise DifferentError
        for number in known.alone:
            place = known.places[number]
            flat = flatten_plain(found[number], place.depth)
            if flat is None or flat[1] != self._remembered.memory.static[place.group]:
                raise DifferentError

    def _plain(self, known: _PlainValues, found: list[Any]) -> None:
        """Take over plain values that changed.

        Containers around them hold tensors or arrays, so that however long they become, those are not spilled.
        """
        moved = False
        quiet = list(compress(found, known.quiet))
        looked_at = list(known.lively)
        if not is_quiet(known.quiet_levels, quiet):
            for number in compress(range(len(found)), known.quiet):
                if self._take(known.places[number], found[number]):
                    known.lively[number] = 0
                    moved = True
        for number in looked_at:
            if self._take(known.places[number], found[number]):
                known.lively[number] = 0
            else:
                known.lively[number] += 1
                if known.lively[number] == CALM_SNAPSHOTS and _can_be_quiet(found[number]):
                    del known.lively[number]
                    moved = True
        if moved:
            self._remembered.plain = _plain_values(known.places, found, known.lively)

    def _take(self, place: Place, value: object) -> bool:
        """Whether a plain value changed."""
        before = self._remembered.values[place.hole]
        if type(value) in EXACT or type(value) is float:
            if is_long(value):
                raise DifferentError
            node = values.encode_scalar(value)
            same = type(node) is type(before) and node == before
        else:
            flat = flatten_plain(value, place.depth)
            if flat is None or flat[1] is not None:
                raise DifferentError
            node = flat[0]
            # Python takes 1 and True for equal, also inside of nodes. They print differently.
            same = node == before and repr(node) == repr(before)
        if not same:
            self._remembered.values[place.hole] = node
            self._changed = True
        return not same

    def _hosted(self, hosted: Hosted, value: Any) -> None:
        node, data = hosted_bytes(value)
        if len(data) != hosted.size_bytes or node != hosted.node:
            raise DifferentError
        self._hosts[hosted.group] = data

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


def _can_be_quiet(value: object) -> bool:
    try:
        quiet_levels([value])
    except DifferentError:
        return False
    return True


def _split(found: list[Any], lively: Collection[int]) -> tuple[list[int], bytes, list[QuietLevel]]:
    """The numbers of those that must be looked at alone, which are not among them, and what those are.

    Args:
        lively: numbers that shall be.
    """
    try:
        quiet = bytes(number not in lively for number in range(len(found)))
        return sorted(lively), quiet, quiet_levels(list(compress(found, quiet)))
    except DifferentError:
        alone = {number for number, value in enumerate(found) if number in lively or not _can_be_quiet(value)}
    quiet = bytes(number not in alone for number in range(len(found)))
    return sorted(alone), quiet, quiet_levels(list(compress(found, quiet)))


def _plain_values(places: list[Place], found: list[Any], lively: dict[int, int]) -> _PlainValues:
    alone, quiet, levels = _split(found, lively)
    return _PlainValues(places, {number: lively.get(number, 0) for number in alone}, quiet, levels)


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
        self._plain: tuple[list[Place], list[Any]] = ([], [])
        self._spilled: tuple[list[Place], list[Any]] = ([], [])

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
            plain=_plain_values(*self._plain, {}),
            spilled=_SpilledValues(self._spilled[0], *_split(self._spilled[1], ())),
            plan=replace(plan, forms=trees, values=tuple(self._values)),
            rows=replace(sources, owners=(), owner_numbers=nothing, pointers=nothing),
        )

    def _level(self, items: list[_Item], depth: int) -> tuple[Level, list[_Item]]:
        kinds = [self._kind(item) for item in items]
        level_values = [item.value for item in items]

        def which(*wanted: str) -> bytes:
            return bytes(kind in wanted for kind in kinds)

        others = which("tensor", "hosted", "map", "sequence")
        level = Level(
            count=len(items),
            others=others,
            types=list(map(type, compress(level_values, others))),
            containers=Containers(which("map"), which("sequence")),
            tensors=which("tensor"),
            hosted=[],
            plain=which("plain"),
            spilled=which("spilled"),
        )
        level.containers.look(level_values)
        if not KEYS.issuperset(level.containers.key_types):
            raise DifferentError
        children: tuple[list[_Item], list[_Item], list[_Item]] = ([], [], [])
        for position, (item, kind) in enumerate(zip(items, kinds, strict=True)):
            if kind == "plain":
                self._hole(item, depth)
                continue
            if kind == "map":
                _map(item, children[0], children[2])
                continue
            if kind == "sequence":
                _sequence(item, children[1])
                continue
            item.container[item.index] = item.node
            if kind == "tensor":
                self._leaves.append(item.value)
                self._leaf_groups.append(item.node["tensor"])
            elif kind == "spilled":
                group = item.node["json"]
                self._static[group] = _host(self._collector, group)
                self._spilled[0].append(Place(depth, -1, group))
                self._spilled[1].append(item.value)
            else:
                node, data = hosted_bytes(item.value)
                tag = "numpy.array" if type(item.value) is np.ndarray else type(item.value).__name__
                level.hosted.append(Hosted(position, node, item.node[tag], len(data)))
        return level, [*children[0], *children[1], *children[2]]

    def _kind(self, item: _Item) -> str:
        kind = type(item.value)
        if kind in TENSORS:
            return "tensor"
        if kind is np.ndarray or is_long(item.value):
            return "hosted"
        if not holds_reference(item.node):
            return "plain"
        if type(item.node) is dict and "json" in item.node:
            return "spilled"
        if kind in MAPS:
            return "map"
        if kind in SEQUENCES:
            return "sequence"
        raise DifferentError

    def _hole(self, item: _Item, depth: int) -> None:
        """Take a plain value's node out of the form."""
        number = len(self._values)
        self._values.append(item.node)
        self._plain[0].append(Place(depth, number))
        self._plain[1].append(item.value)
        item.container[item.index] = Hole(number)

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


def _map(item: _Item, children: list[_Item], metadata: list[_Item]) -> None:
    value = item.value
    tag = "dict" if type(value) is dict else "ordered_dict"
    forms = [[key, None] for key, _ in item.node[tag]]
    form: dict[str, Any] = {tag: forms}
    children += [
        _Item(child, node, pair, 1)
        for child, (_, node), pair in zip(value.values(), item.node[tag], forms, strict=True)
    ]
    if "metadata" in item.node:
        form["metadata"] = None
        metadata.append(_Item(vars(value)["_metadata"], item.node["metadata"], form, "metadata"))
    item.container[item.index] = form


def _sequence(item: _Item, children: list[_Item]) -> None:
    forms: list[Node] = [None] * len(item.value)
    is_list = type(item.value) is list
    nodes = item.node if is_list else item.node["tuple"]
    item.container[item.index] = forms if is_list else {"tuple": forms}
    children += [
        _Item(child, node, forms, number) for number, (child, node) in enumerate(zip(item.value, nodes, strict=True))
    ]


def _host(collector: TensorCollector, group: int) -> memoryview:
    memory = collector.groups[group].host
    assert memory is not None
    return memory
