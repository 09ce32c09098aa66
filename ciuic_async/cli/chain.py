"""``ciuic chain``: whom to trust with a chain, and the ways out when a pin says no."""

from __future__ import annotations

from ciuic_async.cli import chain_policy
from ciuic_async.cli.output import Subparsers

ACTIONS = (chain_policy,)
"""Modules whose ``add_parser`` adds actions."""


def add_parser(commands: Subparsers) -> None:
    parser = commands.add_parser("chain", help="Policies, pins, forks and witnesses of a chain.")
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    for module in ACTIONS:
        module.add_parser(actions)
