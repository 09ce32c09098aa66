"""What all commands share: common arguments, JSON, tables, progress on a terminal, leaving in order."""

from __future__ import annotations

import argparse
import json
import signal
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

from ciuic_async.events import Event, Listener

Subparsers = Any  # argparse's own type is private


def add_command(
    commands: Subparsers, name: str, run: Any, summary: str, *, chain: bool = True
) -> argparse.ArgumentParser:
    """A command with ``--json`` and, mostly, a chain as its first argument."""
    parser: argparse.ArgumentParser = commands.add_parser(name, help=summary, description=summary)
    if chain:
        parser.add_argument("chain", metavar="CHAIN", help="path or URL of a snapshot chain")
    parser.add_argument("--json", action="store_true", help="print data as JSON")
    parser.set_defaults(run=run)
    return parser


def print_json(value: object) -> None:
    """Data on stdout."""
    data = json.dumps(value, indent=2, ensure_ascii=False)
    if not data.isascii() and any("\ud800" <= character <= "\udfff" for character in data):
        data = json.dumps(value, indent=2)  # the name of a file that is no UTF-8: escaped, as no output takes it
    print(data)


def print_table(header: Sequence[str], rows: Iterable[Sequence[str]], right: Sequence[int] = ()) -> None:
    """Columns as wide as they need; ``right`` names the columns aligned to the right."""
    lines = [list(header), *map(list, rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    for line in lines:
        cells = [
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())


def human_bytes(size: int | None) -> str:
    """``12.3 MB``; a dash for None."""
    if size is None:
        return "-"
    value = float(size)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{size} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


def text(value: object) -> str:
    """A cell: printable, one line, a dash for None. What a chain holds may try to move the cursor."""
    if value is None:
        return "-"
    return "".join(c if c.isprintable() else "?" for c in str(value))


def message(value: object) -> str:
    """A message of one or several lines, each printable: errors and warnings quote what a chain holds."""
    return "\n".join(map(text, str(value).split("\n")))


@contextmanager
def progress(label: str, stage: str) -> Iterator[Listener | None]:
    """A progress bar on stderr that follows events of ``stage``; nothing where stderr is no terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from tqdm import tqdm

    with tqdm(desc=label, unit="B", unit_scale=True, file=sys.stderr, leave=False) as bar:

        def listen(event: Event) -> None:
            if event.stage == stage:
                if stage == "restore":
                    bar.total = event.total_bytes
                bar.update(event.size_bytes)

        yield listen


@contextmanager
def leaving_in_order() -> Iterator[None]:
    """Being told to leave (``timeout``, a container that ends, a lost terminal) raises: what was tried is removed."""

    def leave(number: int, frame: object) -> NoReturn:
        raise SystemExit(128 + number)

    signals = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) == signal.SIG_DFL]
    if threading.current_thread() is not threading.main_thread():
        signals = []
    for number in signals:
        signal.signal(number, leave)
    try:
        yield
    finally:
        for number in signals:
            signal.signal(number, signal.SIG_DFL)
