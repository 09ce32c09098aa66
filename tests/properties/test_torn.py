"""No snapshot is ever torn: random training loops against copies that were taken while nothing else happened.

Each loop draws a model, an optimizer, how starved the background thread is, and then events at random moments: steps,
skipped steps, in-place changes, swapped storages, loaded states, second saves, other threads. Before each call that may
take a snapshot the whole state is copied and given a number, which travels as a metric: whatever becomes durable must
be, bit for bit, the copy whose number and step it bears.

``CIUIC_TORN_SNAPSHOTS=1000`` makes it long; ``CIUIC_TORN_SEED`` draws other loops.
"""

from __future__ import annotations

import copy
import ctypes
import os
import random
import shutil
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from ciuic_async import Checkpointer, PendingSnapshot
from ciuic_async.overlap import Overlap
from ciuic_async.staging.device import CpuDevice, Devices, Pending, Range, _Pieces
from ciuic_async.staging.gate import Watch
from tests.strategies import fingerprint

SNAPSHOTS = int(os.environ.get("CIUIC_TORN_SNAPSHOTS", "60"))
SEED = int(os.environ.get("CIUIC_TORN_SEED", "0"))
PER_LOOP = 10
WIDTH = 150  # weights of 150 x 150 float32 are above the limit below which tensors are copied at once


class _Drawn(_Pieces):
    """Copies whose background thread is let go a few pieces at a time, when training says so."""

    def __init__(self, device: DrawnDevice, ranges: Sequence[Range], keep: object) -> None:
        super().__init__(device, ranges, keep)
        self.allowed = threading.Semaphore(0)
        device.current = self

    def advance(self) -> bool:
        assert self.allowed.acquire(timeout=60)
        return super().advance()

    def wait(self) -> None:
        for _ in range(1000):
            self.allowed.release()
        super().wait()


class DrawnDevice(CpuDevice):
    """Host memory whose background copies advance when the loop allows it."""

    def __init__(self) -> None:
        super().__init__()
        self.current: _Drawn | None = None

    def begin_ranges(self, ranges: Sequence[Range], keep: object) -> Pending:
        return _Drawn(self, ranges, keep)


class Drawn(Devices):
    """Everything lives there."""

    def __init__(self) -> None:
        super().__init__()
        self.device = DrawnDevice()
        self._by_name = {"cpu": self.device}


class Model(nn.Module):
    """Two layers with tied weights, a buffer that forward changes, and a frozen layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.second = nn.Linear(WIDTH, WIDTH)
        self.second.weight = self.first.weight
        self.norm = nn.BatchNorm1d(WIDTH)
        self.frozen = nn.Linear(WIDTH, WIDTH).requires_grad_(False)

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.frozen(self.second(self.norm(self.first(batch))))
        return out


OPTIMIZERS: list[Callable[[Any], torch.optim.Optimizer]] = [
    lambda parameters: torch.optim.AdamW(parameters, foreach=True),
    lambda parameters: torch.optim.AdamW(parameters, fused=True),
    lambda parameters: torch.optim.SGD(parameters, lr=0.01, momentum=0.9),
    lambda parameters: torch.optim.SGD(parameters, lr=0.01, momentum=0.9, fused=True),
    lambda parameters: torch.optim.LBFGS(parameters, lr=0.01, max_iter=2, history_size=2),
]


class Loop:
    """One training run that does odd things, drawn from ``seed``."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.draw = random.Random(seed)
        torch.manual_seed(seed)
        self.model: Any = Model()
        called = torch.compile(self.model, backend="eager") if seed % 5 == 4 else self.model
        self.forward: Any = called
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = OPTIMIZERS[seed % len(OPTIMIZERS)](trained)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        self.average = copy.deepcopy(dict(self.model.state_dict()))
        self.plain: dict[str, Any] = {"n": 0, "array": np.zeros(20_000)}
        self.state = {
            "model": called,
            "optimizer": self.optimizer,
            "scaler": self.scaler,
            "average": self.average,
            "plain": self.plain,
        }
        self.copies: list[tuple[int, Any]] = []
        self.pendings: list[PendingSnapshot] = []
        self.step = 0
        self.skips = 0
        self.ckpt = Checkpointer(folder, self.state, staging="overlap", rng=False, codec="raw", busy_timeout_s=60)
        self.devices = Drawn()
        self.ckpt._taker.devices = self.devices

    def run(self, snapshots: int) -> None:
        """Train until so many snapshots were taken."""
        while len(self.pendings) < snapshots:
            self._some_copying()
            if self.draw.random() < 0.5:
                self.draw.choice(self.ODDITIES)(self)
            self._train()
            self._some_copying()
            self.step += 1
            number = self._copy()
            self.ckpt._schedule._every_steps = 1 if self.draw.random() < 0.85 else None
            self._take(self.ckpt.step(metrics={"copy": number}))
            if self.draw.random() < 0.1:  # a second one, while the first is under way
                self._take(self.ckpt.save(metrics={"copy": self._copy()}))
        self.ckpt.step(metrics={"copy": self._copy(self.step + 1)})  # takes again what was torn last
        self.ckpt.close()

    def wrong(self) -> list[str]:
        """What is not, bit for bit, the copy whose number it bears."""
        problems = []
        for pending in self.pendings:
            snapshot = pending.wait_durable(60)
            step, expected = self.copies[int(snapshot.metrics["copy"])]
            if (snapshot.step, pending.step) != (step, step):
                problems.append(f"{snapshot.step} and {pending.step} instead of {step}")
            if fingerprint(snapshot.load()) != expected:
                problems.append(f"bytes of step {step}")
        return problems

    def _take(self, pending: PendingSnapshot | None) -> None:
        if pending is not None and pending not in self.pendings:
            self.pendings.append(pending)

    def _copy(self, step: int | None = None) -> int:
        """A synchronous copy of everything; its number."""
        tree = {name: v.state_dict() if hasattr(v, "state_dict") else v for name, v in self.state.items()}
        self.copies.append((self.step if step is None else step, fingerprint(copy.deepcopy(tree))))
        return len(self.copies) - 1

    def _some_copying(self) -> None:
        """Let the background thread do some of its work, sometimes all of it."""
        current = self.devices.device.current
        if current is not None:
            for _ in range(self.draw.choice((0, 0, 1, 3, 1000))):
                current.allowed.release()

    def _loss(self) -> torch.Tensor:
        self.optimizer.zero_grad()
        loss: torch.Tensor = self.forward(torch.randn(4, WIDTH)).square().mean()
        return loss

    def _closure(self) -> torch.Tensor:
        loss = self._loss()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    def _train(self) -> None:
        self.plain["n"] += 1
        self.plain["array"] += 1
        for name, value in self.model.state_dict().items():
            self.average[name].lerp_(value, 0.5) if value.is_floating_point() else self.average[name].copy_(value)
        if isinstance(self.optimizer, torch.optim.LBFGS):
            self.optimizer.step(self._closure)  # type: ignore[no-untyped-call]
            return
        self.scaler.scale(self._loss()).backward()  # type: ignore[no-untyped-call]
        if self.draw.random() < 0.15:
            self.model.first.bias.grad.fill_(float("inf"))
            self.skips += 1
        self.scaler.step(self.optimizer)
        self.scaler.update()

    # --- odd things, at a moment when a copy may be under way -------------------------------------------------------

    def _tensor(self) -> torch.Tensor:
        """One that the optimizer changes."""
        states = [
            value
            for entries in self.optimizer.state.values()
            for value in entries.values()
            if isinstance(value, torch.Tensor) and value.numel() >= WIDTH * WIDTH
        ]
        chosen: torch.Tensor = self.draw.choice([self.model.first.weight, *states])
        return chosen

    def _in_place(self) -> None:
        with torch.no_grad():
            self._tensor().mul_(0.5)

    def _through_a_view(self) -> None:
        self._tensor().detach()[: WIDTH // 2].add_(1e-3)

    def _on_another_thread(self) -> None:
        thread = threading.Thread(target=self._in_place)
        thread.start()
        thread.join()

    def _train_on_another_thread(self) -> None:
        thread = threading.Thread(target=self._train)
        thread.start()
        thread.join()

    def _swap_storage(self) -> None:
        weight = self.model.first.weight
        weight.data = weight.detach() + 1e-3

    def _there_and_back(self) -> None:
        self.model.double().float()

    def _load_model(self) -> None:
        self.model.load_state_dict({name: value * 1 for name, value in self.model.state_dict().items()})

    def _load_optimizer(self) -> None:
        self.optimizer.load_state_dict(copy.deepcopy(self.optimizer.state_dict()))

    def _wait(self) -> None:
        if self.pendings:
            self.pendings[-1].wait_staged(60) if self.draw.random() < 0.5 else self.ckpt.flush(60)

    def _update_outside(self) -> None:
        self.ckpt.before_update()
        self.model.first.weight.data.mul_(0.9)  # leaves no trace, and need not

    ODDITIES: Sequence[Callable[[Loop], None]] = (
        _in_place,
        _through_a_view,
        _on_another_thread,
        _train_on_another_thread,
        _swap_storage,
        _there_and_back,
        _load_model,
        _load_optimizer,
        _wait,
        _update_outside,
    )


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many pieces, so that the gate finds copies half done; and no end of discarded snapshots."""
    monkeypatch.setattr("ciuic_async.staging.device.BACKGROUND_PIECE_BYTES", 20_000)
    monkeypatch.setattr("ciuic_async.taking.TORN_IN_A_ROW", 1 << 30)


@pytest.mark.timeout(120 + 2 * SNAPSHOTS)
@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler")
def test_no_snapshot_is_torn(tmp_path: Path) -> None:
    """Of all snapshots of all loops none is wrong; some were copied late, some torn and taken again, some at once."""
    total = torn = skips = gates = 0
    seed = SEED
    while total < SNAPSHOTS:
        folder = tmp_path / str(seed)
        loop = Loop(folder, seed)
        loop.run(PER_LOOP)
        assert loop.wrong() == [], f"seed {seed}"
        stats = loop.ckpt.stats()
        torn += sum(one.torn_retries for one in stats)
        gates += sum(one.gate_s > 0 for one in stats)
        skips += loop.skips
        total += len(loop.pendings)
        shutil.rmtree(folder)
        seed += 1
    assert torn > 0
    assert skips > 0
    assert 0 < gates < total


BREAKS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "no gate": lambda patch: patch.setattr(Overlap, "pass_gate", lambda self: None),
    "no detection": lambda patch: (  # type: ignore[dict-item]
        patch.setattr(Watch, "torn", lambda self: None),
        patch.setattr(Watch, "changed", lambda self: None),
    ),
}


@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_gate_is_found_out(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the gate, or without comparing tensors at it, the loops of the test above find torn snapshots."""
    BREAKS[name](monkeypatch)
    problems: list[str] = []
    for seed in range(12):
        loop = Loop(tmp_path / str(seed), seed)
        loop.run(PER_LOOP)
        problems += loop.wrong()
        if problems:
            break
    assert problems


# --- writers that leave no trace --------------------------------------------------------------------------------------


def _data(weight: torch.Tensor) -> None:
    weight.data.zero_()


def _numpy(weight: torch.Tensor) -> None:
    weight.detach().numpy()[:] = 0


def _dlpack(weight: torch.Tensor) -> None:
    torch.utils.dlpack.from_dlpack(weight.detach()).zero_()


def _raw(weight: torch.Tensor) -> None:
    ctypes.memset(weight.data_ptr(), 0, weight.numel() * weight.element_size())


@pytest.mark.parametrize("write", [_data, _numpy, _dlpack, _raw])
def test_invisible_writers_are_safe_with_blocking_staging(
    write: Callable[[torch.Tensor], None], tmp_path: Path
) -> None:
    """docs/overlap.md: what no version counter tells of cannot harm where everything is copied before the return."""
    model = nn.Linear(WIDTH, WIDTH)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    state = {"model": model, "optimizer": optimizer}
    with Checkpointer(tmp_path / "chain", state, staging="blocking", rng=False) as ckpt:
        for _ in range(2):
            model(torch.ones(1, WIDTH)).sum().backward()
            optimizer.step()
            expected = fingerprint(copy.deepcopy(dict(model.state_dict())))
            pending = ckpt.save()
            version = model.weight._version
            write(model.weight)
            assert model.weight._version == version, "this writer leaves a trace: overlap would find it"
            assert fingerprint(dict(pending.wait_durable(60).load()["model"])) == expected
            written = fingerprint(copy.deepcopy(dict(model.state_dict())))
            assert fingerprint(dict(ckpt.save().wait_durable(60).load()["model"])) == written, "no copy was skipped"
