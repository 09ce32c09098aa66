"""``ciuic diff``: what changed from one snapshot to another."""

from __future__ import annotations

import argparse

from ciuic_async.chain import SnapshotChain
from ciuic_async.cli.output import Subparsers, add_command, human_bytes, print_json, text
from ciuic_async.pipeline.diff import as_json


def add_parser(commands: Subparsers) -> None:
    parser = add_command(commands, "diff", run, "Compare two snapshots: what was added, removed, changed.")
    parser.add_argument("a", metavar="A", help="a ref: latest~1, step:1200, an id, a tag")
    parser.add_argument("b", nargs="?", default="latest", metavar="B", help="default: latest")


def run(args: argparse.Namespace) -> int:
    with SnapshotChain(args.chain, create=False) as chain:
        difference = chain.diff(args.a, args.b)
    if args.json:
        print_json(as_json(difference))
        return 0
    for path in difference.removed:
        print(f"- {text(path)}")
    for path in difference.added:
        print(f"+ {text(path)}")
    for change in difference.changed:
        print(f"~ {text(change.path)}  {text(change.before)} -> {text(change.after)}")
    print(
        f"{len(difference.changed)} changed, {len(difference.added)} added, {len(difference.removed)} removed, "
        f"{difference.same} the same; {human_bytes(difference.shared_bytes)} in chunks that both have"
    )
    return 0
