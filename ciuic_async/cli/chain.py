"""``ciuic chain``: the log itself, its witnesses and its readers."""

from __future__ import annotations

from ciuic_async.cli import chain_witness
from ciuic_async.cli.output import Subparsers

ACTIONS = (chain_witness,)


def add_parser(commands: Subparsers) -> None:
    parser = commands.add_parser("chain", help="Witness or serve the log of a chain.")
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    for module in ACTIONS:
        module.add_parser(actions)
