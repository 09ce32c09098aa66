"""What every test gets: a home of its own, and a look at what it leaves behind."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from ciuic_async.stores.local import LocalStore
from ciuic_async.verify import verify_store

# Deadlines measure the machine and not the code; what must be quick says so in its own test.
settings.register_profile("local", deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("ci", settings.get_profile("local"), derandomize=True, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")

JOIN_TIMEOUT_S = 10.0


@pytest.fixture(autouse=True)
def _own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys and pins go where only this test looks; no test reads the user's."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "home" / "config"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "home" / "state"))
    monkeypatch.delenv("CIUIC_KEY", raising=False)


@pytest.fixture(autouse=True)
def _no_thread_leak() -> Iterator[None]:
    """Threads of this package end with the object that started them."""
    before = set(threading.enumerate())
    yield
    for thread in _own_threads(before):
        thread.join(JOIN_TIMEOUT_S)
    left = [thread.name for thread in _own_threads(before)]
    assert not left, f"the test left threads running: {left}"


@pytest.fixture(autouse=True)
def _chains_verify(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[None]:
    """Every chain that a test leaves behind verifies, unless the test is marked ``damages``."""
    yield
    if request.node.get_closest_marker("damages") is not None:
        return
    for chain_file in tmp_path.rglob("ciuic.json"):
        store = LocalStore(chain_file.parent)
        problems = verify_store(store).problems
        store.close()
        assert not problems, f"the test left a chain that does not verify: {problems[:3]}"


@pytest.fixture
def no_leaks() -> Iterator[None]:
    """Opt in: the test closes every file descriptor it opened."""
    before = _descriptors()
    yield
    gc.collect()
    left = {number: target for number, target in _descriptors().items() if before.get(number) != target}
    assert not left, f"the test left descriptors open: {left}"


def _own_threads(before: set[threading.Thread]) -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread not in before and thread.name.startswith("ciuic")]


def _descriptors() -> dict[int, str]:
    found = {}
    for entry in os.listdir("/proc/self/fd"):
        try:
            found[int(entry)] = os.readlink(f"/proc/self/fd/{entry}")
        except FileNotFoundError:  # the descriptor of this very listing
            continue
    return found
