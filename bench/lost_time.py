"""How much training time does one snapshot cost? This engine beside what people use, in one run.

    python bench/lost_time.py            # about 18 minutes; writes bench/results/lost_time_cpu.json

Lost time per snapshot = (wall time of n steps with a snapshot - wall time of as many steps without) / snapshots;
training goes on until the snapshot is on stable storage. ``harness/lost.py`` says how the machine's drift is kept out.
All write at equal durability; "none" takes no snapshots at all and shows the noise.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence

from ciuic_async.cli.demo_table import tensor_bytes
from harness.lost import Plan, prepare_training, run_rounds, summarize, table
from harness.opponents import CONTENDERS, quieten, runnable
from harness.output import parser, rows, say, store, workplace

HEADLINE = "ciuic-async"
DEFAULT = [
    "none",
    HEADLINE,
    "ciuic-async, codec=raw",
    "torch.save + fsync",
    "clone + thread + torch.save",
    "dcp.async_save",
    "dcp.async_save, cached stager",
    "dcp.async_save, process",
    "torch_checkpointing",
    "torchsnapshot.async_take",
    "Lightning AsyncCheckpointIO",
]


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options of this program."""
    made = parser(__doc__)
    made.add_argument("--size", default="bench", help="of the demo's model")
    made.add_argument("--rounds", type=int, default=5)
    made.add_argument("--blocks", type=int, default=2, help="snapshots of one contender in one round")
    made.add_argument("--steps", type=int, default=4, help="least number of steps in a block")
    made.add_argument("--threads", type=int, default=os.cpu_count(), help="that training uses")
    made.add_argument("--limit", type=float, default=1150.0, metavar="SECONDS", help="begin no round that ends later")
    made.add_argument("--contenders", nargs="+", default=DEFAULT, choices=list(CONTENDERS), metavar="NAME")
    made.add_argument("--also", nargs="+", default=[], choices=list(CONTENDERS), metavar="NAME", help="beside those")
    options = made.parse_args(arguments)
    if options.quick:
        options.size, options.rounds, options.blocks, options.steps = "tiny", 2, 1, 2
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, write, and print the table."""
    options = parse(arguments)
    quieten()
    with workplace(options) as folder:
        names, missing = runnable([*options.contenders, *options.also], folder)
        entries = {name: CONTENDERS[name] for name in names}
        training = prepare_training(options.size, options.threads)
        say(f"{len(names)} contenders, state of {tensor_bytes(training) / 1e6:.0f} MB")
        plan = Plan(options.steps, options.blocks, every_steps=options.steps)
        (measured,), stored = run_rounds(entries, training, folder, [plan], options.rounds, options.limit)
    summary = summarize(measured, entries, stored, HEADLINE)
    result = {
        "question": "How much training time does one snapshot cost?",
        "method": "harness/lost.py; medians over all snapshots, exact 95% intervals from order statistics",
        "state_bytes": tensor_bytes(training),
        "threads": options.threads,
        "steps_in_a_block": options.steps,
        "rounds": len({sample.round for samples in measured.values() for sample in samples}),
        "missing": missing,
        **summary,
        "table": table(measured, stored),
    }
    store("lost_time_cpu", result, options)
    rows(result["table"])
    if "ratio_to_best_opponent" in result:
        say(str(result["ratio_to_best_opponent"]))


if __name__ == "__main__":
    main()
