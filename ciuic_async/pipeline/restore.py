"""From a resolved snapshot back to values: whole trees (``load_tree``) or live training objects (``restore_objects``).

The mirror image of saving: read -> decode -> check digest -> place -> inflate. Fitting is checked for everything before
the first byte is placed; model tensors are filled in place, other objects get their state one at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch

from ciuic_async.capture import training
from ciuic_async.capture.state_tree import Inflater, decode_plain, tensor_node
from ciuic_async.capture.tensors import DTYPES, empty, flat_bytes
from ciuic_async.errors import IntegrityError, NotFoundError, TargetMismatchError, UsageError
from ciuic_async.events import Listener
from ciuic_async.format.manifest import SECTION_RNG, SECTION_STATE, TOP_DICT, Manifest, Node, Tree
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
            try:
                self._loaded[index] = empty(stored.shape, DTYPES[stored.dtype], self._device)
            except RuntimeError as error:  # out of memory: torch says so with a RuntimeError
                raise MemoryError(f"{where}: cannot allocate a tensor of {stored.size_bytes} bytes: {error}") from error
            if stored.size_bytes:
                targets[index] = flat_bytes(self._loaded[index], 0, stored.size_bytes)
        read_tensors(self._store, self._resolved, targets, verify=self._verify, listener=self._listener)
        inflater = Inflater(tensors, self._loaded.__getitem__)
        return [inflater.value(node, where) for node in nodes]

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
    result = dict(zip(keys, loader.inflate(nodes, "state"), strict=True))
    if len(result) != len(keys):
        raise IntegrityError("manifest: two items of the state have one key", kind="malformed_node", where="manifest")
    return result


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
    owners: dict[int, int] = {}
    fits = [
        _fit(name, saved[name], state[name], resolved.manifest, problems, owners) for name in state if name in saved
    ]
    if problems and strict:
        listed = "\n  ".join(problems[:50]) + (f"\n  ... and {len(problems) - 50} more" if len(problems) > 50 else "")
        raise TargetMismatchError(
            f"snapshot {resolved.entry.snapshot} does not fit, nothing was changed "
            f"(strict=False loads what fits):\n  {listed}"
        )
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


def _fit(name: str, tree: Tree, target: Any, manifest: Manifest, problems: list[str], owners: dict[int, int]) -> _Fit:
    """Compare one name with its live object without changing anything.

    Args:
        problems: differences are added here.
        owners: which stored tensor fills the live memory at an address; shared by all names.
    """
    fit = _Fit(name, tree)
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
        problem = _tensor_problem(path, node, tensor, manifest)
        if problem is None and fit.names[key] in live:
            index, view, _, _ = tensor_node(node, manifest.tensors, path)
            in_place = view is None and tensor.is_contiguous() and tensor.device.type in ("cpu", "cuda")
            if in_place and owners.setdefault(tensor.data_ptr(), index) != index:
                problem = f"{path}: shares its memory with another entry in the model, but not in the snapshot"
            elif in_place:
                fit.in_place[key] = (index, live[fit.names[key]])
        if problem is not None:
            problems.append(problem)
            del fit.names[key]
    return fit


def _tensor_problem(path: str, node: Node, current: Any, manifest: Manifest) -> str | None:
    """Why the saved ``node`` does not fit what a model has under that name now."""
    saved = isinstance(node, dict) and "tensor" in node
    if saved != isinstance(current, torch.Tensor):
        return f"{path}: {'a' if saved else 'no'} tensor in the snapshot, {type(current).__qualname__} in the model"
    if not saved or training.unmaterialized(current):
        return None
    index, view, _, _ = tensor_node(node, manifest.tensors, path)
    stored = manifest.tensors[index]
    dtype, shape = (stored.dtype, stored.shape) if view is None else (view[0], view[1])
    if tuple(current.shape) != tuple(shape):
        return f"{path}: shape {list(shape)} in the snapshot, {list(current.shape)} in the model"
    if current.dtype != DTYPES[dtype]:
        return f"{path}: dtype {dtype} in the snapshot, {str(current.dtype).removeprefix('torch.')} in the model"
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
