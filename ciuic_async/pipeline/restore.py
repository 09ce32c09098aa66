"""From a resolved snapshot back to values: whole trees (``load_tree``) or live training objects (``restore_objects``).

The mirror image of saving: read -> decode -> check digest -> place -> inflate. Fitting is checked for everything before
the first byte is placed; model tensors are filled in place, other objects get their state one at a time.
"""

from __future__ import annotations

import math
from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Iterator, MutableMapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import torch

from ciuic_async.capture import training, values
from ciuic_async.capture.state_tree import MAX_DEPTH, Inflater, decode_plain, tensor_node
from ciuic_async.capture.tensors import DTYPES, View, empty, flat_bytes
from ciuic_async.errors import IntegrityError, NotFoundError, StoreError, TargetMismatchError, UsageError
from ciuic_async.events import Listener
from ciuic_async.format.manifest import SECTION_RNG, SECTION_STATE, TOP_DICT, Manifest, Node, StoredTensor, Tree, dotted
from ciuic_async.pipeline.commit import Resolved
from ciuic_async.pipeline.placement import read_tensors
from ciuic_async.stores.base import Store

REFERENCES = ("tensor", "numpy.array", "str", "bytes", "bytearray", "json")


class TensorLoader:
    """Reads the stored tensors that nodes refer to, all at once, then hands them out.

    Args:
        device: where stored tensors go.
    """

    def __init__(
        self, store: Store, resolved: Resolved, device: str | torch.device, verify: bool, listener: Listener | None
    ) -> None:
        self._store = store
        self._resolved = resolved
        self._device = device
        self._verify = verify
        self._listener = listener
        self._loaded: dict[int, torch.Tensor] = {}

    def inflate(self, nodes: Sequence[Node], where: str) -> list[Any]:
        """Values of several nodes; storages that they share among each other come back shared."""
        tensors = self._resolved.manifest.tensors
        wanted = {index for node in nodes for index in references(node, len(tensors))} - set(self._loaded)
        targets: dict[int, torch.Tensor] = {}
        for index in wanted:
            stored = tensors[index]
            self._loaded[index] = self._allocate(stored)
            if stored.size_bytes:
                targets[index] = flat_bytes(self._loaded[index], 0, stored.size_bytes)
        read_tensors(self._store, self._resolved, targets, verify=self._verify, listener=self._listener)
        inflater = Inflater(tensors, self._loaded.__getitem__)
        return [inflater.value(node, where) for node in nodes]

    def _allocate(self, stored: StoredTensor) -> torch.Tensor:
        try:
            return empty(stored.shape, DTYPES[stored.dtype], self._device)
        except (RuntimeError, MemoryError) as error:  # torch says that memory is out with a RuntimeError
            name = dotted(stored.path)
            raise StoreError(
                f"snapshot {self._resolved.entry.snapshot}: tensor {name}: cannot allocate its "
                f"{stored.size_bytes} bytes on {self._device}: {str(error)[:300]}; free memory, or use only=",
                kind="out_of_memory",
                where=name,
            ) from error

    def forget(self) -> None:
        """Drop what was loaded; values made from it keep their memory."""
        self._loaded.clear()


def references(node: Node, count: int) -> Iterator[int]:
    """Indices of the stored tensors that a node needs."""
    stack = [node]
    while stack:
        current = stack.pop()
        if isinstance(current, list):
            stack.extend(current)
        elif isinstance(current, dict):
            for name in REFERENCES:
                index = current.get(name)
                if type(index) is int:
                    if not 0 <= index < count:
                        raise IntegrityError(
                            f"manifest: refers to tensor {index}, there are {count}", kind="malformed_node"
                        )
                    yield index
            stack.extend(current.values())


# --- whole trees ------------------------------------------------------------------------------------------------------


def load_tree(
    store: Store,
    resolved: Resolved,
    *,
    only: Sequence[str] | None = None,
    map_location: str | torch.device = "cpu",
    verify: bool = True,
    listener: Listener | None = None,
) -> Any:
    """The captured state as it was handed over.

    Args:
        only: patterns over dotted paths, e.g. ``"model.*"`` or ``"model"``: of dicts only matching items come back, and
            only their bytes are read.

    Raises:
        NotFoundError: ``only`` matches nothing.
    """
    trees = [tree for tree in resolved.manifest.trees if tree.section == SECTION_STATE]
    loader = TensorLoader(store, resolved, map_location, verify, listener)
    if resolved.manifest.top != TOP_DICT:
        node = trees[0].node if only is None else select(trees[0].node, only, "")
        if node is _NOTHING:
            raise _nothing_matches(only)
        return loader.inflate([node], "state")[0]
    keys = [decode_plain(tree.key) for tree in trees]
    nodes = [tree.node for tree in trees]
    if only is not None:
        chosen = [(key, select(node, only, str(key))) for key, node in zip(keys, nodes, strict=True)]
        keys = [key for key, node in chosen if node is not _NOTHING]
        nodes = [node for _, node in chosen if node is not _NOTHING]
        if not nodes:
            raise _nothing_matches(only)
    try:
        distinct = len(set(keys))
    except TypeError as error:
        raise values.malformed(f"an item of the state has a key that cannot be one: {error}") from None
    if distinct != len(keys):
        raise values.malformed("two items of the state have one key")
    return dict(zip(keys, loader.inflate(nodes, "state"), strict=True))


_NOTHING: Any = object()
_DICT_TAGS = ("dict", "ordered_dict", "default_dict")


def select(node: Node, only: Sequence[str], path: str) -> Node:
    """``node`` reduced to what the patterns match; ``_NOTHING`` when that is nothing.

    Patterns reach into dicts; lists, tuples and other containers come back whole or not at all.
    """
    if path and any(fnmatchcase(path, pattern) for pattern in only):
        return node
    tag = next((tag for tag in _DICT_TAGS if isinstance(node, dict) and isinstance(node.get(tag), list)), None)
    if tag is None:
        return _NOTHING
    kept = []
    for item in node[tag]:
        if not isinstance(item, list) or len(item) != 2:
            raise IntegrityError("manifest: a dict's item is no pair", kind="malformed_node", where="manifest")
        step = item[0] if isinstance(item[0], str | int) else "?"
        value = select(item[1], only, f"{path}.{step}" if path else str(step))
        if value is not _NOTHING:
            kept.append([item[0], value])
    return {**node, tag: kept} if kept else _NOTHING


def _nothing_matches(only: Sequence[str] | None) -> NotFoundError:
    return NotFoundError(f"only={list(only or ())}: no path of the state matches", kind="no_such_path")


# --- live objects -----------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Fit:
    """What will happen to one name: saved names to live ones, and model tensors that are filled in place.

    ``fits``: it can be loaded at all. ``by_name``: a module, whose entries are paired one by one.
    """

    name: str
    tree: Tree
    fits: bool = True
    by_name: bool = False
    names: dict[str, str] = field(default_factory=dict)
    in_place: dict[str, tuple[int, torch.Tensor]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _LiveEntry:
    """Memory that a module's entry occupies, and what the snapshot has for it.

    ``low`` and ``high`` are addresses; ``saved_view`` looks into the stored tensor ``index``, its offset in bytes.
    """

    fit: _Fit
    key: str
    tensor: torch.Tensor
    low: int
    high: int
    index: int
    saved_view: View


@dataclass(frozen=True, slots=True)
class Restored:
    """What a restore did: differences that ``strict=False`` let pass."""

    mismatches: tuple[str, ...]


def restore_objects(
    store: Store,
    resolved: Resolved,
    state: MutableMapping[str, Any],
    *,
    strict: bool,
    rng: bool,
    listener: Listener | None = None,
) -> Restored:
    """Put a snapshot into live objects.

    Args:
        state: the objects by name; plain values that cannot change in place are replaced in this mapping.
        strict: every difference is an error; else what fits is loaded and the rest reported.
        rng: also restore the random generators, last.

    Raises:
        TargetMismatchError: lists every difference; nothing was changed.
        IntegrityError: damage; objects may hold a mixture of old and restored state and must be restored again.
    """
    saved = _saved_trees(resolved.manifest)
    problems = [f"{name}: not in the snapshot" for name in state if name not in saved]
    problems += [f"{name}: in the snapshot, but not in the state to restore" for name in saved if name not in state]
    entries: list[_LiveEntry] = []
    fits = [
        _fit(name, saved[name], state[name], resolved.manifest, problems, entries) for name in state if name in saved
    ]
    problems += _drop_overlaps(entries)
    if problems and strict:
        listed = "\n  ".join(problems[:50]) + (f"\n  ... and {len(problems) - 50} more" if len(problems) > 50 else "")
        raise TargetMismatchError(
            f"snapshot {resolved.entry.snapshot} does not fit, nothing was changed "
            f"(strict=False loads what fits):\n  {listed}"
        )
    _check_plain_values(store, resolved, fits, listener)
    _place_models(store, resolved, fits, listener)
    for fit in fits:
        _load_rest(store, resolved, fit, state, strict, listener, problems)
    if rng:
        problems += _restore_rng(store, resolved, listener)
    return Restored(tuple(problems))


def _saved_trees(manifest: Manifest) -> dict[str, Tree]:
    if manifest.top != TOP_DICT:
        raise TargetMismatchError("the snapshot holds a single tree, not named objects: load it with Snapshot.load()")
    return {str(decode_plain(tree.key)): tree for tree in manifest.trees if tree.section == SECTION_STATE}


def _fit(
    name: str, tree: Tree, target: Any, manifest: Manifest, problems: list[str], entries: list[_LiveEntry]
) -> _Fit:
    """Compare one name with its live object without changing anything.

    Args:
        problems: differences are added here.
        entries: the live memory of modules is added here, for ``_drop_overlaps``.
    """
    fit = _Fit(name, tree)
    if not training.is_stateful(target):
        problems += _plain_problems(name, tree.node, target, manifest)
        return fit
    if isinstance(target, torch.optim.Optimizer):
        found = _optimizer_problems(name, tree.node, target)
        problems += found
        fit.fits = not found
    if not isinstance(target, torch.nn.Module):
        return fit
    items = _state_dict_items(tree.node)
    live = training.live_tensors(target)
    if items is None or live is None:
        return fit
    current = target.state_dict()
    fit.by_name = True
    fit.names = training.match_names(list(items), list(current))
    paired = set(fit.names.values())
    problems += [f"{name}.{key}: missing in the snapshot" for key in current if key not in paired]
    problems += [f"{name}.{key}: unexpected, the model has no such entry" for key in items if key not in fit.names]
    for key, node in items.items():
        if key not in fit.names or key.rpartition(".")[2] == "_extra_state":  # what a module says of itself: any value
            continue
        path = f"{name}.{key}"
        tensor = current[fit.names[key]]
        problem = _tensor_problem(path, node, tensor, manifest, "the model")
        if problem is not None:
            problems.append(problem)
            del fit.names[key]
        elif fit.names[key] in live:
            index, view, _, _ = tensor_node(node, manifest.tensors, path)
            if view is None and tensor.is_contiguous() and tensor.device.type in ("cpu", "cuda"):
                fit.in_place[key] = (index, live[fit.names[key]])
            entries += _live_entry(fit, key, live[fit.names[key]], index, view)
    return fit


def _live_entry(fit: _Fit, key: str, tensor: torch.Tensor, index: int, view: View | None) -> list[_LiveEntry]:
    """The memory of one entry; none for one that has none."""
    low = 0 if training.unmaterialized(tensor) or not tensor.numel() else tensor.data_ptr()
    if not low:
        return []
    if view is None:  # the stored tensor itself, contiguous
        shape = tuple(tensor.shape)
        view = (str(tensor.dtype), shape, tuple(math.prod(shape[number + 1 :]) for number in range(len(shape))), 0)
    last = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    return [_LiveEntry(fit, key, tensor, low, low + (last + 1) * tensor.element_size(), index, view)]


def _drop_overlaps(entries: Sequence[_LiveEntry]) -> list[str]:
    """Take out of their fits the entries whose live memory is another's too, where the snapshot has two values for it.

    The later one would overwrite a part of the earlier one, and both would look restored.
    """
    bad: set[int] = set()
    around: list[int] = []  # entries that reach beyond where the current one begins
    for number in sorted(range(len(entries)), key=lambda number: entries[number].low):
        entry = entries[number]
        around = [other for other in around if entries[other].high > entry.low]
        bad.update(max(number, other) for other in around if _contradict(entries[other], entry))
        around.append(number)
    for entry in (entries[number] for number in sorted(bad)):
        del entry.fit.names[entry.key]
        entry.fit.in_place.pop(entry.key, None)
    return [
        f"{entries[number].fit.name}.{entries[number].key}: shares its memory with another entry in the model, "
        "but not in the snapshot"
        for number in sorted(bad)
    ]


def _contradict(one: _LiveEntry, other: _LiveEntry) -> bool:
    """Whether two entries whose address ranges meet were not saved as they lie: one memory, at the same distance."""
    if one.tensor.device != other.tensor.device:
        return False
    tied_live = one.low == other.low and _layout(one.tensor) == _layout(other.tensor)
    if one.index == other.index:
        if tied_live and one.saved_view == other.saved_view:
            return False  # tied then and now: the layout may have changed for both
        same_distance = other.low - one.low == other.saved_view[3] - one.saved_view[3]
        if same_distance and all(_layout(e.tensor) == _strides(*e.saved_view[1:3]) for e in (one, other)):
            return False
    return tied_live or _share_elements(one, other)


def _layout(tensor: torch.Tensor) -> tuple[tuple[int, int], ...]:
    return _strides(tuple(tensor.shape), tensor.stride())


def _strides(shape: Sequence[int], stride: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """Sizes with their strides; the stride of a dimension of one element means nothing."""
    return tuple((size, step) for size, step in zip(shape, stride, strict=True) if size != 1)


def _share_elements(one: _LiveEntry, other: _LiveEntry) -> bool:
    """Whether two entries have a byte in common. The columns of one matrix lie between each other and have none."""
    if one.tensor.is_contiguous() and other.tensor.is_contiguous():
        return True
    size = one.tensor.element_size()
    expanded = any(step == 0 for entry in (one, other) for _, step in _layout(entry.tensor))
    if expanded or other.tensor.element_size() != size or (other.low - one.low) % size:
        return True  # too rare to look closer; refusing is safe
    low = min(one.low, other.low)
    used = torch.zeros((max(one.high, other.high) - low) // size, dtype=torch.bool)
    used.as_strided(one.tensor.shape, one.tensor.stride(), (one.low - low) // size).fill_(True)
    return bool(used.as_strided(other.tensor.shape, other.tensor.stride(), (other.low - low) // size).any())


def _plain_problems(path: str, node: Node, live: Any, manifest: Manifest, depth: int = 0) -> Iterator[str]:
    """Live tensors and arrays of a plain tree that the snapshot cannot fill where they are.

    Plain values are replaced by what was saved, and so is what lies in a set or deque: none of that is a difference.
    A saved tensor in a place where there is none now comes as a new one.
    """
    if isinstance(live, torch.Tensor):
        problem = _tensor_problem(path, node, live, manifest, "the live state")
        if problem is not None:
            yield problem
    elif isinstance(live, np.ndarray):
        yield from _array_problem(path, node, live)
    elif depth < MAX_DEPTH:  # a deeper one, or one that contains itself, was never saved
        for key, value, saved in _paired(node, live):
            yield from _plain_problems(f"{path}.{key}", saved, value, manifest, depth + 1)


def _array_problem(path: str, node: Node, live: np.ndarray[Any, Any]) -> Iterator[str]:
    if not isinstance(node, dict) or "numpy.array" not in node:
        yield f"{path}: no array in the snapshot, one in the live state"
    elif node.get("shape") != list(live.shape):
        yield f"{path}: shape {str(node.get('shape'))[:80]} in the snapshot, {list(live.shape)} in the live state"
    elif node.get("dtype") != live.dtype.str:
        yield f"{path}: dtype {str(node.get('dtype'))[:80]} in the snapshot, {live.dtype.str} in the live state"


_LIVE_TAGS: dict[type, str] = {dict: "dict", OrderedDict: "ordered_dict", defaultdict: "default_dict"}


def _paired(node: Node, live: Any) -> Iterator[tuple[Any, Any, Node]]:
    """Items of a live container: key, value, and the saved node there. None: nothing saved, or another container."""
    fields = node if isinstance(node, dict) else {}
    if isinstance(live, dict):
        pairs = fields.get(_LIVE_TAGS.get(type(live), ""))
        saved = _by_key(pairs) if isinstance(pairs, list) else {}
        for key, value in live.items():
            yield key, value, saved.get(key)
    elif isinstance(live, list | tuple):
        items: Node = None
        if isinstance(live, list):
            items = node
        elif type(live) is tuple:
            items = fields.get("tuple")
        elif fields.get("fields") == list(getattr(live, "_fields", ())):
            items = fields.get("namedtuple")
        known = items if isinstance(items, list) else []
        for number, value in enumerate(live):
            yield number, value, known[number] if number < len(known) else None


def _by_key(pairs: Iterable[Node]) -> dict[Any, Node]:
    try:
        return {decode_plain(key): value for key, value in pairs}
    except (TypeError, ValueError) as error:  # no pairs, or a key that cannot be one
        raise values.malformed(f"a dict's items are not pairs: {str(error)[:200]}") from None


def _tensor_problem(path: str, node: Node, current: Any, manifest: Manifest, here: str) -> str | None:
    """Why the saved ``node`` does not fit what is there now. ``here`` says in messages where that is."""
    saved = isinstance(node, dict) and "tensor" in node
    if saved != isinstance(current, torch.Tensor):
        return f"{path}: {'a' if saved else 'no'} tensor in the snapshot, {type(current).__qualname__} in {here}"
    if not saved or training.unmaterialized(current):
        return None
    index, view, _, _ = tensor_node(node, manifest.tensors, path)
    stored = manifest.tensors[index]
    dtype, shape = (stored.dtype, stored.shape) if view is None else (view[0], view[1])
    if tuple(current.shape) != tuple(shape):
        return f"{path}: shape {list(shape)} in the snapshot, {list(current.shape)} in {here}"
    if current.dtype != DTYPES[dtype]:
        return f"{path}: dtype {dtype} in the snapshot, {str(current.dtype).removeprefix('torch.')} in {here}"
    return None


def _optimizer_problems(name: str, node: Node, optimizer: torch.optim.Optimizer) -> list[str]:
    """Groups of parameters that differ in number: ``Optimizer.load_state_dict`` would refuse, after models changed."""
    groups = _item(node, "param_groups")
    if not isinstance(groups, list):
        return []  # a layout of its own
    if len(groups) != len(optimizer.param_groups):
        return [
            f"{name}: {len(groups)} parameter groups in the snapshot, {len(optimizer.param_groups)} in the optimizer"
        ]
    problems = []
    for number, (group, live) in enumerate(zip(groups, optimizer.param_groups, strict=True)):
        saved = _item(group, "params")
        if isinstance(saved, list) and len(saved) != len(live["params"]):
            problems.append(
                f"{name}.param_groups.{number}: {len(saved)} parameters in the snapshot, "
                f"{len(live['params'])} in the optimizer"
            )
    return problems


def _item(node: Node, key: str) -> Node:
    """One item of a dict's node; None when it is no dict or has no such item."""
    pairs = node.get("dict") if isinstance(node, dict) else None
    found = (item[1] for item in pairs or () if isinstance(item, list) and len(item) == 2 and item[0] == key)
    return next(found, None)


def _state_dict_items(node: Node) -> dict[str, Node] | None:
    """The items of a saved module state_dict: string keys; None when it is not one."""
    if not isinstance(node, dict) or not isinstance(node.get("ordered_dict"), list):
        return None
    items = {}
    for item in node["ordered_dict"]:
        if not (isinstance(item, list) and len(item) == 2 and isinstance(item[0], str)):
            return None
        items[item[0]] = item[1]
    return items


def _check_plain_values(store: Store, resolved: Resolved, fits: Sequence[_Fit], listener: Listener | None) -> None:
    """Decode every plain value that will be needed, long documents too: what cannot be is known before a model changes.

    Raises:
        NotFoundError: an enum whose module is not loaded.
        IntegrityError: a malformed node, or damage to a long document.
    """
    for fit in fits:
        if not fit.fits:
            continue
        documents: list[Node] = []
        stack: list[Node] = [fit.tree.node]
        if fit.by_name:
            items = _state_dict_items(fit.tree.node) or {}
            stack = [{**fit.tree.node, "ordered_dict": []}, *(node for key, node in items.items() if key in fit.names)]
        while stack:
            node = stack.pop()
            if isinstance(node, list):
                stack.extend(node)
            elif isinstance(node, dict) and "json" in node:
                documents.append(node)
            elif isinstance(node, dict) and values.decode_scalar(node) is values.NOT_PLAIN:
                stack.extend(node.values())
        TensorLoader(store, resolved, "cpu", True, listener).inflate(documents, fit.name)


def _place_models(store: Store, resolved: Resolved, fits: Sequence[_Fit], listener: Listener | None) -> None:
    """Fill parameters and buffers in place. Tied ones are filled once; ties that no longer exist, each on its own."""
    targets: dict[int, torch.Tensor] = {}
    copies: list[tuple[torch.Tensor, torch.Tensor]] = []
    for fit in fits:
        for index, tensor in fit.in_place.values():
            start = int(tensor.storage_offset()) * tensor.element_size()
            flat = flat_bytes(tensor, start, start + tensor.numel() * tensor.element_size())
            first = targets.setdefault(index, flat)
            if first.data_ptr() != flat.data_ptr():
                copies.append((flat, first))
    read_tensors(store, resolved, targets, listener=listener)
    for target, source in copies:
        target.copy_(source)


def _load_rest(
    store: Store,
    resolved: Resolved,
    fit: _Fit,
    state: MutableMapping[str, Any],
    strict: bool,
    listener: Listener | None,
    problems: list[str],
) -> None:
    """Everything that was not filled in place, through ``load_state_dict`` or by value."""
    target = state[fit.name]
    if not fit.fits:
        return
    loader = TensorLoader(store, resolved, "cpu", True, listener)
    if not fit.by_name:
        value = loader.inflate([fit.tree.node], fit.name)[0]
        if not training.is_stateful(target):
            _replace(state, fit.name, training.merge_plain(target, value))
            return
        _load(target, value, fit.name, strict, problems)
        return
    items = _state_dict_items(fit.tree.node)
    assert items is not None
    rest = [key for key in items if key in fit.names and key not in fit.in_place]
    loaded = dict(zip(rest, loader.inflate([items[key] for key in rest], fit.name), strict=True))
    whole = loader.inflate([{**fit.tree.node, "ordered_dict": []}], fit.name)[0]  # with its _metadata
    for key in items:
        if key in fit.names:
            whole[key] = fit.in_place[key][1] if key in fit.in_place else loaded[key]
    _load(target, training.renamed(whole, fit.names), fit.name, strict, problems)


def _load(target: Any, value: Any, name: str, strict: bool, problems: list[str]) -> None:
    try:
        training.load_object(target, value, name, strict=strict)
    except TargetMismatchError as error:
        if strict:
            raise
        problems.append(str(error))


def _replace(state: MutableMapping[str, Any], name: str, value: Any) -> None:
    if state[name] is value:
        return
    try:
        state[name] = value
    except TypeError as error:
        raise UsageError(
            f"{name}: a plain value that cannot change in place, in a state mapping that cannot either; use a dict"
        ) from error


def _restore_rng(store: Store, resolved: Resolved, listener: Listener | None) -> list[str]:
    trees = [tree for tree in resolved.manifest.trees if tree.section == SECTION_RNG]
    if not trees:
        return ["the snapshot holds no random number states (it was saved with rng=False)"]
    value = TensorLoader(store, resolved, "cpu", True, listener).inflate([trees[0].node], "rng")[0]
    try:
        return training.restore_rng(value)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise IntegrityError(f"the saved random number states cannot be used: {error}", kind="bad_rng") from error
