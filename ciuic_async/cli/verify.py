"""``ciuic verify``: is every byte what was written, and who says so?"""

from __future__ import annotations

import argparse
import re
import sys
from dataclasses import asdict

from ciuic_async.cli.output import Subparsers, add_command, human_bytes, print_json, progress, text
from ciuic_async.errors import NotFoundError, UsageError
from ciuic_async.mirroring.copier import Copier, check_same_chain, read_chain_file
from ciuic_async.stores.base import Store
from ciuic_async.stores.resolve import resolve
from ciuic_async.transparency.pins import Pins
from ciuic_async.transparency.policy import Policy
from ciuic_async.verify import verify_store

EXIT_INTEGRITY = 4
_DURATION = re.compile(r"([0-9]{1,9})([smhd]?)")
_UNITS_S = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def add_parser(commands: Subparsers) -> None:
    parser = add_command(commands, "verify", run, "Check every byte of a chain. Exit code 4 if anything is wrong.")
    parser.add_argument("--quick", action="store_true", help="stop before chunk data: log, manifests and locators only")
    parser.add_argument(
        "--key",
        action="append",
        default=[],
        metavar="VKEY|FILE",
        help="a verifier key (or a file of them) of which one must have signed the chain; may be given more than once",
    )
    parser.add_argument("--policy", metavar="FILE", help="whom to trust: writers, witnesses and their quorum")
    parser.add_argument("--endorsed", action="store_true", help="entries of keys that you did not name are a problem")
    parser.add_argument(
        "--max-age", metavar="TIME", help="the newest sign of life may be this old at most, e.g. 90s, 30m, 1h or 2d"
    )
    parser.add_argument("--roots", metavar="FILE", help="certificates (PEM) of the authorities whose time stamps count")
    parser.add_argument("--no-pin", action="store_true", help="neither compare with your pin of this chain nor move it")

    parser.add_argument(
        "--mirror", metavar="URL", help="check this mirror of CHAIN instead: every byte, and that it is of one history"
    )


def run(args: argparse.Namespace) -> int:
    policy = None if args.policy is None else Policy.load(args.policy)
    if args.endorsed and not args.key and (policy is None or not policy.logs):
        raise UsageError("--endorsed needs keys to endorse: give --key, or a --policy with log lines")
    # Straight on the store: a chain whose ciuic.json is damaged cannot be opened, yet is to be reported.
    store = resolve(args.chain if args.mirror is None else args.mirror)
    try:
        # A mirror that is behind is no log that was taken back: the chain itself is compared with the pin.
        behind = args.mirror is not None and _is_behind(args.chain, store)
        with progress("verify", "verify") as listener:
            report = verify_store(
                store,
                deep=not args.quick,
                keys=args.key,
                policy=policy,
                endorsed=args.endorsed,
                max_age_s=None if args.max_age is None else _seconds(args.max_age),
                pins=None if args.no_pin or behind else Pins.of_user(),
                roots=args.roots,
                listener=listener,
            )
    finally:
        store.close()
    if args.json:
        print_json(
            {
                "ok": report.ok,
                "level": report.level,
                "levels": [asdict(level) for level in report.levels],
                "problems": [asdict(problem) for problem in report.problems],
                "snapshots": report.snapshots,
                "checked_bytes": report.checked_bytes,
                "notes": list(report.notes),
            }
        )
        return 0 if report.ok else EXIT_INTEGRITY
    for note in report.notes:
        print(f"note: {text(note)}", file=sys.stderr)
    for level in report.levels:
        print(f"{level.name:<12} {level.state:<10} {text(level.detail)}".rstrip())
    for problem in report.problems:
        place = f"snapshot {problem.snapshot}: " if problem.snapshot else ""
        tensor = f"tensor {text(problem.tensor)}: " if problem.tensor else ""
        print(f"{problem.kind}: {place}{tensor}{text(problem.message)}")
    verdict = "ok" if report.ok else f"{len(report.problems)} problems"
    print(
        f"{verdict}: {report.snapshots} snapshots, {human_bytes(report.checked_bytes)} of data checked, "
        f"level: {text(report.level)}"
    )
    return 0 if report.ok else EXIT_INTEGRITY


def _is_behind(chain: str, mirror: Store) -> bool:
    """See that the mirror's log is a prefix of the chain's; whether it is shorter.

    Raises what ``Copier.look`` raises; writes nothing there.
    """
    local = resolve(chain)
    try:
        data = read_chain_file(local)
        if data is None:
            raise NotFoundError(f"{local.url}: no chain here", kind="no_chain", where=local.url)
        found = read_chain_file(mirror)
        if found is None:
            return False
        check_same_chain(mirror, found, data)
        copier = Copier(local, mirror, data)
        copier.look()
        return copier.replicated_size < copier.log_size
    finally:
        local.close()


def _seconds(value: str) -> float:
    match = _DURATION.fullmatch(value)
    if match is None:
        raise UsageError(f"--max-age {value!r}: expected a number and s, m, h or d, such as 1h")
    return int(match[1]) * _UNITS_S[match[2]]
