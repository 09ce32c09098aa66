"""How much host memory staging takes: never more than its bound, whatever the state."""

from __future__ import annotations

import logging
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ciuic_async import UsageError
from ciuic_async.format.chain_file import CHUNK_SIZE_BYTES
from ciuic_async.options import STAGING
from ciuic_async.staging import budget
from ciuic_async.staging.budget import available_bytes, check_bound, plan_slots

sizes = st.integers(0, 1 << 44)
bounds = st.integers(STAGING.minimum_bytes, 1 << 44)


@given(state_bytes=sizes, bound=bounds)
def test_a_plan_stays_within_its_bound(state_bytes: int, bound: int) -> None:
    """All slots together are no larger than host_memory_bytes, and a whole state fits into one unless windowed."""
    plan = plan_slots(state_bytes, bound, CHUNK_SIZE_BYTES)
    assert plan.count * plan.size_bytes <= bound
    assert plan.size_bytes > 0
    if plan.windowed:
        assert bound < state_bytes + 4096
        assert plan.size_bytes % CHUNK_SIZE_BYTES == 0
        assert plan.count == 2, "one is filled while the other is written"
    else:
        assert plan.size_bytes >= state_bytes


@given(state_bytes=sizes)
def test_the_default_bound_leaves_most_memory_to_training(state_bytes: int) -> None:
    """Twice the state, but no more than its share of what is left."""
    plan = plan_slots(state_bytes, None, CHUNK_SIZE_BYTES)
    total = plan.count * plan.size_bytes
    assert total <= max(2 * state_bytes + 8192, STAGING.minimum_bytes)
    assert total <= max(int(STAGING.memory_fraction * available_bytes() * 1.1), STAGING.minimum_bytes)


def test_two_slots_where_they_fit_one_where_not() -> None:
    """The three ways to stage a state, by the bound."""
    state = 100 << 20
    assert plan_slots(state, 200 << 20, CHUNK_SIZE_BYTES).count == 2
    one = plan_slots(state, 199 << 20, CHUNK_SIZE_BYTES)
    assert (one.count, one.windowed) == (1, False)
    assert plan_slots(state, 99 << 20, CHUNK_SIZE_BYTES).windowed


def test_what_slots_hold_counts_as_left() -> None:
    """A machine whose free memory our own slots took still gets the same plan."""
    here = available_bytes()
    state = int(here * 0.3)
    assert (
        plan_slots(state, None, CHUNK_SIZE_BYTES, held_bytes=here).count
        >= plan_slots(state, None, CHUNK_SIZE_BYTES).count
    )


def _cgroup(folder: Path, files: budget._CgroupFiles, contents: dict[str, str]) -> budget._CgroupFiles:
    """The files of a cgroup in a folder; those without contents do not exist."""
    folder.mkdir()
    for name, text in contents.items():
        (folder / name).write_text(text)
    limit, usage, stat = (str(folder / name) for name in ("limit", "usage", "stat"))
    return budget._CgroupFiles(limit, usage, stat, files.page_cache)


V1_STAT = "inactive_file 1\nactive_file 1\ntotal_inactive_file 5000\ntotal_active_file 2000\n"
V2_STAT = "anon 1500\nfile 7500\nshmem 500\ninactive_file 5000\nactive_file 2000\ninactive_anon 77\n"


@pytest.mark.parametrize(
    ("version", "contents", "left"),
    [
        pytest.param(2, {"limit": "10000\n", "usage": "9000\n", "stat": V2_STAT}, 8000, id="v2"),
        pytest.param(1, {"limit": "10000\n", "usage": "9000\n", "stat": V1_STAT}, 8000, id="v1"),
        pytest.param(2, {"limit": "10000", "usage": "6000", "stat": V2_STAT}, 10000, id="more cache than usage"),
        pytest.param(2, {"limit": "10000", "usage": "19000", "stat": V2_STAT}, 0, id="over the limit"),
        pytest.param(2, {"limit": "10000", "usage": "9000"}, 1000, id="no stat"),
        pytest.param(2, {"limit": "10000", "usage": "9000", "stat": "x\nactive_file\nactive_file y\n"}, 1000, id="odd"),
        pytest.param(2, {"limit": "max\n", "usage": "9000", "stat": V2_STAT}, None, id="no limit"),
    ],
)
def test_page_cache_does_not_count_as_taken(
    version: int, contents: dict[str, str], left: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a cgroup leaves is its limit less what the kernel cannot take back by itself; shared memory is not cache."""
    files = budget._CGROUPS[{2: 0, 1: 1}[version]]
    monkeypatch.setattr(budget, "_CGROUPS", ())
    machine = available_bytes()
    monkeypatch.setattr(budget, "_CGROUPS", (_cgroup(tmp_path / "cgroup", files, contents),))
    if left is None:
        assert available_bytes() == pytest.approx(machine, rel=0.5)
    else:
        assert available_bytes() == left


def test_a_cache_full_of_data_does_not_force_windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cgroup that reading a data set filled to its limit still stages the state whole."""
    mib = 1 << 20
    contents = {"limit": f"{200 * mib}", "usage": f"{199 * mib}", "stat": f"inactive_file {180 * mib}\nactive_file 0\n"}
    monkeypatch.setattr(budget, "_CGROUPS", (_cgroup(tmp_path / "cgroup", budget._CGROUPS[0], contents),))
    assert not plan_slots(32 * mib, None, CHUNK_SIZE_BYTES).windowed


def test_windows_that_nobody_asked_for_are_warned_of_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The default bound that forces windows says so once, with what to do; a bound of the user's does not."""
    monkeypatch.setattr(budget, "available_bytes", lambda: 64 << 20)
    monkeypatch.setattr(budget, "_warned", threading.Event())
    with caplog.at_level(logging.WARNING, "ciuic_async"):
        assert plan_slots(40 << 20, 16 << 20, CHUNK_SIZE_BYTES).windowed
        assert not plan_slots(1 << 20, None, CHUNK_SIZE_BYTES).windowed
        assert caplog.messages == []
        for growth in range(3):
            assert plan_slots((40 + growth) << 20, None, CHUNK_SIZE_BYTES).windowed
    assert len(caplog.messages) == 1
    assert f"host_memory_bytes={40 << 20}" in caplog.messages[0]


@pytest.mark.parametrize("bound", [0, -1, STAGING.minimum_bytes - 1])
def test_a_bound_that_cannot_work_is_refused(bound: int) -> None:
    """Less than two chunks: a UsageError says how much is needed."""
    with pytest.raises(UsageError, match=str(STAGING.minimum_bytes)):
        check_bound(bound)


def test_bounds_that_work_are_accepted() -> None:
    """None, and two chunks or more."""
    check_bound(None)
    check_bound(STAGING.minimum_bytes)
    assert 0 < available_bytes() < 1 << 62
