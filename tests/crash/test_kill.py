"""SIGKILL at random moments of a real training that takes a snapshot every step or three, with retention.

15 kills, or 200 with ``CIUIC_CRASH_LONG=1``.
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

from ciuic_async import Checkpointer
from ciuic_async.chain import SnapshotChain
from tests.crash.faults import LONG, Forge, Outcome, fast_folder, forge, note_line

KILLS = 200 if LONG else 15
KEPT = 3
LONGEST_LIFE_S = 0.25

pytestmark = [pytest.mark.slow, pytest.mark.timeout(60 + 6 * KILLS)]


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
    with fast_folder() as folder, forge(folder / "home") as opened:
        monkeypatch.setenv("XDG_CONFIG_HOME", str(folder / "home" / "config"))
        monkeypatch.setenv("XDG_STATE_HOME", str(folder / "home" / "state"))
        chain = folder / "chain"
        durable: dict[int, str] = {}
        in_mid_save = 0
        for _ in range(KILLS):
            outcome = live_and_be_killed(opened, chain, moments.randint(1, 3), moments.uniform(0, LONGEST_LIFE_S))
            assert outcome.killed, outcome.lines
            assert not outcome.failed, outcome.lines
            for step, snapshot in outcome.durable.items():
                assert step not in durable, f"step {step} was trained again although it had been reported durable"
                durable[step] = snapshot
            if not chain.joinpath("ciuic.json").exists():
                assert not durable
                continue
            in_mid_save += bool(os.listdir(chain / "tmp"))
            with SnapshotChain(chain, create=False) as history:
                report = history.verify()
                assert report.ok, report.problems
                present = {snapshot.step: snapshot.id for snapshot in history}
                claimed = [fact["id"] for fact in history.log() if fact["kind"] == "snapshot"]
                assert set(durable.values()) <= set(claimed)
                assert len(claimed) - len(durable) <= KILLS, "at most one a life was durable and not yet reported"
                assert len(present) >= min(KEPT, len(claimed)), "retention never leaves fewer than it keeps"
                assert len(present) <= KEPT + 1
            if durable:
                newest = max(durable)
                assert newest not in present or present[newest] == durable[newest]
                assert max(step for step in present if step is not None) >= newest
                assert restored_step(chain) == max(step for step in present if step is not None)
        assert len(durable) >= KILLS, "too short a life to mean anything"
        assert in_mid_save, "no kill hit a save"
        with SnapshotChain(chain, create=False) as history:
            history.gc(orphan_age_s=0)
            assert history.verify().notes == ()
        assert os.listdir(chain / "tmp") == []
