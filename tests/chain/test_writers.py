"""Four processes write to one chain on disk and are killed at random moments: one history, and nothing lost.

4 seconds of it, or 3 minutes with ``CIUIC_CRASH_LONG=1``.
"""

from __future__ import annotations

import json
import os
import random
import select
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from ciuic_async import SnapshotChain
from ciuic_async.format import layout
from ciuic_async.transparency.keys import SigningKey
from tests.chain import walker
from tests.crash.faults import LONG, ROOT

DURATION_S = 180.0 if LONG else 4.0
WRITERS = {"a": "remark", "b": "remark", "c": "train", "d": "train"}
DEADLINE_S = 60.0

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900 if LONG else 120)]


@dataclass
class Crowd:
    """The writers, by way of the process that forks them. Belongs to one thread."""

    chain: Path
    process: subprocess.Popen[bytes]
    keys: dict[str, str] = field(default_factory=lambda: {name: SigningKey.generate().secret() for name in WRITERS})
    living: dict[str, int] = field(default_factory=dict)
    lives: Counter[str] = field(default_factory=Counter)
    acknowledged: list[tuple[str, int, str]] = field(default_factory=list)
    """Writer, index, and the text or the id of what is durable there."""
    kills: int = 0
    _said: bytes = b""

    def listen(self, until_s: float, word: str = "") -> list[str]:
        """Take down what is said until a line begins with ``word`` (returned), or until the time is over."""
        assert self.process.stdout is not None
        while True:
            line, newline, rest = self._said.partition(b"\n")
            if newline:
                self._said = rest
                words = line.decode().split()
                if words[0] == "ack":
                    self.acknowledged.append((words[1], int(words[2]), words[3]))
                elif words[0] == word:
                    return words
                continue
            left_s = until_s - time.monotonic()
            if left_s <= 0 or not select.select([self.process.stdout], [], [], left_s)[0]:
                assert not word, f"nobody said {word!r}"
                return []
            data = os.read(self.process.stdout.fileno(), 1 << 16)
            assert data, "the process that forks writers died"
            self._said += data

    def ask(self, request: dict[str, Any], word: str) -> list[str]:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request).encode() + b"\n")
        self.process.stdin.flush()
        return self.listen(time.monotonic() + DEADLINE_S, word)

    def start(self, name: str) -> None:
        self.lives[name] += 1
        given = {
            "scenario": WRITERS[name],
            "chain_path": str(self.chain),
            "writer": name,
            "life": self.lives[name],
            "key": self.keys[name],
        }
        self.living[name] = int(self.ask({"start": given}, "started")[1])

    def kill(self, name: str) -> None:
        status = int(self.ask({"kill": self.living.pop(name)}, "ended")[2])
        assert os.WIFSIGNALED(status), f"writer {name} had ended by itself; its error is above"
        assert os.WTERMSIG(status) == signal.SIGKILL
        self.kills += 1


def run(chain: Path, home: Path) -> Crowd:
    """Let them write and be killed; when it returns, all are dead."""
    dice = random.Random(4)
    environment = {**os.environ, "XDG_STATE_HOME": str(home), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "error", "-m", "tests.chain.writer_lives"]
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        crowd = Crowd(chain, process)
        for name in WRITERS:
            crowd.start(name)
        end_s = time.monotonic() + DURATION_S
        while time.monotonic() < end_s:
            crowd.listen(time.monotonic() + dice.uniform(0.01, 0.4))
            name = dice.choice(sorted(WRITERS))
            crowd.kill(name)
            crowd.start(name)
        for name in WRITERS:
            crowd.kill(name)
        assert process.stdin is not None
        process.stdin.close()
    return crowd


def name_of(data: bytes) -> str | None:
    """The text or the id that a writer acknowledges an entry by."""
    fact = json.loads(data)
    name = {"note": fact.get("text"), "snapshot": fact.get("snapshot")}.get(fact["kind"])
    assert name is None or isinstance(name, str)
    return name


def test_writers_that_are_killed_make_one_history(tmp_path: Path) -> None:
    """What was acknowledged is at its index, once; no index went to two; the audit and the walker accept all."""
    crowd = run(tmp_path / "chain", tmp_path / "home" / "state")
    assert crowd.kills >= 8
    assert {name for name, _, _ in crowd.acknowledged} == set(WRITERS), "each writer got through"
    with SnapshotChain(tmp_path / "chain") as chain:
        chain.note("the last writer rolls forward what the dead left")
        report = chain.verify()
        assert report.ok, report.problems
        chain._log.refresh()
        (signer,) = chain._log.head_signers
    entries = walker.walk(tmp_path / "chain" / "log", signer).entries
    names = [name_of(data) for data in entries]
    for writer, index, name in crowd.acknowledged:
        assert names[index] == name, f"writer {writer} was told that {name} is entry {index}"
    indices = [index for _, index, _ in crowd.acknowledged]
    assert len(set(indices)) == len(indices)
    written = Counter(name for name in names if name is not None)
    assert written.most_common(1)[0][1] == 1, "nothing is there twice"
    # A writer that is killed between the claim and its answer leaves an entry that nobody was told of: one a life.
    unknown = set(written) - {name for _, _, name in crowd.acknowledged}
    assert len(unknown) <= crowd.kills + 1
    keys = [json.loads(data)["vkey"] for data in entries if json.loads(data)["kind"] == "key"]
    assert len(keys) == len(set(keys)) == len(WRITERS) + 1, "each key announced itself once, in all its lives"
    slots = sorted((tmp_path / "chain" / layout.SLOTS).iterdir())
    assert len(slots) <= len(entries)
