"""However a training ends: in time, without noise, and with all that was taken durable where Python lets anything run.

Real processes, forked from one that has imported everything (``crew.py``).
"""

from __future__ import annotations

import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from ciuic_async.chain import SnapshotChain
from tests.crash.crew import DEADLINE_S, Crew, crew
from tests.crash.faults import LONG, fast_folder, same, state_at

INTERRUPTS = 100 if LONG else 10

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600 if LONG else 120)]


@pytest.fixture(scope="module")
def place() -> Iterator[tuple[Crew, Path]]:
    with fast_folder() as folder, crew(folder / "home") as opened:
        yield opened, folder


@pytest.fixture
def at(place: tuple[Crew, Path], request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[Crew, Path]:
    """The crew, and a chain of the test's own that is not there yet."""
    opened, folder = place
    for name in ("config", "state"):
        monkeypatch.setenv(f"XDG_{name.upper()}_HOME", str(folder / "home" / name))
    return opened, folder / f"chain-{abs(hash(request.node.name))}"


def steps_of(chain: Path) -> list[int]:
    """The steps of a chain that verifies and holds exactly what was captured."""
    with SnapshotChain(chain, create=False) as opened:
        report = opened.verify()
        assert report.ok, report.problems
        for snapshot in opened:
            assert snapshot.step is not None
            assert same(snapshot.load(), state_at(snapshot.step))
        return [snapshot.step or 0 for snapshot in opened]


@pytest.mark.parametrize("staging", ["blocking", "overlap"])
@pytest.mark.parametrize(
    ("way", "code", "last_line"), [("exception", 1, "ValueError: the loop's own"), ("exit", 3, "")]
)
def test_leaving_the_block(at: tuple[Crew, Path], way: str, code: int, last_line: str, staging: str) -> None:
    """An exception or ``sys.exit`` in the loop: all that was taken is durable, and stderr has the loop's own traceback
    and nothing else."""
    opened, chain = at
    ended = opened.start("in_the_block", chain, way=way, staging=staging).end()
    assert ended.code == code
    assert ended.numbers("taken") == steps_of(chain) == [1, 2, 3, 4, 5]
    assert ended.stderr.rstrip().rpartition("\n")[2] == last_line
    assert ended.stderr.count("Traceback") == bool(last_line)
    assert "ciuic_async/" not in ended.stderr, ended.stderr


def test_leaving_at_once(at: tuple[Crew, Path]) -> None:
    """``os._exit`` lets nothing run: what is there is sound and a beginning of what was taken; nothing is said."""
    opened, chain = at
    ended = opened.start("in_the_block", chain, way="hard").end()
    assert ended.code == 7
    assert ended.stderr == ""
    there = steps_of(chain)
    assert there == ended.numbers("taken")[: len(there)]


def test_interrupted_at_any_moment(at: tuple[Crew, Path]) -> None:
    """Ctrl-C in the middle of a step or of a save, ten times: the process ends by KeyboardInterrupt, all that was taken
    is durable, and besides the traceback at most one line tells of a snapshot that was interrupted in the taking."""
    opened, chain = at
    moments = random.Random(11)
    for number in range(INTERRUPTS):
        own = chain.with_name(f"{chain.name}-{number}")
        hand = opened.start("in_the_block", own, way="interrupted")
        for _ in range(moments.randint(1, 6)):
            hand.line()
        for _ in range(moments.randrange(100_000)):  # some part of a millisecond or two more
            pass
        hand.interrupt()
        ended = hand.end()
        assert ended.code != 0
        assert ended.stderr.rstrip().endswith("KeyboardInterrupt"), ended.stderr
        assert ended.stderr.count("Traceback") == 1, ended.stderr
        before = ended.stderr.partition("Traceback")[0].splitlines()
        assert len(before) <= 1, ended.stderr
        assert all("was interrupted" in line for line in before), ended.stderr
        there = steps_of(own)
        taken = ended.numbers("taken")
        assert there[: len(taken)] == taken
        assert there in (taken, [*taken, len(taken) + 1]), "the last one was taken, and its line was not said"


@pytest.mark.parametrize("way", ["global", "cycle", "collected", "thread"])
def test_nobody_closes(at: tuple[Crew, Path], way: str) -> None:
    """The interpreter ends without ``close``: the checkpointer is alive, in a cycle, dropped before, or a daemon thread
    goes on saving: no deadlock, no noise, and all that was taken is durable."""
    opened, chain = at
    ended = opened.start("without_closing", chain, way=way).end()
    assert ended.code == 0
    assert ended.stderr == ""
    there = steps_of(chain)
    assert there[:5] == ended.numbers("taken") == [1, 2, 3, 4, 5]
    assert ended.numbers("threads") in ([], [0]), "a dropped checkpointer keeps threads"
    assert set(there[5:]) <= {5}, "what the thread saved is of the same step"
    assert way == "thread" or len(there) == 5


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers_of_a_data_loader(at: tuple[Crew, Path], context: str) -> None:
    """A real loader with two workers, forked or spawned in the middle of saves: they work and end, touch nothing, and
    every snapshot is durable."""
    opened, chain = at
    ended = opened.start("with_loader", chain, context=context).end()
    assert ended.code == 0, ended.stderr
    assert ended.stderr == ""
    count = 5 if context == "fork" else 3
    assert ended.numbers("taken") == steps_of(chain) == list(range(1, count + 1))


def test_forked_in_mid_save(at: tuple[Crew, Path]) -> None:
    """A child forked while the writer publishes is inert and ends in order; the parent's snapshots are durable."""
    opened, chain = at
    ended = opened.start("forked_while_saving", chain).end()
    assert ended.numbers("child") == [0], ended.stderr
    assert ended.code == 0
    assert ended.stderr == ""
    assert ended.numbers("taken") == steps_of(chain) == [1, 2]


def test_interrupted_while_close_waits_for_a_disk_that_hangs(at: tuple[Crew, Path]) -> None:
    """``close`` waits for as long as the disk hangs; Ctrl-C ends that, and the process with it."""
    opened, chain = at
    hand = opened.start("stuck_in_close", chain)
    hand.wait_for("closing")
    hand.interrupt_until_it_ends()
    ended = hand.end()
    assert ended.code != 0
    assert ended.stderr.rstrip().endswith("KeyboardInterrupt")
    assert ended.stderr.count("Traceback") == 1, ended.stderr
    assert steps_of(chain) == []


SCRIPT = """
import sys, torch
from ciuic_async import Checkpointer
state = {"weights": torch.ones(1000)}
ckpt = Checkpointer(sys.argv[1], state, every_steps=1, keeper=True)
ckpt.step()
ckpt.step()
"""


def test_a_script_needs_no_main_guard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plain script with a keeper process, without ``if __name__ == "__main__"`` and without ``close``: it runs once,
    ends, and both snapshots are durable."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    chain = tmp_path / "chain"
    command = [sys.executable, str(script), str(chain)]
    with tempfile.TemporaryDirectory(prefix="ciuic-") as runtime:  # the path of a socket has a limit of some 100 bytes
        monkeypatch.setenv("XDG_RUNTIME_DIR", runtime)
        done = subprocess.run(command, capture_output=True, text=True, timeout=2 * DEADLINE_S, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    with SnapshotChain(chain, create=False) as opened:
        assert [snapshot.step for snapshot in opened] == [1, 2]
        assert opened.verify().ok
