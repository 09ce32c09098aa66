"""Chains in HDFS, on a real NameNode and a real DataNode that die and hang."""

from __future__ import annotations

import gc
import json
import os
import random
import select
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from uuid import uuid4

import pytest
import torch

from ciuic_async import Checkpointer, CiuicWarning, KeepLatest, SnapshotChain
from ciuic_async.cli.main import main
from ciuic_async.errors import CommitConflictError, IntegrityError, NotFoundError, StoreError, UsageError
from ciuic_async.format import layout
from ciuic_async.stores import hdfs as stores_hdfs
from ciuic_async.stores.hdfs import HdfsStore
from ciuic_async.stores.hdfs_link import store_error
from ciuic_async.stores.resolve import resolve
from tests.services import hdfs
from tests.services.etcd import free_ports
from tests.services.hdfs import ROOT, Cluster

needs_servers = pytest.mark.skipif(hdfs.JARS is None, reason=hdfs.WHY_NOT)
A = "a" * 20
NAME = layout.segment(A, 0, 0)


@pytest.fixture
def cluster() -> Cluster:
    """Servers that this test does not kill."""
    return hdfs.shared()


@pytest.fixture
def url(cluster: Cluster) -> str:
    """A folder that nobody has used."""
    return f"{cluster.url}/test/{uuid4().hex}"


@pytest.fixture
def store(url: str) -> Iterator[HdfsStore]:
    store = HdfsStore(url)
    store.initialize()
    yield store
    store.close()


@pytest.fixture
def own_cluster(tmp_path: Path) -> Iterator[Cluster]:
    """Servers of this test's own, which it may kill."""
    with hdfs.cluster(tmp_path / "cluster") as running:
        yield running


def temporary_names(store: HdfsStore) -> list[str]:
    return sorted(store._folder(layout.TEMPORARY))


# --- without servers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "place"),
    [
        ("hdfs://host:8020/runs/a", "hdfs://host:8020/runs/a"),
        ("HDFS://host:8020//runs/a/", "hdfs://host:8020/runs/a"),
        ("hdfs://prod/runs/with%20space", "hdfs://prod/runs/with space"),
        ("hdfs://[::1]:8020/runs", "hdfs://[::1]:8020/runs"),
    ],
)
def test_urls(url: str, place: str) -> None:
    """Host, port and path are what they look like; the store names its place the same way, and contacts nobody."""
    store = resolve(url)
    assert isinstance(store, HdfsStore)
    assert store.url == place
    store.close()


@pytest.mark.parametrize(
    "url",
    [
        "hdfs://host:8020",
        "hdfs://host:8020/",
        "hdfs:///runs",
        "hdfs://host:port/runs",
        "hdfs://me:secret@host:8020/runs",
        "hdfs://host:8020/runs?x=1",
        "hdfs://host:8020/runs#x",
        "hdfs://host:8020/a/../b",
        "hdfs://host:8020/a%00b",
        "hdfs://ho st/runs",
    ],
)
def test_urls_that_cannot_be_meant(url: str) -> None:
    """They are refused before anything is contacted; a password in one is not repeated. The root is nobody's chain."""
    with pytest.raises(UsageError) as caught:
        resolve(url)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "options", [{"timeout": "1"}, {"timeout_s": "0"}, {"timeout_s": "soon"}, {"block_size_bytes": "1000"}]
)
def test_options_that_cannot_be_meant(options: dict[str, str]) -> None:
    """An unknown option, and one whose value makes no sense, are named."""
    with pytest.raises(UsageError, match=next(iter(options))):
        HdfsStore("hdfs://host:8020/runs", options)


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where hdfs-native is not installed, the error says what to install."""
    monkeypatch.setattr(stores_hdfs.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UsageError, match=r"ciuic-async\[hdfs\]") as caught:
        HdfsStore("hdfs://host:8020/runs")
    assert caught.value.kind == "missing_extra"


def test_nobody_listens() -> None:
    """Every call fails in time, with a kind and the place; nothing raises on the way out."""
    (port,) = free_ports(1)
    store = HdfsStore(f"hdfs://127.0.0.1:{port}/runs", {"timeout_s": "20"})
    calls: list[Callable[[], object]] = [
        store.initialize,
        lambda: store.read(NAME, 10),
        lambda: store.begin(NAME),
    ]
    for call in calls:
        with pytest.raises(StoreError, match=str(port)) as caught:
            call()
        assert caught.value.kind == "unreachable"
    store.close()
    store.close()


def test_a_name_that_stands_for_no_name_node(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name service that no configuration defines is the caller's mistake, and the message says where to define it."""
    monkeypatch.delenv("HADOOP_CONF_DIR", raising=False)
    monkeypatch.delenv("HADOOP_HOME", raising=False)
    with pytest.raises(UsageError, match="HADOOP_CONF_DIR") as caught:
        HdfsStore("hdfs://production/runs").size(NAME)
    assert caught.value.kind == "unknown_nameservice"


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (
            RuntimeError('RPCError("org.apache.hadoop.security.AccessControlException", "Permission denied: x")'),
            "access_denied",
        ),
        (
            RuntimeError('RPCError("org.apache.hadoop.hdfs.protocol.DSQuotaExceededException", "The DiskSpace")'),
            "edquot",
        ),
        (RuntimeError('RPCError("org.apache.hadoop.hdfs.server.namenode.SafeModeException", "x")'), "unavailable"),
        (RuntimeError('RPCError("java.io.IOException", "File x could only be replicated to 0 nodes")'), "unavailable"),
        (RuntimeError('DataTransferError("All nodes failed for write")'), "unreachable"),
        (OSError("RPC listener disconnected"), "unreachable"),
        (RuntimeError("\x1b[31m" + "x" * 10_000), "hdfs"),
    ],
)
def test_errors_have_kinds(error: Exception, kind: str) -> None:
    """What the servers say becomes a kind and one printable, bounded line that names the place."""
    found = store_error("hdfs://host:1/x/log", "log", error)
    assert found.kind == kind
    assert str(found).isprintable()
    assert str(found).startswith("hdfs://host:1/x/log: ")
    assert len(str(found)) < 600


# --- the store --------------------------------------------------------------------------------------------------------


@needs_servers
def test_what_is_durable_was_synced(cluster: Cluster, url: str) -> None:
    """The DataNode counts an fsync for each block of a file, not only for the last one."""

    def synced() -> int:
        facts = cluster.facts("datanode", "Hadoop:service=DataNode,name=DataNodeActivity-127.0.0.1-*")
        return int(str(facts["FsyncCount"]))

    store = HdfsStore(url, {"block_size_bytes": "1048576"})
    store.initialize()
    before = synced()
    store.create(NAME, bytes(5 << 20))
    deadline = time.monotonic() + 30
    while synced() - before < 5:  # what it says about itself is up to a second old
        assert time.monotonic() < deadline
    assert store.read(NAME, 5 << 20) == bytes(5 << 20)
    store.close()


@needs_servers
def test_across_blocks(url: str) -> None:
    """Ranges that begin and end anywhere, over the borders of blocks, are those that were written."""
    store = HdfsStore(url, {"block_size_bytes": "1048576"})
    store.initialize()
    data = random.Random(1).randbytes((5 << 20) + 12345)
    file = store.begin(NAME)
    for start in range(0, len(data), 700_001):
        file.write(data[start : start + 700_001])
    store.publish([file])
    for start, size in [(0, len(data)), (1 << 20, 1 << 20), ((1 << 20) - 1, 2), (3_000_000, 2_255_225)]:
        memory = bytearray(size)
        store.read_into(NAME, start, memoryview(memory))
        assert memory == data[start : start + size]
    store.close()


@needs_servers
def test_a_lost_answer_is_judged_by_what_is_there(store: HdfsStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rename that was done and never acknowledged counts as done; one that was not done fails, and leaves nothing."""
    from hdfs_native import Client

    true_rename = Client.rename

    def lose(client: Client, source: str, target: str, overwrite: bool = False) -> None:
        true_rename(client, source, target, overwrite)
        raise OSError("RPC listener disconnected")

    def refuse(_client: Client, _source: str, _target: str, _overwrite: bool = False) -> None:
        raise OSError("RPC listener disconnected")

    monkeypatch.setattr(Client, "rename", lose)
    store.create(layout.slot(0), b"mine")
    store.overwrite(layout.LOG_HEAD, b"head")
    file = store.begin(NAME)
    file.write(b"segment")
    store.publish([file])
    with pytest.raises(CommitConflictError):
        store.create(layout.slot(0), b"other")
    monkeypatch.setattr(Client, "rename", refuse)
    with pytest.raises(StoreError):
        store.create(layout.slot(1), b"mine")
    with pytest.raises(StoreError):
        store.create(layout.slot(0), b"other")
    with pytest.raises(StoreError):
        store.overwrite(layout.LOG_HEAD, b"next")
    monkeypatch.undo()
    assert store.read(layout.slot(0), 100) == b"mine"
    assert store.read(layout.LOG_HEAD, 100) == b"head"
    assert store.read(NAME, 100) == b"segment"
    assert store.size(layout.slot(1)) is None
    assert temporary_names(store) == []


@needs_servers
def test_a_server_that_sends_less_than_it_says(store: HdfsStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Missing bytes are an integrity error, wherever a file is read; a length beyond the limit is refused unread."""
    from hdfs_native import FileReader

    store.create(NAME, b"0123456789")
    direct = store.open_direct(NAME)
    monkeypatch.setattr(FileReader, "read_range", lambda _reader, _offset, size: b"x" * (size - 1))
    for call in (
        lambda: store.read(NAME, 100),
        lambda: store.read_into(NAME, 0, memoryview(bytearray(10))),
        lambda: direct.read_aligned(0, memoryview(bytearray(10))),
    ):
        with pytest.raises(IntegrityError) as caught:
            call()
        assert caught.value.kind == "truncated"
    monkeypatch.setattr(FileReader, "__len__", lambda _reader: 1 << 62)
    with pytest.raises(IntegrityError) as caught:
        store.read(NAME, 100)
    assert caught.value.kind == "file_too_large"
    direct.close()


@needs_servers
def test_folders_are_no_files(store: HdfsStore) -> None:
    """A folder where a file is expected, and a file where a folder is, are errors with kinds."""
    store.create(NAME, b"x")
    for call in (lambda: store.read("segments", 10), lambda: store.size("segments")):
        with pytest.raises(IntegrityError) as caught:
            call()
        assert caught.value.kind == "not_a_file"
    for write in (lambda: list(store.list(NAME)), HdfsStore(f"{store.url}/{NAME}").initialize):
        with pytest.raises(StoreError) as refused:
            write()
        assert refused.value.kind == "enotdir"


@needs_servers
def test_sweep_goes_by_age_and_spares_its_own(store: HdfsStore) -> None:
    """What a dead writer left goes when it is old enough; the open files of this process stay, however old."""
    left = subprocess.run(
        [sys.executable, "-c", _LEAVE, store.url], cwd=ROOT, stdout=subprocess.PIPE, check=False, text=True
    )
    assert left.returncode == -signal.SIGKILL
    mine = store.begin(NAME)
    assert len(temporary_names(store)) == 2
    assert store.sweep_unpublished(3600.0) == 0
    assert store.sweep_unpublished(-1.0) == 1
    mine.write(b"goes on")
    store.publish([mine])
    assert store.read(NAME, 100) == b"goes on"
    assert temporary_names(store) == []


_LEAVE = """
import os, signal, sys
from ciuic_async.stores.hdfs import HdfsStore
store = HdfsStore(sys.argv[1])
file = store.begin("segments/" + "b" * 20 + "/0-0.seg")
file.write(b"x" * 5_000_000)
os.kill(os.getpid(), signal.SIGKILL)
"""


@needs_servers
def test_descriptors_and_threads_stay_flat(url: str) -> None:
    """Stores that come and go leave no thread, and not more connections than a few."""

    def use() -> int:
        store = HdfsStore(url)
        store.initialize()
        store.overwrite(layout.LOG_HEAD, b"x")
        assert store.read(layout.LOG_HEAD, 10) == b"x"
        store.close()
        gc.collect()
        return len(os.listdir("/proc/self/fd"))

    counts = [use() for _ in range(12)]
    # The client library keeps the connections to DataNodes of the last three seconds.
    assert max(counts[4:]) <= max(counts[:4]) + 8
    assert not [thread for thread in threading.enumerate() if thread.name == "ciuic-hdfs"]


@needs_servers
def test_a_forked_child_does_nothing(store: HdfsStore) -> None:
    """It cannot use the store, says why, takes nothing away from its parent, and ends; the parent goes on."""
    file = store.begin(NAME)
    file.write(b"parent")
    child = os.fork()
    if child == 0:
        code = 1
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                file.discard()
                for which in (store, HdfsStore(store.url)):
                    try:
                        which.read(NAME, 10)
                    except StoreError as error:
                        code = 0 if error.kind == "forked" else 2
                store.close()
                del file, store
                gc.collect()
        finally:
            os._exit(code)
    handle = os.pidfd_open(child)
    ended, _, _ = select.select([handle], [], [], 30)
    os.close(handle)
    if not ended:
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    store.publish([file])
    assert store.read(NAME, 10) == b"parent"


@needs_servers
def test_the_other_name_node_is_asked(cluster: Cluster) -> None:
    """A name service of two, of which the first is dead: calls go to the second."""
    (dead,) = free_ports(1)
    store = HdfsStore(
        f"hdfs://two/test/{uuid4().hex}",
        {
            "dfs.nameservices": "two",
            "dfs.ha.namenodes.two": "a,b",
            "dfs.namenode.rpc-address.two.a": f"127.0.0.1:{dead}",
            "dfs.namenode.rpc-address.two.b": f"127.0.0.1:{cluster.port}",
        },
    )
    store.initialize()
    store.create(NAME, b"x")
    assert store.read(NAME, 10) == b"x"
    store.close()


@needs_servers
def test_a_user_who_may_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who has no permission is told so for each call that writes, and may read what is open to all."""
    monkeypatch.setenv("HADOOP_USER_NAME", hdfs.USER)
    with hdfs.cluster(tmp_path / "cluster", {"dfs.permissions.enabled": "true"}) as running:
        owner = HdfsStore(f"{running.url}/runs")
        owner.initialize()
        owner.create(NAME, b"x")
        monkeypatch.setenv("HADOOP_USER_NAME", "stranger")
        stranger = HdfsStore(owner.url)
        calls: list[Callable[[], object]] = [
            HdfsStore(f"{running.url}/other").initialize,
            lambda: stranger.begin(layout.slot(0)),
            lambda: stranger.delete(NAME),
            stranger.now_s,
        ]
        for call in calls:
            with pytest.raises(StoreError, match="ermission") as caught:
                call()
            assert caught.value.kind == "access_denied"
        assert stranger.read(NAME, 10) == b"x"
        owner.close()
        stranger.close()


@needs_servers
def test_servers_that_hang(own_cluster: Cluster) -> None:
    """While they are stopped, calls fail in time and say so, and a few threads wait; afterwards all goes on."""
    store = HdfsStore(f"{own_cluster.url}/runs", {"timeout_s": "0.5"})
    patient = HdfsStore(f"{own_cluster.url}/runs")
    patient.initialize()
    patient.create(NAME, b"x")
    own_cluster.pause("namenode")
    started = time.monotonic()
    for _ in range(12):
        with pytest.raises(StoreError) as caught:
            store.size(NAME)
        assert caught.value.kind == "unreachable"
    assert time.monotonic() - started < 30
    assert len([thread for thread in threading.enumerate() if thread.name == "ciuic-hdfs"]) <= 8
    own_cluster.resume("namenode")
    assert patient.read(NAME, 10) == b"x"
    own_cluster.pause("datanode")
    with pytest.raises(StoreError) as caught:
        store.read(NAME, 10)
    assert caught.value.kind == "unreachable"
    own_cluster.resume("datanode")
    assert patient.read(NAME, 10) == b"x"
    store.close()
    patient.close()


# --- chains -----------------------------------------------------------------------------------------------------------


def _training(seed: int) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(200, 300), torch.nn.ReLU(), torch.nn.Linear(300, 10))
    return model, torch.optim.AdamW(model.parameters(), lr=1e-3)


def _train(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> float:
    optimizer.zero_grad()
    loss = model(torch.randn(16, 200)).square().mean()
    loss.backward()
    optimizer.step()
    return loss.item()


def _bits(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> list[bytes]:
    moments = [value for state in optimizer.state_dict()["state"].values() for value in state.values()]
    return [tensor.detach().numpy().tobytes() for tensor in (*model.state_dict().values(), *moments)]


@needs_servers
def test_train_restore_rollback_prune(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A run over an HDFS chain comes back bit for bit; verify, rollback, prune, gc and the command line work on it."""
    model, optimizer = _training(1)
    wanted = {}
    with Checkpointer(url, {"model": model, "optimizer": optimizer}, every_steps=2) as ckpt:
        assert ckpt.restore() is None
        for step in range(1, 7):
            loss = _train(model, optimizer)
            ckpt.step(metrics={"loss": loss})
            wanted[step] = _bits(model, optimizer)
    other, its_optimizer = _training(2)
    with Checkpointer(url, {"model": other, "optimizer": its_optimizer}) as ckpt:
        progress = ckpt.restore()
        assert progress is not None
        assert progress.step == 6
    assert _bits(other, its_optimizer) == wanted[6]
    with SnapshotChain(url) as chain:
        assert [snapshot.step for snapshot in chain] == [2, 4, 6]
        assert chain.verify().problems == ()
        chain.rollback("step:2", "to try again")
        assert chain.latest().step == 2
        chain.prune(KeepLatest(1))
        assert chain.verify().problems == ()
    codes = {}
    for command in (["log"], ["verify"], ["show"], ["keys", "show"], ["gc"], ["tag"]):
        words = [*command, url, *(["good", "latest"] if command == ["tag"] else []), "--json"]
        codes[" ".join(command)] = main(words)
        json.loads(capsys.readouterr().out)
    assert codes == dict.fromkeys(codes, 0)


@needs_servers
def test_no_chain_there(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder without a chain is not found, whatever asks."""
    assert main(["log", url]) == 3
    assert "no chain" in capsys.readouterr().err
    with pytest.raises(NotFoundError):
        SnapshotChain(url, create=False)


_WRITE = """
import sys, torch
from ciuic_async import Checkpointer
weight = torch.zeros(300_000)
with Checkpointer(sys.argv[1], {"w": weight}, rng=False, key=sys.argv[2]) as ckpt:
    for turn in range(1_000_000):
        weight.fill_(turn)
        print(ckpt.save().wait_durable(120).id, flush=True)
"""


def _writer(url: str, key: Path) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", _WRITE, url, str(key)], cwd=ROOT, stdout=subprocess.PIPE, text=True)


def _line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


@needs_servers
def test_a_writer_is_killed_beside_another(url: str, tmp_path: Path) -> None:
    """Two processes on one chain, one dies by SIGKILL, a lease in hand: what either was told is durable is there."""
    writers = [_writer(url, tmp_path / f"key{number}") for number in range(2)]
    told = [_line(writer) for writer in writers for _ in range(2)]
    writers[0].kill()
    told += [_line(writers[1]) for _ in range(3)]
    writers[1].kill()
    for writer in writers:
        assert writer.stdout is not None
        told += [line for line in writer.stdout.read().split() if len(line) == 20]
        writer.stdout.close()
        writer.wait()
    with SnapshotChain(url) as chain:
        assert set(told) <= {snapshot.id for snapshot in chain}
        assert chain.verify().problems == ()


@needs_servers
def test_servers_die_under_training(own_cluster: Cluster, tmp_path: Path) -> None:
    """Both servers are killed and started again amid saves: training goes on, what was durable stays, all verifies."""
    weight = torch.zeros(2_000_000)
    told: list[str] = []
    url = f"{own_cluster.url}/runs/a"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CiuicWarning)
        with Checkpointer(url, {"w": weight}, rng=False) as ckpt:

            def save() -> object:
                weight.add_(1)
                pending = ckpt.save()
                pending.add_done_callback(
                    lambda done: told.append(done.wait_durable(0).id) if done.phase == "durable" else None
                )
                return pending

            save().wait_durable(120)  # type: ignore[attr-defined]
            for which in ("datanode", "namenode", "datanode", "namenode"):
                save()
                own_cluster.kill(which)
                broken = save()
                with pytest.raises(Exception, match="did not become durable"):
                    broken.wait_durable(120)  # type: ignore[attr-defined]
                own_cluster.start(which)
                own_cluster.wait()
                save().wait_durable(120)  # type: ignore[attr-defined]
    assert len(told) >= 5
    with SnapshotChain(url) as chain:
        assert set(told) <= {snapshot.id for snapshot in chain}
        assert chain.verify().problems == ()
        assert torch.equal(chain.latest().load()["w"], weight)
