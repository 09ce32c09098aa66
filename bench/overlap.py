"""With overlap, how long does the call that takes a snapshot block, and what is left for the optimizer to wait for?

    python bench/overlap.py              # about a minute; writes bench/results/overlap.json

1 GB in 200 tensors: 100 parameters and their momentum. Training leaves a processor idle here (one thread, and pauses in
place of a forward and backward pass): with saturated ones ``staging="auto"`` does not overlap. What cannot wait is
copied in the call; the rest is copied behind the pause, and the optimizer's next step waits for what is missing.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence

import torch
from torch import nn

from ciuic_async import Checkpointer
from harness.intervals import describe
from harness.output import parser, rows, say, seconds, store, workplace

TENSORS = 100
GOAL_CALL_S = 0.005


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options of this program."""
    made = parser(__doc__)
    made.add_argument("--elements", type=int, default=1_250_000, help="of each parameter")
    made.add_argument("--snapshots", type=int, default=20)
    made.add_argument("--pause", type=float, default=0.4, metavar="SECONDS", help="in place of forward and backward")
    options = made.parse_args(arguments)
    if options.quick:
        options.elements, options.snapshots, options.pause = 10_000, 3, 0.01
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, write, and print the table."""
    options = parse(arguments)
    torch.set_num_threads(1)
    model = nn.ParameterList([nn.Parameter(torch.randn(options.elements)) for _ in range(TENSORS)])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, foreach=True)
    for parameter in model:
        parameter.grad = torch.zeros_like(parameter)
    calls: list[float] = []
    with workplace(options) as folder:
        state = {"model": model, "optimizer": optimizer}
        with Checkpointer(folder / "chain", state, staging="overlap", codec="raw", rng=False) as checkpointer:
            for number in range(options.snapshots + 2):
                optimizer.step()
                begin_s = time.perf_counter()
                pending = checkpointer.save()
                calls.append(time.perf_counter() - begin_s)
                time.sleep(options.pause)
                optimizer.step()
                checkpointer.step()
                pending.wait_durable()
                say(f"snapshot {number + 1}: the call took {seconds(calls[-1])}")
            stats = checkpointer.stats()
    calls, stats = calls[2:], stats[2:]  # both buffers have been used by then
    figures = {"call_s": describe(calls), "gate_s": describe([one.gate_s for one in stats])}
    table = [["", "median", "most"]]
    for name, figure in (("the call", figures["call_s"]), ("the next optimizer step waited", figures["gate_s"])):
        table.append([name, seconds(figure["median"]), seconds(figure["most"])])
    result = {
        "question": "With overlap, how long does the call that takes a snapshot block?",
        "method": "an idle processor, a pause between two optimizer steps; medians with exact 95% intervals",
        "state_bytes": 2 * 4 * TENSORS * options.elements,
        "tensors": 2 * TENSORS,
        "pause_s": options.pause,
        "goal_call_s": GOAL_CALL_S,
        "torn_retries": sum(one.torn_retries for one in stats),
        **figures,
        "table": table,
    }
    store("overlap", result, options)
    rows(table)


if __name__ == "__main__":
    main()
