"""``ciuic mirror``: copy a chain to a second place, see how far that is, or bring the chain home from there."""

from __future__ import annotations

import argparse
import sys
import threading
from functools import partial
from typing import Any

from ciuic_async.cli.output import Subparsers, add_command, human_bytes, print_json, text
from ciuic_async.errors import CiuicError, NotFoundError, StoreError
from ciuic_async.format import layout
from ciuic_async.format.chain_file import ChainFile
from ciuic_async.mirroring.copier import Copier, check_same_chain, read_chain_file
from ciuic_async.mirroring.home import Homing, bring_home
from ciuic_async.mirroring.mirror import paired
from ciuic_async.mirroring.presence import Presence
from ciuic_async.pipeline.history import live_snapshots
from ciuic_async.stores.fallback import FallbackStore
from ciuic_async.stores.local import LocalStore
from ciuic_async.stores.resolve import resolve
from ciuic_async.transparency import keys
from ciuic_async.transparency.log import Log
from ciuic_async.transparency.pins import Pins

EXIT_FAILED = 1
_LOOK_AGAIN_S = 5.0


def add_parser(commands: Subparsers) -> None:
    parser = add_command(
        commands, "mirror", run, "Copy a chain to a second place, byte for byte, and go on as it grows (Ctrl-C ends)."
    )
    parser.add_argument("url", metavar="URL", help="path or URL of the mirror; it may be empty, or behind")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--once", action="store_true", help="copy what there is, then end")
    what.add_argument(
        "--status", action="store_true", help="copy nothing: which snapshots are replicated? Exit code 1: not all"
    )
    what.add_argument("--home", action="store_true", help="the other way: bring home what is lost or damaged in CHAIN")
    parser.add_argument("--read-back", action="store_true", help="read every segment again where it arrived")


def run(args: argparse.Namespace) -> int:
    pair = paired(resolve(args.chain), resolve(args.url))
    try:
        if args.home:
            return _bring_home(pair, as_json=args.json)
        data = read_chain_file(pair.here)
        if data is None:
            raise NotFoundError(
                f"{pair.url}: no chain here (there is no {layout.CHAIN_FILE}); with --home it is brought back from "
                f"{pair.there.url}",
                kind="no_chain",
                where=pair.url,
            )
        if args.status:
            return _status(pair, data, as_json=args.json)
        folder = pair.here.url if isinstance(pair.here, LocalStore) else None
        copier = Copier(
            pair.here, pair.there, data, key=partial(keys.find, None, chain_folder=folder), read_back=args.read_back
        )
        while True:
            done = _turn(copier, pair, once=args.once, as_json=args.json)
            if args.once:
                return done
            threading.Event().wait(_LOOK_AGAIN_S)
    finally:
        pair.close()


def _turn(copier: Copier, pair: FallbackStore, *, once: bool, as_json: bool) -> int:
    """Copy what there is; a place that fails for a while is an error only to who asked for one turn."""
    before = (copier.replicated_size, copier.sent_bytes)
    try:
        copier.turn()
    except StoreError as error:
        if once:
            raise
        print(f"{text(error)}; tried again in {_LOOK_AGAIN_S:.0f} s", file=sys.stderr)
        return EXIT_FAILED
    if once or (copier.replicated_size, copier.sent_bytes) != before:
        _print_progress(copier, pair, as_json=as_json)
    return EXIT_FAILED if copier.lacking else 0


def _print_progress(copier: Copier, pair: FallbackStore, *, as_json: bool) -> None:
    if as_json:
        facts = {"url": pair.there.url, "replicated_size": copier.replicated_size, "log_size": copier.log_size}
        print_json(facts | {"sent_bytes": copier.sent_bytes, "lacking": copier.lacking})
        return
    print(
        f"{copier.replicated_size} of {copier.log_size} entries replicated to {text(pair.there.url)}, "
        f"{human_bytes(copier.sent_bytes)} sent"
    )
    for snapshot, why in copier.lacking.items():
        print(f"snapshot {snapshot} is not replicated, it is damaged here: {text(why)}")


def _status(pair: FallbackStore, data: bytes, *, as_json: bool) -> int:
    log = Log(pair.here, ChainFile.decode(data).origin)
    log.refresh()
    found = read_chain_file(pair.there)
    presence = Presence(pair, log.origin)
    if found is not None:
        check_same_chain(pair.there, found, data)
    size = 0 if found is None else presence.size()
    rows: list[dict[str, Any]] = [
        {
            "id": line.entry.snapshot,
            "index": line.index,
            "step": line.entry.step,
            "replicated": found is not None and presence.holds(line.index, line.entry),
        }
        for line in live_snapshots(log)
    ]
    missing = [row for row in rows if not row["replicated"]]
    if as_json:
        facts = {"url": pair.there.url, "replicated_size": size, "log_size": len(log)}
        print_json(facts | {"snapshots": rows})
    else:
        print(f"{size} of {len(log)} entries, {len(rows) - len(missing)} of {len(rows)} snapshots replicated to "
              f"{text(pair.there.url)}")  # fmt: skip
        for row in missing:
            print(f"not replicated: snapshot {row['id']} (step {text(row['step'])})")
    return EXIT_FAILED if missing or size != len(log) else 0


def _bring_home(pair: FallbackStore, *, as_json: bool) -> int:
    pins = Pins.of_user()
    data = bring_home(pair.here, pair.there, read_chain_file(pair.here), lambda log: _check(pins, log))
    if data is None:
        raise NotFoundError(f"{pair.there.url}: no chain there either", kind="no_chain", where=pair.there.url)
    log = Log(pair.here, ChainFile.decode(data).origin)
    homing = Homing(pair, log)
    homing.turn()
    missing = _not_home(pair, log)
    if as_json:
        print_json({"log_size": len(log), "brought_bytes": homing.brought_bytes, "missing": missing})
    else:
        print(f"{len(log)} entries, {human_bytes(homing.brought_bytes)} brought home from {text(pair.there.url)}")
        for snapshot in missing:
            print(f"snapshot {snapshot} is not whole here; see 'ciuic verify'")
    return EXIT_FAILED if missing else 0


def _check(pins: Pins, log: Log) -> None:
    pins.check(log.origin, log)


def _not_home(pair: FallbackStore, log: Log) -> list[str]:
    """Snapshots of which a file is missing here."""
    presence = Presence(FallbackStore(pair.here, pair.here), log.origin)
    missing = []
    for line in live_snapshots(log):
        try:
            if presence.holds(line.index, line.entry):
                continue
        except CiuicError:
            pass
        missing.append(line.entry.snapshot)
    return missing
