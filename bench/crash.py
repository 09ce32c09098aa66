"""What is left after a kill, a power cut, a full disk or a flipped bit? This engine beside others, as they are shipped.

    python bench/crash.py                # about 15 minutes; writes bench/results/crash.json

Needs strace, and leave to attach it. ``harness/crash.py`` says how each contender saves and loads, ``harness/power.py``
what a power cut leaves. Nothing here is timed: a busy machine gives the same answers.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.crash import CONTENDERS, SAVES
from harness.output import BENCH, parser, rows, say, store, workplace

EVERYTHING = 1 << 30
HEAD = [
    "contender",
    "killed: lost",
    "killed: torn",
    "power cut: lost",
    "power cut: torn",
    "names kept: lost",
    "names kept: torn",
    "disk full: lost",
    "bytes flipped: silently wrong",
]


METHOD = (
    "One save that was acknowledged, then another that is disturbed. Killed: SIGKILL at every system call of it that "
    "concerns its files. Power cut: every moment since the first acknowledgement, what was not synced is gone; names "
    "kept: the same, but every name and truncation is there. Disk full: no file may grow beyond n/16 of the largest "
    "(RLIMIT_FSIZE). Flipped: one bit in each of 2,000 bytes of one saved state, drawn at random. Lost: what was "
    "acknowledged loads no more. Torn: the newest that is visible does not load, an older one does."
)


@dataclass(frozen=True, slots=True)
class Plan:
    """How many cases of each kind, at most."""

    kills: int = EVERYTHING
    cuts: int = EVERYTHING
    sizes: int = 16
    flips: int = 2000


QUICK = Plan(kills=3, cuts=3, sizes=2, flips=20)


class Forge:
    """``python -m harness.crash``, asked one thing at a time."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._number = 0
        home = {name: str(folder / name.lower()) for name in ("XDG_CONFIG_HOME", "XDG_STATE_HOME")}
        self._errors = (folder / "stderr.txt").open("w+")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "harness.crash"],
            cwd=BENCH,
            env={**os.environ, **home, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )

    def place(self, name: str) -> Path:
        """A path that was not used before."""
        self._number += 1
        return self._folder / f"{name}-{self._number}"

    def ask(self, action: str, contender: str, folder: Path, **more: Any) -> dict[str, Any]:
        """The answer to one request.

        Raises:
            RuntimeError: with the reason why it could not be done.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        request = {"action": action, "contender": contender, "folder": str(folder), **more}
        print(json.dumps(request), file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        if not line:
            self._errors.seek(0)
            raise RuntimeError(f"the forge died: {self._errors.read()[-2000:]}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer

    def close(self) -> None:
        """End it, and with it nothing else is left."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait(timeout=60)
        self._errors.close()


def spread(count: int, samples: int) -> list[int]:
    """``samples`` numbers evenly over 0..count-1; all of them if there are no more."""
    if samples >= count:
        return list(range(count))
    return sorted({round(place * (count - 1) / max(1, samples - 1)) for place in range(samples)})


def killed(forge: Forge, contender: str, plan: Plan) -> dict[str, Any]:
    """SIGKILL at each system call of the second save that concerns its files."""
    folder = forge.place("points")
    points = forge.ask("kill_points", contender, folder, log=str(forge.place("log")), judged=False)["points"]
    shutil.rmtree(folder)
    seen: Counter[str] = Counter()
    missed = 0
    for number in spread(len(points), plan.kills):
        call, at = points[number]
        folder = forge.place("kill")
        trace = ["-o", "/dev/null", "-e", f"trace={call}", "-e", f"inject={call}:signal=KILL:when={at}"]
        answer = forge.ask("experiment", contender, folder, trace=trace)
        missed += answer["saved"]
        seen[answer["verdict"]] += 1
        shutil.rmtree(folder)
    return {"cases": seen.total(), **seen, "not_reached": missed}


def full(forge: Forge, contender: str, plan: Plan) -> dict[str, Any]:
    """No file of the second save may be larger than a part of what the largest one wants to be."""
    folder = forge.place("whole")
    forge.ask("experiment", contender, folder, saves=1, judged=False)
    largest = max(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    shutil.rmtree(folder)
    seen: Counter[str] = Counter()
    falsely = 0
    for number in range(plan.sizes):
        folder = forge.place("full")
        answer = forge.ask("experiment", contender, folder, limit_bytes=largest * number // plan.sizes)
        falsely += answer["acknowledged"] == SAVES
        seen[answer["verdict"]] += 1
        shutil.rmtree(folder)
    return {"cases": seen.total(), **seen, "saved_all_the_same": falsely}


def flipped(forge: Forge, contender: str, plan: Plan) -> dict[str, Any]:
    """One bit in each of a sample of bytes, one at a time."""
    folder = forge.place("flips")
    forge.ask("experiment", contender, folder, saves=1, judged=False)
    answer = forge.ask("flips", contender, folder, samples=plan.flips)
    shutil.rmtree(folder)
    return answer


def cut(forge: Forge, contender: str, plan: Plan) -> dict[str, Any]:
    """Every moment from the first acknowledgement to the end of the second save."""
    folder, state = forge.place("power"), forge.place("state")
    return forge.ask("power_cuts", contender, folder, log=str(forge.place("log")), state=str(state), samples=plan.cuts)


QUESTIONS = {"killed": killed, "power_cut": cut, "disk_full": full, "bit_flipped": flipped}


def probe(forge: Forge, names: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Contenders that save and load here, and why the others do not."""
    good: list[str] = []
    missing: dict[str, str] = {}
    for name in names:
        folder = forge.place("probe")
        answer = forge.ask("experiment", name, folder)
        shutil.rmtree(folder)
        if answer["saved"] and answer["verdict"] == "good":
            good.append(name)
        else:
            missing[name] = answer["failure"] or f"saved, and loads as {answer['verdict']}"
            say(f"{name} does not run here: {missing[name]}")
    return good, missing


def part(found: dict[str, Any] | None, word: str) -> str:
    """How often, of how often, for people."""
    return "-" if found is None else f"{found.get(word, 0)} of {found['cases']}"


def row(name: str, answers: dict[str, Any]) -> list[str]:
    """One contender's line of the table."""
    cuts = answers["power_cut"] or {"strict": None, "ordered": None}
    torn = [answers["killed"], cuts["strict"], cuts["ordered"]]
    cells = [cell for found in torn for cell in (part(found, "lost"), part(found, "torn"))]
    return [name, *cells, part(answers["disk_full"], "lost"), part(answers["bit_flipped"], "wrong")]


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options of this program."""
    made = parser(__doc__)
    made.add_argument("--contenders", nargs="+", default=list(CONTENDERS), choices=list(CONTENDERS), metavar="NAME")
    return made.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Crash everybody, write, and print the table."""
    options = parse(arguments)
    plan = QUICK if options.quick else Plan()
    contenders: dict[str, dict[str, Any]] = {}
    refused: dict[str, dict[str, str]] = {}
    with workplace(options) as folder:
        forge = Forge(folder.resolve())
        try:
            names, missing = probe(forge, options.contenders)
            for name in names:
                contenders[name] = {}
                for question, answer in QUESTIONS.items():
                    try:
                        contenders[name][question] = answer(forge, name, plan)
                    except RuntimeError as error:
                        contenders[name][question] = None
                        refused.setdefault(name, {})[question] = str(error)
                    say(f"{name}, {question}: {contenders[name][question] or refused[name][question]}")
        finally:
            forge.close()
    table = [HEAD, *[row(name, answers) for name, answers in contenders.items()]]
    result = {
        "question": "What is left after a kill, a power cut, a full disk or a flipped bit?",
        "method": METHOD,
        "missing": missing,
        "not_answered": refused,
        "contenders": contenders,
        "table": table,
    }
    store("crash", result, options)
    rows(table)


if __name__ == "__main__":
    main()
