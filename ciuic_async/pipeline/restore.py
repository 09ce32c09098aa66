"""From a resolved snapshot back to values: whole trees (``load_tree``) or live training objects (``restore_objects``).

The mirror image of saving: read -> decode -> check digest -> place -> inflate. Fitting is checked for everything before
the first byte is placed; model tensors are filled in place, other objects get their state one at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch

from ciuic_async.capture import training, values
from ciuic_async.capture.state_tree import Inflater, decode_plain
from ciuic_async.capture.tensors import DTYPES, empty
from ciuic_async.errors import IntegrityError, NotFoundError, StoreError, TargetMismatchError, UsageError
from ciuic_async.events import Listener
from ciuic_async.format.manifest import SECTION_RNG, SECTION_STATE, TOP_DICT, Manifest, Node, StoredTensor, Tree, dotted
from ciuic_async.pipeline.commit import Resolved
from ciuic_async.pipeline.fit import Fit, Live, drop_overlaps, fit_object, reusable_state, state_dict_items
from ciuic_async.pipeline.placement import read_tensors
from ciuic_async.segments.scratch import prefer_huge_pages
from ciuic_async.stores.base import Store

REFERENCES = ("tensor", "numpy.array", "str", "bytes", "bytearray", "json")


class TensorLoader:
    """Reads the stored tensors that nodes refer to, all at once, then hands them out.

    Args:
        device: where stored tensors go.
        into: memory for some of them by index: contiguous tensors of their dtype and shape, each alone in its storage.
    """

    def __init__(
        self,
        store: Store,
        resolved: Resolved,
        device: str | torch.device,
        verify: bool,
        listener: Listener | None,
        into: Mapping[int, torch.Tensor] | None = None,
    ) -> None:
        self._store = store
        self._resolved = resolved
        self._device = device
        self._verify = verify
        self._listener = listener
        self._into = into or {}
        self._loaded: dict[int, torch.Tensor] = {}

    def inflate(self, nodes: Sequence[Node], where: str) -> list[Any]:
        """Values of several nodes; storages that they share among each other come back shared."""
        tensors = self._resolved.manifest.tensors
        wanted = {index for node in nodes for index in references(node, len(tensors))} - set(self._loaded)
        targets: dict[int, torch.Tensor] = {}
        for index in wanted:
            stored = tensors[index]
            self._loaded[index] = self._into[index] if index in self._into else self._allocate(stored)
            if stored.size_bytes:
                targets[index] = self._loaded[index]
        read_tensors(self._store, self._resolved, targets, verify=self._verify, listener=self._listener)
        inflater = Inflater(tensors, self._loaded.__getitem__)
        return [inflater.value(node, where) for node in nodes]

    def _allocate(self, stored: StoredTensor) -> torch.Tensor:
        try:
            tensor = empty(stored.shape, DTYPES[stored.dtype], self._device)
            if tensor.is_cpu:
                prefer_huge_pages(tensor.data_ptr(), stored.size_bytes)
            return tensor
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
    live = Live()
    fits = [
        fit_object(name, saved[name], state[name], resolved.manifest, problems, live) for name in state if name in saved
    ]
    problems += drop_overlaps(live)
    if problems and strict:
        listed = "\n  ".join(problems[:50]) + (f"\n  ... and {len(problems) - 50} more" if len(problems) > 50 else "")
        raise TargetMismatchError(
            f"snapshot {resolved.entry.snapshot} does not fit, nothing was changed "
            f"(strict=False loads what fits):\n  {listed}"
        )
    _check_plain_values(store, resolved, fits, listener)
    _place_models(store, resolved, fits, listener)
    for fit in fits:
        _load_rest(store, resolved, fit, state, live, strict, listener, problems)
    if rng:
        problems += _restore_rng(store, resolved, listener)
    return Restored(tuple(problems))


def _saved_trees(manifest: Manifest) -> dict[str, Tree]:
    if manifest.top != TOP_DICT:
        raise TargetMismatchError("the snapshot holds a single tree, not named objects: load it with Snapshot.load()")
    return {str(decode_plain(tree.key)): tree for tree in manifest.trees if tree.section == SECTION_STATE}


def _check_plain_values(store: Store, resolved: Resolved, fits: Sequence[Fit], listener: Listener | None) -> None:
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
            items = state_dict_items(fit.tree.node) or {}
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


def _place_models(store: Store, resolved: Resolved, fits: Sequence[Fit], listener: Listener | None) -> None:
    """Fill parameters and buffers in place. Tied ones are filled once; ties that no longer exist, each on its own."""
    targets: dict[int, torch.Tensor] = {}
    copies: list[tuple[torch.Tensor, torch.Tensor]] = []
    for fit in fits:
        for index, tensor in fit.in_place.values():
            first = targets.setdefault(index, tensor)
            if first.data_ptr() != tensor.data_ptr():
                copies.append((tensor, first))
    read_tensors(store, resolved, targets, listener=listener)
    for target, source in copies:
        target.copy_(source)


def _load_rest(
    store: Store,
    resolved: Resolved,
    fit: Fit,
    state: MutableMapping[str, Any],
    live: Live,
    strict: bool,
    listener: Listener | None,
    problems: list[str],
) -> None:
    """Everything that was not filled in place, through ``load_state_dict`` or by value."""
    target = state[fit.name]
    if not fit.fits:
        return
    into = None
    if isinstance(target, torch.optim.Optimizer):
        into = reusable_state(fit.name, fit.tree.node, target, resolved.manifest)
    loader = TensorLoader(store, resolved, "cpu", True, listener, into)
    if not fit.by_name:
        value = loader.inflate([fit.tree.node], fit.name)[0]
        if not training.is_stateful(target):
            _replace(state, fit.name, training.merge_plain(target, value, live.twice))
            return
        _load(target, value, fit.name, strict, problems)
        return
    items = state_dict_items(fit.tree.node)
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
