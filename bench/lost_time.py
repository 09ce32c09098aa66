"""How much training time does one snapshot cost? This engine beside what people use, in one run.

    python bench/lost_time.py            # about 10 minutes; writes bench/results/lost_time_cpu.json

Lost time per snapshot = (wall time of N steps with snapshots - wall time of as many steps without) / snapshots; the
clock stops when every snapshot is on stable storage. Contenders take turns in every round and are compared to the same
round's run without snapshots. All fsync their files (``dcp.async_save`` does not fsync the folder). The measuring
itself is ``ciuic_async/cli/demo_table.py``, which ``ciuic demo`` runs at a smaller size.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch

from ciuic_async.cli.demo_table import CONTENDERS, Ciuic, Schedule, measure
from ciuic_async.native import describe
from ciuic_async.version import __version__

RESULTS = Path(__file__).parent / "results"


def machine() -> str:
    """What was measured on, in one line."""
    model = "unknown CPU"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    memory_gb = next(
        int(line.split()[1]) / 1e6
        for line in Path("/proc/meminfo").read_text().splitlines()
        if line.startswith("MemTotal")
    )
    cores = torch.multiprocessing.cpu_count()
    kernel = platform.release().partition("-")[0]
    return f"{cores} cores {model}, {memory_gb:.0f} GB, Linux {kernel}, torch {torch.__version__}"


def table(result: dict[str, Any]) -> list[list[str]]:
    """The rows that the README shows."""
    rows = []
    for name, figures in result["contenders"].items():
        spread = f"{figures['lost_s_min']:.2f} to {figures['lost_s_max']:.2f}"
        rows.append(
            [
                name,
                f"{figures['lost_s_per_snapshot']:.2f} s",
                spread,
                f"{figures['stall_s']:.3f} s",
                f"{figures['stored_bytes'] / 1e6:.0f} MB",
            ]
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=48)
    parser.add_argument("--every", type=int, default=8)
    parser.add_argument("--size", default="bench")
    parser.add_argument("--folder", type=Path, default=None, help="where contenders write; default: beside this file")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", module=r"torch\..*")
    # Compression costs CPU time, which two saturated cores do not have: shown beside it, not instead of it.
    CONTENDERS["ciuic-async, codec=raw"] = lambda folder, training: Ciuic(folder, training, codec="raw")
    with tempfile.TemporaryDirectory(dir=options.folder or Path(__file__).parent, prefix=".run-") as folder:
        result = measure(
            list(CONTENDERS), options.size, Schedule(options.steps, options.every), options.rounds, 3600.0, Path(folder)
        )
    result |= {"machine": machine(), "engine": f"ciuic-async {__version__}, {describe()}", "table": table(result)}
    target = RESULTS / "lost_time_cpu.json"
    target.write_text(json.dumps(result, indent=2) + "\n")
    for row in result["table"]:
        print("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()
