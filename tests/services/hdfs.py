"""A real NameNode and a real DataNode (Hadoop 2.7.3) on this machine, each a process of its own.

``make test-hdfs`` fetches the jars and says where they are.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from xml.sax.saxutils import escape

from ciuic_async.errors import CommitConflictError, NotFoundError, StoreError
from ciuic_async.stores.hdfs import HdfsStore
from tests.services.etcd import free_ports

JARS = os.environ.get("CIUIC_HDFS_JARS")
"""The folder of Hadoop's jars; without it there are no servers."""
WHY_NOT = "needs a NameNode and a DataNode: make test-hdfs"
START_S = 60.0
USER = "trainer"
ROOT = Path(__file__).parents[2]

_SYSTEM_JARS = [
    f"/usr/share/java/{name}.jar"
    for name in ("jersey1-core", "jersey1-server", "jersey1-servlet", "jsr311-api", "commons-daemon")
]
# What Hadoop 2.7 reaches into, and newer Java releases keep closed.
_OPENED = [
    "--add-opens=java.base/java.lang=ALL-UNNAMED",
    "--add-opens=java.base/java.nio=ALL-UNNAMED",
    "--add-opens=java.base/sun.nio.ch=ALL-UNNAMED",
    "--add-exports=java.security.jgss/sun.security.krb5=ALL-UNNAMED",
    "--add-opens=java.security.jgss/sun.security.krb5=ALL-UNNAMED",
]
_CLASSES = {
    "namenode": "org.apache.hadoop.hdfs.server.namenode.NameNode",
    "datanode": "org.apache.hadoop.hdfs.server.datanode.DataNode",
}
_LOG4J = """log4j.rootLogger=INFO,said
log4j.appender.said=org.apache.log4j.ConsoleAppender
log4j.appender.said.layout=org.apache.log4j.PatternLayout
log4j.appender.said.layout.ConversionPattern=%d{ISO8601} %p %c{1}: %m%n
"""
_WEB = '<web-app xmlns="http://java.sun.com/xml/ns/javaee" version="2.5"></web-app>\n'


class Cluster:
    """One NameNode, one DataNode, on 127.0.0.1, with their own folder.

    Args:
        settings: of hdfs-site.xml, besides what makes it run here.
    """

    def __init__(self, folder: Path, settings: Mapping[str, str] | None = None) -> None:
        self._folder = folder
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self.port, self._name_web, self._data_port, self._data_ipc, self._data_web = free_ports(5)
        self._configure(settings or {})
        subprocess.run(
            [*self._command("namenode"), "-format", "-nonInteractive"],
            env=_environment(),
            check=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=START_S,
        )
        self.start("namenode")
        self.start("datanode")
        self.wait()

    @property
    def url(self) -> str:
        return f"hdfs://127.0.0.1:{self.port}"

    def start(self, which: str) -> None:
        """``namenode`` or ``datanode``; one that ran before goes on from its folder."""
        with (self._folder / f"{which}.log").open("ab") as said:
            self._processes[which] = subprocess.Popen(
                self._command(which), stdout=said, stderr=said, env=_environment()
            )

    def wait(self) -> None:
        """Until a file can be written and read: the NameNode has left safe mode, and the DataNode is back with it."""
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            store = HdfsStore(f"{self.url}/ready", {"timeout_s": "5"})
            with contextlib.suppress(StoreError, CommitConflictError, NotFoundError):
                store.create("ready", b"yes")
            with contextlib.suppress(StoreError, NotFoundError):
                store.read("ready", 3)
                store.delete("ready")
                return
            for which, process in self._processes.items():
                with contextlib.suppress(subprocess.TimeoutExpired):  # as it should be
                    process.wait(0.05)
                    said = (self._folder / f"{which}.log").read_text()
                    raise AssertionError(f"the {which} ended: {said[-3000:]}")
        raise AssertionError(f"the servers did not come up in {START_S:.0f} s")

    def facts(self, which: str, bean: str) -> dict[str, object]:
        """What a server says about itself (JMX)."""
        port = self._name_web if which == "namenode" else self._data_web
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/jmx?qry={bean}", timeout=5) as answer:
            beans: list[dict[str, object]] = json.load(answer)["beans"]
        return beans[0] if beans else {}

    def kill(self, which: str) -> None:
        """SIGKILL."""
        process = self._processes.pop(which)
        process.kill()
        process.wait()

    def pause(self, which: str) -> None:
        """SIGSTOP: connections stay open, and nothing answers."""
        self._processes[which].send_signal(signal.SIGSTOP)

    def resume(self, which: str) -> None:
        self._processes[which].send_signal(signal.SIGCONT)

    def close(self) -> None:
        for which in list(self._processes):
            self.kill(which)
        shutil.rmtree(self._folder, ignore_errors=True)

    def _command(self, which: str) -> list[str]:
        java = shutil.which("java")
        assert java is not None
        assert JARS is not None
        classes = ":".join([str(self._folder / "conf"), f"{Path(JARS).resolve()}/*", *_SYSTEM_JARS])
        temporary = self._folder / "java"  # the web servers unpack themselves there
        temporary.mkdir(exist_ok=True)
        options = ["-Xmx192m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-Djava.net.preferIPv4Stack=true"]
        options += [f"-Djava.io.tmpdir={temporary}", "-XX:-UsePerfData"]
        return [java, *options, *_OPENED, "-cp", classes, _CLASSES[which]]

    def _configure(self, settings: Mapping[str, str]) -> None:
        conf = self._folder / "conf"
        for kind in ("hdfs", "datanode"):
            (conf / "webapps" / kind / "WEB-INF").mkdir(parents=True)
            (conf / "webapps" / kind / "WEB-INF" / "web.xml").write_text(_WEB)
        (conf / "log4j.properties").write_text(_LOG4J)
        (conf / "hadoop-metrics2.properties").write_text("*.period=1\n")
        core = {
            "fs.defaultFS": self.url,
            "hadoop.tmp.dir": str(self._folder / "tmp"),
            "hadoop.http.staticuser.user": USER,
        }
        hdfs = {
            "dfs.replication": "1",
            "dfs.namenode.name.dir": f"file://{self._folder}/name",
            "dfs.datanode.data.dir": f"file://{self._folder}/data",
            "dfs.namenode.http-address": f"127.0.0.1:{self._name_web}",
            "dfs.datanode.address": f"127.0.0.1:{self._data_port}",
            "dfs.datanode.ipc.address": f"127.0.0.1:{self._data_ipc}",
            "dfs.datanode.http.address": f"127.0.0.1:{self._data_web}",
            "dfs.datanode.hostname": "127.0.0.1",
            "dfs.namenode.datanode.registration.ip-hostname-check": "false",
            "dfs.permissions.enabled": "false",
            "dfs.webhdfs.enabled": "false",
            "dfs.namenode.safemode.extension": "0",
            "dfs.heartbeat.interval": "1",
            "dfs.namenode.fs-limits.min-block-size": "4096",
            **settings,
        }
        _write_settings(conf / "core-site.xml", core)
        _write_settings(conf / "hdfs-site.xml", hdfs)


@contextmanager
def cluster(folder: Path, settings: Mapping[str, str] | None = None) -> Iterator[Cluster]:
    """Servers that answer, for a ``with`` block."""
    running = Cluster(folder, settings)
    try:
        yield running
    finally:
        running.close()


@functools.cache
def shared() -> Cluster:
    """One cluster for all tests of this process that kill none of its servers; it ends with the process."""
    folder = Path(tempfile.mkdtemp(prefix="ciuic-hdfs-"))
    running = Cluster(folder)
    atexit.register(running.close)
    return running


def _environment() -> dict[str, str]:
    return {"PATH": os.environ.get("PATH", ""), "HADOOP_USER_NAME": USER}


def _write_settings(path: Path, settings: Mapping[str, str]) -> None:
    rows = (
        f"<property><name>{name}</name><value>{escape(value)}</value></property>" for name, value in settings.items()
    )
    path.write_text(f"<configuration>{''.join(rows)}</configuration>\n")
