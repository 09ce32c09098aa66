"""``ciuic gc``: sweep files that no snapshot needs."""

from __future__ import annotations

import argparse

from ciuic_async.chain import SnapshotChain
from ciuic_async.cli.output import Subparsers, add_command, human_bytes, print_json
from ciuic_async.retention.words import read_duration


def add_parser(commands: Subparsers) -> None:
    parser = add_command(
        commands, "gc", run, "Sweep files that no snapshot needs: of pruned snapshots, and of writers that crashed."
    )
    parser.add_argument(
        "--orphan-age",
        default="24h",
        metavar="AGE",
        help="how old files of an unfinished snapshot must be to go (default: 24h); never less than a snapshot takes",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="only show what would go; unpublished files (tmp/) are not counted"
    )


def run(args: argparse.Namespace) -> int:
    age_s = read_duration(args.orphan_age, "--orphan-age")
    with SnapshotChain(args.chain, create=False) as chain:
        report = chain.gc(orphan_age_s=age_s, dry_run=args.dry_run)
    if args.json:
        print_json({"deleted_files": report.deleted_files, "freed_bytes": report.freed_bytes, "dry_run": args.dry_run})
        return 0
    would = "would delete" if args.dry_run else "deleted"
    print(f"{would} {report.deleted_files} files, {human_bytes(report.freed_bytes)}")
    return 0
