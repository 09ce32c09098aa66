"""``ciuic log``: the history of a chain."""

from __future__ import annotations

import argparse

from ciuic_async.chain import SnapshotChain
from ciuic_async.cli.output import Subparsers, add_command, human_bytes, print_json, print_table, text


def add_parser(commands: Subparsers) -> None:
    parser = add_command(commands, "log", run, "List the history of a chain, newest first.")
    parser.add_argument("--all", action="store_true", help="also keys, prunes and pruned snapshots")
    parser.add_argument("-n", "--limit", type=int, default=None, metavar="N", help="the newest N lines only")


def run(args: argparse.Namespace) -> int:
    with SnapshotChain(args.chain, create=False) as chain:
        entries = chain.log()
    if args.json:
        print_json(entries)
        return 0
    shown = [e for e in entries if args.all or (e["kind"] == "snapshot" and not e["pruned"])]
    shown = shown[::-1][: args.limit]
    if not shown:
        print("no snapshots yet")
        return 0
    rows = [
        [
            str(e["index"]),
            e["id"] or f"({e['kind']})",
            text(e["step"]),
            text(e["epoch"]),
            text(e["batch"]),
            e["created"].replace("T", " ")[:19],
            human_bytes(e["raw_bytes"]),
            human_bytes(e["stored_bytes"]),
            _details(e),
        ]
        for e in shown
    ]
    header = ["index", "snapshot", "step", "epoch", "batch", "created (UTC)", "raw", "stored", ""]
    print_table(header, rows, right=(0, 2, 3, 4, 6, 7))
    return 0


def _short(value: object) -> str:
    """A metric for people; ``--json`` has every digit."""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _details(entry: dict[str, object]) -> str:
    if entry["kind"] == "key":
        return text(entry["vkey"])
    if entry["kind"] == "prune":
        snapshots = entry["snapshots"]
        return "pruned " + ", ".join(str(s)[:8] for s in snapshots) if isinstance(snapshots, list) else ""
    metrics = entry["metrics"]
    tags = entry["tags"]
    parts = [f"{text(name)}={_short(value)}" for name, value in metrics.items()] if isinstance(metrics, dict) else []
    parts += [f"[{text(tag)}]" for tag in tags] if isinstance(tags, list) else []
    if entry.get("pruned"):
        parts.append("pruned")
    return " ".join(parts)
