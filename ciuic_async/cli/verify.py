"""``ciuic verify``: is every byte what was written?"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict

from ciuic_async.cli.output import Subparsers, add_command, human_bytes, print_json, progress, text
from ciuic_async.stores.resolve import resolve
from ciuic_async.verify import verify_store

EXIT_INTEGRITY = 4


def add_parser(commands: Subparsers) -> None:
    parser = add_command(commands, "verify", run, "Check every byte of a chain. Exit code 4 if anything is wrong.")
    parser.add_argument("--quick", action="store_true", help="stop before chunk data: log, manifests and locators only")


def run(args: argparse.Namespace) -> int:
    # Straight on the store: a chain whose ciuic.json is damaged cannot be opened, yet is to be reported.
    store = resolve(args.chain)
    try:
        with progress("verify", "verify") as listener:
            report = verify_store(store, deep=not args.quick, listener=listener)
    finally:
        store.close()
    if args.json:
        print_json(
            {
                "ok": report.ok,
                "level": report.level,
                "problems": [asdict(problem) for problem in report.problems],
                "snapshots": report.snapshots,
                "checked_bytes": report.checked_bytes,
                "notes": list(report.notes),
            }
        )
        return 0 if report.ok else EXIT_INTEGRITY
    for note in report.notes:
        print(f"note: {note}", file=sys.stderr)
    for problem in report.problems:
        place = f"snapshot {problem.snapshot}: " if problem.snapshot else ""
        tensor = f"tensor {text(problem.tensor)}: " if problem.tensor else ""
        print(f"{problem.kind}: {place}{tensor}{text(problem.message)}")
    verdict = "ok" if report.ok else f"{len(report.problems)} problems"
    print(
        f"{verdict}: {report.snapshots} snapshots, {human_bytes(report.checked_bytes)} of data checked, "
        f"level: {report.level}"
    )
    return 0 if report.ok else EXIT_INTEGRITY
