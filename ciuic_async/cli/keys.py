"""``ciuic keys``: who signs this chain."""

from __future__ import annotations

import argparse
import sys

from ciuic_async.chain import SnapshotChain
from ciuic_async.cli.output import Subparsers, add_command, print_json
from ciuic_async.errors import NotFoundError


def add_parser(commands: Subparsers) -> None:
    parser = commands.add_parser("keys", help="Show the keys of a chain.")
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    add_command(actions, "show", run, "Print the key that signs this chain here, and all keys of the chain.")


def run(args: argparse.Namespace) -> int:
    with SnapshotChain(args.chain, create=False) as chain:
        here = chain.signing_key()
        known = chain.keys()
    if here is None and not args.json:
        print("no signing key here yet: the first snapshot makes one (or set CIUIC_KEY)", file=sys.stderr)
    if here is None and not known:
        raise NotFoundError(f"{args.chain}: the chain has no keys yet", kind="no_key")
    if args.json:
        vkey, path = here or (None, None)
        print_json({"vkey": vkey, "path": path, "chain_keys": known})
        return 0
    if here is not None:
        print(f"signs here   {here[0]}  ({here[1] or 'from CIUIC_KEY, in no file'})")
    for vkey in known:
        print(f"in the chain {vkey}")
    return 0
