"""How soon does a killed training go on where its keeper still has the memory?

    python bench/restart.py              # about 5 minutes; writes bench/results/restart.json

A training with ``keeper=True`` takes a snapshot and ends with ``os._exit``; another process restores. Beside it, in
turn, the same restore from the disk with cold files, and copying and digesting as many bytes of memory with as many
threads, into memory that was touched before: nobody who checks what is restored can be faster than that.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from ciuic_async import Checkpointer
from ciuic_async.cli.demo_table import tensor_bytes
from ciuic_async.format.digest import digest
from ciuic_async.options import READ
from harness.intervals import describe
from harness.lost import prepare_training
from harness.opponents import quieten
from harness.output import parser, rows, say, seconds, store, workplace
from restore import drop_from_cache, subset, tensors

CHUNK_BYTES = 4 << 20


def train_and_die(folder: Path, size: str, threads: int) -> None:
    """What the child does. Its state is that of anybody who trains as many steps."""
    checkpointer = Checkpointer(folder, subset(prepare_training(size, threads, steps=2)), keeper=True, every_steps=1)
    pending = checkpointer.step()
    assert pending is not None
    pending.wait_durable()
    os._exit(0)


def restore_s(folder: Path, size: str, threads: int, expected: dict[str, torch.Tensor]) -> float:
    """Restore into fresh objects, and check that every bit is there."""
    state = subset(prepare_training(size, threads, steps=1))
    with Checkpointer(folder, state) as checkpointer:
        begin_s = time.perf_counter()
        assert checkpointer.restore() is not None  # nothing is mapped: every byte has been checked and copied
        taken_s = time.perf_counter() - begin_s
    found = tensors(state)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items()), "restored other bits than saved"
    return taken_s


def copy_and_digest_s(source: torch.Tensor, target: torch.Tensor) -> float:
    """Digest and copy all chunks."""

    def one(start: int) -> None:
        part = source[start : start + CHUNK_BYTES]
        digest(memoryview(part.numpy()))
        target[start : start + CHUNK_BYTES].copy_(part)

    torch.set_num_threads(1)
    with ThreadPoolExecutor(READ.threads) as pool:
        list(pool.map(one, range(0, CHUNK_BYTES, CHUNK_BYTES)))
        begin_s = time.perf_counter()
        list(pool.map(one, range(0, len(source), CHUNK_BYTES)))
        return time.perf_counter() - begin_s


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options of this program."""
    made = parser(__doc__)
    made.add_argument("--sizes", nargs="+", default=["bench", "huge"], metavar="SIZE", help="of the demo's model")
    made.add_argument("--repeats", type=int, default=6)
    made.add_argument("--threads", type=int, default=os.cpu_count(), help="that torch uses")
    made.add_argument("--die-in", type=Path, metavar="FOLDER", help=argparse.SUPPRESS)
    options = made.parse_args(arguments)
    if options.quick:
        options.sizes, options.repeats = ["tiny"], 1
    return options


def measure(options: argparse.Namespace, size: str, folder: Path) -> dict[str, Any]:
    """The three, in turns, at one size of state."""
    training = prepare_training(size, options.threads, steps=2)
    expected = {name: tensor.clone() for name, tensor in tensors(subset(training)).items()}
    size_bytes = sum(tensor.nbytes for tensor in expected.values())
    source = torch.randint(0, 256, (size_bytes,), dtype=torch.uint8)
    target = torch.zeros_like(source)
    times: dict[str, list[float]] = {"from memory": [], "from the disk, cold": [], "copy and digest": []}
    chain = folder / "chain"
    child = [sys.executable, __file__, "--sizes", size, "--threads", str(options.threads), "--die-in", str(chain)]
    for number in range(options.repeats):
        subprocess.run(child, check=True)
        drop_from_cache(chain)
        times["from memory"].append(restore_s(chain, size, options.threads, expected))
        drop_from_cache(chain)
        times["from the disk, cold"].append(restore_s(chain, size, options.threads, expected))
        times["copy and digest"].append(copy_and_digest_s(source, target))
        torch.set_num_threads(options.threads)
        shutil.rmtree(chain)
        say(f"{size} {number + 1}: " + ", ".join(f"{name} {seconds(found[-1])}" for name, found in times.items()))
    figures = {name: describe(found) for name, found in times.items()}
    return {
        "state_bytes": tensor_bytes(training),
        "seconds": figures,
        "times_copy_and_digest": figures["from memory"]["median"] / figures["copy and digest"]["median"],
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, write, and print the table."""
    options = parse(arguments)
    quieten()
    if options.die_in is not None:
        train_and_die(options.die_in, options.sizes[0], options.threads)
    with workplace(options) as folder, tempfile.TemporaryDirectory(prefix="ciuic-") as runtime:
        os.environ["XDG_RUNTIME_DIR"] = runtime  # keepers of other runs are not our business
        by_size = {size: measure(options, size, folder) for size in options.sizes}
    names = list(next(iter(by_size.values()))["seconds"])
    table = [["state", *names, "times copy and digest"]]
    for found in by_size.values():
        medians = [seconds(found["seconds"][name]["median"]) for name in names]
        table.append([f"{found['state_bytes'] / 1e9:.1f} GB", *medians, f"{found['times_copy_and_digest']:.2f}"])
    result = {
        "question": "How soon does a killed training go on where its keeper still has the memory?",
        "method": "in turns; medians, exact 95% intervals from order statistics; every restored bit is compared",
        "threads": options.threads,
        "sizes": by_size,
        "table": table,
    }
    store("restart", result, options)
    rows(table)


if __name__ == "__main__":
    main()
