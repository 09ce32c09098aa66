"""``ciuic demo``: train, snapshot while training, be killed, resume, and show that nothing was lost.

A small GPT is trained once without interruption and without this engine. Then it is trained again in a child process
that snapshots as it goes, is killed with SIGKILL at random moments, and is started again until it is done. Both must
end with the same bits. Finally, what a snapshot costs training is measured beside the usual ways of saving.

Torch lives in the children only (``demo_training.py``, ``demo_table.py``): this process starts them and watches.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ciuic_async.chain import SnapshotChain
from ciuic_async.cli import log
from ciuic_async.cli.output import Subparsers, add_command, human_bytes, print_json, text
from ciuic_async.config.settings import bare_environment
from ciuic_async.errors import InternalError, NotFoundError, UsageError

SILENCE_LIMIT_S = 300.0
"""A child that reports nothing for this long is given up: the slowest step measured takes a second."""
BUSY_RATIO = 1.3
"""If training alone varies by this factor from round to round, so does everything that is compared to it."""


@dataclass(frozen=True, slots=True)
class Scale:
    """How long the demo takes."""

    size: str
    steps: int
    every_steps: int
    table: tuple[str, ...]
    """Arguments of ``demo_table``."""


FULL = Scale("small", steps=60, every_steps=5, table=("--size", "large"))
QUICK = Scale("tiny", steps=30, every_steps=3, table=("--size", "tiny", "--rounds", "3", "--alone"))


@dataclass(frozen=True, slots=True)
class Kill:
    """When a child is killed.

    ``delay`` is where in the step that follows ``step``, as a share of a step's time. With ``in_write`` it is instead
    the moment ``step``'s snapshot has been captured, while its bytes are being written.
    """

    step: int
    delay: float = 0.0
    in_write: bool = False


@dataclass(slots=True)
class Life:
    """What one child did between its start and its end."""

    started: int = 0
    step: int = 0
    snapshots: set[int] = field(default_factory=set)
    durable: set[int] = field(default_factory=set)
    killed: bool = False
    result: dict[str, Any] | None = None

    @property
    def unfinished(self) -> list[int]:
        """Snapshots that were captured but not reported durable when it ended."""
        return sorted(self.snapshots - self.durable)

    def note(self, line: str) -> str:
        """Take in one line of the child's report; what kind of line it was."""
        kind, _, rest = line.partition(" ")
        if kind == "started":
            self.started = self.step = int(rest)
        elif kind == "step":
            self.step = int(rest.split()[0])
        elif kind == "snapshot":
            self.snapshots.add(int(rest))
        elif kind == "durable":
            self.durable.add(int(rest))
        elif kind == "done":
            self.result = json.loads(rest)
        return kind


class Child:
    """A process whose report is read line by line, never waiting longer than told. Used by one thread.

    A context manager: on leaving it the process is gone, whatever happened.
    """

    def __init__(self, command: Sequence[str]) -> None:
        self._process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, bufsize=0, env=bare_environment()
        )
        assert self._process.stdout is not None
        self._output = self._process.stdout
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._output, selectors.EVENT_READ)
        self._begun = b""

    def lines(self, timeout_s: float) -> Iterator[str]:
        """Lines as they come, until the output ends.

        Raises:
            TimeoutError: ``timeout_s`` seconds have passed since the call, whether lines came or not.
        """
        deadline_s = time.monotonic() + timeout_s
        while True:
            while b"\n" in self._begun:
                line, _, self._begun = self._begun.partition(b"\n")
                yield line.decode()
            if not self._selector.select(max(0.0, deadline_s - time.monotonic())):
                raise TimeoutError
            data = os.read(self._output.fileno(), 1 << 16)
            if not data:
                return
            self._begun += data

    def next_line(self, timeout_s: float) -> str | None:
        """The next line; None when the output has ended. Raises TimeoutError."""
        return next(self.lines(timeout_s), None)

    def kill(self) -> None:
        """SIGKILL: the process gets no chance to do anything more. What it had reported can still be read."""
        self._process.send_signal(signal.SIGKILL)

    def end(self) -> int:
        """Wait for its end; its exit status, negative for a signal."""
        return self._process.wait(SILENCE_LIMIT_S)

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *error: object) -> None:
        self._process.kill()
        self._process.wait()
        self._selector.close()
        self._output.close()


def plan_kills(count: int, steps: int, every_steps: int, random: random.Random) -> list[Kill]:
    """``count`` moments in the order of their steps; one of them is while a snapshot is being written.

    All lie after the first snapshot and before the last step. The step before the one with ``in_write`` is left out, so
    that a child killed late in it cannot have that snapshot already.
    """
    if count == 0:
        return []
    snapshot_steps = range(every_steps, steps, every_steps)
    if not snapshot_steps:
        raise UsageError(f"--steps {steps} leaves no snapshot to resume from: it must be more than {every_steps}")
    in_write = random.choice(snapshot_steps)
    others = [step for step in range(every_steps + 1, steps) if step not in (in_write - 1, in_write)]
    if count - 1 > len(others):
        raise UsageError(f"--kills {count} is too many for {steps} steps: at most {len(others) + 1}")
    kills = [Kill(step, delay=random.random()) for step in random.sample(others, count - 1)]
    return sorted([*kills, Kill(in_write, in_write=True)], key=lambda kill: kill.step)


def live(command: Sequence[str], kill: Kill | None, watch: Watch) -> Life:
    """Start the training program and follow it to its end, which is at ``kill`` if it comes to that.

    Raises:
        InternalError: kind ``demo_child``; it failed, or reported nothing for ``SILENCE_LIMIT_S``.
    """
    life = Life()
    with Child(command) as child:
        try:
            follow(child, life, kill, watch)
            status = child.end()
        except (TimeoutError, subprocess.TimeoutExpired) as error:
            message = f"the training reported nothing for {SILENCE_LIMIT_S:.0f} s after step {life.step}"
            raise InternalError(message, kind="demo_child") from error
    life.killed = status == -signal.SIGKILL
    if life.result is None and not (kill and life.killed):
        raise InternalError(f"the training ended with status {status} after step {life.step}", kind="demo_child")
    return life


def follow(child: Child, life: Life, kill: Kill | None, watch: Watch) -> None:
    """Read the child's report to the last line, and kill it when the time has come."""
    stepped_s = time.monotonic()
    step_s = 0.0
    while (line := child.next_line(SILENCE_LIMIT_S)) is not None:
        kind = life.note(line)
        if kind == "step":
            step_s, stepped_s = time.monotonic() - stepped_s, time.monotonic()
            watch.step(life.step)
        if kill is not None and life.step >= kill.step and kind == ("snapshot" if kill.in_write else "step"):
            if not kill.in_write:
                follow_for(child, kill.delay * step_s, life)
            child.kill()
            kill = None


def follow_for(child: Child, seconds: float, life: Life) -> None:
    """Let the child run this long, but not into another step."""
    try:
        for line in child.lines(seconds):
            if life.note(line) == "step":
                return
    except TimeoutError:
        return


class Watch:
    """Messages to a person, on standard error; on a terminal with the current step on a line of its own."""

    def __init__(self, steps: int) -> None:
        self._steps = steps
        self._live = sys.stderr.isatty()

    def say(self, text: str) -> None:
        print(f"\r{text:<78}" if self._live else text, file=sys.stderr, flush=True)

    def step(self, step: int) -> None:
        if self._live:
            print(f"\r  step {step} of {self._steps} ", end="", file=sys.stderr, flush=True)


def command(module: str, *arguments: str) -> list[str]:
    """How a module of this demo is run as a child."""
    return [sys.executable, "-m", f"ciuic_async.cli.{module}", *arguments]


def run_uninterrupted(training: Sequence[str], watch: Watch) -> dict[str, Any]:
    """The run that the other is compared to; its result."""
    life = live(command("demo_training", *training), None, watch)
    assert life.result is not None
    watch.say(f"  uninterrupted, without snapshots: step {life.step}, loss {life.result['loss']:.4f}")
    return life.result


def run_killed(
    training: Sequence[str], chain: str, kills: Sequence[Kill], watch: Watch
) -> tuple[dict[str, Any], list[Life]]:
    """Start, kill and start again until it is done; the last child's result and all lives."""
    lives: list[Life] = []
    planned: list[Kill | None] = [*kills, None]
    for number, kill in enumerate(planned, start=1):
        life = live(command("demo_training", *training, "--chain", chain), kill, watch)
        lives.append(life)
        watch.say(f"  run {number}   {describe(life)}")
        if life.result is not None:
            return life.result, lives
    raise AssertionError("a life without a planned kill ends with a result")


def describe(life: Life) -> str:
    """One line about a life."""
    start = f"resumed from step {life.started:<3}" if life.started else "from scratch         "
    if life.result is not None:
        return f"{start} done: step {life.step}, loss {life.result['loss']:.4f}"
    during = f" while snapshot {life.unfinished[-1]} was being written" if life.unfinished else ""
    return f"{start} trained to step {life.step}, SIGKILL{during}"


def measure(arguments: Sequence[str], folder: Path) -> dict[str, Any]:
    """Run ``demo_table`` in a child; its result."""
    done = subprocess.run(
        command("demo_table", str(folder), *arguments), stdout=subprocess.PIPE, check=False, env=bare_environment()
    )
    if done.returncode != 0:
        raise InternalError(f"the measurement ended with status {done.returncode}", kind="demo_child")
    return dict(json.loads(done.stdout))


def compare(expected: dict[str, str], found: dict[str, str]) -> dict[str, bool]:
    """Part for part, whether two runs ended with the same bits."""
    return {name: expected.get(name) == found.get(name) for name in {**expected, **found}}


def demonstrate(scale: Scale, kill_count: int, folder: Path, chain_url: str, remote: bool) -> dict[str, Any]:
    """All of it; the facts, as ``--json`` prints them.

    Args:
        remote: what a snapshot costs is measured at ``chain_url``'s place too, beside the chain.
    """
    watch = Watch(scale.steps)
    kills = plan_kills(kill_count, scale.steps, scale.every_steps, random.SystemRandom())
    training = ["--size", scale.size, "--steps", str(scale.steps), "--every", str(scale.every_steps)]
    watch.say(f"Training a small GPT on Python's own texts, {scale.steps} steps, a snapshot every {scale.every_steps}")
    expected = run_uninterrupted(training, watch)
    found, lives = run_killed(training, chain_url, kills, watch)
    equal = compare(expected["digests"], found["digests"])

    with SnapshotChain(chain_url, create=False) as chain:
        snapshots = list(chain)
        report = chain.verify()
    for problem in report.problems:
        watch.say(f"  problem: {problem.message}")
    watch.say("Measuring what a snapshot costs training")
    table = measure([*scale.table, *(["--chain", chain_url] if remote else [])], folder)
    mine = table["contenders"]["ciuic-async"]
    return {
        "identical": all(equal.values()),
        "kills": sum(life.killed for life in lives),
        "snapshots": len(snapshots),
        "step_s": table["step_s"],
        "stall_s": mine["stall_s"],
        "lost_s_per_snapshot": mine["lost_s_per_snapshot"],
        "raw_bytes": sum(snapshot.raw_bytes for snapshot in snapshots),
        "stored_bytes": sum(snapshot.stored_bytes for snapshot in snapshots),
        "compared": equal,
        "verified": report.ok,
        "steps": scale.steps,
        "parameters": found["parameters"],
        "loss": found["loss"],
        "resumed_from": [life.started for life in lives],
        "killed_in_write": sum(life.killed and bool(life.unfinished) for life in lives),
        "measured": table,
        "chain": chain_url if remote else None,
    }


def render(facts: dict[str, Any]) -> str:
    """The results as a person reads them; the verdict comes last."""
    ratio = facts["raw_bytes"] / facts["stored_bytes"] if facts["stored_bytes"] else 1.0
    verified = "every byte verified" if facts["verified"] else "VERIFICATION FAILED"
    lines = [
        f"Snapshots      {facts['snapshots']} durable, {verified}",
        f"Kills          {facts['kills']} with SIGKILL, {facts['killed_in_write']} while a snapshot was being written",
        f"Raw            {human_bytes(facts['raw_bytes'])}",
        f"Stored         {human_bytes(facts['stored_bytes'])} ({ratio:.2f}x smaller)",
        "",
        *render_table(facts["measured"]),
    ]
    if facts["chain"]:
        lines.append(f"ciuic-async wrote beside {text(facts['chain'])}, all others to this machine's disk.")
    lines.append("")
    differing = [name.replace("_", " ") for name, equal in facts["compared"].items() if not equal]
    parts = ", ".join(name.replace("_", " ") for name in facts["compared"])
    if differing:
        lines.append(f"NOT IDENTICAL: the interrupted run differs in {', '.join(differing)}.")
    elif not facts["verified"]:
        lines.append("NOT VERIFIED: both runs ended with the same bits, but the chain has problems; see above.")
    else:
        times = "1 time" if facts["kills"] == 1 else f"{facts['kills']} times"
        lines.append(f"Identical: killed {times}, and bit for bit the uninterrupted run's {parts}.")
    return "\n".join(lines)


def render_table(table: dict[str, Any]) -> list[str]:
    """Stall and lost time of every contender."""
    threads = "1 thread" if table["threads"] == [1] else f"{' or '.join(map(str, table['threads']))} threads"
    lines = [
        f"Cost of a snapshot of {human_bytes(table['state_bytes'])}, every {table['every_steps']} steps of "
        f"{milliseconds(table['step_s'])}, training with {threads}, {table['rounds']} rounds",
        "",
        f"{'':<20}{'stall':>10}{'lost time':>12}{'(min to max)':>22}{'stored':>12}",
    ]
    for name, one in table["contenders"].items():
        spread = f"({milliseconds(one['lost_s_min'])} to {milliseconds(one['lost_s_max'])})"
        lines.append(
            f"{name:<20}{milliseconds(one['stall_s']):>10}{milliseconds(one['lost_s_per_snapshot']):>12}{spread:>22}"
            f"{human_bytes(one['stored_bytes']):>12}"
        )
    lines += [
        "",
        "stall: the call that saves, median. lost time: how much longer training took for each snapshot until all",
        "were durable, median of the rounds against as many steps without snapshots. All of them fsync.",
    ]
    if table["step_s_max"] > BUSY_RATIO * table["step_s_min"]:
        lines.append(
            f"This machine is busy with other work: without snapshots a step took {milliseconds(table['step_s_min'])} "
            f"to {milliseconds(table['step_s_max'])}.\nThe figures above say little."
        )
    return lines


def milliseconds(seconds: float) -> str:
    """A cell of the table."""
    return f"{seconds * 1000:.0f} ms"


def add_parser(commands: Subparsers) -> None:
    """Add ``demo`` to the command line."""
    summary = "Train a small GPT, kill it at random moments, resume it, and compare it with an uninterrupted run."
    parser = add_command(commands, "demo", run, summary, chain=False)
    place = parser.add_mutually_exclusive_group()
    place.add_argument("--dir", type=Path, help="keep the chain in this folder (default: a temporary one, removed)")
    place.add_argument("--chain", metavar="URL", help="keep the chain there, in an object store for example")
    parser.add_argument("--kills", type=int, default=3, help="how often to kill it (default: 3)")
    parser.add_argument("--steps", type=int, help="training steps (default: 60, with --quick 30)")
    parser.add_argument("--quick", action="store_true", help="a tiny model, and no opponents in the table")


def run(args: argparse.Namespace) -> int:
    """Run the demo and print what came of it; see ``exit_status``."""
    scale = QUICK if args.quick else FULL
    steps = scale.steps if args.steps is None else args.steps
    if args.kills < 0 or steps < 1:
        raise UsageError(f"--kills {args.kills} --steps {steps}: kills must be 0 or more, steps 1 or more")
    scale = Scale(scale.size, steps, scale.every_steps, scale.table)
    if args.dir is not None and args.dir.exists() and any(args.dir.iterdir()):
        raise UsageError(f"{args.dir} is not empty, and the demo starts a new chain: name another", where=str(args.dir))
    if args.chain is not None:
        check_free(args.chain)
    folder = Path(tempfile.mkdtemp(prefix="ciuic-demo-"))
    try:
        chain = args.chain or str(args.dir or folder / "chain")
        facts = demonstrate(scale, args.kills, folder, chain, remote=args.chain is not None)
        if args.json:
            print_json(facts)
        else:
            print(f"$ ciuic log {text(chain)}")
            log.run(argparse.Namespace(chain=chain, json=False, all=False, graph=False, limit=None, mirror=None))
            print(f"\n{render(facts)}")
    finally:
        shutil.rmtree(folder)
    return exit_status(facts)


def check_free(url: str) -> None:
    """The demo starts a new chain. Raises UsageError where there is one, StoreError where nobody answers."""
    try:
        SnapshotChain(url, create=False).close()
    except NotFoundError as error:
        if error.kind != "no_chain":
            raise
        return
    raise UsageError(f"{url}: there is a chain already, and the demo starts a new one: name another place", where=url)


def exit_status(facts: dict[str, Any]) -> int:
    """0 if both runs ended bit-identical and the chain verifies."""
    return 0 if facts["identical"] and facts["verified"] else 1
