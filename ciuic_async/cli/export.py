"""``ciuic export``: a snapshot's tensors in another format."""

from __future__ import annotations

import argparse

from ciuic_async.chain import SnapshotChain
from ciuic_async.cli.output import Subparsers, add_command, human_bytes, print_json


def add_parser(commands: Subparsers) -> None:
    parser = add_command(commands, "export", run, "Write a snapshot's tensors as a .safetensors file.")
    parser.add_argument("ref", metavar="REF", help="which snapshot, e.g. latest")
    parser.add_argument("path", metavar="PATH", help="the file to write; its suffix chooses the format")
    parser.add_argument("--only", action="append", metavar="PATTERN", help="dotted paths, e.g. model or 'model.head.*'")


def run(args: argparse.Namespace) -> int:
    with SnapshotChain(args.chain, create=False) as chain:
        snapshot = chain.get(args.ref)
        path = snapshot.export(args.path, only=args.only)
    size = path.stat().st_size
    if args.json:
        print_json({"path": str(path), "snapshot": snapshot.id, "size_bytes": size})
    else:
        print(f"{path}: {human_bytes(size)} from snapshot {snapshot.id}, step {snapshot.step}")
    return 0
