"""``ciuic chain policy``, ``repin`` and ``fork``: what to hand to verifiers, and what to do when a pin says no."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict

from ciuic_async.arguments import check_text
from ciuic_async.chain import SnapshotChain
from ciuic_async.cli.output import Subparsers, add_command, print_json, text
from ciuic_async.fork import fork
from ciuic_async.transparency import note
from ciuic_async.transparency.pins import Pins

_TEMPLATE = """\
# Witnesses: independent parties that cosign the log, on other machines and in other hands than the writers'.
# witness NAME VKEY [URL]
# group NAME all|any|K MEMBER...
# With n witnesses of which f may lie, k of them are a quorum if 2k - n > f. Then, in the place of 'none':
quorum none
"""


def add_parser(actions: Subparsers) -> None:
    add_command(actions, "policy", _policy, "Print a policy to hand to verifiers: the writers' keys, and a template.")
    repin = add_command(
        actions,
        "repin",
        _repin,
        "Pin the chain as it is now, although your pin knows more of it or another one: its store was restored from a "
        "backup. The old pin is kept, and the reason goes into the history.",
    )
    repin.add_argument("--reason", required=True, metavar="TEXT", help="recorded in the history")
    forking = add_command(
        actions,
        "fork",
        _fork,
        "Let a copy of a chain go on as a new one with a name of its own. The old one is only read.",
    )
    forking.add_argument("destination", metavar="DEST", help="path or URL where the new chain is made")
    forking.add_argument("--reason", required=True, metavar="TEXT", help="recorded in the new chain's history")


def _policy(args: argparse.Namespace) -> int:
    with SnapshotChain(args.chain, create=False) as chain:
        origin = chain.origin
        known = [vkey for vkey in map(note.parse_vkey, chain.keys()) if vkey.kind == note.ED25519]
        keys = [entry for entry in chain.log() if "vkey" in entry]
    since = {entry["vkey"]: (entry["index"], entry["created"]) for entry in reversed(keys)}
    lines = [f"# Who may write {origin}. Leave out what you do not trust: any key may announce itself.\n"]
    for vkey in known:
        index, created = since.get(str(vkey), ("?", "?"))
        lines.append(f"# since entry {index}, {text(created)}\nlog {vkey}\n")
    policy = "".join(lines) + _TEMPLATE
    if args.json:
        print_json({"policy": policy, "logs": [str(vkey) for vkey in known]})
        return 0
    print(policy, end="")
    print(
        "compare these keys with what 'ciuic keys show' says on the writers' machines: the store may be wrong",
        file=sys.stderr,
    )
    return 0


def _repin(args: argparse.Namespace) -> int:
    check_text("reason", _repinned(10**15, args.reason, replaced=True))  # before anything is replaced
    pins = Pins.of_user()
    with SnapshotChain(args.chain, create=False) as chain:
        head = chain.head_note()
        kept = pins.replace(chain.origin, head)
        size, _ = note.parse_head(note.parse(head, "head").text, chain.origin, "head")
        here = chain.signing_key()
        known = chain.keys()
        noted = here is not None and here[0] in known
        if noted:
            chain.note(_repinned(size, args.reason, replaced=kept is not None))
    if args.json:
        print_json({"size": size, "pin": pins.path(chain.origin), "replaced": kept, "noted": noted})
        return 0
    print(f"pinned at {size} entries; the pin of before: {kept or 'there was none'}")
    if not noted:
        print("the reason is not in the history: no key of this chain is here", file=sys.stderr)
    return 0


def _repinned(size: int, reason: str, *, replaced: bool) -> str:
    """The remark in the history."""
    return f"repinned at {size} entries{', in the place of another' if replaced else ''}: {reason}"


def _fork(args: argparse.Namespace) -> int:
    done = fork(args.chain, args.destination, reason=args.reason)
    if args.json:
        print_json(asdict(done))
        return 0
    print(
        f"{args.destination}: {done.snapshots} snapshots, {done.origin}, goes on from {done.previous_origin} at "
        f"{done.previous_size} entries"
    )
    return 0
