"""``ciuic doctor``: can this machine, and this place, do what the engine needs?"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import secrets
import tempfile
import time
from contextlib import closing, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from ciuic_async import native
from ciuic_async.cli.output import Subparsers, add_command, human_bytes, print_json
from ciuic_async.errors import CiuicError
from ciuic_async.format import layout
from ciuic_async.staging.budget import available_bytes
from ciuic_async.stores.base import Store
from ciuic_async.stores.local import LocalStore
from ciuic_async.stores.resolve import resolve
from ciuic_async.transparency import keys
from ciuic_async.version import __version__

WRITE_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing looked at. ``ok`` is None for a mere fact."""

    name: str
    ok: bool | None
    text: str


def add_parser(commands: Subparsers) -> None:
    parser = add_command(
        commands, "doctor", run, "Check this machine and, if given, a place for snapshots.", chain=False
    )
    parser.add_argument("place", nargs="?", metavar="PLACE", help="where snapshots would go; a trial file is written")


def run(args: argparse.Namespace) -> int:
    findings = _machine() + (_place(args.place) if args.place else [])
    ok = all(finding.ok is not False for finding in findings)
    if args.json:
        print_json({"ok": ok, "findings": [asdict(finding) for finding in findings]})
    else:
        marks = {True: "ok  ", False: "FAIL", None: "    "}
        for finding in findings:
            print(f"{marks[finding.ok]} {finding.name:<14}{finding.text}")
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
        text = "none yet: the first snapshot makes one" if key is None else (key.path or "from CIUIC_KEY, in no file")
        findings.append(Finding("signing key", True, text))
    except CiuicError as error:
        findings.append(Finding("signing key", False, str(error)))
    return findings


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _place(place: str) -> list[Finding]:
    """Make a trial store beside where the chain would be, and use every primitive a commit needs."""
    try:
        with closing(resolve(place)) as store:
            return _folder(store.url) if isinstance(store, LocalStore) else _remote(store.url)
    except CiuicError as error:
        return [Finding("place", False, str(error))]


def _folder(folder: str) -> list[Finding]:
    findings = []
    parent = Path(folder)
    while not parent.exists() and parent != parent.parent:
        parent = parent.parent
    try:
        with tempfile.TemporaryDirectory(prefix=".ciuic-doctor-", dir=parent) as trial:
            store = LocalStore(trial)
            store.initialize()
            try:
                findings += _trial(store)
            finally:
                store.close()
    except (CiuicError, OSError) as error:
        findings.append(Finding("write", False, f"{parent}: {error}"))
    return findings


def _remote(url: str) -> list[Finding]:
    """The same in a bucket, under the chain's ``tmp/``, where nobody looks."""
    with closing(resolve(f"{url}/{layout.temporary()}/doctor")) as store:
        try:
            findings = _trial(store)
        except CiuicError as error:
            return [Finding("write", False, str(error))]
        finally:
            with suppress(CiuicError):
                for item in store.list():
                    store.delete(item.name)
    advice = "let the bucket remove incomplete uploads after a day or more: killed writers leave them (docs/stores.md)"
    return [*findings, Finding("bucket", None, advice)]


def _trial(store: Store) -> list[Finding]:
    synced = "synced" if isinstance(store, LocalStore) else "answered"
    _ = store.capabilities  # a remote store is tried when this is first asked: not what is measured
    started = time.perf_counter()
    store.create(layout.slot(0), b"first")
    commit_s = time.perf_counter() - started
    try:
        store.create(layout.slot(0), b"second")
        ordered = False
    except CiuicError:
        ordered = store.read(layout.slot(0), 100) == b"first"
    file = store.begin(layout.segment("0" * 20, 0, 0))
    data = secrets.token_bytes(1 << 20)
    started = time.perf_counter()
    for _ in range(WRITE_BYTES >> 20):
        file.write(data)
    store.publish([file])
    rate = WRITE_BYTES / (time.perf_counter() - started)
    return [
        Finding(
            "create once",
            ordered,
            "a second writer of a name is refused" if ordered else "NOT refused: one writer only",
        ),
        Finding("commit", True, f"{commit_s * 1e3:.1f} ms for a {synced} small file"),
        Finding("write", True, f"{human_bytes(int(rate))}/s, buffered and {synced}"),
    ]
