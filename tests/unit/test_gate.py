"""The gate: what it sees of optimizers, what a watch finds changed, and that nothing of it stays behind."""

from __future__ import annotations

import copy
import os
import pickle
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.optimizer import _global_optimizer_pre_hooks

from ciuic_async.staging.gate import Gate, Watch

ROWS = 200  # of 100 float32: 80 kB, above the limit below which tensors are copied at once


def _trained(make: Callable[[Any], torch.optim.Optimizer] = torch.optim.AdamW) -> tuple[Any, Any]:
    """A module and an optimizer that made a step."""
    torch.manual_seed(0)
    module = nn.Linear(100, ROWS)
    optimizer = make(module.parameters())
    _step(module, optimizer)
    return module, optimizer


def _step(module: Any, optimizer: torch.optim.Optimizer) -> None:
    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss: torch.Tensor = module(torch.ones(2, 100)).square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    if isinstance(optimizer, torch.optim.LBFGS):
        optimizer.step(closure)  # type: ignore[no-untyped-call]
    else:
        closure()
        optimizer.step()


@pytest.fixture
def arrivals() -> Iterator[tuple[Gate, list[str]]]:
    """An open gate, and the names of threads that came to it."""
    names: list[str] = []
    gate = Gate(lambda: names.append(threading.current_thread().name))
    gate.open()
    yield gate, names
    gate.close()


# --- the hook ---------------------------------------------------------------------------------------------------------


def test_the_gate_comes_before_the_change(arrivals: tuple[Gate, list[str]]) -> None:
    """When the gate is reached the optimizer has changed nothing; afterwards it has, fused too."""
    module = nn.Linear(100, ROWS)
    optimizer = torch.optim.AdamW(module.parameters(), fused=True)
    before = module.weight.detach().clone()
    equal: list[bool] = []
    gate = Gate(lambda: equal.append(torch.equal(module.weight, before)))
    gate.open()
    _step(module, optimizer)
    gate.close()
    assert equal == [True]
    assert not torch.equal(module.weight, before)


def test_optimizers_are_seen_once_each_and_forgotten(arrivals: tuple[Gate, list[str]]) -> None:
    """take_seen() gives those that made a step since the last call, and keeps none alive."""
    gate, names = arrivals
    one, two = _trained(), _trained(torch.optim.SGD)
    _step(*one)
    assert len(names) == 3
    assert {id(optimizer) for optimizer in gate.take_seen()} == {id(one[1]), id(two[1])}
    assert gate.take_seen() == []
    _step(*one)
    del one
    assert gate.take_seen() == []


def test_steps_on_any_thread_are_seen(arrivals: tuple[Gate, list[str]]) -> None:
    """The gate is passed on the thread that makes the step."""
    _, names = arrivals
    thread = threading.Thread(target=_trained, name="another")
    thread.start()
    thread.join()
    assert names == ["another"]


def test_one_hook_serves_all_and_goes_with_the_last() -> None:
    """Several gates share one registration; it is removed when the last one closes, whatever the order."""
    before = len(_global_optimizer_pre_hooks)
    one, two = Gate(lambda: None), Gate(lambda: None)
    one.open()
    two.open()
    assert len(_global_optimizer_pre_hooks) == before + 1
    one.close()
    one.close()
    assert len(_global_optimizer_pre_hooks) == before + 1
    two.close()
    assert len(_global_optimizer_pre_hooks) == before


def test_loading_a_state_passes_the_gate_until_forgotten(arrivals: tuple[Gate, list[str]]) -> None:
    """load_state_dict of watched modules and optimizers finishes the copy first; the hooks leave no trace."""
    gate, names = arrivals
    module, optimizer = _trained()
    names.clear()
    gate.watch_loading([module, optimizer, {"plain": 1}])
    module.load_state_dict(module.state_dict())
    optimizer.load_state_dict(optimizer.state_dict())
    assert len(names) == 2
    twin = copy.deepcopy(module)  # with the hook on it
    assert pickle.loads(pickle.dumps(twin)).weight.shape == module.weight.shape
    gate.forget_loading()
    module.load_state_dict(module.state_dict())
    optimizer.load_state_dict(optimizer.state_dict())
    assert len(names) == 2
    assert not module._load_state_dict_pre_hooks
    assert not optimizer._optimizer_load_state_dict_pre_hooks


def test_a_wrapper_that_cannot_be_hooked_is_left_alone(arrivals: tuple[Gate, list[str]]) -> None:
    """An Optimizer subclass that never called its base's __init__ costs the hook, and nothing else."""

    class Hollow(torch.optim.Optimizer):
        def __init__(self) -> None:
            self.inner = 1

    gate, _ = arrivals
    gate.watch_loading([Hollow()])
    gate.forget_loading()
    assert gate.take_seen() == []


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of fork beside threads: that is what is tried
def test_a_forked_child_has_no_gates(arrivals: tuple[Gate, list[str]]) -> None:
    """The child's steps reach no gate of its parent, and the hook is gone there."""
    weight = nn.Parameter(torch.ones(3))  # small: OpenMP's threads do not survive a fork
    optimizer = torch.optim.SGD([weight])
    _, names = arrivals
    pid = os.fork()
    if pid == 0:
        status = 9
        try:
            optimizer.step()
            status = len(names) + len(_global_optimizer_pre_hooks)
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    optimizer.step()
    assert len(names) == 1


# --- what a watch takes -----------------------------------------------------------------------------------------------


def _anywhere(device: torch.device) -> bool:
    return True


EAGER: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "state that is no tensors": lambda parameters: torch.optim.LBFGS(parameters, max_iter=2),
    "capturable": lambda parameters: torch.optim.AdamW(parameters, capturable=True),
    "differentiable": lambda parameters: torch.optim.SGD(parameters, differentiable=True),
}


@pytest.mark.parametrize("name", EAGER)
def test_optimizers_of_another_kind_are_not_watched(name: str) -> None:
    """Nothing of an optimizer that may change tensors in other ways is copied later."""
    module = nn.Linear(100, ROWS)
    optimizer = EAGER[name](module.parameters())
    if name == "state that is no tensors":
        _step(module, optimizer)
    assert Watch([optimizer], _anywhere).storages == frozenset()


def test_small_tensors_and_other_devices_are_not_watched() -> None:
    """Below 64 KiB, or on a device where it does not pay, tensors are copied at once."""
    module, optimizer = _trained()
    moments = [optimizer.state[module.weight][name] for name in ("exp_avg", "exp_avg_sq")]
    watch = Watch([optimizer], _anywhere)
    assert watch.storages == {tensor.untyped_storage().data_ptr() for tensor in (module.weight, *moments)}
    assert watch.tensors == {id(tensor) for tensor in (module.weight, *moments)}
    assert watch.optimizers == [optimizer]
    assert Watch([optimizer], lambda device: False).storages == frozenset()


def test_what_is_not_kept_is_forgotten() -> None:
    """Changes of tensors that the snapshot does not hold tear nothing."""
    module, optimizer = _trained()
    watch = Watch([optimizer], _anywhere)
    watch.keep([optimizer.state[module.weight]["exp_avg"].untyped_storage().data_ptr()])
    with torch.no_grad():
        module.weight.mul_(2)
    assert watch.torn() is None
    optimizer.state[module.weight]["exp_avg"].mul_(2)
    assert watch.torn() == "state 'exp_avg' of a parameter of AdamW was changed in place"


# --- what a watch finds -----------------------------------------------------------------------------------------------


def _in_place(module: Any, optimizer: Any) -> None:
    with torch.no_grad():
        module.weight.clamp_(-0.01, 0.01)


def _through_a_view(module: Any, optimizer: Any) -> None:
    module.weight.detach()[3].zero_()


def _foreach(module: Any, optimizer: Any) -> None:
    with torch.no_grad():
        torch._foreach_mul_([module.weight], 2.0)


def _moment(module: Any, optimizer: Any) -> None:
    optimizer.state[module.weight]["exp_avg_sq"].zero_()


def _resized(module: Any, optimizer: Any) -> None:
    module.weight.untyped_storage().resize_(1 << 20)


CHANGES = {change.__name__: change for change in (_in_place, _through_a_view, _foreach, _moment, _resized)}


@pytest.mark.parametrize("name", CHANGES)
def test_changed_bytes_are_found(name: str) -> None:
    """Whatever torch operation changed them, and through which tensor."""
    module, optimizer = _trained()
    watch = Watch([optimizer], _anywhere)
    assert watch.changed() is None
    assert watch.torn() is None
    CHANGES[name](module, optimizer)
    assert watch.changed() is not None
    assert watch.torn() is not None


def _new_memory(module: Any, optimizer: Any) -> None:
    module.weight.data = module.weight.detach().clone()


def _other_dtype(module: Any, optimizer: Any) -> None:
    module.half()


def _new_state(module: Any, optimizer: Any) -> None:
    optimizer.state[module.weight]["exp_avg"] = optimizer.state[module.weight]["exp_avg"].clone()


def _loaded_state(module: Any, optimizer: Any) -> None:
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def _no_state(module: Any, optimizer: Any) -> None:
    optimizer.state.clear()


def _other_parameter(module: Any, optimizer: Any) -> None:
    optimizer.param_groups[0]["params"][0] = nn.Parameter(module.weight.detach().clone())


SWAPS = {
    change.__name__: change
    for change in (_new_memory, _other_dtype, _new_state, _loaded_state, _no_state, _other_parameter)
}


@pytest.mark.parametrize("name", SWAPS)
def test_replaced_tensors_are_found_and_the_old_ones_kept(name: str) -> None:
    """A swap is torn, and is no change of bytes: the memory that is being copied stays alive and as it was."""
    module, optimizer = _trained()
    old = module.weight.detach().clone()
    watch = Watch([optimizer], _anywhere)
    (record,) = [record for records in watch._records.values() for record in records if record.tensor is module.weight]
    SWAPS[name](module, optimizer)
    assert watch.torn() is not None
    assert watch.changed() is None
    assert torch.equal(record.alias, old)


def test_forward_and_backward_change_nothing() -> None:
    """Gradients may come and go."""
    module, optimizer = _trained()
    watch = Watch([optimizer], _anywhere)
    module(torch.ones(2, 100)).sum().backward()
    optimizer.zero_grad()
    assert watch.torn() is None
