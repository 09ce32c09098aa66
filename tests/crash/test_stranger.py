"""A training script that knows nothing of the engine but its README ends with the same bits however it is killed.

``CIUIC_KILL_RUNS=20`` kills each run that often instead of 4 times.
"""

from __future__ import annotations

import collections
import json
import os
import random
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from ciuic_async.chain import SnapshotChain
from ciuic_async.cli.demo import Child

SCRIPT = Path(__file__).with_name("stranger_training.py")
KILLS = int(os.environ.get("CIUIC_KILL_RUNS", "4"))
STEPS = 6 * KILLS
LIMIT_S = 60.0


def start(chain: Path, seed: int) -> Child:
    return Child([sys.executable, str(SCRIPT), str(chain), str(STEPS), str(seed)])


def finish(child: Child) -> dict[str, object]:
    """Let it run to its end; what it printed last."""
    last = ""
    with child:
        while (line := child.next_line(LIMIT_S)) is not None:
            last = line
        assert child.end() == 0
    result: dict[str, object] = json.loads(last)
    return result


def run_for(child: Child, lines: int, delay_s: float) -> None:
    """Kill it ``delay_s`` after it has printed ``lines`` more lines, or before: its end comes first at times."""
    with child:
        for _ in range(lines):
            if child.next_line(LIMIT_S) is None:
                break
        with suppress(TimeoutError):
            collections.deque(child.lines(delay_s), maxlen=0)  # follow it until then
        child.kill()


@pytest.mark.slow
@pytest.mark.timeout(60 + 15 * KILLS)
@pytest.mark.parametrize("seed", [1, 2])
def test_a_killed_run_ends_with_the_bits_of_an_uninterrupted_one(tmp_path: Path, seed: int) -> None:
    """Model, moving average, optimizer, schedule, loader, losses and generators do not depend on SIGKILLs."""
    expected = finish(start(tmp_path / "uninterrupted", seed))
    moments = random.Random(seed)
    chain = tmp_path / "killed"
    for _ in range(KILLS):
        # A life prints four lines every three steps, so four short lives reach about the middle of the run.
        run_for(start(chain, seed), lines=moments.randint(1, 7), delay_s=moments.uniform(0, 0.02))
    found = finish(start(chain, seed))
    assert found == expected
    assert found["step_count"] == STEPS
    with SnapshotChain(chain, create=False) as history:
        assert history.verify().ok
        assert [snapshot.step for snapshot in history] == sorted({snapshot.step for snapshot in history}, key=int)
        assert [snapshot.step for snapshot in history] == list(range(3, STEPS + 1, 3))
