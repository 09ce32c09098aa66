"""How much host memory staging takes: never more than its bound, whatever the state."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ciuic_async import UsageError
from ciuic_async.format.chain_file import CHUNK_SIZE_BYTES
from ciuic_async.options import STAGING
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
