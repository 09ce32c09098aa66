"""``ciuic chain serve``: the log of a chain over HTTP, read-only, under the paths of C2SP tlog-tiles.

What is served is what others need to check the log: head, tiles, bundles, slots, receipts, and facts about snapshots.
Training data (segments, manifests) is not.
"""

from __future__ import annotations

import argparse
import json
import re
import threading
from collections.abc import Mapping
from hashlib import sha256
from typing import Any
from urllib.parse import unquote

from ciuic_async.chain import SnapshotChain
from ciuic_async.cli.output import Subparsers, add_command, print_json
from ciuic_async.cli.serving import BoundedServer, Handler, Reply, serve_until_told
from ciuic_async.errors import NotFoundError, UsageError
from ciuic_async.format import layout
from ciuic_async.stores.base import Store
from ciuic_async.transparency import note, slots, tiles

_FOREVER = {"Cache-Control": "public, max-age=31536000, immutable"}
_RECEIPT = re.compile(r"/receipts/([0-9a-f]{20})(?:\.tlog-proof)?")
_BINARY = "application/octet-stream"
_JSON = "application/json"


def add_parser(actions: Subparsers) -> None:
    parser = add_command(actions, "serve", run, "Serve the log of a chain over HTTP, read-only.")
    parser.add_argument("--host", default="127.0.0.1", help="default: 127.0.0.1, this machine only")
    parser.add_argument("--port", type=int, default=5000, help="default: 5000; 0: any")


def run(args: argparse.Namespace) -> int:
    with SnapshotChain(args.chain, create=False) as chain:
        server = LogServer((args.host, args.port), chain)
        if args.json:
            print_json({"url": server.url, "origin": chain.origin})
        else:
            print(f"url {server.url}")
        print(end="", flush=True)
        serve_until_told(server)
    return 0


class LogServer(BoundedServer):
    """The read API of one chain."""

    def __init__(self, address: tuple[str, int], chain: SnapshotChain) -> None:
        super().__init__(address, _LogHandler)
        self.chain = chain
        self._mutex = threading.Lock()
        self._listed: tuple[int, list[dict[str, Any]]] = (-1, [])

    @property
    def store(self) -> Store:
        return self.chain.store

    def entries(self) -> list[dict[str, Any]]:
        """All entries as data; made once for each state of the log, whoever asks how often."""
        with self._mutex:
            self.chain.latest()  # reads what is new
            if self._listed[0] != self.chain.log_size:
                listed = self.chain.log()
                self._listed = (len(listed), listed)
            return self._listed[1]


class _LogHandler(Handler):
    server: LogServer

    def reply(self) -> Reply:
        path, _, query = self.path.partition("?")
        try:
            if path == "/":
                return self._json(self._facts())
            if path == "/snapshots":
                return self._json(_newest(self.server.entries(), query))
            if path.startswith("/snapshots/"):
                return self._snapshot(unquote(path.removeprefix("/snapshots/")))
            return self._file(path)
        except (NotFoundError, UsageError):  # a ref that is none is not found
            return Reply(404, b"not found\n")

    def _facts(self) -> dict[str, Any]:
        chain = self.server.chain
        entries = self.server.entries()
        return {"origin": chain.origin, "size": len(entries), "vkeys": chain.keys()}

    def _snapshot(self, ref: str) -> Reply:
        snapshot = self.server.chain.get(ref).id
        found = next((e for e in self.server.entries() if e["kind"] == "snapshot" and e["id"] == snapshot), None)
        return Reply(404, b"not found\n") if found is None else self._json(found)

    def _file(self, path: str) -> Reply:
        """A file of the log, byte for byte. Only names that the format knows reach the store."""
        name = path.removeprefix("/")
        receipt = _RECEIPT.fullmatch(path)
        if receipt is not None:
            name = layout.receipt(receipt[1])
        elif not name.startswith("log/"):
            name = f"log/{name}"
        if not layout.is_known(name):
            return Reply(404, b"not found\n")
        if layout.slot_number(name) is not None:
            return self._tagged(self.server.store.read(name, slots.LIMIT_BYTES), _BINARY, _FOREVER)
        if name.startswith(layout.TILES):
            return self._tagged(self.server.store.read(name, tiles.BUNDLE_LIMIT_BYTES), _BINARY, _FOREVER)
        return self._tagged(self.server.store.read(name, note.LIMIT_BYTES), "text/plain; charset=utf-8")

    def _json(self, value: object) -> Reply:
        return self._tagged((json.dumps(value, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace"), _JSON)

    def _tagged(self, data: bytes, content_type: str, headers: Mapping[str, str] | None = None) -> Reply:
        """With an ETag, and no body for who has it already."""
        tag = f'"{sha256(data).hexdigest()[:32]}"'
        headers = {"ETag": tag, "Cache-Control": "no-cache", **(headers or {})}
        known = {item.strip().removeprefix("W/") for item in self.headers.get("If-None-Match", "").split(",")}
        if tag in known or "*" in known:
            return Reply(304, b"", content_type, headers)
        return Reply(200, data, content_type, headers)


def _newest(entries: list[dict[str, Any]], query: str) -> list[dict[str, Any]]:
    """All entries, or with ``limit=N`` the newest N; oldest first."""
    limit = re.fullmatch(r"limit=([0-9]{1,9})", query)
    return entries if limit is None else entries[max(0, len(entries) - int(limit[1])) :]
