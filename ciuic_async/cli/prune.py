"""``ciuic prune``: drop what a policy does not keep."""

from __future__ import annotations

import argparse

from ciuic_async.chain import SnapshotChain
from ciuic_async.cli.output import Subparsers, add_command, human_bytes, print_json, print_table, text
from ciuic_async.retention.collect import PruneReport
from ciuic_async.retention.parse import EXAMPLES, parse_policy

EPILOG = "rules: " + "; ".join(EXAMPLES.values()) + ". What at least one rule keeps stays, and the latest always does."


def add_parser(commands: Subparsers) -> None:
    parser = add_command(
        commands, "prune", run, "Drop the snapshots that no rule keeps, and free what only they needed. Final."
    )
    parser.epilog = EPILOG
    parser.add_argument(
        "--keep", action="append", required=True, metavar="RULE", help="latest=3, best=loss, ...; may be repeated"
    )
    parser.add_argument("--dry-run", action="store_true", help="only show what would go")
    parser.add_argument(
        "--no-rebase",
        action="store_true",
        help="leave segments of pruned snapshots that are mostly garbage, rather than move the rest out of them",
    )


def run(args: argparse.Namespace) -> int:
    policy = parse_policy(" | ".join(args.keep))
    with SnapshotChain(args.chain, create=False) as chain:
        facts = {snapshot.id: (text(snapshot.step), snapshot.created) for snapshot in chain}
        report = chain.prune(policy, dry_run=args.dry_run, rebase=not args.no_rebase)
        if missing := {*report.pruned, *report.kept} - set(facts):  # saved by another writer this very moment
            facts |= dict.fromkeys(missing, ("-", "-"))
    if args.json:
        print_json(as_data(report) | {"policy": policy.describe(), "dry_run": args.dry_run})
        return 0
    _print(report, facts, dry_run=args.dry_run)
    return 0


def as_data(report: PruneReport) -> dict[str, object]:
    """A report as ``--json`` prints it."""
    return {
        "pruned": [{"id": snapshot, "freed_bytes": report.freed_by.get(snapshot, 0)} for snapshot in report.pruned],
        "kept": [{"id": snapshot, "because": list(report.reasons.get(snapshot, ()))} for snapshot in report.kept],
        "deleted_files": report.deleted_files,
        "freed_bytes": report.freed_bytes,
        "moved_bytes": report.moved_bytes,
    }


def _print(report: PruneReport, facts: dict[str, tuple[str, str]], *, dry_run: bool) -> None:
    go = "would go" if dry_run else "gone"
    rows = []
    for snapshot in report.pruned:
        rows.append([snapshot, *_facts(facts[snapshot]), go, human_bytes(report.freed_by.get(snapshot, 0)), ""])
    for snapshot in report.kept:
        rows.append([snapshot, *_facts(facts[snapshot]), "stays", "", text(", ".join(report.reasons[snapshot]))])
    print_table(["snapshot", "step", "created (UTC)", "", "frees", "because"], rows, right=(1, 4))
    earlier = report.freed_bytes - sum(report.freed_by.get(snapshot, 0) for snapshot in report.pruned)
    if earlier:
        print(f"{human_bytes(earlier)} of snapshots that were pruned before {'would go' if dry_run else 'went'}, too")
    if report.moved_bytes:
        print(f"{human_bytes(report.moved_bytes)} that are still needed {'would be' if dry_run else 'were'} moved")
    would = "would free" if dry_run else "freed"
    print(
        f"{len(report.pruned)} snapshots {'would go' if dry_run else 'pruned'}, {len(report.kept)} kept; "
        f"{would} {human_bytes(report.freed_bytes)} in {report.deleted_files} files"
    )


def _facts(facts: tuple[str, str]) -> list[str]:
    return [facts[0], facts[1].replace("T", " ")[:19]]
