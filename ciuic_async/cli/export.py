"""``ciuic export``: a snapshot in another format, signed for others if wanted."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ciuic_async.chain import SnapshotChain
from ciuic_async.cli.output import Subparsers, add_command, human_bytes, print_json
from ciuic_async.errors import UsageError
from ciuic_async.interchange.files import check_free
from ciuic_async.pipeline import oms, oms_key
from ciuic_async.stores.local import LocalStore

_OMS_HELP = (
    f"also write {oms.SIGNATURE} beside the file, an OpenSSF Model Signing signature; check it with: "
    "model_signing verify key FILE --signature model.sig --public_key KEY.pub"
)
_OMS_KEY_HELP = (
    "sign with this ECDSA key (PEM; P-256, P-384 or P-521): Model Signing takes no Ed25519, so the key that signs "
    "chains will not do. Default: a P-256 key of your own, made on first use under ~/.config/ciuic_async/keys, "
    "mode 0600, with its public half beside it (.pub) to hand to others"
)


def add_parser(commands: Subparsers) -> None:
    parser = add_command(commands, "export", run, "Write a snapshot as a .safetensors, .pt or .h5 file.")
    parser.add_argument("ref", metavar="REF", help="which snapshot, e.g. latest")
    parser.add_argument("path", metavar="PATH", help="the file to write; its suffix chooses the format")
    parser.add_argument("--only", action="append", metavar="PATTERN", help="dotted paths, e.g. model or 'model.head.*'")
    parser.add_argument("--force", action="store_true", help="replace the file if it is there")
    parser.add_argument("--oms", action="store_true", help=_OMS_HELP)
    parser.add_argument("--oms-key", metavar="FILE", help=_OMS_KEY_HELP)


def run(args: argparse.Namespace) -> int:
    if args.oms_key is not None and not args.oms:
        raise UsageError("--oms-key is the key for --oms, which was not asked for")
    with SnapshotChain(args.chain, create=False) as chain:
        snapshot = chain.get(args.ref)
        folder = chain.url if isinstance(chain.store, LocalStore) else None
        key = None
        if not args.force:
            check_free(Path(args.path))
        if args.oms:  # before the export: a key that will not do is no reason to write gigabytes
            key = oms_key.load_or_create(args.oms_key, chain_folder=folder)
            oms.check_target(Path(args.path))
        path = snapshot.export(args.path, only=args.only, overwrite=args.force)
    signature = None if key is None else oms.sign(path, key)
    size = path.stat().st_size
    if args.json:
        found: dict[str, object] = {"path": str(path), "snapshot": snapshot.id, "size_bytes": size}
        if key is not None:
            found |= {"signature": str(signature), "key": key.path, "public_key": key.public_pem.decode()}
        print_json(found)
        return 0
    print(f"{path}: {human_bytes(size)} from snapshot {snapshot.id}, step {snapshot.step}")
    if key is not None:
        print(f"{signature}: signed with {key.path}")
        if args.oms_key is None:
            print(f"verifiers need the public key, from you: {key.public_path}", file=sys.stderr)
    return 0
