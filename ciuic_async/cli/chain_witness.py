"""``ciuic chain witness``: an independent party that cosigns log heads and refuses forks (C2SP tlog-witness)."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import ClassVar

from ciuic_async.cli import chain_serve
from ciuic_async.cli.output import Subparsers, add_command, print_json, text
from ciuic_async.cli.serving import BoundedServer, Handler, Reply, parse_address, serve_until_told
from ciuic_async.errors import UsageError
from ciuic_async.transparency import keys, note
from ciuic_async.transparency.policy import Policy
from ciuic_async.transparency.witness import BODY_LIMIT_BYTES, Witness

_READ = re.compile(r"/([0-9a-f]{64})/checkpoint")
_ADD = "/add-checkpoint"


def add_parser(actions: Subparsers) -> None:
    """Both servers of ``ciuic chain``."""
    parser = add_command(
        actions, "witness", run, "Cosign the log heads of chains over HTTP, and refuse forks.", chain=False
    )
    parser.add_argument("--state", required=True, metavar="DIR", help="what was cosigned; never restore it from a copy")
    parser.add_argument(
        "--key", default="auto", metavar="FILE|auto", help="signing key; auto: kept in the state folder"
    )
    parser.add_argument("--name", required=True, metavar="NAME", help="name of this witness, e.g. example.org/witness")
    parser.add_argument("--log", action="append", default=[], metavar="VKEY", help="key of a log to cosign; repeatable")
    parser.add_argument("--policy", metavar="FILE", help="take the keys of logs from the 'log' lines of a policy")
    parser.add_argument("--listen", default="127.0.0.1:0", metavar="HOST:PORT", help="default: 127.0.0.1, any port")
    chain_serve.add_parser(actions)


def run(args: argparse.Namespace) -> int:
    address = parse_address(args.listen)
    logs = [note.parse_vkey(vkey) for vkey in args.log]
    if args.policy is not None:
        logs += Policy.load(args.policy).logs
    if not logs:
        raise UsageError("no log to cosign: give --log or --policy ('ciuic keys show CHAIN' prints a chain's key)")
    path = Path(args.state, "witness.key") if args.key == "auto" else args.key
    key = keys.load_or_create(path, chain_folder=None)
    witness = Witness(args.state, key, args.name, logs)
    try:
        server = WitnessServer(address, witness)
        facts = {"name": args.name, "vkey": str(witness.vkey), "url": server.url, "logs": list(witness.origins)}
        if args.json:
            print_json(facts)
        else:
            print(f"vkey {witness.vkey}\nurl {server.url}")
            for origin in witness.origins:
                print(f"log {text(origin)}")
        print(end="", flush=True)
        serve_until_told(server)
    finally:
        witness.close()
    return 0


class WitnessServer(BoundedServer):
    """``POST /add-checkpoint`` and ``GET /<sha256(origin)>/checkpoint``."""

    def __init__(self, address: tuple[str, int], witness: Witness) -> None:
        super().__init__(address, _WitnessHandler)
        self.witness = witness


class _WitnessHandler(Handler):
    methods: ClassVar[tuple[str, ...]] = ("GET", "HEAD", "POST")
    server: WitnessServer

    def reply(self) -> Reply:
        if self.path == _ADD:
            if self.command != "POST":
                return Reply(405, b"method not allowed\n", headers={"Allow": "POST"})
            body = self.read_body(BODY_LIMIT_BYTES)
            if isinstance(body, Reply):
                return body
            answer = self.server.witness.add_checkpoint(body)
            return Reply(answer.status, answer.body, answer.content_type)
        asked = _READ.fullmatch(self.path)
        if asked is None:
            return Reply(404, b"not found\n")
        if self.command == "POST":
            return Reply(405, b"method not allowed\n", headers={"Allow": "GET, HEAD"})
        found = self.server.witness.checkpoint(asked[1])
        if found is None:
            return Reply(404, b"nothing was cosigned for this log\n")
        return Reply(200, found, headers={"Cache-Control": "no-cache"})
