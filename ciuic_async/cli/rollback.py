"""``ciuic rollback``: go on from an earlier snapshot."""

from __future__ import annotations

import argparse

from ciuic_async.chain import SnapshotChain
from ciuic_async.cli.output import Subparsers, add_command, print_json, text


def add_parser(commands: Subparsers) -> None:
    parser = add_command(
        commands,
        "rollback",
        run,
        "Make an earlier snapshot the latest. Nothing is deleted: history gets one entry more.",
    )
    parser.add_argument(
        "ref", metavar="REF", help="a snapshot id or its beginning, latest~1, step:1200, best:loss, a tag"
    )
    parser.add_argument("--reason", default="", metavar="TEXT", help="recorded in the history")


def run(args: argparse.Namespace) -> int:
    with SnapshotChain(args.chain, create=False) as chain:
        before = chain.latest()
        snapshot = chain.rollback(args.ref, args.reason)
    if args.json:
        print_json({"id": snapshot.id, "step": snapshot.step, "before": None if before is None else before.id})
        return 0
    if before is not None and before.id == snapshot.id:
        print(f"{snapshot.id} (step {text(snapshot.step)}) is the latest already")
        return 0
    print(f"the latest is {snapshot.id} (step {text(snapshot.step)}) now; restored training goes on from there")
    if before is not None:
        print(f"{before.id} (step {text(before.step)}), the latest before, stays: roll back to it to undo this")
    return 0
