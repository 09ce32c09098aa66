"""How much training time does one snapshot cost when snapshots follow each other quickly?

    python bench/lost_time_by_interval.py     # about 5 minutes; writes bench/results/lost_time_by_interval.json

As ``lost_time.py``, but a block holds several snapshots, one every few steps. When the interval is shorter than the
time a snapshot needs to become durable, a contender must wait for the one before, and that is lost as well.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence

from ciuic_async.cli.demo_table import tensor_bytes
from harness.lost import Plan, prepare_training, run_rounds, summarize
from harness.opponents import CONTENDERS, quieten, runnable
from harness.output import parser, rows, seconds, span, store, workplace

DEFAULT = ["ciuic-async", "torch.save + fsync", "dcp.async_save, cached stager"]


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options of this program."""
    made = parser(__doc__)
    made.add_argument("--size", default="bench", help="of the demo's model")
    made.add_argument("--rounds", type=int, default=2)
    made.add_argument("--every", type=int, nargs="+", default=[1, 2, 6], metavar="STEPS")
    made.add_argument("--snapshots", type=int, default=3, help="in one block")
    made.add_argument("--threads", type=int, default=os.cpu_count(), help="that training uses")
    made.add_argument("--limit", type=float, default=600.0, metavar="SECONDS", help="begin no round that ends later")
    made.add_argument("--contenders", nargs="+", default=DEFAULT, choices=list(CONTENDERS), metavar="NAME")
    options = made.parse_args(arguments)
    if options.quick:
        options.size, options.rounds, options.every, options.snapshots = "tiny", 1, [1, 4], 2
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and write."""
    options = parse(arguments)
    quieten()
    plans = [
        Plan(max(4, every * options.snapshots), 1, every_steps=every, snapshots=options.snapshots, base_steps=6)
        for every in options.every
    ]
    with workplace(options) as folder:
        names, missing = runnable(options.contenders, folder)
        entries = {name: CONTENDERS[name] for name in names}
        training = prepare_training(options.size, options.threads)
        measured, stored = run_rounds(entries, training, folder, plans, options.rounds, options.limit)
    intervals = {}
    table = [["every", "contender", "lost per snapshot", "95% interval", "share of training time"]]
    for every, one in zip(options.every, measured, strict=True):
        summary = summarize(one, entries, stored, names[0])
        intervals[every] = summary
        for name, figures in summary["contenders"].items():
            lost = figures["lost_s_per_snapshot"]
            share = lost["median"] / (every * figures["base_step_s"] + lost["median"])
            table.append(
                [f"{every} steps", name, seconds(lost["median"]), span(lost["interval_95"]), f"{100 * share:.1f}%"]
            )
    result = {
        "question": "How much training time does one snapshot cost, against the interval?",
        "method": "harness/lost.py; one sample is the mean over the snapshots of a block",
        "state_bytes": tensor_bytes(training),
        "threads": options.threads,
        "snapshots_in_a_block": options.snapshots,
        "missing": missing,
        "intervals": intervals,
        "table": table,
    }
    store("lost_time_by_interval", result, options)
    rows(table)


if __name__ == "__main__":
    main()
