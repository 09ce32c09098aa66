"""How much host memory staging may take."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ciuic_async.errors import UsageError
from ciuic_async.format.segment import align_up
from ciuic_async.options import STAGING

_CGROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


@dataclass(frozen=True, slots=True)
class SlotPlan:
    """``count`` slots of ``size_bytes`` payload each. ``windowed``: the state does not fit into one of them."""

    count: int
    size_bytes: int
    windowed: bool


def available_bytes() -> int:
    """Memory that this process may still take: the least of what the machine and the cgroup leave."""
    left = [_meminfo_available()]
    for limit_file, usage_file in _CGROUPS:
        limit, usage = _number(limit_file), _number(usage_file)
        if limit is not None and usage is not None:
            left.append(max(limit - usage, 0))
    return min(left)


def check_bound(host_memory_bytes: int | None) -> None:
    """Refuse a bound that cannot work.

    Raises:
        UsageError: less than ``StagingOptions.minimum_bytes``.
    """
    if host_memory_bytes is not None and host_memory_bytes < STAGING.minimum_bytes:
        raise UsageError(
            f"host_memory_bytes={host_memory_bytes}: at least {STAGING.minimum_bytes} bytes (two chunks) are needed"
        )


def plan_slots(state_bytes: int, host_memory_bytes: int | None, chunk_size_bytes: int, held_bytes: int = 0) -> SlotPlan:
    """Choose number and size of slots for a state.

    Two whole slots if they fit, one whole slot if that fits (the next snapshot then waits until this one is durable),
    else two windows of half the bound.

    Args:
        state_bytes: length of the plan's address space.
        host_memory_bytes: the user's bound; None for the smaller of twice the state and a share of what is left.
        chunk_size_bytes: windows hold whole chunks.
        held_bytes: what slots hold already; it is ours and counts as left.
    """
    needed = max(align_up(state_bytes, 4096), 4096)
    bound = host_memory_bytes
    if bound is None:
        share = int(STAGING.memory_fraction * (available_bytes() + held_bytes))
        bound = max(min(STAGING.slots * needed, share), STAGING.minimum_bytes)
    if bound >= STAGING.slots * needed:
        return SlotPlan(STAGING.slots, needed, windowed=False)
    if bound >= needed:
        return SlotPlan(1, needed, windowed=False)
    window = max(bound // 2 // chunk_size_bytes, 1) * chunk_size_bytes
    return SlotPlan(2, window, windowed=True)


def _number(path: str) -> int | None:
    try:
        text = Path(path).read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None  # "max": no limit


def _meminfo_available() -> int:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 1 << 62
