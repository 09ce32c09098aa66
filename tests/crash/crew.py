"""Real processes that train, read and leave in their own ways: forked from one that has imported everything once.

``Crew.start`` gives a ``Hand``: a child that does one scenario of ``crew_lives.py``, several of them at once if wanted.
It ends as an interpreter of its own ends, with all that belongs to that, and whatever it says on stderr is kept.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.crash.faults import ROOT

DEADLINE_S = 30.0
"""What has not ended by then hangs."""


@dataclass(frozen=True, slots=True)
class Ended:
    """What a child said, and how it ended."""

    code: int
    """Exit code; negative: the signal that killed it."""
    lines: list[str]
    stderr: str

    def numbers(self, word: str) -> list[int]:
        """Of the lines that begin with ``word`` the number behind it."""
        return [int(line.split()[1]) for line in self.lines if line.split()[0] == word]


class Hand:
    """One child at work."""

    def __init__(self, crew: Crew, pid: int, said: Path, stderr: Path) -> None:
        self.pid = pid
        self._crew = crew
        self._stderr = stderr
        self._said = open(said)  # noqa: SIM115 -- closed by end; waits until the child opens its side
        self._lines: list[str] = []

    def line(self) -> str:
        """The next thing it says. Empty when it has ended."""
        if not select.select([self._said], [], [], DEADLINE_S)[0]:
            self._overdue()
        line = self._said.readline().rstrip("\n")
        if line:
            self._lines.append(line)
        return line

    def wait_for(self, word: str) -> None:
        """Read until it says ``word``."""
        while not (line := self.line()).startswith(word):
            assert line, f"it ended before it said {word}: {self._lines} {self._stderr.read_text()}"

    def interrupt(self) -> None:
        os.kill(self.pid, signal.SIGINT)

    def interrupt_until_it_ends(self) -> None:
        """For a child that waits, some time soon, and ignores what comes before."""
        end = os.pidfd_open(self.pid)
        try:
            deadline = time.monotonic() + DEADLINE_S
            while not select.select([end], [], [], 0.02)[0]:
                if time.monotonic() > deadline:
                    self._overdue()
                self.interrupt()
        finally:
            os.close(end)

    def end(self) -> Ended:
        """Wait for its end; one that does not end within ``DEADLINE_S`` is killed and the test fails."""
        end = os.pidfd_open(self.pid)
        try:
            with self._said:
                while self.line():
                    continue
            if not select.select([end], [], [], DEADLINE_S)[0]:
                self._overdue()
        finally:
            os.close(end)
        status = int(self._crew.ask({"wait": self.pid}))
        return Ended(os.waitstatus_to_exitcode(status), self._lines, self._stderr.read_text())

    def _overdue(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        raise AssertionError(f"it hangs; it said {self._lines[-5:]}, and on stderr {self._stderr.read_text()[-3000:]}")


class Crew:
    """The process that children are forked from. Belongs to one thread.

    Args:
        home: for keys, and for what children say.
    """

    def __init__(self, home: Path) -> None:
        home.mkdir(parents=True, exist_ok=True)
        self._home = home
        self._number = 0
        environment = {**os.environ, "XDG_CONFIG_HOME": str(home / "config"), "XDG_STATE_HOME": str(home / "state")}
        environment["OMP_NUM_THREADS"] = "1"
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.crash.crew_lives"],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, request: dict[str, Any]) -> str:
        """One request to the process, one line of answer."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, "the crew died"
        return answer

    def start(self, scenario: str, chain: Path, **options: Any) -> Hand:
        """A child that does a scenario on a chain."""
        self._number += 1
        said, stderr = (self._home / f"{self._number}.{suffix}" for suffix in ("said", "stderr"))
        os.mkfifo(said)
        request = {"scenario": scenario, "chain": str(chain), "options": options}
        pid = int(self.ask({**request, "said": str(said), "stderr": str(stderr)}))
        return Hand(self, pid, said, stderr)

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait(timeout=30)


@contextmanager
def crew(home: Path) -> Iterator[Crew]:
    """A crew for a ``with`` block."""
    opened = Crew(home)
    try:
        yield opened
    finally:
        opened.close()
