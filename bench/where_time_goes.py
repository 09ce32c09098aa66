"""Where does the time of a snapshot go? A timeline of training, the calls, staging, encoding, writing and commit.

python bench/where_time_goes.py      # about 1 minute; writes bench/results/where_time_goes.json
"""

from __future__ import annotations

import argparse
import os
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict

from ciuic_async.cli.demo_table import tensor_bytes
from ciuic_async.events import Event
from harness.contenders import Ciuic
from harness.lost import WARM_UP_SNAPSHOTS, prepare_training
from harness.opponents import quieten
from harness.output import parser, rows, say, seconds, store, workplace
from harness.trace import tracing


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options of this program."""
    made = parser(__doc__)
    made.add_argument("--size", default="bench", help="of the demo's model")
    made.add_argument("--snapshots", type=int, default=3)
    made.add_argument("--every", type=int, default=6, metavar="STEPS")
    made.add_argument("--threads", type=int, default=os.cpu_count(), help="that training uses")
    made.add_argument("--codec", default="auto")
    made.add_argument("--staging", default="auto")
    options = made.parse_args(arguments)
    if options.quick:
        options.size, options.snapshots, options.every = "tiny", 2, 2
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and write."""
    options = parse(arguments)
    quieten()
    reported: list[tuple[float, Event]] = []
    training = prepare_training(options.size, options.threads)
    with workplace(options) as folder, tracing(options.codec) as trace:
        engine = Ciuic(
            folder,
            training.state(),
            listener=lambda event: reported.append((time.perf_counter(), event)),
            codec=options.codec,
            staging=options.staging,
        )
        try:
            for _ in range(WARM_UP_SNAPSHOTS):
                training.update()
                engine.step()
                engine.save()
                engine.wait()
            trace.spans.clear()
            reported.clear()
            begin_s = time.perf_counter()
            for number in range(options.snapshots * options.every + options.every // 2):
                with trace.span("training"):
                    training.update()
                with trace.span("step()"):
                    engine.step()
                if number % options.every == options.every // 2:
                    with trace.span("save()"):
                        engine.save()
            engine.wait()
            end_s = time.perf_counter()
        finally:
            engine.close()
        stats = engine.stats()[WARM_UP_SNAPSHOTS:]
    total: dict[str, float] = defaultdict(float)
    for lane, from_s, to_s, _ in trace.spans:
        total[lane] += to_s - from_s
    table = [["part", "per snapshot"]]
    table += [[lane, seconds(total[lane] / len(stats))] for lane in sorted(total) if lane != "training"]
    result = {
        "question": "Where does the time of a snapshot go?",
        "method": "spans around the engine's functions (harness/trace.py); times of lanes overlap",
        "state_bytes": tensor_bytes(training),
        "threads": options.threads,
        "wall_s": end_s - begin_s,
        "stats": [{**asdict(one), "snapshot": number} for number, one in enumerate(stats)],
        "events": [(at_s - begin_s, event.stage, event.seconds, event.size_bytes) for at_s, event in reported],
        "traced": trace.found,
        "spans": [(lane, from_s - begin_s, to_s - begin_s, thread) for lane, from_s, to_s, thread in trace.spans],
        "table": table,
    }
    store("where_time_goes", result, options)
    say(f"{len(trace.spans)} spans")
    rows(table)


if __name__ == "__main__":
    main()
