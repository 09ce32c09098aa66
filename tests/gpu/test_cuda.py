"""On a real GPU: pinned slots, a side stream that waits for training's, round trips, and the device's generators."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ciuic_async import Checkpointer, SnapshotChain, load, save
from ciuic_async.options import STAGING
from ciuic_async.staging.device import CudaDevice, Devices
from ciuic_async.staging.slots import Slot
from tests.strategies import bits, fingerprint, sharing

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

CUDA = torch.device("cuda", 0)


@pytest.fixture
def slot() -> Iterator[Slot]:
    """64 MiB of pinned host memory."""
    torch.zeros(1, device=CUDA)
    slot = Slot(64 << 20)
    slot.touch(CudaDevice(CUDA))
    yield slot
    slot.close()


def _busy(work: torch.Tensor) -> None:
    """Queue kernels that keep the device busy for a good while."""
    for _ in range(50):
        torch.mm(work, work, out=work)
        work.clamp_(-1, 1)


def test_slots_are_pinned(slot: Slot) -> None:
    """A touched slot is page-locked: the driver says so."""
    assert slot.payload().is_pinned()
    slot.resize(80 << 20)
    assert not slot.payload().is_pinned(), "a new mapping has to be pinned anew"
    slot.touch(CudaDevice(CUDA))
    assert slot.payload().is_pinned()


def test_pinning_crosses_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies are split where one registered range ends and the next begins."""

    class Small:
        pin_range_bytes = 1 << 20

    monkeypatch.setattr("ciuic_async.staging.device.STAGING", Small)
    assert STAGING.pin_range_bytes == 1 << 30
    device = CudaDevice(CUDA)
    slot = Slot(5 << 20)
    slot.touch(device)
    source = torch.randint(0, 256, (4 << 20,), dtype=torch.uint8, device=CUDA)
    device.copy([(slot.payload()[12345 : 12345 + (4 << 20)], source)]).wait()
    assert torch.equal(slot.payload()[12345 : 12345 + (4 << 20)], source.cpu())
    slot.close()


def test_the_side_stream_sees_what_was_queued_before_and_nothing_after(slot: Slot) -> None:
    """Long kernels are queued, then a write, then the copy, then another write: the slot holds the first write."""
    device = CudaDevice(CUDA)
    work = torch.randn(2048, 2048, device=CUDA)
    value = torch.zeros(16 << 20, dtype=torch.uint8, device=CUDA)
    for round_number in range(1, 6):
        slot.payload().zero_()
        _busy(work)
        value.fill_(round_number)
        pending = device.copy([(slot.payload()[: value.numel()], value)])
        pending.wait()
        value.fill_(200)
        assert bool((slot.payload()[: value.numel()] == round_number).all())


def test_copies_from_another_current_stream_are_ordered(slot: Slot) -> None:
    """Training may use a stream of its own: the copy waits for whichever is current."""
    device = CudaDevice(CUDA)
    work = torch.randn(2048, 2048, device=CUDA)
    value = torch.zeros(16 << 20, dtype=torch.uint8, device=CUDA)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):  # type: ignore[no-untyped-call]
        _busy(work)
        value.fill_(7)
        device.copy([(slot.payload()[: value.numel()], value)]).wait()
    assert bool((slot.payload()[: value.numel()] == 7).all())


def test_no_copy_runs_any_more_when_one_could_not_be_queued(slot: Slot) -> None:
    """copy() that raises has waited for what it queued before: the slot may be given to somebody else."""
    device = CudaDevice(CUDA)
    work = torch.randn(2048, 2048, device=CUDA)
    value = torch.zeros(16 << 20, dtype=torch.uint8, device=CUDA)
    slot.payload().zero_()
    _busy(work)
    value.fill_(7)
    part = slot.payload()[: value.numel()]
    with pytest.raises(RuntimeError, match="size of tensor"):
        device.copy([(part, value), (slot.payload()[:100], value[:50])])
    assert bool((part == 7).all())


def test_refused_pinning_does_not_fail_what_training_launches_next(slot: Slot) -> None:
    """The driver's error for memory that is pinned already is gone: the next kernel on this thread works."""
    assert not CudaDevice(CUDA).pin(slot.payload())
    assert torch.ones(3, device=CUDA).sum().item() == 3
    assert slot.payload().is_pinned()


def test_state_on_the_gpu_round_trips(tmp_path: Path) -> None:
    """Values, sharing and layouts are those of the device tensors; map_location decides where they go."""
    base = torch.randn(300_000, device=CUDA)
    state: dict[str, Any] = {
        "w": base,
        "view": base[100:200].view(10, 10).t(),
        "bf16": torch.randn(1000, device=CUDA).bfloat16(),
        "permuted": torch.randn(20, 30, device=CUDA).t(),
        "cpu": torch.arange(5),
        "empty": torch.empty(0, 3, device=CUDA),
        "parameter": nn.Parameter(torch.randn(7, device=CUDA)),
    }
    save(state, tmp_path / "chain")
    on_cpu, on_gpu = load(tmp_path / "chain"), load(tmp_path / "chain", map_location="cuda")
    assert fingerprint(on_cpu) == fingerprint(state)
    assert fingerprint(on_gpu) == fingerprint(state)
    assert {tensor.device.type for tensor in on_gpu.values()} == {"cuda"}
    del on_gpu["cpu"], state["cpu"]
    assert sharing(on_gpu) == sharing(state)


@pytest.mark.parametrize("host_memory_bytes", [None, STAGING.minimum_bytes], ids=["whole", "windows"])
def test_training_on_the_gpu_goes_on_bit_for_bit(host_memory_bytes: int | None, tmp_path: Path) -> None:
    """Parameters stay in place, optimizer state and the device's generator come back; losses repeat exactly."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(512, 2048), nn.Dropout(0.2), nn.Linear(2048, 512)).to(CUDA)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def train(steps: int) -> list[bytes]:
        losses = []
        for _ in range(steps):
            optimizer.zero_grad()
            loss = model(torch.randn(32, 512, device=CUDA)).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(bits(loss))
        return losses

    state = {"model": model, "optimizer": optimizer}
    with Checkpointer(tmp_path / "chain", state, host_memory_bytes=host_memory_bytes) as ckpt:
        train(3)
        pointers = [parameter.data_ptr() for parameter in model.parameters()]
        ckpt.save()
        expected = train(4)
        assert ckpt.restore() is not None
        assert [parameter.data_ptr() for parameter in model.parameters()] == pointers
        assert train(4) == expected
    assert SnapshotChain(tmp_path / "chain").verify().ok


def test_every_snapshot_holds_its_own_step(tmp_path: Path) -> None:
    """Training queues kernels without ever waiting; each snapshot has exactly its step's values."""
    weight = torch.zeros(4_000_000, device=CUDA)
    work = torch.randn(1024, 1024, device=CUDA)
    with Checkpointer(tmp_path / "chain", {"w": weight}, every_steps=1, rng=False) as ckpt:
        pendings = []
        for _ in range(5):
            _busy(work)
            weight += 1
            pendings.append(ckpt.step())
        weight.fill_(-1)
        for number, pending in enumerate(pendings):
            assert pending is not None
            loaded = pending.wait_durable(60).load()["w"]
            assert bool((loaded == number + 1).all())


def test_devices_pin_with_the_driver_in_use() -> None:
    """Once CUDA is in use, slots are pinned through it."""
    torch.zeros(1, device=CUDA)
    assert isinstance(Devices().for_pinning(), CudaDevice)


@pytest.mark.parametrize("fused", [False, True])
def test_what_is_copied_behind_training_is_the_step_it_says(tmp_path: Path, fused: bool) -> None:
    """staging="overlap": the optimizer's stream waits for the copies, the host does not, and no snapshot is torn."""
    model = nn.Sequential(nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 1024)).to(CUDA)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=fused)
    state = {"model": model, "optimizer": optimizer}
    with Checkpointer(tmp_path / "chain", state, staging="overlap", rng=False, on_error="raise") as ckpt:
        for number in range(12):
            model(torch.randn(256, 1024, device=CUDA)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            ckpt._schedule._every_steps = 1 if number % 3 == 2 else None
            expected = (
                fingerprint({name: part.state_dict() for name, part in state.items()}) if number % 3 == 2 else None
            )
            pending = ckpt.step()
            if pending is None:
                continue
            for _ in range(2):  # the copies run beside these
                model(torch.randn(256, 1024, device=CUDA)).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
            assert fingerprint(pending.wait_durable(60).load(map_location=CUDA)) == expected
        assert sum(stats.torn_retries for stats in ckpt.stats()) == 0
