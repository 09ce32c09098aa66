"""``ciuic keys``: who signs this chain; a new key; another one from now on."""

from __future__ import annotations

import argparse
import sys
from datetime import UTC, datetime

from ciuic_async.chain import SnapshotChain
from ciuic_async.cli.output import Subparsers, add_command, print_json, text
from ciuic_async.errors import NotFoundError
from ciuic_async.transparency import keys


def add_parser(commands: Subparsers) -> None:
    parser = commands.add_parser("keys", help="Show, make and rotate the keys of a chain.")
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    add_command(actions, "show", run, "Print the key that signs this chain here, and all keys of the chain.")
    new = add_command(actions, "new", _new, "Make a signing key, for its owner only (mode 0600).", chain=False)
    new.add_argument("chain", nargs="?", metavar="CHAIN", help="also print its verifier key for this chain")
    new.add_argument("--path", metavar="FILE", help="where; default: the user's own key")
    rotate = add_command(
        actions,
        "rotate",
        _rotate,
        "Make a new key that signs this chain from now on. The old one announces it, and is kept beside it.",
    )
    rotate.add_argument("--key", metavar="FILE", help="the key to follow; default: the one that signs here")


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
        print(f"in the chain {text(vkey)}")
    return 0


def _new(args: argparse.Namespace) -> int:
    origin = None
    if args.chain is not None:  # first: a chain that is not there makes no key
        with SnapshotChain(args.chain, create=False) as chain:
            origin = chain.origin
    key = keys.make(args.path)
    vkey = None if origin is None else key.vkey(origin)
    if args.json:
        print_json({"vkey": vkey, "path": key.path})
        return 0
    print(f"made {key.path}")
    if vkey is not None:
        print(f"its verifier key for this chain: {vkey}")
    return 0


def _rotate(args: argparse.Namespace) -> int:
    with SnapshotChain(args.chain, create=False, key=args.key) as chain:
        here = chain.signing_key()
        if here is None:
            raise NotFoundError(f"{args.chain}: there is no signing key here to follow", kind="no_key")
        old = chain.target().key
        following = keys.successor(old)
        chain.announce(following)
        origin = chain.origin
    # From here on both keys may sign. What fails now leaves the old one in its place, and can be run again.
    kept = keys.install(following, old, datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ"))
    with SnapshotChain(args.chain, create=False, key=here[1]) as chain:
        chain.note(f"key rotated: {following.vkey(origin)} signs in the place of {here[0]}")
    if args.json:
        print_json({"vkey": following.vkey(origin), "path": here[1], "old_vkey": here[0], "old_path": kept})
        return 0
    print(f"signs from now on  {following.vkey(origin)}  ({here[1]})")
    print(f"signed until now   {here[0]}  ({kept})")
    print(
        "give the new verifier key to those who verify (their policy, --key). Other chains that this key signs get it "
        "with their next entry, as a key that nobody endorsed: rotate there first if that matters",
        file=sys.stderr,
    )
    return 0
