"""``ciuic``: reads the arguments, runs one command, turns errors into exit codes.

stdout is data, stderr is messages. Exit codes: 0 ok, 1 failed, 2 usage, 3 not found, 4 integrity, 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from typing import NoReturn

from ciuic_async.cli import (
    bench,
    chain,
    demo,
    diff,
    doctor,
    export,
    gc,
    import_,
    keys,
    log,
    mirror,
    prune,
    receipt,
    rollback,
    show,
    tag,
    verify,
    watch,
)
from ciuic_async.cli.output import message
from ciuic_async.config.settings import reading_files
from ciuic_async.errors import CiuicError, FormatVersionError, IntegrityError, NotFoundError, UsageError
from ciuic_async.version import __version__

COMMANDS = (
    bench,
    chain,
    demo,
    diff,
    doctor,
    export,
    gc,
    import_,
    keys,
    log,
    mirror,
    prune,
    receipt,
    rollback,
    show,
    tag,
    verify,
    watch,
)
EXIT_FAILED, EXIT_USAGE, EXIT_NOT_FOUND, EXIT_INTEGRITY, EXIT_INTERRUPTED = 1, 2, 3, 4, 130


class _Parser(argparse.ArgumentParser):
    """Usage errors as text, or as data where ``--json`` was given."""

    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        self.exit(EXIT_USAGE, f"ciuic: {message}\n")


class _Printable(logging.Formatter):
    """What is logged, as text for a terminal."""

    def format(self, record: logging.LogRecord) -> str:
        return message(super().format(record))


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    root = _Parser(
        prog="ciuic", description="Snapshot chains of training runs: look at them, verify them, take data out."
    )
    root.add_argument("--version", action="version", version=f"ciuic-async {__version__}")
    commands = root.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=_Parser)
    for module in COMMANDS:
        module.add_parser(commands)
    return root


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``ciuic``; returns the exit code."""
    args = parser().parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    for handler in logging.getLogger().handlers:
        handler.setFormatter(_Printable())
    warnings.showwarning = lambda warned, *_, **__: print(f"warning: {message(warned)}", file=sys.stderr)
    try:
        with reading_files():
            code: int = args.run(args)
        sys.stdout.flush()
        return code
    except CiuicError as error:
        return _failed(error, as_json=args.json)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # the reader of our output left, e.g. `ciuic log | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED


def exit_code(error: CiuicError) -> int:
    """What the shell learns of an error."""
    match error:
        case UsageError():
            return EXIT_USAGE
        case NotFoundError():
            return EXIT_NOT_FOUND
        case IntegrityError() | FormatVersionError():
            return EXIT_INTEGRITY
        case _:
            return EXIT_FAILED


def _failed(error: CiuicError, *, as_json: bool) -> int:
    print(f"error: {message(error)}", file=sys.stderr)
    if as_json:
        print(json.dumps({"error": {"kind": error.kind, "where": error.where, "message": str(error)}}))
    return exit_code(error)


if __name__ == "__main__":
    sys.exit(main())
