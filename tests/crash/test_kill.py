"""SIGKILL at random moments of a real training that takes a snapshot every step or three, with retention.

16 kills, or 200 with ``CIUIC_CRASH_LONG=1``.
"""

from __future__ import annotations

import os
import random
import select
import signal
import time
from pathlib import Path
from typing import IO

import pytest
import torch

from ciuic_async import Checkpointer, KeepLatest
from ciuic_async.chain import SnapshotChain
from tests.crash.faults import LONG, Forge, Outcome, fast_folder, forge, note_line

KILLS = 200 if LONG else 16
MOST_KILLS = 4 * KILLS
"""It goes on until one of them hit a save."""
KEPT = 3
LIVES = 8
"""Kills for each chain: the chain grows with every life, and so does what a look at it costs."""
LONGEST_LIFE_S = 0.2

pytestmark = [pytest.mark.slow, pytest.mark.timeout(60 + 6 * MOST_KILLS)]


def live_and_be_killed(opened: Forge, chain: Path, every_steps: int, life_s: float) -> Outcome:
    """One life of the training, which ends by SIGKILL ``life_s`` after it began to train."""

    def watch(pid: int, said: IO[bytes], outcome: Outcome) -> None:
        deadline = time.monotonic() + life_s
        while (left := deadline - time.monotonic()) > 0:
            if select.select([said], [], [], left)[0]:
                note_line(outcome, said.readline().decode().rstrip("\n"))
        os.kill(pid, signal.SIGKILL)

    options = {"every_steps": every_steps, "keep": KEPT, "until": 1_000_000}
    return opened.run("train", chain, native=True, options=options, watch=watch)


def restored_step(chain: Path) -> int:
    """Restore into a new model and optimizer; where training stands."""
    model = torch.nn.Sequential(torch.nn.Linear(40, 64), torch.nn.Tanh(), torch.nn.Linear(64, 1))
    optimizer = torch.optim.AdamW(model.parameters())
    with Checkpointer(chain, {"model": model, "optimizer": optimizer}, rng=False) as checkpointer:
        progress = checkpointer.restore()
        assert progress is not None
        assert progress.skipped == ()
        stored = progress.snapshot.load()
    assert all(torch.equal(value, stored["model"][name]) for name, value in model.state_dict().items())
    for number, slots in optimizer.state_dict()["state"].items():
        assert all(torch.equal(value, stored["optimizer"]["state"][number][name]) for name, value in slots.items())
    return progress.step


@pytest.mark.filterwarnings("ignore:.*taken in another environment:ciuic_async.errors.CiuicWarning")
def test_killed_at_any_moment_a_training_keeps_all_that_was_durable(monkeypatch: pytest.MonkeyPatch) -> None:
    """After each SIGKILL verify is clean, the newest snapshot reported durable is there, and restore works from it."""
    moments = random.Random(20)
    in_mid_save = 0
    reported = 0
    with fast_folder() as folder, forge(folder / "home") as opened:
        monkeypatch.setenv("XDG_CONFIG_HOME", str(folder / "home" / "config"))
        monkeypatch.setenv("XDG_STATE_HOME", str(folder / "home" / "state"))
        number = 0
        while number < KILLS or (not in_mid_save and number < MOST_KILLS):
            chain = folder / f"chain-{number}"
            durable: dict[int, str] = {}
            for _ in range(LIVES):
                outcome = live_and_be_killed(opened, chain, moments.randint(1, 3), moments.uniform(0, LONGEST_LIFE_S))
                assert outcome.killed, outcome.lines
                assert not outcome.failed, outcome.lines
                for step, snapshot in outcome.durable.items():
                    assert step not in durable, f"step {step} was trained again although it had been reported durable"
                    durable[step] = snapshot
                in_mid_save += bool(os.listdir(chain / "tmp"))
                look_at(chain, durable)
            reported += len(durable)
            with SnapshotChain(chain, create=False) as history:
                history.prune(KeepLatest(KEPT))
                history.gc(orphan_age_s=0)
                report = history.verify()
                assert report.ok, report.problems
                assert report.notes == (), "leftovers"
                assert len(history) == KEPT
            assert os.listdir(chain / "tmp") == []
            number += LIVES
    assert reported >= KILLS, "too short lives to mean anything"
    assert in_mid_save, "no kill hit a save"


def look_at(chain: Path, durable: dict[int, str]) -> None:
    """What must hold after a kill."""
    with SnapshotChain(chain, create=False) as history:
        report = history.verify()
        assert report.ok, report.problems
        present = {snapshot.step or 0: snapshot.id for snapshot in history}
        claimed = {fact["id"] for fact in history.log() if fact["kind"] == "snapshot"}
    assert set(durable.values()) <= claimed
    assert len(present) >= min(KEPT, len(claimed)), "retention never leaves fewer than it keeps"
    for step in sorted(durable)[-KEPT:]:
        newer = sum(1 for other in present if other > step)
        assert present.get(step) == durable[step] or newer >= KEPT, f"step {step} is gone"
    if present:
        assert restored_step(chain) == max(present)
