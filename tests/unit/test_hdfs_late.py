"""Answers of HDFS that come when nobody waits for them any more."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest

from ciuic_async.errors import StoreError
from ciuic_async.stores.hdfs import HdfsStore

pytest.importorskip("hdfs_native")
WAIT_S = 30.0


class LateClient:
    """Answers a read when it is let go; client and reader in one."""

    def __init__(self) -> None:
        self.go = threading.Event()

    def read(self, path: str) -> LateClient:
        return self

    def __len__(self) -> int:
        return 4096

    def read_range(self, offset: int, size: int) -> bytes:
        assert self.go.wait(WAIT_S)
        return b"x" * size


def _at_once(store: HdfsStore, buffer: memoryview) -> None:
    store.read_into("segments/a", 0, buffer)


def _aligned(store: HdfsStore, buffer: memoryview) -> None:
    store.open_direct("segments/a").read_aligned(0, buffer)


@pytest.mark.parametrize("read", [_at_once, _aligned])
def test_a_late_answer_leaves_the_callers_memory_alone(read: Callable[[HdfsStore, memoryview], None]) -> None:
    """Readers use their memory again after an error: what a call that was given up still gets is not written there,
    where it would exchange bytes that were checked before."""
    store = HdfsStore("hdfs://127.0.0.1:1/x", {"timeout_s": "0.05"})
    client: Any = LateClient()
    link = store._link
    link._client = client
    memory = bytearray(4096)
    with pytest.raises(StoreError) as caught:
        read(store, memoryview(memory))
    assert caught.value.kind == "unreachable"
    left = list(link._left)
    assert left
    memory[:] = b"o" * 4096
    client.go.set()
    for thread in left:
        thread.join(WAIT_S)
        assert not thread.is_alive()
    assert memory == b"o" * 4096
