"""A real Ceph Object Gateway on this machine: one monitor, one OSD on a sparse file, the gateway, all on the loopback.

    with server(folder) as running:
        SnapshotChain("s3://bucket/prefix", storage_options=running.options)

The smallest cluster that takes objects: no manager, no authentication between its own daemons, one copy of everything.
Monitors listen on their well-known ports, so that there is one cluster on a machine at a time. Debian's packages:
``ceph-mon ceph-osd radosgw ceph-common``. Ready in about 20 seconds.
"""

from __future__ import annotations

import atexit
import http.client
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from uuid import uuid4

from tests.services.etcd import free_ports
from tests.services.proxy import REGION, sign

NEEDED = ("ceph-mon", "ceph-osd", "radosgw", "radosgw-admin", "ceph", "monmaptool")
MISSING = [name for name in NEEDED if shutil.which(name) is None]
ACCESS_KEY = "test-access-key"
SECRET_KEY = "test-secret-key"
BUCKET = "chains"
DISK_BYTES = 16 << 30
"""Size of the OSD's sparse file: what is not written takes no room."""
START_TIMEOUT_S = 120.0
MONITOR = "[v2:127.0.0.1:3300,v1:127.0.0.1:6789]"


class Ceph:
    """The daemons of one cluster. Belongs to one thread."""

    def __init__(self, folder: Path) -> None:
        assert not MISSING, f"there is no {', '.join(MISSING)} here"
        self._folder = folder
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        (self.port,) = free_ports(1)
        folder.mkdir(parents=True)
        identity = str(uuid4())
        (folder / "ceph.conf").write_text(_configuration(folder, identity))
        try:
            self._build(identity)
        except BaseException:
            self.close()
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

    def _build(self, identity: str) -> None:
        folder = self._folder
        self._run("monmaptool", "--create", "--fsid", identity, "--addv", "a", MONITOR, str(folder / "monmap"))
        for name in ("mon", "osd", "rgw"):
            (folder / name).mkdir()
        self._run("ceph-mon", "--mkfs", "-i", "a", "--monmap", str(folder / "monmap"))
        self._start("mon", "ceph-mon", "-i", "a")
        disk = str(uuid4())
        self._run("ceph", "osd", "new", disk)
        self._run("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", disk)
        self._start("osd", "ceph-osd", "-i", "0")
        user = ["--uid=t", "--display-name=t", f"--access-key={ACCESS_KEY}", f"--secret-key={SECRET_KEY}"]
        self._run("radosgw-admin", "user", "create", *user)
        self._start("rgw", "radosgw", "-n", "client.rgw", f"--rgw-frontends=beast endpoint=127.0.0.1:{self.port}")
        self._wait()

    def _configured(self, program: str, *arguments: str) -> list[str]:
        return [program, "-c", str(self._folder / "ceph.conf"), *arguments]

    def _run(self, program: str, *arguments: str) -> None:
        """Run to its end."""
        done = subprocess.run(
            self._configured(program, *arguments), capture_output=True, timeout=START_TIMEOUT_S, check=False
        )
        assert done.returncode == 0, (program, arguments, done.stderr.decode(errors="replace")[-2000:])

    def _start(self, name: str, program: str, *arguments: str) -> None:
        """Start a daemon; it need not be ready yet: who asks it waits for it."""
        with (self._folder / f"{name}.out").open("ab") as said:
            self._daemons[name] = subprocess.Popen(
                self._configured(program, "-f", *arguments), cwd=self._folder, stdout=said, stderr=said
            )

    def _wait(self) -> None:
        """Until the gateway makes a bucket."""
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while True:
            ended = {name: daemon.returncode for name, daemon in self._daemons.items() if daemon.poll() is not None}
            assert not ended, f"ended: {ended}; see {self._folder}"
            with suppress(OSError, http.client.HTTPException, AssertionError):
                self.make_bucket("ready")
                return
            assert time.monotonic() < deadline_s, f"the gateway does not answer; see {self._folder}"
            with suppress(subprocess.TimeoutExpired):  # a process that starts has no other way to tell
                self._daemons["rgw"].wait(0.2)

    def make_bucket(self, name: str) -> None:
        """One's own bucket may be there already."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            headers = [("Host", f"127.0.0.1:{self.port}"), ("Content-Length", "0")]
            signed = sign("PUT", f"/{name}", headers, ACCESS_KEY, SECRET_KEY)
            connection.request("PUT", f"/{name}", headers=dict(signed))
            response = connection.getresponse()
            body = response.read()
        finally:
            connection.close()
        assert response.status == 200, (response.status, body)

    def close(self) -> None:
        """End all daemons, the newest first."""
        for daemon in reversed(self._daemons.values()):
            daemon.send_signal(signal.SIGKILL)
            daemon.wait()
        self._daemons.clear()


def _configuration(folder: Path, identity: str) -> str:
    settings = {
        "fsid": identity,
        "mon_host": MONITOR,
        "mon_initial_members": "a",
        "auth_cluster_required": "none",
        "auth_service_required": "none",
        "auth_client_required": "none",
        # Without authentication there are no keys for the encrypted modes that monitors prefer.
        "ms_mon_client_mode": "crc",
        "ms_mon_service_mode": "crc",
        "ms_mon_cluster_mode": "crc",
        "mon_data": folder / "mon",
        "osd_data": folder / "osd",
        "rgw_data": folder / "rgw",
        "run_dir": folder,
        "admin_socket": folder / "$name.sock",
        "log_file": folder / "$name.log",
        "crash_dir": folder,
        "public_addr": "127.0.0.1",
        "cluster_addr": "127.0.0.1",
        "osd_objectstore": "bluestore",
        "bluestore_block_size": DISK_BYTES,
        "bluestore_block_db_size": 0,
        "bluestore_block_wal_size": 0,
        "osd_memory_target": 1 << 30,
        "osd_crush_chooseleaf_type": 0,
        "osd_pool_default_size": 1,
        "osd_pool_default_min_size": 1,
        "osd_pool_default_pg_num": 1,
        "osd_pool_default_pgp_num": 1,
        "mon_allow_pool_size_one": "true",
        "mon_data_avail_crit": 1,
        "mon_data_avail_warn": 1,
        "rgw_enable_usage_log": "false",
    }
    return "[global]\n" + "".join(f"{name} = {value}\n" for name, value in settings.items())


@cache
def shared() -> Ceph:
    """The one cluster of this process, with the bucket ``BUCKET``; it ends with the process, its folder too."""
    folder = Path(tempfile.mkdtemp(prefix="ceph-"))

    def end() -> None:
        running.close()
        shutil.rmtree(folder, ignore_errors=True)

    running = Ceph(folder / "cluster")
    atexit.register(end)
    running.make_bucket(BUCKET)
    return running


@contextmanager
def server(folder: Path) -> Iterator[Ceph]:
    """A gateway that answers, for a ``with`` block. ``folder`` is made."""
    running = Ceph(folder)
    try:
        yield running
    finally:
        running.close()
