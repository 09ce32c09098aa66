"""The share of branches that tests take, package by package; too few of them are an error.

Run ``python -m tests.branches REPORT PACKAGE...`` with coverage's JSON report, measured with --cov-branch.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

LEAST_PERCENT = 95.0


def taken(report: dict[str, Any], package: str) -> tuple[int, int]:
    """Branches of a package that were taken, and how many it has."""
    files = [about for name, about in report["files"].items() if name.startswith(f"ciuic_async/{package}/")]
    sums = [sum(about["summary"][which] for about in files) for which in ("covered_branches", "num_branches")]
    return sums[0], sums[1]


def missed(report: dict[str, Any], package: str) -> Iterator[str]:
    """Every branch not taken, as ``file:line -> line``; 0 is the way out."""
    for name, about in sorted(report["files"].items()):
        if name.startswith(f"ciuic_async/{package}/"):
            yield from (f"{name}:{start} -> {max(end, 0)}" for start, end in about["missing_branches"])


def main(report_path: str, packages: Sequence[str]) -> int:
    """Print the shares, and below the least one what was missed; 1 if that is so for a package."""
    report = json.loads(Path(report_path).read_text())
    failed = 0
    for package in packages:
        covered, count = taken(report, package)
        share = 100.0 * covered / count if count else 0.0
        print(f"{package:<13}{share:6.1f}%  {covered} of {count} branches")
        if share < LEAST_PERCENT:
            failed = 1
            print(f"  expected at least {LEAST_PERCENT}%; not taken:", *missed(report, package), sep="\n    ")
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
