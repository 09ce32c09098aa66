"""The optimizer gate: what is still being copied is finished before an optimizer changes it.

One hook in a process sees every step of every ``torch.optim.Optimizer``, before it changes anything (fused, foreach and
compiled ones too); it is there as long as a ``Gate`` is open. ``Watch`` remembers what the tensors of such optimizers
were, so that the gate can tell whether something else changed them meanwhile: PyTorch counts in-place changes, but only
after they happened, so the question is asked on the thread that would make them. docs/overlap.md names the writers that
leave no trace.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Hashable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from ciuic_async.format.manifest import PACK_LIMIT_BYTES

_Key = tuple[str, int, Hashable]
"""Where an optimizer holds a tensor: ("parameter", index, group) or ("state", id of the parameter, name)."""

_gates: list[Gate] = []
_mutex = threading.RLock()  # guards `_hook`; reentrant, for garbage collection may close a gate at any moment
_hook: RemovableHandle | None = None


class Gate:
    """One user of the hook.

    Args:
        finish: called on any thread that is about to change tensors: an optimizer's, or one that loads a state. It must
            not raise, and return when the tensors may change.
    """

    def __init__(self, finish: Callable[[], None]) -> None:
        self._finish = finish
        self._owner_pid = os.getpid()
        self._seen: dict[int, weakref.ref[Optimizer]] = {}
        self._loading: list[RemovableHandle] = []

    def open(self) -> None:
        """Begin to see optimizers."""
        global _hook
        with _mutex:
            _gates.append(self)
            if _hook is None:
                _hook = register_optimizer_step_pre_hook(_before_step)

    def close(self) -> None:
        """See no more; the last one that closes removes the hook. Idempotent."""
        global _hook
        self.forget_loading()
        with _mutex:
            if self in _gates:
                _gates.remove(self)
            if not _gates and _hook is not None:
                _hook.remove()
                _hook = None

    def take_seen(self) -> list[Optimizer]:
        """The optimizers that made a step since the last call of this."""
        seen, self._seen = self._seen, {}
        return [optimizer for reference in list(seen.values()) if (optimizer := reference()) is not None]

    def watch_loading(self, objects: Iterable[object]) -> None:
        """Finish also before modules and optimizers among ``objects`` load a state, until ``forget_loading``."""
        for value in objects:
            if not isinstance(value, torch.nn.Module | Optimizer):
                continue
            with suppress(Exception):  # a wrapper that is none inside; without the hook a change is found all the same
                self._loading.append(value.register_load_state_dict_pre_hook(_before_load))

    def forget_loading(self) -> None:
        """Remove what ``watch_loading`` left at the objects. Never called while one of them loads."""
        while self._loading:
            self._loading.pop().remove()

    def _arrive(self, optimizer: Optimizer | None) -> None:
        if os.getpid() != self._owner_pid:
            return  # a forked child: its tensors are its own, the copy is its parent's
        if optimizer is not None:
            self._seen[id(optimizer)] = weakref.ref(optimizer)
        self._finish()


def _before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    for gate in tuple(_gates):
        gate._arrive(optimizer)


def _before_load(*_: Any) -> None:
    """Stands at a module only until the next call of its checkpointer: modules are pickled with their hooks."""
    for gate in tuple(_gates):
        gate._arrive(None)


def _forget_parent() -> None:
    """In a forked child: the parent's gates are no business of ours, and its lock may be held for ever."""
    global _mutex, _hook
    _mutex = threading.RLock()
    _gates.clear()
    if _hook is not None:
        _hook.remove()
        _hook = None


os.register_at_fork(after_in_child=_forget_parent)


@dataclass(frozen=True, slots=True)
class _Record:
    """A tensor as it was when its copy began.

    ``alias`` keeps the memory alive and shares its counter of in-place changes, whatever becomes of ``tensor``.
    """

    optimizer: Optimizer
    key: _Key
    tensor: torch.Tensor
    alias: torch.Tensor
    version: int
    pointer: int
    storage_bytes: int

    @property
    def name(self) -> str:
        kind, first, second = self.key
        what = f"parameter {first} of group {second}" if kind == "parameter" else f"state {second!r} of a parameter"
        return f"{what} of {type(self.optimizer).__name__}"


class Watch:
    """Tensors of optimizers that may be copied while training goes on.

    Left out, and so copied at once, are: optimizers that keep state in other things than tensors and numbers (LBFGS),
    are ``capturable`` (a CUDA graph replays without any hook) or ``differentiable``; and tensors below 64 KiB, whose
    copy costs less than watching them.

    Args:
        optimizers: those whose steps the gate sees.
        devices: whether tensors of a device are copied later at all.
    """

    def __init__(self, optimizers: Iterable[Optimizer], devices: Callable[[torch.device], bool]) -> None:
        self._records: dict[int, list[_Record]] = {}  # by address of the storage
        for optimizer in optimizers:
            for key, tensor in (_belongings(optimizer) or {}).items():
                storage = tensor.untyped_storage()
                if storage.nbytes() >= PACK_LIMIT_BYTES and devices(tensor.device):
                    address = storage.data_ptr()
                    record = _Record(
                        optimizer, key, tensor, tensor.detach(), tensor._version, tensor.data_ptr(), storage.nbytes()
                    )
                    self._records.setdefault(address, []).append(record)

    @property
    def storages(self) -> frozenset[int]:
        """Addresses of the storages."""
        return frozenset(self._records)

    @property
    def tensors(self) -> frozenset[int]:
        """Identities of the tensors."""
        return frozenset(id(record.tensor) for records in self._records.values() for record in records)

    @property
    def optimizers(self) -> list[Optimizer]:
        """Whose tensors these are."""
        found = {id(record.optimizer): record.optimizer for records in self._records.values() for record in records}
        return list(found.values())

    def keep(self, storages: Iterable[int]) -> None:
        """Forget all but these storages."""
        wanted = set(storages)
        self._records = {address: records for address, records in self._records.items() if address in wanted}

    def changed(self) -> str | None:
        """Which tensor's bytes changed, as text; None when none did.

        An optimizer or module may hold other tensors by now: the ones that were recorded are kept.
        """
        for records in self._records.values():
            for record in records:
                alias = record.alias
                if alias._version != record.version:
                    return f"{record.name} was changed in place"
                if alias.data_ptr() != record.pointer or alias.untyped_storage().nbytes() != record.storage_bytes:
                    return f"the memory of {record.name} was resized"
        return None

    def torn(self) -> str | None:
        """Like ``changed``, but what was replaced counts as changed too: who replaces may have written as well."""
        if reason := self.changed():
            return reason
        held = {id(optimizer): _belongings(optimizer) or {} for optimizer in self.optimizers}
        for records in self._records.values():
            for record in records:
                tensor = held[id(record.optimizer)].get(record.key)
                if tensor is not record.tensor:
                    return f"{record.name} is another tensor now"
                if (
                    tensor.data_ptr() != record.pointer
                    or tensor.dtype != record.alias.dtype
                    or tensor.shape != record.alias.shape
                    or tensor._version != record.version
                ):
                    return f"{record.name} got other memory"
        return None


def _belongings(optimizer: Optimizer) -> dict[_Key, torch.Tensor] | None:
    """The tensors an optimizer changes, by where it holds them; None if it works in another way than in place."""
    found: dict[_Key, torch.Tensor] = {}
    for number, group in enumerate(optimizer.param_groups):
        if group.get("capturable") or group.get("differentiable"):
            return None
        for index, parameter in enumerate(group["params"]):
            found["parameter", index, number] = parameter
    for parameter, entries in optimizer.state.items():
        if not isinstance(parameter, torch.Tensor) or not isinstance(entries, Mapping):
            return None
        for name, value in entries.items():
            if isinstance(value, torch.Tensor):
                found["state", id(parameter), name] = value
            elif not (value is None or isinstance(value, bool | int | float | str)):
                return None
    return {
        key: tensor
        for key, tensor in found.items()
        if type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.layout == torch.strided
    }
