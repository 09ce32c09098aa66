"""``ciuic tag``: names for snapshots."""

from __future__ import annotations

import argparse
import sys

from ciuic_async.chain import SnapshotChain
from ciuic_async.cli.output import Subparsers, add_command, print_json, print_table, text
from ciuic_async.errors import UsageError


def add_parser(commands: Subparsers) -> None:
    parser = add_command(commands, "tag", run, "Name a snapshot, or list the names.")
    parser.add_argument("name", nargs="?", metavar="NAME", help="without it: list all tags")
    parser.add_argument("ref", nargs="?", metavar="REF", help="which snapshot; default: latest")
    parser.add_argument("--delete", action="store_true", help="take the name away; the snapshot stays")


def run(args: argparse.Namespace) -> int:
    if args.delete and (args.name is None or args.ref is not None):
        raise UsageError("--delete takes a NAME and no REF")
    with SnapshotChain(args.chain, create=False) as chain:
        if args.name is not None:
            chain.tag(args.name, None if args.delete else args.ref or "latest")
        tags = {tag: snapshot for snapshot in chain for tag in snapshot.tags}
    if args.json:
        print_json({name: snapshot.id for name, snapshot in tags.items()})
    elif args.name is None:
        rows = [[text(name), snapshot.id, text(snapshot.step)] for name, snapshot in sorted(tags.items())]
        print_table(["tag", "snapshot", "step"], rows, right=(2,))
    elif args.delete:
        print(f"{text(args.name)} names no snapshot any more")
    elif (bearer := tags.get(args.name)) is not None:
        print(f"{text(args.name)} is {bearer.id} (step {text(bearer.step)})")
    else:
        print(f"{text(args.name)} was given, and somebody else has taken it away since", file=sys.stderr)
    return 0
