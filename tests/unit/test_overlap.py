"""staging="overlap" through the whole engine: every snapshot holds its own step, and nobody waits for ever."""

from __future__ import annotations

import copy
import subprocess
import sys
import textwrap
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.optimizer import _global_optimizer_pre_hooks

from ciuic_async import Checkpointer, CiuicWarning, PendingSnapshot, SaveFailedError, SnapshotChain
from ciuic_async.background import BackgroundWriter
from ciuic_async.staging.device import CpuDevice, Devices, Pending, Range, _Pieces
from tests.strategies import fingerprint


class _Starved(_Pieces):
    """Copies whose background thread gets no processor: whoever waits has to make them all."""

    def __init__(self, device: CpuDevice, ranges: Sequence[Range], keep: object) -> None:
        super().__init__(device, ranges, keep)
        self.waited_for = threading.Event()

    def advance(self) -> bool:
        assert self.waited_for.wait(60)
        return False

    def wait(self) -> None:
        self.waited_for.set()
        super().wait()


class StarvedDevice(CpuDevice):
    """Host memory on a machine without an idle processor."""

    def begin_ranges(self, ranges: Sequence[Range], keep: object) -> Pending:
        return _Starved(self, ranges, keep)


class Starved(Devices):
    """Every tensor lives there."""

    def __init__(self) -> None:
        super().__init__()
        self._by_name = {"cpu": StarvedDevice()}


class Run:
    """A small training run. Its state is a model with a buffer that forward changes, an optimizer, and plain values."""

    def __init__(
        self,
        folder: Path,
        make: Callable[[Any], torch.optim.Optimizer] = torch.optim.AdamW,
        *,
        starved: bool = True,
        **options: Any,
    ) -> None:
        torch.manual_seed(0)
        self.model: Any = nn.Sequential(nn.Linear(64, 400), nn.BatchNorm1d(400), nn.ReLU(), nn.Linear(400, 60))
        self.optimizer = make(self.model.parameters())
        self.plain = {"seen": 0, "average": torch.zeros(30_000)}
        self.state = {"model": self.model, "optimizer": self.optimizer, "plain": self.plain}
        options = dict[str, Any](staging="overlap", rng=False, on_error="raise") | options
        self.ckpt = Checkpointer(folder, self.state, **options)
        if starved:
            self.ckpt._taker.devices = Starved()
        self.train()
        self.ckpt.step()

    def backward(self) -> torch.Tensor:
        """Forward and backward: change buffers, plain values and gradients."""
        self.optimizer.zero_grad()
        loss: torch.Tensor = self.model(torch.randn(8, 64)).square().mean()
        loss.backward()  # type: ignore[no-untyped-call]
        self.plain["seen"] += 8  # type: ignore[operator]
        self.plain["average"] += 1  # type: ignore[operator]
        return loss

    def train(self) -> None:
        """One step, without telling the checkpointer."""
        if isinstance(self.optimizer, torch.optim.LBFGS):
            self.optimizer.step(self.backward)  # type: ignore[no-untyped-call]
        else:
            self.backward()
            self.optimizer.step()

    def fingerprint(self) -> Any:
        """The state as it is now, bit for bit."""
        return fingerprint(copy.deepcopy({name: _plain(value) for name, value in self.state.items()}))

    def under_way(self) -> bool:
        """Whether a copy waits for the gate."""
        return self.ckpt._overlap._flight is not None


def _plain(value: Any) -> Any:
    return value.state_dict() if hasattr(value, "state_dict") else value


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    """A starved run: everything is copied at the gate."""
    run = Run(tmp_path / "chain")
    yield run
    run.ckpt.close()


def _holds(pending: PendingSnapshot, expected: Any) -> bool:
    return bool(fingerprint(pending.wait_durable(60).load()) == expected)


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw foreach": lambda parameters: torch.optim.AdamW(parameters, foreach=True),
    "adamw fused": lambda parameters: torch.optim.AdamW(parameters, fused=True),
    "adam amsgrad": lambda parameters: torch.optim.Adam(parameters, amsgrad=True),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, fused=True),
    "adagrad": torch.optim.Adagrad,
    "lbfgs": lambda parameters: torch.optim.LBFGS(parameters, max_iter=3),
}


@pytest.mark.parametrize("starved", [False, True], ids=["copier", "starved"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_snapshot_is_of_its_step(name: str, starved: bool, tmp_path: Path) -> None:
    """Training goes on at once after step(); what becomes durable is what a deep copy at the call would hold."""
    run = Run(tmp_path / "chain", OPTIMIZERS[name], starved=starved, every_steps=1)
    taken = []
    for _ in range(4):
        run.train()
        expected = run.fingerprint()
        taken.append((run.ckpt.step(), expected))
    run.train()
    run.ckpt.flush()
    assert all(pending is not None and _holds(pending, expected) for pending, expected in taken)
    run.ckpt.close()
    assert all(stats.torn_retries == 0 for stats in run.ckpt.stats())


def test_the_gate_finishes_the_copy_and_its_time_counts(run: Run) -> None:
    """Between save() and the optimizer nothing lazy is copied; the optimizer step finishes it, and gate_s says so."""
    run.train()
    expected = run.fingerprint()
    pending = run.ckpt.save()
    assert pending.phase == "staging"
    assert run.under_way()
    run.backward()
    assert run.under_way(), "forward and backward wait for nothing"
    run.optimizer.step()
    assert not run.under_way()
    assert pending.phase in ("staged", "durable")
    assert _holds(pending, expected)
    run.ckpt.flush()
    stats = run.ckpt.stats()[-1]
    assert 0 < stats.gate_s < stats.stall_s
    assert stats.stage_s > stats.gate_s
    assert stats.persist_s is not None


def test_the_background_thread_copies_when_it_can(tmp_path: Path) -> None:
    """With a processor to spare the copy is complete before the gate."""
    run = Run(tmp_path / "chain", starved=False)
    run.train()
    expected = run.fingerprint()
    pending = run.ckpt.save()
    flight = run.ckpt._overlap._flight
    assert flight is not None
    thread = threading.Thread(target=_join, args=(flight,))
    thread.start()
    thread.join(60)
    assert flight.copied_s is not None
    assert pending.phase == "staging", "whether it is torn is known at the gate only"
    run.train()
    assert _holds(pending, expected)
    run.ckpt.close()


def _join(flight: Any) -> None:
    """Wait until the background thread has copied everything, without helping."""
    while flight.copied_s is None and not flight.over:
        threading.Event().wait(0.001)


# --- what is copied at once -------------------------------------------------------------------------------------------


def test_without_a_step_of_the_optimizer_everything_is_copied_at_once(run: Run) -> None:
    """An optimizer whose hook was not seen since the last step() may change tensors without it."""
    run.train()
    assert run.ckpt.step() is None
    expected = run.fingerprint()
    pending = run.ckpt.save()  # nothing was seen since step()
    assert pending.phase != "staging"
    run.model[0].weight.data.zero_()  # leaves no trace
    assert _holds(pending, expected)


def test_a_skipped_scaler_step_is_no_evidence(run: Run) -> None:
    """After a step that GradScaler skipped the snapshot is copied at once; the next is not."""
    run.ckpt._schedule._every_steps = 1
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    run.state["scaler"] = scaler
    for bad, lazily in ((False, True), (True, False), (False, True)):
        run.optimizer.zero_grad()
        scaler.scale(run.model(torch.randn(8, 64)).square().mean()).backward()
        if bad:
            next(run.model.parameters()).grad.fill_(float("inf"))
        scaler.step(run.optimizer)
        scaler.update()
        expected = run.fingerprint()
        pending = run.ckpt.step()
        assert pending is not None
        assert (pending.phase == "staging") is lazily
        run.backward()
        assert run.under_way() is lazily
        pending.wait_staged()
        assert _holds(pending, expected)


def test_a_copy_goes_on_over_a_skipped_step(run: Run) -> None:
    """No optimizer step came before the next step(): it finishes the copy, and the snapshot is of its own step."""
    run.train()
    expected = run.fingerprint()
    pending = run.ckpt.save()
    run.backward()
    assert run.ckpt.step() is None
    assert pending.phase != "staging"
    assert _holds(pending, expected)


def test_foreign_optimizers_are_copied_at_once(tmp_path: Path) -> None:
    """Tensors that no torch optimizer changed are never copied later; before_update() is harmless beside them."""
    weight = torch.ones(50_000)
    with Checkpointer(tmp_path / "chain", {"w": weight}, staging="overlap", rng=False) as ckpt:
        for number in range(3):
            ckpt.before_update()
            weight += 1
            ckpt.step()
            pending = ckpt.save()
            assert pending.phase != "staging"
            weight.data.zero_().add_(number + 1)
        ckpt.flush()
        assert [float(snapshot.load()["w"][0]) for snapshot in ckpt.chain] == [2.0, 2.0, 3.0]


def test_memory_shared_with_a_buffer_is_copied_at_once(tmp_path: Path) -> None:
    """Forward may change a buffer without a trace, and with it a parameter that looks into the same memory."""
    shared = torch.zeros(2, 40_000)
    model = nn.Module()
    model.weight = nn.Parameter(torch.empty(0))
    model.weight.data = shared[0]
    model.register_buffer("running", torch.empty(0))
    model.running.data = shared[1]
    optimizer = torch.optim.SGD([model.weight])
    with Checkpointer(tmp_path / "chain", {"m": model}, staging="overlap", rng=False) as ckpt:
        model.weight.grad = torch.ones(40_000)
        optimizer.step()
        assert ckpt.save().phase != "staging"


@pytest.mark.parametrize("host_memory_bytes", [8 << 20, 13 << 20], ids=["windows", "one slot"])
def test_with_little_memory_staging_blocks(host_memory_bytes: int, tmp_path: Path) -> None:
    """Where a second slot does not fit, or not even one, everything is copied at once."""
    model = nn.Linear(1000, 3000)  # 12 MB
    optimizer = torch.optim.SGD(model.parameters())
    with Checkpointer(
        tmp_path / "chain", {"m": model}, staging="overlap", rng=False, host_memory_bytes=host_memory_bytes
    ) as ckpt:
        for _ in range(2):
            model(torch.ones(1, 1000)).sum().backward()
            optimizer.step()
            expected = fingerprint(copy.deepcopy(dict(model.state_dict())))
            pending = ckpt.save()
            assert pending.phase != "staging"
            optimizer.step()
            assert fingerprint(dict(pending.wait_durable(60).load()["m"])) == expected


# --- torn -------------------------------------------------------------------------------------------------------------


def _in_place(run: Run) -> None:
    with torch.no_grad():
        run.model[0].weight.clamp_(-0.01, 0.01)


def _swap(run: Run) -> None:
    run.model[0].weight.data = run.model[0].weight.detach() * 2


def _state(run: Run) -> None:
    run.optimizer.state[run.model[0].weight]["exp_avg"] = torch.zeros(400, 64)


@pytest.mark.parametrize("change", [_in_place, _swap, _state])
def test_a_torn_snapshot_is_taken_again_at_the_next_step(change: Callable[[Run], None], run: Run) -> None:
    """Its pending lives on, with the next step's number and state; the old one is never durable."""
    run.train()
    pending = run.ckpt.save(tags=["kept"], metrics={"loss": 1.5})
    change(run)
    run.train()  # the gate finds it out
    assert pending.phase == "staging"
    assert pending.step == 1
    expected = run.fingerprint()
    assert run.ckpt.step() is None, "none was due"
    assert pending.phase != "staging"
    run.model[0].weight.data.zero_()  # it was copied at once
    assert pending.step == 2
    assert _holds(pending, expected)
    snapshot = pending.wait_durable()
    assert (snapshot.step, snapshot.tags, snapshot.metrics) == (2, ("kept",), {"loss": 1.5})
    run.ckpt.flush()
    assert [(stats.step, stats.torn_retries) for stats in run.ckpt.stats()] == [(2, 1)]
    assert [snapshot.step for snapshot in run.ckpt.chain] == [2]


def test_a_torn_snapshot_and_a_due_one_are_one(tmp_path: Path) -> None:
    """When the next step() takes a snapshot anyway, the discarded one is that."""
    run = Run(tmp_path / "chain", every_steps=1)
    first = run.ckpt.save()
    for _ in range(2):
        run.train()
        first = run.ckpt.step()  # type: ignore[assignment]
    _in_place(run)
    run.train()
    expected = run.fingerprint()
    assert run.ckpt.step() is first
    assert _holds(first, expected)
    run.ckpt.close()


def test_training_that_always_tears_is_copied_at_once_in_the_end(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    """After three discarded snapshots in a row staging blocks, and says so once."""
    run.ckpt._schedule._every_steps = 1
    phases = []
    for _ in range(12):
        run.train()
        pending = run.ckpt.step()
        assert pending is not None
        phases.append(pending.phase == "staging")
        _in_place(run)
    run.ckpt.flush()
    assert phases == [True, False] * 3 + [False] * 6
    assert sum("discarded because training changes" in record.message for record in caplog.records) == 1


def test_a_swap_at_the_end_loses_nothing(run: Run) -> None:
    """After the last step the model may be converted: what was copied is the memory as it was, and is kept."""
    run.train()
    expected = run.fingerprint()
    pending = run.ckpt.save()
    run.model.half()
    run.optimizer.state.clear()
    run.ckpt.close()
    assert _holds(pending, expected)


def test_a_torn_snapshot_that_nobody_takes_again_fails(tmp_path: Path) -> None:
    """close() without a further step: an error names the tensor, and no torn state becomes durable."""
    run = Run(tmp_path / "chain")
    run.train()
    pending = run.ckpt.save()
    _in_place(run)
    with pytest.raises(SaveFailedError, match="parameter 0 of group 0 of AdamW was changed in place") as failure:
        run.ckpt.close()
    assert failure.value.kind == "torn"
    assert pending.phase == "failed"
    assert len(SnapshotChain(tmp_path / "chain")) == 0


def test_a_closed_form_of_waiting_with_a_time_keeps_a_torn_snapshot(run: Run) -> None:
    """flush(timeout_s) and wait_durable(timeout_s) say that they took too long; the next step() takes it again."""
    run.train()
    pending = run.ckpt.save()
    _in_place(run)
    for wait in (run.ckpt.flush, pending.wait_staged, pending.wait_durable):
        with pytest.raises(TimeoutError):
            wait(0.01)
    run.train()
    expected = run.fingerprint()
    run.ckpt.step()
    assert _holds(pending, expected)


# --- whoever changes tensors otherwise --------------------------------------------------------------------------------


def test_loading_a_state_finishes_the_copy_first(run: Run) -> None:
    """load_state_dict of the model or the optimizer tears nothing."""
    for target in (run.model, run.optimizer):
        run.train()
        other = copy.deepcopy(target.state_dict())
        run.train()
        expected = run.fingerprint()
        pending = run.ckpt.save()
        assert run.under_way()
        target.load_state_dict(other)
        assert not run.under_way()
        assert _holds(pending, expected)
    run.ckpt.flush()
    assert [stats.torn_retries for stats in run.ckpt.stats()] == [0, 0]


def test_restore_finishes_the_copy_first(run: Run) -> None:
    """The newest snapshot may be the one that is just being copied."""
    run.train()
    expected = run.fingerprint()
    run.ckpt.save()
    run.model[0].bias.data.zero_()
    progress = run.ckpt.restore()
    assert progress is not None
    assert progress.step == 1
    assert run.fingerprint() == expected


def test_before_update_finishes_the_copy(run: Run) -> None:
    """For code that changes parameters without torch's optimizers."""
    run.train()
    expected = run.fingerprint()
    pending = run.ckpt.save()
    run.ckpt.before_update()
    assert not run.under_way()
    run.model[0].weight.data.zero_()
    assert _holds(pending, expected)


def test_an_optimizer_on_another_thread_passes_the_gate(run: Run) -> None:
    """The thread that makes the step finishes the copy."""
    run.train()
    expected = run.fingerprint()
    pending = run.ckpt.save()
    thread = threading.Thread(target=run.train)
    thread.start()
    thread.join(60)
    assert pending.phase != "staging"
    assert _holds(pending, expected)


def test_another_checkpointer_of_the_same_state(run: Run, tmp_path: Path) -> None:
    """One optimizer step finishes the copies of both."""
    with Checkpointer(tmp_path / "other", run.state, staging="overlap", rng=False) as other:
        other._taker.devices = Starved()
        run.train()
        expected = run.fingerprint()
        pendings = [run.ckpt.save(), other.save()]
        run.train()
        assert all(_holds(pending, expected) for pending in pendings)


# --- nobody waits for ever --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wait", ["wait_staged", "wait_durable", "flush", "close", "save", "with"])
def test_waiting_on_the_training_thread_finishes_the_copy(wait: str, tmp_path: Path) -> None:
    """Right after save(), with a background thread that never runs, every way to wait gets there."""
    run = Run(tmp_path / "chain")
    run.train()
    expected = run.fingerprint()
    pending = run.ckpt.save()
    assert run.under_way()
    if wait == "with":
        with pytest.raises(KeyError, match="mine"), run.ckpt:
            raise KeyError("mine")
    elif wait.startswith("wait"):
        getattr(pending, wait)()
    else:
        getattr(run.ckpt, wait)()
    assert pending.phase in ("staged", "durable")
    run.ckpt.close()
    assert _holds(pending, expected)


def test_other_threads_wait_for_the_gate(run: Run) -> None:
    """A thread that waits for durable is released by training's next optimizer step; it finishes nothing itself."""
    run.train()
    expected = run.fingerprint()
    pending = run.ckpt.save()
    found: list[bool] = []
    waiting = threading.Event()
    drive = pending.drive
    assert drive is not None

    def driven(for_ever: bool) -> None:
        drive(for_ever)
        waiting.set()

    pending.drive = driven
    thread = threading.Thread(target=lambda: found.append(_holds(pending, expected)))
    thread.start()
    assert waiting.wait(60)
    assert run.under_way()
    run.train()
    thread.join(60)
    assert found == [True]


def test_the_training_thread_may_be_gone(tmp_path: Path) -> None:
    """Who waits for the snapshot of a thread that has ended finishes the copy."""
    taken: list[Any] = []

    def train() -> None:
        run = Run(tmp_path / "chain")
        run.train()
        taken.extend([run, run.fingerprint(), run.ckpt.save()])

    thread = threading.Thread(target=train)
    thread.start()
    thread.join(60)
    run, expected, pending = taken
    assert run.under_way()
    assert _holds(pending, expected)
    run.ckpt.close()


def test_a_checkpointer_that_is_dropped_finishes_its_copy(tmp_path: Path) -> None:
    """Nobody closed it: what was taken becomes durable, and the hook goes."""
    hooks = len(_global_optimizer_pre_hooks)
    run = Run(tmp_path / "chain")
    run.train()
    expected = run.fingerprint()
    pending = run.ckpt.save()
    assert len(_global_optimizer_pre_hooks) == hooks + 1
    del run
    assert _holds(pending, expected)
    assert len(_global_optimizer_pre_hooks) == hooks


SCRIPT = """
    import sys
    import torch, ciuic_async
    from torch import nn

    model = nn.Linear(1000, 2000)
    optimizer = torch.optim.AdamW(model.parameters())
    ckpt = ciuic_async.Checkpointer(sys.argv[1], {"m": model, "o": optimizer}, staging="overlap")
    for _ in range(2):
        model(torch.ones(2, 1000)).sum().backward()
        optimizer.step()
        ckpt.save()
    assert ckpt._overlap._flight is not None
"""


def test_a_script_that_never_closes_loses_no_copy(tmp_path: Path) -> None:
    """At the interpreter's exit the copy under way is finished and made durable."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SCRIPT), str(tmp_path / "chain")],
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    assert len(SnapshotChain(tmp_path / "chain")) == 2


# --- what goes wrong --------------------------------------------------------------------------------------------------


class _Failing(_Starved):
    def wait(self) -> None:
        self.waited_for.set()
        raise RuntimeError("the device fell off")


class FailingDevice(CpuDevice):
    """A device that breaks before the copy is complete."""

    def begin_ranges(self, ranges: Sequence[Range], keep: object) -> Pending:
        return _Failing(self, ranges, keep)


def test_a_gate_that_fails_costs_the_snapshot_and_no_training(tmp_path: Path) -> None:
    """optimizer.step() raises nothing; the snapshot fails with the cause, the next one is good."""
    run = Run(tmp_path / "chain", on_error="warn")
    run.ckpt._taker.devices._by_name["cpu"] = FailingDevice()
    run.train()
    pending = run.ckpt.save()
    run.train()
    assert pending.phase == "failed"
    run.ckpt._taker.devices = Starved()
    with pytest.warns(CiuicWarning, match="the device fell off"):
        run.ckpt.step()
    run.train()
    expected = run.fingerprint()
    pending = run.ckpt.save()
    run.train()
    assert _holds(pending, expected)
    run.ckpt.close()


def test_storages_live_until_they_are_copied(run: Run) -> None:
    """Training may drop a parameter: its memory is freed only after the copy, and then at once."""
    run.train()
    expected = run.fingerprint()
    pending = run.ckpt.save()
    weak = run.model[0].weight.untyped_storage()._weak_ref()
    run.model[0] = nn.Linear(64, 400)
    run.optimizer.param_groups.clear()
    run.optimizer.state.clear()
    assert not torch.UntypedStorage._expired(weak)
    assert _holds(pending, expected)
    run.ckpt.flush()
    assert torch.UntypedStorage._expired(weak)
    torch.UntypedStorage._free_weak_ref(weak)  # type: ignore[no-untyped-call]


# --- auto -------------------------------------------------------------------------------------------------------------


def test_auto_blocks_on_saturated_processors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where training uses every processor no hook is registered, and everything is copied at once."""
    monkeypatch.setattr("ciuic_async.taking.idle_processors", lambda: 0)
    hooks = len(_global_optimizer_pre_hooks)
    run = Run(tmp_path / "chain", staging="auto")
    run.train()
    assert run.ckpt.save().phase != "staging"
    assert len(_global_optimizer_pre_hooks) == hooks + torch.cuda.is_available()
    run.ckpt.close()


def test_auto_overlaps_where_it_pays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With idle processors and long copies it overlaps from the second snapshot on; a slow gate ends that for good."""
    monkeypatch.setattr("ciuic_async.taking.idle_processors", lambda: 1)
    run = Run(tmp_path / "chain", staging="auto")
    lazily = []
    for blocking_s, gate_s in ((0.0, 0.0), (0.2, 0.0), (0.2, 0.01), (0.2, 0.15), (0.2, 0.0)):
        run.train()
        run.ckpt._taker._blocking_copy_s = blocking_s
        run.ckpt._overlap.last_gate_s = gate_s
        lazily.append(run.ckpt.save().phase == "staging")
    assert lazily == [False, True, True, False, False]
    run.ckpt.close()


@pytest.mark.parametrize("staging", ["blocking", "overlap"])
def test_an_interrupt_while_handing_over_loses_no_slot(
    staging: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C at the worst moment, several times: the loop hears of it, and the next snapshots are taken as ever."""
    run = Run(tmp_path / "chain", starved=False, staging=staging, busy_timeout_s=5.0, on_error="warn")
    real = PendingSnapshot.staged

    def interrupted(self: PendingSnapshot) -> None:
        raise KeyboardInterrupt

    for _ in range(3):
        run.train()
        monkeypatch.setattr(PendingSnapshot, "staged", interrupted)
        with warnings.catch_warnings(), suppress(KeyboardInterrupt):
            warnings.simplefilter("ignore")
            run.ckpt.save()
            run.ckpt.flush()
        monkeypatch.setattr(PendingSnapshot, "staged", real)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run.train()
        expected = run.fingerprint()
        assert _holds(run.ckpt.save(), expected)
        run.ckpt.close()


@pytest.mark.parametrize("staging", ["blocking", "overlap"])
def test_an_interrupt_while_submitting_blocks_nobody(staging: str, tmp_path: Path) -> None:
    """Ctrl-C at every point of ``submit`` before the writer has the snapshot, and right after: ``restore`` and
    ``close`` do not wait for what never comes, and no slot is lost."""
    code = BackgroundWriter.submit.__code__
    lines = sorted({line for *_, line in code.co_lines() if line is not None and line > code.co_firstlineno})
    # Not at the last one: between the line before and the call on it Python looks for no signal.
    moments: list[int | str] = [*lines[1:-1], "return"]
    assert len(moments) >= 5
    run = Run(tmp_path / "chain", starved=False, staging=staging, busy_timeout_s=5.0, on_error="warn")
    reached: list[int | str] = []

    for moment in moments:

        def interrupt(frame: FrameType, event: str, _: object, moment: int | str = moment) -> Any:
            if frame.f_code is not code:
                return None
            if moment in (event, frame.f_lineno if event == "line" else None):
                reached.append(moment)
                sys.settrace(None)
                raise KeyboardInterrupt
            return interrupt

        run.train()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            before = sys.gettrace()
            sys.settrace(interrupt)
            try:
                with suppress(KeyboardInterrupt):
                    run.ckpt.save()
                    run.ckpt.flush()
            finally:
                sys.settrace(before)
            run.ckpt._writer.wait_idle()
    assert reached == moments
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run.train()
        expected = run.fingerprint()
        assert _holds(run.ckpt.save(), expected)
        run.ckpt.restore()
        assert run.fingerprint() == expected
        run.ckpt.close()


def test_waiting_for_one_snapshot_spares_another(run: Run) -> None:
    """A snapshot that was torn and taken again has nothing to do with a later one that is torn: it is retaken, too."""
    run.ckpt._schedule._every_steps = 1
    run.train()
    first = run.ckpt.step()
    assert first is not None
    with torch.no_grad():
        run.model[0].weight.add_(1)
    run.train()
    run.ckpt.step()
    assert first.phase in ("staged", "durable")
    run.train()
    second = run.ckpt.step()
    assert second is not None
    with torch.no_grad():
        run.model[0].weight.add_(1)
    run.optimizer.step()  # the gate finds it torn
    first.wait_durable()
    assert second.phase != "failed"
    expected = run.fingerprint()
    run.ckpt.step()
    assert _holds(second, expected)
