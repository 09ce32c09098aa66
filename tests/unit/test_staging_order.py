"""Staging sees exactly what was queued on an asynchronous device before it, and nothing queued after.

The device here is a stand-in with the worst manners a real one may have: work that was queued happens only when
somebody waits, streams overtake each other whenever no event forbids it, and every copy has a stream of its own. The
two broken variants leave one wait out: what holds for the right device must fail for them, or it would prove nothing.
"""

from __future__ import annotations

import random
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pytest
import torch

from ciuic_async import Checkpointer
from ciuic_async.capture.state_tree import flatten
from ciuic_async.staging.device import Copy, CpuDevice, CudaDevice, Pending
from ciuic_async.staging.stager import stage


class Event:
    """Something that happens once; background threads may wait for it."""

    def __init__(self) -> None:
        self._set = threading.Event()

    @property
    def happened(self) -> bool:
        return self._set.is_set()

    def happen(self) -> None:
        self._set.set()

    def sleep_until(self) -> None:
        assert self._set.wait(60), "a copy that a background thread waits for never happens"


@dataclass
class Work:
    """Something a stream does, once the event it waits for has happened."""

    action: Callable[[], object]
    after: Event | None = None


class LateDevice:
    """Queued work is done one piece at a time, in an order that ``choose`` draws from what events allow.

    Args:
        choose: given how many streams could go on, which one does.
        sees_the_past: copies wait for what training queued before (leaving this out is a bug).
        waits_for_copies: ``wait`` returns when the copies are done (leaving this out is a bug).
        orders_training: ``order`` lets the training stream wait for the copies (leaving this out is a bug).
    """

    def __init__(
        self,
        choose: Callable[[int], int],
        *,
        sees_the_past: bool = True,
        waits_for_copies: bool = True,
        orders_training: bool = True,
    ) -> None:
        self._choose = choose
        self._orders_training = orders_training
        self._sees_the_past = sees_the_past
        self._waits_for_copies = waits_for_copies
        self._compute: deque[Work] = deque()
        self._streams: list[deque[Work]] = [self._compute]

    def launch(self, kernel: Callable[[], object]) -> None:
        """Training queues a kernel on its stream."""
        self._compute.append(Work(kernel))

    def copy(self, copies: Sequence[Copy]) -> Pending:
        ready = Event()
        self._compute.append(Work(ready.happen))
        done = []
        for target, source in copies:
            finished = Event()
            stream = deque([Work(lambda t=target, s=source: t.copy_(s), ready if self._sees_the_past else None)])  # type: ignore[misc]
            stream.append(Work(finished.happen))
            self._streams.append(stream)
            done.append(finished)
        return _Waiting(self, done if self._waits_for_copies else [])

    def begin(self, copies: Sequence[Copy]) -> Pending:
        return self.copy(copies)

    def order(self, events: Sequence[Event]) -> None:
        """What training queues from now on waits for the events; the host does not."""
        if self._orders_training:
            self._compute.extend(Work(Event().happen, event) for event in events)

    def pin(self, memory: torch.Tensor) -> bool:
        return False

    def unpin(self, memory: torch.Tensor) -> None:
        """Nothing to undo."""

    def do_one(self) -> bool:
        """One piece of work, on any stream that may go on; False when there is none."""
        able = [s for s in self._streams if s and (s[0].after is None or s[0].after.happened)]
        if not able:
            return False
        able[self._choose(len(able))].popleft().action()
        return True

    def synchronize(self) -> None:
        while self.do_one():
            pass


@dataclass
class _Waiting:
    device: LateDevice
    events: list[Event]

    def wait(self) -> None:
        if threading.current_thread() is not threading.main_thread():  # the device is driven by one thread alone
            for event in self.events:
                event.sleep_until()
        while not all(event.happened for event in self.events):
            assert self.device.do_one(), "a copy waits for ever"

    def order(self) -> bool:
        self.device.order(self.events)
        return all(event.happened for event in self.events)

    def advance(self) -> bool:
        self.wait()
        return False


class OneDevice:
    """Every tensor lives on the late device."""

    def __init__(self, device: LateDevice) -> None:
        self.device = device

    def of(self, device: torch.device) -> LateDevice:
        return self.device

    def for_pinning(self) -> LateDevice:
        return self.device


ORDERS: dict[str, Callable[[int], Callable[[int], int]]] = {
    "compute first": lambda seed: lambda count: 0,
    "copies first": lambda seed: lambda count: count - 1,
    "any": lambda seed: random.Random(seed).randrange,
}


def _staged_value_is_right(device: LateDevice) -> bool:
    """Queue writes, stage, queue more writes, let everything happen; whether the slot holds the first ones only."""
    tensors = [torch.zeros(20_000) for _ in range(3)]
    captured = flatten({"t": tensors}, chunk_size_bytes=1 << 20)
    payload = torch.full((captured.plan.size_bytes,), 0x7F, dtype=torch.uint8)
    for value in (1.0, 2.0):
        for tensor in tensors:
            device.launch(lambda t=tensor, v=value: t.fill_(v))  # type: ignore[misc]
    stage(captured.sources, payload, 0, captured.plan.size_bytes, OneDevice(device))
    for tensor in tensors:
        device.launch(lambda t=tensor: t.fill_(3.0))  # type: ignore[misc]
    device.synchronize()
    assert all(bool((tensor == 3).all()) for tensor in tensors), "training itself is in order"
    return all(
        bool((payload[region.address :][: region.size_bytes].view(torch.float32) == 2).all())
        for region in captured.plan.regions
    )


@pytest.mark.parametrize("order", ORDERS)
def test_staging_sees_what_was_queued_before_and_nothing_after(order: str) -> None:
    """In whatever order the device works, the slot holds the state of the call."""
    for seed in range(20):
        assert _staged_value_is_right(LateDevice(ORDERS[order](seed)))


@pytest.mark.parametrize("broken", ["sees_the_past", "waits_for_copies"])
def test_a_missing_wait_is_found_out(broken: str) -> None:
    """Without either wait some order gives a wrong slot: the test above would see it."""
    devices = [LateDevice(make(seed), **{broken: False}) for make in ORDERS.values() for seed in range(20)]
    assert not all(_staged_value_is_right(device) for device in devices)


@dataclass
class Piece:
    """A part of the address space that lives somewhere (``stager.Source``)."""

    address: int
    flat: torch.Tensor

    @property
    def size_bytes(self) -> int:
        return self.flat.numel()


class Refusing(CpuDevice):
    """A device that is full."""

    def copy(self, copies: Sequence[Copy]) -> Pending:
        raise RuntimeError("out of memory")


@dataclass
class LateThenRefusing:
    """Host tensors live on the late device, the others on one that refuses."""

    late: LateDevice

    def of(self, device: torch.device) -> LateDevice | Refusing:
        return self.late if device.type == "cpu" else Refusing()


def test_nothing_is_copied_any_more_after_staging_failed() -> None:
    """When a later device's copy raises, the copies that run on earlier ones are waited for: the slot is reused."""
    late = LateDevice(lambda count: 0)
    payload = torch.zeros(300, dtype=torch.uint8)
    sources = [
        Piece(0, torch.full((100,), 1, dtype=torch.uint8)),
        Piece(100, torch.empty(100, dtype=torch.uint8, device="meta")),
    ]
    with pytest.raises(RuntimeError, match="out of memory"):
        stage(sources, payload, 0, 200, LateThenRefusing(late))
    payload.fill_(9)  # the slot's next user
    late.synchronize()
    assert bool((payload == 9).all())


class _BrokenWait:
    """Copies whose device broke meanwhile."""

    def __init__(self, error: str) -> None:
        self._error = error
        self.waited = 0

    def wait(self) -> None:
        self.waited += 1
        raise RuntimeError(self._error)

    def order(self) -> bool:
        return False

    def advance(self) -> bool:
        return False


@dataclass
class Breaking:
    """Two devices that take copies and break before they are complete."""

    pending: dict[str, _BrokenWait]

    def of(self, device: torch.device) -> Breaking:
        return Breaking({"": self.pending[device.type]})

    def copy(self, copies: Sequence[Copy]) -> Pending:
        return self.pending[""]

    def begin(self, copies: Sequence[Copy]) -> Pending:
        return self.copy(copies)

    def pin(self, memory: torch.Tensor) -> bool:
        return False

    def unpin(self, memory: torch.Tensor) -> None:
        """Nothing to undo."""


def test_the_first_error_is_the_one_that_is_raised() -> None:
    """Every device is waited for, also after a wait that failed, and later errors do not hide the first."""
    pending = {"cpu": _BrokenWait("first"), "meta": _BrokenWait("second")}
    sources = [
        Piece(0, torch.zeros(100, dtype=torch.uint8)),
        Piece(100, torch.empty(100, dtype=torch.uint8, device="meta")),
    ]
    with pytest.raises(RuntimeError, match="first"):
        stage(sources, torch.zeros(200, dtype=torch.uint8), 0, 200, Breaking(pending))
    assert pending["meta"].waited == 1


@dataclass
class CudaCalls:
    """What ``CudaDevice`` calls of torch.cuda, where there is no GPU: it notes calls, and refuses to pin."""

    calls: list[str] = field(default_factory=list)
    devices: list[torch.device] = field(default_factory=list)
    refuses_from: int = 0
    """Number of cudaHostRegister calls that work."""

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("device", "stream", "is_current_stream_capturing"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        for name in ("Stream", "Event", "current_stream", "cudart"):
            monkeypatch.setattr(torch.cuda, name, lambda *_, **__: self)
        zeros = torch.zeros

        def launch(size: int, device: torch.device) -> torch.Tensor:
            self._note("launch")
            return zeros(size)

        monkeypatch.setattr(torch, "zeros", launch)

    def is_current_stream_capturing(self) -> bool:
        return False

    def query(self) -> bool:
        self._note("query")
        return False

    def _note(self, call: str) -> None:
        self.calls.append(call)

    def device(self, device: torch.device) -> AbstractContextManager[None]:
        self.devices.append(device)
        return nullcontext()

    def stream(self, stream: object) -> AbstractContextManager[None]:
        return nullcontext()

    def record(self, stream: object) -> None:
        self._note("record")

    def wait_event(self, event: object) -> None:
        self._note("wait_event")

    def synchronize(self) -> None:
        self._note("synchronize")
        raise RuntimeError("the device is broken")

    def cudaHostRegister(self, address: int, size_bytes: int, flags: int) -> int:  # noqa: N802
        self._note("register")
        return 2 if self.calls.count("register") > self.refuses_from else 0

    def cudaHostUnregister(self, address: int) -> int:  # noqa: N802
        self._note("unregister")
        return 0


def test_a_gpu_whose_copy_cannot_be_queued_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies queued before the one that failed are complete when the error arrives, and it is that error."""
    cuda = CudaCalls()
    cuda.install(monkeypatch)
    good, short = torch.ones(100, dtype=torch.uint8), torch.ones(5, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="size of tensor"):
        CudaDevice(torch.device("cuda", 1)).copy([(torch.zeros_like(good), good), (torch.zeros_like(good), short)])
    assert cuda.calls == ["record", "wait_event", "synchronize"]


def test_the_gate_of_a_gpu_makes_the_stream_wait_and_not_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind queued copies ``order`` calls wait_event of the current stream and nothing that blocks."""
    cuda = CudaCalls()
    copies = [(torch.zeros(100, dtype=torch.uint8), torch.ones(100, dtype=torch.uint8))]
    cuda.install(monkeypatch)
    pending = CudaDevice(torch.device("cuda", 1)).begin(copies)
    assert cuda.calls == ["record", "wait_event", "record"]
    assert not pending.order()
    assert cuda.calls[3:] == ["wait_event", "query"]
    assert cuda.devices == [torch.device("cuda", 1)] * 2


def test_refused_pinning_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranges that were registered are undone, the thread's last error is cleared, all on the device itself."""

    class Small:
        pin_range_bytes = 100

    monkeypatch.setattr("ciuic_async.staging.device.STAGING", Small)
    memory = torch.empty(250, dtype=torch.uint8)
    second = torch.device("cuda", 1)
    refusing = CudaCalls(refuses_from=2)
    refusing.install(monkeypatch)
    assert not CudaDevice(second).pin(memory)
    assert refusing.calls == ["register"] * 3 + ["unregister"] * 2 + ["launch"]
    assert refusing.devices == [second]
    willing = CudaCalls(refuses_from=3)
    willing.install(monkeypatch)
    assert CudaDevice(second).pin(memory)
    CudaDevice(second).unpin(memory)
    assert willing.calls == ["register"] * 3 + ["unregister"] * 3
    assert willing.devices == [second] * 2


@pytest.mark.parametrize("host_memory_bytes", [None, 8 << 20], ids=["whole", "windows"])
def test_a_training_run_on_a_late_device(host_memory_bytes: int | None, tmp_path: Path) -> None:
    """Through the whole engine: every snapshot holds its own step, though training queues on without waiting."""
    device = LateDevice(random.Random(1).randrange)
    weight = torch.zeros(3_000_000)
    with Checkpointer(tmp_path / "chain", {"w": weight}, rng=False, host_memory_bytes=host_memory_bytes) as ckpt:
        ckpt._taker.devices = OneDevice(device)  # type: ignore[assignment]
        pendings = []
        for _ in range(4):
            for _ in range(3):
                device.launch(lambda: weight.add_(1))
            pendings.append(ckpt.save())
        device.launch(lambda: weight.fill_(-1))
        device.synchronize()
        for number, pending in enumerate(pendings):
            assert torch.equal(pending.wait_durable(60).load()["w"], torch.full_like(weight, 3.0 * (number + 1)))


# --- overlap: the gate orders training behind the copies --------------------------------------------------------------


class LateSGD(torch.optim.Optimizer):
    """An optimizer whose kernels are queued, and leave no trace in version counters, as fused ones."""

    def __init__(self, parameters: Iterable[torch.Tensor], device: LateDevice) -> None:
        super().__init__(parameters, {})
        self._device = device

    def step(self, closure: object = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                self._device.launch(lambda p=parameter: p.data.add_(1))  # type: ignore[misc]


def _overlapped_snapshots_are_right(device: LateDevice, folder: Path, *, finish: bool) -> bool:
    """Train with kernels queued far ahead of the device; whether every snapshot holds its own step.

    ``plain`` is changed by training right after save(): it is ordered without any gate.
    """
    weight, plain = torch.nn.Parameter(torch.zeros(60_000)), torch.zeros(60_000)
    optimizer = LateSGD([weight], device)
    pendings = []
    with Checkpointer(folder, {"w": {"w": weight, "p": plain}}, rng=False, staging="overlap", codec="raw") as ckpt:
        ckpt._taker.devices = OneDevice(device)  # type: ignore[assignment]
        for number in range(1, 4):
            optimizer.step()
            device.launch(partial(plain.fill_, number))
            pending = ckpt.save()
            assert pending.phase == "staging", "the host waits for nothing"
            device.launch(partial(plain.fill_, -1))
            optimizer.step()
            optimizer.step()
            if finish:
                device.synchronize()
            pendings.append(pending)
        optimizer.step()
        device.synchronize()
        loaded = [pending.wait_durable(60).load()["w"] for pending in pendings]
    assert bool((weight == 10).all()), "training itself is in order"
    return all(
        bool((state["w"] == 3 * number + 1).all() and (state["p"] == number + 1).all())
        for number, state in enumerate(loaded)
    )


@pytest.mark.parametrize("finish", [False, True], ids=["queued ahead", "in step"])
@pytest.mark.parametrize("order", ORDERS)
def test_the_gate_orders_training_behind_the_copies(order: str, finish: bool, tmp_path: Path) -> None:
    """Neither save() nor the gate waits on the host, and no kernel that is queued later reaches the snapshot."""
    for seed in range(3):
        device = LateDevice(ORDERS[order](seed))
        assert _overlapped_snapshots_are_right(device, tmp_path / str(seed), finish=finish)


def test_a_gate_that_orders_nothing_is_found_out(tmp_path: Path) -> None:
    """Without the stream's wait some order gives a wrong snapshot: the test above would see it."""
    devices = [LateDevice(make(1), orders_training=False) for make in ORDERS.values()]
    right = [
        _overlapped_snapshots_are_right(device, tmp_path / str(number), finish=True)
        for number, device in enumerate(devices)
    ]
    assert not all(right)
