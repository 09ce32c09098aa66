"""Does it scale? Time blocked and time to durable against the size of the state, and against its number of tensors.

    python bench/scaling.py              # about 3 minutes; writes bench/results/scaling.json

No training: random tensors that change a little before every snapshot, so that nothing is deduplicated. A size that
would not fit into memory four times is left out.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from harness.contenders import Entry
from harness.lost import WARM_UP_SNAPSHOTS
from harness.opponents import CONTENDERS, quieten, runnable
from harness.output import available_bytes, parser, rows, say, seconds, store, workplace

DEFAULT = ["ciuic-async", "ciuic-async, codec=raw", "torch.save + fsync", "dcp.async_save, cached stager"]
COPIES = 4
"""Times the state that a contender may need: the state, two buffers, and what an opponent copies."""


class Tensors:
    """A state of ``count`` tensors, together ``size_bytes`` long."""

    def __init__(self, size_bytes: int, count: int) -> None:
        self.tensors = [torch.randn(max(1, size_bytes // 4 // count)) for _ in range(count)]

    def change(self) -> None:
        """What an optimizer step would do."""
        torch._foreach_mul_(self.tensors, 1.0009765625)  # the only call that is quick for 20,000 tensors

    def state_dict(self) -> dict[str, Any]:
        return {f"tensor{number}": tensor for number, tensor in enumerate(self.tensors)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name, tensor in self.state_dict().items():
            tensor.copy_(state[name])


def measure(entry: Entry, state: Tensors, folder: Path, snapshots: int) -> dict[str, float]:
    """Medians over some snapshots, after a warm-up: seconds blocked in the call, and until durable."""
    folder.mkdir()
    contender = entry.make(folder, {"tensors": state})
    stall_s, durable_s = [], []
    try:
        for number in range(WARM_UP_SNAPSHOTS + snapshots):
            state.change()
            contender.step()
            begin_s = time.perf_counter()
            contender.save()
            returned_s = time.perf_counter()
            contender.wait()
            if number >= WARM_UP_SNAPSHOTS:
                stall_s.append(returned_s - begin_s)
                durable_s.append(time.perf_counter() - begin_s)
    finally:
        contender.close()
        shutil.rmtree(folder)
    return {"stall_s": statistics.median(stall_s), "durable_s": statistics.median(durable_s)}


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options of this program."""
    made = parser(__doc__)
    made.add_argument("--gigabytes", type=float, nargs="+", default=[0.1, 0.4, 1.6, 4.0])
    made.add_argument("--tensors", type=int, nargs="+", default=[1, 100, 1_000, 20_000])
    made.add_argument("--tensors-gigabytes", type=float, default=0.4, help="of all tensors together")
    made.add_argument("--snapshots", type=int, default=3)
    made.add_argument("--contenders", nargs="+", default=DEFAULT, choices=list(CONTENDERS), metavar="NAME")
    options = made.parse_args(arguments)
    if options.quick:
        options.gigabytes, options.tensors, options.tensors_gigabytes = [0.001, 0.004], [1, 50], 0.002
        options.snapshots = 1
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, write, and print the table."""
    options = parse(arguments)
    quieten()
    cases = [("size", gigabytes, max(1, round(100 * gigabytes))) for gigabytes in options.gigabytes]
    cases += [("tensors", options.tensors_gigabytes, count) for count in options.tensors]
    points: list[dict[str, Any]] = []
    table = [["state", "tensors", "contender", "blocked", "durable after"]]
    with workplace(options) as folder:
        names, missing = runnable(options.contenders, folder)
        for kind, gigabytes, count in cases:
            size_bytes = int(gigabytes * 1e9)
            if COPIES * size_bytes > available_bytes():
                missing[f"{gigabytes} GB"] = f"needs {COPIES * gigabytes:.0f} GB of memory"
                say(f"{gigabytes} GB left out: {missing[f'{gigabytes} GB']}")
                continue
            state = Tensors(size_bytes, count)
            for name in names:
                snapshots = options.snapshots if gigabytes < 1 else 1
                figures = measure(CONTENDERS[name], state, folder / "turn", snapshots)
                points.append({"against": kind, "bytes": size_bytes, "tensors": count, "contender": name, **figures})
                say(f"{gigabytes} GB in {count} tensors: {name} {seconds(figures['durable_s'])}")
                table.append(
                    [f"{gigabytes} GB", str(count), name, seconds(figures["stall_s"]), seconds(figures["durable_s"])]
                )
    result = {
        "question": "Does it scale?",
        "method": "idle machine, random float32 tensors that change before every snapshot; medians",
        "missing": missing,
        "points": points,
        "table": table,
    }
    store("scaling", result, options)
    rows(table)


if __name__ == "__main__":
    main()
