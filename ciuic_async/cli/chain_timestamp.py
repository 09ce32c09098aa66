"""``ciuic chain timestamp``: evidence of time for the newest snapshot, by somebody who is no party to the chain."""

from __future__ import annotations

import argparse
import sys

from ciuic_async.chain import SnapshotChain
from ciuic_async.cli.output import Subparsers, add_command, print_json, print_table, text
from ciuic_async.errors import CiuicError
from ciuic_async.transparency import anchor
from ciuic_async.transparency.anchor import Timestamp
from ciuic_async.transparency.log import Log

EXIT_INTEGRITY = 4


def add_parser(actions: Subparsers) -> None:
    parser = add_command(
        actions,
        "timestamp",
        run,
        "Have the newest snapshot's log head stamped (RFC 3161) and check the token; without --tsa, check all tokens.",
    )
    parser.add_argument("--tsa", metavar="URL", help="the timestamp authority, http:// or https://")
    parser.add_argument(
        "--roots", metavar="FILE", required=True, help="PEM certificates that you trust to name timestamp authorities"
    )
    parser.add_argument(
        "--replace", action="store_true", help="replace a token that is there and that these roots do not bear out"
    )


def run(args: argparse.Namespace) -> int:
    roots = anchor.load_roots(args.roots)
    with SnapshotChain(args.chain, create=False) as chain:
        chain.latest()  # not of a log that the pin says was rolled back or rewritten
        log = Log(chain.store, chain.origin)
        if args.tsa is None:
            log.refresh()
            refused: list[CiuicError] = []
            return _show_all(args, anchor.timestamps(chain.store, log, roots, refused), refused)
        authority = anchor.TimestampAuthority(args.tsa, roots)
        stamp, made = anchor.stamp_newest(chain.store, log, authority, replace=args.replace)
    if args.json:
        print_json({**_data(stamp), "made": made})
    else:
        how = "stamped" if made else "was stamped"
        print(f"snapshot {stamp.snapshot} {how}: it existed at {_iso(stamp)}, with all {stamp.index} entries before it")
    return 0


def _show_all(args: argparse.Namespace, found: list[Timestamp], refused: list[CiuicError]) -> int:
    if args.json:
        problems = [{"kind": error.kind, "where": error.where, "message": str(error)} for error in refused]
        print_json({"timestamps": [_data(stamp) for stamp in found], "problems": problems})
    else:
        rows = [(stamp.snapshot, str(stamp.index), _iso(stamp)) for stamp in found]
        print_table(("SNAPSHOT", "ENTRY", "EXISTED AT"), rows, right=(1,))
        for error in refused:
            print(text(error), file=sys.stderr)
    return EXIT_INTEGRITY if refused else 0


def _data(stamp: Timestamp) -> dict[str, object]:
    return {
        "snapshot": stamp.snapshot,
        "index": stamp.index,
        "time": _iso(stamp),
        "head": stamp.head.decode(),
    }


def _iso(stamp: Timestamp) -> str:
    return stamp.time.isoformat(timespec="seconds").replace("+00:00", "Z")
