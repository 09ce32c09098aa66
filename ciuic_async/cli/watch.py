"""``ciuic watch``: what a chain gets, line by line as it comes."""

from __future__ import annotations

import argparse
import json
import sys
import threading
from datetime import UTC, datetime
from typing import Any

from ciuic_async.chain import SnapshotChain
from ciuic_async.cli.log import details
from ciuic_async.cli.output import Subparsers, add_command, human_bytes, message, text
from ciuic_async.errors import StoreError, UsageError
from ciuic_async.transparency.witnessing import duration_s

_LONGEST_S = 86400.0


def add_parser(commands: Subparsers) -> None:
    parser = add_command(commands, "watch", run, "Show what a chain gets, line by line as it comes (Ctrl-C ends).")
    parser.add_argument("-n", "--last", type=int, default=5, metavar="N", help="begin with the newest N lines (5)")
    parser.add_argument("--all", action="store_true", help="also keys, prunes, ...")
    parser.add_argument("--every", default="2s", metavar="TIME", help="look so often (2s)")
    parser.add_argument("--late", metavar="TIME", help="say so on stderr when no snapshot came for so long, e.g. 30m")


def run(args: argparse.Namespace) -> int:
    if args.last < 0:
        raise UsageError(f"--last {args.last}: expected 0 or more")
    every_s = duration_s(args.every)
    if every_s > _LONGEST_S:
        raise UsageError(f"--every {args.every}: expected a day at most")
    late_s = None if args.late is None else duration_s(args.late)
    with SnapshotChain(args.chain, create=False) as chain:
        entries = chain.log()
        chosen = _chosen(entries, args)
        _show(chosen[max(0, len(chosen) - args.last) :], as_json=args.json)
        began = datetime.now(UTC).isoformat()  # counts where there is no snapshot yet
        said_of = ""
        while True:
            newest = next((entry["created"] for entry in reversed(entries) if entry["kind"] == "snapshot"), began)
            if late_s is not None and newest != said_of and _age_s(newest) > late_s:
                said_of = newest  # once for each
                print(f"{message(chain.url)}: no snapshot for {_age_s(newest):.0f} s", file=sys.stderr, flush=True)
            threading.Event().wait(every_s)
            try:
                chain.latest()  # reads what is new of the log alone
                if chain.log_size > len(entries):
                    known, entries = len(entries), chain.log()
                    _show(_chosen(entries[known:], args), as_json=args.json)
            except StoreError as error:  # a place that fails for a while; a log that contradicts itself ends this
                print(f"{message(error)}; looking again in {every_s:g} s", file=sys.stderr, flush=True)


def _chosen(entries: list[dict[str, Any]], args: argparse.Namespace) -> list[dict[str, Any]]:
    return [entry for entry in entries if args.all or entry["kind"] == "snapshot"]


def _age_s(created: str) -> float:
    """By this machine's clock and that of the writer."""
    return (datetime.now(UTC) - datetime.fromisoformat(created)).total_seconds()


def _show(entries: list[dict[str, Any]], *, as_json: bool) -> None:
    """One line for each, at once, whoever reads."""
    for entry in entries:
        if as_json:
            print(json.dumps(entry, sort_keys=True), flush=True)
            continue
        when = entry["created"].replace("T", " ")[:19]
        if entry["kind"] == "snapshot":
            what = f"{entry['id']}  step {text(entry['step'])}  {human_bytes(entry['stored_bytes'])} stored"
        else:
            what = f"({entry['kind']})"
        print(f"{when}  {text(entry['index'])}  {what}  {details(entry)}".rstrip(), flush=True)
