"""``ciuic log``: the history of a chain."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from ciuic_async.chain import Snapshot, SnapshotChain
from ciuic_async.cli.graph import draw
from ciuic_async.cli.output import Subparsers, add_command, human_bytes, print_json, print_table, text
from ciuic_async.errors import UsageError


def add_parser(commands: Subparsers) -> None:
    parser = add_command(commands, "log", run, "List the history of a chain, newest first.")
    parser.add_argument("--all", action="store_true", help="also keys, prunes, ... and pruned snapshots")
    parser.add_argument("--graph", action="store_true", help="draw which snapshot came from which")
    parser.add_argument("--mirror", metavar="URL", help="also say which snapshots are not replicated to this mirror")
    parser.add_argument("-n", "--limit", type=int, default=None, metavar="N", help="the newest N lines only")


def run(args: argparse.Namespace) -> int:
    if args.limit is not None and args.limit < 1:
        raise UsageError(f"--limit {args.limit}: expected at least 1")
    with SnapshotChain(args.chain, create=False, mirror=args.mirror) as chain:
        entries = chain.log()
        if args.mirror is not None:
            replicated = {snapshot.id: snapshot.replicated for snapshot in chain}
            entries = [{**entry, "replicated": replicated.get(entry["id"], False)} for entry in entries]
        latest = chain.latest() if args.graph else None
    if args.json:
        print_json(entries)
        return 0
    shown = [e for e in entries if args.all or (e["kind"] == "snapshot" and not e["pruned"])]
    shown = shown[::-1][: args.limit]
    if not shown:
        print("no snapshots yet")
        return 0
    if args.graph:
        _print_graph(shown, {e["id"]: e["parent"] for e in entries if e["kind"] == "snapshot"}, latest)
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
            details(e),
        ]
        for e in shown
    ]
    header = ["index", "snapshot", "step", "epoch", "batch", "created (UTC)", "raw", "stored", ""]
    print_table(header, rows, right=(0, 2, 3, 4, 6, 7))
    return 0


def _print_graph(shown: list[dict[str, Any]], parents: Mapping[str, str | None], latest: Snapshot | None) -> None:
    """Snapshots only: ``*`` on the way to the latest and beside it, ``o`` abandoned by a rollback, ``x`` pruned."""
    snapshots = {e["id"]: e for e in shown if e["kind"] == "snapshot"}
    nearest: dict[str, str | None] = {}
    for snapshot in snapshots:
        parent = parents.get(snapshot)
        while parent is not None and parent not in snapshots:  # pruned, or beyond the limit
            parent = parents.get(parent)
        nearest[snapshot] = parent
    marks = {name: "x" if e["pruned"] else "o" if e["abandoned"] else "*" for name, e in snapshots.items()}
    lines = draw(list(snapshots), nearest, marks)
    width = max(len(picture) for picture, _ in lines)
    for picture, snapshot in lines:
        if not snapshot:
            print(picture)
            continue
        entry = snapshots[snapshot]
        here = " <- latest" if latest is not None and latest.id == snapshot else ""
        when = entry["created"].replace("T", " ")[:19]
        line = f"{picture.ljust(width)}  {snapshot}  step {text(entry['step'])}  {when}  {details(entry)}"
        print(line.rstrip() + here)


def _short(value: object) -> str:
    """A metric for people; ``--json`` has every digit."""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def details(entry: dict[str, object]) -> str:
    """What else there is to say of an entry, in a line."""
    if entry["kind"] == "key":
        return text(entry["vkey"])
    if entry["kind"] == "prune":
        snapshots = entry["snapshots"]
        names = ", ".join(str(s)[:8] for s in snapshots) if isinstance(snapshots, list) else ""
        return f"pruned {names}, keeping {text(entry['policy'])}"
    if entry["kind"] == "rollback":
        return f"back to {text(entry['target'])} {text(entry['reason'])}".rstrip()
    if entry["kind"] == "tag":
        return f"[{text(entry['name'])}] is {text(entry['target'])}"
    if entry["kind"] == "note":
        return text(entry["text"])
    metrics = entry["metrics"]
    tags = entry["tags"]
    parts = [f"{text(name)}={_short(value)}" for name, value in metrics.items()] if isinstance(metrics, dict) else []
    parts += [f"[{text(tag)}]" for tag in tags] if isinstance(tags, list) else []
    parts += [state for state in ("pruned", "abandoned") if entry.get(state)]
    parts += ["not replicated"] if entry.get("replicated") is False and not entry.get("pruned") else []
    return " ".join(parts)
