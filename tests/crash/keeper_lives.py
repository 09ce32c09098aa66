"""Trainers with a keeper that die at chosen moments, one after the other; each is restarted and looked at.

Usage: ``keeper_lives.py CHAIN KIND COUNT`` with KIND ``staged`` (SIGKILL right after ``wait_staged``) or ``staging``
(SIGKILL while the next snapshot is being copied, the one before being staged and not durable). A trainer is a forked
child. Prints a JSON list with one object for each life.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from typing import Any

import torch

from ciuic_async import Checkpointer
from ciuic_async.pipeline import capture_stage
from ciuic_async.pipeline.persist import Persister

NUMEL = 3_000_000


def state_of(step: int) -> dict[str, Any]:
    """What training holds after a step: several chunks, a pack of small tensors, plain values."""
    generator = torch.Generator().manual_seed(step)
    return {
        "weights": {"big": torch.randn(NUMEL, generator=generator), "small": torch.randn(7, generator=generator)},
        "fixed": torch.arange(NUMEL // 4),
        "history": [step, step / 3, {"name": f"step {step}"}],
    }


def same(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else bool(a == b)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def life(chain: str, kind: str, step: int) -> None:
    """Two snapshots and the end; ``step`` is the one that must be there afterwards."""
    state = state_of(step - 1)
    ckpt = Checkpointer(chain, state, every_steps=1, keeper=True, rng=False)
    progress = ckpt.restore()
    state |= state_of(step - 1)
    while ckpt._step < step - 2:
        ckpt._step += 1
    assert progress is None or progress.step <= step - 2
    first = ckpt.step()
    assert first is not None
    first.wait_durable(60)
    if kind == "staging":
        # What follows stays staged: the writer never gets to it. The one after is copied half way.
        Persister.persist = lambda *_, **__: threading.Event().wait()  # type: ignore[method-assign,assignment]
    state |= state_of(step)
    second = ckpt.step()
    assert second is not None
    second.wait_staged(60)
    if kind == "staging":

        def half(sources: Any, payload: torch.Tensor, *rest: Any) -> None:
            payload[: len(payload) // 2].fill_(255)
            die()

        capture_stage.stage = half
        capture_stage.DigestingCopy.of = classmethod(lambda *_: None)  # type: ignore[method-assign,assignment]
        state |= state_of(step + 1)
        ckpt.step()
    die()


def look(chain: str, step: int) -> dict[str, Any]:
    """What a restarted trainer finds."""
    state = state_of(0)
    with Checkpointer(chain, state, rng=False) as ckpt:
        progress = ckpt.restore()
        assert progress is not None
        report = ckpt.chain.verify()
        return {
            "wanted": step,
            "found": progress.step,
            "exact": same(state, state_of(progress.step)),
            "skipped": len(progress.skipped),
            "problems": len(report.problems),
        }


def main(chain: str, kind: str, count: int) -> None:
    torch.set_num_threads(1)
    lives = []
    for number in range(count):
        step = 10 * (number + 1)
        child = os.fork()
        if not child:
            try:
                life(chain, kind, step)
            finally:
                os._exit(3)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status), f"the trainer ended by itself: {status}"
        lives.append(look(chain, step))
    print(json.dumps(lives))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
