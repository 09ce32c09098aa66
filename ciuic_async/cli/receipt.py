"""``ciuic receipt``: a proof that a snapshot is in a chain, for those who do not have the chain."""

from __future__ import annotations

import argparse
import os

from ciuic_async.chain import SnapshotChain
from ciuic_async.cli.output import Subparsers, add_command, print_json, text
from ciuic_async.errors import IntegrityError, UsageError
from ciuic_async.format import entry as entries_format
from ciuic_async.format.entry import SnapshotEntry
from ciuic_async.transparency import note, receipt
from ciuic_async.transparency.policy import Policy, read_text_file
from ciuic_async.transparency.receipt import Receipt
from ciuic_async.trust import parse_keys


def add_parser(commands: Subparsers) -> None:
    parser = add_command(
        commands,
        "receipt",
        run,
        "Print the receipt of a snapshot (C2SP tlog-proof), or check one without the chain: "
        "ciuic receipt --check FILE --key VKEY.",
        chain=False,
    )
    parser.add_argument("chain", nargs="?", metavar="CHAIN", help="path or URL of a snapshot chain")
    parser.add_argument("ref", nargs="?", metavar="REF", help="which snapshot; default: latest")
    parser.add_argument("-o", "--output", metavar="FILE", help="write it to a new file")
    parser.add_argument("--check", metavar="FILE", help="check this receipt")
    parser.add_argument(
        "--entry",
        metavar="FILE|CHAIN",
        help="with --check: the entry that it should be of, or a chain that has it; default: the entry that came along",
    )
    parser.add_argument(
        "--key", action="append", default=[], metavar="VKEY|FILE", help="with --check: keys that you trust"
    )
    parser.add_argument("--policy", metavar="FILE", help="with --check: whom you trust, and which witnesses")


def run(args: argparse.Namespace) -> int:
    if args.check is not None:
        if args.chain is not None or args.output is not None:
            raise UsageError("--check takes no CHAIN and no --output; name the chain with --entry")
        return _check(args)
    if args.chain is None or args.entry is not None or args.key or args.policy is not None:
        raise UsageError("give a CHAIN; --entry, --key and --policy go with --check")
    with SnapshotChain(args.chain, create=False) as chain:
        snapshot = chain.get(args.ref or "latest")
        data = chain.receipt(snapshot.id)
    if args.output is not None:
        _write_new(args.output, data)
    if args.json:
        print_json({"id": snapshot.id, "index": snapshot.index, "path": args.output, "receipt": data.decode()})
    elif args.output is None:
        print(data.decode(), end="")
    else:
        print(f"{args.output}: receipt of snapshot {snapshot.id}, entry {snapshot.index}")
    return 0


def _check(args: argparse.Namespace) -> int:
    data = read_text_file(args.check, receipt.LIMIT_BYTES, "receipt")
    found = Receipt.decode(data, args.check)
    policy = Policy() if args.policy is None else Policy.load(args.policy)
    trusted = (*parse_keys(args.key), *policy.logs)
    if not trusted:
        raise UsageError("whose signature counts? Give --key VKEY, or a --policy with log lines")
    keys = {(vkey.name, vkey.key_id): vkey for vkey in trusted} | policy.witness_keys()
    entry = _entry(args, found)
    checked = receipt.check(found, entry, keys, args.check)
    witnessed = policy.witnessed(set(checked.signers))
    if not witnessed.met:
        raise IntegrityError(
            f"{args.check}: it holds, but is witnessed by {witnessed}; the policy asks for {policy.quorum}",
            kind="not_witnessed",
            where=args.check,
        )
    parsed = entries_format.decode(entry, found.index)
    snapshot = parsed.snapshot if isinstance(parsed, SnapshotEntry) else None
    times = [
        note.cosigned_at(item.signature)
        for item in note.parse(found.head, args.check).signatures
        if (item.name, item.key_id) in policy.witness_keys()
    ]
    facts = {
        "ok": True,
        "origin": found.origin(args.check),
        "index": found.index,
        "size": checked.head.size,
        "snapshot": snapshot,
        "created": parsed.common.created,
        "signers": [str(vkey) for vkey in checked.signers],
        "witnessed": f"{witnessed.have}/{witnessed.count}",
        "cosigned_s": sorted(times),
    }
    if args.json:
        print_json(facts)
        return 0
    print(f"ok: entry {found.index} of {text(facts['origin'])}, which had {checked.head.size} entries")
    print(f"snapshot {snapshot or '-'}, created {text(parsed.common.created)} by its writer's clock")
    for vkey in checked.signers:
        print(f"signed by {text(vkey)}")
    if policy.witnesses:
        print(f"witnessed {witnessed}")
    return 0


def _entry(args: argparse.Namespace, found: Receipt) -> bytes:
    if args.entry is None:
        if found.extra is None:
            raise UsageError(f"{args.check}: no entry came along: name it, or a chain that has it, with --entry")
        return found.extra
    if os.path.isfile(args.entry):
        return read_text_file(args.entry, entries_format.LIMIT_BYTES, "entry")
    with SnapshotChain(args.entry, create=False) as chain:
        return chain.entry_bytes(found.index)


def _write_new(path: str, data: bytes) -> None:
    try:
        with open(path, "xb") as file:
            file.write(data)
    except OSError as error:
        raise UsageError(f"{path}: cannot be written: {os.strerror(error.errno or 0)}", where=path) from error
