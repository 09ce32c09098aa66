"""How soon is a snapshot safe? From the call until everything is on stable storage, idle and beside training.

    python bench/time_to_durable.py      # about 4 minutes; writes bench/results/time_to_durable.json

Contenders take turns. And: how close does the engine come to the disk? Its write with ``codec="raw"`` is compared to a
plain loop that writes as many bytes from one aligned buffer with O_DIRECT, in the same minute, several times each.
"""

from __future__ import annotations

import argparse
import mmap
import os
import shutil
import statistics
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ciuic_async.cli.demo_table import tensor_bytes
from ciuic_async.cli.demo_training import Training
from harness.contenders import Ciuic, Contender, Entry
from harness.intervals import describe
from harness.lost import WARM_UP_SNAPSHOTS, prepare_training
from harness.opponents import CONTENDERS, quieten, runnable
from harness.output import parser, rows, say, seconds, store, workplace

DEFAULT = [
    "ciuic-async",
    "ciuic-async, codec=raw",
    "torch.save + fsync",
    "dcp.async_save",
    "dcp.async_save, cached stager",
    "dcp.async_save, process",
    "torch_checkpointing",
    "torchsnapshot.async_take",
    "safetensors + fsync",
]
BUFFER_BYTES = 4 << 20


def idle_s(contender: Contender, training: Training) -> float:
    """From the call to durable while nothing else runs."""
    training.update()
    contender.step()
    begin_s = time.perf_counter()
    contender.save()
    contender.wait()
    return time.perf_counter() - begin_s


def busy_s(contender: Contender, training: Training) -> float:
    """From the call to durable while training goes on; a thread waits for the moment."""
    training.update()
    contender.step()
    done_s: list[float] = []

    def watch() -> None:
        contender.wait()
        done_s.append(time.perf_counter())

    begin_s = time.perf_counter()
    contender.save()
    watcher = threading.Thread(target=watch)
    watcher.start()
    while watcher.is_alive():
        training.update()
        contender.step()
    watcher.join()
    if not done_s:
        raise RuntimeError("the snapshot failed; the watching thread's traceback is above")
    return done_s[0] - begin_s


def measure(entry: Entry, training: Training, folder: Path, repeats: int) -> tuple[list[float], list[float]]:
    """One contender's turn: idle and busy times. ``folder`` is made and gone afterwards."""
    folder.mkdir()
    contender = entry.make(folder, training.state())
    try:
        for _ in range(WARM_UP_SNAPSHOTS):
            idle_s(contender, training)
        os.sync()
        idle = [idle_s(contender, training) for _ in range(repeats)]
        busy = [busy_s(contender, training) for _ in range(repeats)]
        return idle, busy
    finally:
        contender.close()
        shutil.rmtree(folder)


def plain_loop_s(path: Path, size_bytes: int) -> float:
    """Write ``size_bytes``, rounded up to whole buffers, with O_DIRECT from one aligned buffer; fsync; seconds.

    Raises:
        OSError: the file system has no O_DIRECT.
    """
    with mmap.mmap(-1, BUFFER_BYTES) as buffer:
        buffer[:] = os.urandom(BUFFER_BYTES)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_DIRECT, 0o600)
        try:
            begin_s = time.perf_counter()
            for _ in range(-(-size_bytes // BUFFER_BYTES)):
                if os.write(descriptor, buffer) != BUFFER_BYTES:
                    raise OSError(f"{path}: a write was cut short")
            os.fsync(descriptor)
            return time.perf_counter() - begin_s
        finally:
            os.close(descriptor)
            path.unlink()


def beside_the_disk(training: Training, folder: Path, repeats: int) -> dict[str, Any]:
    """The engine's way from staged to durable with ``codec="raw"``, alternating with the plain loop."""
    engine = Ciuic(folder / "chain", training.state(), codec="raw")
    ours: list[float] = []
    writing: list[float] = []
    plain: list[float] = []
    stored = 0
    try:
        for number in range(WARM_UP_SNAPSHOTS + repeats):
            idle_s(engine, training)
            stats = engine.stats()[-1]
            stored = stats.stored_bytes
            plain_s = plain_loop_s(folder / "plain", stored)
            if number >= WARM_UP_SNAPSHOTS and stats.persist_s is not None and stats.write_s is not None:
                ours.append(stats.persist_s)
                writing.append(stats.write_s)
                plain.append(plain_s)
    finally:
        engine.close()
        shutil.rmtree(folder / "chain")
    return {
        "stored_bytes": stored,
        "engine_persist_s": describe(ours),
        "engine_write_s": describe(writing),
        "plain_loop_s": describe(plain),
        "engine_write_gb_per_s": stored / statistics.median(writing) / 1e9,
        "engine_gb_per_s": stored / statistics.median(ours) / 1e9,
        "plain_gb_per_s": stored / statistics.median(plain) / 1e9,
        "times_the_plain_loop": statistics.median(a / b for a, b in zip(ours, plain, strict=True)),
        "writing_times_the_plain_loop": statistics.median(a / b for a, b in zip(writing, plain, strict=True)),
    }


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options of this program."""
    made = parser(__doc__)
    made.add_argument("--size", default="bench", help="of the demo's model")
    made.add_argument("--rounds", type=int, default=2)
    made.add_argument("--repeats", type=int, default=3, help="of each, in one round")
    made.add_argument("--threads", type=int, default=os.cpu_count(), help="that training uses")
    made.add_argument("--contenders", nargs="+", default=DEFAULT, choices=list(CONTENDERS), metavar="NAME")
    options = made.parse_args(arguments)
    if options.quick:
        options.size, options.rounds, options.repeats = "tiny", 1, 1
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, write, and print the table."""
    options = parse(arguments)
    quieten()
    training = prepare_training(options.size, options.threads)
    with workplace(options) as folder:
        names, missing = runnable(options.contenders, folder)
        idle: dict[str, list[float]] = {name: [] for name in names}
        busy: dict[str, list[float]] = {name: [] for name in names}
        for number in range(options.rounds):
            for name in names if number % 2 == 0 else reversed(names):
                alone, beside = measure(CONTENDERS[name], training, folder / "turn", options.repeats)
                idle[name] += alone
                busy[name] += beside
                say(f"round {number + 1}: {name} {seconds(min(alone))} idle, {seconds(min(beside))} beside training")
        try:
            disk = beside_the_disk(training, folder, options.rounds * options.repeats)
        except OSError as error:
            disk = {"missing": str(error)}
    table = [["contender", "idle", "beside training"]]
    table += [[name, *(seconds(statistics.median(times[name])) for times in (idle, busy))] for name in names]
    result = {
        "question": "How soon is a snapshot safe?",
        "method": "from the call until all is fsynced; medians, exact 95% intervals from order statistics",
        "state_bytes": tensor_bytes(training),
        "threads": options.threads,
        "missing": missing,
        "contenders": {
            name: {
                "durability": CONTENDERS[name].durability,
                "idle_s": describe(idle[name]),
                "beside_training_s": describe(busy[name]),
            }
            for name in names
        },
        "disk": disk,
        "table": table,
    }
    store("time_to_durable", result, options)
    rows(table)
    say(str({name: figure for name, figure in disk.items() if not isinstance(figure, dict)}))


if __name__ == "__main__":
    main()
