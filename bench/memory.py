"""How much memory does a save take beside training's own? Each contender in a process of its own.

    python bench/memory.py               # about 3 minutes; writes bench/results/memory.json

A child trains, then saves while it trains. Its memory is sampled from outside: anonymous and shared memory of the child
and all its children, shared memory counted once (Pss_Anon and Pss_Shmem). Reported is the peak while saving minus the
peak while only training, in the same process. Files in memory are not counted: the page cache is a burden of those who
write through it, but nobody's own.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ciuic_async.cli.demo_table import tensor_bytes
from harness.contenders import Contender
from harness.lost import prepare_training
from harness.opponents import CONTENDERS, quieten, runnable
from harness.output import parser, rows, say, store, workplace

DEFAULT = [
    "none",
    "ciuic-async",
    "torch.save + fsync",
    "clone + thread + torch.save",
    "dcp.async_save",
    "dcp.async_save, cached stager",
    "dcp.async_save, process",
    "torch_checkpointing",
    "torchsnapshot.async_take",
    "Lightning AsyncCheckpointIO",
    "safetensors + fsync",
]
PERIOD_S = 0.03
ALONE_STEPS = 4
SNAPSHOTS = 2
CHILD_TIMEOUT_S = 300.0


def tell(word: str) -> None:
    """To the parent, which samples: another phase begins."""
    os.write(1, f"phase {word}\n".encode())


def child(name: str, size: str, threads: int, folder: Path) -> None:
    """Train alone, then with snapshots."""
    quieten()
    training = prepare_training(size, threads)
    contender: Contender = CONTENDERS[name].make(folder, training.state())
    try:
        tell("training")
        for _ in range(ALONE_STEPS):
            training.update()
        tell(f"saving {tensor_bytes(training)}")
        for _ in range(SNAPSHOTS):
            contender.step()
            contender.save()
            while True:
                training.update()
                if contender.is_durable():
                    break
            contender.wait()
        tell("done")
    finally:
        contender.close()


def command_line(pid: int) -> bytes:
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


def family(pid: int) -> list[int]:
    """A process and all its descendants, but for those about to run a command.

    Between vfork and exec a child shows its parent's memory, and its command line, as its own.
    """
    found = [pid]
    own = command_line(pid)
    for parent in found:
        with suppress(OSError):
            for task in Path(f"/proc/{parent}/task").iterdir():
                children = [int(number) for number in (task / "children").read_text().split()]
                found += [child for child in children if command_line(child) not in (own, b"")]
    return found


def resident_bytes(members: set[int]) -> tuple[int, int]:
    """Anonymous and shared memory of processes, and the latter alone. Who just ended counts nothing."""
    whole = shared = 0
    for member in members:
        with suppress(OSError):
            for line in Path(f"/proc/{member}/smaps_rollup").read_text().splitlines():
                if line.startswith(("Pss_Anon:", "Pss_Shmem:")):
                    size_bytes = int(line.split()[1]) * 1024
                    whole += size_bytes
                    shared += size_bytes if line.startswith("Pss_Shmem:") else 0
    return whole, shared


def measure(name: str, size: str, threads: int, folder: Path) -> dict[str, Any]:
    """Peaks of one contender.

    Raises:
        RuntimeError: the child failed.
    """
    folder.mkdir()
    command = [sys.executable, __file__, "--child", name, "--size", size, "--threads", str(threads)]
    command += ["--folder", str(folder)]
    peaks = {"training": (0, 0), "saving": (0, 0)}
    phase = ""
    state_bytes = 0
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    ended = threading.Event()

    def sample() -> None:
        before: set[int] = set()
        while not ended.wait(PERIOD_S):
            seen, members = phase, set(family(process.pid))
            found = resident_bytes(members & before)  # who is gone in a moment is no part of saving
            before = members
            if seen in peaks and seen == phase:
                peaks[seen] = max(peaks[seen], found)

    sampler = threading.Thread(target=sample)
    sampler.start()
    watchdog = threading.Timer(CHILD_TIMEOUT_S, process.kill)
    watchdog.start()
    try:
        for line in process.stdout:
            word, *rest = line.removeprefix("phase ").split()
            if line.startswith("phase "):
                phase = word
                state_bytes = int(rest[0]) if rest else state_bytes
        status = process.wait()
    finally:
        watchdog.cancel()
        ended.set()
        sampler.join()
        shutil.rmtree(folder)
    if status != 0 or phase != "done":
        raise RuntimeError(f"{name}: the child ended with status {status} in phase {phase!r}")
    (alone, _), (peak, shared) = peaks["training"], peaks["saving"]
    return {
        "state_bytes": state_bytes,
        "training_peak_bytes": alone,
        "saving_peak_bytes": peak,
        "shared_bytes_at_peak": shared,
        "added_bytes": peak - alone,
        "added_over_state": (peak - alone) / state_bytes,
    }


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options of this program."""
    made = parser(__doc__)
    made.add_argument("--size", default="bench", help="of the demo's model")
    made.add_argument("--threads", type=int, default=os.cpu_count(), help="that training uses")
    made.add_argument("--contenders", nargs="+", default=DEFAULT, choices=list(CONTENDERS), metavar="NAME")
    made.add_argument("--child", choices=list(CONTENDERS), help=argparse.SUPPRESS)
    options = made.parse_args(arguments)
    if options.quick:
        options.size = "tiny"
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, write, and print the table."""
    options = parse(arguments)
    if options.child is not None:
        child(options.child, options.size, options.threads, options.folder)
        return
    quieten()
    results = {}
    with workplace(options) as folder:
        names, missing = runnable(options.contenders, folder)
        for name in names:
            began_s = time.monotonic()
            results[name] = measure(name, options.size, options.threads, folder / "turn")
            added_mb = results[name]["added_bytes"] / 1e6
            say(f"{name}: {added_mb:.0f} MB more, {time.monotonic() - began_s:.0f} s")
    table = [["contender", "memory added", "times the state"]]
    table += [
        [name, f"{one['added_bytes'] / 1e6:.0f} MB", f"{one['added_over_state']:.2f}"] for name, one in results.items()
    ]
    sampling = f"sampled every {PERIOD_S * 1000:.0f} ms, {SNAPSHOTS} snapshots"
    result = {
        "question": "How much memory does a save take beside training's own?",
        "method": f"peak Pss_Anon + Pss_Shmem of a process and its children, {sampling}",
        "threads": options.threads,
        "missing": missing,
        "contenders": results,
        "table": table,
    }
    store("memory", result, options)
    rows(table)


if __name__ == "__main__":
    main()
