"""``ciuic doctor``: can this machine, and this place, do what the engine needs? How full will it be, what is set?"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import cast

from ciuic_async import native
from ciuic_async.cli import doctor_config, doctor_disk, doctor_forecast
from ciuic_async.cli.doctor_finding import Finding
from ciuic_async.cli.doctor_store import PIECE_BYTES, Trial, findings_of, leftovers, look
from ciuic_async.cli.output import Subparsers, add_command, human_bytes, leaving_in_order, print_json, text
from ciuic_async.config.settings import Settings
from ciuic_async.errors import CiuicError, UsageError
from ciuic_async.format import layout
from ciuic_async.retention import words
from ciuic_async.retention.policy import Policy
from ciuic_async.staging.budget import available_bytes
from ciuic_async.stores.base import Store
from ciuic_async.stores.local import LocalStore
from ciuic_async.stores.resolve import resolve
from ciuic_async.stores.space import existing, room
from ciuic_async.transparency import keys
from ciuic_async.user_folders import OURS, config_folder
from ciuic_async.version import __version__

WRITE_BYTES = 64 << 20
LARGEST_WRITE_BYTES = 16 << 30


def add_parser(commands: Subparsers) -> None:
    parser = add_command(
        commands, "doctor", run, "Check this machine and, if given, a place for snapshots.", chain=False
    )
    parser.add_argument(
        "place",
        nargs="?",
        metavar="PLACE",
        help="path or URL where snapshots are or would go; trial files are written there, and removed",
    )
    parser.add_argument("--config", action="store_true", help="show every option, its value and where it comes from")
    parser.add_argument(
        "--forecast", metavar="SIZE", help="does the place hold what retention keeps of a state of this size, e.g. 12GB"
    )
    parser.add_argument(
        "--size", metavar="SIZE", default=f"{WRITE_BYTES >> 20}MiB", help="how much is written for the trial"
    )
    parser.add_argument("--read-only", action="store_true", help="write nothing to the place")


def run(args: argparse.Namespace) -> int:
    size_bytes = words.read_size(args.size, "--size")
    state_bytes = None if args.forecast is None else words.read_size(args.forecast, "--forecast")
    if not PIECE_BYTES <= size_bytes <= LARGEST_WRITE_BYTES:
        raise UsageError(f"--size {args.size!r}: expected 1MiB to {LARGEST_WRITE_BYTES >> 30}GiB")
    if args.forecast is not None and args.place is None:
        raise UsageError("--forecast needs a place whose room counts: ciuic doctor PLACE --forecast SIZE")
    configured = doctor_config.settings()
    findings = doctor_config.findings(configured)
    if not args.config or args.place:
        findings = _machine() + findings
    data: dict[str, object] = {}
    if args.place:
        forecast = _place(args.place, configured, findings, 0 if args.read_only else size_bytes, state_bytes)
        data["forecast"] = None if forecast is None else forecast.as_data()
    if args.config:
        data["options"] = doctor_config.as_data(configured)
    ok = all(finding.ok is not False for finding in findings)
    if args.json:
        print_json({"ok": ok, "findings": [asdict(finding) for finding in findings]} | data)
        return 0 if ok else 1
    if args.config:
        doctor_config.show(configured)
    marks = {True: "ok  ", False: "FAIL", None: "    "}
    for finding in findings:
        print(f"{marks[finding.ok]} {finding.name:<14}{text(finding.text)}")
    return 0 if ok else 1


def _machine() -> list[Finding]:
    findings = [
        Finding("ciuic-async", None, f"{__version__} on Python {platform.python_version()}, {platform.platform()}"),
        Finding("torch", None, _version("torch")),
        Finding("native core", None if native.core is None else True, native.describe()),
        Finding("cores", None, str(len(os.sched_getaffinity(0)))),
        Finding("free memory", None, human_bytes(available_bytes())),
    ]
    try:
        key = keys.find(None, chain_folder=None)
        if key is not None:
            findings.append(Finding("signing key", True, key.path or "from CIUIC_KEY, in no file"))
        elif _home_is_closed():
            text = "none, and none can be kept: the folder for it is read-only; set CIUIC_KEY to a file that lasts"
            findings.append(Finding("signing key", None, text))
        else:
            findings.append(Finding("signing key", True, "none yet: the first snapshot makes one"))
    except CiuicError as error:
        findings.append(Finding("signing key", False, str(error)))
    return findings


def _home_is_closed() -> bool:
    folder = config_folder(OURS, "keys")
    return folder is None or not os.access(existing(Path(folder)), os.W_OK | os.X_OK)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _place(
    url: str, configured: Settings, findings: list[Finding], size_bytes: int, state_bytes: int | None
) -> doctor_forecast.Forecast | None:
    """Everything about a place; ``size_bytes`` 0: reading alone."""
    forecast = None
    with closing(resolve(url)) as store:
        looked = list(look(store))
        findings += looked
        if isinstance(store, LocalStore):
            findings += doctor_disk.findings(store)
        if size_bytes == 0:
            findings.append(Finding("write", None, "not tried (--read-only)"))
        elif looked[0].ok:
            _try(url, store, findings, size_bytes)
        advice = leftovers(url)
        findings += [] if advice is None else [advice]
        if state_bytes is not None:
            interval = configured.by_name["every_seconds"].value
            forecast = doctor_forecast.of_size(
                store.url if isinstance(store, LocalStore) else None,
                _keep(configured),
                state_bytes,
                interval if isinstance(interval, float) else None,
            )
        elif any(finding.name == "chain" and finding.ok for finding in looked):
            with findings_of("forecast", findings):
                forecast = doctor_forecast.of_chain(url, _keep(configured))
        findings += [] if forecast is None else doctor_forecast.findings(forecast)
    return forecast


def _keep(configured: Settings) -> Policy | None:
    return cast(Policy | None, configured.by_name["keep"].value)


def _try(url: str, store: Store, findings: list[Finding], size_bytes: int) -> None:
    """Use every primitive of a commit, in a store of the trial's own."""
    if isinstance(store, LocalStore):
        closed = doctor_disk.closed_folders(store)
        if closed and Path(store.url, layout.CHAIN_FILE).exists():
            findings.append(
                Finding(
                    "write",
                    False,
                    f"this user may read the chain, and not write to {', '.join(closed)}: check owner and mode. Not "
                    "checked: create once, overwrite, delete, times; --read-only leaves them out",
                )
            )
            return
    space = room(store.url) if isinstance(store, LocalStore) else None
    if space is not None and space.free_bytes < 4 * size_bytes:
        size_bytes = space.free_bytes // 4 // PIECE_BYTES * PIECE_BYTES  # a trial must not fill a disk
    with findings_of("write", findings), leaving_in_order(), _trial_store(url, store) as own:
        findings += Trial(own, size_bytes).run()


@contextmanager
def _trial_store(url: str, store: Store) -> Iterator[Store]:
    """A store below the place, where its readers do not look, for the trial alone. A local one goes away as a whole."""
    if not isinstance(store, LocalStore):
        with closing(resolve(f"{url.rstrip('/')}/{layout.temporary()}")) as own:
            yield own
        return
    parent = doctor_disk.trial_folder(store)
    folder = tempfile.mkdtemp(prefix=".ciuic-doctor-", dir=parent)
    try:
        with closing(LocalStore(folder)) as own:
            yield own
    finally:
        shutil.rmtree(folder, ignore_errors=True)
