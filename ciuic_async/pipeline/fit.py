"""Does a snapshot fit live objects? Every difference is found before anything changes.

Names are paired across wrappers, shapes and dtypes compared, entries that share memory must share it in the snapshot
too, and optimizers and plain trees are looked into as far as their tensors are concerned. What a plain tree shares with
something else now, and did not when it was saved, gets memory of its own: a ``best`` that begins as the model itself.
"""

from __future__ import annotations

import math
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from ciuic_async.capture import training, values
from ciuic_async.capture.state_tree import MAX_DEPTH, decode_plain, tensor_node
from ciuic_async.capture.tensors import DTYPES, View
from ciuic_async.format.manifest import Manifest, Node, Tree

REUSED_BYTES = 64 << 10
"""Smaller tensors are not worth looking at: their memory is found at once."""

NOT_LOOKED_UP = -1


@dataclass(slots=True)
class Fit:
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
class LiveEntry:
    """Memory that a module's entry, a plain tree's or an optimizer's tensor occupies, and what the snapshot has for it.

    ``low`` and ``high`` are addresses; ``saved_view`` looks into the stored tensor ``index``, its offset in bytes.
    ``index`` of an optimizer's is ``NOT_LOOKED_UP``.
    """

    fit: Fit
    key: str
    tensor: torch.Tensor
    low: int
    high: int
    index: int
    saved_view: View
    plain: bool = False


@dataclass(slots=True)
class Live:
    """What is found of all objects' memory while they are compared with the snapshot.

    ``twice``: by ``id`` the live tensors, arrays, dicts and lists of plain trees that are at several places for which
    different things were saved, and whether they are filled already: only the first place may keep them.
    """

    entries: list[LiveEntry] = field(default_factory=list)
    twice: dict[int, bool] = field(default_factory=dict)
    places: dict[int, tuple[Any, Node]] = field(default_factory=dict)

    def visit(self, live: Any, node: Node) -> None:
        """A dict, list or array of a plain tree, and what was saved for this place."""
        _, before = self.places.setdefault(id(live), (live, node))
        if before is not node and before != node:
            self.twice[id(live)] = False


def fit_object(name: str, tree: Tree, target: Any, manifest: Manifest, problems: list[str], found_live: Live) -> Fit:
    """Compare one name with its live object without changing anything.

    Args:
        problems: differences are added here.
        found_live: the live memory is added here, for ``drop_overlaps``.
    """
    fit = Fit(name, tree)
    if not training.is_stateful(target):
        problems += _plain_problems(name, tree.node, target, manifest, fit, found_live)
        return fit
    if isinstance(target, torch.optim.Optimizer):
        found = _optimizer_problems(name, tree.node, target)
        problems += found
        fit.fits = not found
        found_live.entries += _optimizer_entries(fit, target)
    if not isinstance(target, torch.nn.Module):
        return fit
    items = state_dict_items(tree.node)
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
            found_live.entries += _live_entry(fit, key, live[fit.names[key]], index, view)
    return fit


def _live_entry(
    fit: Fit, key: str, tensor: torch.Tensor, index: int, view: View | None, plain: bool = False
) -> list[LiveEntry]:
    """The memory of one entry; none for one that has none."""
    low = 0 if training.unmaterialized(tensor) or not tensor.numel() else tensor.data_ptr()
    if not low:
        return []
    if view is None:  # the stored tensor itself, contiguous
        shape = tuple(tensor.shape)
        view = (str(tensor.dtype), shape, tuple(math.prod(shape[number + 1 :]) for number in range(len(shape))), 0)
    last = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    return [LiveEntry(fit, key, tensor, low, low + (last + 1) * tensor.element_size(), index, view, plain)]


def _optimizer_entries(fit: Fit, optimizer: torch.optim.Optimizer) -> Iterator[LiveEntry]:
    """The tensors of its state, which may be read into as they are (``reusable_state``)."""
    for values_of_one in optimizer.state.values():
        for value in values_of_one.values() if isinstance(values_of_one, dict) else ():
            if type(value) is torch.Tensor:
                yield from _live_entry(fit, "", value, NOT_LOOKED_UP, None)


def drop_overlaps(live: Live) -> list[str]:
    """Take out of their fits the entries whose live memory is another's too, where the snapshot has two values for it.

    The later one would overwrite a part of the earlier one, and both would look restored. Plain trees are no problem:
    there one of both gets new memory (``live.twice``).
    """
    entries = live.entries
    bad: set[int] = set()
    around: list[int] = []  # entries that reach beyond where the current one begins
    for number in sorted(range(len(entries)), key=lambda number: entries[number].low):
        entry = entries[number]
        around = [other for other in around if entries[other].high > entry.low]
        for other in around:
            if not (entry.plain or entries[other].plain) and NOT_LOOKED_UP in (entry.index, entries[other].index):
                continue
            if _contradict(entries[other], entry):
                if entry.plain or entries[other].plain:
                    _part(live.twice, *(entries[each] for each in sorted((number, other))))
                else:
                    bad.add(max(number, other))
        around.append(number)
    for entry in (entries[number] for number in sorted(bad)):
        del entry.fit.names[entry.key]
        entry.fit.in_place.pop(entry.key, None)
    return [
        f"{entries[number].fit.name}.{entries[number].key}: shares its memory with another entry in the model, "
        "but not in the snapshot"
        for number in sorted(bad)
    ]


def _part(twice: dict[int, bool], first: LiveEntry, second: LiveEntry) -> None:
    """Let one of two entries that are one memory now, and were not when they were saved, have memory of its own."""
    if first.plain and second.plain and first.tensor is second.tensor:
        twice.setdefault(id(first.tensor), False)
    else:
        twice[id(second.tensor if second.plain else first.tensor)] = True


def _contradict(one: LiveEntry, other: LiveEntry) -> bool:
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


def _share_elements(one: LiveEntry, other: LiveEntry) -> bool:
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


def _plain_problems(
    path: str, node: Node, live: Any, manifest: Manifest, fit: Fit, found_live: Live, depth: int = 0
) -> Iterator[str]:
    """Live tensors and arrays of a plain tree that the snapshot cannot fill where they are.

    Plain values are replaced by what was saved, and so is what lies in a set or deque: none of that is a difference.
    A saved tensor in a place where there is none now comes as a new one.
    """
    if isinstance(live, torch.Tensor):
        problem = _tensor_problem(path, node, live, manifest, "the live state")
        if problem is not None:
            yield problem
            return
        index, view, _, _ = tensor_node(node, manifest.tensors, path)
        found_live.entries += _live_entry(fit, path, live, index, view, plain=True)
    elif isinstance(live, np.ndarray):
        found_live.visit(live, node)
        yield from _array_problem(path, node, live)
    elif depth < MAX_DEPTH:  # a deeper one, or one that contains itself, was never saved
        if isinstance(live, dict | list):
            found_live.visit(live, node)
        for key, value, saved in _paired(node, live):
            yield from _plain_problems(f"{path}.{key}", saved, value, manifest, fit, found_live, depth + 1)


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


def reusable_state(
    name: str, node: Node, optimizer: torch.optim.Optimizer, manifest: Manifest
) -> dict[int, torch.Tensor]:
    """Live state tensors by the stored tensor that may be read into their memory, so that no other need be found.

    Finding memory for moments takes as long as reading them. Only tensors that would come back just as they are: whole,
    plain, contiguous, and alone in their memory.
    """
    saved, live = _item(node, "state"), optimizer.state_dict().get("state")
    if not isinstance(saved, dict) or not isinstance(saved.get("dict"), list) or not isinstance(live, dict):
        return {}
    users = Counter(
        tensor.untyped_storage().data_ptr()
        for tensor in [
            *(parameter for group in optimizer.param_groups for parameter in group["params"]),
            *(value for values in live.values() if isinstance(values, dict) for value in values.values()),
        ]
        if type(tensor) in (torch.Tensor, torch.nn.Parameter) and not training.unmaterialized(tensor)
    )
    found: dict[int, torch.Tensor] = {}
    for pair in saved["dict"]:
        values = live.get(pair[0]) if isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], int) else None
        for key, tensor in (values if isinstance(values, dict) else {}).items():
            whole = (
                type(tensor) is torch.Tensor
                and tensor.device.type in ("cpu", "cuda")
                and tensor.is_contiguous()
                and not tensor.requires_grad
                and REUSED_BYTES <= tensor.nbytes == tensor.untyped_storage().nbytes()
                and users[tensor.untyped_storage().data_ptr()] == 1
            )
            part = _item(pair[1], key) if whole and isinstance(key, str) else None
            if not isinstance(part, dict) or "tensor" not in part:
                continue
            path = f"{name}.state.{pair[0]}.{key}"
            index, view, requires_grad, parameter = tensor_node(part, manifest.tensors, path)
            plain = view is None and not requires_grad and not parameter
            if plain and _tensor_problem(path, part, tensor, manifest, "the optimizer") is None:
                found.setdefault(index, tensor)
    return found


def _item(node: Node, key: str) -> Node:
    """One item of a dict's node; None when it is no dict or has no such item."""
    pairs = node.get("dict") if isinstance(node, dict) else None
    found = (item[1] for item in pairs or () if isinstance(item, list) and len(item) == 2 and item[0] == key)
    return next(found, None)


def state_dict_items(node: Node) -> dict[str, Node] | None:
    """The items of a saved module state_dict: string keys; None when it is not one."""
    if not isinstance(node, dict) or not isinstance(node.get("ordered_dict"), list):
        return None
    items = {}
    for item in node["ordered_dict"]:
        if not (isinstance(item, list) and len(item) == 2 and isinstance(item[0], str)):
            return None
        items[item[0]] = item[1]
    return items
